"""The shrink of several adapters in one launch: of projections that share an input (S), or of their
gradients (D).

    s[m, first_j + r] = c_j sum_k (mask_j*x_j)[m, k] a_j[r, k]

Without masks the adapters of one x lie one over the other in a tile, which reads x once. With them,
and of gradients, every projection has programs of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..planning.config import Config, block_r
from ..spec.reference import dropout_threshold, tail_dtype
from .common import counters, dropout_keep_rows, last_to_arrive, partials, tail_precision, tail_tile
from .linear_fwd import load_tile
from .rows import pick, slice_of_block


@triton.jit
def _lora_shrinks_kernel(
    x_ptrs, a_ptrs, scale_ptrs, rng_ptr,
    s_ptr, partial_ptr, counter_ptr,
    M, depths, ranks, R,
    strides_xm, strides_xk,
    strides_ar, strides_ak,
    stride_sm,
    inverse_keep, threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT_K: tl.constexpr,
    PROJECTIONS: tl.constexpr, INPUTS: tl.constexpr, APART: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    dtype = x_ptrs[0].dtype.element_ty
    block, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = block * BLOCK_M
    j, first, end = 0, part * BLOCK_R, R
    x_ptr, K, stride_xm, stride_xk = x_ptrs[0], depths[0], strides_xm[0], strides_xk[0]
    stride_ak = strides_ak[0]
    if APART:
        j, within, begin = slice_of_block(part, ranks, BLOCK_R, PROJECTIONS)
        first, end = begin + within * BLOCK_R, begin + pick(ranks, j, PROJECTIONS)
        stride_ak = pick(strides_ak, j, PROJECTIONS)
        if INPUTS > 1:
            x_ptr, K = pick(x_ptrs, j, INPUTS), pick(depths, j, INPUTS)
            stride_xm, stride_xk = pick(strides_xm, j, INPUTS), pick(strides_xk, j, INPUTS)
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_r = first + tl.arange(0, BLOCK_R)
    # Where the rows of A lie, each in its own projection's, and their scales. Chosen as numbers: of
    # pointers, Triton 3.8 compiles no such choice for AMD.
    addresses = (a_ptrs[0] + offs_r.to(tl.int64) * strides_ar[0]).to(tl.int64)
    scale = tl.zeros([BLOCK_R], dtype=tl.float32) + tl.load(scale_ptrs[0])
    passed = ranks[0]
    for i in tl.static_range(1, PROJECTIONS):
        here = offs_r >= passed
        a_rows = a_ptrs[i] + (offs_r - passed).to(tl.int64) * strides_ar[i]
        addresses = tl.where(here, a_rows.to(tl.int64), addresses)
        scale = tl.where(here, tl.load(scale_ptrs[i]), scale)
        passed += ranks[i]
    a_rows = addresses.to(a_ptrs[0].dtype)

    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for step in tl.range(split, tl.cdiv(K, BLOCK_K), SPLIT_K):
        k = step * BLOCK_K
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        if HAS_MASK:
            keep = dropout_keep_rows(rng_ptr, j, offs_m, k, threshold, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0)
        offs_k = k + tl.arange(0, BLOCK_K)
        a = tl.load(
            a_rows[:, None] + offs_k.to(tl.int64)[None, :] * stride_ak,
            mask=(offs_r < end)[:, None] & (offs_k < K)[None, :],
            other=0.0,
        )
        acc = tl.dot(
            tail_tile(x.to(dtype), dtype), tail_tile(a, dtype).T, acc,
            input_precision=tail_precision(dtype),
        )  # fmt: skip
    finish = True
    if SPLIT_K > 1:
        SIZE: tl.constexpr = BLOCK_M * BLOCK_R
        in_acc = tl.arange(0, BLOCK_M)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        tile = block * tl.num_programs(2) + part
        block_ptr = partial_ptr + tile.to(tl.int64) * (SPLIT_K * SIZE)
        tl.store(block_ptr + split * SIZE + in_acc, acc)
        finish = last_to_arrive(counter_ptr + tile, SPLIT_K)
        if finish:
            acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
            for other in tl.range(SPLIT_K):
                # Not from this program's cache: another one wrote it.
                acc += tl.load(block_ptr + other * SIZE + in_acc, cache_modifier=".cg")
    if finish:
        s = tail_tile(acc * (scale * inverse_keep).to(tl.float32)[None, :], dtype)
        s_out = s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :]
        tl.store(s_out, s, mask=(offs_m < M)[:, None] & (offs_r < end)[None, :])


def lora_shrinks(
    xs: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    scales: Sequence[Tensor],
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    config: Config,
) -> Tensor:
    """S [M, sum r_j] of one x [M, K], or D of one dY_j [M, N_j] for each of ``lora_a``
    n x [r_j, K] (B_j^T), with the tile of a single shrink."""
    m, ranks = xs[0].shape[0], [len(a) for a in lora_a]
    dtype, device = xs[0].dtype, xs[0].device
    s = torch.empty(m, sum(ranks), dtype=tail_dtype(dtype), device=device)
    if m == 0:
        return s
    if len({a.dtype for a in lora_a}) > 1:
        lora_a = [a.to(tail_dtype(dtype)) for a in lora_a]
    apart = len(xs) > 1 or rng is not None or len({a.stride(1) for a in lora_a}) > 1
    rank = block_r(config, max(ranks) if apart else sum(ranks))
    blocks, split_k = -(-m // config.block_m), config.split_k
    parts = sum(-(-r // rank) for r in (ranks if apart else [sum(ranks)]))
    _lora_shrinks_kernel[(blocks, split_k, parts)](
        tuple(xs), tuple(lora_a), tuple(scales), scales[0] if rng is None else rng,
        s, partials(blocks * parts * split_k * config.block_m * rank, split_k, device),
        counters(device, blocks * parts if split_k > 1 else 0),
        m, tuple(x.shape[1] for x in xs), tuple(ranks), sum(ranks),
        tuple(x.stride(0) for x in xs), tuple(x.stride(1) for x in xs),
        tuple(a.stride(0) for a in lora_a), tuple(a.stride(1) for a in lora_a),
        s.stride(0),
        1.0 / (1.0 - dropout_p), dropout_threshold(dropout_p),
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=rank, SPLIT_K=split_k,
        PROJECTIONS=len(lora_a), INPUTS=len(xs), APART=apart, HAS_MASK=rng is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return s
