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
from lora_kernels.spec import four_bit
from lora_kernels.testing.experts import (
    FOUR_BIT_MUTATIONS,
    MUTATIONS,
    ExpertCase,
    check_experts,
)

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
    """Two of them: both sides are the library's, one by rows and one by experts, and on Intel its
    sums of a row are that much better than those of a matrix."""
    with lk.force_plan("reference"):
        moved = replace(case, device=device)
        check_experts(op, operator(op), moved, backend="reference", budgets=2)


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


BASE_OPERATORS = ["expert_linear_fwd", "expert_linear_dx"]
# Where experts begin with a block, within one, and within a byte; few rows and several blocks of
# them; no adapter; rows that are decoded in registers, along rows and in panels.
FOUR_BIT_SIZES = [
    ExpertCase((0, 0), 64, 32, 2),
    ExpertCase((5,), 20, 31, 3),
    ExpertCase((0, 70, 0), 33, 24, 5, spare=2),
    ExpertCase((1, 0, 3, 2), 7, 5, 1),
    ExpertCase((3, 40, 0, 1, 9), 130, 65, 17, spare=4),
    ExpertCase((4, 1, 0, 2), 66, 256, 6, bias=True),
    ExpertCase((2, 30, 0), 70, 48, 0, spare=1, bias=True),
    ExpertCase((200, 17, 0, 33), 136, 264, 24),
    ExpertCase(tuple(i * 7 % 5 for i in range(128)), 48, 64, 8),
]
FOUR_BIT_VARIANTS = [{}, {"fan_in_fan_out": True}, {"adapter_dtype": torch.float32}]
FORMATS = [("nf4", 64, True), ("nf4", 64, False), ("fp4", 128, True), ("fp4", 4096, False)]


def four_bit_cases():
    whole = itertools.product(FOUR_BIT_SIZES, FOUR_BIT_VARIANTS, DTYPES, FORMATS)
    for size, variant, dtype, quant in whole:
        yield replace(size, dtype=dtype, quant=quant, **variant)


@pytest.mark.parametrize("op", BASE_OPERATORS)
@pytest.mark.parametrize("case", list(four_bit_cases()), ids=str)
def test_four_bit_experts_keep_the_budget(op, case, device):
    check_experts(op, operator(op), replace(case, device=device), backend=device)


@pytest.mark.parametrize("op", BASE_OPERATORS)
@pytest.mark.parametrize("case", FOUR_BIT_SIZES, ids=str)
@pytest.mark.parametrize(("plan", "dtype"), [("vendor", torch.bfloat16), ("reference", None)])
def test_other_plans_of_four_bit_experts(op, case, plan, dtype, device):
    case = replace(case, dtype=dtype or case.dtype, quant=("nf4", 64, True), device=device)
    with lk.force_plan(plan):
        check_experts(op, operator(op), case, backend="reference" if dtype is None else device)


@pytest.mark.parametrize("op", BASE_OPERATORS)
@pytest.mark.parametrize("mutation", FOUR_BIT_MUTATIONS)
def test_a_wrong_decoding_turns_the_check_red(op, mutation, device):
    case = ExpertCase((3, 40, 0, 9), 64, 64, 6, quant=("nf4", 64, True), device=device)
    sound = operator(op)
    check_experts(op, sound, case)
    with pytest.raises(AssertionError, match="over the budget"):
        check_experts(op, lambda **given: FOUR_BIT_MUTATIONS[mutation](sound, given), case)


def four_bit_weight(inputs, quant=("nf4", 64, True)):
    kind, block, double = quant
    made = four_bit.quantize(inputs.weight.float(), kind, block=block, double_quant=double)
    return lk.FourBitParameter(*made)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("r", [0, 6])
