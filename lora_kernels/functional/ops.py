"""The operators: registration, fakes, and which function answers on which device.

``spec/operators.py`` has their arguments. They are below autograd and autocast, which ``linear.py``
and ``segmented.py`` bring. The backend of the device answers on CPU and CUDA tensors, else
``reference.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import cpu, cuda
from ..planning import answers
from ..planning.config import Config
from ..spec import reference
from ..spec.linears import reference_of
from ..spec.operators import EXPERT_OPERATORS as EXPERT_OPERATORS
from ..spec.operators import LINEARS_OPERATORS as LINEARS_OPERATORS
from ..spec.operators import OPERATORS as OPERATORS
from ..spec.operators import SCHEMAS, of_operator
from ..spec.operators import SEGMENTED_OPERATORS as SEGMENTED_OPERATORS
from ..spec.problem import PROBLEM_OF, rows_of, sizes, sizes_of_experts, sizes_of_linears

# Tensors that no subclass gives another meaning.
PLAIN = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("lora_kernels", "DEF")


def autocast_enabled(device_type: str) -> bool:
    if device_type in ("cpu", "cuda"):
        return torch.is_autocast_enabled(device_type)
    # Torch raises for a device that knows no autocast, such as meta.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    if autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def records_gradients() -> bool:
    """Whether a graph is recorded: in inference mode gradients may be enabled, to no effect."""
    # Dynamo does not know the second question.
    return torch.is_grad_enabled() and (
        torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()
    )


def _reference_answer(op: str, *args: Any, **kwargs: Any) -> Any:
    answers.record("reference", Config("reference"), PROBLEM_OF[op](*args, **kwargs))
    return reference_of(op)(*args, **kwargs)


def _below_autograd(op: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """``answer`` for one operator, with autograd and autocast off: no graph and no cast reaches
    inside a backend."""

    def implementation(*args: Any, **kwargs: Any) -> Any:
        rows = args[0] if isinstance(args[0], Tensor) else args[0][0]
        device_type = rows.device.type
        if autocast_enabled(device_type):
            with torch.no_grad(), torch.autocast(device_type, enabled=False):
                return answer(op, *args, **kwargs)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return answer(op, *args, **kwargs)
        return answer(op, *args, **kwargs)

    return implementation


for _op, _schema in SCHEMAS.items():
    _library.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_op, _below_autograd(_op, _reference_answer), "CompositeExplicitAutograd")
    _library.impl(_op, _below_autograd(_op, cpu.answer), "CPU")
    _library.impl(_op, _below_autograd(_op, cuda.answer), "CUDA")


def is_observed() -> bool:
    """True under torch.compile, a dispatch mode, torch.func, forward-mode derivatives or
    torch.jit.trace."""
    return (
        # Other compilers have a dispatch mode.
        torch.compiler.is_dynamo_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def is_transformed() -> bool:
    """True under ``torch.func`` and forward-mode derivatives, which know no operator of ours."""
    # Dynamo follows torch.func, and knows nothing of the other.
    return torch._C._are_functorch_transforms_active() or (
        forward_ad._current_level >= 0 and not torch.compiler.is_dynamo_compiling()
    )


def _direct(op: str) -> Callable[..., Any]:
    """The operator ``op``. A call that nothing observes, with plain rows on a CPU, goes at once
    where the dispatcher would bring it: its way costs more than a small layer's products."""
    overload = getattr(torch.ops.lora_kernels, op).default
    below_autograd = _below_autograd(op, cpu.answer)

    def call(*args: Any, **kwargs: Any) -> Any:
        if is_observed() or not args or type(args[0]) not in PLAIN or not args[0].is_cpu:
            return overload(*args, **kwargs)
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return below_autograd(*args, **kwargs)
        return cpu.answer(op, *args, **kwargs)

    call.__name__ = op
    return call


lora_shrink = _direct("lora_shrink")
lora_linear_fwd = _direct("lora_linear_fwd")
lora_linear_dx = _direct("lora_linear_dx")
lora_linear_dab = _direct("lora_linear_dab")
lora_linears_fwd = _direct("lora_linears_fwd")
lora_linears_dx = _direct("lora_linears_dx")
lora_linears_dab = _direct("lora_linears_dab")
segmented_shrink = _direct("segmented_shrink")
segmented_expand_ = _direct("segmented_expand_")
segmented_lora = _direct("segmented_lora")
segmented_lora_ = _direct("segmented_lora_")
segmented_linear_fwd = _direct("segmented_linear_fwd")
segmented_linear_dx = _direct("segmented_linear_dx")
segmented_lora_dx = _direct("segmented_lora_dx")
segmented_lora_dab = _direct("segmented_lora_dab")
expert_shrink = _direct("expert_shrink")
expert_linear_fwd = _direct("expert_linear_fwd")
expert_linear_dx = _direct("expert_linear_dx")
expert_linear_dab = _direct("expert_linear_dab")


def _new_delta(s: Tensor, lora_b: Sequence[Tensor]) -> Tensor:
    return s.new_zeros(s.shape[0], sum([b.shape[1] for b in lora_b]))


