"""The CPU backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _native, plan, reference, vendor
from .device import DeviceFacts, facts
from .problem import PROBLEM_OF


def masked(x: Tensor, rng: Tensor, dropout_p: float) -> Tensor:
    """``mask * x`` as ``reference.masked`` defines it, by the native kernel where one was built."""
    if _native.load() is None:
        return reference.masked(x, rng, dropout_p)
    return torch.ops.lora_kernels_cpu.masked(x, rng, dropout_p)


@functools.cache
def native(op: str) -> Callable[..., Any]:
    """The C++ kernel of an operator: the operator's own arguments and results."""
    return getattr(torch.ops.lora_kernels_cpu, op).default


@functools.cache
def _facts() -> DeviceFacts:
    return facts("cpu")


def packs(weight: Tensor) -> bool:
    """Whether the native kernels would read a packed copy of ``weight`` (float16 would be packed as
    float32, twice its size)."""
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and _facts().native not in ("", "baseline")
    )


def answer(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run one operator on CPU tensors, by the plan that ``plan.plan`` chooses for its problem."""
    problem = PROBLEM_OF[op](*args, **kwargs)
    config = plan.plan(problem, _facts())
    if config.plan == "reference":
        plan.answered("reference", config, problem)
        return getattr(reference, op)(*args, **kwargs)
    plan.answered("cpu", config, problem)
    if config.plan == "native":
        return native(op)(*args, **kwargs)
    return getattr(vendor, op)(*args, **kwargs, masked=masked)
