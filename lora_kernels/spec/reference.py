"""The mathematics of the package in plain torch: what every kernel is compared with, and what
answers where none exists.

    forward    S  = c (mask*x) A^T                   [M,r]
               Y  = x W^T + S B^T + bias             [M,N]
    backward   D  = c dY B                           [M,r]
               dX = dY W + mask*(D A)                [M,K]
               dA = D^T (mask*x)                     [r,K]
               dB = dY^T S                           [N,r]
               dbias = sum_rows dY                   [N]

with ``c = scale / (1 - dropout_p)``. Half-precision operands accumulate in float32; S and D are
scaled in float32 and rounded once to ``tail_dtype``, in which A and B are taken too: the operand
dtype, but float32 for float16, whose range S, D, A and B may leave where Y and dX do not. Y and dX
are rounded once. The functions carry the names and the arguments of the operators in
``functional/ops.py``, run on any device, and are differentiable where autograd is wanted as an
oracle (float64).

The segmented operators are for batches that mix adapters. Row i belongs to slot ``t =
slot_of_row[i]`` with live rank ``r = rank_of_slot[t]`` and ``c = scale_of_slot[t] / (1 -
dropout_p)``; there are one or several slices (query, key and value of one input), each with an A
and a B of its own. For each slice

    forward    S[i, :r] = c (mask*x[i]) A[t, :r]^T           rounded once, 0 beyond r
               delta[i] = S[i, :r] B[t, :, :r]^T             slices side by side
    backward   D[i, :r] = c dY[i] B[t, :, :r]                likewise
               dX[i]    = sum over slices of mask*(D[i, :r] A[t, :r])
               dA[t]    = sum over rows of t: D[i]^T (mask*x[i]),   0 beyond r
               dB[t]    = sum over rows of t: dY[i]^T S[i],         0 beyond r

Rows of slot -1 and slots of rank 0 have no adapter: their S, D, delta and dX are zero, and an
in-place sum leaves them as they are. What lies in unused slots and beyond the live rank is never
read. Slice number j draws its mask with offset + j. With the base linear under them,
``segmented_linear``, Y = x W^T + bias + delta and dX = dY W + that sum, each with one rounding.

``table`` is ``SegmentTable.tensors()``. ``packed_slices`` = n says that the only tensor of
``lora_a`` [S, n*r_max, K] holds slice j of a slot in rows j*r to (j+1)*r of its live rank r.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .dtypes import accumulate_dtype as accumulate_dtype
from .dtypes import tail_dtype as tail_dtype
from .experts import expert_linear_dab as expert_linear_dab
from .experts import expert_linear_dx as expert_linear_dx
from .experts import expert_linear_fwd as expert_linear_fwd
from .experts import expert_shrink as expert_shrink
from .four_bit import base_weight

_WORD = 0xFFFFFFFF
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85

# One 128-bit Philox block decides this many neighbouring columns, 16 bits each.
LANES = 8


def dropout_threshold(dropout_p: float) -> int:
    """The integer a 16-bit lane is compared with: kept if and only if ``lane >= threshold``.

    Rounded to the nearest 1/65536 and capped below 65536, so that no ``dropout_p < 1`` drops
    everything.
    """
    return min(int(dropout_p * 65536 + 0.5), 65535)


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11) on 32-bit
    words held in int64.

    ``counter`` is four and ``key`` two broadcastable int64 tensors with values in [0, 2^32); so are
    the four results.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit product wraps to a negative int64; shifting and masking still reads its two
        # unsigned words.
        product0, product1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0, c2 = (product1 >> 32 & _WORD) ^ c1 ^ k0, (product0 >> 32 & _WORD) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + _PHILOX_W0) & _WORD, (k1 + _PHILOX_W1) & _WORD
    return c0, c1, c2, c3


def dropout_mask(
    rng: Tensor, rows: int, cols: int, dropout_p: float, logical_row: Tensor | None = None
) -> Tensor:
    """The dropout mask as bool [rows, cols]; True keeps the element.

    ``rng`` is int64[4] = (seed, offset, row0, col0). Element (i, j) stands at the logical position
    (row0+i, col0+j); its bits are lane ``(col0+j) % 8`` of the Philox block with counter ``(row,
    col // 8, offset low, offset high)`` and key ``(seed low, seed high)``: lane ``l`` is the low
    (even l) or high (odd l) half of word ``l // 2``. So a shard or a micro-batch that knows its
    first row and column reproduces its part of the whole mask. ``logical_row`` int64 [rows] takes
    the place of 0, 1, 2, ...: rows that are not neighbours.
    """
    seed, offset, row0, col0 = rng.unbind()
    if logical_row is None:
        logical_row = torch.arange(rows, device=rng.device)
    row = (row0 + logical_row[:rows]) & _WORD
    # One block more than cols needs when col0 is a multiple of 8, so that the shape does not depend
    # on a device value.
    blocks = (cols + LANES - 1) // LANES + 1
    col_block = (col0 // LANES + torch.arange(blocks, device=rng.device)) & _WORD
    words = philox4x32(
        (row[:, None], col_block[None, :], offset & _WORD, offset >> 32 & _WORD),
        (seed & _WORD, seed >> 32 & _WORD),
    )
    words = torch.broadcast_tensors(*words)
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    lane = col0 % LANES + torch.arange(cols, device=rng.device)
    return lanes.flatten(1).index_select(1, lane) >= dropout_threshold(dropout_p)


def masked(x: Tensor, rng: Tensor, dropout_p: float) -> Tensor:
    """``mask * x`` without the 1/(1-p): x [M,K] -> [M,K]. Dropped elements are +0 whatever x holds
    (NaN too)."""
    return torch.where(dropout_mask(rng, x.shape[0], x.shape[1], dropout_p), x, 0)


def lora_shrink(
    x: Tensor, lora_a: Tensor, scale: Tensor, rng: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """``S = scale/(1-dropout_p) * (mask*x) A^T``: x [M,K], lora_a [r,K] -> [M,r] in x's
    ``tail_dtype``.

    The mask is applied where ``rng`` is given; D, which no mask touches, is the same function of
    (dY, B^T) without it.
    """
    acc, tail = accumulate_dtype(x.dtype), tail_dtype(x.dtype)
    if rng is not None:
        x = masked(x, rng, dropout_p)
    s = x.to(acc) @ lora_a.to(tail).to(acc).t()
    return (s * (scale.to(acc) / (1.0 - dropout_p))).to(tail)


def lora_linear_fwd(
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
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """``Y = out_scale * (x W^T + S B^T) + bias`` and S.

    x [M,K], weight [N,K] (or [K,N] with ``fan_in_fan_out``), lora_a [r,K], lora_b [N,r], scale 0-d,
    bias [N], out_scale [N] -> Y [M,N] in x's dtype, S [M,r] in its ``tail_dtype``.
    """
    acc = accumulate_dtype(x.dtype)
    s = lora_shrink(x, lora_a, scale, rng, dropout_p)
    w = base_weight(weight, quant, quant_block, lora_b.shape[0], x.shape[1], fan_in_fan_out, acc)
    y = x.to(acc) @ w.t() + s.to(acc) @ lora_b.to(s.dtype).to(acc).t()
    if out_scale is not None:
        y = y * out_scale.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype), s


def lora_linear_dx(
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
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """``D = c dY B`` and ``dX = dY W + mask*(D A)``: dy [M,N] -> dX [M,K] in dy's dtype,
    D [M,r] in its ``tail_dtype``.

    The forward with its roles swapped, and the mask on the tail's product instead of on the operand
    that makes S.
    """
    acc = accumulate_dtype(dy.dtype)
    rows = scaled_rows(dy, out_scale)
    d = lora_shrink(rows, lora_b.t(), scale, None, dropout_p)
    tail = d.to(acc) @ lora_a.to(d.dtype).to(acc)
    if rng is not None:
        tail = masked(tail, rng, dropout_p)
    w = base_weight(weight, quant, quant_block, dy.shape[1], lora_a.shape[1], fan_in_fan_out, acc)
    return (rows.to(acc) @ w + tail).to(dy.dtype), d


def scaled_rows(dy: Tensor, out_scale: Tensor | None) -> Tensor:
    """``out_scale * dY``, rounded once to the ``tail_dtype``; dY itself without an out_scale."""
    if out_scale is None:
        return dy
    tail = tail_dtype(dy.dtype)
    return (dy.to(tail) * out_scale).to(tail)


def lora_linear_dab(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """``dA = D^T (mask*x)`` [r,K], ``dB = dY^T S`` [N,r], ``dbias = sum_rows dY`` [N], each in its
    given dtype.

    A dtype of None means: not asked for; its place is taken by an empty tensor, and x and d (for
    dA) or s (for dB) may then be None.
    """
    acc = accumulate_dtype(dy.dtype)
    da, db, dbias = (dy.new_empty(0) for _ in range(3))
    if da_dtype is not None:
        assert x is not None and d is not None
        mx = x if rng is None else masked(x, rng, dropout_p)
        da = (d.to(acc).t() @ mx.to(acc)).to(da_dtype)
    if db_dtype is not None:
        assert s is not None
        db = (scaled_rows(dy, out_scale).to(acc).t() @ s.to(acc)).to(db_dtype)
    if dbias_dtype is not None:
        dbias = dy.to(acc).sum(0).to(dbias_dtype)
    return da, db, dbias


class _Segment(NamedTuple):
    """The rows of one slot that is used."""

    slot: int
    rows: Tensor
    rank: int
    scale: Tensor


def _segments(table: Sequence[Tensor]) -> Iterator[_Segment]:
    _, ranks, scales, _, order, start, *_ = table
    for slot, rank in enumerate(ranks.tolist()):
        rows = order[int(start[slot]) : int(start[slot + 1])].long()
        if len(rows) and rank:
            yield _Segment(slot, rows, rank, scales[slot])


def _slice_of_a(
    lora_a: Sequence[Tensor], packed_slices: int, slot: int, j: int, rank: int
) -> Tensor:
    """A [rank, K] of one slot and slice."""
    if packed_slices:
        return lora_a[0][slot, j * rank : (j + 1) * rank]
    return lora_a[j][slot, :rank]


def _mask(
    rng: Tensor | None, j: int, table: Sequence[Tensor], x: Tensor, dropout_p: float
) -> Tensor | None:
    """The mask of slice j, bool [M, K]."""
    if rng is None:
        return None
    rng = rng + torch.tensor([0, j, 0, 0], device=rng.device)
    return dropout_mask(rng, x.shape[0], x.shape[1], dropout_p, table[3])


def segmented_shrink(
    x: Tensor,
    lora_a: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """x [M,K], lora_a n x [S,r_max,K] -> S [M,n,r_max] in x's ``tail_dtype``."""
    acc, tail = accumulate_dtype(x.dtype), tail_dtype(x.dtype)
    n = packed_slices or len(lora_a)
    r_max = lora_a[0].shape[1] // max(packed_slices, 1)
    s = x.new_zeros(x.shape[0], n, r_max, dtype=tail)
    for j in range(n):
        mask = _mask(rng, j, table, x, dropout_p)
        operand = x if mask is None else torch.where(mask, x, 0)
        for slot, rows, rank, scale in _segments(table):
            a = _slice_of_a(lora_a, packed_slices, slot, j, rank).to(tail)
            product = operand[rows].to(acc) @ a.to(acc).t()
            s[rows, j, :rank] = (product * (scale.to(acc) / (1.0 - dropout_p))).to(tail)
    return s


def _delta(s: Tensor, lora_b: Sequence[Tensor], table: Sequence[Tensor]) -> Tensor:
    """The sum over the rank in the accumulator's dtype, [M, sum of N]."""
    acc, tail = accumulate_dtype(s.dtype), tail_dtype(s.dtype)
    delta = s.new_zeros(s.shape[0], sum(b.shape[1] for b in lora_b), dtype=acc)
    first = 0
    for j, b in enumerate(lora_b):
        for slot, rows, rank, _ in _segments(table):
            product = s[rows, j, :rank].to(acc) @ b[slot, :, :rank].to(tail).to(acc).t()
            delta[rows, first : first + b.shape[1]] = product
        first += b.shape[1]
    return delta


def segmented_expand_(
    y: Tensor, s: Tensor, lora_b: Sequence[Tensor], table: Sequence[Tensor]
) -> None:
    """``y += delta`` with one rounding of the sum; rows without an adapter are not written. S is in
    y's dtype or its ``tail_dtype``."""
    delta = _delta(s, lora_b, table)
    for _, rows, _, _ in _segments(table):
        y[rows] = (y[rows].to(delta.dtype) + delta[rows]).to(y.dtype)


def segmented_lora(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """delta [M, sum of N_j] and S."""
    s = segmented_shrink(x, lora_a, table, packed_slices, rng, dropout_p)
    return _delta(s, lora_b, table).to(x.dtype), s


def segmented_lora_(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
) -> None:
    """``y += delta``, see :func:`segmented_expand_`."""
    segmented_expand_(y, segmented_shrink(x, lora_a, table, packed_slices), lora_b, table)


def _tails(
    dy: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int,
    rng: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """The sum over the slices of mask*(D A) in the accumulator's dtype, [M,K], and D."""
    acc = accumulate_dtype(dy.dtype)
    k, r_max = lora_a[0].shape[2], lora_b[0].shape[2]
    d = dy.new_zeros(dy.shape[0], len(lora_b), r_max, dtype=tail_dtype(dy.dtype))
    dx = dy.new_zeros(dy.shape[0], k, dtype=acc)
    first = 0
    for j, b in enumerate(lora_b):
        columns = slice(first, first + b.shape[1])
        tail = torch.zeros_like(dx)
        for slot, rows, rank, scale in _segments(table):
            product = dy[rows, columns].to(acc) @ b[slot, :, :rank].to(d.dtype).to(acc)
            d[rows, j, :rank] = (product * (scale.to(acc) / (1.0 - dropout_p))).to(d.dtype)
            a = _slice_of_a(lora_a, packed_slices, slot, j, rank).to(d.dtype)
            tail[rows] = d[rows, j, :rank].to(acc) @ a.to(acc)
        mask = _mask(rng, j, table, dx, dropout_p)
        dx += tail if mask is None else torch.where(mask, tail, 0)
        first += b.shape[1]
    return dx, d


def segmented_lora_dx(
    dy: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """dY [M, sum of N_j] -> dX [M,K] and D [M,n,r_max]."""
    dx, d = _tails(dy, lora_a, lora_b, table, packed_slices, rng, dropout_p)
    return dx.to(dy.dtype), d


def segmented_linear_fwd(
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
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """Y [M, sum of N_j] = x W^T + bias + delta with one rounding, and S; weight [sum of N_j, K]."""
    acc = accumulate_dtype(x.dtype)
    s = segmented_shrink(x, lora_a, table, packed_slices, rng, dropout_p)
    n = sum([b.shape[1] for b in lora_b])
    w = base_weight(weight, quant, quant_block, n, x.shape[1], fan_in_fan_out, acc)
    y = x.to(acc) @ w.t() + _delta(s, lora_b, table)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(x.dtype), s


def segmented_linear_dx(
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
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
) -> tuple[Tensor, Tensor]:
    """dX [M,K] = dY W + the sum over the slices of mask*(D A) with one rounding, and D."""
    acc = accumulate_dtype(dy.dtype)
    tails, d = _tails(dy, lora_a, lora_b, table, packed_slices, rng, dropout_p)
    k = lora_a[0].shape[2]
    w = base_weight(weight, quant, quant_block, dy.shape[1], k, fan_in_fan_out, acc)
    return (dy.to(acc) @ w + tails).to(dy.dtype), d


def segmented_lora_dab(
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
) -> tuple[list[Tensor], list[Tensor]]:
    """dA and dB of every slot, in the layout of lora_a and lora_b; a dtype of None: not asked for,
    an empty list, and x and d (for dA) or s (for dB) may then be None."""
    acc = accumulate_dtype(dy.dtype)
    slots, n = len(table[1]), len(widths)
    da: list[Tensor] = []
    db: list[Tensor] = []
    if da_dtype is not None:
        assert x is not None and d is not None
        k = x.shape[1]
        stacks, rows_of_a = (1, n * r_max) if packed_slices else (n, r_max)
        da = [dy.new_zeros(slots, rows_of_a, k, dtype=da_dtype) for _ in range(stacks)]
    if db_dtype is not None:
        db = [dy.new_zeros(slots, width, r_max, dtype=db_dtype) for width in widths]
    first = 0
    for j, width in enumerate(widths):
        operand = x
        if x is not None:
            mask = _mask(rng, j, table, x, dropout_p)
            operand = x if mask is None else torch.where(mask, x, 0)
        for slot, rows, rank, _ in _segments(table):
            if da:
                assert operand is not None and d is not None
                product = d[rows, j, :rank].to(acc).t() @ operand[rows].to(acc)
                _slice_of_a(da, packed_slices, slot, j, rank).copy_(product)
            if db:
                assert s is not None
                columns = dy[rows, first : first + width].to(acc)
                db[j][slot, :, :rank] = (columns.t() @ s[rows, j, :rank].to(acc)).to(db_dtype)
        first += width
    return da, db
