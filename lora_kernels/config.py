"""A plan with its tile sizes as frozen data, and the one statement of what makes it valid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .device import DeviceFacts
from .problem import ELEMENT_BYTES, Problem
from .segments import BLOCK_ROWS

# How S reaches the accumulator (module docstring of plan.py). The order is the order in which a
# tuner tries them. "skinny" is the one kernel of the operators that have no tail to place; "decode"
# and "grouped" are those of a batch that mixes adapters; "native" are the C++ kernels of csrc/.
PLANS = (
    "in_loop",
    "tail",
    "producer",
    "skinny",
    "decode",
    "grouped",
    "native",
    "vendor",
    "reference",
)

# Plans whose work is done by Triton kernels with tiles; the others take no numbers.
TILED_PLANS = ("in_loop", "tail", "producer", "skinny", "decode", "grouped")
# Those that accumulate S beside the base product, in tiles as wide as the rank.
WHOLE_RANK_PLANS = ("in_loop", "producer")
SEGMENTED_PLANS = ("decode", "grouped")
SKINNY_OPS = ("lora_shrink", "lora_linear_dab")
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


def shared_memory(config: Config, problem: Problem) -> int:
    """Bytes that the software pipeline keeps of the operands of its main loop."""
    size, adapter = ELEMENT_BYTES[problem.dtype], ELEMENT_BYTES[problem.adapter_dtype]
    tail = 4 if problem.dtype == "float16" else size
    rank = block_r(config, problem.r)
    expand = rank * (config.block_m * tail + config.block_n * adapter)
    if problem.slots and problem.op not in MIXED_LINEAR_OPS:
        shrink = config.block_k * (config.block_m * size + rank * adapter)
        return config.num_stages * max(shrink, expand)
    if problem.op == "lora_linear_dab":
        # In float32 the transposed tile has a place of its own.
        stages = config.num_stages + (tail == 4)
        return stages * config.block_m * (config.block_n * size + rank * tail)
    base = (config.block_m + config.block_n) * config.block_k * size
    if config.plan == "tail":
        return config.num_stages * (max(base, expand) if tail > size else base)
    return config.num_stages * (base + rank * config.block_k * adapter)


def invalid_reason(config: Config, problem: Problem, facts: DeviceFacts) -> str | None:
    """Why ``config`` cannot compute ``problem`` on such a device, or None if it can: the only
    statement of the constraints."""
    if config.plan not in PLANS:
        return f"no plan is called {config.plan!r}; there are {', '.join(PLANS)}"
    if config.plan in TILED_PLANS:
        return _tiled_invalid_reason(config, problem, facts)
    if config.plan == "native" and not facts.native:
        return "no CPU extension is loaded" if facts.kind == "cpu" else "it runs on CPUs"
    if config.plan == "vendor" and problem.slots:
        if facts.kind != "cuda" or problem.op not in MIXED_LINEAR_OPS:
            return "the library has no call that mixes adapters"
        # The base is the library's, the adapters are added by our kernels.
        return _tiled_invalid_reason(Config("grouped"), problem.adapters(), facts)
    if config.plan in ("native", "vendor"):
        if problem.dtype == "float64":
            return "float64 is computed by the reference"
        if facts.kind not in ("cpu", "cuda"):
            return f"there is no backend for {facts.kind} devices"
    return None


def _tiled_invalid_reason(config: Config, problem: Problem, facts: DeviceFacts) -> str | None:
    skinny = problem.op in SKINNY_OPS
    if facts.kind != "cuda":
        return "Triton's kernels run on GPUs"
    if not facts.triton:
        return "Triton is not installed"
    if _sm(facts.arch) < 80:
        return f"the kernels are compiled for sm_80 and later, not for {facts.arch}"
    if problem.dtype == "float64" or problem.adapter_dtype == "float64":
        return "float64 is computed by the reference"
    if problem.op in MIXED_LINEAR_OPS:
        if config.plan != "tail":
            return f"{problem.op} mixes adapters under a base: its tail comes from a shrink"
    elif (problem.slots > 0) != (config.plan in SEGMENTED_PLANS):
        return f"{problem.op} mixes {'' if problem.slots else 'no '}adapters"
    elif problem.slots:
        return _segmented_invalid_reason(config, problem, facts)
    if skinny != (config.plan == "skinny"):
        return f"{problem.op} has {'no tail to place' if skinny else 'a tail to place'}"
    if config.plan == "in_loop" and problem.dropout:
        return "the mask would be drawn again for every tile of columns"
    if problem.out_scale and problem.op != "lora_linear_fwd":
        return "the kernels read dY once, and out_scale would have to multiply it first"
    if config.block_m == 0:
        # A plan by its name alone; the planner fills in the numbers.
        named = (c for c in tiled_configs(problem, facts) if c.plan == config.plan)
        if config.plan in WHOLE_RANK_PLANS and not any(is_valid(c, problem, facts) for c in named):
            return _REGISTERS
        return None
    if config.plan == "producer" and config.split_k > 1:
        return "a tile waits for its owner, and nothing for the shares of a tile"
    if config.descriptors and (not problem.aligned or not 90 <= _sm(facts.arch) < 1000):
        return "tensor descriptors need sm_90 and 16-byte strides"
    if facts.shared_memory and shared_memory(config, problem) > facts.shared_memory - 1024:
        return f"its stages do not fit {facts.shared_memory} bytes of shared memory"
    return _float16_reason(config, problem, facts) or _register_reason(config, problem, facts)


def _segmented_invalid_reason(config: Config, problem: Problem, facts: DeviceFacts) -> str | None:
    if config.plan == "decode":
        if problem.op not in DECODE_OPS:
            return f"{problem.op} is no shrink followed by an expand"
        if problem.dropout:
            return "it is for inference, and has no dropout"
        if problem.m > MOST_DECODE_ROWS:
            return f"its partial sums grow with the rows, of which it takes {MOST_DECODE_ROWS}"
        if config.chunk and _decode_room(config, problem) > MOST_DECODE_ROOM:
            return f"its partial sums would take more than {MOST_DECODE_ROOM} bytes"
    if config.block_m == 0:
        return None
    if config.block_m != BLOCK_ROWS:
        return f"the schedule has blocks of {BLOCK_ROWS} rows"
    if facts.shared_memory and shared_memory(config, problem) > facts.shared_memory - 1024:
        return f"its stages do not fit {facts.shared_memory} bytes of shared memory"
    # What spills, by the ahead-of-time report (sm_80, sm_90, sm_100; 2026-11).
    rank, columns = block_r(config, problem.r), config.block_n
    backward = problem.op in ("segmented_lora_dx", _DAB)
    if (backward and columns * rank > 64 * 64) or (problem.op == _DAB and columns > 64):
        return _REGISTERS
    if problem.dtype == "float16":
        # The tiles of 32 columns are there for what spills in wider ones.
        forward = problem.dropout and not backward
        if columns == 32 and not (forward or problem.op == _DAB):
            return "a wider tile does"
        if forward and columns > 32 and rank == 16 and family(facts.arch) in ("sm_90", "sm_100"):
            return _REGISTERS
        reason = _float16_reason(config, problem, facts)
        if reason is not None:
            return reason
    if _sm(facts.arch) == 1000:
        return None
    if config.plan == "decode" and (columns, config.block_k) == (64, 64):
        return _REGISTERS
    if columns == 32 and (config.num_warps == 4) != (problem.op == _DAB):
        return _REGISTERS
    half = problem.dtype != "float32"
    if half and problem.op == _DAB and family(facts.arch) == "sm_100":
        if rank > 32:
            return _REGISTERS
    elif half and problem.aligned and (columns, config.block_k) == (64, 32):
        return _REGISTERS
    loaded = max(config.block_m, rank) * config.block_k, columns * max(rank, config.block_m)
    # Without 16-byte rows every element loaded has an address of its own.
    if not problem.aligned and max(loaded) > 2048:
        return _REGISTERS
    return None


def _decode_room(config: Config, problem: Problem) -> int:
    """Bytes of partial sums: of every row block, chunk of columns and share of K."""
    blocks = -(-problem.m // BLOCK_ROWS) * 2 + min(problem.m, problem.slots)
    chunks = problem.n // config.chunk + problem.slices
    rank = block_r(config, problem.r)
    width = -(-problem.r // rank) * rank
    return blocks * chunks * config.split_k * BLOCK_ROWS * width * 4


_DAB = "segmented_lora_dab"
_REGISTERS = "its accumulators and addresses do not fit the registers"


def _float16_reason(config: Config, problem: Problem, facts: DeviceFacts) -> str | None:
    """What float16's tail costs, which is TF32, beside bfloat16's (same report)."""
    if problem.dtype != "float16":
        return None
    arch, tile = family(facts.arch), (config.block_m, config.block_n, config.block_k)
    # Rows of a product whose left operand is converted on its way, in a loop.
    converted = 0
    if config.plan in WHOLE_RANK_PLANS or problem.op == "lora_shrink":
        converted = config.block_m
    elif problem.op in ("lora_linear_dab", _DAB):
        converted = config.block_n
    if arch == "sm_90" and converted >= 64 and config.num_stages > 1:
        return "pipelined, warp groups misread what comes from registers (ptxas before 13.3)"
    if arch == "sm_90" and problem.op == _DAB and config.block_n == 32 and not problem.aligned:
        return _REGISTERS
    if arch == "sm_100":
        spills = tile[:2] == (64, 64) and problem.op == "lora_linear_dab"
        if spills or (problem.op == _DAB and config.block_n == 64):
            return _REGISTERS
    if problem.op in SKINNY_OPS or config.plan in SEGMENTED_PLANS:
        return None
    narrow = tile == (32, 32, 16)
    if narrow and (problem.aligned or config.plan != "tail" or arch == "sm_80"):
        return "a wider tile does"
    if tile == (16, 64, 32) and arch in ("sm_90", "sm_100"):
        return _REGISTERS
    if arch == "sm_80" and (
        (tile == (16, 128, 64) and problem.dropout)
        or (tile == (64, 128, 32) and problem.op in MIXED_LINEAR_OPS)
    ):
        return _REGISTERS
    return None


def _register_reason(config: Config, problem: Problem, facts: DeviceFacts) -> str | None:
    """What spills, by the ahead-of-time report (sm_80, sm_90, sm_100; 2026-11)."""
    rank, nvidia = block_r(config, problem.r), _sm(facts.arch) < 1000
    if config.plan == "skinny":
        shrink = problem.op == "lora_shrink"
        columns = config.block_k if shrink else config.block_n
        # The tile of x or dY, and the one of A or of S and D.
        loaded = max(config.block_m * columns, (columns if shrink else config.block_m) * rank)
    else:
        if config.plan in WHOLE_RANK_PLANS:
            tile = (config.block_m, config.block_n, config.block_k)
            narrow = tile[1:] == (128, 32)
            most = 64 if tile == (128, 128, 64) else 16 if narrow else 32
            if rank > most or (narrow and config.num_warps < 8):
                return _REGISTERS
            if (tile == (64, 64, 32) and _sm(facts.arch) < 90) or (tile[0] == 16 and not nvidia):
                return "its warps would repeat part of the base product"
            long = 2 * rank > most
            if config.plan == "producer" and _producer_spills(config, problem, facts, long):
                return _REGISTERS
        half = problem.dtype != "float32"
        masked = problem.dropout and problem.op in ("lora_linear_dx", "segmented_linear_dx")
        if config.block_n > 128 and (masked or problem.out_scale or not config.descriptors):
            return _REGISTERS
        if half and masked and config.block_m > 16 and config.num_warps < 8:
            return _REGISTERS
        if problem.slots and _mixed_tail_spills(config, problem, facts, masked):
            return _REGISTERS
        if family(facts.arch) == "sm_100" and half and problem.aligned and not config.descriptors:
            return _REGISTERS
        if family(facts.arch) == "sm_100" and (config.block_m, config.block_k) == (64, 32):
            return _REGISTERS
        loaded = config.block_n * config.block_k
    # Without 16-byte rows every element loaded has an address of its own.
    if nvidia and not problem.aligned and loaded > 2048:
        return _REGISTERS
    return None


def _producer_spills(config: Config, problem: Problem, facts: DeviceFacts, long: bool) -> bool:
    """What a second loop and the masks cost beside in_loop's; ``long``: a rank of more than half of
    what the tile takes there."""
    arch, wide = family(facts.arch), config.block_n > 128
    if problem.dtype == "float32":
        return arch == "sm_100"
    if arch == "sm_80":
        # Only the forward with a weight [N, K] leaves enough.
        return problem.op == "lora_linear_dx" or problem.fan_in_fan_out
    if problem.dropout and problem.op == "lora_linear_dx":
        # The masked tail has an accumulator of its own.
        return config.block_m * config.block_n > 64 * 64
    if problem.dropout and arch == "gfx942":
        return True
    if problem.dropout and arch == "sm_90":
        # x, and what the mask leaves of it
        return wide or (not config.descriptors and (long or problem.fan_in_fan_out))
    return wide and long


def _mixed_tail_spills(config: Config, problem: Problem, facts: DeviceFacts, masked: bool) -> bool:
    """What a tail chosen row by row costs beside the base: a second accumulator, and its mask."""
    arch, few = family(facts.arch), config.block_m == 16
    if problem.dtype == "float32":
        summed = problem.op == "segmented_linear_dx" and not config.descriptors
        return _sm(facts.arch) < 1000 and (
            masked
            or (arch == "sm_100" and not problem.aligned)
            or (summed and arch in ("sm_80", "sm_100"))
        )
    if config.block_n > 128 or (masked and config.block_m * config.block_n > 64 * 64):
        return True
    if arch == "sm_80":
        summed = problem.op == "segmented_linear_dx" and not masked and config.block_k == 128
        return few and (not problem.aligned or summed)
    if arch != "sm_90":
        return False
    if few and problem.aligned:
        return not config.descriptors or (masked and config.block_k == 32)
    return (config.block_m, config.block_n) == (64, 128)


def _sm(arch: str) -> int:
    """The number of an NVIDIA architecture; 1000 for others, whose limits are their own."""
    digits = arch.removeprefix("sm_")
    return int(digits) if arch.startswith("sm_") and digits.isdigit() else 1000


def is_valid(config: Config, problem: Problem, facts: DeviceFacts) -> bool:
    return invalid_reason(config, problem, facts) is None


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
# On NVIDIA, rows that are no multiple of 16 bytes; and float32, which has no tensor cores without
# TF32. Float16, whose tail has TF32, takes all of them.
_UNALIGNED_TILES = ((64, 64, 32, 8, 3), (16, 64, 32, 4, 3))
_FLOAT_TILES = ((32, 32, 16, 4, 1),)

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
# What stands for any number of rows where the choice may not depend on it.
MANY_ROWS = 1 << 20


def family(arch: str) -> str:
    """The architecture whose tiles serve ``arch``; anything unknown gets the smallest demands."""
    if arch in _HALF_TILES:
        return arch
    if arch.startswith("gfx"):
        return "gfx942"
    # sm_103 is a sibling of sm_100; sm_120 has less shared memory than either.
    return "sm_100" if 100 <= _sm(arch) < 120 else "sm_80"


def tiled_configs(problem: Problem, facts: DeviceFacts) -> Iterator[Config]:
    """Every shipped tile as a configuration for ``problem``, valid or not."""
    half = ELEMENT_BYTES[problem.dtype] == 2
    processors = max(facts.processors, 1)
    mixed_linear = problem.op in MIXED_LINEAR_OPS
    if problem.slots and not mixed_linear:
        yield from _segmented_configs(problem)
        return
    if problem.op == "lora_shrink":
        for block_m, block_k, rank, warps, stages in _SHRINK_TILES if half else _SHRINK_TILES[-1:]:
            blocks = -(-problem.m // block_m) * -(-problem.r // rank)
            split = _split(blocks, problem.k // block_k, processors)
            yield Config("skinny", block_m, 0, block_k, 0, split, warps, stages, block_r=rank)
        return
    if problem.op == "lora_linear_dab":
        for block_m, block_n, rank, warps, stages in _DAB_TILES if half else _DAB_TILES[-1:]:
            blocks = (-(-problem.k // block_n) + -(-problem.n // block_n)) * -(-problem.r // rank)
            split = _split(blocks, problem.m // block_m, processors)
            yield Config("skinny", block_m, block_n, 0, 0, split, warps, stages, block_r=rank)
        return
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
        if problem.m <= SMALL_M:
            split = _split(tiles, problem.inner // block_k, processors)
        for plan in ("tail",) if mixed_linear else ("in_loop", "tail", "producer"):
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


def candidates(problem: Problem, facts: DeviceFacts) -> Iterator[Config]:
    """The configurations worth measuring for ``problem``; all of them valid."""
    for config in (*tiled_configs(problem, facts), *map(Config, ("native", "vendor", "reference"))):
        if is_valid(config, problem, facts):
            yield config
