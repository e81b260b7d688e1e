"""The experts of a mixture: the GEMM with a tail of ``linear_fwd.py``, its shrink and its dA and
dB, with the weight and the adapter of each row's expert, all experts in one launch.

Rows are sorted by expert, and a block of rows belongs to one. Which one, a program finds in
``offs`` by itself: the blocks of E experts, and behind them those of the rows that have none, whose
results are zero. The grid has room for any division of the rows; programs without a block end at
once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..planning.config import Config, block_r
from ..spec.reference import tail_dtype
from .common import tail_precision, tail_tile, tile_order
from .linear_fwd import store_result
from .tiles import load_tile, load_weight


@triton.jit
def expert_of_block(offs_ptr, block, E, M, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a block of rows (E: none), its first row, and where the expert's rows end. A
    block that is not there begins at its end."""
    i = tl.arange(0, EXPERTS)
    ends = tl.minimum(tl.load(offs_ptr + i, mask=i < E, other=M), M)
    starts = tl.load(offs_ptr + i - 1, mask=(i > 0) & (i <= E), other=0)
    starts = tl.where(i > E, M, starts)
    blocks = (ends - starts + BLOCK_M - 1) // BLOCK_M
    passed = tl.cumsum(blocks, 0)
    expert = tl.sum((passed <= block).to(tl.int32), 0)
    own = i == expert
    row = tl.sum(tl.where(own, starts + (block - passed + blocks) * BLOCK_M, 0), 0)
    end = tl.sum(tl.where(own, ends, 0), 0)
    return expert, row, end


