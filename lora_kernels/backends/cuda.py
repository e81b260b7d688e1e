"""The CUDA (and ROCm) backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..planning import answers, plan
from ..planning.config import (
    MIXED_LINEAR_OPS,
    SEGMENTED_PLANS,
    SKINNY_OPS,
    TILED_PLANS,
    Config,
    tiled_configs,
)
from ..planning.device import DeviceFacts, facts
from ..planning.validity import has_kernels
from ..spec import reference
from ..spec.linears import reference_of
from ..spec.operators import of_operator
from ..spec.problem import PROBLEM_OF, Problem, decoded_shape, rows_of
from . import vendor


def answer(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run one operator on CUDA tensors, by the plan that ``plan.plan`` chooses for its problem."""
    first = next(t for t in (*args, *kwargs.values()) if isinstance(t, (Tensor, list, tuple)))
    device = (first if isinstance(first, Tensor) else first[0]).device
    problem = PROBLEM_OF[op](*args, **kwargs)
    config = plan.plan(problem, facts(device))
    # Launches go to the tensors' device, whichever is current.
    with torch.cuda.device(device):
        if config.plan == "reference":
            answers.record("reference", config, problem)
            return reference_of(op)(*args, **kwargs)
        answers.record("cuda", config, problem)
        return run(op, config, problem, facts(device), *args, **kwargs)


def run(
    op: str, config: Config, problem: Problem, known: DeviceFacts, *args: Any, **kwargs: Any
) -> Any:
    """Compute ``op`` by the plan of ``config``, the library's or a kernel's."""
    if problem.four_bit and not config.decodes and has_kernels(known):
        given = _DECODED[op](*args, **kwargs)
        return run(op, config, problem._replace(four_bit=False), known, **given)
    if config.plan != "vendor":
        return run_kernel(op, config, problem, known, *args, **kwargs)
    if problem.slots:
        onto = adapters_onto(problem.adapters(), known)
        return getattr(vendor, op)(*args, **kwargs, onto=onto)
    if problem.experts:
        return getattr(vendor, op)(*args, **kwargs)
    options: dict[str, Any] = {"masked": masked}
    if op in ("lora_linears_fwd", "lora_linears_dx"):
        rows = shrink_problem(problem)._replace(aligned=problem.aligned)
        if plan.is_valid(Config("skinny"), rows, known):
            config = fill_tile_sizes(Config("skinny"), rows, known)
            options["shrinks"] = shrinks_with(config)
    return getattr(vendor, op)(*args, **kwargs, **options)


