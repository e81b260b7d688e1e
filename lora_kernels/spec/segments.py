"""``SegmentTable``: which adapter each row of a batch uses, and the schedule derived from it, on
the device and of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native

# Rows that one program of the block schedule takes: a tensor core's 16 would leave most of a
# prefill's tile empty, 64 most of a decode's (a guess until it is measured on a GPU).
BLOCK_ROWS = 32

Ints = Tensor | Sequence[int]
Floats = Tensor | Sequence[float]


class Table(NamedTuple):
    """The tensors of a :class:`SegmentTable`, in the order in which the operators take them."""

    slot_of_row: Tensor
    rank_of_slot: Tensor
    scale_of_slot: Tensor
    logical_row: Tensor
    order: Tensor
    start_of_slot: Tensor
    block_slot: Tensor
    block_start: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Rows, slots, blocks of the schedule."""
        return len(self.slot_of_row), len(self.rank_of_slot), len(self.block_slot)


TABLE_TENSORS = len(Table._fields)


class SegmentTable:
    """A batch that mixes adapters: row i uses the adapter in slot ``slot_of_row[i]``, or none.

    Built once per batch and read by every layer. All tensors are on one device and of fixed size,
    so that :meth:`update_` refills them in place for a captured CUDA graph, and nothing that a
    layer does with them waits for the device.

    Attributes:
        count: the rows of the last batch; what the table has beyond them is -1.
        slot_of_row: int32 [M]; -1: no adapter, the row is left as it is.
        rank_of_slot: int32 [S], the live rank of each slot, 0 to ``max_rank``; a slot of rank 0 is
            no adapter.
        scale_of_slot: float32 [S].
        logical_row: int64 [M], the row of each row's dropout mask, so that an example keeps its
            mask whichever batch it is trained in; by default 0, 1, 2, ...
        order: int32 [M], the rows grouped by slot, in their own order within each; those without an
            adapter come last.
        start_of_slot: int32 [S+1]: the rows of slot s begin at this place in ``order`` and end
            where those of s + 1 begin.
        block_slot, block_start: int32 [B], B = ceil(M / BLOCK_ROWS) + min(M, S): pieces of at most
            BLOCK_ROWS rows of one slot, as the slot and the place in ``order``; unused ones have
            slot -1.

    >>> seg = SegmentTable.from_rows([1, -1, 0, 1], rank_of_slot=[8, 4], scale_of_slot=[1.0, 0.5])
    >>> seg.order.tolist(), seg.start_of_slot.tolist()
    ([2, 0, 3, 1], [0, 1, 3])
    >>> seg.block_slot.tolist(), seg.block_start.tolist()
    ([0, 1, -1], [0, 1, 3])
    >>> seg.update_([-1, 1, 1, -1]).order.tolist()
    [1, 2, 0, 3]
    """

    def __init__(self, rows: int, slots: int, max_rank: int, device: torch.device | str) -> None:
        if rows < 0 or slots < 1 or max_rank < 1:
            raise ValueError(
                f"a table needs rows >= 0, slots >= 1 and max_rank >= 1, not {rows}, {slots} and "
                f"{max_rank}"
            )
        self.max_rank = max_rank
        self.count = 0
        blocks = -(-rows // BLOCK_ROWS) + min(rows, slots)

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.slot_of_row = ints(rows).fill_(-1)
        self.rank_of_slot = ints(slots)
        self.scale_of_slot = ints(slots, dtype=torch.float32)
        self.logical_row = torch.arange(rows, device=device)
        self.order = torch.arange(rows, dtype=torch.int32, device=device)
        self.start_of_slot = ints(slots + 1)
        self.block_slot = ints(blocks)
        self.block_start = ints(blocks)

    @classmethod
    def from_rows(
        cls,
        slot_of_row: Ints,
        rank_of_slot: Ints,
        scale_of_slot: Floats,
        *,
        logical_row: Ints | None = None,
        max_rank: int | None = None,
        device: torch.device | str | None = None,
        validate: bool = True,
    ) -> SegmentTable:
        """A table from the slot of each row.

        Args:
            slot_of_row: [M] integers, -1 to S-1; a list or a tensor of any device.
            rank_of_slot, scale_of_slot: [S].
            logical_row: see the class.
            max_rank: what ranks may reach in later updates; default: the largest of now (256 for
                tensors on another device than the CPU with ``validate=False``).
            device: of the table; default: that of ``slot_of_row``.
            validate: check the values, which waits for the device where they are on a GPU. Without
                it slots out of range count as -1 and ranks are clamped to [0, max_rank].

        Raises:
            ValueError: a slot out of [-1, S), a rank out of [0, max_rank], lengths that differ.
            TypeError: slots or ranks that are no integers.
        """
        slots = _tensor(slot_of_row, "slot_of_row", integer=True)
        ranks = _tensor(rank_of_slot, "rank_of_slot", integer=True)
        if max_rank is None:
            known = validate or ranks.device.type == "cpu"
            max_rank = max(int(ranks.max()), 1) if known and len(ranks) else 256
        table = cls(len(slots), max(len(ranks), 1), max_rank, device or slots.device)
        return table.update_(
            slots, ranks, scale_of_slot, logical_row=logical_row, validate=validate
        )

    @classmethod
    def from_lengths(
        cls,
        slot_of_sequence: Ints,
        lengths: Sequence[int],
        rank_of_slot: Ints,
        scale_of_slot: Floats,
        **options: Any,
    ) -> SegmentTable:
        """A table for sequences that lie one after the other: sequence i has ``lengths[i]`` rows,
        which all use slot ``slot_of_sequence[i]``. The options are those of :meth:`from_rows`.

        >>> SegmentTable.from_lengths([0, -1], [2, 3], [4], [1.0]).slot_of_row.tolist()
        [0, 0, -1, -1, -1]
        """
        slots = _tensor(slot_of_sequence, "slot_of_sequence", integer=True)
        counts = torch.as_tensor(lengths, device=slots.device)
        if counts.shape != slots.shape or (len(counts) and int(counts.min()) < 0):
            raise ValueError(
                f"lengths must be one number >= 0 for each of {len(slots)} sequences: {lengths}"
            )
        rows = torch.repeat_interleave(slots, counts, output_size=sum(map(int, lengths)))
        return cls.from_rows(rows, rank_of_slot, scale_of_slot, **options)

    @classmethod
    def from_token_mapping(
        cls,
        slot_of_token: Tensor,
        slots: int,
        max_rank: int,
        *,
        rank_of_slot: Ints | None = None,
        scale_of_slot: Floats | None = None,
        capacity: int | None = None,
    ) -> SegmentTable:
        """A table from a slot per token that lies on the device, without waiting for it (vLLM's
        ``token_lora_mapping``).

        Args:
            slot_of_token: integers [M]; what is out of [0, slots) is no adapter.
            rank_of_slot: [slots]; default: ``max_rank``, whose zero padding then counts as live.
            scale_of_slot: [slots]; default: 1, for a scale that B already holds.
            capacity: the rows that the table has room for; default: M.

        :meth:`update_` with ``validate=False`` refills it in place.

        >>> import torch
        >>> mapping = torch.tensor([1, -1, 0, 7], dtype=torch.int32)
        >>> seg = SegmentTable.from_token_mapping(mapping, 2, 8, capacity=6)
        >>> seg.slot_of_row.tolist(), seg.rank_of_slot.tolist()
        ([1, -1, 0, -1, -1, -1], [8, 8])
        """
        rows = len(slot_of_token) if capacity is None else capacity
        table = cls(rows, slots, max_rank, slot_of_token.device)
        table.rank_of_slot.fill_(max_rank)
        table.scale_of_slot.fill_(1.0)
        return table.update_(slot_of_token, rank_of_slot, scale_of_slot, validate=False)

    @classmethod
    def from_segments(
        cls,
        seg_indptr: Tensor,
        weight_indices: Tensor,
        lora_ranks: Tensor,
        scalings: Tensor,
        permutation: Tensor | None = None,
        *,
        rows: int,
        max_rank: int,
        capacity: int | None = None,
    ) -> SegmentTable:
        """A table from runs of rows that lie on the device, without waiting for it (SGLang's
        ``LoRABatchInfo``).

        Args:
            seg_indptr: integers [G+1] that start at 0: run g is rows ``seg_indptr[g]`` to
                ``seg_indptr[g+1]``. Padding repeats the last value, or is zero. Rows behind the
                last run have no adapter.
            weight_indices: integers [G], the slot of each run; out of [0, S) is no adapter.
            lora_ranks: integers [S], the live rank of each slot, 0 for no adapter.
            scalings: [S].
            permutation: integers, the row at each place of the runs, and padding; default: i.
            rows: M, which only the host can say without waiting.
            max_rank: what ``lora_ranks`` are clamped to.
            capacity: the rows that the table has room for; default: ``rows``.

        :meth:`update_segments_` refills it in place.

        >>> import torch
        >>> seg = SegmentTable.from_segments(
        ...     torch.tensor([0, 2, 3, 0]), torch.tensor([1, 0, 0]), torch.tensor([4, 8]),
        ...     torch.tensor([1.0, 0.5]), permutation=torch.tensor([2, 0, 1]), rows=4, max_rank=8)
        >>> seg.slot_of_row.tolist()
        [1, 0, 1, -1]
        """
        room = rows if capacity is None else capacity
        table = cls(room, len(lora_ranks), max_rank, seg_indptr.device)
        return table.update_segments_(
            seg_indptr, weight_indices, lora_ranks, scalings, permutation, rows=rows
        )

    def update_(
        self,
        slot_of_row: Ints | None = None,
        rank_of_slot: Ints | None = None,
        scale_of_slot: Floats | None = None,
        *,
        logical_row: Ints | None = None,
        validate: bool = True,
    ) -> SegmentTable:
        """Refill the table in place (what is None stays as it is) and derive the schedule anew.

        Fewer rows than the table has are allowed: the others get -1. With ``validate=False`` and
        tensors on the table's device nothing here waits for the device, so that it can be part of a
        captured graph.

        Raises:
            ValueError, TypeError: as :meth:`from_rows`; the table is then as it was.
        """
        slots = _optional(slot_of_row, "slot_of_row", integer=True)
        ranks = _optional(rank_of_slot, "rank_of_slot", integer=True)
        scales = _optional(scale_of_slot, "scale_of_slot")
        logical = _optional(logical_row, "logical_row", integer=True)
        self._check(slots, ranks, scales, logical, validate)
        if slots is not None:
            self.count = count = len(slots)
            slots = slots.to(self.slot_of_row.device)
            inside = (slots >= 0) & (slots < self.slots)
            self.slot_of_row[:count] = torch.where(inside, slots, -1)
            self.slot_of_row[count:] = -1
        if ranks is not None:
            self.rank_of_slot.copy_(ranks.clamp(0, self.max_rank))
        if scales is not None:
            self.scale_of_slot.copy_(scales)
        if logical is not None:
            self.logical_row[: len(logical)] = logical.to(self.logical_row.device)
        self._schedule()
        return self

    def update_segments_(
        self,
        seg_indptr: Tensor,
        weight_indices: Tensor,
        lora_ranks: Tensor | None = None,
        scalings: Tensor | None = None,
        permutation: Tensor | None = None,
        *,
        rows: int,
    ) -> SegmentTable:
        """:meth:`from_segments` into this table, in place; ranks and scales of None stay. Nothing
        here waits for the device, so that it can be part of a captured graph (with ``rows`` then
        fixed, and padding in ``seg_indptr`` for what varies).

        Raises:
            ValueError: more rows than the table has, or lengths that do not fit.
        """
        runs = len(weight_indices)
        if len(seg_indptr) != runs + 1:
            raise ValueError(
                f"seg_indptr has {len(seg_indptr)} values, not {runs + 1} for {runs} runs"
            )
        slots = torch.full((rows,), -1, device=self.device)
        if runs:
            # Rising throughout, so that a place can be searched in it: padding is what came before.
            starts = seg_indptr.long().cummax(0).values
            places = rows if permutation is None else min(rows, len(permutation))
            place = torch.arange(places, device=self.device)
            run = (torch.searchsorted(starts, place, right=True) - 1).clamp(0, runs - 1)
            inside = place < starts[-1]
            slot = torch.where(inside, weight_indices.long()[run], -1)
            # Padding of a permutation may repeat a row: it goes to a row that is cut off.
            row = place if permutation is None else permutation[:places].long()
            slots = torch.full((rows + 1,), -1, device=self.device)
            slots = slots.scatter_(0, torch.where(inside, row, rows), slot)[:rows]
        return self.update_(slots, lora_ranks, scalings, validate=False)

    @property
    def rows(self) -> int:
        return self.slot_of_row.shape[0]

    @property
    def slots(self) -> int:
        return self.rank_of_slot.shape[0]

    @property
    def device(self) -> torch.device:
        return self.slot_of_row.device

    def tensors(self) -> list[Tensor]:
        """The argument ``table`` of the operators: the fields of :class:`Table`."""
        return [getattr(self, name) for name in Table._fields]

    def _check(
        self,
        slots: Tensor | None,
        ranks: Tensor | None,
        scales: Tensor | None,
        logical: Tensor | None,
        validate: bool,
    ) -> None:
        for name, given, room in (
            ("slot_of_row", slots, self.rows),
            ("logical_row", logical, self.rows),
        ):
            if given is not None and len(given) > room:
                raise ValueError(f"{name} has {len(given)} rows, the table {room}")
        for name, given in (("rank_of_slot", ranks), ("scale_of_slot", scales)):
            if given is not None and len(given) != self.slots:
                raise ValueError(f"{name} has {len(given)} slots, the table {self.slots}")
        if not validate:
            return
        if slots is not None and len(slots):
            low, high = (int(v) for v in torch.aminmax(slots))
            if low < -1 or high >= self.slots:
                wrong = low if low < -1 else high
                raise ValueError(f"slot {wrong} is out of range: the table has {self.slots} slots")
        if ranks is not None and len(ranks):
            low, high = (int(v) for v in torch.aminmax(ranks))
            if low < 0 or high > self.max_rank:
                wrong = low if low < 0 else high
                raise ValueError(f"rank {wrong} is out of [0, {self.max_rank}], the table's ranks")

    def _schedule(self) -> None:
        if self.device.type == "cpu" and native.load() is not None:
            torch.ops.lora_kernels_cpu.segment_schedule_(self.tensors(), BLOCK_ROWS)
            return
        # A slot of rank 0 is no adapter: its rows cost nothing.
        slots = self.slot_of_row.long()
        live = (slots >= 0) & (self.rank_of_slot[slots.clamp(min=0)] > 0)
        key = torch.where(live, slots, self.slots)
        sorted_key, order = torch.sort(key, stable=True)
        self.order.copy_(order)
        every = torch.arange(self.slots + 1, device=self.device)
        self.start_of_slot.copy_(torch.searchsorted(sorted_key, every))
        count = self.start_of_slot.diff()
        pieces = (count + BLOCK_ROWS - 1) // BLOCK_ROWS
        last = pieces.cumsum(0)
        place = torch.arange(len(self.block_slot), device=self.device)
        slot = torch.searchsorted(last, place, right=True)
        inside = slot < self.slots
        slot = slot.clamp(max=self.slots - 1)
        first = self.start_of_slot[slot] + (place - (last - pieces)[slot]) * BLOCK_ROWS
        self.block_slot.copy_(torch.where(inside, slot, -1))
        self.block_start.copy_(torch.where(inside, first, self.start_of_slot[-1]))


def _optional(values: Any, name: str, integer: bool = False) -> Tensor | None:
    return None if values is None else _tensor(values, name, integer)


def _tensor(values: Any, name: str, integer: bool = False) -> Tensor:
    # as_tensor would move a tensor to the default device.
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values)
    if tensor.dim() != 1:
        raise ValueError(f"{name} must have one dimension, not {list(tensor.shape)}")
    if not len(tensor):
        return tensor.to(torch.int64 if integer else torch.float32)
    if integer and (tensor.is_floating_point() or tensor.dtype == torch.bool):
        raise TypeError(f"{name} must hold integers, not {tensor.dtype}")
    return tensor
