"""``lora_linear``: the user's checks, rows [M, K], and one autograd.Function over the operators."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..spec import reference
from ..spec.four_bit import QuantState, dequantize, quant_state_of
from . import ops
from .checks import check, check_rng, is_foreign, scale_tensor, stand_in

# A packed weight for the forward, and one for dX.
Packed = tuple[Tensor | None, Tensor | None]
NOT_PACKED: Packed = (None, None)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    fan_in_fan_out: bool = False,
    rng: Tensor | None = None,
    packed: Packed = NOT_PACKED,
) -> Tensor:
    """``y = x W^T + scale * (dropout(x) A^T) B^T + bias``: a linear layer with an unmerged LoRA
    adapter.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685).

    Args:
        x: [..., K], any number of leading dimensions and any strides; float32, float16, bfloat16 or
            float64.
        weight: [N, K] in x's dtype, or [K, N] with ``fan_in_fan_out`` (Conv1D's layout); any
            strides, never copied. A four-bit weight (bitsandbytes' ``Params4bit``,
            :class:`lora_kernels.FourBitParameter`) is read as its bytes lie, in x's dtype; it does
            not train. Another tensor subclass of another library (quantised weights) computes
            the base by its ``F.linear``, and plain torch operations add the adapter.
        lora_a: [r, K] with r >= 1, lora_b: [N, r]. Any floating dtype; they are rounded to the
            compute dtype, for float16 to float32.
        scale: a float, or a 0-d floating tensor: changing its value recompiles nothing and reaches
            captured graphs.
        bias: [N] or None, any floating dtype.
        dropout_p: in [0, 1); active only with ``training``. The mask multiplies the adapter's x,
            not the base's.
        training: whether dropout is active.
        fan_in_fan_out: the orientation of ``weight``.
        rng: int64 [4] = (seed, offset, row0, col0) on x's device, to reproduce a mask or a shard's
            part of one (on a GPU col0 must be a multiple of 8, which is not checked: that would
            wait for the device); by default it is drawn from torch's generator of that device.
        packed: ``weight`` as the CPU's kernels read it, for the forward and for dX, each or both
            None (:class:`lora_kernels.layers.packed.PackedWeight`); ignored under an autocast that
            casts ``weight``.

    Returns:
        [..., N] in the compute dtype: x's dtype, or autocast's where autocast is on.

    The adapter is computed in the compute dtype with float32 accumulation, float32 adapters on a
    bfloat16 base included (PEFT without autocast computes that case in float32). With float16 rows
    it is computed in float32: what fits float16 at the end need not fit on the way. Saved for
    backward are x as it was given and ``S = scale * x A^T`` [M, r], each only if a gradient needs
    it, and no mask. Every gradient has its input's dtype; ``weight`` and ``bias`` get one if they
    require it. Second derivatives are not defined, except under ``torch.func`` and forward-mode
    differentiation (``grad``, ``jvp``, ``hessian``, ``vmap``, ...), where plain torch operations
    compute instead of the kernels.

    Raises:
        ValueError: shapes that do not fit, rank 0, dropout_p outside [0, 1), tensors on different
            devices, a scale that requires grad or is not 0-d.
        TypeError: something is not a floating tensor or is a DTensor, or x and weight differ in
            dtype outside autocast.

    >>> import torch
    >>> x, weight = torch.eye(2), torch.zeros(3, 2)
    >>> lora_a, lora_b = torch.ones(1, 2), torch.ones(3, 1)
    >>> lora_linear(x, weight, lora_a, lora_b, scale=0.5)
    tensor([[0.5000, 0.5000, 0.5000],
            [0.5000, 0.5000, 0.5000]])
    """
    quant = None if type(weight) in ops.PLAIN else quant_state_of(weight)
    shape = weight if quant is None else stand_in(x, weight, quant)
    dtype = check(x, shape, lora_a, lora_b, bias, dropout_p, fan_in_fan_out)
    scale = scale_tensor(scale, x.device, dtype)
    if not training or dropout_p == 0.0:
        rng, dropout_p = None, 0.0
    elif rng is not None:
        rng = check_rng(rng, x.device)
    if weight.dtype != dtype:
        packed = NOT_PACKED
    if quant is not None:
        weight = weight.data
    o = Operands(
        *(x, weight, lora_a, lora_b, scale, bias, rng, dropout_p, fan_in_fan_out, dtype),
        *packed,
        quant,
    )
    if quant is None and type(weight) not in ops.PLAIN and is_foreign(weight):
        return _beside(o)
    return checked_lora_linear(o)


class Operands(NamedTuple):
    """The operands of one call, checked, in the order of ``cpu.lora_linear``."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: Tensor
    bias: Tensor | None
    rng: Tensor | None
    # 0.0: no dropout
    dropout_p: float
    fan_in_fan_out: bool
    # the compute dtype
    dtype: torch.dtype
    packed: Tensor | None = None
    packed_dx: Tensor | None = None
    # what the bytes of a four-bit weight mean
    quant: QuantState | None = None


