"""aLoRA of PEFT (an adapter for the tokens behind its invocation) on our kernels, and MiCA."""

import copy
import warnings

import peft
import pytest
import small
import torch
from peft_layer_cases import IN, SHAPE, assert_budget, layer_of, model_with, operands, run
from peft_models import config, draw, layers_of

import lora_kernels as lk
from lora_kernels.functional.linear import draw_rng
from lora_kernels.spec import reference

INVOKED = {"alora_invocation_tokens": [7, 9]}


def tokens_of(offsets, tokens):
    """Which tokens [sequences, tokens, 1] the adapter is for."""
    last = torch.tensor([min(offset or 0, tokens) for offset in offsets])
    return (torch.arange(tokens) >= tokens - last[:, None])[..., None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("offsets", [[3, None, 45], [99, 1, 44], None])
def test_one_layer(dtype, dropout, bias, offsets):
    options = {"lora_dropout": dropout, "lora_bias": bias, **INVOKED}
    model = model_with("a", dtype=dtype, **options).train()
    report = lk.accelerate_peft(model)
    assert "aLoRA" in next(iter(report.fused.values()))
    x, dy = operands(dtype)
    layer = layer_of(model)
    chosen = tokens_of(offsets or [0, 0, 0], SHAPE[1])
    mask = chosen.double().expand(SHAPE)
    torch.manual_seed(5)
    if dropout:
        kept = reference.dropout_mask(draw_rng(x.device), x.numel() // IN, IN, dropout)
        mask = mask * kept.view(SHAPE) / (1 - dropout)
    torch.manual_seed(5)
    layer.forward, forward = lambda x: forward(x, alora_offsets=offsets), layer.forward
    ours, answers = run(model, x, dy, "a")
    del layer.forward
    assert [a.op for a in answers][0] == "segmented_linear_fwd"
    assert report.calls.fused == 1 and not report.calls.fallen_back
    assert_budget(ours, layer, x, dy, "a", dtype, masks={"a": mask}, chosen=chosen)
    assert (ours["dA a"].abs().max() > 0) == (offsets is not None)


def models(**options):
    stock = peft.get_peft_model(
        small.build("llama"), config("llama", task_type="CAUSAL_LM", **INVOKED, **options)
    ).eval()
    stock.add_adapter("plain", config("llama", r=3, task_type="CAUSAL_LM"))
    draw(stock)
    draw(stock, "plain", seed=4)
    ours = copy.deepcopy(stock)
    return stock, ours, lk.accelerate_peft(ours)


IDS = torch.tensor(
    [[3, 7, 9, 4, 5, 6, 8], [7, 9, 3, 3, 7, 9, 2], [1, 2, 3, 4, 5, 6, 7], [4, 4, 4, 7, 9, 1, 1]]
)


def test_a_model_and_its_mixed_batches():
    stock, ours, report = models()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = stock(IDS).logits
        assert small.relative_difference(ours(IDS).logits, expected) < 1e-5
        with stock.disable_adapter():
            base = stock(IDS).logits
        # Tokens before the invocation are the base model's.
        assert small.relative_difference(expected[0, 0], base[0, 0]) < 1e-5
        assert small.relative_difference(expected[0, 2], base[0, 2]) > 0.1
        names = ["plain", "default", "__base__", "default"]
        mixed = [model(IDS, adapter_names=names).logits for model in (stock, ours)]
        assert small.relative_difference(*mixed) < 1e-5
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        tokens = [model.generate(input_ids=IDS, **options) for model in (stock, ours)]
        assert torch.equal(*tokens)
    assert report.calls.fused and not report.calls.fallen_back


def test_mica_is_computed_as_lora():
    if not hasattr(peft.tuners.lora.variants, "MiCALinearVariant"):
        pytest.skip("this PEFT has no MiCA")
    options = config("llama", init_lora_weights="mica")
    stock = peft.get_peft_model(small.build("llama"), options).eval()
    draw(stock)
    ours = copy.deepcopy(stock)
    report = lk.accelerate_peft(ours)
    assert len(report.fused) == len(layers_of(stock)) and not report.skipped
    assert small.relative_difference(small.logits(ours), small.logits(stock)) < 1e-5
    assert report.calls.fused == len(report.fused)
