"""The operators: schemas, fakes, and which function answers on which device: the contract.

All operators are functional, take 2-D rows of any strides, and stand below autograd and autocast:
``linear.py`` and ``segmented.py`` bring both. On CPU and CUDA tensors the backend of that device
answers; everywhere else ``reference.py`` does.

    x, dy      [M, K], [M, N]  the rows; their dtype (float16, bfloat16, float32, float64) is the
                               compute dtype
    weight     [N, K]          in the compute dtype; [K, N] with ``fan_in_fan_out``
    lora_a     [r, K]          r >= 1; any floating dtype, rounded on use to the dtype of s and d
    lora_b     [N, r]          likewise
    s, d       [M, r]          in ``reference.tail_dtype`` of the compute dtype
    scale      []              float32 (float64 for float64 rows) on the rows' device
    bias       [N]             any floating dtype
    rng        int64 [4]       (seed, offset, row0, col0) on the rows' device; None: no mask. The
                               GPU's kernels draw eight columns at once: col0 a multiple of 8
    out_scale  [N]             multiplies x W^T + S B^T before the bias (DoRA)

The segmented operators take, one tensor for each of n slices,

    lora_a     [S, r_max, K]   A of every slot; or, with ``packed_slices`` = n, one [S, n*r_max, K]
                               packed by live rank
    lora_b     [S, N_j, r_max]
    table                      ``SegmentTable.tensors()``
    y, dy      [M, sum N_j]    the slices side by side
    s, d       [M, n, r_max]   zero beyond the live rank

    weight                     [sum N_j, K], the slices one below the other

    packed                     the weight in the layout of the CPU's kernels, which read it in the
                               weight's place; the other kernels ignore it and read weight
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import cpu, cuda
from ..planning import answers
from ..planning.config import Config
from ..spec import reference
from ..spec.problem import PROBLEM_OF

_DROPOUT = "Tensor? rng=None, float dropout_p=0.0"
_ADAPTED = "Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scale"
_BASE = "bool fan_in_fan_out=False, Tensor? out_scale=None, Tensor? packed=None"
_GRADIENTS = "ScalarType? da_dtype=None, ScalarType? db_dtype=None, ScalarType? dbias_dtype=None"

_TABLE = "Tensor[] table, int packed_slices=0"
_SEGMENTED = f"Tensor[] lora_a, Tensor[] lora_b, {_TABLE}"
_SEGMENTED_BASE = "bool fan_in_fan_out=False, Tensor? packed=None"

_SCHEMAS = {
    "lora_shrink": f"(Tensor x, Tensor lora_a, Tensor scale, {_DROPOUT}) -> Tensor s",
    "lora_linear_fwd": (
        f"(Tensor x, {_ADAPTED}, Tensor? bias=None, {_DROPOUT}, {_BASE}) -> (Tensor y, Tensor s)"
    ),
    "lora_linear_dx": f"(Tensor dy, {_ADAPTED}, {_DROPOUT}, {_BASE}) -> (Tensor dx, Tensor d)",
    "lora_linear_dab": (
        f"(Tensor dy, Tensor? x, Tensor? s, Tensor? d, {_DROPOUT}, {_GRADIENTS}, "
        "Tensor? out_scale=None) -> (Tensor da, Tensor db, Tensor dbias)"
    ),
    "segmented_shrink": f"(Tensor x, Tensor[] lora_a, {_TABLE}, {_DROPOUT}) -> Tensor s",
    "segmented_expand": "(Tensor s, Tensor[] lora_b, Tensor[] table) -> Tensor delta",
    "segmented_expand_": "(Tensor(a!) y, Tensor s, Tensor[] lora_b, Tensor[] table) -> ()",
    "segmented_lora": f"(Tensor x, {_SEGMENTED}, {_DROPOUT}) -> (Tensor delta, Tensor s)",
    "segmented_lora_": f"(Tensor(a!) y, Tensor x, {_SEGMENTED}) -> ()",
    "segmented_lora_dx": f"(Tensor dy, {_SEGMENTED}, {_DROPOUT}) -> (Tensor dx, Tensor d)",
    "segmented_linear_fwd": (
        f"(Tensor x, Tensor weight, {_SEGMENTED}, Tensor? bias=None, {_DROPOUT}, {_SEGMENTED_BASE})"
        " -> (Tensor y, Tensor s)"
    ),
    "segmented_linear_dx": (
        f"(Tensor dy, Tensor weight, {_SEGMENTED}, {_DROPOUT}, {_SEGMENTED_BASE}) "
        "-> (Tensor dx, Tensor d)"
    ),
    "segmented_lora_dab": (
        "(Tensor dy, Tensor? x, Tensor? s, Tensor? d, Tensor[] table, int[] widths, int r_max, "
        f"int packed_slices=0, {_DROPOUT}, ScalarType? da_dtype=None, ScalarType? db_dtype=None) "
        "-> (Tensor[] da, Tensor[] db)"
    ),
}

OPERATORS = tuple(op for op in _SCHEMAS if not op.startswith("segmented"))
SEGMENTED_OPERATORS = tuple(op for op in _SCHEMAS if op.startswith("segmented"))

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
    return getattr(reference, op)(*args, **kwargs)


def _below_autograd(op: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """``answer`` for one operator, with autograd and autocast off: no graph and no cast reaches
    inside a backend."""

    def implementation(*args: Any, **kwargs: Any) -> Any:
        device_type = args[0].device.type
        if autocast_enabled(device_type):
            with torch.no_grad(), torch.autocast(device_type, enabled=False):
                return answer(op, *args, **kwargs)
        if torch.is_grad_enabled():
            with torch.no_grad():
                return answer(op, *args, **kwargs)
        return answer(op, *args, **kwargs)

    return implementation


for _op, _schema in _SCHEMAS.items():
    _library.define(_op + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_op, _below_autograd(_op, _reference_answer), "CompositeExplicitAutograd")
    _library.impl(_op, _below_autograd(_op, cpu.answer), "CPU")
    _library.impl(_op, _below_autograd(_op, cuda.answer), "CUDA")

lora_shrink = torch.ops.lora_kernels.lora_shrink.default
lora_linear_fwd = torch.ops.lora_kernels.lora_linear_fwd.default
lora_linear_dx = torch.ops.lora_kernels.lora_linear_dx.default
lora_linear_dab = torch.ops.lora_kernels.lora_linear_dab.default
segmented_shrink = torch.ops.lora_kernels.segmented_shrink.default
segmented_expand = torch.ops.lora_kernels.segmented_expand.default
segmented_expand_ = torch.ops.lora_kernels.segmented_expand_.default
segmented_lora = torch.ops.lora_kernels.segmented_lora.default
segmented_lora_ = torch.ops.lora_kernels.segmented_lora_.default
segmented_linear_fwd = torch.ops.lora_kernels.segmented_linear_fwd.default
segmented_linear_dx = torch.ops.lora_kernels.segmented_linear_dx.default
segmented_lora_dx = torch.ops.lora_kernels.segmented_lora_dx.default
segmented_lora_dab = torch.ops.lora_kernels.segmented_lora_dab.default


def is_observed() -> bool:
    """Whether somebody looks at the calls that a program makes, or changes what they mean: a
    compiler, a mode, a transformation, a trace."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def is_transformed() -> bool:
    """Whether ``torch.func`` or a forward-mode derivative is at work, which know no operator of
    ours."""
    # Dynamo follows torch.func, and knows nothing of the other.
    return torch._C._are_functorch_transforms_active() or (
        not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    )


