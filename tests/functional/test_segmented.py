"""Batches that mix adapters: the table, the operators on this machine, and their gradients."""

import itertools

import pytest
import torch
from mixed_batches import NAN, Mixed, check

import lora_kernels as lk
from lora_kernels.functional import ops
from lora_kernels.functional.segmented import segmented_expand, segmented_lora, segmented_shrink
from lora_kernels.planning.device import facts
from lora_kernels.spec import native
from lora_kernels.spec.segments import BLOCK_ROWS, SegmentTable

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [0, 1, 2, 33, 70, 133])
def test_segmented_lora(m, dtype, answering):
    check(Mixed(m, 70, (100,), dtype=dtype), answering)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("widths", [(65,), (40, 64, 129), (7, 1)])
def test_slices(widths, dropout_p, packed, dtype, answering):
    check(Mixed(49, 129, widths, dtype=dtype, packed=packed, dropout_p=dropout_p), answering)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(1, 1), (15, 17), (513, 64), (1100, 33)])
def test_odd_sizes(k, n, dtype, answering):
    check(Mixed(37, k, (n, n + 1), dtype=dtype), answering)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_ranks_up_to_256_in_one_call(dtype, answering):
    ranks = (1, 2, 3, 7, 8, 16, 31, 64, 65, 100, 128, 200, 255, 256)
    slots = [*range(len(ranks)), *range(len(ranks)), -1]
    case = Mixed(len(slots), 200, (96,), ranks=ranks, r_max=256, dtype=dtype, slots=slots)
    check(case, answering)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_adapters_of_another_dtype(dtype, answering):
    for rows in (torch.bfloat16, torch.float32):
        check(Mixed(20, 70, (100,), dtype=rows, adapter_dtype=dtype), answering)


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
    slots = POPULATIONS[population](m)
    ranks = tuple((8, 16, 32, 0, 5)[i % 5] for i in range(max(m, max(slots) + 1, 3)))
    case = Mixed(m, 96, (48, 16), ranks=ranks, r_max=32, dtype=torch.bfloat16, slots=slots)
    check(case, answering)


# vLLM's tests/lora/test_punica_ops.py: (sequences, adapters, rank, hidden size, slices), its
# prompts of 128 tokens shortened to 16, and hidden sizes of its long list that suit no tile;
# SGLang's test_chunked_sgmv_backend.py: ranks 8, 16, 32 and 0 together, slices of grouped-query
# attention.
VLLM = [
    *[(batch, adapters, 32, 2049, 1) for batch in (1, 4, 16, 32) for adapters in (1, 8, 32, 128)],
    *[(4, 8, rank, 2049, slices) for rank in (8, 16, 64, 128, 256) for slices in (1, 2, 3)],
    *[(4, 4, 32, hidden, 3) for hidden in (128, 896, 1216, 2752, 3424, 5504, 6848)],
]


@pytest.mark.parametrize("tokens", [1, 16], ids=["decode", "prefill"])
@pytest.mark.parametrize(("batch", "adapters", "rank", "hidden", "slices"), VLLM)
def test_vllms_list(batch, adapters, rank, hidden, slices, tokens):
    sequences = torch.randint(-1, adapters, (batch,)).tolist()
    slots = [slot for slot in sequences for _ in range(tokens)]
    widths = (hidden // slices,) * slices
    case = Mixed(
        len(slots),
        hidden,
        widths,
        ranks=(rank,) * adapters,
        r_max=rank,
        dtype=torch.bfloat16,
        slots=slots,
    )
    with lk.force_plan("native" if facts("cpu").native else "reference"):
        check(case, "cpu" if facts("cpu").native else "reference")


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
        case = Mixed(
            len(rows),
            1024,
            (1024, 256, 256),
            ranks=ranks,
            r_max=32,
            dtype=dtype,
            slots=rows,
            packed=True,
        )
        with lk.force_plan("native" if facts("cpu").native else "reference"):
            check(case, "cpu" if facts("cpu").native else "reference")


def test_distinct_rows_see_their_own_adapter(answering):
    case = Mixed(133, 64, (32,), ranks=(4,) * 133, r_max=4, slots=list(reversed(range(133))))
    check(case, answering)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded rows"])
def test_strided_rows_and_stacks(layout, answering):
    case = Mixed(30, 70, (50, 31))

    def strided(t):
        if layout == "transposed":
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 3), NAN)
        wide[..., 1 : 2 * t.shape[-1] : 2] = t
        return wide[..., 1 : 2 * t.shape[-1] : 2]

    if layout == "expanded rows":
        case.x = case.x[:1].expand(30, -1)
        case.dy = case.dy[:1].expand(30, -1)
    else:
        case.x, case.dy, case.y = map(strided, (case.x, case.dy, case.y))
        case.a, case.b = [strided(t) for t in case.a], [strided(t) for t in case.b]
    check(case, answering)


