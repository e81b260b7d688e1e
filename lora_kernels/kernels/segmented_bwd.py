"""dA and dB of every slot of a mixed batch, in one launch.

    dA[t]^T [K, r] = sum over rows of t: (mask*x)^T D        dB[t] [N, r] = sum: dY^T S

One program owns a block of columns of one slot's gradient, and walks along the slot's rows (how
many there are it reads from the table). Everything is written, also where no row, or no live rank,
leaves but zeros, so that the gradients need no other launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..planning.config import Config, block_r
from ..spec.reference import dropout_threshold
from ..spec.segments import Table
from .common import dropout_keep_rows, tail_precision, tail_tile
from .rows import pick, rank_tile, slice_of_block


@triton.jit
def _slot_sum(
    z_ptr, t_ptr, rng_ptr, table, start, stop, column, col, C, first_r, rank, R, stream,
    stride_zm, stride_zc, stride_tm, stride_tr, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """sum over the rows of z[row, column + col ...]^T t[row, first_r ...] [BLOCK_C, BLOCK_R]."""
    dtype = z_ptr.dtype.element_ty
    offs_c, offs_r = col + tl.arange(0, BLOCK_C), first_r + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    for place in tl.range(start, stop, BLOCK_M):
        offs = place + tl.arange(0, BLOCK_M)
        inside = offs < stop
        rows = tl.load(table.order + offs, mask=inside, other=0).to(tl.int64)
        z = tl.load(
            z_ptr + rows[:, None] * stride_zm + (column + offs_c).to(tl.int64)[None, :] * stride_zc,
            mask=inside[:, None] & (offs_c < C)[None, :],
            other=0.0,
        )
        if HAS_MASK:
            logical = tl.load(table.logical_row + rows, mask=inside, other=0)
            keep = dropout_keep_rows(rng_ptr, stream, logical, col, threshold, BLOCK_M, BLOCK_C)
            z = tl.where(keep, z, 0.0)
        t = rank_tile(t_ptr, rows, inside, offs_r, rank, R, stride_tm, stride_tr, dtype, True)
        z = tail_tile(z.to(dtype), dtype)
        acc = tl.dot(z.T, t.T, acc, input_precision=tail_precision(dtype))
    return acc


@triton.jit
def _segmented_lora_dab_kernel(
    x_ptr, d_ptr, dy_ptr, s_ptr, rng_ptr, table,
    da_ptrs, db_ptrs,
    K, R, widths,
    stride_xm, stride_xk,
    stride_dm, stride_dj, stride_dr,
    stride_ym, stride_yn,
    stride_sm, stride_sj, stride_sr,
    threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr, PACKED: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    block, slot, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rank = tl.load(table.rank_of_slot + slot)
    start, stop = tl.load(table.start_of_slot + slot), tl.load(table.start_of_slot + slot + 1)
    first_r = part * BLOCK_R
    stop = tl.where(first_r < rank, stop, start)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    blocks_of_a_slice = tl.cdiv(K, BLOCK_C)
    blocks_of_x = SLICES * blocks_of_a_slice if NEED_A else 0
    if block < blocks_of_x:
        if NEED_A:
            j, col = block // blocks_of_a_slice, block % blocks_of_a_slice * BLOCK_C
            acc = _slot_sum(
                x_ptr, d_ptr + j * stride_dj, rng_ptr, table, start, stop, 0, col, K,
                first_r, rank, R, j, stride_xm, stride_xk, stride_dm, stride_dr, threshold,
                BLOCK_M, BLOCK_C, BLOCK_R, HAS_MASK,
            )  # fmt: skip
            offs_c = col + tl.arange(0, BLOCK_C)
            row_a = slot.to(tl.int64) * R + offs_r
            if PACKED:
                # The live rows of all slices come first, then what is left of each.
                dead = SLICES * rank + j * (R - rank) + offs_r - rank
                row_a = tl.where(offs_r < rank, j * rank + offs_r, dead)
                row_a += slot.to(tl.int64) * (SLICES * R)
            da_out = pick(da_ptrs, j, SLICES) + row_a[None, :] * K + offs_c[:, None]
            inside = (offs_c < K)[:, None] & (offs_r < R)[None, :]
            tl.store(da_out, acc.to(da_out.dtype.scalar.element_ty), mask=inside)
    else:
        if NEED_B:
            j, within, first = slice_of_block(block - blocks_of_x, widths, BLOCK_C, SLICES)
            width, col = pick(widths, j, SLICES), within * BLOCK_C
            acc = _slot_sum(
                dy_ptr, s_ptr + j * stride_sj, rng_ptr, table, start, stop, first, col, width,
                first_r, rank, R, j, stride_ym, stride_yn, stride_sm, stride_sr, threshold,
                BLOCK_M, BLOCK_C, BLOCK_R, False,
            )  # fmt: skip
            offs_c = col + tl.arange(0, BLOCK_C)
            row_b = slot.to(tl.int64) * width + offs_c
            db_out = pick(db_ptrs, j, SLICES) + row_b[:, None] * R + offs_r[None, :]
            inside = (offs_c < width)[:, None] & (offs_r < R)[None, :]
            tl.store(db_out, acc.to(db_out.dtype.scalar.element_ty), mask=inside)


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
    *,
    config: Config,
) -> tuple[list[Tensor], list[Tensor]]:
    table = Table(*table)
    slots, n = len(table.rank_of_slot), len(widths)
    need_a, need_b = da_dtype is not None and x is not None, db_dtype is not None
    k = x.shape[1] if x is not None and need_a else 0
    da: list[Tensor] = []
    db: list[Tensor] = []
    if need_a:
        stacks, rows = (1, n * r_max) if packed_slices else (n, r_max)
        da = [dy.new_empty(slots, rows, k, dtype=da_dtype) for _ in range(stacks)]
    if need_b:
        db = [dy.new_empty(slots, width, r_max, dtype=db_dtype) for width in widths]
    block_c, rank = config.block_n, block_r(config, r_max)
    blocks = n * -(-k // block_c) + need_b * sum(-(-width // block_c) for width in widths)
    if blocks == 0 or r_max == 0:
        return da, db
    x_rows = dy if x is None else x
    tails = dy.new_empty(0, 0, 0)
    d_rows, s_rows = (tails if t is None else t for t in (d, s))
    _segmented_lora_dab_kernel[(blocks, slots, -(-r_max // rank))](
        x_rows, d_rows, dy, s_rows, dy if rng is None else rng, table,
        tuple(da) * (n if packed_slices else 1) or (dy,) * n, tuple(db) or (dy,) * n,
        k, r_max, tuple(widths),
        *x_rows.stride(),
        *d_rows.stride(),
        *dy.stride(),
        *s_rows.stride(),
        dropout_threshold(dropout_p),
        BLOCK_M=config.block_m, BLOCK_C=block_c, BLOCK_R=rank,
        SLICES=n, PACKED=packed_slices > 0,
        NEED_A=need_a, NEED_B=need_b, HAS_MASK=rng is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return da, db
