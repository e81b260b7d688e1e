"""The node of the graph that the CPU extension makes of a lora_linear: the bits of the one written
in Python, the same record of who answered, and out of the way where it does not apply."""

import dataclasses
import threading

import pytest
import torch
from linear_calls import LEAVES, call, check_batches_of_gradients, require_grad
from torch import nn
from torch.autograd import forward_ad

import lora_kernels as lk
from lora_kernels.functional import ops
from lora_kernels.testing.linear import Case

pytestmark = pytest.mark.native

CPP = "CppNode"


def draw(case, names=LEAVES):
    inputs = case.draw()
    require_grad(inputs, names)
    return inputs


def in_python(monkeypatch):
    monkeypatch.setattr(ops, "direct_lora_linear", lambda *args: None)


def gradients(y, dy, inputs):
    leaves = [t for name in LEAVES if (t := getattr(inputs, name)) is not None and t.requires_grad]
    return torch.autograd.grad(y, leaves, dy)


CASES = [
    Case(33, 65, 40, 3),
    Case(130, 200, 264, 24, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.1),
    Case(130, 200, 264, 24, torch.float16, dropout_p=0.5, fan_in_fan_out=True),
    Case(40, 33, 65, 8, torch.bfloat16, layout="transposed", dropout_p=0.2),
    Case(33, 48, 48, 100, torch.bfloat16, adapter_dtype=torch.float64, bias=False),
    Case(1, 64, 64, 8),
]


@pytest.mark.parametrize("name", ["x", "weight", "lora_a", "lora_b", "bias"])
def test_a_negation_still_to_be_done(name, monkeypatch):
    """The imaginary part of a conjugate is a view whose sign is a note in the tensor."""
    inputs = draw(Case(6, 5, 7, 2, dropout_p=0.25))
    value = getattr(inputs, name).detach()
    negated = torch._neg_view(-value).requires_grad_(name != "weight")
    assert negated.is_neg() and torch.equal(negated, value)
    others = dataclasses.replace(inputs, **{name: negated})
    y, other = call(inputs), call(others)
    assert CPP in y.grad_fn.name() and CPP in other.grad_fn.name()
    assert torch.equal(y, other)
    expected = gradients(y, inputs.dy, inputs)
    for ours, theirs in zip(gradients(other, inputs.dy, others), expected, strict=True):
        assert torch.equal(ours, theirs)
    in_python(monkeypatch)
    assert torch.equal(call(others), other)


def test_a_negation_of_the_gradient():
    inputs = draw(Case(6, 5, 7, 2, dropout_p=0.25))
    y = call(inputs)
    expected = gradients(y, inputs.dy, inputs)
    ours = gradients(call(inputs), torch._neg_view(-inputs.dy), inputs)
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(6, 7), (2, 3, 7)], ids=str)
def test_batches_of_gradients(shape):
    """The operators answer."""
    inputs = draw(Case(6, 5, 7, 2))
    x = inputs.x.detach().view(shape).requires_grad_()
    y = call(inputs, x=x)
    assert CPP in y.grad_fn.name()
    check_batches_of_gradients(y, [x, inputs.lora_a, inputs.lora_b])


@pytest.mark.parametrize("asked", [False, True], ids=["unasked", "asked"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_nodes_have_the_same_bits(case, asked, monkeypatch):
    inputs = draw(case)
    y = call(inputs)
    assert CPP in y.grad_fn.name()
    if asked:
        with lk.record_plans() as answers:
            ours = gradients(y, inputs.dy, inputs)
        assert [a.op for a in answers] == ["lora_linear_dx", "lora_linear_dab"]
        assert {a.plan for a in answers} == {"native"}
    else:
        ours = gradients(y, inputs.dy, inputs)
    in_python(monkeypatch)
    other = call(inputs)
    assert CPP not in other.grad_fn.name()
    assert torch.equal(y, other)
    for mine, theirs in zip(ours, gradients(other, inputs.dy, inputs), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "names", [("x",), ("lora_a",), ("lora_b",), ("bias",), ("lora_a", "lora_b"), ("x", "bias")]
)
def test_what_needs_no_gradient_gets_none(names, monkeypatch):
    inputs = draw(Case(17, 40, 33, 5, torch.bfloat16, dropout_p=0.3), names)
    y = call(inputs)
    assert CPP in y.grad_fn.name()
    y.backward(inputs.dy)
    ours = {name: getattr(inputs, name).grad for name in LEAVES}
    assert {name for name, grad in ours.items() if grad is not None} == set(names)
    in_python(monkeypatch)
    for name, grad in zip(names, gradients(call(inputs), inputs.dy, inputs), strict=True):
        assert torch.equal(ours[name], grad)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 1, 3, 8)])
def test_shapes_of_x_and_of_its_gradient(shape, monkeypatch):
    inputs = draw(Case(1, 6, 8, 2), ("lora_a",))
    x = torch.randn(8, *shape[:-1]).movedim(0, -1).requires_grad_()
    y = call(inputs, x=x)
    assert CPP in y.grad_fn.name()
    assert y.shape == (*x.shape[:-1], 6)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    in_python(monkeypatch)
    (theirs,) = torch.autograd.grad(call(inputs, x=x).square().sum(), x)
    assert dx.shape == x.shape
    assert torch.equal(dx, theirs)


