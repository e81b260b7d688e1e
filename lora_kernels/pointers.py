"""``AdapterPointers``: the adapters of a mixed batch by address, each where and as large as it
is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What the kernels read at a time, and what allocators align to at least.
_VECTOR_BYTES = 16


class AdapterPointers:
    """Slots that point to adapters, instead of stacks that hold copies of them: no padding to the
    largest rank, and a hot swap is one small write. For serving: nothing is differentiated through
    an address.

    The tensors that a slot points to live as long as it points to them. Whoever replaces one while
    a kernel may still read it keeps it alive until then (a GPU's kernels run later than the call;
    its allocator does that for work on the stream that the tensor was made on).

    Attributes:
        table: int64 [S, n, 5] on the device, of fixed address; for each slot and slice the address
            of A, elements from row to row of A, the address of B, elements from row to row of B,
            and the rank: zeros for an empty slot. A rank of a :class:`SegmentTable` above it is
            cut to it, so that no kernel reads what is not there.
        widths: of the n slices.

    >>> pointers = AdapterPointers(slots=2, in_features=4, widths=[3], max_rank=2)
    >>> pointers.set_(1, torch.ones(1, 4), torch.ones(3, 1))
    >>> pointers.table[:, 0, 4].tolist()
    [0, 1]
    >>> pointers.clear_(1)
    >>> int(pointers.table.abs().sum())
    0
    """

    def __init__(
        self,
        slots: int,
        in_features: int,
        widths: Sequence[int],
        max_rank: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if slots < 1 or in_features < 1 or max_rank < 1 or not widths or min(widths) < 1:
            raise ValueError(
                f"slots, in_features, widths and max_rank must be at least 1, not {slots}, "
                f"{in_features}, {list(widths)} and {max_rank}"
            )
        if not dtype.is_floating_point:
            raise TypeError(f"adapters are of a floating dtype, not {dtype}")
        self.in_features, self.widths, self.max_rank = in_features, list(widths), max_rank
        self.dtype = dtype
        self.table = torch.zeros(slots, len(self.widths), 5, dtype=torch.int64, device=device)
        self._held: list[list[Tensor]] = [[] for _ in range(slots)]

    @property
    def slots(self) -> int:
        return self.table.shape[0]

    @property
    def device(self) -> torch.device:
        return self.table.device

    def set_(
        self, slot: int, lora_a: Tensor | Sequence[Tensor], lora_b: Tensor | Sequence[Tensor]
    ) -> None:
        """Point a slot to an adapter: A [r, K] and B [N_j, r], one of each for every slice.

        They are taken where they are; what is of another dtype or device, or whose rows do not
        begin on 16 bytes, is copied.

        Raises:
            IndexError: there is no such slot.
            ValueError: shapes that do not fit, a rank of 0 or above ``max_rank``, ranks that differ
                between slices. The slot is then as it was.
        """
        self._check_slot(slot)
        a = [lora_a] if isinstance(lora_a, Tensor) else list(lora_a)
        b = [lora_b] if isinstance(lora_b, Tensor) else list(lora_b)
        rank = a[0].shape[0] if a and a[0].dim() == 2 else 0
        shapes = [(rank, self.in_features)] * len(self.widths), [(n, rank) for n in self.widths]
        if not 1 <= rank <= self.max_rank:
            raise ValueError(f"an adapter's rank must be in [1, {self.max_rank}], not {rank}")
        if ([tuple(t.shape) for t in a], [tuple(t.shape) for t in b]) != shapes:
            raise ValueError(
                f"lora_a must be {shapes[0]} and lora_b {shapes[1]}, one for each slice, not "
                f"{[tuple(t.shape) for t in a]} and {[tuple(t.shape) for t in b]}"
            )
        held = [self._readable(t.detach()) for t in (*a, *b)]
        rows = [
            [one.data_ptr(), one.stride(0), other.data_ptr(), other.stride(0), rank]
            for one, other in zip(held[: len(a)], held[len(a) :], strict=True)
        ]
        self.table[slot].copy_(torch.tensor(rows))
        self._held[slot] = held

    def clear_(self, slot: int) -> None:
        """Empty a slot: rows that use it are rows without an adapter."""
        self._check_slot(slot)
        self.table[slot].zero_()
        self._held[slot] = []

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} is out of range: there are {self.slots}")

    def _readable(self, t: Tensor) -> Tensor:
        """``t`` itself where the kernels can read it, else a copy that they can."""
        t = t.to(self.device, self.dtype)
        vector = max(1, _VECTOR_BYTES // t.element_size())
        starts = t.data_ptr() % _VECTOR_BYTES == 0 and t.stride(0) % vector == 0
        if t.stride(1) == 1 and t.stride(0) >= t.shape[1] and starts:
            return t
        rows, cols = t.shape
        room = t.new_zeros(rows, -(-cols // vector) * vector)
        return room[:, :cols].copy_(t)
