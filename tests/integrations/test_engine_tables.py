"""Tables from the serving engines' metadata: against a loop over rows, by either scheduler."""

import pytest
import torch

from lora_kernels.spec import native
from lora_kernels.spec.segments import SegmentTable

NAN = float("nan")


@pytest.fixture(params=["native", "torch"], autouse=True)
def scheduler(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "load", lambda: None)


def check(seg, slot_of_row):
    """The rows have these slots (beyond them none), and the schedule follows from them."""
    expected = [s if 0 <= s < seg.slots else -1 for s in slot_of_row]
    expected += [-1] * (seg.rows - len(expected))
    assert seg.slot_of_row.tolist() == expected
    ranks = seg.rank_of_slot.tolist()
    live = [i for i, s in enumerate(expected) if s >= 0 and ranks[s] > 0]
    order = seg.order.tolist()
    assert order[: len(live)] == sorted(live, key=lambda i: (expected[i], i))
    assert int(seg.start_of_slot[-1]) == len(live)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("capacity", [None, 50])
def test_from_token_mapping(capacity, dtype):
    slots = [2, -1, 0, 0, -1, 3, 1, -7, 4, 3]
    mapping = torch.tensor(slots, dtype=dtype)
    ranks, scales = [8, 0, 16, 3], [1.0, NAN, 0.5, 2.0]
    seg = SegmentTable.from_token_mapping(
        mapping, 4, 16, rank_of_slot=ranks, scale_of_slot=scales, capacity=capacity
    )
    assert seg.rows == (capacity or 10)
    check(seg, slots)
    assert seg.rank_of_slot.tolist() == ranks
    assert seg.scale_of_slot[[0, 2, 3]].tolist() == [1.0, 0.5, 2.0]
    addresses = [t.data_ptr() for t in seg.tensors()]
    check(seg.update_(mapping.flip(0)[:6], validate=False), slots[::-1][:6])
    assert addresses == [t.data_ptr() for t in seg.tensors()]
    whole = SegmentTable.from_token_mapping(mapping, 4, 16)
    assert whole.rank_of_slot.tolist() == [16] * 4 and whole.scale_of_slot.tolist() == [1.0] * 4


RANKS, SCALES = torch.tensor([8, 0, 16, 3]), torch.tensor([1.0, NAN, 0.5, 2.0])
SEGMENTS = {
    "prefill": ([3, 0, 17, 1, 40, 2], [2, 1, 0, 3, -1, 0]),
    "decode": ([1] * 9, [3, 3, 0, 1, 2, -1, 0, 2, 3]),
    "one": ([7], [3]),
    "the last slot": ([4, 4], [3, 3]),
    "out of range": ([2, 2, 2], [4, 99, 0]),
    "empty runs": ([0, 0, 5, 0], [0, 2, 3, 1]),
    "nothing": ([0, 0], [0, 1]),
    "no runs": ([], []),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("padding", ["none", "repeated", "zeros"])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", SEGMENTS)
def test_from_segments(name, permuted, padding, dtype):
    lengths, indices = SEGMENTS[name]
    total, rows = sum(lengths), sum(lengths) + 3
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    if padding != "none" and lengths:
        starts += [total if padding == "repeated" else 0] * 4
        indices = [*indices, 2, 2, 2, 2]  # a slot of other requests, left from the batch before
    slots = [s for s, n in zip(indices, lengths, strict=False) for _ in range(n)] + [-1] * 3
    permutation = None
    if permuted:
        row_of_place = torch.randperm(total)
        by_place, slots = slots, [-1] * rows
        for place, row in enumerate(row_of_place.tolist()):
            slots[row] = by_place[place]
        # Padded as SGLang's graphs pad it: with a row of a request.
        permutation = torch.cat([row_of_place, torch.zeros(9, dtype=torch.long)]).to(dtype)
    arguments = (
        torch.tensor(starts, dtype=dtype),
        torch.tensor(indices, dtype=dtype),
        RANKS,
        SCALES,
        permutation,
    )
    seg = SegmentTable.from_segments(*arguments, rows=rows, max_rank=16, capacity=rows + 20)
    check(seg, slots)
    assert seg.count == rows and seg.rank_of_slot.tolist() == RANKS.tolist()
    addresses = [t.data_ptr() for t in seg.tensors()]
    first = (torch.tensor([0, 2], dtype=dtype), torch.tensor([3], dtype=dtype))
    check(seg.update_segments_(*first, rows=min(5, rows)), [3, 3][: min(5, rows)])
    check(seg.update_segments_(*arguments, rows=rows), slots)
    assert addresses == [t.data_ptr() for t in seg.tensors()]


def test_ranks_are_clamped_and_scales_kept():
    starts, indices = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
    seg = SegmentTable.from_segments(
        starts, indices, torch.tensor([99, -3]), torch.tensor([2.0, 3.0]), rows=2, max_rank=16
    )
    assert seg.rank_of_slot.tolist() == [16, 0]
    seg.update_segments_(starts, indices.flip(0), rows=2)
    assert seg.slot_of_row.tolist() == [1, 0] and seg.scale_of_slot.tolist() == [2.0, 3.0]
    assert seg.order.tolist()[:1] == [1], "a row of rank 0 has no adapter"


def test_wrong_lengths_change_nothing():
    seg = SegmentTable.from_token_mapping(torch.tensor([0, 1]), 2, 4)
    one = torch.tensor([0, 1])
    for message, call in (
        ("not 3 for 2 runs", lambda: seg.update_segments_(one, one, rows=2)),
        ("has 9 rows, the table 2", lambda: seg.update_segments_(one, one[:1], rows=9)),
        (
            "lora_ranks|rank_of_slot has 3",
            lambda: seg.update_segments_(one, one[:1], torch.ones(3).int(), rows=2),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert seg.slot_of_row.tolist() == [0, 1]


def test_nothing_reads_a_value_back():
    """On the meta device there is none to read: whoever asks for one there is refused."""
    mapping = torch.zeros(7, dtype=torch.int32, device="meta")
    seg = SegmentTable.from_token_mapping(mapping, 3, 8, capacity=9)
    seg.update_(mapping, validate=False)
    starts = torch.zeros(4, dtype=torch.int32, device="meta")
    ranks, scales = mapping[:3], torch.zeros(3, device="meta")
    seg = SegmentTable.from_segments(
        starts, mapping[:3], ranks, scales, mapping, rows=7, max_rank=8, capacity=9
    )
    seg.update_segments_(starts, mapping[:3], ranks, scales, mapping, rows=5)
    assert seg.rows == 9
