"""How it is measured: steps, clocks, rounds of all variants, and the machine's own limits.

Inputs are random and drawn anew for every round. The weight is cold, as in a model whose layers
follow each other. On a CPU a step is called and timed by the host's clock, and consecutive steps
take turns among copies of the weight, packed ones included. On a GPU a step is captured in a CUDA
graph, events around its replay time it, and before it the cache is filled with something else.
(Filling it on a CPU would evict the interpreter too: measured, a call of 2 us then takes 27.)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels.backends import cpu
from lora_kernels.backends.tune import CudaTimer, host_seconds
from lora_kernels.functional.linear import packed_linear
from lora_kernels.integrations.compare_memory import SavedTensors, step_peak
from lora_kernels.layers.packed import PackedWeight

from .baselines import Variant

Outputs = tuple[Tensor, ...]
Step = Callable[[], Outputs]

# Copies of the weight that a CPU's steps rotate among; a small layer stays in the cache, as in a
# small model.
_MAX_SETS = 16

# Where Linux tells the caches of a core; elsewhere a usual size is assumed.
_CACHES = "/sys/devices/system/cpu/cpu0/cache"
_USUAL_CACHE_BYTES = 32 * 2**20

_FEWEST_ROUNDS = 5


class EagerStep:
    """One step of a variant on the row's own x and dy: y, or its slices, or (y, dx, dA, dB)."""

    def __init__(self, variant: Variant, mode: str, x: Tensor, dy: Tensor | None = None) -> None:
        self.variant, self.mode, self.x, self.dy = variant, mode, x, dy

    def __call__(self) -> Outputs:
        if self.mode == "forward":
            with torch.no_grad():
                y = self.variant.forward(self.x)
            return (y,) if isinstance(y, Tensor) else tuple(y)
        y = self.variant.forward(self.x)
        assert isinstance(y, Tensor)
        return (y.detach(), *torch.autograd.grad(y, (self.x, *self.variant.trainable), self.dy))


