"""Forward and backward of the operators for batches that mix adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..spec.four_bit import QuantState
from ..spec.reference import accumulate_dtype
from ..spec.segments import TABLE_TENSORS
from . import ops
from .linear import NO_QUANT, Packed, operand, quant_arguments, result_of, rows_of


class Call(NamedTuple):
    """What a call of :func:`segmented_linear` is besides its differentiable inputs."""

    table: list[Tensor]
    packed_slices: int
    dropout_p: float
    fan_in_fan_out: bool
    dtype: torch.dtype
    packed: Packed
    # what the bytes of a four-bit weight mean
    quant: QuantState | None = None


def linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    call: Call,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """y [M, sum of N] and S [M, n, r_max]."""
    found: tuple[Tensor, Tensor] = ops.segmented_linear_fwd(
        rows_of(x, call.dtype),
        weight if call.quant is not None or weight.dtype == call.dtype else weight.to(call.dtype),
        a,
        b,
        call.table,
        call.packed_slices,
        bias,
        rng,
        call.dropout_p,
        call.fan_in_fan_out,
        call.packed[0],
        **(NO_QUANT if call.quant is None else quant_arguments(call.quant)),
    )
    return found


class SegmentedLinear(torch.autograd.Function):
    """Forward and backward of one call. Saves x as it was given, S, the parameters and the table:
    a table that is refilled in place before the backward makes that raise."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rng: Tensor | None,
        call: Call,
        slices: int,
        *stacks: Tensor,
    ) -> Tensor:
        a, b = stacks[:-slices], stacks[-slices:]
        y, s = linear_forward(x, weight, bias, rng, call, a, b)
        need = ctx.needs_input_grad[-len(stacks) :]
        ctx.need_a, ctx.need_b = any(need[:-slices]), any(need[-slices:])
        keeps_x = ctx.need_a or ctx.needs_input_grad[1]
        ctx.save_for_backward(
            x if keeps_x else None, s if ctx.need_b else None, weight, rng, *call.table, *stacks
        )
        # The table is among the saved tensors.
        ctx.call, ctx.slices = call._replace(table=[]), slices
        ctx.x_shape = x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return result_of(x, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, s, weight, rng, *rest = ctx.saved_tensors
        table, stacks = rest[:TABLE_TENSORS], rest[TABLE_TENSORS:]
        a, b = stacks[: -ctx.slices], stacks[-ctx.slices :]
        call: Call = ctx.call
        need_x, need_w, need_bias, *_ = ctx.needs_input_grad
        dy = rows_of(grad, call.dtype)
        rows = None if x is None else rows_of(x, call.dtype)
        dx = dw = dbias = d = None
        if need_x:
            dx, d = ops.segmented_linear_dx(
                dy,
                operand(weight, call.dtype, call.quant),
                a,
                b,
                table,
                call.packed_slices,
                rng,
                call.dropout_p,
                call.fan_in_fan_out,
                call.packed[1],
                **quant_arguments(call.quant),
            )
            # In the compute dtype: autograd casts it to x's.
            dx = dx.view(ctx.x_shape)
        elif ctx.need_a:
            _, d = ops.segmented_lora_dx(dy, a, b, table, call.packed_slices, rng, call.dropout_p)
        gradients = _gradients_of_stacks(ctx, dy, rows, s, d, rng, table, a, b, call)
        if need_w and rows is not None:
            # As in lora_linear: the library's GEMM, where the base trains too.
            dw = (rows.t() @ dy if call.fan_in_fan_out else dy.t() @ rows).to(weight.dtype)
        if need_bias:
            dbias = dy.sum(0, dtype=accumulate_dtype(dy.dtype)).to(ctx.bias_dtype)
        return (dx, dw, dbias, None, None, None, *gradients)


def _gradients_of_stacks(
    ctx: Any,
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    rng: Tensor | None,
    table: list[Tensor],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    call: Call,
) -> list[Tensor | None]:
    """The gradient of every stack, or None for those that need none."""
    if not (ctx.need_a or ctx.need_b):
        return [None] * (len(a) + len(b))
    da, db = ops.segmented_lora_dab(
        dy,
        x if ctx.need_a else None,
        s,
        d,
        table,
        [t.shape[1] for t in b],
        a[0].shape[1] // max(call.packed_slices, 1),
        call.packed_slices,
        rng,
        call.dropout_p,
        a[0].dtype if ctx.need_a else None,
        b[0].dtype if ctx.need_b else None,
    )
    return [*(da or [None] * len(a)), *(db or [None] * len(b))]


class SegmentedLoRA(torch.autograd.Function):
    """The same without the base linear, of rows x [M, K]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rng: Tensor | None, call: Call, slices: int, *stacks: Tensor
    ) -> Tensor:
        y, s = ops.segmented_lora(
            x,
            stacks[:-slices],
            stacks[-slices:],
            call.table,
            call.packed_slices,
            rng,
            call.dropout_p,
        )
        need = ctx.needs_input_grad[-len(stacks) :]
        ctx.need_a, ctx.need_b = any(need[:-slices]), any(need[-slices:])
        ctx.save_for_backward(
            x if ctx.need_a else None, s if ctx.need_b else None, rng, *call.table, *stacks
        )
        ctx.call, ctx.slices = call._replace(table=[]), slices
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, s, rng, *rest = ctx.saved_tensors
        table, stacks = rest[:TABLE_TENSORS], rest[TABLE_TENSORS:]
        a, b = stacks[: -ctx.slices], stacks[-ctx.slices :]
        need_x, call = ctx.needs_input_grad[0], ctx.call
        dx = d = None
        if need_x or ctx.need_a:
            dx, d = ops.segmented_lora_dx(dy, a, b, table, call.packed_slices, rng, call.dropout_p)
        gradients = _gradients_of_stacks(ctx, dy, x, s, d, rng, table, a, b, call)
        return (dx if need_x else None, None, None, None, *gradients)
