"""``lora_linear``: the user's checks, rows [M, K], and one autograd.Function over the operators."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..spec import reference
from . import ops

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
            strides, never copied. A tensor subclass of another library (quantised weights) computes
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
    dtype = _check(x, weight, lora_a, lora_b, bias, dropout_p, fan_in_fan_out)
    scale = scale_tensor(scale, x.device, dtype)
    if not training or dropout_p == 0.0:
        rng, dropout_p = None, 0.0
    elif rng is not None:
        rng = check_rng(rng, x.device)
    if type(weight) not in ops.PLAIN and is_foreign(weight):
        return _beside(x, weight, lora_a, lora_b, scale, bias, rng, dropout_p, fan_in_fan_out)
    call = Call(dropout_p, fan_in_fan_out, dtype, packed if weight.dtype == dtype else NOT_PACKED)
    return checked_lora_linear(x, weight, lora_a, lora_b, scale, bias, call, rng)


class Call(NamedTuple):
    """What a call of :func:`lora_linear` is besides its tensors."""

    # 0.0: none
    dropout_p: float
    fan_in_fan_out: bool
    # what is computed in
    dtype: torch.dtype
    packed: Packed


def checked_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    call: Call,
    rng: Tensor | None = None,
) -> Tensor:
    """:func:`lora_linear` of checked operands, with ``scale`` as the operators take it."""
    if call.dropout_p > 0.0 and rng is None:
        rng = draw_rng(x.device)
    if ops.records_gradients() and (
        x.requires_grad
        or lora_a.requires_grad
        or lora_b.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        y = ops.direct_lora_linear(
            x,
            weight,
            lora_a,
            lora_b,
            scale,
            bias,
            rng,
            call.dropout_p,
            call.fan_in_fan_out,
            call.dtype,
            *call.packed,
        )
        if y is not None:
            return y
        if ops.is_transformed():
            return _composed(x, weight, lora_a, lora_b, scale, bias, rng, call)
        return _LoRALinear.apply(x, weight, lora_a, lora_b, scale, bias, rng, call)
    if ops.is_transformed():
        return _composed(x, weight, lora_a, lora_b, scale, bias, rng, call)
    y, _ = _forward(x, weight, lora_a, lora_b, scale, bias, rng, call)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def _composed(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    call: Call,
) -> Tensor:
    """y of plain torch operations, which every transformation knows: derivatives of any order,
    batches of anything."""
    rows, weight = rows_of(x, call.dtype), weight.to(call.dtype)
    with ops.without_autocast(x.device.type):
        y, _ = reference.lora_linear_fwd(
            rows, weight, lora_a, lora_b, scale, bias, rng, call.dropout_p, call.fan_in_fan_out
        )
    return y.reshape(*x.shape[:-1], y.shape[1])


def _beside(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    fan_in_fan_out: bool,
) -> Tensor:
    """y where only the class of ``weight`` knows its values: the base by ``F.linear``, the adapter
    beside it in plain torch operations."""
    y = F.linear(x, weight.t() if fan_in_fan_out else weight, bias)
    acc = torch.promote_types(y.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        rows = rows_of(x, acc)
        if dropout_p > 0.0:
            rows = reference.masked(rows, draw_rng(x.device) if rng is None else rng, dropout_p)
        s = rows @ lora_a.to(acc).t() * (scale.to(acc) / (1.0 - dropout_p))
        delta = s @ lora_b.to(acc).t()
    return y + delta.to(y.dtype).view(y.shape)


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor]:
    """y [M, N] and S [M, r]."""
    return ops.lora_linear_fwd(
        rows_of(x, call.dtype),
        weight if weight.dtype == call.dtype else weight.to(call.dtype),
        lora_a,
        lora_b,
        scale,
        bias,
        rng,
        call.dropout_p,
        call.fan_in_fan_out,
        packed=call.packed[0],
    )


def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, fan_in_fan_out: bool, packed: Tensor
) -> Tensor:
    """``x W^T + bias`` by the kernel of :func:`lora_linear` with an adapter of rank 0, without a
    graph: x [..., K] -> [..., N]."""
    k, n = weight.shape if fan_in_fan_out else weight.shape[::-1]
    y, _ = ops.lora_linear_fwd(
        rows_of(x, weight.dtype),
        weight,
        weight.new_empty(0, k),
        weight.new_empty(n, 0),
        torch.ones((), device="cpu"),
        bias,
        fan_in_fan_out=fan_in_fan_out,
        packed=packed,
    )
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


class _LoRALinear(torch.autograd.Function):
    """Forward and backward of one call. Saves x as given, S, and the parameters; never a mask or a
    copy of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        rng: Tensor | None,
        call: Call,
    ) -> Tensor:
        y, s = _forward(x, weight, lora_a, lora_b, scale, bias, rng, call)
        _, need_w, need_a, need_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if need_a or need_w else None,
            s if need_b else None,
            weight,
            lora_a,
            lora_b,
            scale,
            rng,
        )
        # Its packed weight is not among the saved tensors: a copy of one, which its owner keeps.
        ctx.call = call
        ctx.like_x = x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return result_of(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # What makes second derivatives an error is not free, and of use only where there is a graph
        # of the gradients.
        return _backward_once(ctx, grad) if torch.is_grad_enabled() else _backward(ctx, grad)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, s, weight, lora_a, lora_b, scale, rng = ctx.saved_tensors
    need_x, need_w, need_a, need_b, _, need_bias, *_ = ctx.needs_input_grad
    dropout_p, fan_in_fan_out, dtype, packed = ctx.call
    dy = rows_of(grad, dtype)
    rows = None if x is None else rows_of(x, dtype)
    dx = dw = da = db = dbias = d = None
    if need_x:
        dx, d = ops.lora_linear_dx(
            dy,
            weight if weight.dtype == dtype else weight.to(dtype),
            lora_a,
            lora_b,
            scale,
            rng,
            dropout_p,
            fan_in_fan_out,
            packed=packed[1],
        )
        x_shape, x_dtype = ctx.like_x
        if x_dtype != dtype:
            dx = dx.to(x_dtype)
        if len(x_shape) != 2:
            dx = dx.view(x_shape)
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
        # The base is frozen in LoRA training; for whoever trains it too, the library's GEMM is
        # the answer.
        dw = (rows.t() @ dy if fan_in_fan_out else dy.t() @ rows).to(weight.dtype)
    return (
        dx,
        dw,
        da if need_a else None,
        db if need_b else None,
        None,
        dbias if need_bias else None,
        None,
        None,
    )


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


def scale_tensor(scale: float | Tensor, device: torch.device, compute: torch.dtype) -> Tensor:
    """A scale as the operators take it: 0-d, on ``device``, without a gradient."""
    dtype = torch.float64 if compute == torch.float64 else torch.float32
    if not isinstance(scale, Tensor):
        if device.type == "cpu" and not ops.is_observed():
            return _cpu_scale(float(scale), dtype)
        # full() is a fill on the device; tensor() would be a copy that waits for it.
        return torch.full((), scale, dtype=dtype, device=device)
    if scale.dim() != 0 or not scale.is_floating_point():
        raise ValueError(
            "scale must be a float or a 0-d floating tensor, "
            f"not {scale.dtype} {tuple(scale.shape)}"
        )
    if scale.requires_grad:
        raise ValueError(
            "scale requires grad, and lora_linear has no gradient for it: pass scale.detach()"
        )
    if scale.dtype == dtype and scale.device == device:
        return scale
    return scale.to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=256)
