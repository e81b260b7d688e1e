"""The reference of a mixture's experts: every row has the weight and the adapter of its own expert.

    forward    S[i] = scale x[i] A[e]^T                      e the expert of row i
               Y[i] = x[i] W[e]^T + S[i] B[e]^T + bias[e]
    backward   D[i] = scale dY[i] B[e]
               dX[i] = dY[i] W[e] + D[i] A[e]
               dA[e] = sum over rows of e: D[i]^T x[i]
               dB[e] = sum over rows of e: dY[i]^T S[i]

Rows are sorted by expert, ``offs`` says where each one's end; rows that belong to none have results
of zero. Dtypes and roundings are those of ``reference.py``, under whose name these functions are
found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .dtypes import accumulate_dtype, tail_dtype
from .four_bit import decode


def rows_of_experts(offs: Tensor) -> Iterator[tuple[int, slice]]:
    """The experts that have rows, each with its rows."""
    first = 0
    for expert, end in enumerate(offs.tolist()):
        if end > first:
            yield expert, slice(first, end)
        first = end


def expert_shrink(x: Tensor, lora_a: Tensor, scale: Tensor, offs: Tensor) -> Tensor:
    """x [M,K], lora_a [E,r,K] -> S [M,r] in x's ``tail_dtype``. D is the same function of dY and
    B^T."""
    acc, tail = accumulate_dtype(x.dtype), tail_dtype(x.dtype)
    s = x.new_zeros(x.shape[0], lora_a.shape[1], dtype=tail)
    for e, rows in rows_of_experts(offs):
        a = lora_a[e].to(tail).to(acc)
        s[rows] = (x[rows].to(acc) @ a.t() * scale.to(acc)).to(tail)
    return s


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
    """x [M,K], weight [E,N,K] (or [E,K,N]), bias [E,N] -> Y [M,N] in x's dtype, and S."""
    n = weight.shape[2 if fan_in_fan_out else 1] if lora_b is None else lora_b.shape[1]
    w = _matrices(weight, quant, quant_block, x.shape[1], n, not fan_in_fan_out, x.dtype)
    return _product(x, w, n, lora_a, lora_b, scale, offs, bias)


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
    """dy [M,N] -> dX [M,K] in dy's dtype, and D: the forward with its roles swapped."""
    k = weight.shape[1 if fan_in_fan_out else 2] if lora_a is None else lora_a.shape[2]
    w = _matrices(weight, quant, quant_block, dy.shape[1], k, fan_in_fan_out, dy.dtype)
    a, b = (None if t is None else t.transpose(1, 2) for t in (lora_b, lora_a))
    return _product(dy, w, k, a, b, scale, offs, None)


# The matrix [in, out] of an expert.
_Matrices = Callable[[int], Tensor]


def _matrices(
    weight: Tensor,
    quant: Sequence[Tensor] | None,
    quant_block: int,
    inner: int,
    outer: int,
    transposed: bool,
    dtype: torch.dtype,
) -> _Matrices:
    """Of a stack, or of its bytes, in ``dtype``; ``transposed``: each is stored as [out, in]."""
    shape = (outer, inner) if transposed else (inner, outer)

    def of_expert(e: int) -> Tensor:
        if quant is None:
            w = weight[e].to(dtype)
        else:
            w = decode(weight, list(quant), quant_block, shape, dtype, e * inner * outer)
        return w.t() if transposed else w

    return of_expert


def _product(
    x: Tensor,
    w: _Matrices,
    width: int,
    a: Tensor | None,
    b: Tensor | None,
    scale: Tensor,
    offs: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    acc, tail = accumulate_dtype(x.dtype), tail_dtype(x.dtype)
    s = x.new_zeros(x.shape[0], 0, dtype=tail)
    if a is not None:
        s = expert_shrink(x, a, scale, offs)
    y = x.new_zeros(x.shape[0], width)
    for e, rows in rows_of_experts(offs):
        product = x[rows].to(acc) @ w(e).to(acc)
        if b is not None:
            product = product + s[rows].to(acc) @ b[e].to(tail).to(acc).t()
        if bias is not None:
            product = product + bias[e].to(acc)
        y[rows] = product.to(x.dtype)
    return y, s


def expert_linear_dab(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    offs: Tensor,
    da_dtype: torch.dtype | None = None,
    db_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """dA [E,r,K] and dB [E,N,r], each in its given dtype; None: not asked for, as for
    ``lora_linear_dab``. An expert without rows has gradients of zero. dB lies in memory as PEFT
    stores B, [N,r,E]."""
    acc, experts = accumulate_dtype(dy.dtype), offs.shape[0]
    da, db = dy.new_empty(0), dy.new_empty(0)
    if da_dtype is not None:
        assert x is not None and d is not None
        da = dy.new_zeros(experts, d.shape[1], x.shape[1], dtype=da_dtype)
        for e, rows in rows_of_experts(offs):
            da[e] = d[rows].to(acc).t() @ x[rows].to(acc)
    if db_dtype is not None:
        assert s is not None
        db = dy.new_zeros(dy.shape[1], s.shape[1], experts, dtype=db_dtype).permute(2, 0, 1)
        for e, rows in rows_of_experts(offs):
            db[e] = dy[rows].to(acc).t() @ s[rows].to(acc)
    return da, db
