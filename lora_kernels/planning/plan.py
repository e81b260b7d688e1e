"""Which plan answers a problem, decided from numbers alone.

The plans, one contract (how S reaches the accumulator of the base product):

- ``in_loop``   one pass: x W^T and x A^T accumulate side by side, S B^T is added before the only
  store (p = 0);
- ``tail``      a skinny shrink writes S, the GEMM starts with dot(S, B), in a batch that mixes
  adapters every row with the B of its own;
- ``producer``  one persistent launch: of each row block one tile makes S beside its base product
  and publishes it, all tiles add S B^T last;
- ``persistent`` the tail plan as one flat loop over all tiles and steps, of which the tail is the
  last of each tile;
- ``preload``   our kernels write S and S B^T + bias, in a batch that mixes adapters every row's by
  its own, and the library's GEMM accumulates onto it;
- ``decode``    a batch that mixes adapters, of few rows: shrink and expand in one launch;
- ``grouped``   a batch that mixes adapters: shrink, then expand, by blocks of rows of one adapter;
- ``native``    the CPU's C++ kernels: tail, then GEMM, in one pass over tiles;
- ``vendor``    the library's GEMM, then the tail added in place (adapters that are mixed: by decode
  or grouped kernels): the floor under every shape;
- ``reference`` plain torch in float32 or float64: where no backend exists.

The user's measured table decides if there is one (``python -m lora_kernels tune``), else a
heuristic that is always valid.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from ..spec.problem import ELEMENT_BYTES, Problem
from .answers import asked
from .config import (
    MANY_ROWS,
    MIXED_LINEAR_OPS,
    PLANS,
    SHRINK_OPS,
    SKINNY_OPS,
    SMALL_M,
    Config,
    block_r,
    sm_number,
    tiled_configs,
)
from .device import DeviceFacts
from .tables import table
from .validity import invalid_reason, is_valid

_forced: Config | None = None

_batch_invariant = False


def plan(problem: Problem, facts: DeviceFacts) -> Config:
    """The configuration for ``problem`` on a device with these facts. Pure but for
    :func:`force_plan`.

    >>> from lora_kernels.planning.device import DeviceFacts
    >>> problem = Problem("lora_linear_fwd", 512, 4096, 4096, 16, "bfloat16", "float32")
    >>> plan(problem, DeviceFacts("cpu", "some cpu", "avx2")).plan
    'vendor'
    >>> plan(problem, DeviceFacts("cpu", "some cpu", "avx2", native="avx2")).plan
    'native'
    >>> plan(problem, DeviceFacts("xpu", "some accelerator", "unknown")).plan
    'reference'
    """
    if problem.experts:
        # No kernel of theirs decodes a weight: the plan is that of the decoded one.
        problem = problem._replace(four_bit=False)
    if _forced is not None:
        reason = invalid_reason(_forced, problem, facts)
        if reason is not None:
            raise ValueError(
                f"{_forced} was forced and cannot answer {problem} on {facts.name}: {reason}"
            )
        return _forced
    return plan_ignoring_force(problem, facts)


def plan_ignoring_force(problem: Problem, facts: DeviceFacts) -> Config:
    """The same without :func:`force_plan`: for a part of a call whose plan is chosen already."""
    if _batch_invariant and problem.slots:
        # One choice for all M, by rule: a measured one holds for a range of M.
        return heuristic(problem._replace(m=MANY_ROWS), facts)
    return _plan(problem, facts)


@functools.lru_cache(maxsize=4096)
def _plan(problem: Problem, facts: DeviceFacts) -> Config:
    tuned = table(facts).get(problem.bucketed().key())
    if tuned is not None and is_valid(tuned, problem, facts):
        return tuned
    return heuristic(problem, facts)


def heuristic(problem: Problem, facts: DeviceFacts) -> Config:
    """Valid everywhere: on a GPU the candidate with the shortest estimate (of those for a batch
    that mixes adapters without a base the first), on a CPU its native kernels, else the library's
    GEMM where a backend of ours calls it, else the reference."""
    native, vendor = Config("native"), Config("vendor")
    # The baseline is for machines of which the library knows more than 128-bit vectors (a guess).
    if is_valid(native, problem, facts) and facts.native != "baseline":
        return native
    if problem.slots and problem.op not in MIXED_LINEAR_OPS:
        # In their order: nothing is measured that an estimate could weigh.
        shipped = (c for c in tiled_configs(problem, facts) if is_valid(c, problem, facts))
        return next(shipped, Config("reference"))
    if not is_valid(vendor, problem, facts):
        return Config("reference")
    # These answer where a tuner measured them or a user forces them: what the producer's tiles wait
    # for one another and what the persistent loop gains are guesses, on which they would win.
    tiled = [
        c
        for c in tiled_configs(problem, facts)
        if c.plan not in ("producer", "persistent") and is_valid(c, problem, facts)
    ]
    # Where the weights of experts are all that counts, the smallest tile leaves the most room.
    return min(
        [vendor, *tiled],
        key=lambda c: (estimate_us(c, problem, facts), c.block_m * (problem.experts > 0)),
    )


# What the estimate takes for granted, none of it measured by us yet: a launch in a graph; the share
# of peak that the library's GEMM reaches (seen on an H200: 770 to 798 TFLOP/s at 8192^3, where 1980
# MHz are 1070) and that a Triton tile of each size does (predicted: 600 to 680); the share of
# bandwidth that streaming kernels reach, and how much faster the L2 is; how much of its C the
# library's GEMM reads in its own time;
# of a batch that mixes adapters, that its rows are dealt out evenly among all slots; and of a tile
# of the producer plan, what three answers of the L2 in a row take: its ticket, its flag, and S.
_LAUNCH_US = 2.0

_LIBRARY_SHARE = 0.74

_TILE_SHARE = {128 * 256: 0.60, 128 * 128: 0.55, 64 * 128: 0.46}

_STREAM_SHARE = 0.85

_CACHE_OVER_MEMORY = 2.5

_C_SHARE = 0.6

_HANDOVER_US = 1.0

# Of a product's time, what remains where a tile's end overlaps the next one's begin and results
# leave by descriptors (predicted: 3 to 6% and 3 to 5%).
_FLAT_SHARE = 0.93

# Of a four-bit weight: bytes with its absmax; weights that a multiprocessor decodes in a
# microsecond, by nine instructions each (ahead-of-time report) on 128 lanes at 1.7 GHz.
_FOUR_BIT_BYTES = 0.53

_DECODED_PER_US = 24e3


def estimate_us(config: Config, problem: Problem, facts: DeviceFacts) -> float:
    """Microseconds that a GPU should need, from bytes, FLOP, multiprocessors and whole waves."""
    if problem.four_bit and not config.decodes:
        # Read, and written in the rows' dtype.
        moved = (_FOUR_BIT_BYTES + ELEMENT_BYTES[problem.dtype]) * problem.n * problem.k
        us = moved / ((facts.bandwidth or 2e12) / 1e6 * _STREAM_SHARE) + _LAUNCH_US
        return us + estimate_us(config, problem._replace(four_bit=False), facts)
    flops, bandwidth = (facts.half_flops or 3e14) / 1e6, (facts.bandwidth or 2e12) / 1e6
    size = ELEMENT_BYTES[problem.dtype]
    if size == 4:
        # float32 without TF32 runs on the ordinary units, an eighth of the tensor cores at best.
        flops /= 8

    def streamed(elements: float) -> float:
        return elements * size / (bandwidth * _STREAM_SHARE)

    m, n, k, r = problem.m, problem.columns, problem.inner, problem.r
    mixed = problem.slots > 0
    adapters = max(min(problem.slots or problem.experts, m), 1)
    weights = adapters if problem.experts else 1
    # The library computes float16's tail in float32, for which it copies x and Y.
    copies = config.plan == "vendor" and problem.dtype == "float16" and not mixed
    if problem.op in SKINNY_OPS:
        columns = k if problem.op in SHRINK_OPS else problem.n + problem.k
        once = streamed(m * columns + weights * r * columns)
        launches = 1 if config.plan == "skinny" else 2
        if config.plan == "vendor" and problem.experts:
            launches = _library_launches(problem, facts)
        masks = 0.0
        if problem.dropout and config.plan == "vendor":
            # A masked copy of x, written and read.
            launches, masks = 3, streamed(3 * m * problem.k)
        if copies:
            launches, masks = launches + 1, masks + streamed(4 * m * columns)
        return once + masks + launches * _LAUNCH_US

    weight = n * k * (_FOUR_BIT_BYTES / size if config.decodes else 1.0)
    base_bytes = streamed(m * k + weights * weight + m * n)
    base_flops = 2.0 * m * n * k
    shrink = streamed(m * k + adapters * problem.slices * r * k) + _LAUNCH_US
    if config.plan == "vendor":
        tail = streamed(2 * m * n + mixed * adapters * r * n) + _LAUNCH_US
        if mixed and m <= SMALL_M and not problem.dropout and problem.op != "segmented_linear_dx":
            # The decode kernel shrinks and expands in one launch.
            tail -= _LAUNCH_US
        # A masked copy of x, or for dX of the tail's product, written and read.
        masks = 0.0
        if problem.dropout and not mixed:
            masks = _LAUNCH_US + streamed(3 * m * problem.k)
        if copies:
            tail += 3 * _LAUNCH_US + streamed(4 * m * k + 8 * m * n)
        product = max(base_flops / (flops * _LIBRARY_SHARE), base_bytes)
        if problem.experts:
            # Half a tile of 128 rows an expert is lost (a guess). Results and tails are filled up
            # with zeros, and the tail's product is written first.
            lost = 1 + 64 * (weights - 1) / max(m, 1)
            product = max(lost * base_flops / (flops * _LIBRARY_SHARE), base_bytes)
            passes = streamed(6 * m * n + 2 * m * r + adapters * r * (n + k))
            return product + shrink + passes + 3 * _library_launches(problem, facts) * _LAUNCH_US
        # The scale is a launch of its own where the library makes S.
        return product + shrink + tail + masks + (1 if mixed else 2) * _LAUNCH_US
    if config.plan == "preload":
        first = streamed(m * k + m * n + adapters * r * (problem.slices * k + n))
        launches = 3 if mixed else 2
        if mixed:
            first += streamed(2 * m * problem.slices * r)
        else:
            # Fewer programs than multiprocessors leave bandwidth unused.
            first *= max(1.0, facts.processors / max(-(-m // config.block_m), 1))
        if problem.out_scale:
            first, launches = first + streamed(4 * m * n), launches + 2
        product = max(base_flops / (flops * _LIBRARY_SHARE), base_bytes)
        return product + first + streamed(m * n) * _C_SHARE + launches * _LAUNCH_US
    rank = block_r(config, problem.r)
    tiles_m, tiles_n = -(-m // config.block_m) + weights - 1, -(-n // config.block_n)
    waves = -(-tiles_m * tiles_n * config.split_k // max(facts.processors, 1))
    share = _TILE_SHARE.get(config.block_m * config.block_n, 0.4)
    # How many tiles in a row make S: all, or one.
    making = {"in_loop": 1.0, "producer": 1 / max(tiles_n, 1)}.get(config.plan, 0.0)
    depth = k / config.split_k * (1 + rank / config.block_n * making)
    walked: float = rank
    if config.plan == "persistent":
        walked = -(-r // config.block_k) * config.block_k
    if mixed:
        # Every slot that occurs in a tile is walked, by all of its rows.
        occur = min(config.block_m, 1 + (adapters - 1) * config.block_m / max(m, 1))
        walked = (
            occur
            * -(-r // rank)
            * rank
            * (problem.slices if problem.op == "segmented_linear_dx" else 1)
        )
    tile_flops = 2.0 * config.block_m * config.block_n * (depth + walked)
    per_processor = flops * share / max(facts.processors, 1)
    # Every row of tiles reads the weight and every column x, from the cache at best.
    cache_bytes = streamed(tiles_m * weight + tiles_n * m * k) / _CACHE_OVER_MEMORY
    tile_us = tile_flops / per_processor
    if config.decodes:
        tile_us += config.block_n * k / config.split_k / _DECODED_PER_US
    product = max(waves * tile_us, base_bytes, cache_bytes)
    if config.split_k > 1:
        partial = tiles_m * tiles_n * config.block_m * (config.block_n + rank)
        product += streamed(2 * config.split_k * partial * 4 / size) / _CACHE_OVER_MEMORY
    # Pointers instead of descriptors cost addresses and registers.
    product *= 1.0 if config.descriptors else 1.05
    product += waves * _HANDOVER_US * (config.plan == "producer")
    if config.plan == "persistent":
        # An adapter of another dtype is copied.
        copied = problem.adapter_dtype != problem.dtype
        product = product * _FLAT_SHARE + copied * _LAUNCH_US
    return product + _LAUNCH_US + shrink * (config.plan in ("tail", "persistent"))


def _library_launches(problem: Problem, facts: DeviceFacts) -> int:
    """How many launches a product of experts takes: the grouped GEMM, which the library has for
    bfloat16 from sm_90 on, and what fills up its result; else one for each expert that may have
    rows."""
    grouped = problem.dtype == "bfloat16" and problem.aligned and problem.r % 8 == 0
    return 3 if grouped and sm_number(facts.arch) >= 90 else min(problem.experts, problem.m)


@contextlib.contextmanager
def force_plan(choice: str | Config) -> Iterator[None]:
    """Inside the block every call is answered by this plan (or whole configuration), or raises
    where that cannot be.

    Raises:
        ValueError: there is no such plan; and, from the calls, where the plan cannot answer the
            problem.
    """
    global _forced
    config = Config(choice) if isinstance(choice, str) else choice
    if config.plan not in PLANS:
        raise ValueError(f"no plan is called {config.plan!r}; there are {', '.join(PLANS)}")
    previous, _forced = _forced, config
    try:
        with asked():
            yield
    finally:
        _forced = previous


class batch_invariant:
    """``lk.batch_invariant(True)``: from now on one plan answers every batch that mixes adapters,
    so that the bits of a row's adapter delta depend neither on how many rows there are nor on the
    others (at fixed K, N, r, dtype, device and versions; the base product belongs to the library).
    On a CPU they never do. In a ``with`` statement the block's end brings back what was before.

    Idea: batch-invariant kernels (He, "Defeating nondeterminism in LLM inference", 2025).
    """

    def __init__(self, enabled: bool = True) -> None:
        global _batch_invariant
        self._previous, _batch_invariant = _batch_invariant, enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        global _batch_invariant
        _batch_invariant = self._previous


def forget_tables() -> None:
    """Drop the tables held in memory: the next call reads them again."""
    table.cache_clear()
    _plan.cache_clear()