def _decoded(op: str, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with a plain weight in the place of a four-bit one."""
    from ..kernels import four_bit

    shape, dtype = decoded_shape(given), rows_of(given).dtype
    quant, block = given["quant"], given["quant_block"]
    weight = four_bit.lora_decode(given["weight"], quant, block, shape, dtype)
    plain = given | {"weight": weight, "quant": None, "quant_block": 0}
    if "offs" in given:
        # The kernels of experts have no such arguments.
        del plain["quant"], plain["quant_block"]
        if given["lora_a"].shape[1] == 0:
            plain |= {"lora_a": None, "lora_b": None}
    return plain


_DECODED = {
    op: of_operator(op, _decoded)
    for op in (
        *("lora_linear_fwd", "lora_linear_dx", "expert_linear_fwd", "expert_linear_dx"),
        *MIXED_LINEAR_OPS,
    )
}


def masked(x: Tensor, rng: Tensor, dropout_p: float) -> Tensor:
    """``mask * x`` as ``reference.masked`` defines it, in one launch where there is Triton."""
    if not facts(x.device).triton:
        return reference.masked(x, rng, dropout_p)
    from ..kernels import common

    return common.masked(x, rng, dropout_p)


def adapters_onto(problem: Problem, known: DeviceFacts) -> Callable[..., Tensor]:
    """A function that adds the adapters of a mixed batch to the library's result, by the plan that
    they would have alone."""
    from ..kernels import segmented, segmented_decode

    config = plan.plan_ignoring_force(problem, known)
    if config.plan not in SEGMENTED_PLANS:
        config = Config("grouped")
    config = fill_tile_sizes(config, problem, known)
    if problem.op == "segmented_lora_dx":
        return functools.partial(segmented.dx_onto, config=config)
    module = segmented_decode if config.plan == "decode" else segmented
    return functools.partial(module.lora_onto, config=config)


def shrinks_with(config: Config) -> Callable[..., Tensor]:
    """A function that makes S or D of several projections in one launch."""
    from ..kernels import linears

    return functools.partial(linears.lora_shrinks, config=config)


def shrink_problem(problem: Problem) -> Problem:
    """The problem of the shrink that makes S or D for a product with a base."""
    return Problem(
        "expert_shrink" if problem.experts else "lora_shrink",
        problem.m,
        problem.r,
        problem.inner,
        problem.r,
        problem.dtype,
        problem.adapter_dtype,
        problem.dropout and problem.op in ("lora_linear_fwd", "lora_linears_fwd"),
        slices=problem.slices,
        experts=problem.experts,
    )


def run_kernel(
    op: str, config: Config, problem: Problem, known: DeviceFacts, *args: Any, **kwargs: Any
) -> Any:
    """Launch the kernel of ``op`` with ``config``; a plan by its name alone gets the planner's
    numbers."""
    # Triton is imported by the first launch, not by importing the package.
    from ..kernels import (
        experts,
        linear_bwd,
        linear_fwd,
        linear_persistent,
        linear_preload,
        linear_producer,
        segmented,
        segmented_bwd,
        segmented_decode,
    )

    config = fill_tile_sizes(config, problem, known)
    if op in MIXED_LINEAR_OPS:
        shrink = fill_tile_sizes(Config("grouped"), problem.adapters(), known)
        if config.plan == "preload":
            return getattr(linear_preload, op)(*args, **kwargs, config=shrink)
        return getattr(linear_fwd, op)(*args, **kwargs, config=config, shrink=shrink)
    if problem.slots:
        module = segmented_decode if config.plan == "decode" else segmented
        module = segmented_bwd if op == "segmented_lora_dab" else module
        return getattr(module, op)(*args, **kwargs, config=config)
    if problem.experts:
        options = {"config": config}
        if op not in SKINNY_OPS:
            rows = shrink_problem(problem)._replace(aligned=problem.aligned)
            options["shrink"] = fill_tile_sizes(Config("skinny"), rows, known)
        return getattr(experts, op)(*args, **kwargs, **options)
    if op in SKINNY_OPS:
        kernel = linear_fwd.lora_shrink if op == "lora_shrink" else linear_bwd.lora_linear_dab
        return kernel(*args, **kwargs, config=config)
    if config.plan == "preload":
        return getattr(linear_preload, op)(*args, **kwargs, config=config)
    if config.plan == "producer":
        return getattr(linear_producer, op)(*args, **kwargs, config=config)
    shrink = fill_tile_sizes(Config("skinny"), shrink_problem(problem), known)
    module = linear_persistent if config.plan == "persistent" else linear_fwd
    return getattr(module, op)(*args, **kwargs, config=config, shrink=shrink)


@functools.lru_cache(maxsize=4096)
def fill_tile_sizes(config: Config, problem: Problem, known: DeviceFacts) -> Config:
    """``config``, or if it is a tiled plan's name alone, that plan's best shipped tile."""
    if config.block_m or config.plan not in TILED_PLANS:
        return config
    valid = [
        c
        for c in tiled_configs(problem, known)
        if (c.plan, c.decodes) == (config.plan, config.decodes) and plan.is_valid(c, problem, known)
    ]
    if not valid:
        raise ValueError(f"no tile of plan {config.plan!r} can compute {problem} on {known.name}")
    if problem.slots and problem.op not in MIXED_LINEAR_OPS:
        return valid[0]
    return min(valid, key=lambda c: plan.estimate_us(c, problem, known))
