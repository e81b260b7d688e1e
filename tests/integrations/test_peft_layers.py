"""One LoRA layer of PEFT on our kernels: outputs and gradients against float64, what falls back."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.helpers import disable_input_dtype_casting
from small import Square
from torch import nn
from torch.nn.utils import parametrize

import lora_kernels as lk
from lora_kernels.functional.linear import draw_rng
from lora_kernels.integrations.peft_layers import FusedLinear
from lora_kernels.spec import native, reference
from lora_kernels.testing.linear import assert_within_budget, poisoned_memory

# Two tiles and a remainder of everything, and ranks that are no powers of two.
IN, OUT, RANKS = 136, 200, {"a": 5, "b": 19, "c": 12}
SHAPE = (3, 45, IN)


class One(nn.Module):
    """A linear layer by itself."""

    def __init__(self, bias=True):
        super().__init__()
        self.proj = nn.Linear(IN, OUT, bias=bias)

    def forward(self, x):
        return self.proj(x)


def model_with(
    names=("a",), kind="linear", dtype=torch.float32, cast=True, zero_weight=False, **config
):
    """Adapters as large as the base, or as 1 where the base is zero."""
    torch.manual_seed(0)
    base = Square(IN) if kind == "conv1d" else One(bias=kind != "no bias")
    base = base.to(dtype)
    if zero_weight:
        nn.init.zeros_(base.proj.weight)
    model = None
    for name in names:
        adapter = peft.LoraConfig(r=RANKS[name], target_modules=["proj"], **config)
        adapter.lora_alpha = {"a": 7, "b": 30, "c": 12}[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if model is None:
                model = peft.get_peft_model(base, adapter, name, autocast_adapter_dtype=cast)
            else:
                model.add_adapter(name, adapter, autocast_adapter_dtype=cast)
    layer = layer_of(model)
    with torch.no_grad():
        for name in names:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a.normal_(std=IN**-0.5)
            b.normal_(std=1 / (layer.scaling[name] * a.shape[0] ** 0.5))
            if layer.lora_B[name].bias is not None:
                layer.lora_B[name].bias.normal_()
    return model


def layer_of(model):
    return model.base_model.model.proj


def activate(model, names):
    model.base_model.set_adapter(list(names))
    return model


def leaves_of(layer, names):
    found = {}
    for name in names:
        found[f"dA {name}"] = layer.lora_A[name].weight
        found[f"dB {name}"] = layer.lora_B[name].weight
        if layer.lora_B[name].bias is not None:
            found[f"dbias {name}"] = layer.lora_B[name].bias
    return found


def by_formula(layer, x, dy, names, dtype, masks=None, rows=None):
    """y and the gradients, all operands cast to ``dtype``; ``masks``: name -> kept elements over
    1 - p; ``rows``: name -> the rows of x it is for."""
    base = layer.base_layer
    weight = base.weight.detach().to(dtype)
    weight = weight if isinstance(base, nn.Linear) else weight.t()
    x = x.detach().to(dtype).requires_grad_()
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves_of(layer, names).items()}
    y = x @ weight.t()
    if base.bias is not None:
        y = y + base.bias.detach().to(dtype)
    for name in names:
        dropped = x if not masks else x * masks[name].to(dtype).view_as(x)
        delta = float(layer.scaling[name]) * (dropped @ leaves[f"dA {name}"].t())
        delta = delta @ leaves[f"dB {name}"].t()
        if f"dbias {name}" in leaves:
            delta = delta + float(layer.scaling[name]) * leaves[f"dbias {name}"]
        if rows is not None:
            chosen = torch.tensor([n == name for n in rows]).view(-1, 1, 1)
            delta = delta.where(chosen, 0)
        y = y + delta
    gradients = torch.autograd.grad(y, [x, *leaves.values()], dy.to(dtype))
    return dict(zip(["y", "dx", *leaves], [y.detach(), *gradients], strict=True))


def run(model, x, dy, names, *, autocast=False, **arguments):
    """y, the gradients, and who answered."""
    x = x.clone().requires_grad_()
    leaves = leaves_of(layer_of(model), names)
    with poisoned_memory(), lk.record_plans() as answers:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x, **arguments)
        gradients = torch.autograd.grad(y, [x, *leaves.values()], dy.to(y.dtype))
    results = dict(zip(["y", "dx", *leaves], [y.detach(), *gradients], strict=True))
    for name, leaf in leaves.items():
        assert results[name].dtype == leaf.dtype
    return results, answers


def assert_budget(ours, layer, x, dy, names, dtype, **options):
    exact = by_formula(layer, x, dy, names, torch.float64, **options)
    eager = by_formula(layer, x, dy, names, dtype, **options)
    assert ours.keys() == exact.keys()
    for name in exact:
        assert_within_budget(name, ours[name], eager[name], exact[name])


def operands(dtype, out=OUT):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator).to(dtype)
    return x, torch.randn(*SHAPE[:-1], out, generator=generator).to(dtype)


def assert_one_fused_call(answers, dab=1):
    """One forward, one dX and one call for the adapter's gradients, by a backend of ours."""
    ops = [a.op for a in answers]
    assert ops == ["lora_linear_fwd", "lora_linear_dx", *["lora_linear_dab"] * dab]
    assert {a.backend for a in answers} == {"cpu"}


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


