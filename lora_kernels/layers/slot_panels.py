"""The adapters of many slots in the layout of the CPU's kernels, packed when a slot was written
instead of in every call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class SlotPanels:
    """What ``segmented_linear_of_panels`` reads in place of a layer's stacks, A [S, r_max, K] and
    B [S, N, r_max] of every slice; as large as they are.

    A slot that is not packed for the rank that a table gives it is packed in the call, so threads
    may share one: what they write for a slot in use are the values that it holds already. A copy or
    a pickle of the layer starts without.
    """

    def __init__(self) -> None:
        self._panels: list[Tensor] = []
        self._stacks: tuple[Any, ...] = (None, None)
        self._ranks: Tensor | None = None

    def drop(self) -> None:
        """Forget all of it: the stacks are others, or will not be used for a while."""
        self._panels, self._stacks, self._ranks = [], (None, None), None

    def forget(self, slots: Iterable[int]) -> None:
        """Adapters were written to these ``slots``."""
        for packed_for in self._panels[:1]:
            for slot in slots:
                packed_for[slot] = -1

    def of(self, a: Tensor, b: Tensor, ranks: Tensor) -> list[Tensor]:
        """The panels of a layer with one slice, for a batch whose slots have the ``ranks`` [S];
        packed now where a stack was written to. A write through ``Tensor.data`` leaves no trace:
        call :meth:`drop` after one."""
        stacks = a, b, a.data_ptr(), b.data_ptr(), a._version, b._version
        if self._stacks[0] is not a or self._stacks[1] is not b or self._stacks[2:] != stacks[2:]:
            if self._stacks[2:4] == stacks[2:4]:
                self.forget(range(a.shape[0]))
            else:
                self.drop()
            self._stacks, self._ranks = stacks, None
        if ranks is not self._ranks:
            self.pack([a], [b], ranks.tolist())
            self._ranks = ranks
        return self._panels

    def pack(
        self, lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], ranks: Sequence[int]
    ) -> list[Tensor]:
        """int32 ranks [S], ``pack(A^T)`` of every A [S, .] and ``pack(B^T)`` of every B, once the
        slots are packed that have another rank in ``ranks`` than before, or were forgotten."""
        with torch.inference_mode(False), torch.no_grad():
            if not self._panels:
                largest = _packed(lora_a, lora_b, 0, lora_a[0].shape[1])
                none = torch.full((len(ranks),), -1, dtype=torch.int32)
                self._panels = [none, *(p.new_empty(len(ranks), len(p)) for p in largest)]
            packed_for, *panels = held = self._panels
            for slot, (rank, before) in enumerate(zip(ranks, packed_for.tolist(), strict=True)):
                # Of rank 0 is a slot that the batch does not use.
                if rank in (0, before):
                    continue
                for panel, values in zip(panels, _packed(lora_a, lora_b, slot, rank), strict=True):
                    panel[slot, : len(values)] = values
                packed_for[slot] = rank
        return held

    def __deepcopy__(self, memo: dict[int, Any]) -> SlotPanels:
        return SlotPanels()

    def __reduce__(self) -> tuple[Any, ...]:
        return SlotPanels, ()


def _packed(
    lora_a: Sequence[Tensor], lora_b: Sequence[Tensor], slot: int, rank: int
) -> list[Tensor]:
    matrices = [a[slot, :rank] for a in lora_a] + [b[slot, :, :rank] for b in lora_b]
    return [torch.ops.lora_kernels_cpu.pack(m.t()) for m in matrices]
