"""A GEMM with a low-rank tail, the base's part by the library: one kernel writes S and what the
library's GEMM then accumulates onto.

    y0[m, n] = keep[m, n] * sum_r s[m, r] b[r, n]  (+ bias[n])        s as in ``linear_fwd.py``
    y        = y0 + x W^T                                             in place, beta = 1

x is read once for S, y0 is written once; the mask costs nothing more, on x (forward) or on the
product (dX). y0 is rounded once before the sum, by an error relative to the tail alone. In a batch
that mixes adapters y0 is that of ``segmented.py``'s shrink and expand, every row by its own slot.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..planning.config import Config, block_r
from ..spec.reference import dropout_threshold, tail_dtype
from . import segmented
from .common import dropout_keep, tail_precision, tail_tile
from .linear_fwd import load_tile, store_result


@triton.jit
def _lora_preload_kernel(
    x_ptr, a_ptr, b_ptr, bias_ptr, scale_ptr, rng_ptr,
    s_ptr, y_ptr,
    M, N, K, R,
    stride_xm, stride_xk,
    stride_ar, stride_ak,
    stride_bn, stride_br,
    stride_sm, stride_ym,
    inverse_keep, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    MASK_X: tl.constexpr, MASK_TAIL: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    row = tl.program_id(0) * BLOCK_M
    offs_m, offs_r = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    rows, inside = offs_m.to(tl.int64), offs_m < M
    s_acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        if MASK_X:
            x = tl.where(dropout_keep(rng_ptr, row, k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        a = load_tile(a_ptr, 0, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
        s_acc = tl.dot(
            tail_tile(x.to(dtype), dtype), tail_tile(a, dtype).T, s_acc,
            input_precision=tail_precision(dtype),
        )  # fmt: skip
    s = tail_tile(s_acc * (tl.load(scale_ptr) * inverse_keep).to(tl.float32), dtype)
    s_out = s_ptr + rows[:, None] * stride_sm + offs_r[None, :]
    tl.store(s_out, s, mask=inside[:, None] & (offs_r < R)[None, :])
    for col in tl.range(0, N, BLOCK_N):
        b_t = load_tile(b_ptr, 0, col, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N, False)
        acc = tl.dot(s, tail_tile(b_t, dtype), input_precision=tail_precision(dtype))
        if MASK_TAIL:
            acc = tl.where(dropout_keep(rng_ptr, row, col, threshold, BLOCK_M, BLOCK_N), acc, 0.0)
        store_result(
            y_ptr, acc, bias_ptr, bias_ptr, rows, inside, col + tl.arange(0, BLOCK_N), N, stride_ym,
            False, HAS_BIAS,
        )  # fmt: skip


def lora_preload(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    x_rng: Tensor | None,
    tail_rng: Tensor | None,
    dropout_p: float,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """y0 [M, N] and S [M, R] of x [M, K], a [R, K] and b [N, R]."""
    (m, k), (n, r) = x.shape, b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    s = torch.empty(m, r, dtype=tail_dtype(x.dtype), device=x.device)
    if m == 0:
        return y, s
    rng = tail_rng if x_rng is None else x_rng
    _lora_preload_kernel[(-(-m // config.block_m),)](
        x, a, b, x if bias is None else bias.contiguous(), scale, scale if rng is None else rng,
        s, y,
        m, n, k, r,
        *x.stride(),
        *a.stride(),
        *b.stride(),
        s.stride(0), y.stride(0),
        1.0 / (1.0 - dropout_p), dropout_threshold(dropout_p),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=block_r(config, r),
        MASK_X=x_rng is not None, MASK_TAIL=tail_rng is not None, HAS_BIAS=bias is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, s


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
    *,
    config: Config,
) -> tuple[Tensor, Tensor]:
    # Under an out_scale the bias comes last.
    first = bias if out_scale is None else None
    y, s = lora_preload(x, lora_a, lora_b, scale, first, rng, None, dropout_p, config)
    y.addmm_(x, weight if fan_in_fan_out else weight.t())
    if out_scale is not None:
        y.mul_(out_scale)
        if bias is not None:
            y.add_(bias)
    return y, s


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
    *,
    config: Config,
) -> tuple[Tensor, Tensor]:
    assert out_scale is None, "config.invalid_reason leaves out_scale's dX to the other plans"
    a, b = lora_b.t(), lora_a.t()
    dx, d = lora_preload(dy, a, b, scale, None, None, rng, dropout_p, config)
    return dx.addmm_(dy, weight.t() if fan_in_fan_out else weight), d


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
    *,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """``config``: of the adapters' two kernels."""
    y, s = segmented.segmented_lora(
        x, lora_a, lora_b, table, packed_slices, rng, dropout_p, bias=bias, config=config
    )
    return y.addmm_(x, weight if fan_in_fan_out else weight.t()), s


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
    *,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """``config``: of the adapters' two kernels."""
    dx, d = segmented.segmented_lora_dx(
        dy, lora_a, lora_b, table, packed_slices, rng, dropout_p, config=config
    )
    return dx.addmm_(dy, weight.t() if fan_in_fan_out else weight), d