def _cpu_scale(value: float, dtype: torch.dtype) -> Tensor:
    """Nobody gets it who would write to it."""
    # One made in inference mode could not be saved for a backward later.
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device="cpu")


def draw_rng(device: torch.device) -> Tensor:
    """(seed, offset, 0, 0) by one draw of the device's generator: graphs advance it and
    checkpointing replays it."""
    return F.pad(torch.randint(2**63 - 1, (2,), dtype=torch.int64, device=device), (0, 2))


def check_rng(rng: Tensor, device: torch.device) -> Tensor:
    if rng.dtype != torch.int64 or rng.shape != (4,) or rng.device != device:
        raise ValueError(
            f"rng must be int64 [4] = (seed, offset, row0, col0) on {device}, "
            f"not {rng.dtype} {tuple(rng.shape)} on {rng.device}"
        )
    return rng.contiguous()


def _is_plain(tensor: Any, device: torch.device) -> bool:
    return type(tensor) in ops.PLAIN and tensor.is_floating_point() and tensor.device == device


def _check_operands(x: Any, weight: Any, lora_a: Any, lora_b: Any, bias: Any) -> None:
    device = x.device if isinstance(x, Tensor) else None
    operands = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    for name, tensor in (operands if bias is None else operands | {"bias": bias}).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        check_local(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, not {tensor.dtype}")
        if tensor.device != device:
            empty = tensor.is_meta and name.startswith("lora")
            raise ValueError(
                f"{name} is on {tensor.device}, x on {device}"
                + ": it has no values; load them, or draw them by reset_lora_parameters()" * empty
            )


def _check(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    fan_in_fan_out: bool,
) -> torch.dtype:
    """Raise on a wrong call, else return the compute dtype."""
    # The usual case first: this is on the path of every call.
    if not (
        type(x) in ops.PLAIN
        and _is_plain(weight, device := x.device)
        and _is_plain(lora_a, device)
        and _is_plain(lora_b, device)
        and (bias is None or _is_plain(bias, device))
        and x.is_floating_point()
    ):
        _check_operands(x, weight, lora_a, lora_b, bias)
    if x.dim() < 1 or weight.dim() != 2 or lora_a.dim() != 2 or lora_b.dim() != 2:
        raise ValueError(
            "lora_linear wants x [..., K] and 2-D weight, lora_a, lora_b: "
            + _shapes(x=x, weight=weight, lora_a=lora_a, lora_b=lora_b)
        )
    n, k = weight.shape[::-1] if fan_in_fan_out else weight.shape
    r = lora_a.shape[0]
    if x.shape[-1] != k or lora_a.shape[1] != k or lora_b.shape[0] != n or lora_b.shape[1] != r:
        layout = "[K, N]" if fan_in_fan_out else "[N, K]"
        raise ValueError(
            f"x [..., K], weight {layout}, lora_a [r, K] and lora_b [N, r] do not fit: "
            + _shapes(x=x, weight=weight, lora_a=lora_a, lora_b=lora_b)
        )
    if r == 0:
        raise ValueError("the rank is 0: " + _shapes(lora_a=lora_a, lora_b=lora_b))
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [N] = [{n}], not {list(bias.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")
    return compute_dtype(x, weight)


def is_dtensor(tensor: Tensor) -> bool:
    """By name: the class lies in a package that takes a second to import."""
    return type(tensor).__name__ == "DTensor"


def is_foreign(tensor: Tensor) -> bool:
    """Whether a library gave this tensor another meaning (quantised weights): its class knows
    ``F.linear`` and none of our operators. Torch's own tracing and DTensor are no such library."""
    kind = type(tensor)
    return not (
        kind in ops.PLAIN
        or kind.__module__.startswith(
            ("torch._subclasses", "torch._functorch", "torch.distributed")
        )
    )


def check_local(name: str, tensor: Tensor) -> None:
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} is a DTensor, and LoRA is computed on local tensors: under fully_shard call "
            "the layer inside the sharded model's forward, which gathers its parameters; for "
            "tensor parallelism leave the adapted layers out of the plan, or pass each rank's own "
            "part (to_local())"
        )


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on, else the one that x and weight must share."""
    if ops.autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x is {x.dtype} and weight is {weight.dtype}: cast one of them, or use autocast"
        )
    return x.dtype


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
