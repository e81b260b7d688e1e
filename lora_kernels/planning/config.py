"""A plan with its tile sizes as frozen data, and the tiles shipped for each architecture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..spec.problem import ELEMENT_BYTES, Problem
from ..spec.segments import BLOCK_ROWS
from .device import DeviceFacts

# How S reaches the accumulator (module docstring of plan.py). The order is the order in which a
# tuner tries them. "skinny" is the one kernel of the operators that have no tail to place; "decode"
# and "grouped" are those of a batch that mixes adapters; "native" are the C++ kernels of csrc/.
PLANS = (
    "in_loop",
    "tail",
    "producer",
    "persistent",
    "preload",
    "skinny",
    "decode",
    "grouped",
    "native",
    "vendor",
    "reference",
)

# Plans whose work is done by Triton kernels with tiles; the others take no numbers.
TILED_PLANS = (
    "in_loop",
    "tail",
    "producer",
    "persistent",
    "preload",
    "skinny",
    "decode",
    "grouped",
)

# Those that accumulate S beside the base product, in tiles as wide as the rank.
WHOLE_RANK_PLANS = ("in_loop", "producer")

SEGMENTED_PLANS = ("decode", "grouped")

SHRINK_OPS = ("lora_shrink", "expert_shrink")

DAB_OPS = ("lora_linear_dab", "expert_linear_dab")

SKINNY_OPS = (*SHRINK_OPS, *DAB_OPS)

DECODE_OPS = ("segmented_lora", "segmented_lora_")

# A base linear whose tail differs from row to row.
MIXED_LINEAR_OPS = ("segmented_linear_fwd", "segmented_linear_dx")


@dataclass(frozen=True, slots=True)
class Config:
    """A plan and, for the tiled plans, its compile-time numbers. Zero means: not used by this
    plan.

    The skinny kernels call their block of columns ``block_n`` (dA/dB) or have none (the shrink),
    ``split_k`` counts the programs among which the reduced axis of one block is dealt out, and
    ``block_r`` is as much of the rank as one of them takes.
    """

    plan: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    group_m: int = 0
    split_k: int = 0
    num_warps: int = 0
    num_stages: int = 0
    # of a persistent launch; 0: one program per tile
    programs: int = 0
    descriptors: bool = False
    block_r: int = 0
    # columns that one program of the decode plan expands
    chunk: int = 0
    # whether the GEMM decodes a four-bit weight as it loads it; else one kernel decodes all of it
    # to memory, and the plan goes on with that
    decodes: bool = False


def block_r(config: Config, r: int) -> int:
    """The rank as a kernel's tiles hold it: a power of two, at least a tensor core's 16.

    Tails are walked in steps of 32: steps of 64 spill in the widest tiles. The skinny kernels deal
    out what is longer than ``config.block_r`` to other programs. In tiles of 16 rows all
    warps repeat the base product where the rank's has 16 columns, and share it where it has 32
    (ahead-of-time report, 2026-11).
    """
    whole = max(16, 1 << max(r - 1, 0).bit_length())
    if config.plan == "tail":
        return min(whole, 32)
    if config.plan in ("skinny", *SEGMENTED_PLANS):
        return min(whole, config.block_r or whole)
    return max(whole, 32) if config.plan == "in_loop" and config.block_m == 16 else whole


def sm_number(arch: str) -> int:
    """The number of an NVIDIA architecture; 1000 for others, whose limits are their own."""
    digits = arch.removeprefix("sm_")
    return int(digits) if arch.startswith("sm_") and digits.isdigit() else 1000


# The shipped tiles by architecture: (block_m, block_n, block_k, warps, stages), largest first. They
# compile without spills (ahead-of-time report); which is fastest where is for the tuner to measure.
# Those of 16 rows stream the weight for few rows.
_HALF_TILES = {
    "sm_80": ((128, 128, 32, 8, 4), (64, 128, 32, 4, 4), (16, 64, 128, 4, 4), (16, 128, 64, 4, 4)),
    "sm_90": (
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (64, 128, 64, 4, 4),
        (16, 64, 128, 4, 4),
    ),
    "sm_100": ((128, 256, 64, 8, 3), (128, 128, 64, 8, 4), (16, 64, 128, 4, 4)),
    "gfx942": ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2), (16, 64, 128, 4, 2)),
}

# Of one adapter in bfloat16 with tensor descriptors: those of the persistent plan, and of the plans
# before it where they are not above. The fourth stage has one more load in flight; which of the two
# shapes is faster depends on how N and M fill the waves (predictions: docs/performance.md). With
# four stages, the bias and sm_100's scratch do not fit its shared memory.
_WIDE_TILES = {
    "sm_90": ((128, 256, 64, 8, 4), (256, 128, 64, 8, 4)),
    "sm_100": ((128, 256, 64, 8, 3),),
}

# On NVIDIA, rows that are no multiple of 16 bytes; and float32, which has no tensor cores without
# TF32. Float16, whose tail has TF32, takes all of them.
_UNALIGNED_TILES = ((64, 64, 32, 8, 3), (16, 64, 32, 4, 3))

_FLOAT_TILES = ((32, 32, 16, 4, 1),)

# Of a GEMM that decodes a four-bit weight, for half types and for float32: 16 to 32 weights a
# thread, whose indices, values and scales are in registers together.
_DECODING_TILES = ((128, 128, 64, 8, 4), (64, 64, 64, 4, 4), (16, 64, 128, 4, 4))

_DECODING_FLOAT_TILES = ((32, 32, 32, 4, 1),)

# (block_m, block_n, block_k, warps, stages) of the preload plan's kernel, which is done with bytes
# and not with products: for half types (the last where the rank is long), for rows that are not
# aligned, for float32. Which is fastest is a guess.
_PRELOAD_TILES = (
    (32, 128, 128, 4, 4),
    (16, 128, 128, 4, 4),
    (32, 64, 64, 8, 2),
    (32, 64, 32, 8, 1),
    (32, 32, 32, 4, 1),
)

# (block_m, block_k, block_r, warps, stages) of the shrink and (block_m, block_n, block_r, warps,
# stages) of dA/dB: for half types, then for rows that are not aligned, then for float32.
_SHRINK_TILES = ((64, 64, 64, 4, 3), (16, 128, 64, 4, 3), (64, 32, 64, 8, 1), (32, 32, 32, 4, 1))

_DAB_TILES = ((64, 64, 128, 4, 3), (32, 128, 64, 4, 3), (32, 64, 64, 8, 1), (32, 32, 32, 4, 1))

# (block_n, block_k, block_r, warps, stages) of the segmented operators: for half types, then for
# rows or stacks that are not aligned; and for float32.
_SEGMENTED_TILES = ((128, 64, 64, 4, 3), (64, 64, 64, 4, 3), (64, 32, 32, 4, 1))

_SEGMENTED_FLOAT_TILES = ((32, 32, 32, 8, 1), (32, 32, 32, 4, 1))

# How the decode plan deals out work, for FIELD's table T2 (8 adapters of rank 32, half types): the
# predicted microseconds of qkv, gate_up and down on an H200, a launch at 2 and an arrival at 1, if
# memory gives 4.1 TB/s, the L2 5.5 TB/s and one program takes in 40 GB/s (guesses all three):
#
#   the whole shrink in every chunk of 512 columns (no split)    10    21    23
#   one chunk a slice: its last arriver expands all of it        18    24    11
#   chunks of 1024, K dealt out by 512                            8    15     9
#   chunks of 2048, K dealt out by 512                            9    11     9
#
# The first reads A again for every chunk, from a cache that does not keep up with 100 MB; the
# second leaves B to one program a slice and adapter. The best plans published there take 15, 22
# and 11.
_DECODE_CHUNKS = (2048, 1024, 512)

_DECODE_SHARE = 512

# Of a shrink over row blocks, which are many, only a long K is dealt out (a guess).
_GROUPED_SHARE = 2048

# Above this many rows a column of tiles is no longer one tile, and splitting K is not for speed.
SMALL_M = 64

MOST_DECODE_ROWS = 256

# Little beside a model, and enough for 64 rows of 64 adapters of rank 64 in any layer of FIELD's.
MOST_DECODE_ROOM = 256 << 20

# The number of rows where the choice may not depend on it.
MANY_ROWS = 1 << 20


def family(arch: str) -> str:
    """The architecture whose tiles serve ``arch``; anything unknown gets the smallest demands."""
    if arch in _HALF_TILES:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    # sm_103 is a sibling of sm_100; sm_120 has less shared memory than either.
    return "sm_100" if 100 <= sm_number(arch) < 120 else "sm_80"


def tiled_configs(problem: Problem, facts: DeviceFacts) -> Iterator[Config]:
    """Every shipped tile as a configuration for ``problem``, valid or not."""
    half = ELEMENT_BYTES[problem.dtype] == 2
    processors = max(facts.processors, 1)
    mixed_linear = problem.op in MIXED_LINEAR_OPS
    if problem.slots and not mixed_linear:
        yield from _segmented_configs(problem)
        return
    if problem.op in SHRINK_OPS:
        for block_m, block_k, rank, warps, stages in _SHRINK_TILES if half else _SHRINK_TILES[-1:]:
            blocks = -(-problem.m // block_m) * -(-problem.r // rank)
            split = _split(blocks, problem.k // block_k, processors) if not problem.experts else 1
            yield Config("skinny", block_m, 0, block_k, 0, split, warps, stages, block_r=rank)
        return
    if problem.op in DAB_OPS:
        for block_m, block_n, rank, warps, stages in _DAB_TILES if half else _DAB_TILES[-1:]:
            blocks = (-(-problem.k // block_n) + -(-problem.n // block_n)) * -(-problem.r // rank)
            split = _split(blocks, problem.m // block_m, processors) if not problem.experts else 1
            yield Config("skinny", block_m, block_n, 0, 0, split, warps, stages, block_r=rank)
        return
    if mixed_linear:
        # Its numbers are those of the adapters alone.
        yield Config("preload")
    elif not problem.experts:
        found = _PRELOAD_TILES[:-1] if half else _PRELOAD_TILES[-1:]
        for block_m, block_n, block_k, warps, stages in found:
            yield Config("preload", block_m, block_n, block_k, 0, 1, warps, stages)
        if problem.dtype == "bfloat16":
            yield from _wide_configs(facts)
    shipped: tuple[tuple[int, ...], ...] = _FLOAT_TILES
    if half:
        shipped = _HALF_TILES[family(facts.arch)]
        if not facts.arch.startswith("gfx"):
            shipped += _UNALIGNED_TILES
            if problem.dtype == "float16":
                shipped += _FLOAT_TILES
    for block_m, block_n, block_k, warps, stages in shipped:
        tiles = -(-problem.m // block_m) * -(-problem.columns // block_n)
        split = 1
        if problem.m <= SMALL_M and not problem.experts:
            split = _split(tiles, problem.inner // block_k, processors)
        tail_only = mixed_linear or problem.experts > 0
        for plan in ("tail",) if tail_only else ("in_loop", "tail", "producer"):
            if plan == "producer" and block_m == 16:
                # Tiles of few rows are there to be split along K.
                continue
            for descriptors in (True, False):
                yield Config(
                    plan,
                    block_m,
                    block_n,
                    block_k,
                    8,
                    1 if plan == "producer" else split,
                    warps,
                    stages,
                    processors,
                    descriptors,
                )
    if problem.four_bit:
        yield from _decoding_configs(problem, facts)


def _wide_configs(facts: DeviceFacts) -> Iterator[Config]:
    arch, processors = family(facts.arch), max(facts.processors, 1)
    for tile in _WIDE_TILES.get(arch, ()):
        block_m, block_n, block_k, warps, stages = tile
        for plan in ("in_loop", "tail", "persistent"):
            if plan == "persistent" or tile not in _HALF_TILES[arch]:
                yield Config(plan, block_m, block_n, block_k, 8, 1, warps, stages, processors, True)


def _decoding_configs(problem: Problem, facts: DeviceFacts) -> Iterator[Config]:
    half, processors = ELEMENT_BYTES[problem.dtype] == 2, max(facts.processors, 1)
    for block_m, block_n, block_k, warps, stages in (
        _DECODING_TILES if half else _DECODING_FLOAT_TILES
    ):
        if facts.arch.startswith("gfx"):
            stages = min(stages, 2)
        tiles = -(-problem.m // block_m) * -(-problem.columns // block_n)
        split = 1
        if problem.m <= SMALL_M:
            split = _split(tiles, problem.inner // block_k, processors)
        for plan in ("tail",) if problem.op in MIXED_LINEAR_OPS else ("in_loop", "tail"):
            yield Config(
                plan, block_m, block_n, block_k, 8, split, warps, stages, processors, decodes=True
            )


def _segmented_configs(problem: Problem) -> Iterator[Config]:
    """For few rows the decode plan comes first. Nothing but that order depends on the rows: within
    a plan a row has the same bits in every batch."""
    half = ELEMENT_BYTES[problem.dtype] == 2
    tiles = [*_SEGMENTED_TILES] if half else [*_SEGMENTED_FLOAT_TILES]
    if problem.dtype == "float16":
        tiles += _SEGMENTED_FLOAT_TILES
    # dX sums over N, and over each slice by itself.
    inner = problem.n // problem.slices if problem.op == "segmented_lora_dx" else problem.k
    grouped, decode = [], []
    for block_n, block_k, rank, warps, stages in tiles:
        split = max(1, min(inner // _GROUPED_SHARE, 8))
        grouped.append(
            Config("grouped", BLOCK_ROWS, block_n, block_k, 0, split, warps, stages, block_r=rank)
        )
        split = max(1, min(inner // _DECODE_SHARE, 16))
        decode += [
            Config(
                "decode", BLOCK_ROWS, block_n, block_k, 0, split, warps, stages,
                block_r=rank, chunk=chunk,
            )
            for chunk in _DECODE_CHUNKS
        ]  # fmt: skip
    yield from (*decode, *grouped) if problem.m <= SMALL_M else (*grouped, *decode)


def _split(blocks: int, steps: int, processors: int) -> int:
    """Programs per block so that all of them fill the device about twice, each with four steps at
    least (a guess: a program's start and its share of the finish cost about that)."""
    wanted = -(-2 * processors // max(blocks, 1))
    return max(1, min(wanted, steps // 4, 64))
