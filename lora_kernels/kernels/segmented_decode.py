"""Shrink and expand of a mixed batch of few rows in one launch, over all slices.

A program belongs to a row block and to a chunk of the columns of one slice, and sums its share of
K. The last of the shares to arrive adds them up in a fixed order, rounds S once, and expands the
chunk; no program waits, and the counters are zeros again. So every chunk sums the S of its own
slice: A is read once from memory and again from the L2, chunk by chunk, and B once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..planning.config import Config, block_r
from ..spec.reference import tail_dtype
from ..spec.segments import Table
from .common import counters, last_to_arrive, tail_precision, tail_tile
from .rows import (
    Stacks,
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
from .segmented import shrink_tile


@triton.jit
def _sum_of_shares(
    tile_ptr, in_tile, offs_r, rank, scale, dtype: tl.constexpr,
    SPLIT_K: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """S [BLOCK_M, BLOCK_R] at the ranks offs_r, zero beyond the live one, where none was stored."""
    mask = (offs_r < rank)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for other in tl.range(SPLIT_K):
        # Not from this program's cache: another one wrote it.
        acc += tl.load(
            tile_ptr + other * SIZE + in_tile, mask=mask, other=0.0, cache_modifier=".cg"
        )
    return tail_tile(tl.where(mask, acc * scale, 0.0), dtype)


@triton.jit
def _segmented_decode_kernel(
    x_ptr, a_ptrs, b_ptrs, table,
    y_ptr, s_ptr, partial_ptr, counter_ptr,
    M, T, slots, blocks, K, R, widths,
    stride_xm, stride_xk,
    strides_at, stride_ar, stride_ak,
    strides_bt, stride_bn, stride_br,
    stride_ym, stride_yn,
    stride_sm, stride_sj,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    CHUNK: tl.constexpr, SPLIT_K: tl.constexpr, PARTS: tl.constexpr, SLICES: tl.constexpr,
    PACKED: tl.constexpr, ADD: tl.constexpr, HAS_S: tl.constexpr,
):  # fmt: skip
    dtype = x_ptr.dtype.element_ty
    block, split = tl.program_id(0) // SPLIT_K, tl.program_id(0) % SPLIT_K
    slot, rank = slot_of_block(block, blocks, table)
    if (slot < 0) & ((block < blocks) | (split > 0)):
        return
    rows, inside = rows_of_block(block, blocks, slot, table, slots, M, T, BLOCK_M)
    j, within, first = slice_of_block(tl.program_id(1), widths, CHUNK, SLICES)
    width = pick(widths, j, SLICES)
    a_ptr = matrix_of_slot(a_ptrs, strides_at, slot, j, SLICES)
    b_ptr = matrix_of_slot(b_ptrs, strides_bt, slot, j, SLICES)
    if PACKED:
        a_ptr += (j * rank).to(tl.int64) * stride_ar

    # [block, chunk, split] -> the partial sums of one program, the whole rank wide
    ROOM: tl.constexpr = PARTS * BLOCK_R
    SIZE: tl.constexpr = BLOCK_M * ROOM
    offs_r = tl.arange(0, BLOCK_R)
    in_tile = tl.arange(0, BLOCK_M)[:, None] * ROOM + offs_r[None, :]
    tile = block * tl.num_programs(1) + tl.program_id(1)
    tile_ptr = partial_ptr + tile.to(tl.int64) * (SPLIT_K * SIZE)
    finish = True
    if slot >= 0:
        for first_r in tl.range(0, rank, BLOCK_R):
            acc = shrink_tile(
                x_ptr, a_ptr, x_ptr, rows, inside, rows, 0, first_r + offs_r,
                split * BLOCK_K, K, rank, R, stride_xm, stride_xk, stride_ar, stride_ak, 0, 0,
                BLOCK_M, BLOCK_K, BLOCK_R, SPLIT_K * BLOCK_K, False, False,
            )  # fmt: skip
            tl.store(tile_ptr + split * SIZE + in_tile + first_r, acc)
        finish = last_to_arrive(counter_ptr + tile, SPLIT_K)
    if finish:
        scale = tl.load(table.scale_of_slot + slot, mask=slot >= 0, other=0.0)
        s = _sum_of_shares(
            tile_ptr, in_tile, offs_r, rank, scale, dtype, SPLIT_K, SIZE, BLOCK_M, BLOCK_R
        )
        stop = tl.minimum((within + 1) * CHUNK, width)
        if ADD and HAS_S:
            # Rows without an adapter have an S, but not even a zero is added to them.
            stop = tl.where(rank > 0, stop, 0)
        for col in tl.range(within * CHUNK, stop, BLOCK_N):
            offs_n = col + tl.arange(0, BLOCK_N)
            mask_n = offs_n < width
            b = rank_tile(b_ptr, offs_n, mask_n, offs_r, rank, R, stride_bn, stride_br, dtype, True)
            acc = tl.dot(s, b, input_precision=tail_precision(dtype))
            if PARTS > 1:
                for first_r in tl.range(BLOCK_R, rank, BLOCK_R):
                    more_r = first_r + offs_r
                    more_s = _sum_of_shares(
                        tile_ptr + first_r, in_tile, more_r, rank, scale, dtype,
                        SPLIT_K, SIZE, BLOCK_M, BLOCK_R,
                    )  # fmt: skip
                    b = rank_tile(
                        b_ptr, offs_n, mask_n, more_r, rank, R, stride_bn, stride_br, dtype, True
                    )
                    acc = tl.dot(more_s, b, acc, input_precision=tail_precision(dtype))
            store_rows(y_ptr, acc, rows, inside, first, offs_n, width, stride_ym, stride_yn, ADD)
        if HAS_S:  # noqa: SIM102 - known when it is compiled, the other is not
            # Of the chunks one brings it.
            if within == 0:
                s_out = s_ptr + rows[:, None] * stride_sm + j * stride_sj
                for first_r in tl.range(0, R, BLOCK_R):
                    more_r = first_r + offs_r
                    s = _sum_of_shares(
                        tile_ptr + first_r, in_tile, more_r, rank, scale, dtype,
                        SPLIT_K, SIZE, BLOCK_M, BLOCK_R,
                    )  # fmt: skip
                    mask = inside[:, None] & (more_r < R)[None, :]
                    tl.store(s_out + more_r[None, :], s, mask=mask)


def _decode(
    y: Tensor,
    s: Tensor | None,
    x: Tensor,
    a: Stacks,
    b: Stacks,
    table: Sequence[Tensor],
    widths: Sequence[int],
    r: int,
    add: bool,
    config: Config,
) -> None:
    table = Table(*table)
    m, k = x.shape
    rank, split = block_r(config, r), config.split_k
    parts, chunks = -(-r // rank), sum(-(-width // config.chunk) for width in widths)
    blocks = row_blocks(table, m, config.block_m, fill=s is not None)
    if m == 0 or blocks == 0 or chunks == 0:
        return
    room = torch.empty(
        blocks * chunks * split * config.block_m * parts * rank,
        dtype=torch.float32,
        device=x.device,
    )
    _segmented_decode_kernel[(blocks * split, chunks)](
        x, a.tensors, b.tensors, table,
        y, y if s is None else s, room, counters(x.device, blocks * chunks),
        m, *table.sizes, k, r, tuple(widths),
        *x.stride(),
        a.slots, a.row, a.last,
        b.slots, b.row, b.last,
        *y.stride(),
        *((0, 0) if s is None else s.stride()[:2]),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, BLOCK_R=rank,
        CHUNK=config.chunk, SPLIT_K=split, PARTS=parts, SLICES=b.slices,
        PACKED=a.packed, ADD=add, HAS_S=s is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _of_stacks(
    y: Tensor,
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int,
    add: bool,
    with_s: bool,
    config: Config,
) -> Tensor | None:
    a, b = stacks_of(lora_a, x.dtype, packed_slices), stacks_of(lora_b, x.dtype)
    widths, r = [t.shape[1] for t in lora_b], lora_b[0].shape[2]
    s = None
    if with_s:
        s = x.new_empty(x.shape[0], len(widths), r, dtype=tail_dtype(x.dtype))
    _decode(y, s, x, a, b, table, widths, r, add, config)
    return s


def segmented_lora(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    config: Config,
) -> tuple[Tensor, Tensor]:
    assert rng is None, "config.invalid_reason leaves dropout to the other plans"
    delta = x.new_empty(x.shape[0], sum(b.shape[1] for b in lora_b))
    s = _of_stacks(delta, x, lora_a, lora_b, table, packed_slices, False, True, config)
    assert s is not None
    return delta, s


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
    _of_stacks(y, x, lora_a, lora_b, table, packed_slices, True, False, config)


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
    """``segmented_lora_`` that returns S."""
    assert rng is None, "config.invalid_reason leaves dropout to the other plans"
    s = _of_stacks(y, x, lora_a, lora_b, table, packed_slices, True, True, config)
    assert s is not None
    return s
