"""What ``bench.engines`` serves: ``python -m bench.engine_models JSON`` saves a small Llama with
random weights in bfloat16, and adapters of all its linear layers in PEFT's format."""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama(hidden, layers, vocabulary):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32 if hidden < 512 else hidden // 64,
        num_key_value_heads=hidden // 64 if hidden < 512 else hidden // 128,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.12 * (128 / hidden) ** 0.5,
    )
    return transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def save_adapter(folder, model, number, rank):
    """Each as large as the weight."""
    generator = torch.Generator().manual_seed(100 + number)
    scale, tensors = 2.0 if number % 2 else 0.5, {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in LINEAR:
            n, k = module.weight.shape
            a, b = (torch.randn(*size, generator=generator) for size in ((rank, k), (n, rank)))
            b = b * float(module.weight.detach().float().std()) / (scale * rank**0.5)
            for side, tensor in (("A", a), ("B", b)):
                tensors[f"base_model.model.{path}.lora_{side}.weight"] = tensor.bfloat16()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    sizes = {"r": rank, "lora_alpha": scale * rank, "target_modules": sorted(LINEAR)}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"} | sizes
    (folder / "adapter_config.json").write_text(json.dumps(config))


def main():
    order = json.loads(sys.argv[1])
    folder, ranks = Path(order["folder"]), order["ranks"]
    model = llama(**order["sizes"])
    model.save_pretrained(folder / "model")
    for i in range(order["count"]):
        save_adapter(folder / "adapters" / f"adapter-{i}", model, i, ranks[i % len(ranks)])


if __name__ == "__main__":
    main()
