"""Measure the candidate configurations of a problem on this machine, and write the best into the
user's table.

Tuning is explicit (``python -m lora_kernels tune``): it never runs inside a training step or a
graph capture.
"""

from __future__ import annotations

import functools
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..planning import plan, tables
from ..planning.config import Config
from ..planning.device import facts
from ..planning.validity import candidates
from ..spec.four_bit import quantize
from ..spec.problem import PROBLEM_OF, Problem
from ..spec.reference import tail_dtype
from ..spec.segments import SegmentTable
from . import cpu, cuda

# M, K and N; or in the place of N the widths of the slices of a batch that mixes adapters.
Shape = tuple[int, int, int | Sequence[int]]

# Where a device does not tell.
_USUAL_CACHE_BYTES = 32 * 2**20

ANSWERS: dict[str, Callable[..., Any]] = {"cpu": cpu.answer, "cuda": cuda.answer}


@dataclass(frozen=True)
class Measurement:
    """Medians in microseconds per candidate, fastest first, for one operator's problem."""

    problem: Problem
    medians_us: dict[Config, float]

    @property
    def best(self) -> Config:
        return next(iter(self.medians_us))


def arguments_for(
    op: str,
    m: int,
    k: int,
    n: int,
    r: int,
    *,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout_p: float,
    fan_in_fan_out: bool,
    device: torch.device,
    four_bit: bool = False,
) -> dict[str, Any]:
    """Random inputs of one operator (zeros would run faster)."""

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    rng = torch.tensor([1, 2, 0, 0], device=device) if dropout_p else None
    common: dict[str, Any] = {"rng": rng, "dropout_p": dropout_p}
    scale = torch.ones((), device=device)
    lora_a, lora_b = normal(r, k, dtype=adapter_dtype), normal(n, r, dtype=adapter_dtype)
    if op == "lora_shrink":
        return common | {"x": normal(m, k), "lora_a": lora_a, "scale": scale}
    if op == "lora_linear_dab":
        tails = {
            "s": normal(m, r, dtype=tail_dtype(dtype)),
            "d": normal(m, r, dtype=tail_dtype(dtype)),
            "da_dtype": adapter_dtype,
            "db_dtype": adapter_dtype,
        }
        return common | tails | {"dy": normal(m, n), "x": normal(m, k)}
    weight = _weight(normal(k, n) if fan_in_fan_out else normal(n, k), four_bit)
    rows = {"x": normal(m, k)} if op == "lora_linear_fwd" else {"dy": normal(m, n)}
    adapter = {
        "lora_a": lora_a,
        "lora_b": lora_b,
        "scale": scale,
        "fan_in_fan_out": fan_in_fan_out,
    }
    return common | rows | weight | adapter


def _weight(weight: Tensor, four_bit: bool) -> dict[str, Any]:
    """The arguments that say it; of a four-bit one in the most usual format."""
    if not four_bit:
        return {"weight": weight}
    data, state = quantize(weight.float(), "nf4", block=64, double_quant=True)
    return {"weight": data, "quant": state.tensors(), "quant_block": state.block}


def mixed_arguments_for(
    op: str,
    m: int,
    k: int,
    widths: Sequence[int],
    r: int,
    *,
    slots: int,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    dropout_p: float,
    fan_in_fan_out: bool,
    device: torch.device,
    four_bit: bool = False,
) -> dict[str, Any]:
    """The same for an operator of a batch that mixes adapters, whose rows take turns among the
    slots."""

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    n, total = len(widths), sum(widths)
    seg = SegmentTable.from_rows(
        [row % slots for row in range(m)], [r] * slots, [1.0] * slots, device=device
    )
    a = [normal(slots, r, k, dtype=adapter_dtype) for _ in widths]
    b = [normal(slots, width, r, dtype=adapter_dtype) for width in widths]
    tails = [normal(m, n, r, dtype=tail_dtype(dtype)) for _ in range(2)]
    given: dict[str, Any] = {
        "x": normal(m, k),
        "y": normal(m, total),
        "dy": normal(m, total),
        "s": tails[0],
        "d": tails[1],
        "lora_a": a,
        "lora_b": b,
        "fan_in_fan_out": fan_in_fan_out,
        "table": seg.tensors(),
        "widths": list(widths),
        "r_max": r,
        "da_dtype": adapter_dtype,
        "db_dtype": adapter_dtype,
    }
    given |= _weight(normal(k, total) if fan_in_fan_out else normal(total, k), four_bit)
    if dropout_p:
        given |= {"rng": torch.tensor([1, 2, 0, 0], device=device), "dropout_p": dropout_p}
    names = set(inspect.signature(PROBLEM_OF[op]).parameters)
    return {name: value for name, value in given.items() if name in names}


