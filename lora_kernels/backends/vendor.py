"""The vendor plan: the library's GEMM, then the rank tail added in place. The floor under every
shape.

Same names, arguments and results as ``reference.py``, with two roundings more than the contract's
single one: the base product is rounded before the tail is added, and S before it is scaled. The
tail of float16 rows is float32 (``reference.tail_dtype``), and so is what it is added to.
``masked`` is the device's dropout kernel. For a batch that mixes adapters the library has the base
alone; ``onto`` is the device's kernel that adds the rest, and S is rounded once. A
four-bit weight is decoded to memory first. Of experts the library has a grouped GEMM where
``_groups`` says so, else a GEMM for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.experts import rows_of_experts
from ..spec.four_bit import base_weight, decode
from ..spec.linears import dab_by_projection, rng_of
from ..spec.reference import scaled_rows, tail_dtype

Masked = Callable[[Tensor, Tensor, float], Tensor]
# S of one x, or D of a list of gradients, of several projections: ``kernels.linears.lora_shrinks``.
Shrinks = Callable[..., Tensor]
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
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
    *,
    masked: Masked,
) -> tuple[Tensor, Tensor]:
    s = lora_shrink(x, lora_a, scale, rng, dropout_p, masked=masked)
    inner_bias = None
    if bias is not None and out_scale is None and s.dtype == x.dtype:
        inner_bias = bias.to(x.dtype)
    w = base_weight(
        weight, quant, quant_block, lora_b.shape[0], x.shape[1], fan_in_fan_out, x.dtype
    )
    y = F.linear(x, w, inner_bias).to(s.dtype)
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
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
    *,
    masked: Masked,
) -> tuple[Tensor, Tensor]:
    rows = scaled_rows(dy, out_scale)
    d = lora_shrink(rows, lora_b.t(), scale, None, dropout_p, masked=masked)
    n, k = dy.shape[1], lora_a.shape[1]
    w = base_weight(weight, quant, quant_block, n, k, fan_in_fan_out, rows.dtype)
    dx = torch.mm(rows, w).to(d.dtype)
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


def _stack(adapters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """A of all projections one over the other, [sum r_j, K], as the tail has it."""
    return torch.cat([a.to(dtype) for a in adapters])


def _scale_columns(s: Tensor, scales: Sequence[Tensor], ranks: Sequence[int], p: float) -> Tensor:
    for part, scale in zip(s.split(list(ranks), dim=1), scales, strict=True):
        part.mul_(scale / (1.0 - p) if p else scale)
    return s


def lora_linears_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    packed: Sequence[Tensor] | None = None,
    *,
    masked: Masked,
    shrinks: Shrinks | None = None,
) -> tuple[list[Tensor], Tensor]:
    ranks, tail = [len(a) for a in lora_a], tail_dtype(x.dtype)
    if shrinks is not None:
        s = shrinks([x], lora_a, scales, rng, dropout_p)
    elif rng is None:
        s = torch.mm(x.to(tail), _stack(lora_a, tail).t())
        _scale_columns(s, scales, ranks, dropout_p)
    else:
        parts = [
            lora_shrink(x, a, scale, rng_of(rng, j), dropout_p, masked=masked)
            for j, (a, scale) in enumerate(zip(lora_a, scales, strict=True))
        ]
        s = torch.cat(parts, dim=1)
    y = []
    for w, b, bias, s_j in zip(weights, lora_b, biases, s.split(ranks, dim=1), strict=True):
        inner = None if bias is None or s.dtype != x.dtype else bias.to(x.dtype)
        y_j = F.linear(x, w.t() if fan_in_fan_out else w, inner).to(tail)
        y_j.addmm_(s_j, b.to(tail).t())
        if bias is not None and inner is None:
            y_j.add_(bias)
        y.append(y_j.to(x.dtype))
    return y, s


def lora_linears_dx(
    dy: Sequence[Tensor],
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scales: Sequence[Tensor],
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    packed: Sequence[Tensor] | None = None,
    *,
    masked: Masked,
    shrinks: Shrinks | None = None,
) -> tuple[Tensor, Tensor]:
    """The library adds each product onto the ones before, in dX's dtype."""
    ranks, dtype = [len(a) for a in lora_a], dy[0].dtype
    tail = tail_dtype(dtype)
    if shrinks is not None:
        d = shrinks(dy, [b.t() for b in lora_b], scales, None, dropout_p)
    else:
        d = torch.cat(
            [torch.mm(t.to(tail), b.to(tail)) for t, b in zip(dy, lora_b, strict=True)], 1
        )
        _scale_columns(d, scales, ranks, dropout_p)
    w = [t.t() if fan_in_fan_out else t for t in weights]
    dx = torch.mm(dy[0], w[0]).to(tail)
    for rows, weight in zip(dy[1:], w[1:], strict=True):
        if tail == dtype:
            dx.addmm_(rows, weight)
        else:
            dx.add_(torch.mm(rows, weight))
    if rng is None:
        dx.addmm_(d, _stack(lora_a, tail))
    else:
        for j, (a, d_j) in enumerate(zip(lora_a, d.split(ranks, dim=1), strict=True)):
            own = rng_of(rng, j)
            assert own is not None
            dx.add_(masked(torch.mm(d_j, a.to(tail)), own, dropout_p))
    return dx.to(dtype), d


