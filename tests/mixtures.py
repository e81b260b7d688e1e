"""Tiny mixtures of transformers and adapters on their experts that show."""

import copy
import math

import peft
import pytest
import small
import torch
import transformers

import lora_kernels as lk

SIZES = {
    "vocab_size": small.VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {"num_experts": 6, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 6,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
# Gated experts as most have them; others' gates, biases and [in, out] weights (gpt_oss); shared
# experts beside the routed ones (qwen2_moe, deepseek_v3); a gate of its own (phimoe); many of k.
FAMILIES = {
    "qwen3_moe": ("Qwen3Moe", QWEN | {"head_dim": 8}),
    "qwen2_moe": ("Qwen2Moe", QWEN | {"shared_expert_intermediate_size": 24}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "head_dim": 8}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 4}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
BATCH = {"input_ids": torch.arange(26).view(2, 13) * 7 % small.VOCABULARY}


def build(family, **changes):
    """A model in evaluation mode, the same for the same arguments."""
    name, own = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | own | changes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".experts." in key:
                parameter.normal_(std=0.2)
    return model


def config_for(r=3, **changes):
    changes = {"target_modules": [], "target_parameters": PARAMETERS, "lora_alpha": 5} | changes
    return peft.LoraConfig(r=r, init_lora_weights=False, **changes)


def stock_model(family, base=None, **changes):
    """PEFT's model with an adapter as large as the weights."""
    model = peft.get_peft_model(build(family) if base is None else base, config_for(**changes))
    draw(model)
    return model.eval()


@torch.no_grad()
def draw(model, seed=3):
    """Every A and B, ours and PEFT's, as large as 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(values * 0.3)


def step(model, batch=BATCH):
    """The logits, and the gradients of what trains, by name."""
    model.zero_grad()
    output = model(**batch).logits
    # Of another size for every token.
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), gradients


def peft_name(name):
    """PEFT's name of a trainable tensor of ours."""
    path, _, rest = name.partition(".lora.")
    parameter, factor = rest.split(".")
    inner = ".base_layer" if parameter != "down_proj" else ""
    return f"base_model.model.{path}{inner}.{factor}.default.weight"


def in_float64(model):
    """A copy, with transformers' loop over the experts: its grouped products know no float64."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            module.config._experts_implementation = "eager"
    return model


def in_four_bits(family, **options):
    """A model in four bits, experts and linear layers, and one with what its bytes mean."""
    quantized, decoded = build(family), build(family)
    lk.quantize_base(quantized, experts=True, **options)
    plain, found = dict(decoded.named_parameters()), 0
    with torch.no_grad():
        for name, parameter in quantized.named_parameters():
            if isinstance(parameter, lk.FourBitParameter):
                plain[name].copy_(parameter.dequantize())
                found += ".experts." in name
    assert found and found % 2 == 0
    return quantized, decoded


def decode_flat(monkeypatch):
    """With AVX-512 bitsandbytes 0.50.2 decodes rows that are no multiple of the block wrongly, and
    one row of all values rightly."""
    functional = pytest.importorskip("bitsandbytes.functional")
    decode = functional.dequantize_4bit

    def flat(data, state):
        row = copy.copy(state)
        row.shape = (1, math.prod(state.shape))
        return decode(data, row).view(state.shape)

    monkeypatch.setattr(functional, "dequantize_4bit", flat)


def check_compiled_whole(module):
    """Adapted experts, 32 wide: compiled without a graph break, the same outputs and gradients."""
    index, weights = torch.tensor([[0, 5], [1, 2], [5, 4]]), torch.rand(3, 2)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    results = []
    for function in module, compiled:
        module.zero_grad()
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = function(x, index, weights)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in module.lora.parameters())])
    torch.testing.assert_close(*results)