class TestMixedBatches:
    ROWS = ["b", "__base__", "a", "b", "c", "a"]

    def operands(self, dtype, out=OUT):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(len(self.ROWS), 11, IN, generator=generator).to(dtype)
        return x, torch.randn(len(self.ROWS), 11, out, generator=generator).to(dtype)

    @pytest.mark.native
    @pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
    @pytest.mark.parametrize(
        "dtype, cast",
        [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
        ids=["fp32", "bf16-fp32", "bf16"],
    )
    def test_every_sequence_has_its_own_adapter(self, dtype, cast, kind):
        model = model_with("abc", kind, dtype, cast, lora_dropout=0.1)
        for name in "bc":
            # PEFT lets only active adapters train; any may stand in a batch.
            layer_of(model).lora_A[name].requires_grad_(True)
            layer_of(model).lora_B[name].requires_grad_(True)
        model.eval()
        report = lk.accelerate_peft(model)
        x, dy = self.operands(dtype, IN if kind == "conv1d" else OUT)
        ours, answers = run(model, x, dy, "abc", adapter_names=self.ROWS)
        assert [a.op for a in answers] == [
            "segmented_linear_fwd",
            "segmented_linear_dx",
            "segmented_lora_dab",
        ]
        assert {a.backend for a in answers} == {"cpu"} and report.calls.fused == 1
        assert_budget(ours, layer_of(model), x, dy, "abc", dtype, rows=self.ROWS)
        with torch.no_grad(), lk.record_plans() as answers:
            y = model(x, adapter_names=self.ROWS)
        assert [a.op for a in answers] == ["segmented_linear_fwd"]
        exact = by_formula(layer_of(model), x, dy, "abc", torch.float64, rows=self.ROWS)
        eager = by_formula(layer_of(model), x, dy, "abc", dtype, rows=self.ROWS)
        assert_within_budget("without a graph", y, eager["y"], exact["y"])

    def test_the_base_rows_are_the_base_whatever_the_others_are(self):
        model = model_with("abc").eval()
        lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        base = F.linear(x.view(-1, IN), *layer_of(model).base_layer.parameters()).view(6, 11, OUT)
        others = [name if name == "__base__" else "c" for name in self.ROWS]
        with torch.no_grad():
            y = model(x, adapter_names=self.ROWS)
            again = model(x, adapter_names=others)
        torch.testing.assert_close(y[1], base[1], rtol=1e-5, atol=1e-5)
        assert torch.equal(y[1], again[1]) and not torch.equal(y[0], again[0])

    def test_autocast(self):
        model = model_with("abc").eval()
        lk.accelerate_peft(model)
        x, dy = self.operands(torch.float32)
        ours, answers = run(model, x, dy, "a", autocast=True, adapter_names=self.ROWS)
        assert answers[0].op == "segmented_linear_fwd" and ours["y"].dtype == torch.bfloat16
        exact = by_formula(layer_of(model), x, dy, "abc", torch.float64, rows=self.ROWS)
        eager = by_formula(layer_of(model), x, dy, "abc", torch.bfloat16, rows=self.ROWS)
        for name in ours:
            assert_within_budget(name, ours[name], eager[name], exact[name])

    @pytest.mark.parametrize("write", ["data", "no_grad", "fused optimizer", "scaling"])
    def test_changed_adapters_are_seen_at_once(self, write):
        model = model_with("abc").eval()
        layer = layer_of(model)
        stock = copy.deepcopy(model)
        lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        before = model(x, adapter_names=self.ROWS)
        for changed in (layer, layer_of(stock)):
            weight = changed.lora_B["b"].weight
            if write == "data":
                weight.data.mul_(3)
            elif write == "no_grad":
                with torch.no_grad():
                    weight.mul_(3)
            elif write == "scaling":
                changed.scaling["b"] = 0.1
            else:
                weight.requires_grad_(True).grad = torch.ones_like(weight)
                torch.optim.AdamW([weight], lr=0.1, fused=True).step()
        after = model(x, adapter_names=self.ROWS)
        assert not torch.allclose(before[0], after[0], atol=1e-2)
        expected = stock(x, adapter_names=self.ROWS)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)

    def test_a_table_made_in_inference_mode_serves_training_code(self):
        model = model_with("abc").eval()
        lk.accelerate_peft(model)
        x, dy = self.operands(torch.float32)
        names = ["c", "c", "a", "__base__", "b", "b"]
        with torch.inference_mode():
            first = model(x, adapter_names=names)
        ours, answers = run(model, x, dy, "a", adapter_names=names)
        assert answers[0].op == "segmented_linear_fwd"
        torch.testing.assert_close(ours["y"], first.clone(), rtol=1e-5, atol=1e-5)

    def test_gradients_enabled_in_inference_mode_are_of_no_effect(self):
        model = model_with("abc").eval()
        report = lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        for names in (None, self.ROWS):
            with torch.no_grad():
                expected = model(x, adapter_names=names)
            with torch.inference_mode(), torch.enable_grad():
                assert torch.equal(model(x, adapter_names=names), expected)
        assert report.calls.fused == 4

    def test_the_default_device_is_not_that_of_the_operands(self):
        model = model_with("abc").eval()
        lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        names = ["a", "a", "b", "__base__", "c", "c"]
        with torch.no_grad(), torch.device("meta"):
            y = model(x, adapter_names=names)
        assert y.device.type == "cpu" and torch.equal(y, model(x, adapter_names=names))

    def test_lora_bias_falls_back(self):
        model = model_with("ab", lora_bias=True).eval()
        stock = copy.deepcopy(model)
        report = lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        rows = ["a", "b", "a", "__base__", "b", "b"]
        assert torch.equal(model(x, adapter_names=rows), stock(x, adapter_names=rows))
        assert dict(report.calls.fallen_back) == {"adapter_names with lora_bias": 1}

    def test_wrong_calls_raise_what_peft_raises(self):
        model = model_with("ab").eval()
        stock = copy.deepcopy(model)
        report = lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        for rows in (["a"], ["a", "b", "a", "nobody", "b", "b"]):
            messages = []
            for m in (stock, model):
                with pytest.raises(ValueError) as caught:
                    m(x, adapter_names=rows)
                messages.append(str(caught.value))
            assert messages[0] == messages[1]
        assert not report.calls