def lora_linears_dab(
    dy: Sequence[Tensor],
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    ranks: Sequence[int],
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    da_dtype: torch.dtype | None = None,
    db_dtype: torch.dtype | None = None,
    dbias_dtype: torch.dtype | None = None,
    *,
    masked: Masked,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    whole = da_dtype is not None and rng is None
    dab = functools.partial(lora_linear_dab, masked=masked)
    da, db, dbias = dab_by_projection(
        dab, dy, x, s, d, ranks, rng, dropout_p, None if whole else da_dtype, db_dtype, dbias_dtype
    )
    if whole:
        assert x is not None and d is not None
        # All of them in one product.
        stacked = torch.mm(d.t(), x.to(d.dtype))
        da = [t.to(da_dtype, copy=True) for t in stacked.split(list(ranks))]
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
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
    *,
    onto: Onto,
) -> tuple[Tensor, Tensor]:
    bias = None if bias is None else bias.to(x.dtype)
    n = sum([b.shape[1] for b in lora_b])
    w = base_weight(weight, quant, quant_block, n, x.shape[1], fan_in_fan_out, x.dtype)
    y = F.linear(x, w, bias)
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
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
    *,
    onto: Onto,
) -> tuple[Tensor, Tensor]:
    k = lora_a[0].shape[2]
    w = base_weight(weight, quant, quant_block, dy.shape[1], k, fan_in_fan_out, dy.dtype)
    dx = torch.mm(dy, w)
    return dx, onto(dx, dy, lora_a, lora_b, table, packed_slices, rng, dropout_p)


def _groups(rows: Tensor, *operands: Tensor) -> bool:
    """Whether the library's grouped GEMM takes these matrices, or stacks of them: bfloat16, whose
    rows or columns lie 16 bytes apart or a multiple of that."""
    return rows.dtype == torch.bfloat16 and all(
        t.numel() > 0
        and t.data_ptr() % 16 == 0
        and min(t.stride()[-2:]) == 1
        and not any(step * t.element_size() % 16 for step in t.stride() if step != 1)
        for t in (rows, *operands)
    )


def _of_experts(rows: Tensor, matrices: Tensor, offs: Tensor) -> Tensor:
    """rows [M, K] by the matrix [K, N] of each one's expert; zero where it has none. The rows of
    the result may lie 16 bytes apart."""
    if _groups(rows, matrices):
        y = F.grouped_mm(rows, matrices, offs=offs)
        # The library does not write them.
        none = torch.arange(len(rows), device=rows.device) >= offs[-1]
        return y.masked_fill_(none[:, None], 0.0)
    y = rows.new_zeros(len(rows), matrices.shape[2])
    for e, own in rows_of_experts(offs):
        torch.mm(rows[own], matrices[e], out=y[own])
    return y


def expert_shrink(x: Tensor, lora_a: Tensor, scale: Tensor, offs: Tensor) -> Tensor:
    return _shrink_of_experts(x, lora_a, scale, offs).contiguous()


