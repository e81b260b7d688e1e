"""The CPU backend."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..planning import answers, plan
from ..planning.device import DeviceFacts, facts
from ..spec import native, reference
from ..spec.linears import reference_of
from ..spec.problem import PROBLEM_OF, Problem, dtype_name
from . import vendor


def masked(x: Tensor, rng: Tensor, dropout_p: float) -> Tensor:
    """``mask * x`` as ``reference.masked`` defines it, by the native kernel where one was built."""
    if native.load() is None:
        return reference.masked(x, rng, dropout_p)
    return torch.ops.lora_kernels_cpu.masked(x, rng, dropout_p)


def narrow_product(x: Tensor, a: Tensor) -> Tensor:
    """``x a^T`` in float32 of x [M, K] and a few rows a [r, K], by the native kernel where one was
    built. The library takes 1.3 to 2.5 times as long (r 16, 256 to 2048 rows of 2048, AVX-512 with
    1 and 2 threads, 2026-11-30)."""
    if native.load() is None:
        return x @ a.t()
    return torch.ops.lora_kernels_cpu.lora_shrink(x, a, torch.ones((), device="cpu"))


@functools.cache
def kernel(op: str) -> Callable[..., Any]:
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
        answers.record("reference", config, problem)
        return reference_of(op)(*args, **kwargs)
    answers.record("cpu", config, problem)
    if config.plan == "native":
        return kernel(op)(*args, **kwargs)
    options = {} if problem.experts else {"masked": masked}
    return getattr(vendor, op)(*args, **kwargs, **options)


def segmented_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    table: list[Tensor],
    bias: Tensor | None,
    packed: Tensor | None,
    panels: Sequence[Tensor] = (),
) -> Tensor:
    """y of ``segmented_linear_fwd`` from adapters that were packed before: ``panels`` holds the
    int32 ranks [S] that they were packed for (a slot that the table gives another rank is packed in
    the call), then ``pack(A^T)`` of the A of every slice, [S, .], then ``pack(B^T)`` of every B."""
    operands = x, weight, lora_a, lora_b, table
    if panels:
        problem = PROBLEM_OF["segmented_linear_fwd"](*operands, bias=bias, packed=packed)
        config = plan.plan(problem, _facts())
        if config.plan == "native":
            answers.record("cpu", config, problem)
            return kernel("segmented_linear_of_panels")(*operands, bias, packed, panels)
    return answer("segmented_linear_fwd", *operands, bias=bias, packed=packed)[0]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    dropout_p: float,
    fan_in_fan_out: bool,
    dtype: torch.dtype,
    packed: Tensor | None,
    packed_dx: Tensor | None,
) -> Tensor | None:
    """y [..., N] of x [..., K] with its node of the graph in C++; None where the native plan does
    not answer forward and backward. While a recorder or a forced plan is active, the backward of
    the node calls the operators; otherwise it is not recorded."""
    (n, r), k = lora_b.shape, lora_a.shape[1]
    m = math.prod(x.shape[:-1])
    dtypes = dtype_name(dtype), dtype_name(lora_a.dtype)
    problem = Problem("lora_linear_fwd", m, n, k, r, *dtypes, rng is not None, fan_in_fan_out)
    config = plan.plan(problem, _facts())
    if config.plan != "native" or not _native_backward(problem):
        return None
    answers.record("cpu", config, problem)
    _watch()
    return kernel("lora_linear")(
        x,
        weight,
        lora_a,
        lora_b,
        scale,
        bias,
        rng,
        dropout_p,
        fan_in_fan_out,
        dtype,
        packed,
        packed_dx,
    )


@functools.lru_cache(maxsize=4096)
def _native_backward(problem: Problem) -> bool:
    """Whether the native plan answers every operator of the backward of this lora_linear_fwd."""
    m, n, k, r, dtype = problem.m, problem.n, problem.k, problem.r, problem.dtype
    backward = (
        problem._replace(op="lora_linear_dx"),
        Problem("lora_shrink", m, r, n, r, dtype, problem.adapter_dtype),
        Problem("lora_linear_dab", m, n, k, r, dtype, dtype, problem.dropout),
    )
    return all(plan.plan_ignoring_force(p, _facts()).plan == "native" for p in backward)


@functools.cache
def _watch() -> None:
    torch.ops.lora_kernels_cpu.watch(answers.watchers)
