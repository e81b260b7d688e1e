"""Shared by the kernels of mixed batches: slots, rows and slices of a block, and tiles whose rank
ends where the slot's does.

A kernel takes what differs from slice to slice (base pointer, step from slot to slot, width) as
tuples, whose length is known when it is compiled, and picks its own by its place in the grid. A
``SegmentTable`` comes as the named tuple ``Table``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec.reference import tail_dtype
from ..spec.segments import Table
from .common import dropout_keep_rows, tail_precision, tail_tile


@triton.jit
def pick(values, index, SLICES: tl.constexpr):
    """values[index] of a tuple, for an index known only at run time."""
    picked = values[0]
    for j in tl.static_range(1, SLICES):
        picked = tl.where(index == j, values[j], picked)
    return picked


@triton.jit
def blocks_of_slices(widths, BLOCK: tl.constexpr, SLICES: tl.constexpr):
    """Blocks of columns in all slices."""
    blocks = 0
    for j in tl.static_range(SLICES):
        blocks += tl.cdiv(widths[j], BLOCK)
    return blocks


@triton.jit
def slice_of_block(block, widths, BLOCK: tl.constexpr, SLICES: tl.constexpr):
    """The slice that a block of columns lies in, its number there, and the slice's first column;
    every slice begins with a block of its own."""
    index, within, first = 0, block, 0
    passed, column = 0, 0
    for j in tl.static_range(SLICES):
        here = block >= passed
        index = tl.where(here, j, index)
        within = tl.where(here, block - passed, within)
        first = tl.where(here, column, first)
        passed += tl.cdiv(widths[j], BLOCK)
        column += widths[j]
    return index, within, first


@triton.jit
def slot_of_block(block, blocks, table):
    """The slot of a row block and its live rank: -1 and 0 for rows without an adapter."""
    slot = tl.load(table.block_slot + block, mask=block < blocks, other=-1)
    rank = tl.load(table.rank_of_slot + slot, mask=slot >= 0, other=0)
    return slot, rank


@triton.jit
def matrix_of_slot(ptrs, strides, slot, j, SLICES: tl.constexpr):
    """The first element of A or B of a slot and slice."""
    return pick(ptrs, j, SLICES) + slot.to(tl.int64) * pick(strides, j, SLICES)


@triton.jit
def rows_of_block(block, blocks, slot, table, slots, M, T, BLOCK_M: tl.constexpr):
    """The rows of a block, int64 [BLOCK_M], and which of them are there. Of T rows in the table
    the batch has M."""
    live = block < blocks
    first = tl.load(table.block_start + block, mask=live, other=0)
    bare = tl.load(table.start_of_slot + slots) + (block - blocks) * BLOCK_M
    stop = tl.load(table.start_of_slot + slot + 1, mask=live, other=T)
    offs = tl.where(live, first, bare) + tl.arange(0, BLOCK_M)
    rows = tl.load(table.order + offs, mask=offs < stop, other=M)
    return rows.to(tl.int64), rows < M


@triton.jit
def rank_tile(
    ptr, offs, inside, offs_r, rank, R, stride, stride_r, dtype: tl.constexpr,
    RANK_LAST: tl.constexpr,
):  # fmt: skip
    """ptr[offs, offs_r] transposed, [rank, offs], as the tail of rows of ``dtype`` has it: zero
    beyond the live rank, whatever lies there.

    Where the rank lies along memory, a mask that cuts at any element would make every load one of
    single elements: vectors of 16 bytes are loaded or not, and what is too much is dropped in
    registers.
    """
    if RANK_LAST:
        VECTOR: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        ptrs = ptr + offs.to(tl.int64)[:, None] * stride + offs_r.to(tl.int64)[None, :] * stride_r
        vectors = (offs_r // VECTOR * VECTOR < rank) & (offs_r < R)
        tile = tl.load(ptrs, mask=inside[:, None] & vectors[None, :], other=0.0)
        tile = tl.where((offs_r < rank)[None, :], tile, 0.0).T
    else:
        ptrs = ptr + offs_r.to(tl.int64)[:, None] * stride_r + offs.to(tl.int64)[None, :] * stride
        tile = tl.load(ptrs, mask=(offs_r < rank)[:, None] & inside[None, :], other=0.0)
    return tail_tile(tile, dtype)


@triton.jit
def expand_tile(
    s_ptr, b_ptr, rows, inside, offs_n, N, rank, R,
    stride_sm, stride_sr, stride_bn, stride_br,
    dtype: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, RANK_LAST: tl.constexpr,
    STAGES: tl.constexpr = None,
):  # fmt: skip
    """sum_r s[rows, r] b[offs_n, r] over the live rank, in float32, for a result of ``dtype``."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first_r in tl.range(0, rank, BLOCK_R, num_stages=STAGES):
        offs_r = first_r + tl.arange(0, BLOCK_R)
        s = rank_tile(s_ptr, rows, inside, offs_r, rank, R, stride_sm, stride_sr, dtype, True)
        b = rank_tile(
            b_ptr, offs_n, offs_n < N, offs_r, rank, R, stride_bn, stride_br, dtype, RANK_LAST
        )
        acc = tl.dot(s.T, b, acc, input_precision=tail_precision(dtype))
    return acc


