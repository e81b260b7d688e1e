"""Small models with random weights and adapters in PEFT's format, and what each adapter's model
answers in transformers once it is merged in float64."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
VOCABULARY = 320


@dataclass(frozen=True)
class Adapter:
    name: str
    rank: int
    targets: tuple[str, ...]
    number: int

    @property
    def scale(self):
        return 2.0 if self.number % 2 else 0.5


ADAPTERS = tuple(
    Adapter(name, rank, targets, number)
    for number, (name, rank, targets) in enumerate(
        (
            ("attention-8", 8, ("q_proj", "v_proj")),
            ("linear-16", 16, LINEAR),
            ("linear-64", 64, LINEAR),
            ("gate-12", 12, ("gate_proj", "down_proj")),
            ("head-8", 8, ("q_proj", "lm_head", "embed_tokens")),
            ("keys-32", 32, ("k_proj", "o_proj")),
        )
    )
)


def config_of(family, hidden=128, layers=2, vocabulary=VOCABULARY, positions=1024):
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32 if hidden < 512 else hidden // 64,
        "num_key_value_heads": hidden // 64 if hidden < 512 else hidden // 128,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.12 * (128 / hidden) ** 0.5,
    }
    if family == "llama":
        return transformers.LlamaConfig(**sizes)
    return transformers.Qwen3Config(
        **sizes, head_dim=sizes["hidden_size"] // sizes["num_attention_heads"]
    )


def save_model(folder, family, dtype=torch.float32, **sizes):
    """A model of ``family`` ("llama" or "qwen3") in ``folder``."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **sizes))
    model.to(dtype).save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(model.config.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return Path(folder)


def matrices(adapter, model):
    """{path: (A [r, in], B [out, r])} of every layer the adapter reaches, and of an embedding
    A [r, V], B [D, r]."""
    generator = torch.Generator().manual_seed(100 + adapter.number)
    found = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in adapter.targets:
            n, k = module.weight.shape
            if isinstance(module, torch.nn.Embedding):
                n, k = k, n
            size = float(module.weight.detach().float().std())
            # Together about as large as the weight: the adapter shows in the tokens.
            a = torch.randn(adapter.rank, k, generator=generator)
            b = torch.randn(n, adapter.rank, generator=generator)
            found[path] = a, b * size / (adapter.scale * adapter.rank**0.5)
    return found


def save_adapter(folder, adapter, model, dtype=torch.float32):
    """The adapter in PEFT's format, in a folder of its name below ``folder``."""
    folder = Path(folder, adapter.name)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (a, b) in matrices(adapter, model).items():
        names = ("lora_A.weight", "lora_B.weight")
        if path.endswith("embed_tokens"):
            names = ("lora_embedding_A", "lora_embedding_B")
        for name, tensor in zip(names, (a, b), strict=True):
            tensors[f"base_model.model.{path}.{name}"] = tensor.to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "target_modules": sorted(adapter.targets),
        "bias": "none",
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(folder, adapter):
    """The model with the adapter in its weights; without one the model alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for path, (a, b) in (matrices(adapter, model) if adapter else {}).items():
        weight = model.get_submodule(path).weight
        delta = adapter.scale * b.double() @ a.double()
        delta = delta.t() if path.endswith("embed_tokens") else delta
        weight.data = (weight.double() + delta).float()
    return model


@torch.no_grad()
def greedy(model, prompt, tokens):
    """The next ``tokens`` tokens of the model, one at a time."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


class Served:
    """A model on disk with the adapters beside it, and the tokens that each of them answers."""

    def __init__(self, family, folder):
        self.family, self.folder = family, save_model(folder / "model", family)
        model = merged(self.folder, None)
        self.paths = {a.name: save_adapter(folder, a, model) for a in ADAPTERS}
        self._models, self._answers = {None: model}, {}

    def answer(self, adapter, prompt, tokens):
        key = adapter, tuple(prompt), tokens
        if key not in self._answers:
            if adapter not in self._models:
                self._models[adapter] = merged(self.folder, adapter)
            self._answers[key] = greedy(self._models[adapter], prompt, tokens)
        return self._answers[key]


def prompt(number, length):
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


def main():
    """A model in bfloat16 and adapters of all its linear layers, as ``bench.engines`` asks."""
    order = json.loads(sys.argv[1])
    folder = save_model(f"{order['folder']}/model", "llama", torch.bfloat16, **order["sizes"])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for i in range(order["count"]):
        rank = order["ranks"][i % len(order["ranks"])]
        adapter = Adapter(f"adapter-{i}", rank, LINEAR, i)
        save_adapter(f"{order['folder']}/adapters", adapter, model, torch.bfloat16)


if __name__ == "__main__":
    main()
