"""Which configurations are valid: the only statement of the constraints.

Spills are conditions, not a table of compiled tiles: about 800 of the shipped (architecture,
operator, dtype, tile) would need a row, in 81 patterns of layout, flags and rank (2026-11), and
most were never compiled. A covering set is (tests/kernels/aot_report.md): none of it spills.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..spec.operators import LINEARS_OPERATORS
from ..spec.problem import ELEMENT_BYTES, Problem
from ..spec.segments import BLOCK_ROWS
from .config import (
    DAB_OPS,
    DECODE_OPS,
    MIXED_LINEAR_OPS,
    MOST_DECODE_ROOM,
    MOST_DECODE_ROWS,
    PLANS,
    SEGMENTED_PLANS,
    SHRINK_OPS,
    SKINNY_OPS,
    TILED_PLANS,
    WHOLE_RANK_PLANS,
    Config,
    block_r,
    family,
    sm_number,
    tiled_configs,
)
from .device import DeviceFacts


def shared_memory(config: Config, problem: Problem) -> int:
    """Bytes that the software pipeline keeps of the operands of its main loop."""
    size, adapter = ELEMENT_BYTES[problem.dtype], ELEMENT_BYTES[problem.adapter_dtype]
    tail = 4 if problem.dtype == "float16" else size
    rank = block_r(config, problem.r)
    expand = rank * (config.block_m * tail + config.block_n * adapter)
    if problem.slots and problem.op not in MIXED_LINEAR_OPS:
        shrink = config.block_k * (config.block_m * size + rank * adapter)
        return config.num_stages * max(shrink, expand)
    if problem.op in DAB_OPS:
        # In float32 the transposed tile has a place of its own.
        stages = config.num_stages + (tail == 4)
        return stages * config.block_m * (config.block_n * size + rank * tail)
    if config.plan == "preload":
        shrink = config.block_k * (config.block_m * size + rank * adapter)
        return config.num_stages * max(shrink, rank * config.block_n * adapter)
    base = (config.block_m + config.block_n) * config.block_k * size
    if config.plan == "persistent":
        # And half of a tile of the result.
        return config.num_stages * base + config.block_m * config.block_n // 2 * size
    if config.plan == "tail":
        return config.num_stages * (max(base, expand) if tail > size else base)
    return config.num_stages * (base + rank * config.block_k * adapter)


def has_kernels(facts: DeviceFacts) -> bool:
    """Whether Triton's kernels run on such a device."""
    return facts.kind == "cuda" and facts.triton and sm_number(facts.arch) >= 80


def invalid_reason(config: Config, problem: Problem, facts: DeviceFacts) -> str | None:
    """Why ``config`` cannot compute ``problem`` on such a device, or None if it can: the only
    statement of the constraints."""
    if config.plan not in PLANS:
        return f"no plan is called {config.plan!r}; there are {', '.join(PLANS)}"
    if config.decodes:
        reason = _decoding_reason(config, problem)
        if reason is not None:
            return reason
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
    if sm_number(facts.arch) < 80:
        return f"the kernels are compiled for sm_80 and later, not for {facts.arch}"
    if problem.dtype == "float64" or problem.adapter_dtype == "float64":
        return "float64 is computed by the reference"
    if problem.op in LINEARS_OPERATORS:
        return "there is no kernel for several projections"
    if problem.experts and config.plan not in ("tail", "skinny"):
        return "the tail of experts comes from a shrink"
    if config.plan == "preload" and problem.dtype == "float16":
        return "what the tail alone amounts to might not fit float16"
    if problem.four_bit and not config.decodes:
        # The plan is that of the weight in memory.
        return _tiled_invalid_reason(config, problem._replace(four_bit=False), facts)
    if problem.op in MIXED_LINEAR_OPS:
        if config.plan == "preload":
            return _tiled_invalid_reason(Config("grouped"), problem.adapters(), facts)
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
    if config.plan == "persistent":
        reason = _persistent_reason(problem, facts)
        if reason is not None:
            return reason
    if config.block_m == 0:
        # A plan by its name alone; the planner fills in the numbers.
        named = (
            c
            for c in tiled_configs(problem, facts)
            if (c.plan, c.decodes) == (config.plan, config.decodes)
        )
        whole = config.plan in (*WHOLE_RANK_PLANS, "persistent", "preload")
        if whole and not any(is_valid(c, problem, facts) for c in named):
            return _REGISTERS
        return None
    if config.plan == "producer" and config.split_k > 1:
        return "a tile waits for its owner, and nothing for the shares of a tile"
    if config.plan == "persistent" and not config.descriptors:
        return "it loads and stores by tensor descriptors"
    if config.descriptors and not _has_descriptors(problem, facts):
        return _DESCRIPTORS
    if facts.shared_memory and shared_memory(config, problem) > facts.shared_memory - 1024:
        return f"its stages do not fit {facts.shared_memory} bytes of shared memory"
    if config.decodes:
        return _decoding_registers(config, problem, facts)
    return _float16_reason(config, problem, facts) or _register_reason(config, problem, facts)


