"""Adapters of a mixed batch: the tail of ``linear_fwd.py`` alone, its A and B chosen by row block.

    shrink    s[m, j, r] = c sum_k x[m, k] a[t, r, k]            rows m of slot t, slice j
    expand    y[m, n]    = sum_r s[m, j, r] b[t, n, r]           n within slice j

            x      a      b      mask
    Y       x      A      B      on x
    dX      dY     B^T    A^T    on the product, and the slices are summed

A block is at most BLOCK_ROWS rows of one slot (``segments.py``); its rows are gathered through
``order`` and its programs look up the slot's live rank and scale themselves. Programs behind the
schedule's blocks take the rows without an adapter, where zeros have to be written for them; in
place there are none, and such rows are neither read nor written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..planning.config import Config, block_r
from ..spec.reference import dropout_threshold, tail_dtype
from ..spec.segments import Table
from .common import counters, dropout_keep_rows, last_to_arrive, partials, tail_precision, tail_tile
from .rows import (
    Stacks,
    expand_tile,
    matrix_of_slot,
    pick,
    rank_tile,
    row_blocks,
    rows_of_block,
    slice_of_block,
    slot_of_block,
    stacks_of,
    store_rows,
)


@triton.jit
def shrink_tile(
    x_ptr, a_ptr, rng_ptr, rows, inside, logical, column, offs_r, first, K, rank, R,
    stride_xm, stride_xk, stride_ar, stride_ak, stream, threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STEP: tl.constexpr,
    RANK_LAST: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The share of sum_k x[rows, column + k] a[offs_r, k] that begins at k = first, in float32."""
    dtype = x_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in tl.range(first, K, STEP):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + (column + offs_k).to(tl.int64)[None, :] * stride_xk,
            mask=inside[:, None] & mask_k[None, :],
            other=0.0,
        )
        if HAS_MASK:
            keep = dropout_keep_rows(rng_ptr, stream, logical, k, threshold, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        a = rank_tile(
            a_ptr, offs_k, mask_k, offs_r, rank, R, stride_ak, stride_ar, dtype, RANK_LAST
        )
        x = tail_tile(x.to(dtype), dtype)
        acc = tl.dot(x, a.T, acc, input_precision=tail_precision(dtype))
    return acc


@triton.jit
def _segmented_shrink_kernel(
    x_ptr, a_ptrs, rng_ptr, table,
    s_ptr, partial_ptr, counter_ptr,
    M, T, slots, blocks, R, widths, columns,
    stride_xm, stride_xk,
    strides_at, stride_ar, stride_ak,
    stride_sm, stride_sj,
    inverse_keep, threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr, SLICES: tl.constexpr, PACKED: tl.constexpr,
    RANK_LAST: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    block, split = tl.program_id(0) // SPLIT_K, tl.program_id(0) % SPLIT_K
    j, part = tl.program_id(1), tl.program_id(2)
    slot, rank = slot_of_block(block, blocks, table)
    if (slot < 0) & (block < blocks):
        return
    first_r = part * BLOCK_R
    dead = first_r >= rank
    # Nothing to sum: one of the splits writes the zeros.
    if dead & (split > 0):
        return
    rows, inside = rows_of_block(block, blocks, slot, table, slots, M, T, BLOCK_M)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    a_ptr = matrix_of_slot(a_ptrs, strides_at, slot, j, SLICES)
    if PACKED:
        a_ptr += (j * rank).to(tl.int64) * stride_ar
    logical = rows
    if HAS_MASK:
        logical = tl.load(table.logical_row + rows, mask=inside, other=0)
    acc = shrink_tile(
        x_ptr, a_ptr, rng_ptr, rows, inside, logical, pick(columns, j, SLICES), offs_r,
        split * BLOCK_K, tl.where(dead, 0, pick(widths, j, SLICES)), rank, R,
        stride_xm, stride_xk, stride_ar, stride_ak, j, threshold,
        BLOCK_M, BLOCK_K, BLOCK_R, SPLIT_K * BLOCK_K, RANK_LAST, HAS_MASK,
    )  # fmt: skip
    finish = True
    if SPLIT_K > 1:  # noqa: SIM102 - known when it is compiled, the other is not
        if not dead:
            SIZE: tl.constexpr = BLOCK_M * BLOCK_R
            in_acc = tl.arange(0, BLOCK_M)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
            tile = (block * tl.num_programs(1) + j) * tl.num_programs(2) + part
            tile_ptr = partial_ptr + tile.to(tl.int64) * (SPLIT_K * SIZE)
            tl.store(tile_ptr + split * SIZE + in_acc, acc)
            finish = last_to_arrive(counter_ptr + tile, SPLIT_K)
            if finish:
                acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
                for other in tl.range(SPLIT_K):
                    # Not from this program's cache: another one wrote it.
                    acc += tl.load(tile_ptr + other * SIZE + in_acc, cache_modifier=".cg")
    if finish:
        scale = tl.load(table.scale_of_slot + slot, mask=slot >= 0, other=0.0) * inverse_keep
        s = tail_tile(acc * scale.to(tl.float32), x_ptr.dtype.element_ty)
        # The product is zero beyond the live rank, where the scale may be anything.
        s = tl.where((offs_r < rank)[None, :], s, 0.0)
        s_out = s_ptr + rows[:, None] * stride_sm + j * stride_sj + offs_r[None, :]
        tl.store(s_out, s, mask=inside[:, None] & (offs_r < R)[None, :])


@triton.jit
def _segmented_expand_kernel(
    s_ptr, b_ptrs, bias_ptr, rng_ptr, table,
    y_ptr,
    M, T, slots, blocks, R, widths,
    stride_sm, stride_sj, stride_sr,
    strides_bt, stride_bn, stride_br,
    stride_ym, stride_yn,
    threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr, PACKED: tl.constexpr, RANK_LAST: tl.constexpr,
    ADD: tl.constexpr, SUM_SLICES: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    block = tl.program_id(0)
    slot, rank = slot_of_block(block, blocks, table)
    if (slot < 0) & (block < blocks):
        return
    rows, inside = rows_of_block(block, blocks, slot, table, slots, M, T, BLOCK_M)
    if SUM_SLICES:
        # The slices lie one over the other: one program adds up all of them.
        col, width, first = tl.program_id(1) * BLOCK_N, widths[0], 0
        offs_n = col + tl.arange(0, BLOCK_N)
        logical = rows
        if HAS_MASK:
            logical = tl.load(table.logical_row + rows, mask=inside, other=0)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for j in tl.static_range(SLICES):
            b_ptr = matrix_of_slot(b_ptrs, strides_bt, slot, j, SLICES)
            if PACKED:
                b_ptr += (j * rank).to(tl.int64) * stride_br
            tail = expand_tile(
                s_ptr + j * stride_sj, b_ptr, rows, inside, offs_n, width, rank, R,
                stride_sm, stride_sr, stride_bn, stride_br, dtype,
                BLOCK_M, BLOCK_N, BLOCK_R, RANK_LAST,
            )  # fmt: skip
            if HAS_MASK:
                keep = dropout_keep_rows(rng_ptr, j, logical, col, threshold, BLOCK_M, BLOCK_N)
                tail = tl.where(keep, tail, 0.0)
            acc += tail
    else:
        j, within, first = slice_of_block(tl.program_id(1), widths, BLOCK_N, SLICES)
        width = pick(widths, j, SLICES)
        offs_n = within * BLOCK_N + tl.arange(0, BLOCK_N)
        b_ptr = matrix_of_slot(b_ptrs, strides_bt, slot, j, SLICES)
        acc = expand_tile(
            s_ptr + j * stride_sj, b_ptr, rows, inside, offs_n, width, rank, R,
            stride_sm, stride_sr, stride_bn, stride_br, dtype,
            BLOCK_M, BLOCK_N, BLOCK_R, RANK_LAST,
        )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first + offs_n, mask=offs_n < width, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    store_rows(y_ptr, acc, rows, inside, first, offs_n, width, stride_ym, stride_yn, ADD)


def _shrink(
    x: Tensor,
    a: Stacks,
    table: Sequence[Tensor],
    r: int,
    widths: Sequence[int],
    shared: bool,
    transposed: bool,
    rng: Tensor | None,
    dropout_p: float,
    config: Config,
) -> Tensor:
    """S [M, n, r] of x and a [S, r, K], or ([S, N_j, r], transposed) of dY and B: then every slice
    has columns of its own, else ``shared`` ones."""
    table = Table(*table)
    m, n = x.shape[0], a.slices
    s = torch.empty(m, n, r, dtype=tail_dtype(x.dtype), device=x.device)
    columns = tuple(0 if shared else sum(widths[:j]) for j in range(n))
    rank, split = block_r(config, r), config.split_k
    blocks, parts = row_blocks(table, m, config.block_m, fill=True), -(-r // rank)
    if m == 0 or r == 0:
        return s
    tiles = blocks * n * parts
    _segmented_shrink_kernel[(blocks * split, n, parts)](
        x, a.tensors, x if rng is None else rng, table,
        s, partials(tiles * split * config.block_m * rank, split, x.device),
        counters(x.device, tiles if split > 1 else 0),
        m, *table.sizes, r, tuple(widths), columns,
        *x.stride(),
        a.slots, *((a.last, a.row) if transposed else (a.row, a.last)),
        *s.stride()[:2],
        1.0 / (1.0 - dropout_p), dropout_threshold(dropout_p),
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=rank,
        SPLIT_K=split, SLICES=n, PACKED=a.packed,
        RANK_LAST=transposed, HAS_MASK=rng is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return s


def _expand(
    y: Tensor,
    s: Tensor,
    b: Stacks,
    table: Sequence[Tensor],
    widths: Sequence[int],
    add: bool,
    transposed: bool,
    rng: Tensor | None,
    dropout_p: float,
    config: Config,
    bias: Tensor | None = None,
) -> None:
    """y [M, sum of N_j] = or += the tail of b [S, N_j, r] and the bias; ([S, r, K], transposed) of
    A: then the slices are summed in y [M, K]."""
    table = Table(*table)
    m, n, r = s.shape
    rank = block_r(config, r)
    blocks = row_blocks(table, m, config.block_m, fill=not add)
    columns = sum(-(-width // config.block_n) for width in widths[: 1 if transposed else None])
    if m == 0 or blocks == 0 or columns == 0:
        return
    _segmented_expand_kernel[(blocks, columns)](
        s, b.tensors, s if bias is None else bias.contiguous(), s if rng is None else rng, table,
        y,
        m, *table.sizes, r, tuple(widths),
        *s.stride(),
        b.slots, *((b.last, b.row) if transposed else (b.row, b.last)),
        *y.stride(),
        dropout_threshold(dropout_p),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_R=rank,
        SLICES=n, PACKED=b.packed, RANK_LAST=not transposed,
        ADD=add, SUM_SLICES=transposed, HAS_MASK=rng is not None, HAS_BIAS=bias is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def segmented_shrink(
    x: Tensor,
    lora_a: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    config: Config,
) -> Tensor:
    a = stacks_of(lora_a, x.dtype, packed_slices)
    r, widths = lora_a[0].shape[1] // max(packed_slices, 1), [x.shape[1]] * a.slices
    return _shrink(x, a, table, r, widths, True, False, rng, dropout_p, config)


def segmented_expand_(
    y: Tensor, s: Tensor, lora_b: Sequence[Tensor], table: Sequence[Tensor], *, config: Config
) -> None:
    widths = [t.shape[1] for t in lora_b]
    _expand(y, s, stacks_of(lora_b, y.dtype), table, widths, True, False, None, 0.0, config)


def segmented_lora(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    bias: Tensor | None = None,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """The adapters' part, and where a bias is given what it is added to: of all rows."""
    s = segmented_shrink(x, lora_a, table, packed_slices, rng, dropout_p, config=config)
    widths = [t.shape[1] for t in lora_b]
    y, b = x.new_empty(x.shape[0], sum(widths)), stacks_of(lora_b, x.dtype)
    _expand(y, s, b, table, widths, False, False, None, 0.0, config, bias)
    return y, s


def segmented_lora_(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    *,
    config: Config,
) -> None:
    lora_onto(y, x, lora_a, lora_b, table, packed_slices, config=config)


def lora_onto(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    config: Config,
) -> Tensor:
    """``segmented_lora_`` with dropout; returns S."""
    s = segmented_shrink(x, lora_a, table, packed_slices, rng, dropout_p, config=config)
    segmented_expand_(y, s, lora_b, table, config=config)
    return s


def segmented_lora_dx(
    dy: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    config: Config,
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty(dy.shape[0], lora_a[0].shape[2])
    shared = lora_a, lora_b, table, packed_slices, rng, dropout_p
    return dx, _dx(dx, dy, *shared, add=False, config=config)


def dx_onto(
    dx: Tensor,
    dy: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    config: Config,
) -> Tensor:
    """Add the dX of ``segmented_lora_dx`` to ``dx``, with one rounding of the sum; returns D."""
    shared = lora_a, lora_b, table, packed_slices, rng, dropout_p
    return _dx(dx, dy, *shared, add=True, config=config)


def _dx(
    dx: Tensor,
    dy: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int,
    rng: Tensor | None,
    dropout_p: float,
    *,
    add: bool,
    config: Config,
) -> Tensor:
    d = dx_shrink(dy, lora_b, table, dropout_p, config=config)
    a, columns = stacks_of(lora_a, dy.dtype, packed_slices), [dx.shape[1]] * len(lora_b)
    _expand(dx, d, a, table, columns, add, True, rng, dropout_p, config)
    return d


def dx_shrink(
    dy: Tensor,
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    dropout_p: float,
    *,
    config: Config,
) -> Tensor:
    """D [M, n, r_max] = c dY B."""
    r, widths = lora_b[0].shape[2], [t.shape[1] for t in lora_b]
    b = stacks_of(lora_b, dy.dtype)
    return _shrink(dy, b, table, r, widths, False, True, None, dropout_p, config)
