"""``expert_linear`` and its operators against float64, within the one budget."""

import contextlib
import itertools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_kernels as lk
from lora_kernels.backends import cpu
from lora_kernels.functional import ops
from lora_kernels.functional.experts import expert_linear
from lora_kernels.planning.device import facts
from lora_kernels.testing.experts import MUTATIONS, ExpertCase, check_experts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

SIZES = [
    ExpertCase((0, 0), 9, 8, 2),
    ExpertCase((1,), 16, 32, 8),
    ExpertCase((5,), 20, 31, 3),
    ExpertCase((0, 70, 0), 33, 24, 5, spare=2),
    ExpertCase((1, 0, 3, 2), 7, 5, 1),
    ExpertCase((3, 40, 0, 1, 9), 130, 65, 17, spare=4),
    # two tiles of 64 columns and a remainder, blocks of rows beyond the first
    ExpertCase((200, 17, 0, 33), 136, 264, 24),
    ExpertCase(tuple(i * 7 % 5 for i in range(128)), 48, 64, 8),
]
VARIANTS = [
    {},
    {"bias": True, "fan_in_fan_out": True},
    {"zero_weight": True, "peft_layout": False},
    {"adapter_dtype": torch.float32, "bias": True},
    {"layout": "transposed", "fan_in_fan_out": True, "adapter_dtype": torch.bfloat16},
    {"weight_dtype": torch.float32},
    {"weight_dtype": torch.bfloat16, "fan_in_fan_out": True},
]


def operator(op):
    return getattr(torch.ops.lora_kernels, op).default


def cases():
    for size, variant, dtype in itertools.product(SIZES, VARIANTS, DTYPES):
        yield replace(size, dtype=dtype, **variant)


@pytest.mark.parametrize("op", ops.EXPERT_OPERATORS)
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_expert_operator_keeps_the_budget(op, case, device):
    check_experts(op, operator(op), replace(case, device=device), backend=device)


def has_kernels():
    return facts("cpu").native not in ("", "baseline")


@pytest.mark.parametrize("op", ops.EXPERT_OPERATORS)
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_the_reference_keeps_the_budget(op, case, device):
    with lk.force_plan("reference"):
        check_experts(op, operator(op), replace(case, device=device), backend="reference")


@pytest.mark.parametrize("op", ops.EXPERT_OPERATORS)
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_the_library_keeps_the_budget(op, case, device):
    with lk.force_plan("vendor"):
        check_experts(op, operator(op), replace(case, device=device), backend=device)


# Of each operator the products, and the cases in which the library's grouped GEMM makes all.
PRODUCTS = {
    "expert_shrink": 1, "expert_linear_fwd": 3, "expert_linear_dx": 3, "expert_linear_dab": 2
}  # fmt: skip
GROUPED = [
    ({}, PRODUCTS),
    ({"fan_in_fan_out": True, "peft_layout": False}, PRODUCTS),
    ({"adapter_dtype": torch.float32, "weight_dtype": torch.float32}, PRODUCTS),
    ({"r": 12}, ("expert_shrink", "expert_linear_fwd")),
    ({"k": 60}, ()),
    ({"dtype": torch.float16}, ()),
]


@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize(("changes", "grouped"), GROUPED, ids=str)
def test_the_library_has_a_grouped_product(op, changes, grouped, device, monkeypatch):
    case = ExpertCase((3, 40, 0, 9), 64, 48, 8, spare=2, dtype=torch.bfloat16, bias=True)
    product, counted = torch.nn.functional.grouped_mm, []

    def counting(*args, **kwargs):
        counted.append(op)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", counting)
    case = replace(case, device=device, **changes)
    with lk.force_plan("vendor"):
        results = check_experts(op, operator(op), case, backend=device)
    if op == "expert_linear_dab":
        results[1] = results[1].permute(1, 2, 0)
    assert all(result.is_contiguous() for result in results)
    assert (len(counted) == PRODUCTS[op]) == (op in grouped)