def segmented_expand(s: Tensor, lora_b: Sequence[Tensor], table: Sequence[Tensor]) -> Tensor:
    """``segmented_expand_`` onto zeros in the dtype of S."""
    delta = _new_delta(s, lora_b)
    segmented_expand_(delta, s, lora_b, table)
    return delta


_library.define(
    "segmented_expand(Tensor s, Tensor[] lora_b, Tensor[] table) -> Tensor delta",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("segmented_expand", segmented_expand, "CompositeExplicitAutograd")
torch.library.register_fake(
    "lora_kernels::segmented_expand", lambda s, lora_b, table: _new_delta(s, lora_b), lib=_library
)


def direct_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *rest: Any,
) -> Tensor | None:
    """:func:`cpu.lora_linear`: forward and backward as one node of the graph. None where that node
    is not to be had: the call is observed, the weight trains, the tensors are not plain ones of a
    CPU, or another plan answers."""
    if (
        is_observed()
        or not x.is_cpu
        or weight.requires_grad
        or not (type(x) in PLAIN and type(weight) in PLAIN)
        or not (type(lora_a) in PLAIN and type(lora_b) in PLAIN)
        or not (bias is None or type(bias) in PLAIN)
    ):
        return None
    return cpu.lora_linear(x, weight, lora_a, lora_b, scale, bias, *rest)


def _fake(op: str, given: dict[str, Any]) -> Any:
    """Empty results of an operator, by its family."""
    if op.endswith("_"):
        return None
    rows = rows_of(given)
    m, n, k, r, slices = sizes(rows, given)
    shape = (m, slices, r) if "table" in given else (m, r)
    tail = rows.new_empty(shape, dtype=reference.tail_dtype(rows.dtype))
    if op.endswith("shrink"):
        return tail
    return rows.new_empty(m, k if op.endswith("dx") else n), tail


def _fake_lora_linear_dab(op: str, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    _, n, k, r, _ = sizes(given["dy"], given)

    def gradient(name: str, *shape: int) -> Tensor:
        dtype: torch.dtype | None = given[name]
        empty: Tensor = given["dy"].new_empty(shape if dtype else 0, dtype=dtype)
        return empty

    return gradient("da_dtype", r, k), gradient("db_dtype", n, r), gradient("dbias_dtype", n)


def _fake_segmented_lora_dab(op: str, given: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    _, _, k, r, n = sizes(given["dy"], given)
    slots, new = given["table"][1].shape[0], given["dy"].new_empty
    da: list[Tensor] = []
    db: list[Tensor] = []
    if given["da_dtype"] is not None:
        stacks, rows = (1, n * r) if given["packed_slices"] else (n, r)
        da = [new(slots, rows, k, dtype=given["da_dtype"]) for _ in range(stacks)]
    if given["db_dtype"] is not None:
        db = [new(slots, width, r, dtype=given["db_dtype"]) for width in given["widths"]]
    return da, db


def _fake_linears(op: str, given: dict[str, Any]) -> Any:
    rows, m, k, widths, ranks = sizes_of_linears(given)
    new = rows.new_empty
    tail = new(m, sum(ranks), dtype=reference.tail_dtype(rows.dtype))
    if op == "lora_linears_fwd":
        return [new(m, n) for n in widths], tail
    if op == "lora_linears_dx":
        return new(m, k), tail
    da, db, dbias = (given[name] for name in ("da_dtype", "db_dtype", "dbias_dtype"))
    return (
        [new(r, k, dtype=da) for r in ranks if da is not None],
        [new(n, r, dtype=db) for n, r in zip(widths, ranks, strict=True) if db is not None],
        [new(n, dtype=dbias) for n in widths if dbias is not None],
    )


def _fake_expert(op: str, given: dict[str, Any]) -> Any:
    rows, (m, n, k, r, _) = rows_of(given), sizes_of_experts(given)
    tail = rows.new_empty(m, r, dtype=reference.tail_dtype(rows.dtype))
    columns = k if op == "expert_linear_dx" else n
    return tail if op == "expert_shrink" else (rows.new_empty(m, columns), tail)


def _fake_expert_linear_dab(op: str, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    dy, (_, n, k, r, experts) = given["dy"], sizes_of_experts(given)
    shapes = {"da_dtype": (experts, r, k), "db_dtype": (n, r, experts)}
    da, db = (
        dy.new_empty(shape if given[name] else 0, dtype=given[name])
        for name, shape in shapes.items()
    )
    return da, db.permute(2, 0, 1) if given["db_dtype"] else db


_FAKES: dict[str, Callable[..., Any]] = {
    "lora_linear_dab": _fake_lora_linear_dab,
    "segmented_lora_dab": _fake_segmented_lora_dab,
    **dict.fromkeys(EXPERT_OPERATORS, _fake_expert),
    "expert_linear_dab": _fake_expert_linear_dab,
    **dict.fromkeys(LINEARS_OPERATORS, _fake_linears),
}

for _op in SCHEMAS:
    _fake_of_op = of_operator(_op, _FAKES.get(_op, _fake))
    torch.library.register_fake(f"lora_kernels::{_op}", _fake_of_op, lib=_library)
