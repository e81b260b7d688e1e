"""A GEMM with a low-rank tail: the forward and, with its roles swapped, dX. And the shrink that
feeds it.

    out[m, n] = sum_k x[m, k] w[k, n]  +  keep[m, n] * sum_r s[m, r] b[r, n]  (* out_scale[n] +
    bias[n])

            x         w              s                         b       keep
    Y       x         W^T            c (mask*x) A^T            B^T     1
    dX      dY        W              c dY B                    A       the dropout mask

In-loop plan: s is accumulated beside the base product from the same x tiles, rounded once, and its
product with b is added before the only store. Tail plan: s is read, and its
product with b (masked, for dX) is what the accumulator starts with, which costs no second tile of
registers. With SPLIT_K > 1 (few rows: the weight is streamed once, at memory speed) every program
leaves its partial sums of both products, and the last of a tile to arrive adds them in a fixed
order.

In a batch that mixes adapters (SLICES > 0; tail plan) the rows are gathered through the table's
``order``, and every row's s meets the b of its own slot; a tile of columns belongs to one slice, or
(dX, SUM_SLICES) to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..planning.config import Config, block_r
from ..spec.reference import dropout_threshold, tail_dtype
from ..spec.segments import Table
from .common import (
    counters,
    dropout_keep,
    last_to_arrive,
    partials,
    tail_precision,
    tail_tile,
    tile_order,
)
from .four_bit import FourBit, base_of
from .rows import Stacks, blocks_of_slices, pick, slice_of_block, stacks_of, tails_of_tile
from .segmented import dx_shrink, segmented_shrink
from .tiles import decode_weight, load_tile, load_weight


@triton.jit
def store_result(
    y_ptr, acc, out_scale_ptr, bias_ptr,
    rows, inside, offs_n, end, stride_ym,
    HAS_OUT_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """y[rows, offs_n] = acc (* out_scale) (+ bias), rounded once."""
    mask_n = offs_n < end
    if HAS_OUT_SCALE:
        acc *= tl.load(out_scale_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_out = y_ptr + rows[:, None] * stride_ym + offs_n[None, :]
    tl.store(y_out, acc.to(y_ptr.dtype.element_ty), mask=inside[:, None] & mask_n[None, :])


@triton.jit
def _load_rows(x_ptr, rows, inside, col, cols, stride_row, stride_col, COLS: tl.constexpr):
    """x[rows, col : col + COLS], zero where a row or a column is not there."""
    offs_col = col + tl.arange(0, COLS)
    offsets = rows[:, None] * stride_row + offs_col.to(tl.int64)[None, :] * stride_col
    mask = inside[:, None] & (offs_col < cols)[None, :]
    return tl.load(x_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _lora_linear_kernel(
    x, w, quant, a, b, s_ptr, bias_ptr, out_scale_ptr, scale_ptr, rng_ptr, table,
    y_ptr, partial_ptr, counter_ptr,
    M, N, K, R, slots, widths,
    stride_xm, stride_xk,
    stride_w0, stride_w1,
    stride_ar, stride_ak,
    strides_bt, stride_bn, stride_br,
    stride_sm, stride_sj,
    stride_ym,
    inverse_keep, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, SPLIT_K: tl.constexpr,
    IN_LOOP: tl.constexpr, MASK_TAIL: tl.constexpr, WEIGHT_NK: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_OUT_SCALE: tl.constexpr, DESCRIPTOR: tl.constexpr,
    SLICES: tl.constexpr, SUM_SLICES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    if SLICES > 0 and not SUM_SLICES:
        num_n = blocks_of_slices(widths, BLOCK_N, SLICES)
    num_k = tl.cdiv(K, BLOCK_K)
    scale = (tl.load(scale_ptr) * inverse_keep).to(tl.float32)
    for work in tl.range(tl.program_id(0), num_m * num_n * SPLIT_K, tl.num_programs(0)):
        tile = work // SPLIT_K
        split = work % SPLIT_K
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        offs_m = row + tl.arange(0, BLOCK_M)
        rows, inside = offs_m.to(tl.int64), offs_m < M
        # The slice that the columns belong to, its first column, and its end.
        j, first, end = 0, 0, N
        if SLICES > 0:
            # The rows beyond the batch that the table has room for come last in its order.
            rows = tl.load(table.order + offs_m, mask=inside, other=0).to(tl.int64)
            if not SUM_SLICES:
                j, within, first = slice_of_block(pid_n, widths, BLOCK_N, SLICES)
                col, end = first + within * BLOCK_N, first + pick(widths, j, SLICES)
        offs_n = col + tl.arange(0, BLOCK_N)
        offs_r = tl.arange(0, BLOCK_R)

        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        s_acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
        # Of several splits one brings the tail.
        if SLICES > 0:
            acc = tails_of_tile(
                s_ptr, b, rng_ptr, table, row, tl.where(split == 0, row + BLOCK_M, row), slots,
                rows, inside, j, offs_n - first, col, end - first, R,
                stride_sm, stride_sj, strides_bt, stride_bn, stride_br, threshold, dtype,
                BLOCK_M, BLOCK_N, BLOCK_R, SLICES, PACKED, SUM_SLICES, MASK_TAIL,
            )  # fmt: skip
        elif not IN_LOOP:
            for r in tl.range(0, tl.where(split == 0, R, 0), BLOCK_R):
                s = load_tile(s_ptr, row, r, M, R, stride_sm, 1, BLOCK_M, BLOCK_R, False)
                b_t = load_tile(b, r, col, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N, False)
                acc = tl.dot(s, tail_tile(b_t, dtype), acc, input_precision=tail_precision(dtype))
            if MASK_TAIL:
                acc = tl.where(
                    dropout_keep(rng_ptr, row, col, threshold, BLOCK_M, BLOCK_N), acc, 0.0
                )

        for step in tl.range(split, num_k, SPLIT_K):
            k = step * BLOCK_K
            if SLICES > 0:
                x_tile = _load_rows(x, rows, inside, k, K, stride_xm, stride_xk, BLOCK_K)
            else:
                x_tile = load_tile(
                    x, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, DESCRIPTOR
                )
            if len(quant) > 0:
                w_tile = decode_weight(w, quant, k, col, K, end, dtype, BLOCK_K, BLOCK_N, WEIGHT_NK)
            else:
                w_tile = load_weight(
                    w, k, col, K, end, stride_w0, stride_w1, BLOCK_K, BLOCK_N, WEIGHT_NK, DESCRIPTOR
                )
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
            if IN_LOOP:
                a_tile = load_tile(a, 0, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
                s_acc = tl.dot(
                    tail_tile(x_tile, dtype), tail_tile(a_tile, dtype).T, s_acc,
                    input_precision=tail_precision(dtype),
                )  # fmt: skip

        finish = True
        if SPLIT_K > 1:
            # [tile, split] -> the two partial tiles, one after the other
            SIZE: tl.constexpr = BLOCK_M * (BLOCK_N + BLOCK_R)
            tile_ptr = partial_ptr + tile.to(tl.int64) * (SPLIT_K * SIZE)
            in_acc = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
            in_s = BLOCK_M * BLOCK_N + tl.arange(0, BLOCK_M)[:, None] * BLOCK_R + offs_r[None, :]
            tl.store(tile_ptr + split * SIZE + in_acc, acc)
            if IN_LOOP:
                tl.store(tile_ptr + split * SIZE + in_s, s_acc)
            finish = last_to_arrive(counter_ptr + tile, SPLIT_K)
            if finish:
                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                s_acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
                for other in tl.range(SPLIT_K):
                    # Not from this program's cache: another one wrote it.
                    acc += tl.load(tile_ptr + other * SIZE + in_acc, cache_modifier=".cg")
                    if IN_LOOP:
                        s_acc += tl.load(tile_ptr + other * SIZE + in_s, cache_modifier=".cg")

        if finish:
            if IN_LOOP:
                s = tail_tile(s_acc * scale, dtype)
                b_t = load_tile(b, 0, col, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N, False)
                acc = tl.dot(s, tail_tile(b_t, dtype), acc, input_precision=tail_precision(dtype))
                if pid_n == 0:
                    s_out = s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :]
                    tl.store(s_out, s, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])
            store_result(
                y_ptr, acc, out_scale_ptr, bias_ptr, rows, inside, offs_n, end, stride_ym,
                HAS_OUT_SCALE, HAS_BIAS,
            )  # fmt: skip


@triton.jit
def _lora_shrink_kernel(
    x_ptr, a_ptr, scale_ptr, rng_ptr,
    s_ptr, partial_ptr, counter_ptr,
    M, K, R,
    stride_xm, stride_xk,
    stride_ar, stride_ak,
    stride_sm,
    inverse_keep, threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    SPLIT_K: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    block, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, first_r = block * BLOCK_M, part * BLOCK_R
    offs_m = row + tl.arange(0, BLOCK_M)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for step in tl.range(split, tl.cdiv(K, BLOCK_K), SPLIT_K):
        k = step * BLOCK_K
        x = load_tile(x_ptr, row, k, M, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        if HAS_MASK:
            x = tl.where(dropout_keep(rng_ptr, row, k, threshold, BLOCK_M, BLOCK_K), x, 0.0)
        a = load_tile(a_ptr, first_r, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
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
                acc += tl.load(block_ptr + other * SIZE + in_acc, cache_modifier=".cg")
    if finish:
        s = tail_tile(acc * (tl.load(scale_ptr) * inverse_keep).to(tl.float32), dtype)
        s_out = s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :]
        tl.store(s_out, s, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])


def lora_shrink(
    x: Tensor,
    lora_a: Tensor,
    scale: Tensor,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    config: Config,
) -> Tensor:
    m, k = x.shape
    r = lora_a.shape[0]
    s = torch.empty(m, r, dtype=tail_dtype(x.dtype), device=x.device)
    if m == 0:
        return s
    rank = block_r(config, r)
    blocks, split_k, parts = -(-m // config.block_m), config.split_k, -(-r // rank)
    _lora_shrink_kernel[(blocks, split_k, parts)](
        x, lora_a, scale, scale if rng is None else rng,
        s, partials(blocks * parts * split_k * config.block_m * rank, split_k, x.device),
        counters(x.device, blocks * parts if split_k > 1 else 0),
        m, k, r,
        *x.stride(),
        *lora_a.stride(),
        s.stride(0),
        1.0 / (1.0 - dropout_p), dropout_threshold(dropout_p),
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=rank,
        SPLIT_K=split_k, HAS_MASK=rng is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return s


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
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    (n, _), k = lora_b.shape, x.shape[1]
    w = base_of(weight, quant, quant_block, n, k, fan_in_fan_out)
    s = None
    if config.plan == "tail":
        s = lora_shrink(x, lora_a, scale, rng, dropout_p, config=shrink)
    return gemm_with_tail(x, w, lora_a, lora_b, s, scale, bias, out_scale, None, dropout_p, config)


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
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    assert out_scale is None, "config.invalid_reason leaves out_scale's dX to the other plans"
    (n, _), k = lora_b.shape, lora_a.shape[1]
    w = base_of(weight, quant, quant_block, n, k, fan_in_fan_out).t()
    a, b = lora_b.t(), lora_a.t()
    d = None
    if config.plan == "tail":
        d = lora_shrink(dy, a, scale, None, dropout_p, config=shrink)
    return gemm_with_tail(dy, w, a, b, d, scale, None, None, rng, dropout_p, config)


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
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    s = segmented_shrink(x, lora_a, table, packed_slices, rng, dropout_p, config=shrink)
    b, widths = stacks_of(lora_b, x.dtype), [t.shape[1] for t in lora_b]
    w = base_of(weight, quant, quant_block, sum(widths), x.shape[1], fan_in_fan_out)
    seg = Table(*table)
    # S holds the scale already; the kernel loads this one for the in-loop plan alone.
    return gemm_with_tail(
        x, w, x, b, s, seg.scale_of_slot, bias, None, None, 0.0, config, seg, widths
    )


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
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    n, k = dy.shape[1], lora_a[0].shape[2]
    w = base_of(weight, quant, quant_block, n, k, fan_in_fan_out).t()
    d = dx_shrink(dy, lora_b, table, dropout_p, config=shrink)
    a = stacks_of(lora_a, dy.dtype, packed_slices)
    seg = Table(*table)
    return gemm_with_tail(
        dy, w, dy, a, d, seg.scale_of_slot, None, None, rng, dropout_p, config, seg
    )


def base_operands(
    x: Tensor, w: Tensor | FourBit, config: Config, gathered: bool = False
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor, Tensor, bool]:
    """x [M, K] and w [N, K] as a kernel loads them; w as it lies in memory, and whether as
    [N, K]. Rows that are ``gathered`` have no descriptor."""
    if isinstance(w, FourBit):
        return x, w.data, w.data, not w.transposed
    # The tile of w is read along the axis that lies in memory.
    weight_nk = w.stride(1) == 1 or w.stride(0) != 1
    stored = w if weight_nk else w.t()
    x_arg: Tensor | TensorDescriptor = x
    w_arg: Tensor | TensorDescriptor = stored
    block_n, block_k = config.block_n, config.block_k
    if config.descriptors:
        if not gathered:
            x_arg = TensorDescriptor.from_tensor(x, [config.block_m, block_k])
        w_arg = TensorDescriptor.from_tensor(
            stored, [block_n, block_k] if weight_nk else [block_k, block_n]
        )
    return x_arg, w_arg, stored, weight_nk


def gemm_with_tail(
    x: Tensor,
    w: Tensor | FourBit,
    a: Tensor,
    b: Tensor | Stacks,
    s: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor | None,
    tail_rng: Tensor | None,
    dropout_p: float,
    config: Config,
    table: Table | None = None,
    widths: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """x [M, K], w [N, K], a [R, K], b [N, R], s [M, R] or None (then made in the loop).

    With a ``table``: s [M, n, R], a not read, and b the stacks [S, N_j, R] of the slices of these
    widths, or without widths [S, R, N], the slices one over the other.
    """
    (m, k), n, r = x.shape, w.shape[0], a.shape[0] if s is None else s.shape[-1]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    in_loop = s is None
    if s is None:
        s = torch.empty(m, r, dtype=tail_dtype(x.dtype), device=x.device)
    if m == 0:
        return y, s
    block_m, block_n, split_k = config.block_m, config.block_n, config.split_k
    rank = block_r(config, r)
    columns = sum(-(-width // block_n) for width in widths or (n,))
    tiles = -(-m // block_m) * columns
    programs = tiles * split_k
    if config.programs and split_k == 1:
        programs = min(programs, config.programs)
    # The kernel steps through vectors by one element.
    bias_arg, out_scale_arg = (x if v is None else v.contiguous() for v in (bias, out_scale))
    x_arg, w_arg, stored, weight_nk = base_operands(x, w, config, gathered=table is not None)
    if table is not None and isinstance(b, Stacks):
        b_arg, strides_bt, packed = b.tensors, b.slots, b.packed
        strides_b = (b.row, b.last) if widths else (b.last, b.row)
        slots = len(table.rank_of_slot)
    else:
        b_arg, strides_bt, packed, strides_b = b, (), False, b.stride()
        slots = 0
    quant = w.quant if isinstance(w, FourBit) else ()
    _lora_linear_kernel[(programs,)](
        x_arg, w_arg, quant, a, b_arg, s, bias_arg, out_scale_arg,
        scale, scale if tail_rng is None else tail_rng, table or (),
        y, partials(tiles * split_k * block_m * (block_n + rank), split_k, x.device),
        counters(x.device, tiles if split_k > 1 else 0),
        m, n, k, r, slots, tuple(widths),
        *x.stride(),
        *stored.stride(),
        *a.stride(),
        strides_bt, *strides_b,
        s.stride(0), s.stride(1),
        y.stride(0),
        1.0 / (1.0 - dropout_p), dropout_threshold(dropout_p),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=config.block_k, BLOCK_R=rank,
        GROUP_M=config.group_m, SPLIT_K=split_k,
        IN_LOOP=in_loop, MASK_TAIL=tail_rng is not None, WEIGHT_NK=weight_nk,
        HAS_BIAS=bias is not None, HAS_OUT_SCALE=out_scale is not None,
        DESCRIPTOR=config.descriptors,
        SLICES=len(strides_bt), SUM_SLICES=len(strides_bt) > 0 and not widths, PACKED=packed,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, s
