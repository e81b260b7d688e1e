"""The CPU extension's kernels of batches that mix adapters, with the instruction set of this
process.

`test_every_instruction_set` in test_native.py runs the drawn cases again for the others.
"""

from dataclasses import replace

import pytest
import torch
from bits import assert_same_bits, check_native, draw_cases, tensors

import lora_kernels as lk
from lora_kernels.functional import ops
from lora_kernels.layers.packed import PackedWeight
from lora_kernels.spec import native
from lora_kernels.spec.segments import SegmentTable
from lora_kernels.testing.linear import poisoned_memory
from lora_kernels.testing.segmented import SegmentedCase, check_segmented

pytestmark = pytest.mark.native
cpu_ops = torch.ops.lora_kernels_cpu

FLOAT32, BFLOAT16, FLOAT16 = DTYPES = torch.float32, torch.bfloat16, torch.float16
LINEAR = ("segmented_linear_fwd", "segmented_linear_dx")
IN_PLACE = ("segmented_lora_", "segmented_expand_")

# Slices that end within a panel of 64 columns, on it and just beyond, and odd ones.
WIDTHS = [(1,), (7, 1, 65), (64, 64), (33, 129, 16), (130,), (16, 15, 1), (200, 3), (127, 2, 64)]
NAN = float("nan")
SIZE = SegmentedCase(230, 300, (70, 129, 16), (33, 0, 1, 8, 80, 16))


def run(op, arguments):
    """The results of a native call; of one in place, the tensor that it wrote."""
    results = getattr(cpu_ops, op)(**arguments)
    return tensors(arguments["y"] if results is None else results)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        draw_cases(
            metafunc,
            SegmentedCase,
            count=20,
            m=[1, 2, 5, 12, 31, 33, 49, 100, 193, 400],
            k=[1, 3, 16, 17, 64, 65, 100, 129, 511, 513],
            widths=WIDTHS,
            ranks=[(1, 2), (16, 0, 8), (33, 7, 64, 4), (8,) * 20, (65, 130, 3), (20,)],
            dtype=DTYPES,
            adapter_dtype=[None, None, FLOAT32, FLOAT16, BFLOAT16, torch.float64],
            packed=[False, True],
            dropout_p=[0.0, 0.1, 0.5],
            layout=["contiguous", "transposed", "sliced", "strided"],
            spare=[0, 0, 9],
            fan_in_fan_out=[False, True],
            bias=[True, False],
            weight=[1.0, 1.0, 0.0],
        )


@pytest.mark.parametrize("op", ops.SEGMENTED_OPERATORS)
def test_sizes(op, case):
    if op in IN_PLACE:
        case = replace(case, dropout_p=0.0)
    if op == "segmented_lora_dab":
        # The budget knows the rows' dtype only.
        case = replace(case, adapter_dtype=None)
    check_native(check_segmented, op, case)


# A packed weight


@pytest.mark.parametrize("op", LINEAR)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "widths"), [(1, 1, (1,)), (9, 65, (7, 1, 65)), (230, 513, (190, 66))]
)
def test_packed_weight(op, m, k, widths, fan_in_fan_out, dtype):
    case = SegmentedCase(m, k, widths, (6, 0, 20, 8), dtype, dropout_p=0.2, bias=True)
    inputs = replace(case, fan_in_fan_out=fan_in_fan_out).draw()
    arguments = inputs.arguments(op)
    inner_first = (op == "segmented_linear_fwd") != fan_in_fan_out
    packed = cpu_ops.pack(inputs.weight.t() if inner_first else inputs.weight)
    with poisoned_memory():
        results = run(op, arguments | {"packed": packed})
    assert_same_bits(results, run(op, arguments))
    # The packed weight is what is read, not the other.
    zeros = torch.zeros_like(inputs.weight)
    assert_same_bits(run(op, arguments | {"weight": zeros, "packed": packed}), results)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_a_modules_packed_weight(dtype):
    inputs = replace(SIZE, dtype=dtype, bias=True, m=40).draw()
    held = PackedWeight()
    packed = (held.get(inputs.weight, False), held.get(inputs.weight, False, for_dx=True))
    if native.load() != "baseline":
        assert all(p is not None for p in packed)

    def results(packed):
        x = inputs.x.clone().requires_grad_()
        y = lk.segmented_linear(
            x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.seg, inputs.bias, packed=packed
        )
        (dx,) = torch.autograd.grad(y, x, inputs.dy)
        return y.detach(), dx

    with lk.force_plan("native"):
        assert_same_bits(results(packed), results((None, None)))


# The same bits, whatever is around


