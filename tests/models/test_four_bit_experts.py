"""Adapters on experts in four bits, ours and those that bitsandbytes parametrised, against the same
model with the decoded weights."""

import copy
import io
import math

import mixtures
import peft
import pytest
import small
import torch
import transformers
from mixtures import BATCH

import lora_kernels as lk
from lora_kernels.layers.four_bit_experts import QuantizedExperts
from lora_kernels.models.experts import expert_layers
from lora_kernels.planning.device import facts

FORMATS = [{}, {"quant_type": "fp4", "double_quant": False, "block": 32}]


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def test_every_format_of_a_model_computes_with_the_decoded_weights():
    """gpt_oss has [E, in, out] weights and biases; phimoe and others have what qwen3_moe has."""
    for family in ("qwen3_moe", "gpt_oss"):
        bare = logits(mixtures.build(family))
        for options in FORMATS:
            quantized, decoded = mixtures.in_four_bits(family, **options)
            output = logits(quantized)
            assert small.relative_difference(output, logits(decoded)) < 1e-5
            assert small.relative_difference(output, bare) > 1e-2


def adapted(family, **options):
    """A model in four bits and one with the decoded weights, with the same adapter."""
    models = mixtures.in_four_bits(family, **options)
    for model in models:
        mixtures.draw(lk.apply_lora(model, r=3, lora_alpha=5, experts=True))
    return models


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_an_adapted_model_trains_as_one_with_the_decoded_weights(family):
    quantized, decoded = adapted(family)
    largest = []

    def keep(tensor):
        largest.append(tensor.numel() * tensor.is_floating_point())
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with lk.record_plans() as answers, hooks:
        output, gradients = mixtures.step(quantized)
    products = [a for a in answers if a.op in ("expert_linear_fwd", "expert_linear_dx")]
    assert products and all(a.problem.four_bit for a in products)
    assert {a.problem.fan_in_fan_out for a in products} == {family == "gpt_oss"}
    if facts("cpu").native not in ("", "baseline"):
        assert {a.plan for a in products} == {"native"}
    # Nothing of the size of the experts' weights is held for the backward.
    weights = [p for p in quantized.parameters() if isinstance(p, lk.FourBitParameter)]
    sizes = [math.prod(p.quant_state.shape) for p in weights if len(p.quant_state.shape) == 3]
    assert 0 < max(largest) < min(sizes)
    expected, expected_gradients = mixtures.step(decoded)
    assert small.relative_difference(output, expected) < 1e-5
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert small.relative_difference(gradient, expected_gradients[name]) < 1e-4, name
    report = lk.lora_report(quantized)
    texts = [text for name, text in report.adapted.items() if ".experts." in name]
    assert texts and all(text.startswith("Quantized") for text in texts)
    assert [t.removeprefix("Quantized") for t in texts] == [
        text for name, text in lk.lora_report(decoded).adapted.items() if ".experts." in name
    ]


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_merged_and_unmerged(family):
    bare = logits(mixtures.in_four_bits(family)[0])
    ours, decoded = adapted(family)
    before, state = logits(ours), copy.deepcopy(ours.state_dict())
    with lk.disable_adapter(ours):
        assert torch.equal(logits(ours), bare)
    held = {name: p for name, p in ours.named_parameters() if ".experts." in name}
    lk.merge_adapter(ours)
    lk.merge_adapter(decoded)
    assert small.relative_difference(logits(ours), before) < 1e-5
    theirs = dict(decoded.named_parameters())
    for name, parameter in ours.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")) and parameter.dim() == 3:
            assert small.relative_difference(parameter, theirs[name]) < 1e-6
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    with lk.disable_adapter(ours):
        assert torch.equal(logits(ours), bare)
    for copied in copy.deepcopy(ours), pickled(ours):
        assert torch.equal(logits(copied), logits(ours))
        lk.unmerge_adapter(copied)
        assert torch.equal(logits(copied), before)
    ours.load_state_dict(state)
    assert all(m.merged for m in expert_layers(ours).values())
    lk.unmerge_adapter(ours)
    assert all(p is held[n] for n, p in ours.named_parameters() if n in held)
    assert torch.equal(logits(ours), before)
    plain = lk.unload(copy.deepcopy(ours))
    assert torch.equal(logits(plain), bare) and not expert_layers(plain)
    assert sum(isinstance(m, QuantizedExperts) for m in plain.modules()) == 2
    lk.merge_adapter(ours, keep_base=False)
    kinds = {type(m) for m in mixtures.build(family).modules()}
    assert not any(isinstance(m, QuantizedExperts) for m in ours.modules())
    assert {type(m) for m in ours.modules() if hasattr(m, "is_transposed")} <= kinds
    assert small.relative_difference(logits(ours), before) < 1e-5


