"""Four-bit weights on a GPU: a tile of one as a product takes it, and all of one as a plain weight.

The bytes and what they mean: ``spec/four_bit.py``. Blocks have 32 to 4096 weights, a power of two
each, so 32 neighbours, here a unit, share an absmax: 16 bytes are loaded with it. The sixteen
values are gathered from a table in shared memory, by one load a weight; a chain of selects would
take fifteen instructions. Products are float32's, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import four_bit

OUTER_BLOCK = tl.constexpr(four_bit.OUTER_BLOCK)


@triton.jit
def _decode_units(q, absmax, code_ptr, U0: tl.constexpr, U1: tl.constexpr):
    """uint8 [U0, U1, 16] and float32 [U0, U1] -> float32 [U0, U1, 16, 2]"""
    code = tl.load(code_ptr + tl.arange(0, 16))
    halves = tl.reshape(tl.join(q >> 4, q & 15).to(tl.int32), [U0 * U1 * 32])
    values = tl.reshape(tl.gather(code, halves, 0), [U0, U1, 16, 2])
    return values * absmax[:, :, None, None]


@triton.jit
def _absmax_of(quant, unit, mask):
    """float32, of the blocks that units belong to; zero where ``mask`` is not."""
    block = unit >> quant[0]
    absmax = tl.load(quant[2] + block, mask=mask, other=0)
    if len(quant) > 3:
        value = tl.load(quant[3] + absmax.to(tl.int32))
        outer = tl.load(quant[4] + block // OUTER_BLOCK, mask=mask, other=0.0)
        # Rounded after the product and after the sum: with a clamp between them they are not fused.
        product = tl.maximum(value * outer, -3.0e38)
        absmax = tl.where(mask, product + tl.load(quant[5]), 0.0)
    return absmax


@triton.jit
def four_bit_tile(
    w_ptr, quant, row, col, rows, cols, dtype: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """w[row : row + ROWS, col : col + COLS] of a four-bit weight [rows, cols] in ``dtype``, zero
    outside; ``col``, ``cols`` and COLS are multiples of 32. ``quant``: of a :class:`FourBit`."""
    UNITS: tl.constexpr = COLS // 32
    offs_row = row + tl.arange(0, ROWS)
    offs_unit = col // 32 + tl.arange(0, UNITS)
    inside = (offs_row < rows)[:, None] & (offs_unit < cols // 32)[None, :]
    unit = offs_row.to(tl.int64)[:, None] * (cols // 32) + offs_unit[None, :]
    offsets = unit[:, :, None] * 16 + tl.arange(0, 16)[None, None, :]
    q = tl.load(w_ptr + offsets, mask=inside[:, :, None], other=0)
    absmax = _absmax_of(quant, unit, inside)
    values = _decode_units(q, absmax, quant[1], ROWS, UNITS)
    return tl.reshape(values.to(dtype), [ROWS, COLS])


@triton.jit
def _lora_decode_kernel(
    w_ptr, quant,
    out_ptr,
    size,
    UNITS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64) * UNITS + tl.arange(0, UNITS)[:, None]
    first = unit[:, :, None] * 32
    offsets = first // 2 + tl.arange(0, 16)[None, None, :]
    q = tl.load(w_ptr + offsets, mask=2 * offsets < size, other=0)
    absmax = _absmax_of(quant, unit, 32 * unit < size)
    values = _decode_units(q, absmax, quant[1], UNITS, 1)
    offsets = first + tl.arange(0, 32)[None, None, :]
    values = tl.reshape(values, [UNITS, 1, 32]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, values, mask=offsets < size)


class FourBit(NamedTuple):
    """A four-bit weight where a kernel would have a matrix [N, K]."""

    data: Tensor
    # as kernels take it: a block's units as a power of two, code [16], absmax, and of a nested one
    # code [256], absmax2 and offset
    quant: tuple[Any, ...]
    shape: tuple[int, int]
    # whether the bytes are those of [K, N]
    transposed: bool

    def t(self) -> FourBit:
        return self._replace(shape=self.shape[::-1], transposed=not self.transposed)


def base_of(
    weight: Tensor,
    quant: Sequence[Tensor] | None,
    quant_block: int,
    n: int,
    k: int,
    fan_in_fan_out: bool,
) -> Tensor | FourBit:
    """The base [N, K] of an operator's arguments."""
    if quant is None:
        return weight.t() if fan_in_fan_out else weight
    return FourBit(weight, quant_of(quant, quant_block), (n, k), fan_in_fan_out)


def quant_of(quant: Sequence[Tensor], quant_block: int) -> tuple[Any, ...]:
    return (quant_block // 32).bit_length() - 1, *quant


def lora_decode(
    weight: Tensor,
    quant: Sequence[Tensor],
    quant_block: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The weight of ``shape`` in ``dtype`` in one launch: ``spec.four_bit.decode``, bit for bit."""
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=weight.device)
    units = -(-out.numel() // 32)
    _lora_decode_kernel[(-(-units // 64),)](
        weight, quant_of(quant, quant_block),
        out,
        out.numel(),
        UNITS=64, num_warps=4,
    )  # fmt: skip
    return out
