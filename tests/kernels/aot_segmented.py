"""The list of ``aot.py`` for the segmented operators, whose kernels are many small ones.

Every shipped tile of every operator, as far as ``config.invalid_reason`` admits it, with three
slices of unequal widths: ranks up to 256 (a mixed stack is compiled for its largest) and up to 16,
aligned operands and odd ones, adapters in fp32 and in the rows' bf16, masked where there is a mask;
and fp16 and fp32 rows. Once per architecture: packed slices, and operands whose columns step.

The base linear under them is the GEMM of ``aot.py`` with another tail: each tile as the forward and
as the masked dX, aligned and odd; the first of each way to load besides with a Conv1D's weight,
packed slices, and columns that step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from lora_kernels.functional.ops import SEGMENTED_OPERATORS
from lora_kernels.planning.config import (
    DECODE_OPS,
    MIXED_LINEAR_OPS,
    SMALL_M,
    Config,
    tiled_configs,
)
from lora_kernels.planning.device import DeviceFacts
from lora_kernels.planning.validity import invalid_reason
from lora_kernels.spec.problem import Problem
from lora_kernels.spec.reference import tail_dtype
from lora_kernels.spec.segments import SegmentTable

WIDTHS = (2048, 512, 512)
SLOTS = 8
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Variant(NamedTuple):
    """One call before the tile is chosen; ``packed`` is the layout of A."""

    problem: Problem
    layout: str
    packed: bool = False


def variants(op: str) -> Iterator[Variant]:
    r = 256
    masked = op in ("segmented_shrink", "segmented_lora_dx", "segmented_lora_dab")
    base = Problem(op, 4096, sum(WIDTHS), 4096, r, "bfloat16", "float32", slots=SLOTS, slices=3)
    half = base._replace(adapter_dtype="bfloat16")
    for problem in (base, half, half._replace(r=16)):
        for dropout in (False, True) if masked else (False,):
            yield Variant(problem._replace(dropout=dropout), "aligned")
    yield Variant(base._replace(dropout=masked), "odd")
    yield Variant(half, "odd")
    yield Variant(half, "strided")
    yield Variant(half, "aligned", packed=True)
    short = base._replace(dtype="float16", dropout=masked)
    yield Variant(short, "aligned")
    yield Variant(short._replace(adapter_dtype="float16", r=16), "aligned")
    yield Variant(short._replace(adapter_dtype="float16"), "odd")
    single = base._replace(dtype="float32", dropout=masked)
    yield Variant(single, "aligned")
    yield Variant(single, "odd")


def calls(known: DeviceFacts) -> Iterator[tuple[Config, Problem, str, bool, int]]:
    """(configuration, problem, layout, packed, launch) of everything that is compiled; the whole
    operators in the grouped plan are launches of their halves."""
    yield from _linear_calls(known)
    seen = set()
    for op in SEGMENTED_OPERATORS:
        if op in MIXED_LINEAR_OPS:
            continue
        for variant in variants(op):
            for m in (32, 4096):
                problem = variant.problem._replace(m=m, aligned=variant.layout == "aligned")
                for config in tiled_configs(problem, known):
                    if config.plan == "grouped" and op in DECODE_OPS:
                        continue
                    # Two launches, whose kernels take flags that no other has.
                    halves = op == "segmented_lora_dx"
                    # What the chunk says is a number of iterations.
                    tile = dataclasses.replace(config, chunk=0)
                    key = tile, problem._replace(m=0), variant.layout, variant.packed
                    if key not in seen and invalid_reason(config, problem, known) is None:
                        seen.add(key)
                        for launch in (0, 1) if halves else (-1,):
                            yield config, problem, variant.layout, variant.packed, launch


def _linear_calls(known: DeviceFacts) -> Iterator[tuple[Config, Problem, str, bool, int]]:
    """The launches of the base linear's kernel; its shrinks are the other operators'."""
    r, first = 64, set()
    for op in MIXED_LINEAR_OPS:
        masked = op == "segmented_linear_dx"
        base = Problem(op, 4096, sum(WIDTHS), 4096, r, "bfloat16", "float32", slots=SLOTS, slices=3)
        half = base._replace(adapter_dtype="bfloat16", dropout=masked)
        # Masked it spills, and is not valid.
        single = base._replace(dtype="float32")
        every = [Variant(base, "aligned"), Variant(half, "odd")]
        if masked:
            every = [Variant(half, "aligned"), Variant(base._replace(dropout=True), "odd")]
            # Without a mask wider tiles are valid.
            every += [Variant(half._replace(dropout=False), "aligned"), Variant(base, "odd")]
        every += [Variant(single, "aligned"), Variant(single, "odd")]
        short = half._replace(dtype="float16", adapter_dtype="float16")
        every += [
            Variant(short, "aligned"),
            Variant(short._replace(adapter_dtype="float32"), "odd"),
        ]
        once = [
            Variant(half._replace(fan_in_fan_out=True), "aligned"),
            Variant(half, "aligned", packed=True),
            Variant(half, "strided"),
        ]
        for variant in (*every, *once):
            for m in (SMALL_M // 2, 4096):
                problem = variant.problem._replace(m=m, aligned=variant.layout == "aligned")
                for config in tiled_configs(problem, known):
                    if config.plan == "preload":
                        # The launches of the adapters alone.
                        continue
                    few = config.block_m == 16
                    if few != (m <= SMALL_M) or invalid_reason(config, problem, known) is not None:
                        continue
                    kind = variant, few, config.descriptors
                    if variant in once and kind in first:
                        continue
                    first.add(kind)
                    yield config, problem, variant.layout, variant.packed, -1


def products(kernel: str, c: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(rows, columns, depth) of the product in each innermost loop, in the order of the text."""
    if kernel == "_segmented_lora_dab_kernel":
        # dA, then dB
        return 2 * [(c["BLOCK_C"], c["BLOCK_R"], c["BLOCK_M"])]
    shrink, expand = [], []
    if "BLOCK_K" in c:
        shrink = [(c["BLOCK_M"], c["BLOCK_R"], c["BLOCK_K"])]
    if "BLOCK_N" in c:
        expand = [(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_R"])]
    return shrink + expand * (c["SLICES"] if c.get("SUM_SLICES") else 1)


def arguments(problem: Problem, layout: str, packed: bool) -> dict[str, Any]:
    """The operator's own arguments; the tensors are reserved memory that is never touched."""
    dtype, adapters = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]
    odd = layout == "odd"
    m, k, r = problem.m - odd, problem.k - odd, problem.r - odd
    widths = [width - odd for width in WIDTHS]

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        if layout == "aligned":
            return torch.empty(shape, dtype=dtype)
        if odd:
            # a slice of something wider, so that the base address is odd too
            return torch.empty(*shape[:-1], shape[-1] + 2, dtype=dtype)[..., 1:-1]
        return torch.empty(*shape[:-1], 3 * shape[-1], dtype=dtype)[..., ::3]

    stacks = [tensor(SLOTS, r, k, dtype=adapters) for _ in widths]
    if packed:
        stacks = [tensor(SLOTS, len(widths) * r, k, dtype=adapters)]
    lora_b = [tensor(SLOTS, width, r, dtype=adapters) for width in widths]
    table = SegmentTable(m, SLOTS, r, "cpu").tensors()
    rng = torch.zeros(4, dtype=torch.int64) if problem.dropout else None
    dropout = {"rng": rng, "dropout_p": 0.1 * problem.dropout}
    a = {"lora_a": stacks, "table": table, "packed_slices": len(widths) * packed}
    x, wide = tensor(m, k), tensor(m, sum(widths))
    s = torch.empty(m, len(widths), r, dtype=tail_dtype(dtype))
    sizes = (k, sum(widths)) if problem.fan_in_fan_out else (sum(widths), k)
    base = {"weight": tensor(*sizes), "fan_in_fan_out": problem.fan_in_fan_out}
    return {
        "segmented_shrink": a | dropout | {"x": x},
        "segmented_expand_": {"y": wide, "s": s, "lora_b": lora_b, "table": table},
        "segmented_lora": a | dropout | {"x": x, "lora_b": lora_b},
        "segmented_lora_": a | {"y": wide, "x": x, "lora_b": lora_b},
        "segmented_linear_fwd": a
        | dropout
        | base
        | {"x": x, "lora_b": lora_b, "bias": tensor(sum(widths))},
        "segmented_linear_dx": a | dropout | base | {"dy": wide, "lora_b": lora_b},
        "segmented_lora_dx": a | dropout | {"dy": wide, "lora_b": lora_b},
        "segmented_lora_dab": dropout
        | {"dy": wide, "x": x, "s": s, "d": s, "table": table, "widths": widths, "r_max": r}
        | {"packed_slices": len(widths) * packed, "da_dtype": adapters, "db_dtype": adapters},
    }[problem.op]
