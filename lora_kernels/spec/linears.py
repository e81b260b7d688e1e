"""The reference of projections that share an input (q, k, v; gate, up): each as in
``reference.py``, one dX for all of them.

    S_j  = c_j (mask_j*x) A_j^T                     [M, r_j]   side by side in S
    Y_j  = x W_j^T + S_j B_j^T + bias_j             [M, N_j]
    D_j  = c_j dY_j B_j                             [M, r_j]   side by side in D
    dX   = sum_j dY_j W_j + mask_j*(D_j A_j)        [M, K]     one rounding
    dA_j = D_j^T (mask_j*x),  dB_j = dY_j^T S_j,  dbias_j = sum_rows dY_j

Projection j draws its mask with the offset of ``rng`` + j.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference


def reference_of(op: str) -> Callable[..., Any]:
    """The reference of any operator."""
    found: Callable[..., Any] = globals().get(op) or getattr(reference, op)
    return found


def rng_of(rng: Tensor | None, j: int) -> Tensor | None:
    """The ``rng`` of projection j."""
    if rng is None or j == 0:
        return rng
    return rng + torch.nn.functional.pad(rng.new_full((1,), j), (1, 2))


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
) -> tuple[list[Tensor], Tensor]:
    """x [M,K] -> Y_j [M,N_j] in x's dtype and S [M, sum r_j] in its ``tail_dtype``."""
    y, s = [], []
    for j, operands in enumerate(zip(weights, lora_a, lora_b, scales, biases, strict=True)):
        y_j, s_j = reference.lora_linear_fwd(
            x, *operands, rng_of(rng, j), dropout_p, fan_in_fan_out
        )
        y.append(y_j)
        s.append(s_j)
    return y, torch.cat(s, dim=1)


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
) -> tuple[Tensor, Tensor]:
    """dY_j [M,N_j] -> dX [M,K] in their dtype and D [M, sum r_j] in its ``tail_dtype``."""
    acc = reference.accumulate_dtype(dy[0].dtype)
    dx = dy[0].new_zeros(dy[0].shape[0], lora_a[0].shape[1], dtype=acc)
    ds = []
    for j, (rows, w, a, b, scale) in enumerate(
        zip(dy, weights, lora_a, lora_b, scales, strict=True)
    ):
        d = reference.lora_shrink(rows, b.t(), scale, None, dropout_p)
        tail = d.to(acc) @ a.to(d.dtype).to(acc)
        if rng is not None:
            tail = reference.masked(tail, rng_of(rng, j), dropout_p)  # type: ignore[arg-type]
        dx += rows.to(acc) @ (w.t() if fan_in_fan_out else w).to(acc) + tail
        ds.append(d)
    return dx.to(dy[0].dtype), torch.cat(ds, dim=1)


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
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """dA_j [r_j,K], dB_j [N_j,r_j] and dbias_j [N_j], each in its given dtype; a dtype of None: not
    asked for, an empty list, and x and d (for dA) or s (for dB) may then be None."""
    return dab_by_projection(
        reference.lora_linear_dab, dy, x, s, d, ranks, rng, dropout_p,
        da_dtype, db_dtype, dbias_dtype,
    )  # fmt: skip


def dab_by_projection(
    dab: Callable[..., tuple[Tensor, Tensor, Tensor]],
    dy: Sequence[Tensor],
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    ranks: Sequence[int],
    rng: Tensor | None,
    dropout_p: float,
    *dtypes: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """:func:`lora_linears_dab` by a ``lora_linear_dab`` for each projection."""
    found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    nothing: list[Tensor | None] = [None] * len(dy)
    for j, (rows, s_j, d_j) in enumerate(
        zip(
            dy,
            nothing if s is None else s.split(list(ranks), dim=1),
            nothing if d is None else d.split(list(ranks), dim=1),
            strict=True,
        )
    ):
        results = dab(rows, x, s_j, d_j, rng_of(rng, j), dropout_p, *dtypes)
        for gradients, gradient, dtype in zip(found, results, dtypes, strict=True):
            if dtype is not None:
                gradients.append(gradient)
    return found
