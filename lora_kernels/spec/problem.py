"""One operator call as numbers and names: all that a plan may depend on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_DX = ("lora_linear_dx", "segmented_linear_dx")

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Problem(NamedTuple):
    """One call, as numbers and names: all that a plan may depend on."""

    op: str
    m: int
    n: int
    k: int
    r: int
    dtype: str
    adapter_dtype: str
    dropout: bool = False
    fan_in_fan_out: bool = False
    out_scale: bool = False
    # whether the big operands suit tensor descriptors: 16-byte bases and row strides, unit columns
    aligned: bool = True
    # of a batch that mixes adapters; 0 slots: one adapter
    slots: int = 0
    slices: int = 1

    @property
    def columns(self) -> int:
        """The width of the result of a product with the base: N, and K for dX."""
        return self.k if self.op in _DX else self.n

    @property
    def inner(self) -> int:
        """The axis that this product sums over: K, and N for dX."""
        return self.n if self.op in _DX else self.k

    def adapters(self) -> Problem:
        """Of a base linear under adapters that differ from row to row: the adapters alone, added in
        place."""
        op = "segmented_lora_dx" if self.op in _DX else "segmented_lora_"
        return self._replace(op=op, fan_in_fan_out=False)

    def bucketed(self) -> Problem:
        """The key of the tables: N and K exact, M rounded up to a power of two, r to a multiple of
        16."""
        return self._replace(m=1 << max(self.m - 1, 0).bit_length(), r=-(-self.r // 16) * 16)

    def key(self) -> str:
        format_ = "KN" if self.fan_in_fan_out else "NK"
        flags = ["dropout"] * self.dropout + ["out_scale"] * self.out_scale
        flags += ["unaligned"] * (not self.aligned)
        if self.slots:
            flags += [f"{self.slots} slots", f"{self.slices} slices"]
        sizes = f"{self.m}/{self.n}/{self.k}/{self.r}"
        formats = f"{self.dtype}/{self.adapter_dtype}/{format_}"
        return f"{self.op}/{sizes}/{formats}/{'+'.join(flags) or 'plain'}"


# One builder per operator, with the operator's own arguments.


def _linear(
    op: str,
    rows: Tensor,
    n: int,
    k: int,
    adapter: Tensor | None,
    r: int,
    dropout: bool,
    kn: bool = False,
    out_scale: bool = False,
    weight: Tensor | None = None,
) -> Problem:
    dtype = dtype_name(rows.dtype)
    adapter_dtype = dtype if adapter is None else dtype_name(adapter.dtype)
    # Asked on GPUs only, where it matters.
    aligned = not rows.is_cuda or (
        suits_descriptor(rows, transposed=False)
        and (weight is None or suits_descriptor(weight, transposed=True))
    )
    return Problem(
        op, rows.shape[0], n, k, r, dtype, adapter_dtype, dropout, kn, out_scale, aligned
    )


def suits_descriptor(t: Tensor, transposed: bool) -> bool:
    """Whether a tensor descriptor can read ``t`` [rows, cols] (or its transpose, where that is as
    good): a 16-byte base, 16-byte steps from row to row, and neighbours within a row."""
    row, col = t.stride()
    if transposed and row == 1:
        row, col = col, row
    return col == 1 and row > 0 and row * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def _lora_shrink(
    x: Tensor, lora_a: Tensor, scale: Tensor, rng: Tensor | None = None, dropout_p: float = 0.0
) -> Problem:
    r, k = lora_a.shape
    return _linear("lora_shrink", x, r, k, lora_a, r, rng is not None)


def _lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    out_scale: Tensor | None = None,
    packed: Tensor | None = None,
) -> Problem:
    n, r = lora_b.shape
    dropout, k = rng is not None, lora_a.shape[1]
    scaled = out_scale is not None
    return _linear("lora_linear_fwd", x, n, k, lora_a, r, dropout, fan_in_fan_out, scaled, weight)


def _lora_linear_dx(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    out_scale: Tensor | None = None,
    packed: Tensor | None = None,
) -> Problem:
    r, k = lora_a.shape
    dropout, n = rng is not None, dy.shape[1]
    scaled = out_scale is not None
    return _linear("lora_linear_dx", dy, n, k, lora_a, r, dropout, fan_in_fan_out, scaled, weight)


def _lora_linear_dab(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    da_dtype: torch.dtype | None = None,
    db_dtype: torch.dtype | None = None,
    dbias_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
) -> Problem:
    r = max((tail.shape[1] for tail in (s, d) if tail is not None), default=0)
    k = 0 if x is None else x.shape[1]
    dropout, scaled = rng is not None, out_scale is not None
    return _linear("lora_linear_dab", dy, dy.shape[1], k, None, r, dropout, out_scale=scaled)


def _segmented(
    op: str,
    rows: Tensor,
    n: int,
    k: int,
    table: Sequence[Tensor],
    r: int,
    slices: int,
    adapter: torch.dtype,
    rng: Tensor | None = None,
    stacks: Sequence[Tensor] = (),
) -> Problem:
    dtypes = dtype_name(rows.dtype), dtype_name(adapter)
    aligned = not rows.is_cuda or all(map(_whole_vectors, (rows, *stacks)))
    return Problem(
        op,
        rows.shape[0],
        n,
        k,
        r,
        *dtypes,
        rng is not None,
        aligned=aligned,
        slots=table[1].shape[0],
        slices=slices,
    )


def _whole_vectors(t: Tensor) -> bool:
    """Whether 16 bytes at a time can be read along the last axis of ``t``."""
    *steps, last = t.stride()
    vector = 16 // t.element_size()
    return last == 1 and not any(step % vector for step in steps) and t.data_ptr() % 16 == 0


def _segmented_shrink(
    x: Tensor,
    lora_a: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Problem:
    slices = packed_slices or len(lora_a)
    r = lora_a[0].shape[1] // max(packed_slices, 1)
    k, dtype = x.shape[1], lora_a[0].dtype
    return _segmented("segmented_shrink", x, slices * r, k, table, r, slices, dtype, rng, lora_a)


def _segmented_expand(s: Tensor, lora_b: Sequence[Tensor], table: Sequence[Tensor]) -> Problem:
    n, (slices, r) = sum(b.shape[1] for b in lora_b), s.shape[1:]
    dtype, k = lora_b[0].dtype, slices * r
    return _segmented("segmented_expand", s, n, k, table, r, slices, dtype, stacks=lora_b)


def _segmented_expand_(
    y: Tensor, s: Tensor, lora_b: Sequence[Tensor], table: Sequence[Tensor]
) -> Problem:
    # S of float16 rows is float32.
    dtype = dtype_name(y.dtype)
    return _segmented_expand(s, lora_b, table)._replace(op="segmented_expand_", dtype=dtype)


def _segmented_lora(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Problem:
    n, r, k = sum(b.shape[1] for b in lora_b), lora_b[0].shape[2], lora_a[0].shape[2]
    stacks, dtype = (*lora_a, *lora_b), lora_b[0].dtype
    return _segmented("segmented_lora", x, n, k, table, r, len(lora_b), dtype, rng, stacks)


def _segmented_lora_(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
) -> Problem:
    return _segmented_lora(x, lora_a, lora_b, table)._replace(op="segmented_lora_")


def _segmented_lora_dx(
    dy: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Problem:
    forward = _segmented_lora(dy, lora_a, lora_b, table, packed_slices, rng, dropout_p)
    return forward._replace(op="segmented_lora_dx")


def _segmented_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    bias: Tensor | None = None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    packed: Tensor | None = None,
) -> Problem:
    n, r, k = sum(b.shape[1] for b in lora_b), lora_b[0].shape[2], lora_a[0].shape[2]
    stacks, dtype = (weight, *lora_a, *lora_b), lora_b[0].dtype
    found = _segmented("segmented_linear_fwd", x, n, k, table, r, len(lora_b), dtype, rng, stacks)
    # The columns of a slice begin behind those of the one before it.
    vector = 16 // x.element_size()
    aligned = found.aligned and not (x.is_cuda and any(b.shape[1] % vector for b in lora_b))
    return found._replace(fan_in_fan_out=fan_in_fan_out, aligned=aligned)


def _segmented_linear_dx(
    dy: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    packed: Tensor | None = None,
) -> Problem:
    return _segmented_linear_fwd(
        dy, weight, lora_a, lora_b, table, packed_slices, None, rng, dropout_p, fan_in_fan_out
    )._replace(op="segmented_linear_dx")


def _segmented_lora_dab(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    table: Sequence[Tensor],
    widths: Sequence[int],
    r_max: int,
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    da_dtype: torch.dtype | None = None,
    db_dtype: torch.dtype | None = None,
) -> Problem:
    dtype = da_dtype or db_dtype or dy.dtype
    n, k, slices = dy.shape[1], 0 if x is None else x.shape[1], len(widths)
    rows = () if x is None else (x,)
    return _segmented("segmented_lora_dab", dy, n, k, table, r_max, slices, dtype, rng, rows)


PROBLEM_OF: dict[str, Callable[..., Problem]] = {
    "lora_shrink": _lora_shrink,
    "lora_linear_fwd": _lora_linear_fwd,
    "lora_linear_dx": _lora_linear_dx,
    "lora_linear_dab": _lora_linear_dab,
    "segmented_shrink": _segmented_shrink,
    "segmented_expand": _segmented_expand,
    "segmented_expand_": _segmented_expand_,
    "segmented_lora": _segmented_lora,
    "segmented_lora_": _segmented_lora_,
    "segmented_lora_dx": _segmented_lora_dx,
    "segmented_linear_fwd": _segmented_linear_fwd,
    "segmented_linear_dx": _segmented_linear_dx,
    "segmented_lora_dab": _segmented_lora_dab,
}
