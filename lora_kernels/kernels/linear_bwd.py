"""The two skinny reductions over the rows, and the bias's, in one launch.

    dA^T [K, r] = (mask*x)^T D        dB [N, r] = dY^T S        dbias [N] = sum_rows dY

Both products are z^T t with a tall z and a skinny t. The first programs own blocks of x's columns,
the others of dY's; the rows are dealt out to SPLIT_M programs per block, and the last of a block to
arrive adds their partial sums in a fixed order. Long ranks are dealt out as well, by BLOCK_R.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..planning.config import Config, block_r
from ..spec.reference import dropout_threshold, tail_dtype
from .common import counters, dropout_keep, last_to_arrive, partials, tail_precision, tail_tile


@triton.jit
def _column_block(
    z_ptr, t_ptr, rng_ptr, col, first, first_r, M, C, R,
    stride_zm, stride_zc, stride_tm, threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, STEP: tl.constexpr,
    HAS_MASK: tl.constexpr, SUM_ROWS: tl.constexpr,
):  # fmt: skip
    """One block's share of z^T t [BLOCK_C, BLOCK_R] and of z's column sums [BLOCK_C]."""
    dtype = z_ptr.dtype.element_ty
    offs_c = col + tl.arange(0, BLOCK_C)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for row in tl.range(first, M, STEP):
        offs_m = row + tl.arange(0, BLOCK_M)
        rows = offs_m.to(tl.int64)[:, None]
        z = tl.load(
            z_ptr + rows * stride_zm + offs_c.to(tl.int64)[None, :] * stride_zc,
            mask=(offs_m < M)[:, None] & (offs_c < C)[None, :],
            other=0.0,
        )
        if SUM_ROWS:
            total += tl.sum(z.to(tl.float32), axis=0)
        if HAS_MASK:
            z = tl.where(dropout_keep(rng_ptr, row, col, threshold, BLOCK_M, BLOCK_C), z, 0.0)
        t = tl.load(
            t_ptr + rows * stride_tm + offs_r[None, :],
            mask=(offs_m < M)[:, None] & (offs_r < R)[None, :],
            other=0.0,
        )
        acc = tl.dot(
            tail_tile(z.to(dtype), dtype).T, t, acc,
            input_precision=tail_precision(dtype),
        )  # fmt: skip
    return acc, total


@triton.jit
def _lora_linear_dab_kernel(
    x_ptr, d_ptr, dy_ptr, s_ptr, rng_ptr,
    da_ptr, db_ptr, dbias_ptr, partial_ptr, counter_ptr,
    M, N, K, R,
    stride_xm, stride_xk,
    stride_dm,
    stride_ym, stride_yn,
    stride_sm,
    threshold,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_M: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    block, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    blocks_of_x = tl.cdiv(K, BLOCK_C) if NEED_A else 0
    of_x = block < blocks_of_x
    col = tl.where(of_x, block, block - blocks_of_x) * BLOCK_C
    first, first_r = split * BLOCK_M, part * BLOCK_R
    acc = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    if of_x:
        if NEED_A:
            acc, total = _column_block(
                x_ptr, d_ptr, rng_ptr, col, first, first_r, M, K, R,
                stride_xm, stride_xk, stride_dm, threshold,
                BLOCK_M, BLOCK_C, BLOCK_R, SPLIT_M * BLOCK_M, HAS_MASK, False,
            )  # fmt: skip
    else:
        if NEED_B:
            acc, total = _column_block(
                dy_ptr, s_ptr, rng_ptr, col, first, first_r, M, N, R,
                stride_ym, stride_yn, stride_sm, threshold,
                BLOCK_M, BLOCK_C, BLOCK_R, SPLIT_M * BLOCK_M, False, NEED_BIAS,
            )  # fmt: skip
        elif NEED_BIAS:
            for row in tl.range(first, M, SPLIT_M * BLOCK_M):
                offs_m = row + tl.arange(0, BLOCK_M)
                offs_n = col + tl.arange(0, BLOCK_C)
                dy = tl.load(
                    dy_ptr + offs_m.to(tl.int64)[:, None] * stride_ym
                    + offs_n.to(tl.int64)[None, :] * stride_yn,
                    mask=(offs_m < M)[:, None] & (offs_n < N)[None, :], other=0.0,
                )  # fmt: skip
                total += tl.sum(dy.to(tl.float32), axis=0)

    offs_c = col + tl.arange(0, BLOCK_C)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    finish = True
    if SPLIT_M > 1:
        SIZE: tl.constexpr = BLOCK_C * (BLOCK_R + 1)
        in_acc = tl.arange(0, BLOCK_C)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        in_total = BLOCK_C * BLOCK_R + tl.arange(0, BLOCK_C)
        tile = block * tl.num_programs(2) + part
        block_ptr = partial_ptr + tile.to(tl.int64) * (SPLIT_M * SIZE)
        tl.store(block_ptr + split * SIZE + in_acc, acc)
        tl.store(block_ptr + split * SIZE + in_total, total)
        finish = last_to_arrive(counter_ptr + tile, SPLIT_M)
        if finish:
            acc = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
            total = tl.zeros([BLOCK_C], dtype=tl.float32)
            for other in tl.range(SPLIT_M):
                acc += tl.load(block_ptr + other * SIZE + in_acc, cache_modifier=".cg")
                total += tl.load(block_ptr + other * SIZE + in_total, cache_modifier=".cg")
    if finish:
        if of_x:
            if NEED_A:
                # da is [R, K]
                # Not one name for both: the two may be of different dtypes.
                da_out = da_ptr + offs_r.to(tl.int64)[None, :] * K + offs_c[:, None]
                inside = (offs_c < K)[:, None] & (offs_r < R)[None, :]
                tl.store(da_out, acc.to(da_ptr.dtype.element_ty), mask=inside)
        else:
            if NEED_B:
                db_out = db_ptr + offs_c.to(tl.int64)[:, None] * R + offs_r[None, :]
                inside = (offs_c < N)[:, None] & (offs_r < R)[None, :]
                tl.store(db_out, acc.to(db_ptr.dtype.element_ty), mask=inside)
            if NEED_BIAS:
                # Of the parts of the rank one brings it.
                mask_n = offs_c < tl.where(part == 0, N, 0)
                tl.store(dbias_ptr + offs_c, total.to(dbias_ptr.dtype.element_ty), mask=mask_n)


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
    *,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor]:
    assert out_scale is None, "config.invalid_reason leaves out_scale's dB to the other plans"
    m, n = dy.shape
    k = 0 if x is None or da_dtype is None else x.shape[1]
    tail = s if d is None else d
    r = 0 if tail is None else tail.shape[1]
    da = dy.new_empty(0) if da_dtype is None else dy.new_empty(r, k, dtype=da_dtype)
    db = dy.new_empty(0) if db_dtype is None else dy.new_empty(n, r, dtype=db_dtype)
    dbias = dy.new_empty(0) if dbias_dtype is None else dy.new_empty(n, dtype=dbias_dtype)
    need_dy = db_dtype is not None or dbias_dtype is not None
    block_c, split_m = config.block_n, config.split_k
    rank = block_r(config, r)
    blocks = -(-k // block_c) + (-(-n // block_c) if need_dy else 0)
    if blocks == 0:
        return da, db, dbias
    parts = max(1, -(-r // rank))
    room = partials(blocks * parts * split_m * block_c * (rank + 1), split_m, dy.device)
    x_rows = dy if x is None else x
    # S and D of our operators are contiguous; a caller's need not be.
    dtype = tail_dtype(dy.dtype)
    d_rows, s_rows = (dy if t is None else t.to(dtype).contiguous() for t in (d, s))
    _lora_linear_dab_kernel[(blocks, split_m, parts)](
        x_rows, d_rows, dy, s_rows, dy if rng is None else rng,
        da, db, dbias, room,
        counters(dy.device, blocks * parts if split_m > 1 else 0),
        m, n, k, r,
        *x_rows.stride(),
        d_rows.stride(0),
        *dy.stride(),
        s_rows.stride(0),
        dropout_threshold(dropout_p),
        BLOCK_M=config.block_m, BLOCK_C=block_c, BLOCK_R=rank, SPLIT_M=split_m,
        NEED_A=da_dtype is not None, NEED_B=db_dtype is not None,
        NEED_BIAS=dbias_dtype is not None, HAS_MASK=rng is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return da, db, dbias
