"""The GEMM with a low-rank tail (forward, dX: linear_fwd.py) with one producer of s per row block.

    out[m, n] = sum_k x[m, k] w[k, n]  +  keep[m, n] * sum_r s[m, r] b[r, n]  (* out_scale[n] +
    bias[n])

One persistent launch. The tile of the first columns of a row block owns its s: it accumulates
c (mask*x) A^T beside the base product, rounds it once, stores it and publishes it. The other tiles
have the base loop alone, then wait, and all of them add the product of the stored s with b last. x
is read by the base product only, and the rank's own product is computed once per row block.

Nothing is assumed of which programs are resident. A tile is a ticket that a running program draws,
and it waits for no tile but its owner, whose ticket is lower (:func:`owners_first`). Of the drawn
tiles that are not done the one with the lowest ticket therefore waits for no other, and ends; so
do all, one after the other.

``counter_ptr`` holds the next ticket, the programs that have left, and from FLAGS on a flag per row
block. The last program to leave zeroes them: by then no program waits or draws any more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..planning.config import Config, block_r
from ..spec.reference import dropout_threshold, tail_dtype
from .common import counters, dropout_keep, last_to_arrive, tail_precision, tail_tile, tile_order
from .linear_fwd import base_operands, load_tile, load_weight, store_result

# int32: the flags, which many poll, have other cache lines than the ticket.
FLAGS = tl.constexpr(32)


@triton.jit
def owners_first(ticket, num_m, num_n, GROUP_M: tl.constexpr):
    """The tile [block of rows, block of columns] of a ticket: a bijection, in which the owner of a
    row block (column 0) comes one to two groups of GROUP_M rows before the others.

    The others are ordered like ``tile_order``'s. Two groups of owners come first; then one in num_n
    tiles is an owner, until there are no more. So an owner, whose loop is longer, has about a wave
    of tiles in which to end.
    """
    others = tl.maximum(num_n - 1, 1)
    lead = tl.minimum(2 * GROUP_M, num_m)
    turn = tl.maximum(ticket - lead, 0) // num_n
    due = (ticket - lead) % num_n == 0
    owned = tl.where(ticket < lead, ticket, lead + turn)
    is_owner = (ticket < lead) | (due & (owned < num_m))
    other = ticket - tl.minimum(lead + turn + 1, num_m)
    pid_m, pid_n = tile_order(tl.maximum(other, 0), num_m, others, GROUP_M)
    return tl.where(is_owner, owned, pid_m), tl.where(is_owner, 0, pid_n + 1)


@triton.jit
def tile_of_s(s_ptr, row, M, R, stride_sm, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr):
    """The pointers of s[row : row + BLOCK_M], and which of its elements are there."""
    offs_m, offs_r = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    s_ptrs = s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :]
    return s_ptrs, (offs_m < M)[:, None] & (offs_r < R)[None, :]


@triton.jit
def publish(flag_ptr):
    """Set the flag. A program that sees it also sees what this one stored: the barrier orders the
    stores of all its threads before the release."""
    tl.debug_barrier()
    tl.atomic_xchg(flag_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(flag_ptr):
    while tl.atomic_add(flag_ptr, 0, sem="acquire", scope="gpu") == 0:
        pass


@triton.jit
def _lora_linear_producer_kernel(
    x, w, a, b, bias_ptr, out_scale_ptr, scale_ptr, rng_ptr,
    y_ptr, s_ptr, counter_ptr,
    M, N, K, R,
    stride_xm, stride_xk,
    stride_w0, stride_w1,
    stride_ar, stride_ak,
    stride_bn, stride_br,
    stride_sm,
    stride_ym,
    inverse_keep, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    MASK_X: tl.constexpr, MASK_TAIL: tl.constexpr, WEIGHT_NK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_OUT_SCALE: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    scale = (tl.load(scale_ptr) * inverse_keep).to(tl.float32)
    ticket = tl.atomic_add(counter_ptr, 1, sem="relaxed")
    while ticket < num_m * num_n:
        pid_m, pid_n = owners_first(ticket, num_m, num_n, GROUP_M)
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        flag_ptr = counter_ptr + FLAGS + pid_m

        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        if pid_n == 0:
            s_acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
            for k in tl.range(0, K, BLOCK_K):
                x_tile = load_tile(
                    x, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, DESCRIPTOR
                )
                w_tile = load_weight(
                    w, k, col, K, N, stride_w0, stride_w1, BLOCK_K, BLOCK_N, WEIGHT_NK, DESCRIPTOR
                )
                acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
                if MASK_X:
                    keep = dropout_keep(rng_ptr, row, k, threshold, BLOCK_M, BLOCK_K)
                    x_tile = tl.where(keep, x_tile, 0.0).to(dtype)
                a_tile = load_tile(a, 0, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
                s_acc = tl.dot(
                    tail_tile(x_tile, dtype), tail_tile(a_tile, dtype).T, s_acc,
                    input_precision=tail_precision(dtype),
                )  # fmt: skip
            s_ptrs, mask_s = tile_of_s(s_ptr, row, M, R, stride_sm, BLOCK_M, BLOCK_R)
            tl.store(s_ptrs, tail_tile(s_acc * scale, dtype), mask=mask_s)
            publish(flag_ptr)
        else:
            for k in tl.range(0, K, BLOCK_K):
                x_tile = load_tile(
                    x, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, DESCRIPTOR
                )
                w_tile = load_weight(
                    w, k, col, K, N, stride_w0, stride_w1, BLOCK_K, BLOCK_N, WEIGHT_NK, DESCRIPTOR
                )
                acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
            wait_for(flag_ptr)

        b_t = load_tile(b, 0, col, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N, False)
        b_t = tail_tile(b_t, dtype)
        # Not from this multiprocessor's cache: another one may have written it.
        s_ptrs, mask_s = tile_of_s(s_ptr, row, M, R, stride_sm, BLOCK_M, BLOCK_R)
        s = tl.load(s_ptrs, mask=mask_s, other=0.0, cache_modifier=".cg")
        if MASK_TAIL:
            tail = tl.dot(s, b_t, input_precision=tail_precision(dtype))
            keep = dropout_keep(rng_ptr, row, col, threshold, BLOCK_M, BLOCK_N)
            acc += tl.where(keep, tail, 0.0)
        else:
            acc = tl.dot(s, b_t, acc, input_precision=tail_precision(dtype))
        offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
        rows, inside = offs_m.to(tl.int64), offs_m < M
        store_result(
            y_ptr, acc, out_scale_ptr, bias_ptr, rows, inside, offs_n, N, stride_ym,
            HAS_OUT_SCALE, HAS_BIAS,
        )  # fmt: skip
        ticket = tl.atomic_add(counter_ptr, 1, sem="relaxed")

    if last_to_arrive(counter_ptr + 1, tl.num_programs(0)):
        tl.store(counter_ptr, 0)
        for first in tl.range(0, num_m, 128):
            offs = first + tl.arange(0, 128)
            tl.store(counter_ptr + FLAGS + offs, tl.zeros_like(offs), mask=offs < num_m)


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
    w = weight.t() if fan_in_fan_out else weight
    return _launch(x, w, lora_a, lora_b, scale, bias, out_scale, rng, None, dropout_p, config)


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
    w = weight if fan_in_fan_out else weight.t()
    a, b = lora_b.t(), lora_a.t()
    return _launch(dy, w, a, b, scale, None, None, None, rng, dropout_p, config)


def _launch(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    x_rng: Tensor | None,
    tail_rng: Tensor | None,
    dropout_p: float,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """x [M, K], w [N, K], a [R, K], b [N, R]; of the masks at most one."""
    (m, k), n, r = x.shape, w.shape[0], a.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    s = torch.empty(m, r, dtype=tail_dtype(x.dtype), device=x.device)
    if m == 0:
        return y, s
    num_m, num_n = -(-m // config.block_m), -(-n // config.block_n)
    # The kernel steps through vectors by one element.
    bias_arg, out_scale_arg = (x if v is None else v.contiguous() for v in (bias, out_scale))
    x_arg, w_arg, stored, weight_nk = base_operands(x, w, config)
    rng = x_rng if tail_rng is None else tail_rng
    _lora_linear_producer_kernel[(min(num_m * num_n, config.programs or num_m * num_n),)](
        x_arg, w_arg, a, b, bias_arg, out_scale_arg, scale, scale if rng is None else rng,
        y, s, counters(x.device, FLAGS.value + num_m),
        m, n, k, r,
        *x.stride(),
        *stored.stride(),
        *a.stride(),
        *b.stride(),
        s.stride(0),
        y.stride(0),
        1.0 / (1.0 - dropout_p), dropout_threshold(dropout_p),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        BLOCK_R=block_r(config, r), GROUP_M=config.group_m,
        MASK_X=x_rng is not None, MASK_TAIL=tail_rng is not None, WEIGHT_NK=weight_nk,
        HAS_BIAS=bias is not None, HAS_OUT_SCALE=out_scale is not None,
        DESCRIPTOR=config.descriptors,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, s
