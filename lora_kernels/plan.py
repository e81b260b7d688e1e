"""Which plan answers a problem, decided from numbers alone, and which one answered, on record.

The plans, one contract (how S reaches the accumulator of the base product):

- ``in_loop``   one pass: x W^T and x A^T accumulate side by side, S B^T is added before the only
  store (p = 0);
- ``tail``      a skinny shrink writes S, the GEMM starts with dot(S, B), in a batch that mixes
  adapters every row with the B of its own;
- ``producer``  one persistent launch: of each row block one tile makes S beside its base product
  and publishes it, all tiles add S B^T last;
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
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native
from .config import (
    MANY_ROWS,
    MIXED_LINEAR_OPS,
    PLANS,
    SKINNY_OPS,
    SMALL_M,
    Config,
    block_r,
    invalid_reason,
    is_valid,
    tiled_configs,
)
from .device import DeviceFacts
from .problem import ELEMENT_BYTES, Problem


class Answer(NamedTuple):
    """What answered one operator call: ``backend`` is "cpu", "cuda" or "reference"."""

    backend: str
    config: Config
    problem: Problem

    @property
    def op(self) -> str:
        return self.problem.op

    @property
    def plan(self) -> str:
        return self.config.plan


_last: Answer | None = None
_recorders: list[list[Answer]] = []
_forced: Config | None = None
_batch_invariant = False

# Shared with a node of the graph that answers without Python: whether somebody asks who answers, or
# forces an answer (the node then calls the operators), and whether it has answered since an
# operator did.
_shared = torch.zeros(2, dtype=torch.int64, device="cpu")
_asked, _noted = (ctypes.c_int64.from_address(_shared.data_ptr() + 8 * i) for i in range(2))
_last_of_node: Callable[[], Answer] | None = None


def plan(problem: Problem, facts: DeviceFacts) -> Config:
    """The configuration for ``problem`` on a device with these facts. Pure but for
    :func:`force_plan`.

    >>> from lora_kernels.device import DeviceFacts
    >>> problem = Problem("lora_linear_fwd", 512, 4096, 4096, 16, "bfloat16", "float32")
    >>> plan(problem, DeviceFacts("cpu", "some cpu", "avx2")).plan
    'vendor'
    >>> plan(problem, DeviceFacts("cpu", "some cpu", "avx2", native="avx2")).plan
    'native'
    >>> plan(problem, DeviceFacts("xpu", "some accelerator", "unknown")).plan
    'reference'
    """
    if _forced is not None:
        reason = invalid_reason(_forced, problem, facts)
        if reason is not None:
            raise ValueError(
                f"{_forced} was forced and cannot answer {problem} on {facts.name}: {reason}"
            )
        return _forced
    return unforced(problem, facts)


def unforced(problem: Problem, facts: DeviceFacts) -> Config:
    """The same where :func:`force_plan` does not reach: for a part of what a plan computes."""
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
    # The producer plan answers where a tuner measured it or a user forces it: what its tiles wait
    # for one another is a guess, on which its estimate would win most large shapes.
    tiled = [
        c
        for c in tiled_configs(problem, facts)
        if c.plan != "producer" and is_valid(c, problem, facts)
    ]
    return min([vendor, *tiled], key=lambda config: estimate_us(config, problem, facts))


# What the estimate takes for granted, none of it measured by us yet: a launch in a graph; the share
# of peak that the library's GEMM reaches (FIELD's cuBLAS on an H200: 0.73 to 0.79 of the
# datasheet's 989 TFLOP/s) and that a Triton tile of each size does (0.95 of cuBLAS for the largest,
# at large K); the share of bandwidth that streaming kernels reach, and how much faster the L2 is;
# of a batch that mixes adapters, that its rows are dealt out evenly among all slots; and of a tile
# of the producer plan, what three answers of the L2 in a row take: its ticket, its flag, and S.
_LAUNCH_US = 2.0
_LIBRARY_SHARE = 0.76
_TILE_SHARE = {128 * 256: 0.72, 128 * 128: 0.66, 64 * 128: 0.55}
_STREAM_SHARE = 0.85
_CACHE_OVER_MEMORY = 2.5
_HANDOVER_US = 1.0


def estimate_us(config: Config, problem: Problem, facts: DeviceFacts) -> float:
    """Microseconds that a GPU should need, from bytes, FLOP, multiprocessors and whole waves."""
    flops, bandwidth = (facts.half_flops or 3e14) / 1e6, (facts.bandwidth or 2e12) / 1e6
    size = ELEMENT_BYTES[problem.dtype]
    if size == 4:
        # float32 without TF32 runs on the ordinary units, an eighth of the tensor cores at best.
        flops /= 8

    def streamed(elements: float) -> float:
        return elements * size / (bandwidth * _STREAM_SHARE)

    m, n, k, r = problem.m, problem.columns, problem.inner, problem.r
    mixed = problem.slots > 0
    adapters = max(min(problem.slots, m), 1)
    # The library computes float16's tail in float32, for which it copies x and Y.
    copies = config.plan == "vendor" and problem.dtype == "float16" and not mixed
    if problem.op in SKINNY_OPS:
        columns = k if problem.op == "lora_shrink" else problem.n + problem.k
        once = streamed(m * columns + r * columns)
        launches = 1 if config.plan == "skinny" else 2
        masks = 0.0
        if problem.dropout and config.plan == "vendor":
            # A masked copy of x, written and read.
            launches, masks = 3, streamed(3 * m * problem.k)
        if copies:
            launches, masks = launches + 1, masks + streamed(4 * m * columns)
        return once + masks + launches * _LAUNCH_US

    base_bytes = streamed(m * k + n * k + m * n)
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
        # The scale is a launch of its own where the library makes S.
        return product + shrink + tail + masks + (1 if mixed else 2) * _LAUNCH_US
    rank = block_r(config, problem.r)
    tiles_m, tiles_n = -(-m // config.block_m), -(-n // config.block_n)
    waves = -(-tiles_m * tiles_n * config.split_k // max(facts.processors, 1))
    share = _TILE_SHARE.get(config.block_m * config.block_n, 0.4)
    # How many tiles in a row make S: all, or one.
    making = {"in_loop": 1.0, "producer": 1 / max(tiles_n, 1)}.get(config.plan, 0.0)
    depth = k / config.split_k * (1 + rank / config.block_n * making)
    walked: float = rank
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
    cache_bytes = streamed(tiles_m * n * k + tiles_n * m * k) / _CACHE_OVER_MEMORY
    product = max(waves * tile_flops / per_processor, base_bytes, cache_bytes)
    if config.split_k > 1:
        partial = tiles_m * tiles_n * config.block_m * (config.block_n + rank)
        product += streamed(2 * config.split_k * partial * 4 / size) / _CACHE_OVER_MEMORY
    # Pointers instead of descriptors cost addresses and registers.
    product *= 1.0 if config.descriptors else 1.05
    product += waves * _HANDOVER_US * (config.plan == "producer")
    return product + _LAUNCH_US + (shrink if config.plan == "tail" else 0.0)


def answered(backend: str, config: Config, problem: Problem) -> None:
    """Called by each backend once per operator call, with what is about to answer it."""
    global _last
    _last = Answer(backend, config, problem)
    _noted.value = 0
    for recorder in _recorders:
        recorder.append(_last)


def last_plan() -> Answer | None:
    """What answered the most recent operator call of this process, or None before the first.

    >>> import torch, lora_kernels as lk
    >>> x, w, a, b = (torch.ones(s) for s in ((2, 3), (4, 3), (1, 3), (4, 1)))
    >>> _ = lk.lora_linear(x, w, a, b)
    >>> lk.last_plan().op, lk.last_plan().backend, lk.last_plan().plan in ("native", "vendor")
    ('lora_linear_fwd', 'cpu', True)
    """
    if _noted.value and _last_of_node is not None:
        return _last_of_node()
    return _last


def share(last_of_node: Callable[[], Answer]) -> Tensor:
    """For a node that answers without Python: the cells that it reads and writes. ``last_of_node``
    tells what it answered last."""
    global _last_of_node
    _last_of_node = last_of_node
    return _shared


def _update_asked() -> None:
    _asked.value = bool(_recorders) or _forced is not None


@contextlib.contextmanager
def record_plans() -> Iterator[list[Answer]]:
    """Collect an :class:`Answer` for every operator call inside the block, from all threads,
    backward included."""
    recorder: list[Answer] = []
    _recorders.append(recorder)
    _update_asked()
    try:
        yield recorder
    finally:
        # By identity: two recorders that hold equal answers are still two recorders.
        _recorders[:] = [other for other in _recorders if other is not recorder]
        _update_asked()


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
    _update_asked()
    try:
        yield
    finally:
        _forced = previous
        _update_asked()


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


# Tables: one JSON file per device, {"device", "versions", "kernels", "date", "plans": {key:
# {"config", "median_us"}}}.


def cache_directory() -> Path:
    """Where tuned tables live: ``$LORA_KERNELS_CACHE``, else the platform's cache directory of the
    user."""
    chosen = os.environ.get("LORA_KERNELS_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lora_kernels"


def table_name(facts: DeviceFacts) -> str:
    return (
        re.sub(r"[^a-z0-9]+", "-", f"{facts.kind}-{facts.name}-{facts.arch}".lower()).strip("-")
        + ".json"
    )


@functools.cache
def kernel_sources_hash() -> str:
    """A hash of everything whose change makes a measurement stale: kernels and launchers as they
    lie in the package, the CPU's kernels as they were built. So a checkout and a copy of it that is
    installed have the same."""
    package = Path(__file__).parent
    files = [package / "cpu.py", package / "cuda.py", package / "vendor.py"]
    files += sorted((package / "kernels").glob("*.py"))
    digest = hashlib.sha256(_native.built_from().encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions a measurement depends on; a table from others is ignored."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"torch": torch.__version__, "triton": triton}


@functools.cache
def table(facts: DeviceFacts) -> dict[str, Config]:
    """The measured configurations for a device."""
    return read_table(cache_directory() / table_name(facts))


def read_table(path: Path) -> dict[str, Config]:
    """The plans of one table; empty if it does not exist or was measured with other versions or
    other kernels."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        if content["versions"] != versions() or content["kernels"] != kernel_sources_hash():
            return {}
        return {key: Config(**entry["config"]) for key, entry in content["plans"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"the tuned plans in {path} cannot be read ({error!r}); heuristics answer", stacklevel=2
        )
        return {}


def write_table(path: Path, facts: DeviceFacts, measured: dict[str, dict[str, Any]]) -> None:
    """Write ``measured`` = {key: {"config": Config, ...}} whole and atomically, keeping other keys
    that still hold."""
    kept = {key: {"config": asdict(config)} for key, config in read_table(path).items()}
    new = {key: {**entry, "config": asdict(entry["config"])} for key, entry in measured.items()}
    content = {
        "device": asdict(facts),
        "versions": versions(),
        "kernels": kernel_sources_hash(),
        "plans": dict(sorted((kept | new).items())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
    forget_tables()


def forget_tables() -> None:
    """Drop what is held in memory, so that the next call reads the tables again."""
    table.cache_clear()
    _plan.cache_clear()
