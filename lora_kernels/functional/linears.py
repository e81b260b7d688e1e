"""``lora_linears``: several adapted projections of one input as one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..spec.linears import rng_of
from . import ops
from .checks import check, check_rng, is_foreign, scale_tensor
from .linear import Operands, checked_lora_linear, draw_rng, result_of, rows_of


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: float | Tensor | Sequence[float | Tensor] = 1.0,
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    fan_in_fan_out: bool = False,
    rng: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """:func:`lora_kernels.lora_linear` of one x with several weights and adapters: q, k and v, or
    gate and up.

    All adapters are shrunk at once, x is saved once, and the backward adds up one dX.

    Args:
        x: [..., K], as for ``lora_linear``.
        weights: n of [N_j, K] in x's dtype, or [K, N_j] with ``fan_in_fan_out``.
        lora_a: n of [r_j, K], lora_b: n of [N_j, r_j]. Widths and ranks may differ.
        scales: one for all, or one for each: floats or 0-d tensors.
        biases: None, or for each projection [N_j] or None.
        dropout_p, training: as for ``lora_linear``; every projection has a mask of its own, as
            separate layers have.
        rng: as for ``lora_linear``; projection j draws with the offset + j.

    Returns:
        n tensors [..., N_j] in the compute dtype.

    Saved for backward are x as it was given and S [M, sum r_j]. A projection whose result nothing
    depends on gets no gradients, as a separate layer would.

    Raises:
        ValueError, TypeError: as for ``lora_linear``, with the number of the projection; or the
            lists differ in length or are empty.

    >>> import torch
    >>> x, w = torch.eye(2), torch.zeros(3, 2)
    >>> a, b = torch.ones(1, 2), torch.ones(3, 1)
    >>> q, k = lora_linears(x, [w, w[:1]], [a, a], [b, b[:1]], scales=[0.5, 2.0])
    >>> q[0], k[0]
    (tensor([0.5000, 0.5000, 0.5000]), tensor([2.]))
    """
    n = len(weights)
    each = scales if isinstance(scales, (list, tuple)) else [scales] * n
    own_biases = [None] * n if biases is None else biases
    lengths = [n, len(lora_a), len(lora_b), len(each), len(own_biases)]
    if n == 0 or len(set(lengths)) > 1:
        raise ValueError(
            "lora_linears wants as many weights as lora_a, lora_b, scales and biases, at least "
            f"one: {lengths}"
        )
    operands = []
    if not training or dropout_p == 0.0:
        rng, dropout_p = None, 0.0
    elif rng is not None:
        rng = check_rng(rng, x.device)
    for j, (weight, a, b, scale, bias) in enumerate(
        zip(weights, lora_a, lora_b, each, own_biases, strict=True)
    ):
        try:
            dtype = check(x, weight, a, b, bias, dropout_p, fan_in_fan_out)
            scale = scale_tensor(scale, x.device, dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"projection {j}: {error}") from None
        operands.append(
            Operands(x, weight, a, b, scale, bias, None, dropout_p, fan_in_fan_out, dtype)
        )
    return checked_lora_linears(operands, rng)


def checked_lora_linears(operands: Sequence[Operands], rng: Tensor | None) -> tuple[Tensor, ...]:
    """:func:`lora_linears` of checked operands that share x, the dropout, the orientation and the
    dtype; their own ``rng`` is not read. With dropout and without ``rng`` it draws one."""
    first = operands[0]
    x = first.x
    if first.dropout_p > 0.0 and rng is None:
        rng = draw_rng(x.device)
    if ops.is_transformed() or any(
        type(o.weight) not in ops.PLAIN and is_foreign(o.weight) for o in operands
    ):
        return tuple(
            checked_lora_linear(o._replace(rng=rng_of(rng, j))) for j, o in enumerate(operands)
        )
    packed, packed_dx = [o.packed for o in operands], [o.packed_dx for o in operands]
    call = Call(
        len(operands), first.dropout_p, first.fan_in_fan_out, first.dtype,
        None if any(t is None for t in packed) else packed,
        None if any(t is None for t in packed_dx) else packed_dx,
    )  # fmt: skip
    # weights, A, B, scales and biases, n of each.
    tensors: list[Any] = [o[name] for name in range(1, 6) for o in operands]
    if ops.records_gradients() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        y: tuple[Tensor, ...] = _LoRALinears.apply(x, rng, call, *tensors)
        return y
    ys, _ = _forward(x, rng, call, tensors)
    return tuple(y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]) for y in ys)


class Call(NamedTuple):
    """What a call is besides its differentiable inputs and ``rng``."""

    n: int
    dropout_p: float
    fan_in_fan_out: bool
    # the compute dtype
    dtype: torch.dtype
    packed: list[Any] | None
    packed_dx: list[Any] | None


def _lists(call: Call, tensors: Sequence[Any]) -> list[list[Any]]:
    """weights (in the compute dtype), A, B, scales and biases."""
    n = call.n
    lists = [[*tensors[i : i + n]] for i in range(0, len(tensors), n)]
    lists[0] = [w if w.dtype == call.dtype else w.to(call.dtype) for w in lists[0]]
    return lists


def _forward(
    x: Tensor, rng: Tensor | None, call: Call, tensors: Sequence[Any]
) -> tuple[list[Tensor], Tensor]:
    """Y_j [M, N_j] and S."""
    found: tuple[list[Tensor], Tensor] = ops.lora_linears_fwd(
        rows_of(x, call.dtype), *_lists(call, tensors),
        rng, call.dropout_p, call.fan_in_fan_out, call.packed,
    )  # fmt: skip
    return found


class _LoRALinears(torch.autograd.Function):
    """Forward and backward of one call. Saves x as given, once, S, and the parameters."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rng: Tensor | None, call: Call, *tensors: Any
    ) -> tuple[Tensor, ...]:
        n = call.n
        y, s = _forward(x, rng, call, tensors)
        need = ctx.needs_input_grad[3:]
        ctx.need_w, ctx.need_a, ctx.need_b, _, ctx.need_bias = (
            any(need[i : i + n]) for i in range(0, 5 * n, n)
        )
        kept = x if ctx.need_a or ctx.need_w else None, s if ctx.need_b else None
        ctx.save_for_backward(*kept, rng, *tensors[: 4 * n])
        ctx.call, ctx.x_shape = call, x.shape
        ctx.bias_dtypes = [None if t is None else t.dtype for t in tensors[4 * n :]]
        # A result that nothing depends on has no gradient, and its adapter none.
        ctx.set_materialize_grads(False)
        return tuple(result_of(x, each) for each in y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, s, rng, *tensors = ctx.saved_tensors
        call: Call = ctx.call
        n = call.n
        weights, a, b, scales = _lists(call, tensors)
        given = [g for g in grads if g is not None]
        if not given:
            return (None,) * (3 + 5 * n)
        m = rows_of(given[0], call.dtype).shape[0]
        dy = [
            given[0].new_zeros(m, t.shape[0], dtype=call.dtype)
            if g is None
            else rows_of(g, call.dtype)
            for g, t in zip(grads, b, strict=True)
        ]
        rows = None if x is None else rows_of(x, call.dtype)
        dx = d = None
        if ctx.needs_input_grad[0]:
            dx, d = ops.lora_linears_dx(
                dy, weights, a, b, scales, rng, call.dropout_p, call.fan_in_fan_out, call.packed_dx
            )
            dx = dx.view(ctx.x_shape)
        elif ctx.need_a:
            parts = [
                ops.lora_shrink(each, t.t(), scale, None, call.dropout_p)
                for each, t, scale in zip(dy, b, scales, strict=True)
            ]
            d = torch.cat(parts, dim=1)
        da: Any = None
        db: Any = None
        dbias: Any = None
        if ctx.need_a or ctx.need_b or ctx.need_bias:
            da, db, dbias = ops.lora_linears_dab(
                dy,
                rows if ctx.need_a else None,
                s if ctx.need_b else None,
                d if ctx.need_a else None,
                [t.shape[0] for t in a],
                rng,
                call.dropout_p,
                a[0].dtype if ctx.need_a else None,
                b[0].dtype if ctx.need_b else None,
                next(t for t in ctx.bias_dtypes if t is not None) if ctx.need_bias else None,
            )
        dw: Any = None
        if ctx.need_w and rows is not None:
            # LoRA freezes the base; where it trains too, the library's GEMM computes its gradient.
            dw = [rows.t() @ t if call.fan_in_fan_out else t.t() @ rows for t in dy]
        found = [None] * n
        need = ctx.needs_input_grad[3:]
        columns = [dw or found, da or found, db or found, found, dbias or found]
        gradients = [t for column in columns for t in column]
        for i, wanted in enumerate(need):
            if not wanted or grads[i % n] is None:
                gradients[i] = None
        return (dx, None, None, *gradients)