def hook(*args, **kwargs):
    return None


class AddOne(nn.Module):
    def forward(self, x):
        return x + 1


# What falls back: name -> what is done to the layer, and a word of the reason.
FALLBACKS = {
    "hook on the base": (
        lambda layer: layer.base_layer.register_forward_hook(lambda m, a, y: y * 2),
        "base layer",
    ),
    "hook on lora_A": (
        lambda layer: layer.lora_A["a"].register_forward_hook(lambda m, a, y: y * 2),
        "module of the adapter",
    ),
    "pre-hook on lora_B": (
        lambda layer: layer.lora_B["a"].register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
        "module of the adapter",
    ),
    "hook on the dropout": (
        lambda layer: layer.lora_dropout["a"].register_forward_hook(lambda m, a, y: y * 2),
        "module of the adapter",
    ),
    "backward hook on lora_B": (
        lambda layer: layer.lora_B["a"].register_full_backward_hook(hook),
        "module of the adapter",
    ),
    "a forward of its own on lora_A": (
        lambda layer: setattr(layer.lora_A["a"], "forward", lambda x: x[..., : RANKS["a"]]),
        "module of the adapter",
    ),
    "a forward of its own on the base": (
        lambda layer: setattr(
            layer.base_layer, "forward", lambda x: x.new_ones(*x.shape[:-1], OUT)
        ),
        "base layer",
    ),
    "parametrised lora_A": (
        lambda layer: parametrize.register_parametrization(
            layer.lora_A["a"], "weight", AddOne(), unsafe=True
        ),
        "no plain nn.Linear",
    ),
    "parametrised base": (
        lambda layer: parametrize.register_parametrization(layer.base_layer, "weight", AddOne()),
        "no plain Parameter",
    ),
    "another base class": (
        lambda layer: setattr(layer.base_layer, "__class__", type("Mine", (nn.Linear,), DOUBLED)),
        "Mine",
    ),
    "float64 adapter": (
        lambda layer: (layer.lora_A.double(), layer.lora_B.double()),
        "float64 adapter",
    ),
    "another dropout": (
        lambda layer: layer.lora_dropout.update({"a": nn.Tanh()}),
        "dropout is a Tanh",
    ),
    "scaling that trains": (
        lambda layer: layer.scaling.update({"a": torch.tensor(2.0, requires_grad=True)}),
        "scaling",
    ),
    "scaling that is an integer tensor": (
        lambda layer: layer.scaling.update({"a": torch.tensor(2)}),
        "no single floating number",
    ),
    "weight as an attribute": (
        lambda layer: (
            layer.lora_A["a"]._parameters.pop("weight"),
            setattr(layer.lora_A["a"], "weight", torch.ones(RANKS["a"], IN)),
        ),
        "no plain Parameter",
    ),
}
DOUBLED = {"forward": lambda self, x: 2 * F.linear(x, self.weight, self.bias)}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_falls_back_is_peft_bit_for_bit_and_counted(name):
    change, word = FALLBACKS[name]
    results = []
    for swapped in (False, True):
        model = model_with()
        report = lk.accelerate_peft(model) if swapped else None
        change(layer_of(model))
        x, dy = operands(torch.float32)
        x.requires_grad_()
        with lk.record_plans() as answers:
            y = model(x)
        results.append((y, torch.autograd.grad(y, x, dy.to(y.dtype))[0]))
        assert not answers
    assert type(layer_of(model)) is FusedLinear
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    ((reason, count),) = report.calls.fallen_back.items()
    assert word in reason and count == 1 and report.calls.fused == 0
    assert reason in str(report) and report.calls.share == 0.0