def test_gradients_over_a_four_bit_weight(r, fan_in_fan_out, device):
    case = ExpertCase((3, 40, 0, 9), 70, 49, r, bias=True, spare=2, fan_in_fan_out=fan_in_fan_out)
    inputs = replace(case, device=device).draw()
    weight = four_bit_weight(inputs)
    results = []
    for w in weight, weight.dequantize(torch.float32):
        given = inputs.x, inputs.lora_a, inputs.lora_b, inputs.bias
        leaves = [None if t is None else t.clone().requires_grad_() for t in given]
        x, a, b, bias = leaves
        with lk.record_plans() as answers:
            y = expert_linear(x, w, a, b, inputs.offs, 0.75, bias, fan_in_fan_out=fan_in_fan_out)
            y.backward(inputs.dy)
        products = [answer for answer in answers if answer.op in BASE_OPERATORS]
        assert [p.problem.four_bit for p in products] == [w is weight] * 2
        results.append([y.detach(), *(t.grad for t in leaves if t is not None)])
    for ours, plain in zip(*results, strict=True):
        assert (ours - plain).abs().max() < 1e-5 * plain.abs().max()
    half = expert_linear(
        x.bfloat16(), weight, a, b, inputs.offs, 0.75, fan_in_fan_out=fan_in_fan_out
    )
    assert half.dtype == torch.bfloat16


@pytest.mark.skipif(not has_kernels(), reason="no native kernels")
def test_only_experts_that_have_rows_are_decoded():
    """And none of them as a whole: what the others' absmax say is never read."""
    case = ExpertCase((3, 0, 9, 0), 64, 64, 6, quant=("nf4", 64, False))
    for op in BASE_OPERATORS:
        given = case.draw().arguments(op)
        expected = operator(op)(**given)
        absmax = given["quant"][1].clone().view(4, -1)
        absmax[1], absmax[3] = torch.nan, torch.nan
        given["quant"] = [given["quant"][0], absmax.view(-1)]
        assert all(map(torch.equal, operator(op)(**given), expected))


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


@pytest.mark.parametrize("op", BASE_OPERATORS)
def test_opcheck_of_four_bits(op, device):
    case = ExpertCase((2, 0, 3), 6, 8, 2, bias=True, quant=("nf4", 64, True), device=device)
    torch.library.opcheck(operator(op), (), case.draw().arguments(op))


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


def test_a_wrong_four_bit_weight_is_named():
    inputs = ExpertCase((3, 1), 6, 8, 2).draw()
    weight = four_bit_weight(inputs)
    given = inputs.lora_a, inputs.lora_b, inputs.offs
    with pytest.raises(ValueError, match="do not fit"):
        expert_linear(inputs.x[:, :4], weight, *given)
    with pytest.raises(ValueError, match="do not fit"):
        expert_linear(inputs.x, weight, *given, fan_in_fan_out=True)
    with pytest.raises(ValueError, match="3-D weight"):
        flat = inputs.weight.view(-1, 8)
        expert_linear(inputs.x, lk.FourBitParameter(*four_bit.quantize(flat)), *given)
    with pytest.raises(ValueError, match="2-D weight"):
        lk.lora_linear(inputs.x, weight, inputs.lora_a[0], inputs.lora_b[0])
    with pytest.raises(ValueError, match=r"48 bytes|bytes in a row"):
        expert_linear(inputs.x, lk.FourBitParameter(weight.data[1:], weight.quant_state), *given)


@pytest.mark.skipif(not facts("cpu").native, reason="no native kernels")
@pytest.mark.parametrize("ends", [[3, 2], [3, 5], [-1, 4]], ids=str)
@pytest.mark.parametrize("op", ops.EXPERT_OPERATORS)
def test_a_kernel_writes_nothing_beside_its_tensors(op, ends):
    arguments = ExpertCase((3, 1), 6, 8, 2).draw().arguments(op)
    with pytest.raises(ValueError, match="offs"):
        cpu.kernel(op)(**arguments | {"offs": torch.tensor(ends, dtype=torch.int32)})