_DESCRIPTORS = "tensor descriptors need sm_90 and 16-byte strides"


def _has_descriptors(problem: Problem, facts: DeviceFacts) -> bool:
    return problem.aligned and 90 <= sm_number(facts.arch) < 1000


def _persistent_reason(problem: Problem, facts: DeviceFacts) -> str | None:
    """Why the tail cannot be one more step of the base's loop."""
    if problem.dtype != "bfloat16":
        return "the tail is a step of the base's loop, whose dtype is the tail's in bfloat16 alone"
    if problem.dropout and problem.op == "lora_linear_dx":
        return "the mask multiplies the tail alone, which has no accumulator of its own"
    if problem.out_scale:
        return "it has no out_scale"
    if not _has_descriptors(problem, facts) or problem.columns % 8:
        return _DESCRIPTORS
    if problem.r == 0 or problem.r % 8:
        return "S and the adapter have descriptors: the rank is a multiple of 8"
    return None


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
    if sm_number(facts.arch) == 1000:
        return None
    if config.plan == "decode" and (columns, config.block_k) == (64, 64):
        return _REGISTERS
    if columns == 32 and (config.num_warps == 4) != (problem.op == _DAB):
        return _REGISTERS
    if problem.op == _DAB and family(facts.arch) == "sm_100":
        if rank > 32:
            return _REGISTERS
    elif problem.aligned and (columns, config.block_k) == (64, 32):
        return _REGISTERS
    loaded = max(config.block_m, rank) * config.block_k, columns * max(rank, config.block_m)
    # Without 16-byte rows every element loaded has an address of its own.
    if not problem.aligned and max(loaded) > 2048:
        return _REGISTERS
    return None