@triton.jit
def _load_expert_weight(
    w, expert, k, col, K, N, stride_we, stride_w0, stride_w1,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHT_NK: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """The expert's operand [BLOCK_K, BLOCK_N], as ``load_weight`` has it."""
    if DESCRIPTOR:
        if WEIGHT_NK:
            tile = tl.reshape(w.load([expert, col, k]), [BLOCK_N, BLOCK_K]).T
        else:
            tile = tl.reshape(w.load([expert, k, col]), [BLOCK_K, BLOCK_N])
    else:
        tile = load_weight(
            w + expert.to(tl.int64) * stride_we, k, col, K, N, stride_w0, stride_w1,
            BLOCK_K, BLOCK_N, WEIGHT_NK, False,
        )  # fmt: skip
    return tile


@triton.jit
def _expert_linear_kernel(
    x, w, b_ptr, s_ptr, bias_ptr, offs_ptr,
    y_ptr,
    M, N, K, R, E, blocks,
    stride_xm, stride_xk,
    stride_we, stride_w0, stride_w1,
    stride_be, stride_bn, stride_br,
    stride_sm,
    stride_ym,
    stride_bias,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, EXPERTS: tl.constexpr,
    WEIGHT_NK: tl.constexpr, HAS_BIAS: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    dtype = y_ptr.dtype.element_ty
    block, pid_n = tile_order(tl.program_id(0), blocks, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert, row, end = expert_of_block(offs_ptr, block, E, M, BLOCK_M, EXPERTS)
    if row >= end:
        return
    col = pid_n * BLOCK_N
    # Rows that have no expert have nothing to sum.
    owned = expert < E
    expert = tl.minimum(expert, E - 1)
    K_own, R_own = tl.where(owned, K, 0), tl.where(owned, R, 0)

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    offs_n = col + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        # Ahead of the sums: behind them it would hold registers all the while.
        bias_ptr += expert.to(tl.int64) * stride_bias
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < tl.where(owned, N, 0), other=0.0)
        acc += bias.to(tl.float32)[None, :]
    b_ptr += expert.to(tl.int64) * stride_be
    # One stage: the walk is a step or two, and its masks would take registers.
    for r in tl.range(0, R_own, BLOCK_R, num_stages=1):
        s = load_tile(s_ptr, row, r, end, R, stride_sm, 1, BLOCK_M, BLOCK_R, False)
        b = load_tile(b_ptr, r, col, R, N, stride_br, stride_bn, BLOCK_R, BLOCK_N, False)
        acc = tl.dot(s, tail_tile(b, dtype), acc, input_precision=tail_precision(dtype))
    for k in tl.range(0, K_own, BLOCK_K):
        x_tile = load_tile(x, row, k, end, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, DESCRIPTOR)
        w_tile = _load_expert_weight(
            w, expert, k, col, K, N, stride_we, stride_w0, stride_w1,
            BLOCK_K, BLOCK_N, WEIGHT_NK, DESCRIPTOR,
        )  # fmt: skip
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")

    offs_m = row + tl.arange(0, BLOCK_M)
    store_result(
        y_ptr, acc, bias_ptr, bias_ptr, offs_m.to(tl.int64), offs_m < end, offs_n, N, stride_ym,
        False, False,
    )  # fmt: skip


@triton.jit
def _expert_shrink_kernel(
    x_ptr, a_ptr, scale_ptr, offs_ptr,
    s_ptr,
    M, K, R, E,
    stride_xm, stride_xk,
    stride_ae, stride_ar, stride_ak,
    stride_sm,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    expert, row, end = expert_of_block(offs_ptr, tl.program_id(0), E, M, BLOCK_M, EXPERTS)
    if row >= end:
        return
    first_r = tl.program_id(1) * BLOCK_R
    a_ptr += tl.minimum(expert, E - 1).to(tl.int64) * stride_ae
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in tl.range(0, tl.where(expert < E, K, 0), BLOCK_K):
        x = load_tile(x_ptr, row, k, end, K, stride_xm, stride_xk, BLOCK_M, BLOCK_K, False)
        a = load_tile(a_ptr, first_r, k, R, K, stride_ar, stride_ak, BLOCK_R, BLOCK_K, False)
        acc = tl.dot(
            tail_tile(x, dtype), tail_tile(a, dtype).T, acc, input_precision=tail_precision(dtype)
        )
    offs_m, offs_r = row + tl.arange(0, BLOCK_M), first_r + tl.arange(0, BLOCK_R)
    s = tail_tile(acc * tl.load(scale_ptr).to(tl.float32), dtype)
    s_out = s_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r[None, :]
    tl.store(s_out, s, mask=(offs_m < end)[:, None] & (offs_r < R)[None, :])


@triton.jit
def _expert_sum(
    z_ptr, t_ptr, col, start, stop, first_r, C, R, stride_zm, stride_zc, stride_tm,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """sum over the rows start <= m < stop of z[m, col ...]^T t[m, first_r ...]."""
    dtype = z_ptr.dtype.element_ty
    acc = tl.zeros([BLOCK_C, BLOCK_R], dtype=tl.float32)
    for row in tl.range(start, stop, BLOCK_M):
        z = load_tile(z_ptr, row, col, stop, C, stride_zm, stride_zc, BLOCK_M, BLOCK_C, False)
        t = load_tile(t_ptr, row, first_r, stop, R, stride_tm, 1, BLOCK_M, BLOCK_R, False)
        acc = tl.dot(tail_tile(z, dtype).T, t, acc, input_precision=tail_precision(dtype))
    return acc


@triton.jit
def _expert_linear_dab_kernel(
    x_ptr, d_ptr, dy_ptr, s_ptr, offs_ptr,
    da_ptr, db_ptr,
    N, K, R, E,
    stride_xm, stride_xk,
    stride_dm,
    stride_ym, stride_yn,
    stride_sm,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr,
):  # fmt: skip
    block, expert = tl.program_id(0), tl.program_id(1)
    first_r = tl.program_id(2) * BLOCK_R
    start = tl.load(offs_ptr + expert - 1, mask=expert > 0, other=0)
    stop = tl.load(offs_ptr + expert)
    offs_r = first_r + tl.arange(0, BLOCK_R)
    blocks_of_x = tl.cdiv(K, BLOCK_C) if NEED_A else 0
    if block < blocks_of_x:
        if NEED_A:
            acc = _expert_sum(
                x_ptr, d_ptr, block * BLOCK_C, start, stop, first_r, K, R,
                stride_xm, stride_xk, stride_dm, BLOCK_M, BLOCK_C, BLOCK_R,
            )  # fmt: skip
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            # da is [E, R, K]
            row_a = expert.to(tl.int64) * R + offs_r
            da_out = da_ptr + row_a[None, :] * K + offs_c[:, None]
            inside = (offs_c < K)[:, None] & (offs_r < R)[None, :]
            tl.store(da_out, acc.to(da_ptr.dtype.element_ty), mask=inside)
    else:
        if NEED_B:
            col = (block - blocks_of_x) * BLOCK_C
            acc = _expert_sum(
                dy_ptr, s_ptr, col, start, stop, first_r, N, R,
                stride_ym, stride_yn, stride_sm, BLOCK_M, BLOCK_C, BLOCK_R,
            )  # fmt: skip
            offs_c = col + tl.arange(0, BLOCK_C)
            # db lies in memory as [N, R, E]
            row_b = offs_c.to(tl.int64)[:, None] * R + offs_r[None, :]
            inside = (offs_c < N)[:, None] & (offs_r < R)[None, :]
            tl.store(db_ptr + row_b * E + expert, acc.to(db_ptr.dtype.element_ty), mask=inside)


def blocks_of_rows(m: int, experts: int, block_m: int) -> int:
    """At most so many blocks have rows, of experts or of none."""
    return m // block_m + min(experts + 1, m)


def expert_shrink(
    x: Tensor, lora_a: Tensor, scale: Tensor, offs: Tensor, *, config: Config
) -> Tensor:
    (m, k), (experts, r) = x.shape, lora_a.shape[:2]
    s = torch.empty(m, r, dtype=tail_dtype(x.dtype), device=x.device)
    if m == 0:
        return s
    a, rank = _by_expert(lora_a, x.dtype), block_r(config, r)
    _expert_shrink_kernel[(blocks_of_rows(m, experts, config.block_m), -(-r // rank))](
        x, a, scale, offs,
        s,
        m, k, r, experts,
        *x.stride(),
        *a.stride(),
        s.stride(0),
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, BLOCK_R=rank,
        EXPERTS=triton.next_power_of_2(experts + 1),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return s


def _by_expert(stack: Tensor, rows: torch.dtype) -> Tensor:
    """An adapter whose experts are neighbours in memory, as they are in PEFT's B, is copied: every
    load would bring seven experts more. The copy is what the tail of ``rows`` takes."""
    if 1 in stack.stride()[1:]:
        return stack
    return stack.to(tail_dtype(rows)).contiguous()


def expert_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor,
    offs: Tensor,
    bias: Tensor | None = None,
    fan_in_fan_out: bool = False,
    *,
    config: Config,
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    w = weight.transpose(1, 2) if fan_in_fan_out else weight
    return _product(x, w, lora_a, lora_b, scale, offs, bias, config, shrink)


def expert_linear_dx(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor,
    offs: Tensor,
    fan_in_fan_out: bool = False,
    *,
    config: Config,
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    w = weight if fan_in_fan_out else weight.transpose(1, 2)
    a, b = (None if t is None else t.transpose(1, 2) for t in (lora_b, lora_a))
    return _product(dy, w, a, b, scale, offs, None, config, shrink)


def _product(
    x: Tensor,
    w: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    scale: Tensor,
    offs: Tensor,
    bias: Tensor | None,
    config: Config,
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    """x [M, K], w [E, N, K], a [E, R, K], b [E, N, R], bias [E, N]. A base of another dtype is
    copied first: the stages would not hold both its tiles and the rows'."""
    (m, k), (experts, n) = x.shape, w.shape[:2]
    w = w.to(x.dtype)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    s = x.new_empty(m, 0, dtype=tail_dtype(x.dtype))
    if a is not None:
        s = expert_shrink(x, a, scale, offs, config=shrink)
    if m == 0:
        return y, s
    # The tile of w is read along the axis that lies in memory.
    weight_nk = w.stride(2) == 1 or w.stride(1) != 1
    stored = w if weight_nk else w.transpose(1, 2)
    x_arg: Tensor | TensorDescriptor = x
    w_arg: Tensor | TensorDescriptor = stored
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    if config.descriptors:
        tile = [block_n, block_k] if weight_nk else [block_k, block_n]
        x_arg = TensorDescriptor.from_tensor(x, [block_m, block_k])
        w_arg = TensorDescriptor.from_tensor(stored, [1, *tile])
    b_arg = stored if b is None else _by_expert(b, x.dtype)
    # The kernel steps through a bias by one element.
    bias_arg = None if bias is None else bias.contiguous()
    r = s.shape[1]
    blocks = blocks_of_rows(m, experts, block_m)
    _expert_linear_kernel[(blocks * -(-n // block_n),)](
        x_arg, w_arg, b_arg, s, x if bias_arg is None else bias_arg, offs,
        y,
        m, n, k, r, experts, blocks,
        *x.stride(),
        *stored.stride(),
        *b_arg.stride(),
        s.stride(0),
        y.stride(0),
        0 if bias_arg is None else bias_arg.stride(0),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=block_r(config, r),
        GROUP_M=config.group_m, EXPERTS=triton.next_power_of_2(experts + 1),
        WEIGHT_NK=weight_nk, HAS_BIAS=bias is not None, DESCRIPTOR=config.descriptors,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y, s


def expert_linear_dab(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    offs: Tensor,
    da_dtype: torch.dtype | None = None,
    db_dtype: torch.dtype | None = None,
    *,
    config: Config,
) -> tuple[Tensor, Tensor]:
    n, experts = dy.shape[1], len(offs)
    k = 0 if x is None or da_dtype is None else x.shape[1]
    tail = s if d is None else d
    r = 0 if tail is None else tail.shape[1]
    da = dy.new_empty(0) if da_dtype is None else dy.new_empty(experts, r, k, dtype=da_dtype)
    db = dy.new_empty(0)
    if db_dtype is not None:
        # As PEFT stores it.
        db = dy.new_empty(n, r, experts, dtype=db_dtype).permute(2, 0, 1)
    block_c, rank = config.block_n, block_r(config, r)
    blocks = -(-k // block_c) + (-(-n // block_c) if db_dtype is not None else 0)
    if blocks == 0 or r == 0:
        return da, db
    x_rows = dy if x is None else x
    # S and D of our operators are contiguous; a caller's need not be.
    dtype = tail_dtype(dy.dtype)
    d_rows, s_rows = (dy if t is None else t.to(dtype).contiguous() for t in (d, s))
    _expert_linear_dab_kernel[(blocks, experts, -(-r // rank))](
        x_rows, d_rows, dy, s_rows, offs,
        da, db,
        n, k, r, experts,
        *x_rows.stride(),
        d_rows.stride(0),
        *dy.stride(),
        s_rows.stride(0),
        BLOCK_M=config.block_m, BLOCK_C=block_c, BLOCK_R=rank,
        NEED_A=da_dtype is not None, NEED_B=db_dtype is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return da, db