@pytest.mark.parametrize("op", ["expert_linear_fwd", "expert_linear_dx"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", ["vendor", "reference", None])
def test_without_an_adapter(op, dtype, plan, device):
    case = ExpertCase((3, 40, 0, 9), 70, 48, 0, dtype=dtype, bias=True, spare=1, device=device)
    with lk.force_plan(plan) if plan else contextlib.nullcontext():
        check_experts(op, operator(op), case)


@pytest.mark.parametrize("op", ops.EXPERT_OPERATORS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_kernel_turns_the_check_red(op, mutation, monkeypatch):
    case = ExpertCase((3, 40, 0, 9), 70, 48, 6, bias=True)
    sound = operator(op)
    check_experts(op, sound, case)
    if op == "expert_linear_dab" and mutation != "a row too few for the first":
        pytest.skip("it has neither a scale nor an adapter")
    if op == "expert_shrink" and mutation == "no tail":
        mutation = "no scale"

    def broken(**given):
        return MUTATIONS[mutation](sound, given)

    with pytest.raises(AssertionError, match="over the budget"):
        check_experts(op, broken, case)


@pytest.mark.parametrize(
    "case",
    [
        ExpertCase((3,), 4, 5, 2),
        ExpertCase((1, 0, 3, 2), 4, 3, 2, spare=1),
        ExpertCase((0, 5, 0), 3, 4, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_gradients_of_the_formula(case, fan_in_fan_out):
    inputs = replace(case, dtype=torch.float64, bias=True, fan_in_fan_out=fan_in_fan_out).draw()
    leaves = inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.bias
    leaves = [t.detach().clone().requires_grad_() for t in leaves]

    def run(x, weight, a, b, bias):
        return expert_linear(
            x, weight, a, b, inputs.offs, 0.75, bias, fan_in_fan_out=fan_in_fan_out
        )

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.equal(run(*leaves).detach(), run(*(t.detach() for t in leaves)))


def test_gradients_are_the_operators(device):
    inputs = ExpertCase((3, 40, 0, 9), 70, 48, 6, device=device).draw()
    x, a, b = (t.clone().requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b))
    with lk.record_plans() as answers:
        y = expert_linear(x, inputs.weight, a, b, inputs.offs, inputs.scale)
        y.backward(inputs.dy)
    assert [a.op for a in answers] == ["expert_linear_fwd", "expert_linear_dx", "expert_linear_dab"]
    assert all(answer.problem.experts == 4 for answer in answers)
    if has_kernels():
        assert {answer.plan for answer in answers} == {"native"}
    dab = inputs.arguments("expert_linear_dab")
    da, db = ops.expert_linear_dab(
        **dab
        | {
            "s": ops.expert_linear_fwd(**inputs.arguments("expert_linear_fwd"))[1],
            "d": ops.expert_linear_dx(**inputs.arguments("expert_linear_dx"))[1],
        }
    )
    assert torch.equal(a.grad, da) and torch.equal(b.grad, db)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_what_needs_a_gradient_is_computed(needs, device):
    inputs = ExpertCase((3, 4, 0), 7, 8, 2, device=device).draw()
    whole = [t.clone().requires_grad_() for t in (inputs.x, inputs.lora_a, inputs.lora_b)]
    expert_linear(whole[0], inputs.weight, *whole[1:], inputs.offs, 0.75).backward(inputs.dy)
    leaves = [
        t.clone().requires_grad_(need)
        for t, need in zip((inputs.x, inputs.lora_a, inputs.lora_b), needs, strict=True)
    ]
    y = expert_linear(leaves[0], inputs.weight, *leaves[1:], inputs.offs, 0.75)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.backward(inputs.dy)
    for leaf, need, reference in zip(leaves, needs, whole, strict=True):
        assert torch.equal(leaf.grad, reference.grad) if need else leaf.grad is None


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", ops.EXPERT_OPERATORS)
def test_opcheck(op, requires_grad, device):
    arguments = ExpertCase((2, 0, 3), 6, 8, 2, bias=True, device=device).draw().arguments(op)
    if requires_grad:
        for name in arguments.keys() & {"x", "dy", "lora_a", "lora_b", "weight"}:
            arguments[name] = arguments[name].clone().requires_grad_()
    torch.library.opcheck(operator(op), (), arguments)


@pytest.mark.parametrize("op", ops.EXPERT_OPERATORS)
def test_what_a_compiler_for_a_gpu_is_told(op):
    """The results' shapes, dtypes and strides, of tensors that have no memory to look at."""
    case = ExpertCase((2, 0, 3), 6, 8, 2, spare=1, bias=True)
    results, given = check_experts(op, operator(op), case), case.draw().arguments(op)
    with FakeTensorMode():
        arguments = {
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
            if isinstance(t, torch.Tensor)
            else t
            for name, t in given.items()
        }
        fakes = operator(op)(**arguments)
    for fake, real in zip([fakes] if op == "expert_shrink" else fakes, results, strict=True):
        assert fake.is_cuda and fake.dtype == real.dtype
        assert (fake.shape, fake.stride()) == (real.shape, real.stride())


def test_under_autocast_weights_are_rounded_not_copied(device):
    inputs = ExpertCase((3, 40, 0, 9), 70, 48, 6, bias=True, device=device).draw()
    given = inputs.lora_a, inputs.lora_b, inputs.offs, 0.75, inputs.bias
    with torch.autocast(device, dtype=torch.bfloat16):
        y = expert_linear(inputs.x, inputs.weight, *given)
    half = expert_linear(inputs.x.bfloat16(), inputs.weight.bfloat16(), *given)
    assert y.dtype == torch.bfloat16 and torch.equal(y, half)


WRONG = {
    "x of another width": {"x": torch.ones(4, 9)},
    "x of three dimensions": {"x": torch.ones(1, 4, 8)},
    "B of another expert count": {"lora_b": torch.ones(3, 6, 2)},
    "A without B": {"lora_b": None},
    "rank 0": {"lora_a": torch.ones(2, 0, 8), "lora_b": torch.ones(2, 6, 0)},
    "bias of one expert": {"bias": torch.ones(6)},
    "offs that fall": {"offs": torch.tensor([3, 2], dtype=torch.int32)},
    "offs that leave x": {"offs": torch.tensor([3, 5], dtype=torch.int32)},
    "offs below zero": {"offs": torch.tensor([-1, 4], dtype=torch.int32)},
    "a meta A": {"lora_a": torch.ones(2, 2, 8, device="meta")},
    "int64 offs": {"offs": torch.tensor([3, 4])},
    "an integer x": {"x": torch.ones(4, 8, dtype=torch.int32)},
    "dtypes that differ": {"x": torch.ones(4, 8, dtype=torch.bfloat16)},
    "a list": {"weight": [1.0]},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_is_named(name):
    given = {
        "x": torch.ones(4, 8),
        "weight": torch.ones(2, 6, 8),
        "lora_a": torch.ones(2, 2, 8),
        "lora_b": torch.ones(2, 6, 2),
        "offs": torch.tensor([3, 4], dtype=torch.int32),
    }
    expert_linear(**given)
    kind = (
        TypeError
        if name in ("int64 offs", "an integer x", "dtypes that differ", "a list")
        else ValueError
    )
    with pytest.raises(kind, match=r"lora_|offs|x |weight|bias"):
        expert_linear(**given | WRONG[name])


@pytest.mark.skipif(not facts("cpu").native, reason="no native kernels")
@pytest.mark.parametrize("ends", [[3, 2], [3, 5], [-1, 4]], ids=str)
@pytest.mark.parametrize("op", ops.EXPERT_OPERATORS)
def test_a_kernel_writes_nothing_beside_its_tensors(op, ends):
    arguments = ExpertCase((3, 1), 6, 8, 2).draw().arguments(op)
    with pytest.raises(ValueError, match="offs"):
        cpu.kernel(op)(**arguments | {"offs": torch.tensor(ends, dtype=torch.int32)})