def checked_lora_linear(o: Operands) -> Tensor:
    """:func:`lora_linear` of checked operands; with dropout and without ``rng`` it draws one."""
    x, bias = o.x, o.bias
    if o.dropout_p > 0.0 and o.rng is None:
        o = o._replace(rng=draw_rng(x.device))
    differentiable = ops.records_gradients() and (
        x.requires_grad
        or o.lora_a.requires_grad
        or o.lora_b.requires_grad
        or o.weight.requires_grad
        or (bias is not None and bias.requires_grad)
    )
    if differentiable and o.quant is None:
        y = ops.direct_lora_linear(*o[:-1])
        if y is not None:
            return y
    if ops.is_transformed():
        return _composed(o)
    if differentiable:
        return _LoRALinear.apply(*o)
    y, _ = _forward(o)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _composed(o: Operands) -> Tensor:
    """y by plain torch operations, which every transformation knows: derivatives of any order,
    batches of anything."""
    with ops.without_autocast(o.x.device.type):
        y, _ = reference.lora_linear_fwd(
            rows_of(o.x, o.dtype),
            o.weight.to(o.dtype) if o.quant is None else dequantize(o.weight, o.quant, o.dtype),
            *o[2:7],
            o.dropout_p,
            o.fan_in_fan_out,
        )
    return y.reshape(*o.x.shape[:-1], y.shape[1])


def _beside(o: Operands) -> Tensor:
    """y where only the class of ``weight`` knows its values: the base by ``F.linear``, the adapter
    beside it by plain torch operations."""
    y = F.linear(o.x, o.weight.t() if o.fan_in_fan_out else o.weight, o.bias)
    acc = torch.promote_types(y.dtype, torch.float32)
    with torch.autocast(o.x.device.type, enabled=False):
        rows = rows_of(o.x, acc)
        if o.dropout_p > 0.0:
            rng = draw_rng(o.x.device) if o.rng is None else o.rng
            rows = reference.masked(rows, rng, o.dropout_p)
        s = rows @ o.lora_a.to(acc).t() * (o.scale.to(acc) / (1.0 - o.dropout_p))
        delta = s @ o.lora_b.to(acc).t()
    return y + delta.to(y.dtype).view(y.shape)


def _forward(o: Operands) -> tuple[Tensor, Tensor]:
    """y [M, N] and S [M, r]."""
    weight, quant = o.weight, o.quant
    found: tuple[Tensor, Tensor] = ops.lora_linear_fwd(
        rows_of(o.x, o.dtype),
        weight if quant is not None or weight.dtype == o.dtype else weight.to(o.dtype),
        *o[2:7],
        o.dropout_p,
        o.fan_in_fan_out,
        packed=o.packed,
        **(NO_QUANT if quant is None else quant_arguments(quant)),
    )
    return found


NO_QUANT: dict[str, Any] = {}


def operand(weight: Tensor, dtype: torch.dtype, quant: QuantState | None) -> Tensor:
    """``weight`` as an operator takes it."""
    return weight if quant is not None or weight.dtype == dtype else weight.to(dtype)


def quant_arguments(quant: QuantState | None) -> dict[str, Any]:
    """The arguments about four bits of an operator with a base weight."""
    return NO_QUANT if quant is None else {"quant": quant.tensors(), "quant_block": quant.block}


def four_bit_linear(
    x: Tensor, weight: Tensor, quant: QuantState, bias: Tensor | None, fan_in_fan_out: bool
) -> Tensor:
    """``x W^T + bias`` of a four-bit weight by the kernel of :func:`lora_linear` with an adapter of
    rank 0: x [..., K] -> [..., N]; differentiable in x and bias."""
    n, k = quant.shape[::-1] if fan_in_fan_out else quant.shape
    shape = stand_in(x, weight, quant)
    one = x.new_empty(1, max(n, k))
    dtype = check(x, shape, one[:, :k], one[:, :n].t(), bias, 0.0, fan_in_fan_out)
    a, b = x.new_empty(0, k), x.new_empty(n, 0)
    scale = scale_tensor(1.0, x.device, dtype)
    options = None, 0.0, fan_in_fan_out, dtype, None, None, quant
    return checked_lora_linear(Operands(x, weight.data, a, b, scale, bias, *options))


