"""The list of ``aot.py`` for four-bit weights: the GEMM that decodes what it loads, and the kernel
that decodes to memory.

Each shipped tile, as the forward and as the masked dX, with aligned rows and odd ones: double-
quantised where they are aligned, a Conv1D's in dX where they are odd. What is done with few rows
also with S accumulated beside, under an out_scale, and in a batch that mixes adapters. bf16, the
extremes in fp16, whose tail is TF32, and fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from lora_kernels.backends import cuda
from lora_kernels.kernels import four_bit
from lora_kernels.planning.config import Config, tiled_configs
from lora_kernels.planning.device import DeviceFacts
from lora_kernels.planning.validity import invalid_reason
from lora_kernels.spec.problem import Problem
from lora_kernels.spec.segments import SegmentTable

WIDTHS = (2048, 1024, 1024)
SLOTS = 8
BLOCK = 64
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Stands for the kernel that decodes to memory; its numbers are that kernel's.
TO_MEMORY = Config("vendor", block_m=64, block_n=32, num_warps=4)


# Rows that are worth a tile of so many.
ROWS = {16: 8, 32: 64, 64: 64, 128: 4096}


def variants(block_m: int) -> Iterator[tuple[Problem, str]]:
    """Of a tile of so many rows."""
    m = ROWS[block_m]
    fwd = Problem("lora_linear_fwd", m, 4096, 4096, 64, "bfloat16", "float32", four_bit=True)
    dx = fwd._replace(op="lora_linear_dx", adapter_dtype="bfloat16")
    masked = dx._replace(dropout=True)
    if block_m == 32:
        single = {"dtype": "float32", "adapter_dtype": "float32"}
        yield fwd._replace(**single), "aligned"
        yield masked._replace(fan_in_fan_out=True, **single), "odd"
        return
    yield fwd, "aligned"
    yield fwd._replace(adapter_dtype="bfloat16"), "odd"
    yield masked, "aligned"
    yield masked._replace(fan_in_fan_out=True), "odd"
    yield fwd._replace(dtype="float16"), "aligned"
    yield masked._replace(dtype="float16", adapter_dtype="float16"), "odd"
    if block_m == 16:
        yield fwd._replace(fan_in_fan_out=True, out_scale=True), "aligned"
        yield fwd._replace(r=32), "aligned"
        yield dx._replace(r=32), "aligned"
        yield fwd._replace(r=32, adapter_dtype="bfloat16"), "odd"
        yield fwd._replace(r=32, dtype="float16"), "aligned"
        for problem, layout in ((fwd, "odd"), (dx, "aligned"), (masked, "odd")):
            op = problem.op.replace("lora", "segmented")
            yield problem._replace(op=op, slots=SLOTS, slices=len(WIDTHS)), layout


def calls(known: DeviceFacts) -> Iterator[tuple[Config, Problem, str]]:
    for dtype, layout in (("bfloat16", "aligned"), ("float32", "odd")):
        problem = Problem("lora_linear_fwd", 1, 4096, 4096, 16, dtype, dtype, four_bit=True)
        yield TO_MEMORY, problem, layout
    for block_m in ROWS:
        for problem, layout in variants(block_m):
            problem = problem._replace(aligned=layout == "aligned")
            for config in tiled_configs(problem, known):
                chosen = config.decodes and config.block_m == block_m
                if chosen and invalid_reason(config, problem, known) is None:
                    yield config, problem, layout


def launch(config: Config, problem: Problem, layout: str, known: DeviceFacts) -> None:
    """Calls the launcher; the tensors are reserved memory that is never touched."""
    dtype, adapters = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]
    odd = layout == "odd"
    m, n, k, r = problem.m - odd, problem.n, problem.k, problem.r - odd
    if config == TO_MEMORY:
        n -= odd

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        if odd:
            return torch.empty(*shape[:-1], shape[-1] + 2, dtype=dtype)[..., 1:-1]
        return torch.empty(shape, dtype=dtype)

    size = n * k
    blocks = math.ceil(size / BLOCK)
    quant = [torch.empty(16), torch.empty(blocks, dtype=torch.float32 if odd else torch.uint8)]
    if not odd:
        quant += [torch.empty(256), torch.empty(math.ceil(blocks / 256)), torch.empty(())]
    weight = torch.empty(size // 2, 1, dtype=torch.uint8)
    if config == TO_MEMORY:
        four_bit.lora_decode(weight, quant, BLOCK, (n, k), dtype)
        return
    given: dict[str, Any] = {"weight": weight, "quant": quant, "quant_block": BLOCK}
    given["fan_in_fan_out"] = problem.fan_in_fan_out
    if problem.dropout:
        given |= {"rng": torch.zeros(4, dtype=torch.int64), "dropout_p": 0.1}
    if problem.slots:
        given["table"] = SegmentTable(m, SLOTS, r, "cpu").tensors()
        given["lora_a"] = [tensor(SLOTS, r, k, dtype=adapters) for _ in WIDTHS]
        given["lora_b"] = [tensor(SLOTS, width, r, dtype=adapters) for width in WIDTHS]
    else:
        given |= {"lora_a": tensor(r, k, dtype=adapters), "lora_b": tensor(n, r, dtype=adapters)}
        given |= {"scale": torch.ones(()), "out_scale": tensor(n) if problem.out_scale else None}
    if problem.op.endswith("dx"):
        given["dy"] = tensor(m, n)
    else:
        given |= {"x": tensor(m, k), "bias": tensor(n)}
    cuda.run_kernel(problem.op, config, problem, known, **given)
