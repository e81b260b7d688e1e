"""Projections that share an input: the operators against float64, and ``lora_linears`` against
separate calls."""

from dataclasses import replace

import pytest
import torch

import lora_kernels as lk
from lora_kernels.backends import cpu, vendor
from lora_kernels.functional import ops
from lora_kernels.planning.device import facts
from lora_kernels.spec import linears, reference
from lora_kernels.testing.linear import Case
from lora_kernels.testing.linears import (
    MUTATIONS,
    RESULTS,
    Projections,
    arguments,
    check,
    mutation_case,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Groups as models have them (q, k, v with fewer heads; gate, up), one projection alone, ranks that
# are odd or differ, and more rows than any tile.
GROUPS = [
    (Case(0, 0, 8, 0), (9, 4), (2,)),
    (Case(1, 0, 40, 0), (16,), (8,)),
    (Case(33, 0, 40, 0), (65, 17, 17), (3,)),
    (Case(130, 0, 264, 0), (200, 40, 40), (24,)),
    (Case(64, 0, 129, 0), (70, 131), (5, 100)),
    (Case(300, 0, 530, 0), (130, 66, 64, 3), (16, 2)),
    (Case(900, 0, 70, 0), (40, 40), (4,)),
]

VARIANTS = [
    {},
    {"bias": False, "zero_weight": True},
    {"dropout_p": 0.1},
    {"dropout_p": 0.5, "zero_weight": True, "fan_in_fan_out": True},
    {"adapter_dtype": torch.float32},
    {"layout": "sliced", "dropout_p": 0.2},
    {"layout": "transposed", "fan_in_fan_out": True},
]


def operator(op):
    return getattr(torch.ops.lora_kernels, op).default


def projections(group, dtype, **changes):
    case, widths, ranks = group
    return Projections(replace(case, dtype=dtype, **changes), widths, ranks)


@pytest.mark.parametrize("op", ops.LINEARS_OPERATORS)
@pytest.mark.parametrize("group", GROUPS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", [None, "vendor", "reference"])
def test_operator_keeps_the_budget(op, group, variant, dtype, plan, device):
    case = projections(group, dtype, device=device, **variant)
    if plan is None:
        check(op, operator(op), case, backend=device)
        return
    with lk.force_plan(plan):
        check(op, operator(op), case, backend="reference" if plan == "reference" else device)


@pytest.mark.parametrize(
    ("op", "mutation"), [(op, name) for op in MUTATIONS for name in MUTATIONS[op]]
)
@pytest.mark.parametrize("plan", ["native", "vendor", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_backend_turns_the_check_red(op, mutation, plan, dtype, device, monkeypatch):
    if plan == "native" and not facts(device).native:
        pytest.skip("no native kernels")
    case = mutation_case(dtype, device)
    backend = "reference" if plan == "reference" else device
    module = {"vendor": vendor, "reference": linears}.get(plan)
    sound = cpu.kernel(op) if plan == "native" else getattr(module, op)
    names = [argument.name for argument in operator(op)._schema.arguments]

    def broken(*args, masked=None, **kwargs):
        extra = {} if masked is None else {"masked": masked}
        given = dict(zip(names, args, strict=False)) | kwargs
        return MUTATIONS[op][mutation](lambda **changed: sound(**changed, **extra), given)

    with lk.force_plan(plan):
        check(op, operator(op), case, backend=backend, plan=plan)
        if plan == "native":
            monkeypatch.setattr(cpu, "kernel", lambda _: broken)
        else:
            monkeypatch.setattr(module, op, broken)
        with pytest.raises(AssertionError, match="over the budget"):
            check(op, operator(op), case, backend=backend)


# opcheck differentiates on purpose what only functional/linears.py makes differentiable.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("op", ops.LINEARS_OPERATORS)
def test_opcheck(op, dropout_p, device):
    case = projections((Case(5, 0, 7, 0), (6, 3), (2, 3)), torch.float32, dropout_p=dropout_p)
    torch.library.opcheck(operator(op), (), arguments(case.draw(), op))


def call(inputs, **changes):
    """lora_linears of drawn inputs."""
    first = inputs[0].case
    given = {
        "x": inputs[0].x,
        "weights": [t.weight for t in inputs],
        "lora_a": [t.lora_a for t in inputs],
        "lora_b": [t.lora_b for t in inputs],
        "scales": [t.case.scale for t in inputs],
        "biases": [t.bias for t in inputs],
        "dropout_p": first.dropout_p,
        "training": first.dropout_p > 0,
        "fan_in_fan_out": first.fan_in_fan_out,
        "rng": inputs[0].rng,
    }
    return lk.lora_linears(**(given | changes))


def leaves(inputs):
    parameters = [t for i in inputs for t in (i.lora_a, i.lora_b, i.bias) if t is not None]
    return [t.requires_grad_() for t in (inputs[0].x, *parameters)]


def separate(inputs):
    return [
        lk.lora_linear(
            t.x, t.weight, t.lora_a, t.lora_b, t.case.scale, t.bias, dropout_p=t.case.dropout_p,
            training=t.case.dropout_p > 0, fan_in_fan_out=t.case.fan_in_fan_out, rng=t.rng,
        )
        for t in inputs
    ]  # fmt: skip


def answered(plans):
    return [a.op for a in plans]


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_packed_weights_give_the_same_bits(dtype):
    inputs = projections(GROUPS[5], dtype, dropout_p=0.2).draw()
    for op, operand in (
        ("lora_linears_fwd", lambda w: w.t()),
        ("lora_linears_dx", lambda w: w),
    ):
        given = arguments(inputs, op)
        packed = [torch.ops.lora_kernels_cpu.pack(operand(w)) for w in given["weights"]]
        plain, ours = operator(op)(**given), operator(op)(**given, packed=packed)
        for a, b in zip(plain, ours, strict=True):
            assert all(torch.equal(*each) for each in zip(a, b, strict=True))
        # Which are read.
        for t in packed:
            t.zero_()
        assert not torch.equal(operator(op)(**given, packed=packed)[0][0], plain[0][0])


@pytest.mark.native
def test_rows_are_those_of_separate_layers_bit_for_bit():
    inputs = projections(GROUPS[3], torch.bfloat16).draw()
    for ours, apart in zip(call(inputs), separate(inputs), strict=True):
        assert torch.equal(ours, apart)


@pytest.mark.parametrize("variant", [{}, {"dropout_p": 0.4}, {"fan_in_fan_out": True}], ids=str)
def test_gradcheck(variant):
    case = projections((Case(5, 0, 7, 0), (6, 3, 4), (2, 3)), torch.float64, **variant)
    inputs = case.draw()
    given = leaves(inputs)
    assert torch.autograd.gradcheck(lambda *_: call(inputs), given)
    y, apart = call(inputs), separate(inputs)
    dy = [torch.randn_like(t) for t in y]
    ours, theirs = torch.autograd.grad(y, given, dy), torch.autograd.grad(apart, given, dy)
    for a, b in zip((*y, *ours), (*apart, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_one_call_of_each_operator(device):
    inputs = projections(GROUPS[3], torch.float32, device=device, dropout_p=0.1).draw()
    given = leaves(inputs)
    with lk.record_plans() as plans:
        torch.autograd.backward(y := call(inputs), [torch.ones_like(t) for t in y])
    assert answered(plans) == [*RESULTS]
    assert all(t.grad is not None for t in given)


def test_saved_are_x_once_s_and_the_parameters():
    case = projections((Case(512, 0, 64, 0), (64, 32, 32), (8,)), torch.float32, bias=False)
    inputs = case.draw()
    given = leaves(inputs)
    x = inputs[0].x
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t
    ):
        y = call(inputs)
    parameters = {t.data_ptr() for i in inputs for t in (i.weight, i.lora_a, i.lora_b, i.scale)}
    activations = {p: t for p, t in saved.items() if p not in parameters and t.dim() == 2}
    assert sorted(t.shape for t in activations.values()) == [(512, 24), (512, 64)]
    assert x.data_ptr() in activations
    torch.autograd.backward(y, [torch.ones_like(t) for t in y])
    assert all(t.grad is not None for t in given)


@pytest.mark.parametrize("unused", [0, 2])
def test_a_result_that_nothing_depends_on(unused):
    case = projections(GROUPS[2], torch.float32, bias=False)
    ours, apart = case.draw(), case.draw()
    for inputs, run in ((ours, call), (apart, separate)):
        leaves(inputs)
        y = run(inputs)
        sum(t.square().sum() for j, t in enumerate(y) if j != unused).backward()
    for j, (a, b) in enumerate(zip(ours, apart, strict=True)):
        assert (a.lora_a.grad is None) == (b.lora_a.grad is None) == (j == unused)
        if j != unused:
            torch.testing.assert_close(a.lora_b.grad, b.lora_b.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[0].x.grad, apart[0].x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", ["x", "lora_a", "lora_b", "all of one"])
def test_frozen_inputs(frozen):
    case = projections(GROUPS[2], torch.float32, bias=False, dropout_p=0.2)
    ours, apart = case.draw(), case.draw()
    for inputs, run in ((ours, call), (apart, separate)):
        leaves(inputs)
        still = {"x": [inputs[0].x], "all of one": [inputs[1].lora_a, inputs[1].lora_b]}
        for t in still.get(frozen) or [getattr(i, frozen) for i in inputs]:
            t.requires_grad_(False)
        sum(t.square().sum() for t in run(inputs)).backward()
    for a, b in zip(ours, apart, strict=True):
        for name in ("x", "lora_a", "lora_b"):
            mine, theirs = getattr(a, name).grad, getattr(b, name).grad
            assert (mine is None) == (theirs is None), name
            if mine is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_a_base_that_trains_too():
    case = projections(GROUPS[2], torch.float32)
    ours, apart = case.draw(), case.draw()
    for inputs, run in ((ours, call), (apart, separate)):
        leaves(inputs)
        for t in inputs:
            t.weight.requires_grad_()
        sum(t.square().sum() for t in run(inputs)).backward()
    for a, b in zip(ours, apart, strict=True):
        torch.testing.assert_close(a.weight.grad, b.weight.grad, rtol=1e-4, atol=1e-3)


def test_leading_dimensions_autocast_and_in_place_use(device):
    inputs = projections(GROUPS[3], torch.float32, device=device).draw()
    leaves(inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = call(inputs, x=inputs[0].x.view(13, 10, -1))
    assert [t.shape for t in y] == [(13, 10, t.case.n) for t in inputs]
    assert {t.dtype for t in y} == {torch.bfloat16}
    # As separate results: one that is changed leaves the others, and the graph, alone.
    y[0].relu_()
    sum(t.float().sum() for t in y).backward()
    assert inputs[0].x.grad.dtype == torch.float32


def test_x_changed_in_place_before_the_backward_raises():
    inputs = projections(GROUPS[2], torch.float32).draw()
    leaves(inputs)
    x = inputs[0].x * 1
    y = call(inputs, x=x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(t.sum() for t in y).backward()


def test_checkpointing_draws_the_same_masks():
    inputs = projections(GROUPS[2], torch.float32, dropout_p=0.5).draw()
    given = leaves(inputs)

    def run(x):
        return sum(t.square().sum() for t in call(inputs, x=x, rng=None))

    torch.manual_seed(3)
    expected = torch.autograd.grad(run(inputs[0].x), given, allow_unused=True)
    torch.manual_seed(3)
    loss = torch.utils.checkpoint.checkpoint(run, inputs[0].x, use_reentrant=False)
    found = torch.autograd.grad(loss, given, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_transformations_of_torch_func():
    inputs = projections(GROUPS[2], torch.float32).draw()
    x = inputs[0].x.clone()

    def loss(x):
        return sum(t.square().sum() for t in call(inputs, x=x))

    inputs[0].x.requires_grad_()
    loss(inputs[0].x).backward()
    torch.testing.assert_close(torch.func.grad(loss)(x), inputs[0].x.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_compiles_whole(dropout_p):
    inputs = projections(GROUPS[2], torch.float32, dropout_p=dropout_p).draw()
    given = leaves(inputs)

    def run(x):
        return torch.cat([t.sin() for t in call(inputs, x=x)], dim=-1)

    expected = run(inputs[0].x)
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(found := compiled(inputs[0].x), expected)
    theirs = torch.autograd.grad(expected.sum(), given)
    for a, b in zip(torch.autograd.grad(found.sum(), given), theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert compiled(inputs[0].x[:7]).shape == (7, expected.shape[1])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lora_a": []}, ValueError, "as many weights"),
        ({"scales": [1.0, 1.0]}, ValueError, r"\[3, 3, 3, 2, 3\]"),
        ({"scales": [1.0, 1.0, torch.ones(2)]}, ValueError, "projection 2: scale"),
        ({"dropout_p": 1.0, "training": True}, ValueError, "projection 0: dropout_p"),
        ({"x": torch.ones(3, 41)}, ValueError, "projection 0: x"),
        ({"x": torch.ones(3, 40, dtype=torch.float64)}, TypeError, "projection 0: x is"),
    ],
    ids=str,
)
def test_wrong_calls(changes, error, message):
    with pytest.raises(error, match=message):
        call(projections(GROUPS[2], torch.float32).draw(), **changes)


def test_handwritten_backward_is_autograds():
    """The reference in float64, to the last digits."""
    case = projections((Case(5, 0, 7, 0), (6, 3, 4), (2, 3)), torch.float64, dropout_p=0.3)
    for op in RESULTS:
        check(op, operator(op), case, backend="reference")
    assert reference.accumulate_dtype(torch.float64) == torch.float64