@pytest.mark.parametrize("kind", [nn.Linear, type("Mine", (nn.Linear,), {})])
def test_a_class_that_is_given_another_forward(kind, monkeypatch):
    model = model_with().eval()
    layer_of(model).base_layer.__class__ = kind
    report = lk.accelerate_peft(model)
    x, _ = operands(torch.float32)
    model(x)
    assert report.calls.fused == 1
    monkeypatch.setattr(kind, "forward", DOUBLED["forward"])
    assert torch.equal(model(x), peft.tuners.lora.Linear.forward(layer_of(model), x))
    assert report.calls.fused == 1 and kind.__name__ in next(iter(report.calls.fallen_back))
    assert "does not compute as nn.Linear" in str(lk.accelerate_peft(model).skipped)
    monkeypatch.undo()
    model(x)
    assert report.calls.fused == 2


def test_hooks_on_the_layer_itself_run_around_our_kernels():
    model = model_with()
    report = lk.accelerate_peft(model)
    layer, seen = layer_of(model), []
    layer.register_forward_pre_hook(lambda m, a: seen.append("before"))
    layer.register_forward_hook(lambda m, a, y: y + 1)
    layer.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    x, dy = operands(torch.float32)
    ours, answers = run(model, x, dy, "a")
    assert_one_fused_call(answers)
    assert seen == ["before", "backward"] and report.calls.fused == 1
    ours["y"] -= 1
    assert_budget(ours, layer, x, dy, "a", torch.float32)


