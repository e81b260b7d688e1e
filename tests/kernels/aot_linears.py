"""The list of ``aot.py`` for the shrink of several projections: S of one x and D of three
gradients, each shipped tile of the shrink, for the dtypes; S masked and not; aligned operands, odd
ones, and columns that step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from lora_kernels.backends import cuda
from lora_kernels.planning.config import Config, tiled_configs
from lora_kernels.planning.device import DeviceFacts
from lora_kernels.planning.validity import invalid_reason
from lora_kernels.spec.problem import Problem

WIDTHS = (2048, 512, 512)
OPERATORS = ("lora_linears_fwd", "lora_linears_dx")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def variants(op: str) -> Iterator[tuple[Problem, str]]:
    masked = op == "lora_linears_fwd"
    # A tile takes the ranks of all projections together, or the largest one.
    base = Problem(op, 512, sum(WIDTHS), 4096, 192, "bfloat16", "float32", slices=3)
    half = base._replace(adapter_dtype="bfloat16")
    yield base, "aligned"
    yield half._replace(dropout=masked), "odd"
    yield half._replace(r=48), "aligned"
    yield half._replace(dropout=masked), "strided"
    for dtype in ("float16", "float32"):
        yield base._replace(dtype=dtype, dropout=masked), "aligned"
        yield base._replace(dtype=dtype, adapter_dtype=dtype), "odd"


def calls(known: DeviceFacts) -> Iterator[tuple[Config, Problem, str]]:
    for op in OPERATORS:
        for problem, layout in variants(op):
            problem = problem._replace(aligned=layout == "aligned")
            rows = cuda.shrink_problem(problem)._replace(aligned=problem.aligned)
            for config in tiled_configs(rows, known):
                if invalid_reason(config, rows, known) is None:
                    # With one program for an axis there are no partial sums.
                    for split in {1, config.split_k}:
                        yield dataclasses.replace(config, split_k=split), problem, layout


def shrink(config: Config, problem: Problem, layout: str) -> None:
    """Calls the launcher; the tensors are reserved memory that is never touched."""
    dtype, adapters = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]
    m, r = problem.m, problem.r // len(WIDTHS)

    def rows(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        if layout == "aligned":
            return torch.empty(shape, dtype=dtype)
        if layout == "odd":
            return torch.empty(*shape[:-1], shape[-1] + 2, dtype=dtype)[..., 1:-1]
        return torch.empty(*shape[:-1], 3 * shape[-1], dtype=dtype)[..., ::3]

    odd = layout == "odd"
    k, r, widths = problem.k - odd, r - odd, [n - odd for n in WIDTHS]
    scales: list[Any] = [torch.ones(()) for _ in WIDTHS]
    shrinks = cuda.shrinks_with(config)
    if problem.op == "lora_linears_dx":
        b = [rows(n, r, dtype=adapters).t() for n in widths]
        shrinks([rows(m, n, dtype=dtype) for n in widths], b, scales, None, 0.0)
        return
    rng = torch.zeros(4, dtype=torch.int64) if problem.dropout else None
    a = [rows(r, k, dtype=adapters) for _ in WIDTHS]
    shrinks([rows(m, k, dtype=dtype)], a, scales, rng, 0.1 * problem.dropout)