class CpuClock:
    """Seconds of one call by the host's clock."""

    # Rounds that do not count, the seconds after which none of them begins, and the most that do.
    warmup, warmup_seconds, rounds = 3, 0.3, 100

    def __init__(self) -> None:
        sizes = [_kib(path) for path in Path(_CACHES).glob("index*/size")]
        self.cache_bytes = max(sizes, default=_USUAL_CACHE_BYTES)

    def sets(self, weight: Tensor, result: Tensor) -> int:
        """How many copies of ``weight`` the steps rotate among, to find each outside the cache.

        Every step in between reads another copy and writes a ``result`` of its own; where that
        alone fills the cache twice, one copy is enough.
        """
        return min(-(-2 * self.cache_bytes // (weight.nbytes + result.nbytes)), _MAX_SETS)

    def measure(self, step: Callable[[], Any]) -> float:
        return host_seconds(step)


def _kib(path: Path) -> int:
    """The bytes in a file that says "32768K"."""
    return int(path.read_text().strip().removesuffix("K")) * 1024


class CudaClock(CudaTimer):
    """Seconds of one call by events, with a cold cache."""

    warmup, warmup_seconds, rounds = 200, 1.5, 200

    def sets(self, weight: Tensor, result: Tensor) -> int:
        return 1

    def measure(self, step: Callable[[], Any]) -> float:
        return self.seconds(step)


Clock = CpuClock | CudaClock


class Rounds:
    """One sample of every variant per round, in an order that rotates, the leading variant last.

    ``before`` times all variants but the leading one, ``lead`` times that: the setup and the target
    of a round for a benchmark runner. ``steps`` holds a variant's step once per set of weights.
    """

    def __init__(
        self, clock: Clock, steps: dict[str, list[Step]], leader: str, inputs: list[Tensor]
    ) -> None:
        self.clock, self.steps, self.leader, self.inputs = clock, steps, leader, inputs
        self.samples: dict[str, list[float]] = {key: [] for key in steps}
        self._others = [key for key in steps if key != leader]
        self._taken = 0

    def before(self) -> None:
        with torch.no_grad():
            for tensor in self.inputs:
                tensor.normal_()
        # Not the same neighbour in every round: what runs before a step heats caches and clocks for
        # it.
        self._others = self._others[1:] + self._others[:1]
        for key in self._others:
            self._sample(key)

    def lead(self) -> None:
        self._sample(self.leader)

    def warm_up(self, rounds: int, limit: float) -> float:
        """Run rounds that do not count, one at least and none that would begin after ``limit``
        seconds; returns the seconds that the last one took."""
        # What a layer prepares on its first call; the first set's was made when it was checked.
        for sets in self.steps.values():
            for step in sets[1:]:
                step()
        begin = time.perf_counter()
        for _ in range(rounds):
            start = time.perf_counter()
            self.before()
            self.lead()
            stop = time.perf_counter()
            if stop - begin > limit:
                break
        for samples in self.samples.values():
            samples.clear()
        return stop - start

    def _sample(self, key: str) -> None:
        # One set after the other through all variants: each is touched again only after all others
        # were.
        sets = self.steps[key]
        self._taken += 1
        self.samples[key].append(self.clock.measure(sets[self._taken % len(sets)]))


def quartiles(samples: list[float]) -> dict[str, float]:
    """Median and quartiles in seconds, and of how many samples."""
    q1, median, q3 = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    )
    return {
        "median_s": median.item(),
        "q1_s": q1.item(),
        "q3_s": q3.item(),
        "rounds": len(samples),
    }


def samples(
    steps: Mapping[str, Callable[[], Any]],
    seconds: float,
    *,
    lasting: float = 0.0,
    before: Callable[[str], Any] = lambda name: None,
) -> dict[str, list[float]]:
    """Microseconds of each step on a CPU, in rounds of all of them, every other round backwards.

    With ``lasting`` a sample is the mean of a run of calls that lasts so many seconds, after one
    that is not timed: a training run does not find another implementation's data in its caches and
    heap at every step. ``before`` is called with a step's name ahead of its sample, off the clock.
    """
    repeats = {}
    for name, step in steps.items():
        before(name)
        repeats[name] = int(lasting / min(host_seconds(step) for _ in range(4))) + 1
    found: dict[str, list[float]] = {name: [] for name in steps}
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < _FEWEST_ROUNDS:
        for name in [*steps][:: -1 if rounds % 2 else 1]:
            step = steps[name]
            before(name)
            if lasting:
                step()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            found[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
        rounds += 1
    return found


def medians(steps: Mapping[str, Callable[[], Any]], seconds: float, **how: Any) -> dict[str, float]:
    """The median of each step's :func:`samples`."""
    found = samples(steps, seconds, **how)
    return {name: statistics.median(times) for name, times in found.items()}


def native_answers(call: Callable[[], Any]) -> list[lk.Answer]:
    """The answers of a call; the run ends unless our native kernels gave all, one at least."""
    with lk.record_plans() as answers:
        call()
    if {(answer.backend, answer.plan) for answer in answers} != {("cpu", "native")}:
        raise SystemExit(f"not answered by the native kernels: {[*map(str, answers)]}")
    return answers


def memory(step: EagerStep) -> dict[str, int]:
    """What a training step holds: bytes saved for backward, x among them and the frozen weight not,
    and on a GPU the step's peak."""
    if step.mode != "training":
        return {}
    found = {"peak_bytes": step_peak(step, "cuda")} if step.x.is_cuda else {}
    with SavedTensors([step.variant.weight, *step.variant.trainable]) as saved:
        y = step.variant.forward(step.x)
    del y
    return found | {"saved_bytes": saved.peak}


def roofline(clock: Clock, device: str, dtypes: list[str]) -> dict[str, Any]:
    """What the machine can do: the library's GEMM per dtype, our own over a packed weight where
    there is one, and the bandwidth of a copy.

    The best of several calls each: a roof. Copied bytes count twice, read and written.
    """
    gpu = device == "cuda"
    size, copied, repeats = (8192, 2**30, 30) if gpu else (2048, 2**27, 8)
    flop, rates, own_rates = 2 * size**3, {}, {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in "ab")
        rates[dtype] = flop / _best(clock, partial(torch.mm, a, b.t()), repeats)
        if not gpu and cpu.packs(b):
            packed = PackedWeight().get(b, False)
            assert packed is not None
            product = partial(packed_linear, a, b, None, False, packed)
            own_rates[dtype] = flop / _best(clock, product, repeats)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied / _best(clock, partial(target.copy_, source), repeats)
    return {
        "gemm_size": size,
        "gemm_flop_per_s": rates,
        "own_gemm_flop_per_s": own_rates,
        "copy_bytes_per_s": bandwidth,
    }


def _best(clock: Clock, call: Callable[[], Any], repeats: int) -> float:
    times = [clock.measure(call) for _ in range(repeats)]
    # The first calls compile, page memory in and choose algorithms.
    return min(times[2:])