def test_global_hooks_see_every_module():
    model = model_with()
    report = lk.accelerate_peft(model)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: seen.append(type(m)))
    try:
        model(operands(torch.float32)[0])
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 3
    assert dict(report.calls.fallen_back) == {"a global hook on all modules": 1}


class TestTransformations:
    def test_of_torch_func(self):
        model = model_with()
        stock = copy.deepcopy(model)
        report = lk.accelerate_peft(model)
        x, _ = operands(torch.float32)
        ours = torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x[0])
        theirs = torch.func.vmap(torch.func.grad(lambda row: stock(row).sum()))(x[0])
        assert torch.equal(ours, theirs)
        _, ours = torch.func.jvp(model, (x,), (x,))
        assert torch.equal(ours, torch.func.jvp(stock, (x,), (x,))[1])
        assert report.calls.fused == 0 and report.calls.fallen_back.total() == 2

    def test_forward_mode(self):
        model = model_with()
        report = lk.accelerate_peft(model)
        x, _ = operands(torch.float32)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            tangent = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        assert tangent is not None and report.calls.fused == 0

    def test_files_hold_operations_of_torch_alone(self):
        model = model_with().eval()
        lk.accelerate_peft(model)
        x, _ = operands(torch.float32)
        exported = torch.export.export(model, (x,))
        called = [str(node.target) for node in exported.graph.nodes]
        assert any("aten.linear" in name for name in called)
        assert not any("lora_kernels" in name for name in called)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, x)
        assert "lora_kernels::" not in str(traced.inlined_graph)

    def test_compiled_calls_are_ours_and_not_counted(self):
        model = model_with()
        report = lk.accelerate_peft(model)
        x, dy = operands(torch.float32)
        called = []

        def backend(graph, inputs):
            called.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        torch._dynamo.reset()
        compiled = torch.compile(layer_of(model), backend="aot_eager", fullgraph=True)
        x = x.requires_grad_()
        y = compiled(x)
        dx = torch.autograd.grad(y, x, dy)[0]
        exact = by_formula(layer_of(model), x, dy, "a", torch.float64)
        eager = by_formula(layer_of(model), x, dy, "a", torch.float32)
        assert_within_budget("y", y.detach(), eager["y"], exact["y"])
        assert_within_budget("dx", dx, eager["dx"], exact["dx"])
        with torch.no_grad():
            torch.compile(layer_of(model), backend=backend, fullgraph=True)(x)
        assert any("lora_linear_fwd" in name for name in called)
        assert not report.calls


@pytest.mark.parametrize("wrong", ["width", "dtype", "no dimension", "argument"])
def test_wrong_calls_raise_what_peft_raises(wrong):
    x = {
        "width": torch.ones(3, IN + 1),
        "dtype": torch.ones(3, IN, dtype=torch.bfloat16),
        "no dimension": torch.ones(()),
        "argument": torch.ones(3, IN),
    }[wrong]
    arguments = {"unknown": 1} if wrong == "argument" else {}
    raised = []
    for swapped in (False, True):
        model = model_with()
        if swapped:
            report = lk.accelerate_peft(model)
        with pytest.raises((RuntimeError, TypeError)) as caught:
            layer_of(model)(x, **arguments)
        raised.append((type(caught.value), str(caught.value)))
    assert raised[0] == raised[1]
    assert report.calls.fused == 0 and report.calls.fallen_back.total() == 1


def test_switched_off_casts_are_respected():
    raised = []
    for swapped in (False, True):
        model = model_with(dtype=torch.bfloat16)
        if swapped:
            lk.accelerate_peft(model)
        x, _ = operands(torch.bfloat16)
        with disable_input_dtype_casting(model), pytest.raises(RuntimeError) as caught:
            model(x)
        raised.append(str(caught.value))
    assert raised[0] == raised[1]


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
