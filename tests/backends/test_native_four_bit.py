"""Every operator with a four-bit base weight, on every backend, against float64 of the decoded
weight."""

import itertools
from dataclasses import replace

import pytest
import torch

import lora_kernels as lk
from lora_kernels.backends import cpu, tune
from lora_kernels.planning import plan
from lora_kernels.spec import four_bit, native
from lora_kernels.testing.linear import Case, assert_within_budget, naive, poisoned_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPS = ["lora_linear_fwd", "lora_linear_dx"]

# Rows that are decoded in registers, along rows, by nibbles, in panels, by several blocks of rows;
# rows of whole blocks, of parts of one, longer than a stretch, and such as begin in the middle of a
# byte.
SIZES = [
    Case(1, 66, 256, 4),
    Case(3, 65, 128, 3),
    Case(4, 70, 1024, 2),
    Case(1, 9, 64, 2),
    Case(5, 128, 192, 8),
    Case(6, 34, 1160, 2),
    Case(1, 5, 7, 1),
    Case(2, 37, 129, 5),
    Case(33, 65, 41, 3),
    Case(11, 71, 1280, 2),
    Case(20, 67, 2100, 3),
    Case(16, 80, 1024, 2),
    Case(50, 24, 1024, 2),
    Case(200, 136, 640, 24),
]
VARIANTS = [
    {"bias": False},
    {"dropout_p": 0.2, "fan_in_fan_out": True},
    {"out_scale": True},
    {"adapter_dtype": torch.float32},
]
FORMATS = [("nf4", 64, True), ("nf4", 64, False), ("fp4", 128, True), ("nf4", 32, False)]
FORMATS += [("fp4", 4096, False), ("nf4", 1024, True)]


class Bytes:
    """A case whose weight is four-bit: what the budget sees is the decoded one."""

    def __init__(self, case, kind, block, double):
        inputs = case.draw()
        self.data, self.state = four_bit.quantize(
            inputs.weight.float(), kind, block=block, double_quant=double
        )
        exact = four_bit.dequantize(self.data, self.state, torch.float64)
        self.inputs = replace(inputs, weight=exact)
        self.case = case

    def arguments(self, op):
        given = self.inputs.arguments(op)
        quant = {"quant": self.state.tensors(), "quant_block": self.state.block}
        return given | {"weight": self.data} | quant

    def check(self, op, backend="cpu", plan="native", **changes):
        exact = naive(self.inputs, torch.float64)
        eager = naive(self.inputs, self.case.dtype)
        with lk.force_plan(plan), poisoned_memory(), lk.record_plans() as answers:
            results = getattr(torch.ops.lora_kernels, op)(**(self.arguments(op) | changes))
        assert [(a.op, a.backend, a.plan) for a in answers] == [(op, backend, plan)]
        assert answers[0].problem.four_bit
        for name, result in zip(
            ("y", "s") if op.endswith("fwd") else ("dx", "d"), results, strict=True
        ):
            assert_within_budget(f"{op} {self.case} {name}", result, eager[name], exact[name])


def cases():
    for size, variant, dtype in itertools.product(SIZES, VARIANTS, DTYPES):
        yield replace(size, dtype=dtype, **variant)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", list(cases()), ids=str)
@pytest.mark.parametrize(("kind", "block", "double"), FORMATS)
def test_operator_keeps_the_budget(op, case, kind, block, double):
    Bytes(case, kind, block, double).check(op)


@pytest.mark.parametrize("m", [1, 5, 16, 17, 50])
def test_whole_blocks_in_bfloat16(m):
    """In registers, by nibbles and in panels that are looked up, whatever is drawn above."""
    for k, block in (1280, 64), (1280, 128), (2048, 1024):
        Bytes(Case(m, 70, k, 3, torch.bfloat16), "nf4", block, True).check("lora_linear_fwd")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", ["vendor", "reference"])
def test_other_plans_keep_the_budget(op, dtype, plan):
    weight = Bytes(Case(17, 66, 129, 4, dtype, dropout_p=0.1, fan_in_fan_out=True), "nf4", 64, True)
    weight.check(op, {"vendor": "cpu", "reference": "reference"}[plan], plan)


