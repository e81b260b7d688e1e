"""Projections that share an input, as one call and as separate calls; ``python -m
bench.shared_input``.

q, k, v (of equal widths, and with fewer heads for k and v) and gate, up; adapters of rank 16 in
float32 on a frozen base of the rows' dtype; forward and backward of 512 rows, with the gradients of
x and of every adapter. Steps of both variants are interleaved; a time is a median, and the ratio is
that of the medians.

Saved bytes are what autograd keeps besides parameters, in multiples of x.

All numbers go into shared_input.json, the table into shared_input.md. The exit status is 1 if a
call was not answered by the native kernels.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import lora_kernels as lk

from .tables import origin, piped, told, write

OUT = Path(__file__).parent / "out" / "shared_input"
RANK, ROWS = 16, 512
APART, TOGETHER = "separate calls", "lora_linears"


class Case(NamedTuple):
    width: int
    widths: tuple[int, ...]
    dtype: str
    dropout: float = 0.0


CASES = [
    Case(width, widths, dtype, dropout)
    for dtype in ("bfloat16", "float32")
    for width, widths in (
        (576, (576, 192, 192)),
        (1024, (1024, 1024, 1024)),
        (2048, (2048, 512, 512)),
        (2048, (2048, 2048, 2048)),
        (2048, (5632, 5632)),
    )
    for dropout in (0.0, 0.1)
    if dropout == 0.0 or width == 2048
]


def steps_of(case: Case, rows: int) -> tuple[dict[str, Callable[[], Any]], Tensor, list[Tensor]]:
    """The forwards, which return every Y; x; and the parameters."""
    dtype, k = getattr(torch, case.dtype), case.width
    x = torch.randn(rows, k, dtype=dtype, requires_grad=True)
    weights = [(torch.randn(n, k) / k**0.5).to(dtype) for n in case.widths]
    a = [(torch.randn(RANK, k) / k**0.5).requires_grad_() for _ in case.widths]
    b = [torch.randn(n, RANK).requires_grad_() for n in case.widths]
    dropout: dict[str, Any] = {"dropout_p": case.dropout, "training": case.dropout > 0}

    def apart() -> list[Tensor]:
        operands = zip(weights, a, b, strict=True)
        return [lk.lora_linear(x, *each, 0.25, **dropout) for each in operands]

    def together() -> tuple[Tensor, ...]:
        return lk.lora_linears(x, weights, a, b, 0.25, **dropout)

    return {APART: apart, TOGETHER: together}, x, [*weights, *a, *b]


def saved(forward: Callable[[], Any], x: Tensor, parameters: Sequence[Tensor]) -> float:
    """Bytes that autograd keeps besides parameters, in multiples of x."""
    kept: dict[int, int] = {}
    known = {t.data_ptr() for t in parameters}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(kept.values()) / x.nbytes


def measure(case: Case, seconds: float, rows: int = ROWS) -> dict[str, Any]:
    forwards, x, parameters = steps_of(case, rows)
    dy = [torch.randn(rows, n, dtype=x.dtype) for n in case.widths]

    def train(forward: Callable[[], Any]) -> None:
        torch.autograd.backward(forward(), dy)

    with lk.record_plans() as answers:
        for forward in forwards.values():
            train(forward)
    if {(a.backend, a.plan) for a in answers} != {("cpu", "native")}:
        raise SystemExit(f"not answered by the native kernels: {answers}")
    times: dict[str, list[float]] = {name: [] for name in forwards}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[APART]) < 4:
        for name, forward in [*forwards.items()][:: 1 if len(times[APART]) % 2 else -1]:
            start = time.perf_counter()
            train(forward)
            times[name].append(time.perf_counter() - start)
    bytes_ = {name: saved(forward, x, parameters) for name, forward in forwards.items()}
    us = {name: statistics.median(each) * 1e6 for name, each in times.items()}
    return {**case._asdict(), "rows": rows, "us": us, "saved": bytes_}


def table(content: dict[str, Any]) -> list[str]:
    head = ["rows x width", "widths", "dtype", "dropout", f"{APART} us", f"{TOGETHER} us"]
    head += ["together / separate", "saved, in x", "separate"]
    body = []
    for row in content["rows"]:
        apart, together = row["us"][APART], row["us"][TOGETHER]
        line = [f"{row['rows']} x {row['width']}", " + ".join(map(str, row["widths"]))]
        line += [row["dtype"], f"{row['dropout']:g}", f"{apart:,.0f}", f"{together:,.0f}"]
        line += [f"{together / apart:.3f}"]
        body.append([*line, *(f"{row['saved'][name]:.2f}" for name in (TOGETHER, APART))])
    return [
        f"{told(content)}. Forward and backward, adapters of rank {RANK} in float32. "
        '"together / separate": below 1 the one call is faster.',
        "",
        *piped((head, body)).splitlines(),
    ]


def run(cases: Sequence[Case], seconds: float, rows: int = ROWS) -> dict[str, Any]:
    found = [measure(case, seconds, rows) for case in tqdm(cases, desc="shared inputs")]
    return origin("cpu", ("torch",)) | {"rows": found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.shared_input", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row of the table")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    content = run(CASES, args.seconds)
    write(content, table(content), args.out, "shared_input")
    print("\n".join(table(content)))


if __name__ == "__main__":
    main()