def test_in_place_into_strided_columns_of_a_wider_output(answering):
    case = Mixed(30, 70, (50, 31))
    wide = torch.full((30, 200), NAN)
    y = wide[:, 10:91]
    y.copy_(case.y)
    ops.segmented_lora_(y, case.x, *case.arguments()[:4])
    expected = case.naive(torch.float64)["sum"]
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert wide[:, :10].isnan().all() and wide[:, 91:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_halves_are_the_whole(dtype, answering):
    case = Mixed(40, 70, (50, 31), dtype=dtype)
    s = segmented_shrink(case.x, case.a, case.seg)
    delta, whole = ops.segmented_lora(case.x, *case.arguments())
    assert torch.equal(s, whole)
    assert torch.equal(segmented_expand(s, case.b, case.seg), delta)
    y, twin = case.y.clone(), case.y.clone()
    assert segmented_expand(s, case.b, case.seg, out=y) is y
    assert segmented_lora(case.x, case.a, case.b, case.seg, out=twin) is twin
    assert torch.equal(y, twin)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_on_no_other_row(dtype, backend):
    if backend == "reference":
        pytest.skip("the library's products depend on their number of rows")
    case = Mixed(300, 700, (96,), dtype=dtype)
    threads = torch.get_num_threads()
    y, s = ops.segmented_lora(case.x, *case.arguments())
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again, _ = ops.segmented_lora(case.x, *case.arguments())
            assert torch.equal(again, y)
    finally:
        torch.set_num_threads(threads)
    for rows in ([5], [299], [0, 299, 17], list(range(100, 150)), list(range(299, -1, -1))):
        seg = SegmentTable.from_rows(
            [case.slots[i] for i in rows], case.ranks, case.scales, max_rank=case.r_max
        )
        part, part_s = ops.segmented_lora(case.x[rows], case.a, case.b, seg.tensors())
        assert torch.equal(part, y[rows]) and torch.equal(part_s, s[rows])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_autograd(packed, dropout_p, answering):
    case = Mixed(33, 70, (40, 65), packed=packed, dropout_p=dropout_p)
    exact = case.naive(torch.float64)
    exact |= case.gradients_of_given(exact["s"], exact["d"], torch.float64)
    leaves = [t.requires_grad_() for t in (case.x, *case.a, *case.b)]
    b = case.b
    options = {"rng": case.rng, "dropout_p": dropout_p, "training": True}
    if packed:
        joined = torch.cat([t.detach() for t in case.b], dim=1).requires_grad_()
        b, leaves = joined, [*leaves[: 1 + len(case.a)], joined]
        options["output_slices"] = case.widths
    y = segmented_lora(case.x.view(3, 11, 70), case.a, b, case.seg, **options)
    assert y.shape == (3, 11, 105)
    torch.testing.assert_close(y.flatten(0, 1).double(), exact["delta"], rtol=1e-4, atol=1e-4)
    dx, *rest = torch.autograd.grad(y, leaves, case.dy.view(3, 11, 105))
    torch.testing.assert_close(dx.double(), exact["dx"], rtol=1e-4, atol=1e-4)
    da, db = rest[: len(case.a)], rest[len(case.a) :]
    db = db[0].split(case.widths, dim=1) if packed else db
    found, rest_is_zero = case.slices_of(da, db)
    assert rest_is_zero
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), exact[name], rtol=1e-4, atol=1e-4)


def test_only_the_gradients_that_are_asked_for():
    case = Mixed(20, 30, (25,))
    for needed in itertools.product([False, True], repeat=3):
        tensors = [case.x, case.a[0], case.b[0]]
        for tensor, need in zip(tensors, needed, strict=True):
            tensor.grad = None
            tensor.requires_grad_(need)
        with lk.record_plans() as answers:
            y = segmented_lora(*tensors, case.seg)
            if any(needed):
                y.backward(case.dy)
        asked = [a.op for a in answers]
        assert ("segmented_lora_dx" in asked) == (needed[0] or needed[1])
        assert ("segmented_lora_dab" in asked) == (needed[1] or needed[2])
        for tensor, need in zip(tensors, needed, strict=True):
            assert (tensor.grad is not None) == need


