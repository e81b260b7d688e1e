"""One LoRA layer of PEFT on our kernels: outputs and gradients against float64, packed weights."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from peft_layer_cases import (
    IN,
    OUT,
    RANKS,
    SHAPE,
    activate,
    assert_budget,
    assert_one_fused_call,
    layer_of,
    model_with,
    operands,
    run,
)
from torch import nn

import lora_kernels as lk
from lora_kernels.functional.linear import draw_rng
from lora_kernels.spec import native, reference


@pytest.mark.parametrize("zero_weight", [False, True], ids=["", "W0"])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize(
    "dtype, cast",
    [
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float16, True),
    ],
    ids=["fp32", "bf16-fp32", "bf16", "fp16-fp32"],
)
class TestDtypes:
    def test_one_adapter(self, dtype, cast, kind, zero_weight):
        model = model_with(("a",), kind, dtype, cast, zero_weight)
        report = lk.accelerate_peft(model)
        x, dy = operands(dtype, IN if kind == "conv1d" else OUT)
        ours, answers = run(model, x, dy, ["a"])
        assert_one_fused_call(answers)
        assert_budget(ours, layer_of(model), x, dy, ["a"], dtype)
        assert ours["y"].dtype == dtype and report.calls.fused == 1

    def test_two_adapters_are_one_call(self, dtype, cast, kind, zero_weight):
        model = activate(model_with(("a", "b"), kind, dtype, cast, zero_weight), "ab")
        report = lk.accelerate_peft(model)
        x, dy = operands(dtype, IN if kind == "conv1d" else OUT)
        ours, answers = run(model, x, dy, ["a", "b"])
        assert_one_fused_call(answers)
        assert answers[0].problem.r == RANKS["a"] + RANKS["b"]
        assert_budget(ours, layer_of(model), x, dy, ["a", "b"], dtype)
        assert report.calls.fused == 1


@pytest.mark.parametrize("names", ["a", "ab"])
@pytest.mark.parametrize("kind", ["linear", "no bias"])
def test_lora_bias(kind, names):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = activate(model_with(names, kind, lora_bias=True), names)
    report = lk.accelerate_peft(model)
    x, dy = operands(torch.float32)
    ours, answers = run(model, x, dy, names)
    assert_one_fused_call(answers)
    assert {f"dbias {name}" for name in names} <= ours.keys()
    assert_budget(ours, layer_of(model), x, dy, names, torch.float32)
    assert report.calls.fused == 1


@pytest.mark.parametrize("names", ["a", "ab", "abc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_drawn_for_each_adapter_by_itself(dtype, names):
    p = 0.3
    model = activate(model_with(names, dtype=dtype, lora_dropout=p), names).train()
    report = lk.accelerate_peft(model)
    x, dy = operands(dtype)
    torch.manual_seed(5)
    rows = x.numel() // IN
    # The first adapter's mask is ours, the others' are nn.Dropout's.
    kept = reference.dropout_mask(draw_rng(x.device), rows, IN, p)
    layer = layer_of(model)
    masks = {"a": kept.double() / (1 - p)}
    for name in names[1:]:
        masks[name] = F.dropout(torch.ones(SHAPE), p).double()
    torch.manual_seed(5)
    ours, answers = run(model, x, dy, names)
    assert_one_fused_call(answers)
    assert answers[0].problem.dropout
    assert_budget(ours, layer, x, dy, names, dtype, masks=masks)
    assert report.calls.fused == 1
    again, _ = run(model, x, dy, names)
    assert not torch.equal(again["y"], ours["y"])
    torch.manual_seed(5)
    repeated, _ = run(model, x, dy, names)
    assert all(torch.equal(repeated[k], ours[k]) for k in ours)


def test_adapters_without_dropout_are_together_and_those_with_it_apart():
    model = model_with("abc", lora_dropout=0.0).train()
    layer = layer_of(model)
    layer.lora_dropout["b"] = nn.Dropout(0.5)
    activate(model, "abc")
    lk.accelerate_peft(model)
    x, dy = operands(torch.float32)
    torch.manual_seed(3)
    ones = torch.ones(SHAPE)
    masks = {"a": ones, "b": F.dropout(ones, 0.5), "c": ones}
    torch.manual_seed(3)
    ours, answers = run(model, x, dy, "abc")
    assert answers[0].problem.r == RANKS["a"] + RANKS["c"]
    assert_budget(ours, layer, x, dy, "abc", torch.float32, masks=masks)


def test_dropout_follows_its_own_module():
    model = model_with(lora_dropout=0.5).train()
    report = lk.accelerate_peft(model)
    layer_of(model).lora_dropout["a"].eval()
    x, dy = operands(torch.float32)
    ours, _ = run(model, x, dy, "a")
    assert_budget(ours, layer_of(model), x, dy, "a", torch.float32)
    assert report.calls.fused == 1


def test_autocast():
    model = model_with("ab")
    activate(model, "ab")
    stock = copy.deepcopy(model)
    lk.accelerate_peft(model)
    x, dy = operands(torch.float32)
    ours, answers = run(model, x, dy, "ab", autocast=True)
    assert_one_fused_call(answers)
    assert ours["y"].dtype == run(stock, x, dy, "ab", autocast=True)[0]["y"].dtype == torch.bfloat16
    assert ours["dx"].dtype == torch.float32
    assert_budget(ours, layer_of(model), x, dy, "ab", torch.bfloat16)


def test_a_trained_base_gets_its_gradients():
    model = model_with("ab")
    activate(model, "ab")
    layer_of(model).base_layer.requires_grad_(True)
    stock = copy.deepcopy(model).double()
    lk.accelerate_peft(model)
    x, dy = operands(torch.float32)
    with lk.record_plans() as answers:
        model(x).backward(dy)
    assert answers[0].op == "lora_linear_fwd"
    stock(x.double()).backward(dy.double())
    for name in ("weight", "bias"):
        ours = getattr(layer_of(model).base_layer, name).grad
        theirs = getattr(layer_of(stock).base_layer, name).grad
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-4)


def not_sampled(weight):
    """A column in whose first element the weight may change without its packed copy's noticing."""
    assert native.load()
    cpu_ops = torch.ops.lora_kernels_cpu
    packed = cpu_ops.pack(weight.t())
    for column in range(weight.shape[1]):
        changed = weight.detach().clone()
        changed[0, column] += 1
        if cpu_ops.is_packed(changed.t(), packed):
            return column
    raise AssertionError("every element is looked at")


