"""The list of the binaries that are compiled ahead of time.

It comes from the package itself: every tile that ``config.tiled_configs`` ships for an
architecture, as far as ``validity.invalid_reason`` admits it.

The full product of tiles, plans, ranks, operators, layouts and dtypes is a few thousand binaries. A
covering set of it, each member there for what it costs in registers or in addresses:

- the GEMM with a tail, bf16: each tile in each plan at the largest rank it admits, as the forward
  ([N, K] weight, bias) and as dX ([K, N] weight; masked in the tail plan), for aligned and odd
  operands, with descriptors as well where they are valid; each smaller rank bucket once, as the
  aligned forward. Adapters are fp32 in half of these and bf16 in the others. Tiles of 16 rows are
  split along K, and so is the tile of 64 rows once. The widest tiles and the persistent plan are
  there without masks, and with descriptors alone. The producer plan, which is not split, is there
  as dX and as the forward both masked and not.
- once per architecture, plan and way to load, the first tile: columns with strides (no unit
  stride at all), a weight that is a Conv1D's, and out_scale.
- fp16, whose tail is TF32, and fp32: each tile in each plan, aligned and odd.
- the shrink and dA/dB: each tile at the largest rank it admits masked and not, split and not,
  aligned, odd and strided, fp16 likewise but fewer, fp32 once; ranks 16 and 64 once, masked and
  aligned.
- the preload plan's kernel: each tile as the masked forward at a rank of 16, as the forward at the
  largest rank it admits, and as the masked dX there, aligned and odd; strided once; fp32.
- the segmented operators, the shrink of several projections, four-bit weights, and experts: the
  docstrings of ``aot_segmented.py``, ``aot_linears.py``, ``aot_four_bit.py`` and
  ``aot_experts.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from lora_kernels.planning.config import Config, tiled_configs
from lora_kernels.planning.device import DeviceFacts
from lora_kernels.planning.validity import invalid_reason
from lora_kernels.spec.problem import Problem
from tests.kernels import aot_experts, aot_four_bit, aot_linears, aot_segmented

RANKS = (16, 32, 64, 128, 256)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

# Shared memory is what one block may ask for: CUDA's programming guide, table of technical
# specifications per compute capability (163 KiB on 8.0, 227 KiB on 9.0 and 10.0); 64 KiB of LDS in
# the CDNA3 instruction set's manual. Processors: A100, H200, B200, MI300X.
FACTS = {
    arch: DeviceFacts("cuda", arch, arch, processors=processors, shared_memory=shared)
    for arch, processors, shared in (
        ("sm_80", 108, 166912),
        ("sm_90", 132, 232448),
        ("sm_100", 148, 232448),
        ("gfx942", 304, 65536),
    )
}


class Call(NamedTuple):
    """One operator call on one architecture with one configuration: what a worker compiles."""

    arch: str
    config: Config
    problem: Problem
    layout: str  # "aligned", "odd" or "strided"
    packed: bool = False
    # which of the call's launches
    launch: int = -1

    @property
    def described(self) -> tuple[str, int, str, str]:
        """Tile, rank, dtypes and operands, as the report has them."""
        config, problem, op = self.config, self.problem, self.problem.op
        sizes = "x".join(str(s) for s in (config.block_m, config.block_n, config.block_k) if s)
        tile = f"{sizes} w{config.num_warps} s{config.num_stages}"
        tile += f" split {config.split_k}" * (config.split_k > 1)
        names = {"lora_linear_fwd": "fwd", "lora_linear_dx": "dx"}
        names |= {"lora_linears_fwd": "S", "lora_linears_dx": "D"}
        names |= {"expert_linear_fwd": "fwd", "expert_linear_dx": "dx"}
        flags = [names[op]] if op in names else []
        flags += [op.removeprefix("segmented_")] * (problem.slots > 0) + ["packed"] * self.packed
        flags += (
            ["4-bit"] * problem.four_bit
            + ["mask"] * problem.dropout
            + ["Conv1D"] * problem.fan_in_fan_out
        )
        flags += ["out_scale"] * problem.out_scale + ["descriptors"] * config.descriptors
        dtypes = f"{SHORT[problem.dtype]}/{SHORT[problem.adapter_dtype]}"
        return tile, problem.r, dtypes, " ".join([*flags, self.layout])


def calls(arch: str) -> list[Call]:
    """The covering set of the module's docstring for one architecture, without repetitions."""
    mixed = itertools.starmap(functools.partial(Call, arch), aot_segmented.calls(FACTS[arch]))
    several = itertools.starmap(functools.partial(Call, arch), aot_linears.calls(FACTS[arch]))
    experts = itertools.starmap(functools.partial(Call, arch), aot_experts.calls(FACTS[arch]))
    linear = itertools.chain(_linear(arch), _preload(arch), _skinny(arch))
    four_bit = itertools.starmap(functools.partial(Call, arch), aot_four_bit.calls(FACTS[arch]))
    every = itertools.chain(linear, mixed, several, four_bit, experts)
    return list(dict.fromkeys(every))