def of_rows(inputs, op, rows):
    """The arguments of a call of some rows alone, with the masks that they have in the batch."""
    seg = inputs.seg
    part = SegmentTable.from_rows(
        seg.slot_of_row[rows],
        seg.rank_of_slot,
        seg.scale_of_slot,
        logical_row=seg.logical_row[rows],
        max_rank=seg.max_rank,
    )
    arguments = inputs.arguments(op) | {"table": part.tensors()}
    return arguments | {name: arguments[name][rows] for name in {"x", "dy", "y"} & arguments.keys()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*LINEAR, "segmented_lora_"])
@pytest.mark.parametrize("m", [20, 230])
def test_a_row_depends_on_no_other_row(op, m, dtype):
    case = replace(SIZE, m=m, k=700, dtype=dtype, bias=True, ranks=(33, 0, 1, 8, 80, 16, 16, 3))
    inputs = replace(case, dropout_p=0.0 if op in IN_PLACE else 0.3).draw()
    threads = torch.get_num_threads()
    whole = run(op, inputs.arguments(op))
    bare = inputs.bare().nonzero().flatten().tolist()
    assert bare
    alone = [run(op, of_rows(inputs, op, [i])) for i in range(m)]
    assert_same_bits(whole, [torch.cat(parts) for parts in zip(*alone, strict=True)])
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same_bits(run(op, inputs.arguments(op)), whole)
            for rows in ([m - 1, 0, 7], bare, list(range(5, 18)), list(reversed(range(m)))):
                part = run(op, of_rows(inputs, op, rows))
                assert_same_bits(part, [result[rows] for result in whole])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*LINEAR, "segmented_lora", "segmented_lora_", "segmented_lora_dx"])
