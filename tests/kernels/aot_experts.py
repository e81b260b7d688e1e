"""The list of ``aot.py`` for the operators of experts: each tile as the forward (with biases) and
as dX, aligned and odd, the shrink and dA/dB likewise, for the dtypes; once of each way to load also
gpt-oss's weight, [E, K, N], and columns that step. 128 experts, and a rank that is walked in two
steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lora_kernels.planning.config import SKINNY_OPS, Config, tiled_configs
from lora_kernels.planning.device import DeviceFacts
from lora_kernels.planning.validity import invalid_reason
from lora_kernels.spec.operators import EXPERT_OPERATORS
from lora_kernels.spec.problem import Problem
from lora_kernels.spec.reference import tail_dtype

EXPERTS = 128
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def variants(op: str) -> Iterator[tuple[Problem, str]]:
    base = Problem(op, 4096, 1536, 2048, 64, "bfloat16", "float32", experts=EXPERTS)
    half = base._replace(adapter_dtype="bfloat16")
    yield base, "aligned"
    yield half, "odd"
    for dtype in ("float16", "float32"):
        yield base._replace(dtype=dtype), "odd"
        yield base._replace(dtype=dtype, adapter_dtype=dtype), "aligned"


def once(op: str) -> Iterator[tuple[Problem, str]]:
    base = Problem(op, 4096, 1536, 2048, 64, "bfloat16", "bfloat16", experts=EXPERTS)
    if op not in SKINNY_OPS:
        yield base._replace(fan_in_fan_out=True), "aligned"
    yield base, "strided"


def calls(known: DeviceFacts) -> Iterator[tuple[Config, Problem, str]]:
    for op in EXPERT_OPERATORS:
        first = set()
        for number, (problem, layout) in enumerate((*variants(op), *once(op))):
            problem = problem._replace(aligned=layout == "aligned")
            for config in tiled_configs(problem, known):
                if invalid_reason(config, problem, known) is None:
                    kind = number, config.descriptors
                    if number >= 6 and kind in first:
                        continue
                    first.add(kind)
                    yield config, problem, layout


def arguments(problem: Problem, layout: str) -> dict[str, Any]:
    """The operator's own arguments; the tensors are reserved memory that is never touched."""
    dtype, adapters = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]
    odd = layout == "odd"
    m, n, k, r = (size - odd for size in (problem.m, problem.n, problem.k, problem.r))

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        if layout == "aligned":
            return torch.empty(shape, dtype=dtype)
        if odd:
            # a slice of something wider, so that the base address is odd too
            return torch.empty(*shape[:-1], shape[-1] + 2, dtype=dtype)[..., 1:-1]
        return torch.empty(*shape[:-1], 3 * shape[-1], dtype=dtype)[..., ::3]

    shared: dict[str, Any] = {"offs": torch.zeros(EXPERTS, dtype=torch.int32)}
    if problem.op == "expert_linear_dab":
        s, d = torch.empty(2, m, r, dtype=tail_dtype(dtype))
        rows = {"dy": tensor(m, n), "x": tensor(m, k), "s": s, "d": d}
        return rows | shared | {"da_dtype": adapters, "db_dtype": adapters}
    shared["scale"] = torch.ones(())
    lora_a = tensor(EXPERTS, r, k, dtype=adapters)
    if problem.op == "expert_shrink":
        # The strided layout is dX's: a is B, transposed.
        strided = tensor(EXPERTS, k, r, dtype=adapters).transpose(1, 2)
        a = strided if layout == "strided" else lora_a
        return shared | {"x": tensor(m, k), "lora_a": a}
    shared |= {
        "weight": tensor(EXPERTS, *((k, n) if problem.fan_in_fan_out else (n, k))),
        "lora_a": lora_a,
        "lora_b": tensor(EXPERTS, n, r, dtype=adapters),
        "fan_in_fan_out": problem.fan_in_fan_out,
    }
    if problem.op == "expert_linear_dx":
        return shared | {"dy": tensor(m, n)}
    return shared | {"x": tensor(m, k), "bias": tensor(EXPERTS, n)}