def _direct(op: str) -> Callable[..., Any]:
    """The functional operator ``op``. A call that nobody observes, with rows on a CPU, goes at once
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


direct_lora_shrink = _direct("lora_shrink")
direct_lora_linear_fwd = _direct("lora_linear_fwd")
direct_lora_linear_dx = _direct("lora_linear_dx")
direct_lora_linear_dab = _direct("lora_linear_dab")


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
    is not to be had: somebody observes, the weight trains, the tensors are not plain ones of a
    CPU, or another plan answers."""
    if (
        is_observed()
        or forward_ad._current_level >= 0
        or not x.is_cpu
        or weight.requires_grad
        or not (type(x) in PLAIN and type(weight) in PLAIN)
        or not (type(lora_a) in PLAIN and type(lora_b) in PLAIN)
        or not (bias is None or type(bias) in PLAIN)
    ):
        return None
    return cpu.lora_linear(x, weight, lora_a, lora_b, scale, bias, *rest)


def _tail_of(rows: Tensor, *sizes: int) -> Tensor:
    """S or D [M, *sizes]."""
    return rows.new_empty(rows.shape[0], *sizes, dtype=reference.tail_dtype(rows.dtype))


@torch.library.register_fake("lora_kernels::lora_shrink", lib=_library)
def _(
    x: Tensor, lora_a: Tensor, scale: Tensor, rng: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    return _tail_of(x, lora_a.shape[0])


@torch.library.register_fake("lora_kernels::lora_linear_fwd", lib=_library)
def _(
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
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], lora_b.shape[0]), _tail_of(x, lora_a.shape[0])


