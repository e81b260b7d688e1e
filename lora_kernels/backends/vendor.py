"""The vendor plan: the library's GEMM, then the rank tail added in place. The floor under every
shape.

Same names, arguments and results as ``reference.py``, with two roundings more than the contract's
single one: the base product is rounded before the tail is added, and S before it is scaled. The
tail of float16 rows is float32 (``reference.tail_dtype``), and so is what it is added to.
``masked`` is the device's dropout kernel. For a batch that mixes adapters the library has the base
alone; ``onto`` is the device's kernel that adds the rest, and S is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.reference import scaled_rows, tail_dtype

Masked = Callable[[Tensor, Tensor, float], Tensor]
# Adds the adapters of a mixed batch to its first argument, and returns S or D.
Onto = Callable[..., Tensor]


def lora_shrink(
    x: Tensor,
    lora_a: Tensor,
    scale: Tensor,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    masked: Masked,
) -> Tensor:
    if rng is not None:
        x = masked(x, rng, dropout_p)
    tail = tail_dtype(x.dtype)
    s = torch.mm(x.to(tail), lora_a.to(tail).t())
    return s.mul_(scale / (1.0 - dropout_p) if dropout_p else scale)


def lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    out_scale: Tensor | None = None,
    packed: Tensor | None = None,
    *,
    masked: Masked,
) -> tuple[Tensor, Tensor]:
    s = lora_shrink(x, lora_a, scale, rng, dropout_p, masked=masked)
    inner_bias = None
    if bias is not None and out_scale is None and s.dtype == x.dtype:
        inner_bias = bias.to(x.dtype)
    y = F.linear(x, weight.t() if fan_in_fan_out else weight, inner_bias).to(s.dtype)
    y.addmm_(s, lora_b.to(s.dtype).t())
    if out_scale is not None:
        y.mul_(out_scale)
    if bias is not None and inner_bias is None:
        y.add_(bias)
    return y.to(x.dtype), s


def lora_linear_dx(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    out_scale: Tensor | None = None,
    packed: Tensor | None = None,
    *,
    masked: Masked,
) -> tuple[Tensor, Tensor]:
    rows = scaled_rows(dy, out_scale)
    d = lora_shrink(rows, lora_b.t(), scale, None, dropout_p, masked=masked)
    w = weight.t() if fan_in_fan_out else weight
    dx = torch.mm(rows, w.to(rows.dtype)).to(d.dtype)
    a = lora_a.to(d.dtype)
    if rng is None:
        dx.addmm_(d, a)
    else:
        dx.add_(masked(torch.mm(d, a), rng, dropout_p))
    return dx.to(dy.dtype), d


def lora_linear_dab(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    da_dtype: torch.dtype | None = None,
    db_dtype: torch.dtype | None = None,
    dbias_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
    *,
    masked: Masked,
) -> tuple[Tensor, Tensor, Tensor]:
    tail = tail_dtype(dy.dtype)
    da, db, dbias = (dy.new_empty(0) for _ in range(3))
    if da_dtype is not None:
        assert x is not None and d is not None
        mx = x if rng is None else masked(x, rng, dropout_p)
        da = torch.mm(d.to(tail).t(), mx.to(tail)).to(da_dtype)
    if db_dtype is not None:
        assert s is not None
        db = torch.mm(scaled_rows(dy, out_scale).to(tail).t(), s.to(tail)).to(db_dtype)
    if dbias_dtype is not None:
        dbias = dy.sum(0, dtype=torch.float32).to(dbias_dtype)
    return da, db, dbias


def segmented_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    bias: Tensor | None = None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    packed: Tensor | None = None,
    *,
    onto: Onto,
) -> tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.to(x.dtype)
    y = F.linear(x, weight.t() if fan_in_fan_out else weight, bias)
    return y, onto(y, x, lora_a, lora_b, table, packed_slices, rng, dropout_p)


def segmented_linear_dx(
    dy: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    packed: Tensor | None = None,
    *,
    onto: Onto,
) -> tuple[Tensor, Tensor]:
    dx = torch.mm(dy, weight.t() if fan_in_fan_out else weight)
    return dx, onto(dx, dy, lora_a, lora_b, table, packed_slices, rng, dropout_p)
