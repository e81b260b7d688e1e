"""DoRA: a linear layer whose weight is ``W + s B A`` with every row brought to a trained length.

    n  = ||W + s B A||  by rows, a constant of the gradients
    y  = (m / n) * (x W^T + S B^T) + bias              S = s x A^T
    dm = sum_rows dY * (x W^T + S B^T) / n

With dropout only what the adapter changes sees the mask: ``x~ = mask * x / (1 - p)``, as PEFT
computes it,

    y  = (x - x~) W^T + (m / n) * (x~ W^T + S~ B^T) + bias

Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), section 4.3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import cpu
from ..spec import reference
from . import ops
from .checks import check_rng, compute_dtype, scale_tensor
from .linear import NOT_PACKED, Packed, draw_rng, result_of, rows_of

# Rows of W that are converted at once, so that no wider copy of W exists. A norm of 2048 x 2048 in
# bfloat16 takes 0.8 ms with 256 and 0.7 ms with 512 (AVX-512, 2 threads, 2026-11-30).
_ROWS = 512


@torch.no_grad()
def squared_rows(weight: Tensor, fan_in_fan_out: bool = False) -> Tensor:
    """``||W||^2`` by rows, [N], in float32 or wider."""
    acc = reference.accumulate_dtype(weight.dtype)
    w = weight.t() if fan_in_fan_out else weight
    return torch.cat([part.to(acc).square().sum(1) for part in w.split(_ROWS)])


@torch.no_grad()
def dora_norm(
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    fan_in_fan_out: bool = False,
    weight_squared: Tensor | None = None,
) -> Tensor:
    """``||W + s B A||`` by rows, [N], in float32 or wider, without that sum:

        ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>        <.,.> by rows, clamped at 0

    Args:
        weight_squared: :func:`squared_rows` of ``weight``, where it is known.
    """
    acc = reference.accumulate_dtype(weight.dtype)
    w = weight.t() if fan_in_fan_out else weight
    a, b, s = lora_a.to(acc), lora_b.to(acc), scale.to(acc)
    if weight_squared is None:
        weight_squared = squared_rows(weight, fan_in_fan_out)
    with ops.without_autocast(weight.device.type):
        wa = torch.cat([_narrow_product(part.to(acc), a) for part in w.split(_ROWS)])
        cross = (2 * wa + s * (b @ (a @ a.t()))).mul_(b).sum(1).mul_(s)
    return (weight_squared + cross).clamp_(min=0).sqrt_()


def _narrow_product(x: Tensor, a: Tensor) -> Tensor:
    plain = type(x) in ops.PLAIN and type(a) in ops.PLAIN and not ops.is_observed()
    if plain and x.is_cpu and a.is_cpu and x.dtype == torch.float32:
        return cpu.narrow_product(x, a)
    return x @ a.t()


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    fan_in_fan_out: bool = False,
    rng: Tensor | None = None,
    norm: Tensor | None = None,
    packed: Packed = NOT_PACKED,
) -> Tensor:
    """The formula of this file: x [..., K] -> [..., N].

    Args:
        magnitude: m [N], trainable.
        norm: :func:`dora_norm` of the operands, where it is known.
        The others as for :func:`lora_kernels.lora_linear`; ``weight`` is frozen.
    """
    dtype = compute_dtype(x, weight)
    scale = scale_tensor(scale, x.device, dtype)
    packed = packed if weight.dtype == dtype else NOT_PACKED
    weight = weight.to(dtype)
    if norm is None:
        norm = dora_norm(weight, lora_a, lora_b, scale, fan_in_fan_out)
    p = dropout_p if training else 0.0
    if ops.is_transformed():
        operands = x, weight, lora_a, lora_b, magnitude, norm, scale, bias
        return _composed(*operands, fan_in_fan_out, p, rng)
    others = weight, lora_a, lora_b, magnitude, norm, scale, bias, fan_in_fan_out, packed
    if p == 0.0:
        return _apply(x, *others)
    rng = draw_rng(x.device) if rng is None else check_rng(rng, x.device)
    rows = rows_of(x, dtype)
    dropped = _Masked.apply(rows, rng, p)
    with ops.without_autocast(x.device.type):
        kept = F.linear(rows - dropped, weight.t() if fan_in_fan_out else weight)
        y = _apply(dropped, *others)
        return result_of(x, kept + y)


def dora_rows(
    y: Tensor, bias: Tensor | None, ratio: Tensor, is_dora: Tensor, slot_of_row: Tensor
) -> Tensor:
    """The rows of a mixed batch that belong to DoRA adapters, brought to their lengths:
    ``ratio (y - bias) + bias``, rounded once more; the others as they are.

    Args:
        y: [..., N] = ``x W^T + S B^T + bias``.
        ratio: [S, N], ``m / ||W + s B A||`` of every slot, in float32 or wider.
        is_dora: bool [S + 1], which slots hold DoRA adapters; the last is False, for rows of -1.
        slot_of_row: int [M] or longer.
    """
    rows = y.reshape(-1, y.shape[-1])
    slot = slot_of_row[: rows.shape[0]].long()
    chosen = is_dora[slot][:, None]
    # What other slots hold was perhaps never written, and would spoil a gradient.
    factor = torch.where(chosen, ratio[slot.clamp(min=0)], 1)
    if bias is None:
        scaled = rows.to(ratio.dtype) * factor
    else:
        scaled = (rows.to(ratio.dtype) - bias) * factor + bias
    return torch.where(chosen, scaled.to(y.dtype), rows).view(y.shape)


def _composed(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    fan_in_fan_out: bool,
    p: float,
    rng: Tensor | None,
) -> Tensor:
    """y by plain torch operations, which every transformation knows."""
    ratio = magnitude.to(norm.dtype) / norm
    with ops.without_autocast(x.device.type):
        rows = dropped = rows_of(x, weight.dtype)
        if p > 0.0:
            rng = draw_rng(x.device) if rng is None else rng
            dropped = reference.masked(rows, rng, p) / (1.0 - p)
        y, _ = reference.lora_linear_fwd(
            dropped, weight, lora_a, lora_b, scale, bias,
            fan_in_fan_out=fan_in_fan_out, out_scale=ratio,
        )  # fmt: skip
        if p > 0.0:
            y = y + F.linear(rows - dropped, weight.t() if fan_in_fan_out else weight)
    return y.reshape(*x.shape[:-1], y.shape[1])


class _Masked(torch.autograd.Function):
    """``mask * x / (1 - p)``; the mask is drawn again for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rng: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(rng)
        ctx.p = p
        return reference.masked(x, rng, p).div_(1.0 - p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (rng,) = ctx.saved_tensors
        return reference.masked(grad, rng, ctx.p).div_(1.0 - ctx.p), None, None


def _apply(*operands: Any) -> Tensor:
    y: Tensor = _DoRALinear.apply(*operands)
    return y


class _DoRALinear(torch.autograd.Function):
    """Saves x as given, S, the parameters, and where m trains the rows before they are scaled."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        fan_in_fan_out: bool,
        packed: Packed,
    ) -> Tensor:
        _, _, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        ratio = magnitude.to(norm.dtype) / norm
        # What m's gradient needs cannot be had from y: m may be 0, and the bias hides small rows.
        fused = {} if need_m else {"bias": bias, "out_scale": ratio}
        rows, s = ops.lora_linear_fwd(
            rows_of(x, weight.dtype), weight, lora_a, lora_b, scale,
            fan_in_fan_out=fan_in_fan_out, packed=packed[0], **fused,
        )  # fmt: skip
        y = rows
        if need_m:
            exact = rows.to(norm.dtype) * ratio
            y = (exact if bias is None else exact.add_(bias)).to(rows.dtype)
        ctx.save_for_backward(
            x if need_a else None,
            s if need_b else None,
            rows if need_m else None,
            weight, lora_a, lora_b, norm, ratio, scale, bias,
        )  # fmt: skip
        ctx.fan_in_fan_out, ctx.x_shape = fan_in_fan_out, x.shape
        # Copies, which their owner keeps.
        ctx.packed_dx = packed[1]
        return result_of(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable costs time, and is needed only with create_graph=True.
        return _backward_once(ctx, grad) if torch.is_grad_enabled() else _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, s, rows, weight, lora_a, lora_b, norm, ratio, scale, bias = ctx.saved_tensors
    need_x, _, need_a, need_b, need_m, _, _, need_bias, *_ = ctx.needs_input_grad
    dtype = weight.dtype
    dy = rows_of(grad, dtype)
    dx = d = da = db = dbias = dm = None
    scaled, left = dy, ratio
    if dtype != torch.float16:
        # Once for all that read it, by any plan; of float16 the scaled rows are float32.
        scaled, left = reference.scaled_rows(dy, ratio), None
    if need_x:
        dx, d = ops.lora_linear_dx(
            scaled, weight, lora_a, lora_b, scale,
            fan_in_fan_out=ctx.fan_in_fan_out, out_scale=left, packed=ctx.packed_dx,
        )  # fmt: skip
        # In the compute dtype: autograd casts it to x's.
        dx = dx.view(ctx.x_shape)
    elif need_a:
        d = ops.lora_shrink(reference.scaled_rows(scaled, left), lora_b.t(), scale)
    if need_a or need_b:
        da, db, _ = ops.lora_linear_dab(
            scaled, rows_of(x, dtype) if need_a else None, s, d if need_a else None,
            da_dtype=lora_a.dtype if need_a else None,
            db_dtype=lora_b.dtype if need_b else None,
            out_scale=left,
        )  # fmt: skip
    if need_bias:
        dbias = dy.sum(0, dtype=norm.dtype).to(bias.dtype)
    if need_m:
        dm = (dy.to(norm.dtype) * rows).sum(0) / norm
    da, db = da if need_a else None, db if need_b else None
    return dx, None, da, db, dm, None, None, dbias, None, None


_backward_once = once_differentiable(_backward)