def test_training_alone_or_mixed_is_equal_bit_for_bit():
    case = Mixed(60, 70, (40,), dropout_p=0.3)
    options = {"rng": case.rng, "dropout_p": 0.3, "training": True}

    def gradients(rows):
        seg = SegmentTable.from_rows(
            [case.slots[i] for i in rows],
            case.ranks,
            case.scales,
            logical_row=case.logical[rows],
            max_rank=case.r_max,
        )
        leaves = [case.a[0].clone().requires_grad_(), case.b[0].clone().requires_grad_()]
        y = segmented_lora(case.x[rows], *leaves, seg, **options)
        return torch.autograd.grad(y, leaves, case.dy[rows])

    mixed = gradients(list(range(60)))
    for slot in {0, 2, 4, 5}:
        alone = gradients([i for i, other in enumerate(case.slots) if other == slot])
        for one, all_ in zip(alone, mixed, strict=True):
            assert one[slot].any() and torch.equal(one[slot], all_[slot])


def test_a_table_refilled_before_the_backward_is_an_error():
    case = Mixed(20, 30, (25,))
    y = segmented_lora(case.x, case.a[0].requires_grad_(), case.b[0], case.seg)
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
    "slots": (lambda c: {"lora_a": c.a[0][:-1]}, r"lora_a must be \[S, r_max, K\]"),
    "slots of b": (lambda c: {"lora_b": c.b[0][:-1]}, r"lora_b must be \[S, N, r_max\]"),
    "r_max": (lambda c: {"lora_b": c.b[0][..., :-1]}, "lora_b must be"),
    "rank": (lambda c: {"lora_a": c.a[0][:, :3], "lora_b": c.b[0][..., :3]}, "ranks up to 3"),
    "slices": (lambda c: {"lora_a": [c.a[0]] * 2}, "lora_a has 2 slices and lora_b 1"),
    "widths": (lambda c: {"output_slices": [1, 2]}, "output_slices"),
    "out": (lambda c: {"out": torch.zeros(20, 3)}, "out must be"),
    "out's dtype": (lambda c: {"out": torch.zeros(20, 25).half()}, "out is torch.float16"),
    "p": (lambda c: {"dropout_p": 1.0}, "dropout_p"),
    "device": (lambda c: {"lora_a": c.a[0].to("meta")}, "lora_a is on meta"),
    "gradient": (
        lambda c: {"x": c.x.clone().requires_grad_(), "out": torch.zeros(20, 25)},
        "out= records no gradient",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_calls_write_nothing(wrong):
    case = Mixed(20, 30, (25,))
    changes, says = WRONG[wrong]
    arguments = {"x": case.x, "lora_a": case.a[0], "lora_b": case.b[0], "seg": case.seg}
    arguments |= changes(case)
    out = arguments.get("out")
    with pytest.raises(ValueError, match=says):
        segmented_lora(**arguments)
    assert out is None or not out.any()


def test_wrong_types():
    case = Mixed(20, 30, (25,))
    with pytest.raises(TypeError, match="lora_b must be a floating tensor"):
        segmented_lora(case.x, case.a[0], case.b[0].int(), case.seg)
    with pytest.raises(TypeError, match="seg must be a SegmentTable"):
        segmented_lora(case.x, case.a[0], case.b[0], None)


# The others are test_segmented_linear.py's.
ALONE = ["segmented_expand", *(op for op in ops.SEGMENTED_OPERATORS if "linear" not in op)]


@pytest.mark.parametrize("op", ALONE)
def test_opcheck(op):
    case = Mixed(9, 30, (25, 8))
    table, widths = case.seg.tensors(), list(case.widths)
    s, d = torch.randn(9, 2, 40), torch.randn(9, 2, 40)
    arguments = {
        "segmented_shrink": (case.x, case.a, table),
        "segmented_expand": (s, case.b, table),
        "segmented_expand_": (case.y, s, case.b, table),
        "segmented_lora": (case.x, case.a, case.b, table),
        "segmented_lora_": (case.y, case.x, case.a, case.b, table),
        "segmented_lora_dx": (case.dy, case.a, case.b, table),
        "segmented_lora_dab": (case.dy, case.x, s, d, table, widths, 40, 0, None, 0.0)
        + (torch.float32, torch.float32),
    }[op]
    torch.library.opcheck(getattr(torch.ops.lora_kernels, op).default, arguments)


def test_compiled():
    case = Mixed(9, 30, (25, 8))
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(x, a, b, y):
        out = segmented_lora(x, a, b, case.seg)
        with torch.no_grad():
            segmented_lora(x, a, b, case.seg, out=y)
        return out

    y, expected = case.y.clone(), case.y.clone()
    out = step(case.x, case.a, case.b, y)
    with torch.no_grad():
        segmented_lora(case.x, case.a, case.b, case.seg, out=expected)
    assert torch.equal(y, expected)
    assert torch.equal(out, segmented_lora(case.x, case.a, case.b, case.seg))


def test_out_that_shares_memory():
    """Sums over elements that are one, and an input that changes while it is read, are refused."""
    case = Mixed(6, 8, (8,))
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