def test_autocast_casts_and_casts_back(monkeypatch):
    inputs = draw(Case(34, 40, 48, 8))
    dy = inputs.dy.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(inputs)
    assert CPP in y.grad_fn.name()
    ours = gradients(y, dy, inputs)
    in_python(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        other = call(inputs)
    assert torch.equal(y, other)
    for mine, theirs in zip(ours, gradients(other, dy, inputs), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("pack_weight", ["never", "always"])
def test_packed_weights_reach_the_node(pack_weight, monkeypatch):
    layer = lk.FusedLoRALinear(96, 80, r=4, pack_weight=pack_weight, init_lora_weights=False)
    x = torch.randn(2, 20, 96, requires_grad=True)
    y = layer(x)
    assert CPP in y.grad_fn.name()
    (ours,) = torch.autograd.grad(y.square().sum(), x)
    in_python(monkeypatch)
    (theirs,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(ours, theirs)


def test_the_node_records_its_forward_and_to_a_recorder_its_backward():
    inputs = draw(Case(9, 12, 10, 3, torch.bfloat16, fan_in_fan_out=True))
    with lk.record_plans() as answers:
        gradients(call(inputs), inputs.dy, inputs)
    assert [a.op for a in answers] == ["lora_linear_fwd", "lora_linear_dx", "lora_linear_dab"]
    assert lk.last_plan() == answers[-1]
    y = call(inputs)
    assert lk.last_plan() == answers[0]
    gradients(y, inputs.dy, inputs)
    assert lk.last_plan() == answers[0] and len(answers) == 3
    with lk.force_plan("vendor"):
        assert lk.last_plan() == answers[0], "asking does not plan again"


def test_a_plan_forced_for_the_backward_answers_it():
    inputs = draw(Case(9, 12, 10, 3))
    y = call(inputs)
    with lk.force_plan("vendor"), lk.record_plans() as answers:
        gradients(y, inputs.dy, inputs)
    assert [(a.op, a.plan) for a in answers] == [
        ("lora_linear_dx", "vendor"),
        ("lora_linear_dab", "vendor"),
    ]
    with lk.force_plan("vendor"):
        assert CPP not in call(inputs).grad_fn.name()


def test_what_the_node_does_not_serve_has_the_one_in_python():
    inputs = draw(Case(9, 12, 10, 3, torch.float64))
    assert CPP not in call(inputs).grad_fn.name()
    inputs = draw(Case(9, 12, 10, 3))
    assert CPP not in call(inputs, weight=inputs.weight.clone().requires_grad_()).grad_fn.name()
    with forward_ad.dual_level():
        assert CPP not in call(inputs).grad_fn.name()


def test_an_operator_is_still_seen_by_a_mode():
    inputs = draw(Case(9, 12, 10, 3))
    y = call(inputs)

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Seen():
        assert CPP not in call(inputs).grad_fn.name()
    gradients(y, inputs.dy, inputs)


def test_compiled_autograd_takes_the_node():
    inputs = draw(Case(9, 12, 10, 3))
    call(inputs).backward(inputs.dy)
    expected = {name: getattr(inputs, name).grad.clone() for name in LEAVES}
    for name in LEAVES:
        getattr(inputs, name).grad = None
    y = call(inputs)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward(inputs.dy)
    for name in LEAVES:
        assert torch.equal(getattr(inputs, name).grad, expected[name])


def test_backwards_of_several_threads():
    all_inputs = [draw(Case(33, 65, 40, 3 + i, dropout_p=0.1)) for i in range(4)]
    expected = [gradients(call(inputs), inputs.dy, inputs) for inputs in all_inputs]
    wrong = []

    def work(i):
        for _ in range(20):
            ours = gradients(call(all_inputs[i]), all_inputs[i].dy, all_inputs[i])
            wrong.extend(i for a, b in zip(ours, expected[i], strict=True) if not torch.equal(a, b))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_result_may_be_changed_in_place(dtype):
    layer = lk.FusedLoRALinear(8, 6, r=2, init_lora_weights=False, dtype=dtype)
    x = torch.randn(2, 3, 8, dtype=dtype)
    layer(x).relu().square().sum().backward()
    expected = layer.lora_A.grad.clone()
    layer.lora_A.grad = None
    nn.ReLU(inplace=True)(layer(x)).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, expected)


def test_a_result_of_a_mixed_batch_may_be_changed_in_place():
    seg = lk.SegmentTable.from_rows([0, -1] * 3, rank_of_slot=[2], scale_of_slot=[2.0])
    x, weight = torch.randn(2, 3, 8), torch.randn(6, 8)
    lora_a, lora_b = torch.randn(1, 2, 8, requires_grad=True), torch.randn(1, 6, 2)
    for y in (
        lk.segmented_linear(x, weight, lora_a, lora_b, seg),
        lk.segmented_lora(x, lora_a, lora_b, seg),
    ):
        (expected,) = torch.autograd.grad(y.relu().sum(), lora_a, retain_graph=True)
        (ours,) = torch.autograd.grad(y.relu_().sum(), lora_a)
        assert torch.equal(ours, expected)
