"""Batches that mix adapters: the table, the operators on this machine, and their gradients."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lora_kernels as lk
from lora_kernels.functional import ops
from lora_kernels.functional.segmented import segmented_expand, segmented_lora, segmented_shrink
from lora_kernels.planning.device import facts
from lora_kernels.spec import native
from lora_kernels.spec.segments import BLOCK_ROWS, SegmentTable
from lora_kernels.testing.segmented import SegmentedCase, check_segmented, naive

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# The others are test_segmented_linear.py's.
ADAPTERS = [op for op in ops.SEGMENTED_OPERATORS if "linear" not in op]
# Of long lists of batches: the forward, dX, and the gradients of the adapters.
THREE = ("segmented_lora", "segmented_lora_dx", "segmented_lora_dab")


def small(m=20, k=30, n=25):
    """One slice: x, A, B and the table."""
    inputs = replace(SIZE, m=m, k=k, widths=(n,)).draw()
    (a,), (b,) = inputs.lora_a, inputs.lora_b
    return SimpleNamespace(x=inputs.x, a=a, b=b, seg=inputs.seg)


@pytest.fixture(params=["native", "reference"])
def backend(request):
    if request.param == "native" and facts("cpu").native in ("", "baseline"):
        pytest.skip("the planner prefers no native kernels in this process")
    return request.param


@pytest.fixture
def answering(backend):
    """Calls inside are answered by this backend; its name as records have it."""
    with lk.force_plan(backend):
        yield "cpu" if backend == "native" else "reference"


def check(case, backend, operators=ADAPTERS):
    """Every operator of a batch without a base against float64, in poisoned memory."""
    for op in operators:
        if not case.dropout_p or op[-1] != "_":
            # Gradients of float16 adapters are asked for in float32, which the budget is for.
            wide = {"da_dtype": torch.float32, "db_dtype": torch.float32}
            wide = wide if op == "segmented_lora_dab" else {}
            run = overload(op)

            def call(run=run, wide=wide, **given):
                return run(**given | wide)

            check_segmented(op, call, case, backend=backend)


def overload(op):
    return getattr(torch.ops.lora_kernels, op).default


# Live ranks of every kind, room beyond them, one slot of rank 0 and one without rows; rows for two
# blocks of one slot, two panels and a remainder of columns and of the inner axis.
SIZE = SegmentedCase(133, 129, (40, 70), (5, 0, 33, 16, 1, 20), r_max=40, weight=0.0)

VARIANTS = {
    "no rows": {"m": 0},
    "one row": {"m": 1},
    "two rows": {"m": 2},
    "one slice": {"widths": (100,)},
    "three slices": {"widths": (40, 64, 129)},
    "packed": {"packed": True},
    "dropout": {"dropout_p": 0.3},
    "packed with dropout": {"packed": True, "dropout_p": 0.3, "widths": (7, 1)},
    "one element": {"m": 37, "k": 1, "widths": (1, 2)},
    "narrow": {"m": 37, "k": 15, "widths": (17, 18)},
    "deep": {"m": 37, "k": 513, "widths": (64, 65)},
    "deeper": {"m": 37, "k": 1100, "widths": (33, 34)},
    "transposed": {"m": 30, "layout": "transposed"},
    "sliced": {"m": 30, "layout": "sliced"},
    "strided": {"m": 30, "layout": "strided"},
    "float32 adapters": {"m": 20, "adapter_dtype": torch.float32},
    "float16 adapters": {"m": 20, "adapter_dtype": torch.float16},
    "float64 adapters": {"m": 20, "adapter_dtype": torch.float64},
    "a table with room": {"m": 33, "spare": 40},
    "ranks up to 256": {
        "m": 29,
        "k": 200,
        "widths": (96,),
        "ranks": (1, 2, 3, 7, 8, 16, 31, 64, 65, 100, 128, 200, 255, 256),
        "rows": (*range(14), *range(14), -1),
        "r_max": 256,
    },
    "every row its own": {
        "k": 64,
        "widths": (32,),
        "ranks": (4,) * 133,
        "rows": tuple(reversed(range(133))),
        "r_max": 4,
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_operators(variant, dtype, answering):
    check(replace(SIZE, dtype=dtype, **VARIANTS[variant]), answering)


def zipf(m, slots):
    weights = torch.arange(1, slots + 1).double() ** -1.5
    return torch.multinomial(weights, m, replacement=True).tolist()


# punica's populations, and the serving engines' batches.
POPULATIONS = {
    "identical": lambda m: [0] * m,
    "distinct": lambda m: list(range(m)),
    "uniform": lambda m: [i % max(1, int(m**0.5 + 0.999)) for i in range(m)],
    "zipf": lambda m: zipf(m, m),
    "skewed": lambda m: [0] * (m - m // 8) + [1 + i for i in range(m // 8)],
    "nobody": lambda m: [-1] * m,
    "every second": lambda m: [i % 3 if i % 2 else -1 for i in range(m)],
    "the last slot alone": lambda m: [m - 1] * m,
}


@pytest.mark.parametrize("population", POPULATIONS)
@pytest.mark.parametrize("m", [1, 2, 7, 32, 64, 133])
def test_populations(population, m, answering):
    slots = tuple(POPULATIONS[population](m))
    ranks = tuple((8, 16, 32, 0, 5)[i % 5] for i in range(max(m, max(slots) + 1, 3)))
    case = replace(SIZE, m=m, k=96, widths=(48, 16), ranks=ranks, r_max=32, rows=slots)
    check(replace(case, dtype=torch.bfloat16), answering, THREE)


# vLLM's tests/lora/test_punica_ops.py: (sequences, adapters, rank, hidden size, slices), its
# prompts of 128 tokens shortened to 16, and hidden sizes of its long list that suit no tile;
# SGLang's test_chunked_sgmv_backend.py: ranks 8, 16, 32 and 0 together, slices of grouped-query
# attention.
VLLM = [
    *[(batch, adapters, 32, 2049, 1) for batch in (1, 4, 16, 32) for adapters in (1, 8, 32, 128)],
    *[(4, 8, rank, 2049, slices) for rank in (8, 16, 64, 128, 256) for slices in (1, 2, 3)],
    *[(4, 4, 32, hidden, 3) for hidden in (128, 896, 1216, 2752, 3424, 5504, 6848)],
]


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 16], ids=["decode", "prefill"])
@pytest.mark.parametrize(("batch", "adapters", "rank", "hidden", "slices"), VLLM)
def test_vllms_list(batch, adapters, rank, hidden, slices, tokens):
    sequences = torch.randint(-1, adapters, (batch,)).tolist()
    slots = [slot for slot in sequences for _ in range(tokens)]
    case = SegmentedCase(
        len(slots),
        hidden,
        (hidden // slices,) * slices,
        (rank,) * adapters,
        torch.bfloat16,
        rows=tuple(slots),
        weight=0.0,
    )
    with lk.force_plan("native" if facts("cpu").native else "reference"):
        check(case, "cpu" if facts("cpu").native else "reference", THREE)


@pytest.mark.parametrize("kind", ["uniform", "mixed", "skewed", "none"])
@pytest.mark.parametrize("lengths", [[1] * 16, [3, 17, 1, 64, 0, 40]], ids=["decode", "prefill"])
def test_sglangs_list(kind, lengths):
    ranks = (8, 16, 32, 0)
    slots = {
        "uniform": [1] * len(lengths),
        "mixed": [i % 4 for i in range(len(lengths))],
        "skewed": [2] + [0] * (len(lengths) - 1),
        "none": [3] * len(lengths),
    }[kind]
    seg = SegmentTable.from_lengths(slots, lengths, ranks, [1.0] * 4)
    rows = seg.slot_of_row.tolist()
    assert len(rows) == sum(lengths)
    for dtype in (torch.float16, torch.bfloat16):
        case = SegmentedCase(
            len(rows),
            1024,
            (1024, 256, 256),
            ranks,
            dtype,
            packed=True,
            rows=tuple(rows),
            weight=0.0,
        )
        with lk.force_plan("native" if facts("cpu").native else "reference"):
            check(case, "cpu" if facts("cpu").native else "reference", THREE)


def test_rows_that_are_one(answering):
    inputs = replace(SIZE, m=30).draw()
    given = inputs.arguments("segmented_lora") | {"x": inputs.x[:1].expand(30, -1)}
    delta, s = overload("segmented_lora")(**given)
    whole, tail = overload("segmented_lora")(**given | {"x": given["x"].contiguous()})
    assert torch.equal(delta, whole) and torch.equal(s, tail)


def test_in_place_into_strided_columns_of_a_wider_output(answering):
    inputs = replace(SIZE, m=30).draw()
    wide = torch.full((30, 200), NAN)
    y = wide[:, 10:120]
    y.copy_(inputs.y)
    overload("segmented_lora_")(**inputs.arguments("segmented_lora_") | {"y": y})
    (expected,) = naive(inputs, "segmented_lora_", torch.float64)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert wide[:, :10].isnan().all() and wide[:, 120:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_are_the_whole(dtype, answering):
    inputs = replace(SIZE, m=40, dtype=dtype).draw()
    x, a, b, seg = inputs.x, inputs.lora_a, inputs.lora_b, inputs.seg
    s = segmented_shrink(x, a, seg)
    delta, whole = ops.segmented_lora(x, a, b, seg.tensors())
    assert torch.equal(s, whole)
    assert torch.equal(segmented_expand(s, b, seg), delta)
    assert torch.equal(overload("segmented_expand")(s, b, seg.tensors()), delta)
    y, twin = inputs.y.clone(), inputs.y.clone()
    assert segmented_expand(s, b, seg, out=y) is y
    assert segmented_lora(x, a, b, seg, out=twin) is twin
    assert torch.equal(y, twin)


def taken(inputs, rows):
    """The table of some of the rows, masks included."""
    seg = inputs.seg
    return SegmentTable.from_rows(
        seg.slot_of_row[rows],
        seg.rank_of_slot,
        seg.scale_of_slot,
        logical_row=seg.logical_row[rows],
        max_rank=seg.max_rank,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_no_other_row(dtype, backend):
    if backend == "reference":
        pytest.skip("the library's products depend on their number of rows")
    inputs = replace(SIZE, m=300, k=700, widths=(96,), dtype=dtype).draw()
    x, stacks = inputs.x, (inputs.lora_a, inputs.lora_b)
    threads = torch.get_num_threads()
    y, s = ops.segmented_lora(x, *stacks, inputs.seg.tensors())
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again, _ = ops.segmented_lora(x, *stacks, inputs.seg.tensors())
            assert torch.equal(again, y)
    finally:
        torch.set_num_threads(threads)
    for rows in ([5], [299], [0, 299, 17], list(range(100, 150)), list(range(299, -1, -1))):
        part, part_s = ops.segmented_lora(x[rows], *stacks, taken(inputs, rows).tensors())
        assert torch.equal(part, y[rows]) and torch.equal(part_s, s[rows])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_autograd(packed, dropout_p, answering):
    case = replace(SIZE, m=33, packed=packed, dropout_p=dropout_p)
    inputs = case.draw()
    a, b, options = inputs.lora_a, inputs.lora_b, {"rng": inputs.rng, "dropout_p": dropout_p}
    if packed:
        b, options["output_slices"] = [torch.cat(b, dim=1)], case.widths
    leaves = [t.requires_grad_() for t in (inputs.x, *a, *b)]
    x = inputs.x.view(3, 11, case.k)
    y = segmented_lora(x, a, b, inputs.seg, training=True, **options)
    assert y.shape == (3, 11, sum(case.widths))
    dx, *stacks = torch.autograd.grad(y, leaves, inputs.dy.view(y.shape))
    inputs = case.draw()
    close = {"rtol": 1e-4, "atol": 1e-4}
    expected, _ = naive(inputs, "segmented_lora", torch.float64)
    torch.testing.assert_close(y.flatten(0, 1).double(), expected, **close)
    expected, _ = naive(inputs, "segmented_lora_dx", torch.float64)
    torch.testing.assert_close(dx.double(), expected, **close)
    found = naive(inputs, "segmented_lora_dab", torch.float64)
    found = [found[0], torch.cat(found[1:], dim=1)] if packed else found
    for gradient, expected in zip(stacks, found, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-3)
        assert not gradient[expected == 0].any(), "a gradient of what no row used"


def test_only_the_gradients_that_are_asked_for():
    inputs = replace(SIZE, m=20, widths=(25,)).draw()
    for needed in itertools.product([False, True], repeat=3):
        tensors = [inputs.x, inputs.lora_a[0], inputs.lora_b[0]]
        for tensor, need in zip(tensors, needed, strict=True):
            tensor.grad = None
            tensor.requires_grad_(need)
        with lk.record_plans() as answers:
            y = segmented_lora(*tensors, inputs.seg)
            if any(needed):
                y.backward(inputs.dy)
        asked = [a.op for a in answers]
        assert ("segmented_lora_dx" in asked) == (needed[0] or needed[1])
        assert ("segmented_lora_dab" in asked) == (needed[1] or needed[2])
        for tensor, need in zip(tensors, needed, strict=True):
            assert (tensor.grad is not None) == need


def test_training_alone_or_mixed_is_equal_bit_for_bit():
    inputs = replace(SIZE, m=60, widths=(40,), dropout_p=0.3).draw()
    options = {"rng": inputs.rng, "dropout_p": 0.3, "training": True}

    def gradients(rows):
        leaves = [t[0].clone().requires_grad_() for t in (inputs.lora_a, inputs.lora_b)]
        y = segmented_lora(inputs.x[rows], *leaves, taken(inputs, rows), **options)
        return torch.autograd.grad(y, leaves, inputs.dy[rows])

    slots = inputs.seg.slot_of_row.tolist()
    mixed = gradients(list(range(60)))
    for slot in {0, 2, 3, 4} & set(slots):
        alone = gradients([i for i, other in enumerate(slots) if other == slot])
        for one, all_ in zip(alone, mixed, strict=True):
            assert one[slot].any() and torch.equal(one[slot], all_[slot])


def test_a_table_refilled_before_the_backward_is_an_error():
    case = small()
    y = segmented_lora(case.x, case.a.requires_grad_(), case.b, case.seg)
    case.seg.update_([0] * 20)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("how", ["native", "torch"])
def test_the_table(how, seed, monkeypatch):
    if how == "torch":
        monkeypatch.setattr(native, "load", lambda: None)
    generator = torch.Generator().manual_seed(seed)
    for m, slots in itertools.product((0, 1, 31, 32, 33, 500), (1, 3, 40)):
        ranks = torch.randint(0, 5, (slots,), generator=generator)
        rows = torch.randint(-1, slots, (m,), generator=generator)
        seg = SegmentTable.from_rows(rows, ranks, [1.0] * slots)
        live = [i for i in range(m) if rows[i] >= 0 and ranks[rows[i]] > 0]
        order = seg.order.tolist()
        assert sorted(order) == list(range(m))
        assert order[: len(live)] == sorted(live, key=lambda i: (rows[i], i))
        for slot in range(slots):
            start, end = seg.start_of_slot[slot : slot + 2].tolist()
            expected = [i for i in live if rows[i] == slot]
            assert order[start:end] == expected
        covered = []
        for slot, start in zip(seg.block_slot.tolist(), seg.block_start.tolist(), strict=True):
            if slot >= 0:
                end = min(start + BLOCK_ROWS, int(seg.start_of_slot[slot + 1]))
                assert start < end and all(rows[i] == slot for i in order[start:end])
                covered += order[start:end]
        assert covered == order[: len(live)]


def test_a_table_is_refilled_in_place():
    seg = SegmentTable.from_rows([0, 1, 1], [4, 8], [1.0, 2.0], max_rank=8)
    addresses = [t.data_ptr() for t in seg.tensors()]
    seg.update_([1], [8, 0], [3.0, 4.0], logical_row=[77])
    assert addresses == [t.data_ptr() for t in seg.tensors()]
    assert seg.slot_of_row.tolist() == [1, -1, -1] and seg.count == 1
    assert seg.start_of_slot.tolist() == [0, 0, 0], "rank 0 is no adapter"
    assert seg.logical_row.tolist()[0] == 77
    seg.update_(torch.tensor([5, -7, 0]), validate=False)
    assert seg.slot_of_row.tolist() == [-1, -1, 0], "out of range counts as none"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: SegmentTable.from_rows([2], [1, 1], [1.0, 1.0]), "slot 2 is out of range"),
        (lambda: SegmentTable.from_rows([-2], [1], [1.0]), "slot -2 is out of range"),
        (lambda: SegmentTable.from_rows([0], [9], [1.0], max_rank=8), "rank 9 is out of"),
        (lambda: SegmentTable.from_rows([0], [-1], [1.0], max_rank=8), "rank -1 is out of"),
        (lambda: SegmentTable.from_rows([0], [1, 2], [1.0]), "scale_of_slot has 1 slots"),
        (lambda: SegmentTable.from_rows([[0]], [1], [1.0]), "one dimension"),
        (lambda: SegmentTable.from_lengths([0], [1, 2], [1], [1.0]), "one number >= 0"),
        (lambda: SegmentTable.from_lengths([0], [-1], [1], [1.0]), "one number >= 0"),
        (lambda: SegmentTable.from_rows([0], [1], [1.0]).update_([0, 0]), "has 2 rows"),
        (lambda: SegmentTable(4, 0, 1, "cpu"), "slots >= 1"),
    ],
)
def test_wrong_tables(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_wrong_types_of_a_table():
    with pytest.raises(TypeError, match="slot_of_row must hold integers"):
        SegmentTable.from_rows([0.5], [1], [1.0])
    seg = SegmentTable.from_rows([0, 0], [1], [1.0])
    before = [t.clone() for t in seg.tensors()]
    with pytest.raises(ValueError):
        seg.update_([0, 1])
    assert all(torch.equal(*pair) for pair in zip(before, seg.tensors(), strict=True))


WRONG = {
    "x [..., K]": (lambda c: {"x": c.x[:, :-1]}, "lora_a must be"),
    "rows": (lambda c: {"x": c.x[:-1]}, "the table was filled for 20 rows"),
    "slots": (lambda c: {"lora_a": c.a[:-1]}, r"lora_a must be \[S, r_max, K\]"),
    "slots of b": (lambda c: {"lora_b": c.b[:-1]}, r"lora_b must be \[S, N, r_max\]"),
    "r_max": (lambda c: {"lora_b": c.b[..., :-1]}, "lora_b must be"),
    "rank": (lambda c: {"lora_a": c.a[:, :3], "lora_b": c.b[..., :3]}, "ranks up to 3"),
    "slices": (lambda c: {"lora_a": [c.a] * 2}, "lora_a has 2 slices and lora_b 1"),
    "widths": (lambda c: {"output_slices": [1, 2]}, "output_slices"),
    "out": (lambda c: {"out": torch.zeros(20, 3)}, "out must be"),
    "out's dtype": (lambda c: {"out": torch.zeros(20, 25).half()}, "out is torch.float16"),
    "p": (lambda c: {"dropout_p": 1.0}, "dropout_p"),
    "device": (lambda c: {"lora_a": c.a.to("meta")}, "lora_a is on meta"),
    "gradient": (
        lambda c: {"x": c.x.clone().requires_grad_(), "out": torch.zeros(20, 25)},
        "out= records no gradient",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls_write_nothing(wrong):
    case = small()
    changes, says = WRONG[wrong]
    arguments = {"x": case.x, "lora_a": case.a, "lora_b": case.b, "seg": case.seg}
    arguments |= changes(case)
    out = arguments.get("out")
    with pytest.raises(ValueError, match=says):
        segmented_lora(**arguments)
    assert out is None or not out.any()


def test_wrong_types():
    case = small()
    with pytest.raises(TypeError, match="lora_b must be a floating tensor"):
        segmented_lora(case.x, case.a, case.b.int(), case.seg)
    with pytest.raises(TypeError, match="seg must be a SegmentTable"):
        segmented_lora(case.x, case.a, case.b, None)


@pytest.mark.parametrize("op", ["segmented_expand", *ADAPTERS])
def test_opcheck(op):
    inputs = SegmentedCase(9, 30, (25, 8), (4, 0, 3)).draw()
    given = inputs.arguments(op)
    if "s" in given:
        # opcheck compares what NaN would differ from.
        given["s"] = given["s"].nan_to_num()
    torch.library.opcheck(overload(op), (), given)


@pytest.mark.slow
def test_compiled():
    inputs = SegmentedCase(9, 30, (25, 8), (4, 0, 3)).draw()
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(x, a, b, y):
        out = segmented_lora(x, a, b, inputs.seg)
        with torch.no_grad():
            segmented_lora(x, a, b, inputs.seg, out=y)
            half = segmented_expand(segmented_shrink(x, a, inputs.seg), b, inputs.seg)
        return out, half

    given = inputs.x, inputs.lora_a, inputs.lora_b
    y, expected = inputs.y.clone(), inputs.y.clone()
    out, half = step(*given, y)
    with torch.no_grad():
        segmented_lora(*given, inputs.seg, out=expected)
    assert torch.equal(y, expected)
    assert torch.equal(out, segmented_lora(*given, inputs.seg)) and torch.equal(half, out)


def test_out_that_shares_memory():
    """Sums over elements that are one, and an input that changes while it is read, are refused."""
    case = small(6, 8, 8)
    buffer = torch.randn(6, 32)
    rows = torch.arange(6 * 8.0)
    for out, x, says in (
        (torch.zeros(8).expand(6, 8), case.x, "elements that share memory"),
        (torch.zeros(6, 1).expand(6, 8), case.x, "elements that share memory"),
        (rows.as_strided((6, 8), (4, 1)), case.x, "elements that share memory"),
        (buffer[:, :8], buffer[:, :8], "shares memory with the input"),
        (buffer[:, :8], buffer[:, 7:15], "shares memory with the input"),
        (buffer.view(-1)[:48].view(6, 8), buffer.view(-1)[40:88].view(6, 8), "with the input"),
    ):
        before = out.clone()
        with pytest.raises(ValueError, match=says):
            segmented_lora(x, case.a, case.b, case.seg, out=out)
        assert torch.equal(out, before)
    # Neighbours in one buffer are not one.
    for out, x in ((buffer[:, :8], buffer[:, 8:16]), (buffer[:, 24:], buffer[:, :8])):
        expected = out + segmented_lora(x, case.a, case.b, case.seg)
        found = segmented_lora(x, case.a, case.b, case.seg, out=out)
        assert torch.allclose(found, expected, atol=1e-4)
    s = segmented_shrink(case.x, case.a, case.seg)
    with pytest.raises(ValueError, match="elements that share memory"):
        segmented_expand(s, case.b, case.seg, out=torch.zeros(8).expand(6, 8))