def sample(arch: str) -> list[Call]:
    """Of these one of each operator and plan at the largest rank, aligned and odd."""
    largest: dict[tuple[object, ...], Call] = {}
    for call in calls(arch):
        problem = call.problem
        key = problem.op, call.config.plan, call.launch, problem.four_bit, call.layout
        if call.layout != "strided" and (
            key not in largest or call.problem.r > largest[key].problem.r
        ):
            largest[key] = call
    return [*largest.values()]


def _linear(arch: str) -> Iterator[Call]:
    base = Problem("lora_linear_fwd", 4096, 4096, 4096, 16, "bfloat16", "float32")
    first = set()
    for config in _tiles(arch, base, RANKS):
        # Tiles of few rows are there for few rows.
        rows = 8 if config.block_m == 16 else 4096
        fwd = base._replace(m=rows)
        admitted = _ranks(arch, config, fwd)
        if not admitted:
            continue
        # A longer tail is walked in steps of 32.
        largest = min(64, max(admitted)) if config.plan == "tail" else max(admitted)
        # To the persistent plan a rank is a number of steps.
        for r in admitted if config.plan != "persistent" else ():
            if r < largest and (config.descriptors or arch not in ("sm_90", "sm_100")):
                yield from _call(arch, config, fwd._replace(r=r), "aligned")
        for layout, adapters in (("aligned", "float32"), ("odd", "bfloat16")):
            yield from _call(arch, config, fwd._replace(r=largest, adapter_dtype=adapters), layout)
        # The widest tiles have no mask.
        masked = config.plan == "tail" and config.block_m * config.block_n <= 128 * 128
        dx = fwd._replace(op="lora_linear_dx", r=largest, dropout=masked)
        for layout, adapters in (("aligned", "bfloat16"), ("odd", "float32")):
            yield from _call(arch, config, dx._replace(adapter_dtype=adapters), layout)
            if config.plan == "producer":
                # With a mask the two have nothing in common.
                for masked in (fwd._replace(r=largest, dropout=True), dx._replace(dropout=True)):
                    yield from _call(arch, config, masked._replace(adapter_dtype=adapters), layout)
        if config.block_m == 64 and config.plan != "producer":
            yield from _call(arch, config, fwd._replace(m=64, r=largest), "aligned")
        kind = (config.plan, config.descriptors)
        if kind not in first:
            first.add(kind)
            special = fwd._replace(r=16)
            yield from _call(arch, config, special, "strided")
            yield from _call(arch, config, special._replace(fan_in_fan_out=True), "aligned")
            yield from _call(arch, config, special._replace(out_scale=True), "aligned")
    half = base._replace(dtype="float16")
    for config in _tiles(arch, half, RANKS):
        rows = 8 if config.block_m == 16 else 4096
        fwd = half._replace(m=rows, r=64)
        dx = fwd._replace(op="lora_linear_dx", dropout=True)
        for problem, layout, adapters in (
            (fwd, "aligned", "float32"),
            (fwd._replace(r=8), "aligned", "float16"),
            (fwd, "odd", "float16"),
            (dx, "aligned", "float16"),
            (dx, "odd", "float32"),
        ):
            yield from _call(arch, config, problem._replace(adapter_dtype=adapters), layout)
    single = base._replace(dtype="float32", adapter_dtype="float32")
    for config in _tiles(arch, single, RANKS):
        rows = 8 if config.block_m == 16 else 4096
        admitted = _ranks(arch, config, single)
        if not admitted:
            continue
        r = min(64, max(admitted)) if config.plan == "tail" else max(admitted)
        yield from _call(arch, config, single._replace(m=rows, r=r), "odd")
        dx = single._replace(op="lora_linear_dx", m=rows, r=r, dropout=config.plan != "in_loop")
        yield from _call(arch, config, dx, "aligned")
        if config.plan == "producer":
            masked = single._replace(m=rows, r=r, dropout=True)
            yield from _call(arch, config, masked, "aligned")


