"""The operators: schemas, fakes, and which function answers on which device: the contract.

All operators are functional, take 2-D rows of any strides, and stand below autograd and autocast:
``functional.py`` brings both. On CPU and CUDA tensors the backend of that device answers;
everywhere else ``reference.py`` does.

    x, dy      [M, K], [M, N]  the rows; their dtype (float16, bfloat16, float32, float64) is the
                               compute dtype
    weight     [N, K]          in the compute dtype; [K, N] with ``fan_in_fan_out``
    lora_a     [r, K]          r >= 1; any floating dtype, rounded to the compute dtype on use
    lora_b     [N, r]          likewise
    scale      []              float32 (float64 for float64 rows) on the rows' device
    bias       [N]             any floating dtype
    rng        int64 [4]       (seed, offset, row0, col0) on the rows' device; None: no mask. The
                               GPU's kernels draw eight columns at once: col0 a multiple of 8
    out_scale  [N]             multiplies x W^T + S B^T before the bias (DoRA)
    packed                     the weight in the layout of the CPU's kernels, which read it in the
                               weight's place; for everybody else weight is the operand
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cpu, cuda, plan, reference
from .config import PROBLEM_OF, Config

_DROPOUT = "Tensor? rng=None, float dropout_p=0.0"
_ADAPTED = "Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scale"
_BASE = "bool fan_in_fan_out=False, Tensor? out_scale=None, Tensor? packed=None"
_GRADIENTS = "ScalarType? da_dtype=None, ScalarType? db_dtype=None, ScalarType? dbias_dtype=None"

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
}

OPERATORS = tuple(_SCHEMAS)

_library = torch.library.Library("lora_kernels", "DEF")


def autocast_enabled(device_type: str) -> bool:
    # Torch raises for a device that knows no autocast, such as meta.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _reference_answer(op: str, *args: Any, **kwargs: Any) -> Any:
    plan.answered("reference", Config("reference"), PROBLEM_OF[op](*args, **kwargs))
    return getattr(reference, op)(*args, **kwargs)


def _below_autograd(op: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """``answer`` for one operator, with autograd and autocast off: no graph and no cast reaches
    inside a backend."""

    def implementation(*args: Any, **kwargs: Any) -> Any:
        device_type = args[0].device.type
        if not torch.is_grad_enabled() and not autocast_enabled(device_type):
            return answer(op, *args, **kwargs)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
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


@torch.library.register_fake("lora_kernels::lora_shrink", lib=_library)
def _(
    x: Tensor, lora_a: Tensor, scale: Tensor, rng: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    return x.new_empty(x.shape[0], lora_a.shape[0])


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
    return x.new_empty(x.shape[0], lora_b.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


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
    return dy.new_empty(dy.shape[0], lora_a.shape[1]), dy.new_empty(dy.shape[0], lora_a.shape[0])


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