def test_merged_in_part_the_rest_stays_in_four_bits():
    model = mixtures.in_four_bits("qwen3_moe")[0]
    targets = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    mixtures.draw(lk.apply_lora(model, r=3, **targets))
    before = logits(model)
    lk.merge_adapter(model, keep_base=False)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, QuantizedExperts)
    assert experts.down_proj.shape == (6, 32, 24) and experts.gate_up_proj.dtype == torch.uint8
    assert "gate_up_proj=nf4 [6, 48, 32]" in repr(experts)
    assert small.relative_difference(logits(model), before) < 1e-5


def test_casts_and_copies_keep_the_bytes():
    ours, _ = adapted("qwen3_moe")
    before = logits(ours)
    assert torch.equal(logits(copy.deepcopy(ours)), before)
    assert torch.equal(logits(pickled(ours)), before)
    cast = copy.deepcopy(ours).to(torch.bfloat16)
    one, other = (m.model.layers[1].mlp.experts for m in (ours, cast))
    assert torch.equal(one.gate_up_proj.data, other.gate_up_proj.data)
    assert other.gate_up_proj.quant_state.nested.absmax.dtype == torch.float32
    assert other.lora["down_proj"].lora_A.dtype == torch.bfloat16
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    index, weights = torch.arange(14).view(7, 2) % 6, torch.ones(7, 2)
    y = other(x.bfloat16(), index, weights.bfloat16())
    assert 1e-4 < small.relative_difference(y, one(x, index, weights)) < 0.05
    with pytest.raises(RuntimeError, match="does not train"):
        one.gate_up_proj.requires_grad_(True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_dtype_and_half_precision(dtype):
    experts = {}
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    index, weights = torch.arange(14).view(7, 2) % 6, torch.rand(7, 2)
    for compute in (None, dtype):
        quantized, decoded = mixtures.in_four_bits("qwen3_moe", compute_dtype=compute)
        experts[compute] = quantized.model.layers[0].mlp.experts
    exact = decoded.double().model.layers[0].mlp.experts
    exact.config._experts_implementation = "eager"
    expected = exact(x.double(), index, weights.double())
    with lk.record_plans() as answers:
        y = experts[dtype](x, index, weights)
    assert y.dtype == torch.float32
    assert {a.problem.dtype for a in answers} == {str(dtype).removeprefix("torch.")}
    half = experts[None].to(dtype)(x.to(dtype), index, weights.to(dtype))
    assert half.dtype == dtype
    for found in y, half:
        assert 1e-5 < small.relative_difference(found, expected) < 2e-2
    with torch.autocast("cpu", dtype=dtype):
        cast = experts[None](x, index, weights)
    assert 1e-5 < small.relative_difference(cast, expected) < 2e-2
    # Merged it is what it was computed in.
    model = mixtures.in_four_bits("qwen3_moe", compute_dtype=dtype)[0]
    lk.merge_adapter(lk.apply_lora(model, r=2, experts=True))
    assert model.model.layers[0].mlp.experts.gate_up_proj.dtype == dtype


def test_adapters_pass_through_pefts_files(tmp_path):
    ours, decoded = adapted("qwen3_moe")
    lk.save_adapter(ours, tmp_path)
    plain = mixtures.in_four_bits("qwen3_moe")[1]
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path)
    assert small.relative_difference(logits(ours), logits(theirs)) < 1e-5
    again = lk.load_adapter(mixtures.in_four_bits("qwen3_moe")[0], tmp_path)
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_passes_both_ways(assign):
    first, _ = mixtures.in_four_bits("gpt_oss")
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    key = "model.layers.0.mlp.experts.down_proj"
    assert f"{key}.quant_state.bitsandbytes__nf4" in state and f"{key}.nested_absmax" in state
    other = mixtures.build("gpt_oss")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    lk.quantize_base(other, experts=True)
    assert not torch.equal(logits(other), logits(first))
    other.load_state_dict(state, assign=assign)
    assert torch.equal(logits(other), logits(first))
    del state[f"{key}.absmax"]
    with pytest.raises(RuntimeError, match=f"{key}: no state of a four-bit weight"):
        other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        mixtures.in_four_bits("gpt_oss")[1].load_state_dict(state)


def test_what_is_quantised():
    model = mixtures.build("qwen3_moe")
    pristine = copy.deepcopy(model.model.layers[0].mlp.experts)
    lk.quantize_base(model)
    experts = model.model.layers[0].mlp.experts
    assert type(experts) is type(pristine)
    lk.quantize_base(model, "fp4", experts=True)
    assert (
        type(experts)._kind is type(pristine) and experts.down_proj.quant_state.quant_type == "fp4"
    )
    assert model.model.layers[0].self_attn.q_proj.weight.quant_state.quant_type == "nf4"
    with pytest.raises(ValueError, match="neither a linear layer nor experts to quantise"):
        lk.quantize_base(model, experts=True)
    with pytest.raises(TypeError, match="gate_up_proj in four bits already"):
        QuantizedExperts.quantize(experts)
    with pytest.raises(TypeError, match="no experts module"):
        QuantizedExperts.quantize(torch.nn.Linear(2, 2))
    only = lk.apply_lora(mixtures.build("qwen3_moe"), target_modules=[], experts=True)
    with pytest.raises(ValueError, match="quantise its base first"):
        lk.quantize_base(only, experts=True)


