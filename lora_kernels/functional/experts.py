"""``expert_linear``: the rows of a mixture, each with the weight and the adapter of its expert."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..spec.dtypes import accumulate_dtype
from ..spec.experts import rows_of_experts
from ..spec.four_bit import QuantState, quant_state_of
from . import ops
from .checks import check_local, compute_dtype, scale_tensor, stand_in
from .linear import quant_arguments


def expert_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    offs: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    fan_in_fan_out: bool = False,
) -> Tensor:
    """``y = x W_e^T + scale * (x A_e^T) B_e^T + bias_e``, e the expert of the row: one grouped GEMM
    with a low-rank tail. ``B_e A_e`` never exists.

    Args:
        x: [M, K], rows sorted by expert; any strides; float32, float16, bfloat16 or float64.
        weight: [E, N, K], or [E, K, N] with ``fan_in_fan_out``, in x's dtype; any strides. Under
            autocast any floating dtype: it is rounded on its way, never copied. A four-bit stack
            (:class:`lora_kernels.FourBitParameter`) is read as its bytes lie, in x's dtype, of the
            experts that have rows; it does not train.
        lora_a: [E, r, K], lora_b: [E, N, r], any strides and floating dtype; both None: no adapter.
        offs: int32 [E] on x's device, rising: the rows of expert e end before ``offs[e]``, where
            those of e + 1 begin (as in ``torch.nn.functional.grouped_mm``). Rows from ``offs[-1]``
            on belong to no expert: their results are zero, and so are their gradients.
        scale: a float, or a 0-d floating tensor.
        bias: [E, N] or None.

    Returns:
        [M, N] in the compute dtype: x's, or autocast's where autocast is on.

    Saved for backward are x and ``S = scale * x A_e^T`` [M, r], each only if a gradient needs it.
    ``weight`` and ``bias`` get gradients if they require them, by the library's GEMM, expert by
    expert. Second derivatives and ``torch.func`` are not defined. The values of ``offs`` are
    checked on a CPU only.

    Raises:
        ValueError: shapes that do not fit, one of A and B without the other, tensors on different
            devices, an ``offs`` that falls or leaves x.
        TypeError: no floating tensors, a DTensor, an ``offs`` that is not int32, or x and weight
            differ in dtype outside autocast.

    >>> import torch
    >>> x, weight = torch.ones(3, 2), torch.zeros(2, 4, 2)
    >>> lora_a, lora_b = torch.ones(2, 1, 2), torch.ones(2, 4, 1)
    >>> offs = torch.tensor([1, 2], dtype=torch.int32)
    >>> expert_linear(x, weight, lora_a, lora_b, offs, scale=0.5)
    tensor([[1., 1., 1., 1.],
            [1., 1., 1., 1.],
            [0., 0., 0., 0.]])
    """
    quant = None if type(weight) in ops.PLAIN else quant_state_of(weight)
    shape = weight if quant is None else stand_in(x, weight, quant)
    _check(x, shape, lora_a, lora_b, offs, bias, fan_in_fan_out)
    dtype = compute_dtype(x, shape)
    if quant is not None:
        weight = weight.data
        if lora_a is None:
            n, k = quant.shape[:0:-1] if fan_in_fan_out else quant.shape[1:]
            lora_a, lora_b = x.new_empty(len(offs), 0, k), x.new_empty(len(offs), n, 0)
    call = _Call(offs, scale_tensor(scale, x.device, dtype), fan_in_fan_out, dtype, quant)
    given = [t for t in (x, weight, lora_a, lora_b, bias) if t is not None]
    if ops.records_gradients() and any(t.requires_grad for t in given):
        y: Tensor = _ExpertLinear.apply(x, weight, lora_a, lora_b, bias, call)
        return y
    return _forward(x, weight, lora_a, lora_b, bias, call)[0]


class _Call(NamedTuple):
    """What a call is besides its differentiable inputs."""

    offs: Tensor
    scale: Tensor
    fan_in_fan_out: bool
    dtype: torch.dtype
    # what the bytes of a four-bit weight mean
    quant: QuantState | None


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    call: _Call,
) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = ops.expert_linear_fwd(
        x.to(call.dtype),
        weight,
        lora_a,
        lora_b,
        call.scale,
        call.offs,
        bias,
        call.fan_in_fan_out,
        **quant_arguments(call.quant),
    )
    return found


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        bias: Tensor | None,
        call: _Call,
    ) -> Tensor:
        y, s = _forward(x, weight, lora_a, lora_b, bias, call)
        _, need_w, need_a, need_b, *_ = ctx.needs_input_grad
        kept = x if need_a or need_w else None, s if need_b else None
        ctx.save_for_backward(*kept, weight, lora_a, lora_b, call.scale, call.offs)
        ctx.options = call.fan_in_fan_out, call.dtype, call.quant
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, s, weight, lora_a, lora_b, scale, offs = ctx.saved_tensors
        need_x, need_w, need_a, need_b, need_bias, _ = ctx.needs_input_grad
        fan_in_fan_out, dtype, quant = ctx.options
        dy = grad.to(dtype)
        rows = None if x is None else x.to(dtype)
        dx = dw = da = db = dbias = d = None
        if need_x:
            dx, d = ops.expert_linear_dx(
                dy, weight, lora_a, lora_b, scale, offs, fan_in_fan_out, **quant_arguments(quant)
            )
        elif need_a:
            d = ops.expert_shrink(dy, lora_b.transpose(1, 2), scale, offs)
        if need_a or need_b:
            da, db = ops.expert_linear_dab(
                dy,
                rows if need_a else None,
                s,
                d if need_a else None,
                offs,
                lora_a.dtype if need_a else None,
                lora_b.dtype if need_b else None,
            )
        if need_w and rows is not None:
            dw = torch.zeros_like(weight)
            for e, own in rows_of_experts(offs):
                dw[e] = rows[own].t() @ dy[own] if fan_in_fan_out else dy[own].t() @ rows[own]
        if need_bias:
            dbias = dy.new_zeros(len(offs), dy.shape[1], dtype=ctx.bias_dtype)
            for e, own in rows_of_experts(offs):
                dbias[e] = dy[own].sum(0, dtype=accumulate_dtype(dtype))
        return dx, dw, da if need_a else None, db if need_b else None, dbias, None


def _check(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    offs: Tensor,
    bias: Tensor | None,
    fan_in_fan_out: bool,
) -> None:
    given = {"x": x, "weight": weight, "offs": offs}
    optional = {"lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    given |= {name: t for name, t in optional.items() if t is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        check_local(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if name != "offs" and not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, not {tensor.dtype}")
    if offs.dtype != torch.int32:
        raise TypeError(f"offs must be int32, not {offs.dtype}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b belong together: pass both or neither")
    if x.dim() != 2 or weight.dim() != 3:
        raise ValueError(f"expert_linear wants x [M, K] and a 3-D weight: {_shapes(given)}")
    experts = len(weight)
    n, k = weight.shape[:0:-1] if fan_in_fan_out else weight.shape[1:]
    r = 0 if lora_a is None or lora_a.dim() != 3 else lora_a.shape[1]
    wanted = {"x": (len(x), k), "offs": (experts,), "bias": (experts, n), "weight": weight.shape}
    wanted |= {"lora_a": (experts, r, k), "lora_b": (experts, n, r)}
    if any(tensor.shape != wanted[name] for name, tensor in given.items()):
        layout = "[E, K, N]" if fan_in_fan_out else "[E, N, K]"
        raise ValueError(
            f"x [M, K], weight {layout}, lora_a [E, r, K], lora_b [E, N, r], offs [E] and bias "
            f"[E, N] do not fit: {_shapes(given)}"
        )
    if lora_a is not None and r == 0:
        raise ValueError(f"the rank is 0: {_shapes(given)}")
    if offs.device.type == "cpu" and not ops.is_observed():
        ends = offs.tolist()
        if any(a > b for a, b in zip([0, *ends], [*ends, len(x)], strict=True)):
            raise ValueError(f"offs must rise from 0 to at most the {len(x)} rows of x: {ends}")


def _shapes(given: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