@pytest.mark.native
class TestPackedWeights:
    def test_eval_packs_and_train_drops(self):
        model = model_with().eval()
        lk.accelerate_peft(model)
        layer = layer_of(model)
        x, dy = operands(torch.float32)
        ours, _ = run(model, x, dy, "a")
        assert_budget(ours, layer, x, dy, "a", torch.float32)
        assert len(layer._packed) == 1
        assert copy.deepcopy(layer)._packed is not layer._packed
        model.train()
        assert len(layer._packed) == 0
        model(x)
        assert len(layer._packed) == 0
        lk.accelerate_peft(model, pack_weight="always")
        ours, _ = run(model, x, dy, "a")
        assert_budget(ours, layer, x, dy, "a", torch.float32)
        assert len(layer._packed) == 2
        lk.accelerate_peft(model.eval(), pack_weight="never")
        assert len(layer._packed) == 0
        model(x)
        assert len(layer._packed) == 0

    @pytest.mark.parametrize("swapping", [False, True])
    @pytest.mark.parametrize("assign", [False, True])
    def test_a_state_that_is_loaded(self, assign, swapping):
        model = model_with().eval()
        state = {name: 3 * t for name, t in model.state_dict().items()}
        lk.accelerate_peft(model)
        x, _ = operands(torch.float32)
        model(x)
        torch.__future__.set_swap_module_params_on_conversion(swapping)
        try:
            model.load_state_dict(state, assign=assign)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)
        assert len(layer_of(model)._packed) == 0
        stock = model_with().eval()
        stock.load_state_dict(state)
        torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("change", ["half", "cpu", "unfreeze"])
    def test_copies_of_a_weight_that_is_no_more_hold_no_memory(self, change):
        model = model_with().eval()
        lk.accelerate_peft(model)
        layer = layer_of(model)
        x, _ = operands(torch.float32)
        model(x)
        assert len(layer._packed) == 1
        if change == "unfreeze":
            layer.base_layer.requires_grad_(True)
            model(x)
        else:
            getattr(model, change)()
        assert len(layer._packed) == 0

    def test_what_a_sample_of_the_weight_would_not_show(self):
        # Merging writes through .data; this adapter changes one element of the weight alone.
        model = model_with().eval()
        lk.accelerate_peft(model)
        layer = layer_of(model)
        x, _ = operands(torch.float32)
        with torch.no_grad():
            column = not_sampled(layer.base_layer.weight)
            layer.lora_A["a"].weight[:, :column] = 0
            layer.lora_A["a"].weight[:, column + 1 :] = 0
            layer.lora_B["a"].weight[1:] = 0
            model(x)
            assert len(layer._packed) == 1
            model.merge_adapter()
            # The adapter is unmerged as something else than it was merged.
            layer.lora_B["a"].weight[0] = 0
            model.unmerge_adapter()
            y = model(x)
            expected = F.linear(x, layer.base_layer.weight, layer.base_layer.bias)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("init", ["pissa", "olora"])
    def test_initialisations_that_take_from_the_weight(self, init):
        model = model_with().eval()
        lk.accelerate_peft(model)
        x, _ = operands(torch.float32)
        with torch.no_grad():
            model(x)
            model.add_adapter(
                "b", peft.LoraConfig(r=4, target_modules=["proj"], init_lora_weights=init)
            )
            model.set_adapter("b")
            stock = copy.deepcopy(model).eval()
            lk.restore_peft(stock)
            torch.testing.assert_close(model.eval()(x), stock(x), rtol=1e-4, atol=1e-4)


def test_inactive_adapters_are_the_base_and_count_nothing():
    model = model_with()
    report = lk.accelerate_peft(model)
    x, _ = operands(torch.float32)
    base = layer_of(model).base_layer
    layer_of(model)._active_adapter = []
    assert torch.equal(model(x), base(x)) and not report.calls
    assert report.calls.share == 1.0