def _decoding_reason(config: Config, problem: Problem) -> str | None:
    """Why a GEMM cannot decode its weight, of whose bytes 16 are loaded at once."""
    if not problem.four_bit:
        return "there is no four-bit weight to decode"
    if config.plan not in ("in_loop", "tail"):
        return f"{config.plan} takes its weight from memory"
    if config.descriptors:
        return "there is no descriptor of a weight that is decoded"
    if (problem.n if problem.fan_in_fan_out else problem.k) % 32:
        return "the weight's rows are no whole numbers of 16 bytes"
    if problem.fan_in_fan_out and problem.op == "segmented_linear_fwd":
        return "a slice might begin within 16 bytes of the weight"
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
    """What float16's tail, which is TF32, rules out beside bfloat16's (same report)."""
    if problem.dtype != "float16":
        return None
    arch, tile = family(facts.arch), (config.block_m, config.block_n, config.block_k)
    # Rows of a product whose left operand is converted on its way, in a loop.
    converted = 0
    if config.plan in WHOLE_RANK_PLANS or problem.op in SHRINK_OPS:
        converted = config.block_m
    elif problem.op in (*DAB_OPS, _DAB):
        converted = config.block_n
    if arch == "sm_90" and converted >= 64 and config.num_stages > 1:
        return "pipelined, warp groups misread what comes from registers (ptxas before 13.3)"
    if arch == "sm_90" and problem.op == _DAB and config.block_n == 32 and not problem.aligned:
        return _REGISTERS
    if arch == "sm_100":
        spills = tile[:2] == (64, 64) and problem.op in DAB_OPS
        if spills or (problem.op == _DAB and config.block_n == 64):
            return _REGISTERS
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
    """Which tiles spill, by the ahead-of-time report (sm_80, sm_90, sm_100; 2026-11)."""
    rank, nvidia = block_r(config, problem.r), sm_number(facts.arch) < 1000
    if config.plan == "skinny":
        shrink = problem.op in SHRINK_OPS
        if shrink and problem.slices > 1 and config.block_m == 16:
            # Where each row of A lies takes registers, too.
            return _REGISTERS
        columns = config.block_k if shrink else config.block_n
        # The tile of x or dY, and the one of A or of S and D.
        loaded = max(config.block_m * columns, (columns if shrink else config.block_m) * rank)
    elif config.plan == "preload":
        expanded = rank * config.block_n
        if expanded > 2048 * config.num_warps:
            return _REGISTERS
        loaded = max(max(config.block_m, rank) * config.block_k, expanded)
        loaded *= 1 + (problem.dtype == "float32")
    else:
        if config.plan in WHOLE_RANK_PLANS:
            tile = (config.block_m, config.block_n, config.block_k)
            narrow = tile[1:] == (128, 32)
            most = 64 if tile == (128, 128, 64) else 16 if narrow else 32
            if rank > most or (narrow and config.num_warps < 8):
                return _REGISTERS
            small = tile == (64, 64, 32) and sm_number(facts.arch) < 90
            if small or (tile[0] == 16 and not nvidia):
                return "its warps would repeat part of the base product"
            long = 2 * rank > most
            if config.plan == "producer" and _producer_spills(config, problem, facts, long):
                return _REGISTERS
        half = problem.dtype != "float32"
        masked = problem.dropout and problem.op in ("lora_linear_dx", "segmented_linear_dx")
        wide = config.block_m * config.block_n > 128 * 128
        if wide and (masked or problem.out_scale or not config.descriptors):
            return _REGISTERS
        if config.block_m > 128 and config.plan in WHOLE_RANK_PLANS:
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


def _decoding_registers(config: Config, problem: Problem, facts: DeviceFacts) -> str | None:
    """Which tiles spill that decode their weight, by the same report."""
    if config.plan == "in_loop":
        if sm_number(facts.arch) == 1000:
            return "its warps would repeat part of the base product"
        if config.block_m > 16 or block_r(config, problem.r) > 32:
            return _REGISTERS
    if problem.slots and config.block_m > 16:
        return _REGISTERS
    if config.block_m > 64 and (not problem.aligned or family(facts.arch) == "sm_80"):
        return _REGISTERS
    if config.block_m == 16 and not problem.aligned:
        # Every element of x has an address of its own.
        dx = family(facts.arch) == "sm_100" and problem.op == "lora_linear_dx"
        if dx or (config.plan == "in_loop" and problem.dtype == "float16"):
            return _REGISTERS
    return None


def _producer_spills(config: Config, problem: Problem, facts: DeviceFacts, long: bool) -> bool:
    """Whether a second loop and the masks spill where in_loop does not; ``long``: the rank is more
    than half of the tile's longest there."""
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
    """Whether a tail chosen row by row spills: it has a second accumulator, and a mask for it."""
    arch, few = family(facts.arch), config.block_m == 16
    if problem.dtype == "float32":
        summed = problem.op == "segmented_linear_dx" and not config.descriptors
        return sm_number(facts.arch) < 1000 and (
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


def is_valid(config: Config, problem: Problem, facts: DeviceFacts) -> bool:
    return invalid_reason(config, problem, facts) is None


def candidates(problem: Problem, facts: DeviceFacts) -> Iterator[Config]:
    """The configurations worth measuring for ``problem``; all of them valid."""
    for config in (*tiled_configs(problem, facts), *map(Config, ("native", "vendor", "reference"))):
        if is_valid(config, problem, facts):
            yield config
