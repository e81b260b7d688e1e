"""Measure the candidate configurations of a problem on this machine, and write the best into the
user's table.

Tuning is explicit (``python -m lora_kernels tune``): it never runs inside a training step or a
graph capture.
"""

from __future__ import annotations

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
from ..spec.problem import PROBLEM_OF, Problem
from ..spec.reference import tail_dtype
from ..spec.segments import SegmentTable
from . import cpu, cuda

# M, K and N; or in the place of N the widths of the slices of a batch that mixes adapters.
Shape = tuple[int, int, int | Sequence[int]]

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
    weight = normal(k, n) if fan_in_fan_out else normal(n, k)
    rows = {"x": normal(m, k)} if op == "lora_linear_fwd" else {"dy": normal(m, n)}
    adapter = {
        "weight": weight,
        "lora_a": lora_a,
        "lora_b": lora_b,
        "scale": scale,
        "fan_in_fan_out": fan_in_fan_out,
    }
    return common | rows | adapter


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
        "weight": normal(k, total) if fan_in_fan_out else normal(total, k),
        "fan_in_fan_out": fan_in_fan_out,
        "table": seg.tensors(),
        "widths": list(widths),
        "r_max": r,
        "da_dtype": adapter_dtype,
        "db_dtype": adapter_dtype,
    }
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
    times: dict[Config, list[float]] = {config: [] for config in configs}
    end = time.perf_counter() + seconds
    # The first round warms up; at least three count, however slow they are.
    rounds = 0
    while rounds < 4 or (time.perf_counter() < end and rounds < 200):
        for config in configs:
            with plan.force_plan(config):
                elapsed = _time_once(lambda: answer(op, **arguments), device)
            if rounds:
                times[config].append(elapsed)
        rounds += 1
    medians = {config: statistics.median(values) for config, values in times.items()}
    return Measurement(problem, dict(sorted(medians.items(), key=lambda item: item[1])))


def _time_once(call: Callable[[], Any], device: torch.device) -> float:
    """Microseconds of one call, by events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) * 1e3


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
    device: torch.device | str = "cpu",
    seconds: float = 2.0,
) -> Iterator[Measurement]:
    """Measure each operator at each shape (M, K, N); yields as it goes and writes the table at the
    end. With ``slots`` the operators are those of a batch that mixes so many adapters.

    Raises:
        ValueError: a device without a backend, whose calls the reference alone can answer.
    """
    device = torch.device(device)
    if device.type not in ANSWERS:
        raise ValueError(f"nothing to tune on {device}: only the reference answers there")
    measured: dict[str, dict[str, Any]] = {}
    operators = list(ops)
    try:
        for m, k, n in shapes:
            for op in operators:
                common: dict[str, Any] = {
                    "dtype": dtype,
                    "adapter_dtype": adapter_dtype or dtype,
                    "dropout_p": dropout_p,
                    "fan_in_fan_out": fan_in_fan_out,
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
                measured[measurement.problem.bucketed().key()] = entry
                yield measurement
    finally:
        # After an interruption too: the measurements until then hold.
        if measured:
            tables.write_table(table_path(device), facts(device), measured)
            plan.forget_tables()


def table_path(device: torch.device | str) -> Path:
    """The user's table for a device; it is there after :func:`tune`."""
    return tables.cache_directory() / tables.table_name(facts(device))