def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, fan_in_fan_out: bool, packed: Tensor
) -> Tensor:
    """``x W^T + bias`` by the kernel of :func:`lora_linear` with an adapter of rank 0, without a
    graph: x [..., K] -> [..., N]."""
    k, n = weight.shape if fan_in_fan_out else weight.shape[::-1]
    a, b = weight.new_empty(0, k), weight.new_empty(n, 0)
    one = torch.ones((), device="cpu")
    o = Operands(x, weight, a, b, one, bias, None, 0.0, fan_in_fan_out, weight.dtype, packed)
    y, _ = _forward(o)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


class _LoRALinear(torch.autograd.Function):
    """Forward and backward of one call. Saves x as given, S, and the parameters; never a mask or a
    copy of x."""

    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        o = Operands(*operands)
        y, s = _forward(o)
        _, need_w, need_a, need_b, *_ = ctx.needs_input_grad
        kept = o.x if need_a or need_w else None, s if need_b else None
        ctx.save_for_backward(*kept, o.weight, o.lora_a, o.lora_b, o.scale, o.rng)
        # The packed weight is not among the saved tensors: a copy of one, which its owner keeps.
        ctx.options = o.dropout_p, o.fan_in_fan_out, o.dtype, o.packed_dx, o.quant
        ctx.x_shape = o.x.shape
        ctx.bias_dtype = None if o.bias is None else o.bias.dtype
        return result_of(o.x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # once_differentiable costs time, and is needed only with create_graph=True.
        return _backward_once(ctx, grad) if torch.is_grad_enabled() else _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, s, weight, lora_a, lora_b, scale, rng = ctx.saved_tensors
    need_x, need_w, need_a, need_b, _, need_bias, *_ = ctx.needs_input_grad
    dropout_p, fan_in_fan_out, dtype, packed, quant = ctx.options
    dy = rows_of(grad, dtype)
    rows = None if x is None else rows_of(x, dtype)
    dx = dw = da = db = dbias = d = None
    if need_x:
        dx, d = ops.lora_linear_dx(
            dy,
            operand(weight, dtype, quant),
            lora_a,
            lora_b,
            scale,
            rng,
            dropout_p,
            fan_in_fan_out,
            packed=packed,
            **quant_arguments(quant),
        )
        # In the compute dtype: autograd casts it to x's.
        dx = dx.view(ctx.x_shape)
    elif need_a:
        # D = c dY B: no mask, only its 1/(1-p).
        d = ops.lora_shrink(dy, lora_b.t(), scale, None, dropout_p)
    if need_a or need_b or need_bias:
        da, db, dbias = ops.lora_linear_dab(
            dy,
            rows if need_a else None,
            s,
            d if need_a else None,
            rng,
            dropout_p,
            lora_a.dtype if need_a else None,
            lora_b.dtype if need_b else None,
            ctx.bias_dtype if need_bias else None,
        )
    if need_w and rows is not None:
        # LoRA freezes the base; where it trains too, the library's GEMM computes its gradient.
        dw = (rows.t() @ dy if fan_in_fan_out else dy.t() @ rows).to(weight.dtype)
    da, db, dbias = da if need_a else None, db if need_b else None, dbias if need_bias else None
    return (dx, dw, da, db, None, dbias, *[None] * 7)


_backward_once = once_differentiable(_backward)


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., K] as [M, K] in the compute dtype; a view wherever the strides allow one."""
    if x.dtype != dtype:
        x = x.to(dtype)
    if x.dim() == 2:
        return x
    # Not flatten: batches of gradients (is_grads_batched=True) have no rule for it.
    return x.unsqueeze(0) if x.dim() == 1 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def result_of(x: Tensor, y: Tensor) -> Tensor:
    """[M, N] as [..., N] in an autograd.Function: to autograd no view, since one that a Function
    returns cannot be changed in place (``nn.ReLU(inplace=True)``)."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[1]])


def draw_rng(device: torch.device) -> Tensor:
    """(seed, offset, 0, 0) by one draw of the device's generator: graphs advance it and
    checkpointing replays it."""
    return F.pad(torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device), (0, 2))