def _preload(arch: str) -> Iterator[Call]:
    base = Problem("lora_linear_fwd", 4096, 4096, 4096, 16, "bfloat16", "bfloat16", True)
    single = base._replace(dtype="float32", adapter_dtype="float32")
    strided = False
    for problem in (base, single):
        for config in _tiles(arch, problem, RANKS, "preload"):
            dx = problem._replace(op="lora_linear_dx")
            wide = problem._replace(dropout=False, adapter_dtype="float32")
            yield from _call(arch, config, problem, "aligned")
            for variant, layout in ((wide, "aligned"), (dx, "aligned"), (dx, "odd")):
                ranks = [r for r in RANKS if _admitted(arch, config, variant._replace(r=r), layout)]
                for r in ranks[-1:]:
                    yield from _call(arch, config, variant._replace(r=r), layout)
            if not strided and _admitted(arch, config, dx, "strided"):
                strided = True
                yield from _call(arch, config, dx, "strided")


def _skinny(arch: str) -> Iterator[Call]:
    for op in ("lora_shrink", "lora_linear_dab"):
        # One axis is summed over; long enough, it is dealt out to several programs.
        long = {"m": 8192} if op == "lora_linear_dab" else {"k": 4096}
        short = {"m": 64} if op == "lora_linear_dab" else {"k": 256}
        base = Problem(op, 512, 512, 512, 256, "bfloat16", "float32")
        for config in _tiles(arch, base, RANKS):
            variants = [
                base._replace(dtype=dtype, adapter_dtype=adapters, dropout=dropout, **size)
                for dtype, adapters, dropout, size in (
                    ("bfloat16", "float32", True, long),
                    ("bfloat16", "float32", True, short),
                    ("bfloat16", "bfloat16", False, short),
                    ("bfloat16", "bfloat16", False, long),
                    ("bfloat16", "bfloat16", True, long),
                    ("float16", "float32", True, long),
                    ("float16", "float16", False, short),
                    ("float16", "float16", True, long),
                    ("float32", "float32", True, long),
                )
            ]
            layouts = ("aligned", "odd", "aligned", "odd", "strided")
            layouts = (*layouts, "aligned", "odd", "strided", "aligned")
            for problem, layout in zip(variants, layouts, strict=True):
                ranks = [r for r in RANKS if _admitted(arch, config, problem._replace(r=r), layout)]
                for r in ranks[-1:]:
                    yield from _call(arch, config, problem._replace(r=r), layout)
            for r in (16, 64):
                yield from _call(arch, config, variants[0]._replace(r=r), "aligned")


def _tiles(arch: str, problem: Problem, ranks: Iterable[int], plan: str = "") -> Iterator[Config]:
    """Every shipped tile and kind of address of ``plan``, or of all plans but preload, once,
    whatever its rank."""
    found = (
        [c for c in tiled_configs(problem._replace(r=r), FACTS[arch])
         if (c.plan == plan if plan else c.plan != "preload")]
        for r in ranks
    )  # fmt: skip
    # How far K is split depends on the problem, and comes back in _call.
    return iter(dict.fromkeys(dataclasses.replace(c, split_k=0) for c in itertools.chain(*found)))


def _ranks(arch: str, config: Config, problem: Problem) -> list[int]:
    """The ranks that a tile admits for aligned operands, or for others."""
    return [
        r
        for r in RANKS
        if any(
            _admitted(arch, config, problem._replace(r=r, aligned=layout == "aligned"), layout)
            for layout in ("aligned", "odd")
        )
    ]


def _admitted(arch: str, config: Config, problem: Problem, layout: str) -> bool:
    problem = problem._replace(aligned=layout == "aligned")
    return invalid_reason(config, problem, FACTS[arch]) is None


def _call(arch: str, tile: Config, problem: Problem, layout: str) -> Iterator[Call]:
    """The call of ``tile`` for ``problem``, if it is valid there, with the shipped split."""
    if layout == "odd":
        # Nothing divides by 16: neither sizes nor strides, nor a base address.
        odd = {size: getattr(problem, size) - 1 for size in ("m", "n", "k", "r")}
        problem = problem._replace(**odd)
    problem = problem._replace(aligned=layout == "aligned")
    for config in tiled_configs(problem, FACTS[arch]):
        if dataclasses.replace(config, split_k=0) == tile and _admitted(
            arch, config, problem, layout
        ):
            yield Call(arch, config, problem, layout)
