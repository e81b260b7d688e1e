"""When a LoRA layer of PEFT falls back to PEFT's own forward: the same bits, counted."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.helpers import disable_input_dtype_casting
from peft_layer_cases import (
    IN,
    OUT,
    RANKS,
    assert_budget,
    assert_one_fused_call,
    by_formula,
    layer_of,
    model_with,
    operands,
    run,
)
from torch import nn
from torch.nn.utils import parametrize

import lora_kernels as lk
from lora_kernels.integrations.peft_layers import FusedLinear
from lora_kernels.testing.linear import assert_within_budget


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