@torch.library.register_fake("lora_kernels::lora_linear_dx", lib=_library)
def _(
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
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape[0], lora_a.shape[1]), _tail_of(dy, lora_a.shape[0])


@torch.library.register_fake("lora_kernels::lora_linear_dab", lib=_library)
def _(
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
) -> tuple[Tensor, Tensor, Tensor]:
    da, db, dbias = (dy.new_empty(0) for _ in range(3))
    if da_dtype is not None and x is not None and d is not None:
        da = dy.new_empty(d.shape[1], x.shape[1], dtype=da_dtype)
    if db_dtype is not None and s is not None:
        db = dy.new_empty(dy.shape[1], s.shape[1], dtype=db_dtype)
    if dbias_dtype is not None:
        dbias = dy.new_empty(dy.shape[1], dtype=dbias_dtype)
    return da, db, dbias


@torch.library.register_fake("lora_kernels::segmented_shrink", lib=_library)
def _(
    x: Tensor,
    lora_a: list[Tensor],
    table: list[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    n = packed_slices or len(lora_a)
    return _tail_of(x, n, lora_a[0].shape[1] // max(packed_slices, 1))


@torch.library.register_fake("lora_kernels::segmented_expand", lib=_library)
def _(s: Tensor, lora_b: list[Tensor], table: list[Tensor]) -> Tensor:
    return s.new_empty(s.shape[0], sum(b.shape[1] for b in lora_b))


@torch.library.register_fake("lora_kernels::segmented_expand_", lib=_library)
def _(y: Tensor, s: Tensor, lora_b: list[Tensor], table: list[Tensor]) -> None:
    return None


@torch.library.register_fake("lora_kernels::segmented_lora", lib=_library)
def _(
    x: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    table: list[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    delta = x.new_empty(x.shape[0], sum(b.shape[1] for b in lora_b))
    return delta, _tail_of(x, len(lora_b), lora_b[0].shape[2])


@torch.library.register_fake("lora_kernels::segmented_lora_", lib=_library)
def _(
    y: Tensor,
    x: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    table: list[Tensor],
    packed_slices: int = 0,
) -> None:
    return None


@torch.library.register_fake("lora_kernels::segmented_lora_dx", lib=_library)
def _(
    dy: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    table: list[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty(dy.shape[0], lora_a[0].shape[2])
    return dx, _tail_of(dy, len(lora_b), lora_b[0].shape[2])


@torch.library.register_fake("lora_kernels::segmented_linear_fwd", lib=_library)
def _(
    x: Tensor,
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    table: list[Tensor],
    packed_slices: int = 0,
    bias: Tensor | None = None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape[0], sum(b.shape[1] for b in lora_b))
    return y, _tail_of(x, len(lora_b), lora_b[0].shape[2])


@torch.library.register_fake("lora_kernels::segmented_linear_dx", lib=_library)
def _(
    dy: Tensor,
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    table: list[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dx = dy.new_empty(dy.shape[0], lora_a[0].shape[2])
    return dx, _tail_of(dy, len(lora_b), lora_b[0].shape[2])


@torch.library.register_fake("lora_kernels::segmented_lora_dab", lib=_library)
def _(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    table: list[Tensor],
    widths: list[int],
    r_max: int,
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    da_dtype: torch.dtype | None = None,
    db_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    slots, n, r = table[1].shape[0], len(widths), r_max
    da: list[Tensor] = []
    db: list[Tensor] = []
    if da_dtype is not None and x is not None:
        stacks, rows = (1, n * r) if packed_slices else (n, r)
        da = [dy.new_empty(slots, rows, x.shape[1], dtype=da_dtype) for _ in range(stacks)]
    if db_dtype is not None:
        db = [dy.new_empty(slots, width, r, dtype=db_dtype) for width in widths]
    return da, db
