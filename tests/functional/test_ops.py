"""Every operator on every backend against float64, within the one budget, and the proof that the
tests can see."""

import itertools
from dataclasses import replace

import pytest
import torch

import lora_kernels as lk
from lora_kernels.backends import cpu, vendor
from lora_kernels.functional import ops
from lora_kernels.planning.device import facts
from lora_kernels.spec import reference
from lora_kernels.testing.linear import (
    LAYOUTS,
    MUTATIONS,
    RESULTS,
    Case,
    check,
    mutation_case,
    naive,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

SIZES = [
    Case(0, 9, 8, 2),
    Case(1, 16, 32, 8),
    Case(1, 1, 1, 1),
    Case(3, 5, 7, 1),
    Case(33, 65, 40, 3),
    Case(130, 200, 264, 24),
    Case(64, 257, 129, 100),
    Case(17, 96, 512, 256),
    # two tiles of 128 x 256 x 64 and a remainder, two 16-blocks of the rank and a remainder
    Case(300, 530, 200, 40),
]

VARIANTS = [
    {},
    {"bias": False, "zero_weight": True},
    {"dropout_p": 0.1},
    {"dropout_p": 0.5, "zero_weight": True, "fan_in_fan_out": True},
    {"fan_in_fan_out": True, "bias": False},
    {"out_scale": True},
    {"adapter_dtype": torch.float32},
]


def operator(op):
    return getattr(torch.ops.lora_kernels, op).default


def cases():
    for size, variant, dtype in itertools.product(SIZES, VARIANTS, DTYPES):
        yield replace(size, dtype=dtype, **variant)


@pytest.mark.parametrize("op", ops.OPERATORS)
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_operator_keeps_the_budget(op, case, device):
    check(op, operator(op), replace(case, device=device), backend=device)


@pytest.mark.parametrize("op", ops.OPERATORS)
@pytest.mark.parametrize(
    "case", [replace(size, dtype=torch.float64, dropout_p=0.1) for size in SIZES], ids=str
)
def test_float64_is_answered_by_the_reference(op, case, device):
    check(op, operator(op), replace(case, device=device), backend="reference")


@pytest.mark.parametrize("op", ops.OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_reference_keeps_the_budget(op, dtype, variant, device):
    with lk.force_plan("reference"):
        check(
            op,
            operator(op),
            Case(33, 65, 40, 3, dtype=dtype, device=device, **variant),
            backend="reference",
        )


@pytest.mark.parametrize("op", ops.OPERATORS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(op, layout, fan_in_fan_out, dtype, device):
    case = Case(
        37,
        50,
        43,
        5,
        dtype,
        layout=layout,
        fan_in_fan_out=fan_in_fan_out,
        dropout_p=0.2,
        device=device,
    )
    check(op, operator(op), case, backend=device)


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
    module = {"vendor": vendor, "reference": reference}.get(plan)
    sound = cpu.kernel(op) if plan == "native" else getattr(module, op)
    with lk.force_plan(plan):
        check(op, operator(op), case, backend=backend)
        arguments = case.draw().arguments(op)
        mutant = MUTATIONS[op][mutation]

        def broken(*args, masked=None, **kwargs):
            extra = {} if masked is None else {"masked": masked}
            given = dict(zip(arguments_of(op), args, strict=False)) | kwargs
            return mutant(
                lambda **changed: sound(**changed, **extra), dict.fromkeys(arguments) | given
            )

        if plan == "native":
            monkeypatch.setattr(cpu, "kernel", lambda _: broken)
        else:
            monkeypatch.setattr(module, op, broken)
        with pytest.raises(AssertionError, match="over the budget"):
            check(op, operator(op), case, backend=backend)


def arguments_of(op):
    return [argument.name for argument in operator(op)._schema.arguments]


def test_a_call_that_somebody_else_answered_is_a_failure(monkeypatch):
    with lk.force_plan("reference"), pytest.raises(AssertionError, match="answered by"):
        check("lora_linear_fwd", ops.lora_linear_fwd, Case(3, 4, 5, 2), backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_adapter_is_as_large_as_the_base(dtype):
    for size in SIZES[4:]:
        for dropout_p in (0.0, 0.5):
            inputs = replace(size, dtype=dtype, dropout_p=dropout_p, bias=False).draw()
            exact = naive(inputs, torch.float64)
            base = inputs.x.double() @ inputs.weight.double().t()
            assert (exact["y"] - base).norm() >= base.norm() / 2
            base = inputs.dy.double() @ inputs.weight.double()
            assert (exact["dx"] - base).norm() >= base.norm() / 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ops.OPERATORS)
def test_bitwise_repeatable(op, dtype, device):
    arguments = (
        Case(130, 200, 264, 24, dtype=dtype, dropout_p=0.1, device=device).draw().arguments(op)
    )
    first, second = (operator(op)(**arguments) for _ in range(2))
    if not isinstance(first, tuple):
        first, second = (first,), (second,)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kept", list(itertools.product([False, True], repeat=3)), ids=str)
def test_lora_linear_dab_computes_only_what_is_asked(kept, device):
    inputs = Case(9, 12, 10, 3, device=device).draw()
    arguments = inputs.arguments("lora_linear_dab")
    whole = ops.lora_linear_dab(**arguments)
    wanted = dict(zip(("da_dtype", "db_dtype", "dbias_dtype"), kept, strict=True))
    part = arguments | {name: arguments[name] if keep else None for name, keep in wanted.items()}
    if not kept[0]:
        part |= {"x": None, "d": None}
    if not kept[1]:
        part["s"] = None
    for keep, result, expected in zip(kept, ops.lora_linear_dab(**part), whole, strict=True):
        assert torch.equal(result, expected if keep else expected.new_empty(0))


# opcheck differentiates on purpose what only functional/linear.py makes differentiable; torch
# then warns, as it should.
@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(
    "case", [Case(5, 6, 7, 2, dropout_p=0.2), Case(4, 6, 6, 3, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("op", ops.OPERATORS)
def test_opcheck(op, case, requires_grad, device):
    arguments = replace(case, device=device).draw().arguments(op)
    if requires_grad:
        for name in arguments.keys() & {"x", "dy", "lora_a", "lora_b", "weight"}:
            arguments[name] = arguments[name].clone().requires_grad_()
    torch.library.opcheck(operator(op), (), arguments)


@pytest.mark.parametrize("op", ops.OPERATORS)
def test_no_graph_and_no_autocast_reach_inside(op, device):
    case = Case(33, 48, 40, 8, device=device)
    arguments = case.draw().arguments(op)
    for name in arguments.keys() & {"x", "dy", "lora_a", "weight"}:
        arguments[name].requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        results = operator(op)(**arguments)
    with torch.no_grad():
        expected = operator(op)(**arguments)
    if not isinstance(results, tuple):
        results, expected = (results,), (expected,)
    assert len(results) == len(RESULTS[op])
    # What torch puts there to warn where an operator is differentiated without going through
    # functional/linear.py.
    assert {result.grad_fn.name() for result in results} == {"torch::autograd::WarnNotImplemented"}
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize(
    "case", [Case(40, 64, 48, 8, dropout_p=0.3), Case(33, 20, 61, 5, dropout_p=0.9)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_dx_and_da_drop_the_same_elements(case, dtype, device):
    """With the identity as adapter and no base, the operators show their masks bit by bit."""
    inputs = replace(case, dtype=dtype, device=device).draw()
    mask, k = inputs.mask(), case.k
    one = torch.ones((), device=device)
    eye = torch.eye(k, dtype=dtype, device=device)
    rows = torch.ones(case.m, k, dtype=dtype, device=device)
    zeros = torch.zeros(k, k, dtype=dtype, device=device)
    dropout = {"rng": inputs.rng, "dropout_p": case.dropout_p}
    y, s = ops.lora_linear_fwd(rows, zeros, eye, eye, one, **dropout)
    dx, _ = ops.lora_linear_dx(rows, zeros, eye, eye, one, **dropout)
    identity = torch.eye(case.m, dtype=dtype, device=device)
    da, *_ = ops.lora_linear_dab(rows, rows, None, identity, da_dtype=dtype, **dropout)
    for dropped in (y, s, dx, da):
        assert torch.equal(dropped != 0, mask)
