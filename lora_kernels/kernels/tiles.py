"""Tiles of a product's operands, of matrices as they lie in memory and of four-bit weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .four_bit import four_bit_tile


@triton.jit
def load_tile(
    t,
    row,
    col,
    rows,
    cols,
    stride_row,
    stride_col,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """t[row : row + ROWS, col : col + COLS], zero outside [rows, cols]; t is a pointer or a
    descriptor."""
    if DESCRIPTOR:
        tile = t.load([row, col])
    else:
        offs_row = row + tl.arange(0, ROWS)
        offs_col = col + tl.arange(0, COLS)
        offsets = offs_row.to(tl.int64)[:, None] * stride_row
        offsets += offs_col.to(tl.int64)[None, :] * stride_col
        inside = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
        tile = tl.load(t + offsets, mask=inside, other=0.0)
    return tile


@triton.jit
def load_weight(
    w, k, col, K, end, stride_w0, stride_w1,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHT_NK: tl.constexpr, DESCRIPTOR: tl.constexpr,
):  # fmt: skip
    """The base's operand [BLOCK_K, BLOCK_N], stored [N, K] (WEIGHT_NK) or [K, N]."""
    if WEIGHT_NK:
        tile = load_tile(w, col, k, end, K, stride_w0, stride_w1, BLOCK_N, BLOCK_K, DESCRIPTOR).T
    else:
        tile = load_tile(w, k, col, K, end, stride_w0, stride_w1, BLOCK_K, BLOCK_N, DESCRIPTOR)
    return tile


@triton.jit
def decode_weight(
    w_ptr, quant, k, col, K, end, dtype: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, WEIGHT_NK: tl.constexpr,
):  # fmt: skip
    """The same of a four-bit weight, in ``dtype``."""
    if WEIGHT_NK:
        tile = four_bit_tile(w_ptr, quant, col, k, end, K, dtype, BLOCK_N, BLOCK_K).T
    else:
        tile = four_bit_tile(w_ptr, quant, k, col, K, end, dtype, BLOCK_K, BLOCK_N)
    return tile