MISTAKES = {
    "the halves of a byte swapped": lambda a: {"weight": a["weight"] >> 4 | a["weight"] << 4},
    "the absmax of the block before": lambda a: {
        "quant": [a["quant"][0], a["quant"][1].roll(1), *a["quant"][2:]]
    },
    "no offset": lambda a: {"quant": [*a["quant"][:4], torch.zeros(())]},
    "another code": lambda a: {"quant": [four_bit.code_of("fp4", "cpu"), *a["quant"][1:]]},
    "the other orientation": lambda a: {"fan_in_fan_out": not a["fan_in_fan_out"]},
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("m", [1, 10, 20])
@pytest.mark.parametrize("op", OPS)
def test_a_mistake_turns_the_check_red(mistake, m, op):
    weight = Bytes(Case(m, 128, 128, 4, torch.bfloat16), "nf4", 64, True)
    with pytest.raises(AssertionError, match="over the budget"):
        weight.check(op, **MISTAKES[mistake](weight.arguments(op)))


def segmented_call(m, n, k, dtype, fan_in_fan_out):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    shape = (k, n) if fan_in_fan_out else (n, k)
    data, state = four_bit.quantize(normal(*shape) / k**0.5)
    table = lk.SegmentTable.from_rows(
        [(i + 1) % 4 - 1 for i in range(m)], [2, 4, 3], [0.5, 1.0, 2.0]
    )
    a, b = normal(3, 4, k) / k**0.5, normal(3, n, 4)
    x, dy = normal(m, k).to(dtype), normal(m, n).to(dtype)
    return data, state, table, a.to(dtype), b.to(dtype), x, dy


@pytest.mark.parametrize("m", [1, 4, 5, 60])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_a_mixed_batch(m, dtype, fan_in_fan_out):
    data, state, table, a, b, x, dy = segmented_call(m, 70, 128, dtype, fan_in_fan_out)
    weight = torch.nn.Parameter(data, requires_grad=False)
    weight.__class__ = type("FourBit", (torch.nn.Parameter,), {})
    weight.quant_state = state

    def run(weight, kind):
        leaves = [t.to(kind).requires_grad_() for t in (x, a, b)]
        y = lk.segmented_linear(
            leaves[0], weight, leaves[1], leaves[2], table, fan_in_fan_out=fan_in_fan_out
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(kind))]

    exact = run(four_bit.dequantize(data, state, torch.float64), torch.float64)
    eager = run_eagerly(four_bit.dequantize(data, state, dtype), table, a, b, x, dy, fan_in_fan_out)
    with lk.force_plan("native"), lk.record_plans() as answers:
        ours = run(weight, dtype)
    with lk.record_plans() as chosen:
        run(weight, dtype)
    assert native.load() == "baseline" or {a.plan for a in chosen} == {"native"}
    assert [a.op for a in answers if a.problem.four_bit] == [
        "segmented_linear_fwd",
        "segmented_linear_dx",
    ]
    assert {a.backend for a in answers} == {"cpu"}
    # The weight has no part in dA and dB.
    for name, one, other, best in zip(("y", "dx"), ours[:2], eager[:2], exact[:2], strict=True):
        assert_within_budget(name, one, other, best)


def run_eagerly(weight, table, a, b, x, dy, fan_in_fan_out):
    leaves = [t.clone().requires_grad_() for t in (x, a, b)]
    w = weight if fan_in_fan_out else weight.t()
    rows = []
    for i, slot in enumerate(table.slot_of_row.tolist()):
        y = leaves[0][i : i + 1] @ w
        if slot >= 0:
            r, scale = table.rank_of_slot[slot], table.scale_of_slot[slot].to(x.dtype)
            s = scale * (leaves[0][i : i + 1] @ leaves[1][slot, :r].t())
            y = y + s @ leaves[2][slot, :, :r].t()
        rows.append(y)
    y = torch.cat(rows)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def test_a_call_that_does_not_fit_is_refused_before_anything_is_written():
    weight = Bytes(Case(2, 64, 64, 4), "nf4", 64, True)
    given = weight.arguments("lora_linear_fwd")
    run = cpu.kernel("lora_linear_fwd")
    for changes, message in [
        ({"weight": given["weight"][:-1]}, "bytes of"),
        ({"quant_block": 48}, "a block of a four-bit weight"),
        ({"quant_block": 128}, "absmax must be"),
        ({"quant": given["quant"][:3]}, "comes with"),
        ({"quant": [given["quant"][0].half(), *given["quant"][1:]]}, "code must be float32"),
    ]:
        with pytest.raises((ValueError, TypeError), match=message):
            run(**(given | changes))
    parameter = torch.nn.Parameter(weight.data.flatten().view(torch.bfloat16), requires_grad=True)
    parameter.__class__ = type("FourBit", (torch.nn.Parameter,), {})
    parameter.quant_state = weight.state
    x = given["x"]
    with pytest.raises(ValueError, match="does not train"):
        lk.lora_linear(x, parameter, given["lora_a"], given["lora_b"])
    parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="do not fit"):
        lk.lora_linear(x[:, :32], parameter, given["lora_a"], given["lora_b"])


@pytest.mark.parametrize("slots", [0, 3])
def test_a_four_bit_weight_is_tuned(slots, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path))
    shape = (3, 64, (32, 32)) if slots else (3, 64, 64)
    op = "segmented_linear_fwd" if slots else "lora_linear_fwd"
    options = {"r": 4, "slots": slots, "dtype": torch.float32, "seconds": 0.01}
    (measured,) = tune.tune([shape], [op], four_bit=True, **options)
    assert measured.problem.four_bit and {"native"} <= {c.plan for c in measured.medians_us}
    assert "four_bit" in measured.problem.bucketed().key()
    plan.forget_tables()