@triton.jit
def tails_of_tile(
    s_ptr, b_ptrs, rng_ptr, table, start, stop, slots, rows, inside, j, offs_n, col, width, R,
    stride_sm, stride_sj, strides_bt, stride_bn, stride_br, threshold,
    dtype: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr, PACKED: tl.constexpr, SUM_SLICES: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """sum_r s[row, j, r] b[slot of the row, n, r] of the rows at the places start <= i < stop in
    ``order``, for the columns offs_n = col... of slice j; with SUM_SLICES of all slices, each
    product masked. float32 [BLOCK_M, BLOCK_N].

    The slots that occur there are walked one after the other. What a slot's B makes of other rows
    is dropped, not multiplied by zero: an adapter that holds an infinity is its own rows' alone.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    offs_m = start + tl.arange(0, BLOCK_M)
    logical = rows
    if HAS_MASK:
        logical = tl.load(table.logical_row + rows, mask=inside, other=0)
    place = start
    stop = tl.minimum(stop, tl.load(table.start_of_slot + slots))
    while place < stop:
        slot = tl.load(table.slot_of_row + tl.load(table.order + place))
        rank = tl.load(table.rank_of_slot + slot)
        following = tl.load(table.start_of_slot + slot + 1)
        own = ((offs_m >= place) & (offs_m < following))[:, None]
        if SUM_SLICES:
            for i in tl.range(0, SLICES, num_stages=1):
                b_ptr = matrix_of_slot(b_ptrs, strides_bt, slot, i, SLICES)
                if PACKED:
                    b_ptr += (i * rank).to(tl.int64) * stride_br
                # One stage: the walk is a step or two, and pipelined products have been
                # miscompiled where their left operand is in registers.
                tail = expand_tile(
                    s_ptr + i * stride_sj, b_ptr, rows, inside, offs_n, width, rank, R,
                    stride_sm, 1, stride_bn, stride_br, dtype, BLOCK_M, BLOCK_N, BLOCK_R, False, 1,
                )  # fmt: skip
                keep = own
                if HAS_MASK:
                    keep &= dropout_keep_rows(rng_ptr, i, logical, col, threshold, BLOCK_M, BLOCK_N)
                acc += tl.where(keep, tail, 0.0)
        else:
            b_ptr = matrix_of_slot(b_ptrs, strides_bt, slot, j, SLICES)
            tail = expand_tile(
                s_ptr + j * stride_sj, b_ptr, rows, inside, offs_n, width, rank, R,
                stride_sm, 1, stride_bn, stride_br, dtype, BLOCK_M, BLOCK_N, BLOCK_R, True, 1,
            )  # fmt: skip
            acc += tl.where(own, tail, 0.0)
        place = following
    return acc


@triton.jit
def store_rows(
    y_ptr, acc, rows, inside, first, offs_n, width, stride_ym, stride_yn, ADD: tl.constexpr
):
    """y[rows, first + offs_n] = acc, or += with one rounding of the sum."""
    cols = (first + offs_n).to(tl.int64)
    y_out = y_ptr + rows[:, None] * stride_ym + cols[None, :] * stride_yn
    mask = inside[:, None] & (offs_n < width)[None, :]
    if ADD:
        acc += tl.load(y_out, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_out, acc.to(y_ptr.dtype.element_ty), mask=mask)


class Stacks(NamedTuple):
    """A or B of every slot as a kernel takes them: one tensor for each slice."""

    tensors: tuple[Tensor, ...]
    slots: tuple[int, ...]  # strides from slot to slot
    row: int
    last: int
    packed: bool = False

    @property
    def slices(self) -> int:
        return len(self.slots)


def stacks_of(stacks: Sequence[Tensor], rows: torch.dtype, packed: int = 0) -> Stacks:
    """One stack for each slice, with the dtype and the strides within a slot that the kernels take
    once for all of them; stacks that differ in these are copied, as rows of dtype ``rows`` take
    them."""
    first = stacks[0]
    tensors = (first,) * packed if packed else tuple(stacks)
    if any(t.dtype != first.dtype or t.stride()[1:] != first.stride()[1:] for t in tensors):
        tensors = tuple(t.to(tail_dtype(rows)).contiguous() for t in tensors)
    row, last = tensors[0].stride()[1:]
    return Stacks(tensors, tuple(t.stride(0) for t in tensors), row, last, packed > 0)


def row_blocks(table: Table, m: int, block_m: int, fill: bool) -> int:
    """Programs along the rows: the schedule's blocks, and those that fill rows without adapter."""
    return table.block_slot.shape[0] + (-(-m // block_m) if fill else 0)