def test_nothing_stays_of_an_earlier_call(op, dtype):
    """Threads keep their scratch memory: what a call leaves there must not reach the next."""
    inputs = replace(SIZE, m=37, k=91, widths=(40, 7, 30), dtype=dtype).draw()
    clean = run(op, inputs.arguments(op))
    larger = replace(SIZE, m=500, k=600, widths=(600,), ranks=(90, 200, 90), dtype=dtype).draw()
    arguments = larger.arguments(op)
    for name in {"x", "dy", "weight"} & arguments.keys():
        arguments[name].fill_(float("nan"))
    assert not run(op, arguments)[0][~larger.bare()].isfinite().any()
    again = inputs.arguments(op)
    before = {k: v.clone() for k, v in again.items() if isinstance(v, torch.Tensor) and k != "y"}
    with poisoned_memory():
        results = run(op, again)
    assert_same_bits(results, clean)
    assert all(torch.equal(again[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", LINEAR)
def test_rows_in_order_are_read_where_they_lie(op, dtype):
    """A batch whose rows are grouped already is not gathered, and has the same bits as in any other
    order."""
    inputs = replace(SIZE, m=60, k=64, widths=(64, 32), dtype=dtype).draw()
    grouped = inputs.seg.order.tolist()
    shuffled = torch.randperm(60, generator=torch.Generator().manual_seed(0)).tolist()
    places = torch.tensor([grouped.index(i) for i in shuffled])
    first = run(op, of_rows(inputs, op, grouped))
    second = run(op, of_rows(inputs, op, shuffled))
    assert_same_bits([result[places] for result in first], second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["segmented_lora_dx", "segmented_linear_dx"])
@pytest.mark.parametrize("widths", [(7, 9, 8), (8, 6, 9), (6, 1, 2)])
def test_a_slices_d_is_of_its_own_columns(op, widths, dtype):
    inputs = SegmentedCase(40, 30, widths, (8, 4, 8), dtype).draw()
    arguments = inputs.arguments(op)
    _, clean = run(op, arguments)
    first = 0
    for j, width in enumerate(widths):
        dirty = torch.full_like(inputs.dy, float("nan"))
        dirty[:, first : first + width] = inputs.dy[:, first : first + width]
        _, d = run(op, arguments | {"dy": dirty})
        assert_same_bits([d[:, j]], [clean[:, j]])
        first += width


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["segmented_lora_dx", "segmented_linear_dx"])
def test_what_lies_beside_rows_that_are_read_in_place(op, dtype):
    """Rows of one adapter in their order, as a window: nothing is copied, and a last slice of odd
    width has no zeros behind it."""
    inputs = SegmentedCase(12, 30, (7, 1), (8, 4, 8), dtype).draw()
    seg = SegmentTable.from_rows([0] * 12, [8, 4, 8], [1.0, 1.0, 1.0], max_rank=8)
    arguments = inputs.arguments(op) | {"table": seg.tensors()}
    wide = torch.full((13, 20), float("nan"), dtype=dtype)
    window = wide[:12, 2:10].copy_(inputs.dy)
    assert_same_bits(run(op, arguments | {"dy": window}), run(op, arguments))


@pytest.mark.parametrize("op", [*LINEAR, "segmented_lora", "segmented_lora_"])
def test_a_rank_that_became_zero_is_no_adapter(op):
    """Also before the table is scheduled anew."""
    inputs = replace(SIZE, m=60, bias=True).draw()
    ranks = inputs.seg.rank_of_slot
    ranks[0] = 0
    before = run(op, inputs.arguments(op))
    inputs.seg.update_(rank_of_slot=ranks)
    assert_same_bits(before, run(op, inputs.arguments(op)))


def test_a_new_table_has_no_adapters():
    inputs = replace(SIZE, m=9).draw()
    table = SegmentTable(12, inputs.seg.slots, inputs.seg.max_rank, "cpu").tensors()
    y, _ = run("segmented_lora", inputs.arguments("segmented_lora") | {"table": table})
    assert not y.any()


# Wrong calls


def wrong_calls():
    inputs = SegmentedCase(9, 30, (25, 8), (4, 3, 2), bias=True, spare=2).draw()
    a, b, weight = inputs.lora_a, inputs.lora_b, inputs.weight
    x, dy, table = inputs.x, inputs.dy, inputs.seg.tensors()
    assert table[4].tolist() == [0, 4, 6, 8, 1, 5, 7, 2, 3, 9, 10]

    def changed(i, change):
        return [change(t.clone()) if i == j else t for j, t in enumerate(table)]

    def put(place, value):
        def change(t):
            t[place] = value
            return t

        return change

    tables = [
        ({"table": table[:7]}, ValueError, "8 tensors, got 7"),
        ({"table": changed(4, put(0, 9))}, ValueError, "row 9 of the table.*x has 9 rows"),
        ({"table": changed(4, put(0, -1))}, ValueError, "row -1 of the table"),
        ({"table": changed(4, put(8, 9))}, ValueError, "row 9 of the table.*x has 9 rows"),
        ({"table": changed(4, lambda t: t[0].repeat(11))}, ValueError, "two places"),
        ({"table": changed(4, put(slice(0, 2), torch.tensor([4, 0])))}, ValueError, "two places"),
        ({"table": changed(4, put(7, 3))}, ValueError, "two places"),
        ({"table": changed(4, put(8, 0))}, ValueError, "two places"),
        ({"table": changed(0, put(0, 2))}, ValueError, "of another slot"),
        ({"table": changed(0, put(3, 3))}, ValueError, "of another slot"),
        ({"table": changed(5, put(3, 99))}, ValueError, "start_of_slot of slot 2"),
        ({"table": changed(5, put(0, -1))}, ValueError, "start_of_slot of slot 0"),
        ({"table": changed(1, put(0, 5))}, ValueError, "slot 0 has rank 5.*room for 4"),
        ({"table": changed(1, put(0, -1))}, ValueError, "slot 0 has rank -1"),
        ({"table": changed(1, lambda t: t.long())}, TypeError, "vector 1 of the table must be Int"),
        ({"table": changed(2, lambda t: t.double())}, TypeError, "vector 2 .*must be Float"),
        ({"table": changed(3, lambda t: t[:5])}, ValueError, "do not fit each other"),
        ({"table": changed(4, lambda t: t.repeat(2)[::2])}, ValueError, "contiguous vectors"),
    ]
    stacks = [
        ({"lora_a": a[:1]}, ValueError, "lora_a has 1 slices and lora_b 2"),
        ({"lora_b": []}, ValueError, "lora_b must hold a tensor a slice"),
        ({"lora_a": [t[:2] for t in a]}, ValueError, r"lora_a must be \[3, ., .\]"),
        ({"lora_a": [a[0], a[1][:, :, 1:]]}, ValueError, "does not fit K = 30"),
        ({"lora_b": [b[0], b[1][..., :3]]}, ValueError, r"lora_b must be \[S, N, 4\]"),
        ({"rng": torch.zeros(3).long()}, ValueError, "rng must be"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in"),
    ]
    base = [
        ({"weight": weight.t()}, ValueError, r"weight must be \[33, 30\], got \[30, 33\]"),
        ({"fan_in_fan_out": True}, ValueError, r"weight must be \[30, 33\], got \[33, 30\]"),
        ({"weight": weight.half()}, TypeError, "the rows are Float and weight is Half"),
        ({"packed": cpu_ops.pack(weight)[:-1]}, ValueError, "packed"),
        ({"packed": cpu_ops.pack(weight.bfloat16())}, ValueError, "packed"),
    ]
    fwd = [
        ({"x": x[:, :29]}, ValueError, r"x must be \[M, 30\], got \[9, 29\]"),
        ({"x": x[0]}, ValueError, "x must have two dimensions"),
        ({"x": x.int()}, TypeError, "x must be float32"),
        ({"x": x.repeat(2, 1)}, ValueError, "x has 18 rows and the table has room for 11"),
        ({"bias": torch.ones(32)}, ValueError, r"bias must be \[33\], got \[32\]"),
        ({"bias": torch.ones(33).int()}, TypeError, "bias must be a floating tensor"),
    ]
    dx = [
        ({"dy": dy[:, :32]}, ValueError, r"dy must be \[M, 33\], got \[9, 32\]"),
        ({"dy": dy.double()}, TypeError, "dy must be float32"),
        ({"dy": dy.repeat(2, 1)}, ValueError, "room for 11"),
    ]
    in_place = [
        ({"x": x.int()}, TypeError, "x must be float32"),
        ({"y": torch.zeros(9, 32)}, ValueError, r"y must be \[9, 33\], got \[9, 32\]"),
        ({"y": torch.zeros(8, 33)}, ValueError, r"y must be \[9, 33\], got \[8, 33\]"),
        ({"y": torch.zeros(9, 33).half()}, TypeError, "y must be Float, got Half"),
    ]
    dab = [
        ({"x": x[:8]}, ValueError, r"x must be \[9, 30\], got \[8, 30\]"),
        ({"s": torch.zeros(8, 2, 4)}, ValueError, r"s must be \[9, 2, 4\], got \[8, 2, 4\]"),
        ({"d": torch.zeros(9, 2, 3)}, ValueError, r"d must be \[9, 2, 4\], got \[9, 2, 3\]"),
        ({"d": torch.zeros(9, 1, 4)}, ValueError, r"d must be \[9, 2, 4\]"),
        ({"s": torch.zeros(9, 2, 4).int()}, TypeError, "s must be float32"),
    ]
    for op, changes in [
        ("segmented_linear_fwd", [*tables, *stacks, *base, *fwd]),
        ("segmented_linear_dx", [*tables, *stacks, *base, *dx]),
        ("segmented_lora_", [*tables, *in_place]),
        ("segmented_lora_dab", [*tables, *dab]),
    ]:
        for change, error, says in changes:
            yield pytest.param(inputs, op, change, error, says, id=f"{op}-{says}")


@pytest.mark.parametrize(
    ("inputs", "op", "change", "error", "says"), list(wrong_calls()) if native.load() else []
)
def test_wrong_calls(inputs, op, change, error, says):
    run(op, inputs.arguments(op))
    arguments = inputs.arguments(op) | change
    before = arguments["y"].clone() if "y" in arguments else None
    with pytest.raises(error, match=says):
        getattr(cpu_ops, op)(**arguments)
    assert before is None or torch.equal(arguments["y"], before)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_panels_of_slots(dtype):
    """Those that were packed for the table's rank are read, and no others."""
    widths, ranks = (64, 70, 5), (5, 8, 0)
    seg = SegmentTable.from_rows([0, 1, -1, 1, 2, 0], ranks, [1.0, 0.5, 2.0])
    x, weight = torch.randn(6, 33).to(dtype), torch.randn(sum(widths), 33).to(dtype)
    a = [torch.randn(3, 8, 33).to(dtype) for _ in widths]
    b = [torch.randn(3, n, 8).to(dtype) for n in widths]
    operands = x, weight, a, b, seg.tensors()
    expected, _ = cpu_ops.segmented_linear_fwd(*operands)

    def packed(slot, rank):
        rights = [t[slot, :rank].t() for t in a] + [t[slot, :, :rank].t() for t in b]
        return [cpu_ops.pack(right) for right in rights]

    def panels(packed_for, spoilt=()):
        held = [torch.full((3, len(p)), NAN, dtype=dtype) for p in packed(0, 8)]
        for slot, rank in enumerate(packed_for):
            for to, values in zip(held, packed(slot, rank), strict=True):
                to[slot, : len(values)] = NAN if slot in spoilt else values
        return [torch.tensor(packed_for, dtype=torch.int32), *held]

    def result(given):
        return cpu_ops.segmented_linear_of_panels(*operands, None, None, given)

    assert torch.equal(result(panels(ranks)), expected)
    assert torch.equal(result(panels((5, 3, 8), spoilt=(1, 2))), expected)
    spoilt = result(panels(ranks, spoilt=(1,))).isnan().any(1)
    assert spoilt.tolist() == [False, True, False, True, False, False]
    good = panels(ranks)
    for wrong, says in (
        (good[:-1], "int32 ranks"),
        ([good[0].long(), *good[1:]], "int32 ranks"),
        ([good[0], good[1][:2], *good[2:]], "3 slots"),
        ([good[0], good[1][:, :8].contiguous(), *good[2:]], "do not hold"),
        ([good[0], good[1].double(), *good[2:]], "do not hold"),
    ):
        with pytest.raises(ValueError, match=says):
            result(wrong)