def _shrink_of_experts(x: Tensor, lora_a: Tensor, scale: Tensor, offs: Tensor) -> Tensor:
    tail = tail_dtype(x.dtype)
    a = _as_matrices(lora_a.transpose(1, 2), tail)
    return _of_experts(x.to(tail), a, offs).mul_(scale)


def _as_matrices(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """``stack`` in ``dtype``, as matrices whose rows or columns are neighbours: PEFT's B is none,
    its experts are."""
    stack = stack.to(dtype)
    return stack if 1 in stack.stride()[1:] else stack.contiguous()


def expert_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor,
    offs: Tensor,
    bias: Tensor | None = None,
    fan_in_fan_out: bool = False,
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
) -> tuple[Tensor, Tensor]:
    w = _stack_of(weight, quant, quant_block, lora_a, lora_b, fan_in_fan_out, x.dtype)
    w = w if fan_in_fan_out else w.transpose(1, 2)
    y, s = _product_of_experts(x, w, lora_a, lora_b, scale, offs)
    if bias is not None:
        # Of the rows that belong to none the bias is zero, too.
        padded = F.pad(bias.to(y.dtype), (0, 0, 0, 1))
        rows = torch.arange(len(x), dtype=offs.dtype, device=x.device)
        y.add_(padded[torch.searchsorted(offs, rows, right=True)])
    return y.to(x.dtype).contiguous(), s


def expert_linear_dx(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor,
    offs: Tensor,
    fan_in_fan_out: bool = False,
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
) -> tuple[Tensor, Tensor]:
    w = _stack_of(weight, quant, quant_block, lora_a, lora_b, fan_in_fan_out, dy.dtype)
    w = w.transpose(1, 2) if fan_in_fan_out else w
    a, b = (None if t is None else t.transpose(1, 2) for t in (lora_b, lora_a))
    dx, d = _product_of_experts(dy, w, a, b, scale, offs)
    return dx.to(dy.dtype).contiguous(), d


def _stack_of(
    weight: Tensor,
    quant: Sequence[Tensor] | None,
    quant_block: int,
    a: Tensor | None,
    b: Tensor | None,
    fan_in_fan_out: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The weights of experts as they are stored, of four-bit ones decoded."""
    if quant is None:
        return weight
    assert a is not None and b is not None
    (experts, n, _), k = b.shape, a.shape[2]
    shape = (experts, k, n) if fan_in_fan_out else (experts, n, k)
    return decode(weight, list(quant), quant_block, shape, dtype)


def _product_of_experts(
    x: Tensor, w: Tensor, a: Tensor | None, b: Tensor | None, scale: Tensor, offs: Tensor
) -> tuple[Tensor, Tensor]:
    """Base and tail in the tail's dtype, and S; w is [E, in, out]."""
    tail = tail_dtype(x.dtype)
    y = _of_experts(x, _as_matrices(w, x.dtype), offs).to(tail)
    if a is None or b is None or b.shape[2] == 0:
        return y, x.new_empty(len(x), 0, dtype=tail)
    s = _shrink_of_experts(x, a, scale, offs)
    y.add_(_of_experts(s, _as_matrices(b.transpose(1, 2), tail), offs))
    return y, s.contiguous()


def expert_linear_dab(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    offs: Tensor,
    da_dtype: torch.dtype | None = None,
    db_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    da, db, tail = dy.new_empty(0), dy.new_empty(0), tail_dtype(dy.dtype)
    if da_dtype is not None:
        assert x is not None and d is not None
        da = _sums_of_experts(d, x.to(tail), offs).to(da_dtype).contiguous()
    if db_dtype is not None:
        assert s is not None
        # As PEFT stores it.
        db = _sums_of_experts(dy.to(tail), s, offs).to(db_dtype)
        db = db.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return da, db


def _sums_of_experts(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """left^T right over the rows of each expert: [E, columns of left, columns of right]."""
    if _groups(left, right):
        unused = offs.diff(prepend=offs.new_zeros(1)) == 0
        sums = F.grouped_mm(left.t(), right, offs=offs)
        return sums.masked_fill_(unused[:, None, None], 0.0)
    sums = left.new_zeros(len(offs), left.shape[1], right.shape[1])
    for e, own in rows_of_experts(offs):
        torch.mm(left[own].t(), right[own], out=sums[e])
    return sums