def parametrised(family="qwen3_moe", **options):
    """The experts as ``replace_parameter_4bit`` makes them, and the model with what they mean."""
    bnb = pytest.importorskip("bitsandbytes.nn.parametrize")
    model = mixtures.build(family)
    decoded = mixtures.build(family)
    for one, other in zip(model.model.layers, decoded.model.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            bnb.replace_parameter_4bit(one.mlp.experts, name, **options)
            with torch.no_grad():
                getattr(other.mlp.experts, name).copy_(getattr(one.mlp.experts, name))
    return model, decoded


@pytest.mark.parametrize("options", [{}, {"compress_statistics": True, "quant_type": "fp4"}])
def test_experts_that_bitsandbytes_parametrised(options, tmp_path, monkeypatch):
    mixtures.decode_flat(monkeypatch)
    theirs, decoded = parametrised(**options)
    ours = mixtures.build("qwen3_moe")
    kind, double = options.get("quant_type", "nf4"), options.get("compress_statistics", False)
    for layer in ours.model.layers:
        QuantizedExperts.quantize(layer.mlp.experts, kind, double_quant=double)
    state, bare = theirs.state_dict(), logits(theirs)
    # The same bytes, under the same keys.
    mine = ours.state_dict()
    assert mine.keys() == state.keys()
    for key, value in state.items():
        if "quant_state" not in key:
            assert torch.allclose(mine[key].double(), value.double(), atol=0, rtol=1e-6), key

    kinds = [type(m).__name__ for m in theirs.modules()]
    original = theirs.model.layers[0].mlp.experts.parametrizations["down_proj"].original
    for model in (theirs, decoded):
        lk.apply_lora(model, r=3, target_modules=[], experts=True)
        mixtures.draw(model)
    experts = theirs.model.layers[0].mlp.experts
    assert isinstance(experts, QuantizedExperts)
    assert experts.down_proj.data_ptr() == original.data_ptr()
    assert theirs.state_dict().keys() >= state.keys()
    output, gradients = mixtures.step(theirs)
    expected, expected_gradients = mixtures.step(decoded)
    assert small.relative_difference(output, expected) < 1e-5
    for name, gradient in gradients.items():
        assert small.relative_difference(gradient, expected_gradients[name]) < 1e-4, name
    with lk.disable_adapter(theirs):
        assert small.relative_difference(logits(theirs), bare) < 1e-5
    lk.save_adapter(theirs, tmp_path)
    lk.unload(theirs)
    assert [type(m).__name__ for m in theirs.modules()] == kinds
    assert torch.equal(logits(theirs), bare)
    again = theirs.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    lk.load_adapter(theirs, tmp_path)
    assert torch.equal(logits(theirs), output)
    lk.merge_adapter(theirs, keep_base=False)
    assert type(experts) is type(decoded.model.layers[0].mlp.experts)._kind
    assert small.relative_difference(logits(theirs), expected) < 1e-5


def test_an_error_half_way_leaves_parametrised_experts_as_they_were(monkeypatch):
    model, _ = parametrised()
    kinds, before = [type(m).__name__ for m in model.modules()], logits(model)
    monkeypatch.setattr("lora_kernels.models.apply._report", None)
    with pytest.raises(TypeError):
        lk.apply_lora(model, experts=True)
    assert [type(m).__name__ for m in model.modules()] == kinds
    assert torch.equal(logits(model), before)


def test_a_model_that_transformers_loads_in_four_bits(tmp_path):
    """Its quantiser leaves experts plain; the rest of the way is ours."""
    bnb = pytest.importorskip("bitsandbytes")
    mixtures.build("qwen3_moe").save_pretrained(tmp_path)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options["bnb_4bit_compute_dtype"] = torch.float32
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True, **options),
        dtype=torch.float32,
        device_map="cpu",
    )
    layer = loaded.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, bnb.nn.Linear4bit)
    assert layer.mlp.experts.down_proj.dtype == torch.float32
    lk.quantize_base(loaded, experts=True)
    assert isinstance(layer.mlp.experts, QuantizedExperts)
    lk.apply_lora(loaded, r=3, lora_alpha=5, experts=True)
    ours, _ = adapted("qwen3_moe")
    found = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "lora_" in name:
                parameter.copy_(found[name])
    output, gradients = mixtures.step(loaded)
    assert small.relative_difference(output, logits(ours)) < 1e-4
    assert any(".experts." in name and gradient.any() for name, gradient in gradients.items())


@pytest.mark.slow
def test_compiled_whole():
    ours, _ = adapted("qwen3_moe")
    mixtures.check_compiled_whole(ours.model.layers[0].mlp.experts)
