"""``quantize_base`` on transformers' models, against the same model with the decoded weights."""

import copy

import pytest
import torch
from small import batch_for, build, draw_adapter, logits, loss, relative_difference
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.spec.four_bit import BLOCKS, blocks_of

# Attention's c_proj of GPT-2 is a square Conv1D: a silent transpose passes every check of shapes.
MODELS = ["gpt2", "llama", "bert"]


def quantized_and_decoded(name, **options):
    """A model in four bits, and one with plain layers that hold what those bytes mean."""
    quantized, decoded = build(name), build(name)
    lk.quantize_base(quantized, **options)
    found = {n: m for n, m in quantized.named_modules() if isinstance(m, lk.QuantizedLinear)}
    with torch.no_grad():
        for path, module in found.items():
            plain = decoded.get_submodule(path)
            assert module.fan_in_fan_out == isinstance(plain, Conv1D)
            assert module.weight.quant_state.shape == tuple(plain.weight.shape)
            values = module.weight.dequantize()
            # Four bits lose about a tenth.
            assert 0.02 < (values - plain.weight).norm() / plain.weight.norm() < 0.2
            plain.weight.copy_(values)
    assert len(found) >= 8
    return quantized, decoded


def adapted(name, **options):
    """Both with the same adapter."""
    quantized, decoded = quantized_and_decoded(name, **options)
    draw_adapter(lk.apply_lora(decoded, r=4))
    lk.apply_lora(quantized, r=4)
    theirs = dict(decoded.named_parameters())
    with torch.no_grad():
        for path, parameter in quantized.named_parameters():
            if "lora_" in path:
                parameter.copy_(theirs[path])
    return quantized, decoded


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"quant_type": "fp4", "double_quant": False, "block": 32}])
def test_a_model_computes_with_the_decoded_weights(name, options):
    quantized, decoded = quantized_and_decoded(name, **options)
    assert relative_difference(logits(quantized), logits(decoded)) < 1e-5
    # The quantised weights are others: this sees what the line above compares.
    assert relative_difference(logits(quantized), logits(build(name))) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_model_trains_as_one_with_the_decoded_weights(name):
    quantized, decoded = adapted(name)
    with lk.record_plans() as answers:
        loss(quantized).backward()
    loss(decoded).backward()
    products = [a.problem for a in answers if a.op in ("lora_linear_fwd", "lora_linear_dx")]
    assert products and all(p.four_bit for p in products)
    assert {p.fan_in_fan_out for p in products} == {name == "gpt2"}
    theirs = dict(decoded.named_parameters())
    trained = [(n, p) for n, p in quantized.named_parameters() if p.requires_grad]
    assert len(trained) >= 16
    for path, parameter in trained:
        assert relative_difference(parameter.grad, theirs[path].grad) < 1e-4, path


def test_a_conv1d_model_is_merged_exactly_both_ways():
    quantized, decoded = adapted("gpt2")
    before = logits(quantized)
    assert relative_difference(before, logits(decoded)) < 1e-5
    lk.merge_adapter(quantized)
    assert relative_difference(logits(quantized), before) < 1e-5
    lk.unmerge_adapter(quantized)
    assert torch.equal(logits(quantized), before)


def test_a_conv1d_model_is_saved_and_served(tmp_path):
    quantized, decoded = adapted("gpt2")
    lk.save_adapter(quantized, tmp_path)
    store = lk.AdapterStore(quantized_and_decoded("gpt2")[0], max_adapters=2, max_rank=4)
    store.load("one", tmp_path)
    batch = batch_for(decoded)
    plain = logits(store.model, batch)
    with store.batch(["one", None]), lk.record_plans() as answers:
        served = logits(store.model, batch)
    assert answers and all(a.problem.four_bit and a.problem.fan_in_fan_out for a in answers)
    assert relative_difference(served[0], logits(decoded, batch)[0]) < 1e-5
    assert relative_difference(served[1], plain[1]) < 1e-5


@pytest.mark.parametrize("block", BLOCKS)
def test_a_conv1d_model_s_state_dict_comes_back(block):
    quantized, _ = quantized_and_decoded("gpt2", block=block)
    other = build("gpt2", seed=5)
    lk.quantize_base(other, block=block)
    other.load_state_dict(copy.deepcopy(quantized.state_dict()))
    assert torch.equal(logits(other), logits(quantized))
    layer = other.transformer.h[0].attn.c_attn
    assert layer.weight.quant_state.absmax.numel() == blocks_of((48, 144), block)