def measure(op: str, arguments: dict[str, Any], *, seconds: float = 2.0) -> Measurement:
    """Time every candidate of one call, interleaved, for about ``seconds`` in all."""
    device = next(v for v in arguments.values() if isinstance(v, Tensor)).device
    answer = ANSWERS[device.type]
    problem = PROBLEM_OF[op](**arguments)
    configs = list(candidates(problem, facts(device)))
    call = functools.partial(answer, op, **arguments)
    calls: dict[Config, Callable[[], Any]] = {config: _forced(config, call) for config in configs}
    clock: Callable[[Callable[[], Any]], float] = host_seconds
    if device.type == "cuda":
        # Not the host's part, which a graph does without; the reference waits for the device.
        calls = {c: CapturedCall(made) for c, made in calls.items() if c.plan != "reference"}
        clock = CudaTimer().seconds
    times: dict[Config, list[float]] = {config: [] for config in calls}
    end = time.perf_counter() + seconds
    # The first round warms up; at least three count, however slow they are.
    rounds = 0
    while rounds < 4 or (time.perf_counter() < end and rounds < 200):
        for config, forced in calls.items():
            elapsed = clock(forced) * 1e6
            if rounds:
                times[config].append(elapsed)
        rounds += 1
    medians = {config: statistics.median(values) for config, values in times.items()}
    return Measurement(problem, dict(sorted(medians.items(), key=lambda item: item[1])))


def _forced(config: Config, call: Callable[[], Any]) -> Callable[[], Any]:
    def forced() -> Any:
        with plan.force_plan(config):
            return call()

    return forced


def host_seconds(call: Callable[[], Any]) -> float:
    """Seconds of one call by the host's clock; what it returns is freed behind the last look."""
    start = time.perf_counter()
    outputs = call()
    stop = time.perf_counter()
    del outputs
    return stop - start


class CapturedCall:
    """A call captured in a CUDA graph; calling this replays it and returns its results."""

    def __init__(self, call: Callable[[], Any]) -> None:
        # What a first call does besides computing (compile, allocate, choose algorithms) must not
        # be captured.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = call()

    def __call__(self) -> Any:
        self.graph.replay()
        return self.outputs


class CudaTimer:
    """Seconds of one call by events; before the first, the device reads twice its L2 cache.

    That read also keeps the device busy while the host enqueues the events and the replay, so that
    no time of the host lies between the events.
    """

    def __init__(self) -> None:
        self.cache_bytes = facts("cuda").l2_bytes or _USUAL_CACHE_BYTES
        self._cold = torch.ones(2 * self.cache_bytes // 4, device="cuda")
        self._start = torch.cuda.Event(enable_timing=True)
        self._stop = torch.cuda.Event(enable_timing=True)

    def seconds(self, call: Callable[[], Any]) -> float:
        self._cold.sum()
        self._start.record()
        outputs = call()
        self._stop.record()
        self._stop.synchronize()
        del outputs
        return self._start.elapsed_time(self._stop) / 1e3


def tune(
    shapes: Iterable[Shape],
    ops: Iterable[str],
    *,
    r: int,
    slots: int = 0,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    four_bit: bool = False,
    device: torch.device | str = "cpu",
    seconds: float = 2.0,
) -> Iterator[Measurement]:
    """Measure each operator at each shape (M, K, N); yields, and writes the table, as it goes. With
    ``slots`` the operators are those of a batch that mixes so many adapters; with ``four_bit`` the
    base weight is NF4.

    Raises:
        ValueError: a device without a backend, whose calls the reference alone can answer.
    """
    device = torch.device(device)
    if device.type not in ANSWERS:
        raise ValueError(f"nothing to tune on {device}: only the reference answers there")
    operators = list(ops)
    for m, k, n in shapes:
        for op in operators:
            common: dict[str, Any] = {
                "dtype": dtype,
                "adapter_dtype": adapter_dtype or dtype,
                "dropout_p": dropout_p,
                "fan_in_fan_out": fan_in_fan_out,
                "four_bit": four_bit,
                "device": device,
            }
            if slots:
                widths = [n] if isinstance(n, int) else n
                arguments = mixed_arguments_for(op, m, k, widths, r, slots=slots, **common)
            else:
                assert isinstance(n, int), "slices are of a batch that mixes adapters"
                arguments = arguments_for(op, m, k, n, r, **common)
            measurement = measure(op, arguments, seconds=seconds)
            best = measurement.best
            entry = {"config": best, "median_us": round(measurement.medians_us[best], 3)}
            key = measurement.problem.bucketed().key()
            # At once: whatever ends this process, what was measured holds.
            tables.write_table(table_path(device), facts(device), {key: entry})
            plan.forget_tables()
            yield measurement


def table_path(device: torch.device | str) -> Path:
    """The user's table for a device; it is there after :func:`tune`."""
    return tables.cache_directory() / tables.table_name(facts(device))
