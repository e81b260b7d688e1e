"""The operands of a call of a PEFT layer: its base, its adapters, and several of these as one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.four_bit import QuantState
from ..spec.segments import SegmentTable


class Base(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    transposed: bool
    # The compute dtype.
    dtype: torch.dtype
    # What the bytes of a four-bit weight mean.
    quant: QuantState | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        n, k = self.weight.shape if self.quant is None else self.quant.shape
        return (k, n) if self.transposed else (n, k)


class Adapter(NamedTuple):
    name: str
    a: Tensor
    b: Tensor
    bias: Tensor | None
    scaling: float | Tensor
    # 0.0 in evaluation mode.
    dropout_p: float
    # of DoRA
    magnitude: Tensor | None = None
    # aLoRA: only for the last tokens of a sequence, as many as ``alora_offsets`` says.
    from_invocation: bool = False


def concatenated(adapters: list[Adapter]) -> Adapter:
    """Adapters without dropout (or one with it) as one, whose rank is the sum of theirs."""
    if len(adapters) == 1:
        return adapters[0]
    scaled = [t.b.to(torch.promote_types(t.b.dtype, torch.float32)) * t.scaling for t in adapters]
    bias = None
    for t in adapters:
        if t.bias is not None:
            bias = add(bias, t.bias * t.scaling)
    a, b = torch.cat([t.a for t in adapters]), torch.cat(scaled, dim=1)
    return Adapter("", a, b, bias, 1.0, 0.0)


def add(bias: Tensor | None, other: Tensor) -> Tensor:
    return other if bias is None else bias + other


@functools.lru_cache(maxsize=64)
def table_of(
    slots: tuple[int, ...],
    lengths: tuple[int, ...],
    ranks: tuple[int, ...],
    scales: tuple[float, ...],
    device: torch.device,
) -> SegmentTable:
    """The table of a batch that has ``lengths[i]`` rows of slot ``slots[i]``, one after the other:
    one for all layers with the same ranks and scales."""
    # One made in inference mode could not be saved for a backward later. The numbers become tensors
    # on a CPU first, whatever the default device is.
    with torch.inference_mode(False), torch.device("cpu"):
        return SegmentTable.from_lengths(slots, lengths, ranks, scales, device=device)


def runs_of(
    slots: Sequence[int], tokens: int, last: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The slots and lengths of :func:`table_of` for sequences of ``tokens`` rows, whose ``last`` so
    many use their slot.

    >>> runs_of([0, -1, 1], tokens=5, last=[2, 5, 9])
    ((-1, 0, -1, 1), (3, 2, 5, 5))
    """
    runs: list[tuple[int, int]] = []
    for slot, count in zip(slots, last, strict=True):
        count = min(count, tokens)
        runs += [(-1, tokens - count)] * (count < tokens) + [(slot, count)] * (count > 0)
    return tuple([slot for slot, _ in runs]), tuple([length for _, length in runs])


def biases(adapters: list[Adapter]) -> Tensor:
    """What ``lora_bias`` adds in each slot and, at the end, to rows without one: [S + 1, N]."""
    zero = next(t.b for t in adapters).new_zeros(adapters[0].b.shape[0])
    scaled = [zero if t.bias is None else t.bias * t.scaling for t in adapters]
    return torch.stack([*scaled, zero])


def stacked(adapters: list[Adapter]) -> tuple[Tensor, Tensor]:
    """A [S, r_max, K] and B [S, N, r_max], made in every call, see the module's docstring."""
    if len(adapters) == 1:
        return adapters[0].a.unsqueeze(0), adapters[0].b.unsqueeze(0)
    a, b = [t.a for t in adapters], [t.b for t in adapters]
    if any(t.dtype != a[0].dtype for t in a):
        a, b = [t.float() for t in a], [t.float() for t in b]
    rank = max(t.shape[0] for t in a)
    a = [t if t.shape[0] == rank else F.pad(t, (0, 0, 0, rank - t.shape[0])) for t in a]
    b = [t if t.shape[1] == rank else F.pad(t, (0, rank - t.shape[1])) for t in b]
    return torch.stack(a), torch.stack(b)
