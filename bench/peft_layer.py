"""LoRA layers of PEFT, as they are and after ``accelerate_peft``; ``python -m bench.peft_layer``.

Adapters of rank 16 in float32, as PEFT keeps them by default, on a frozen base of the row's dtype.
One row: what the swap costs where there is little to compute. 512 rows: training, without dropout
and with it, one layer alone, whose weight stays in the cache if it is small, and eight in a row, as
in a model: each has its own weight, and what it saved waits for its backward. The plain frozen
linear, with the gradient of its input, is the floor.

A sample is a run of steps of one variant, after one that is not timed: a training run does not find
another implementation's data in its caches and heap at every step. Samples of the variants are
interleaved; a time is the median of its samples.

All numbers go into peft_layer.json, the table into peft_layer.md. The exit status is 1 if a call
was not answered by our kernels.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn
from tqdm import tqdm

import lora_kernels as lk
from lora_kernels.testing.linear import assert_within_budget

from .tables import origin, piped, told, write

OUT = Path(__file__).parent / "out" / "peft_layer"
RANK, ALPHA = 16, 32
MODES = ("evaluation", "forward", "forward + backward")
PLAIN, PEFT, OURS = "plain linear", "PEFT", "accelerate_peft"


class Case(NamedTuple):
    rows: int
    width: int
    dtype: str
    dropout: float = 0.0
    modes: tuple[str, ...] = MODES
    pack_weight: str = "eval"
    layers: int = 1


# A sample lasts as long as this at least, in seconds, and there are so many of them at least.
SAMPLE, SAMPLES = 0.02, 5
FEW_ROWS = [
    Case(1, width, dtype)
    for dtype, width in itertools.product(("float32", "bfloat16"), (64, 256, 1024, 2048))
]
TRAINING = [
    *(
        Case(512, width, "bfloat16", dropout, MODES[2:], layers=layers)
        for layers, dropout, width in itertools.product((1, 8), (0.0, 0.1), (512, 768, 1024, 2048))
    ),
    *(
        Case(512, 2048, "bfloat16", dropout, MODES[2:], "always", layers)
        for layers, dropout in itertools.product((1, 8), (0.0, 0.1))
    ),
]


class Model(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "dtype": getattr(torch, case.dtype)}
        self.linears = nn.Sequential(
            *(nn.Linear(case.width, case.width, **options) for _ in range(case.layers))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linears(x)


def layers_of(case: Case, accelerated: bool) -> tuple[list[Any], lk.PeftReport | None]:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[f"linears.{i}" for i in range(case.layers)],
        lora_dropout=case.dropout,
        init_lora_weights=False,
    )
    model: Any = peft.get_peft_model(Model(case), config)
    report = lk.accelerate_peft(model, pack_weight=case.pack_weight) if accelerated else None
    return list(model.base_model.model.linears), report


def in_a_row(layers: list[Any]) -> nn.Module:
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def step_of(model: Any, mode: str, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    if mode == "evaluation":

        def evaluate() -> Tensor:
            with torch.no_grad():
                return model(x)

        return evaluate
    x = x.clone().requires_grad_()
    if mode == "forward":
        return lambda: model(x)
    trainable = [x, *(p for p in model.parameters() if p.requires_grad and p.dim() == 2)]

    def train() -> None:
        model(x).backward(dy)
        for leaf in trainable:
            leaf.grad = None

    return train


def samples_of(steps: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """The times of each in microseconds, in rounds."""
    samples: dict[str, list[float]] = {name: [] for name in steps}
    repeats = {}
    for name, step in steps.items():
        for _ in range(3):
            step()
        start = time.perf_counter()
        step()
        repeats[name] = int(SAMPLE / (time.perf_counter() - start)) + 1
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < SAMPLES:
        rounds += 1
        for name, step in steps.items():
            step()
            start = time.perf_counter()
            for _ in range(repeats[name]):
                step()
            samples[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return samples


def interleaved(steps: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The median time of each in microseconds."""
    samples = samples_of(steps, seconds)
    return {name: statistics.median(times) for name, times in samples.items()}


def check(stock: Any, ours: Any, x: Tensor) -> None:
    """Both compute the same layer: no speed of a wrong result is printed."""
    weight, a, b = (
        layer.weight.double()
        for layer in (stock.base_layer, stock.lora_A["default"], stock.lora_B["default"])
    )
    exact = x.double() @ weight.t() + ALPHA / RANK * (x.double() @ a.t()) @ b.t()
    with torch.no_grad():
        assert_within_budget("y", ours(x), stock(x), exact.detach())


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    (stock, _), (ours, report) = layers_of(case, False), layers_of(case, True)
    assert report is not None
    x, dy = (torch.randn(case.rows, case.width, dtype=getattr(torch, case.dtype)) for _ in "xy")
    for pair in zip(stock, ours, strict=True):
        check(*(layer.eval() for layer in pair), x)
    models = {
        PLAIN: in_a_row([layer.base_layer for layer in stock]),
        PEFT: in_a_row(stock),
        OURS: in_a_row(ours),
    }
    rows = []
    for mode in case.modes:
        for model in models.values():
            model.train(mode != "evaluation")
        steps = {name: step_of(model, mode, x, dy) for name, model in models.items()}
        times = {name: us / case.layers for name, us in interleaved(steps, seconds).items()}
        rows.append({**case._replace(modes=(mode,))._asdict(), "us": times})
    if report.calls.fallen_back or not report.calls.fused:
        raise SystemExit(f"not answered by lora_kernels: {report.calls}")
    return rows


def table(content: dict[str, Any]) -> list[str]:
    head = ["rows x width", "layers", "dtype", "dropout", "pack_weight", "pass", "plain linear us"]
    head += ["PEFT us", "ours us", "ours / PEFT", "plain / PEFT", "ours / plain"]
    body = []
    for row in content["rows"]:
        plain, stock, ours = (row["us"][name] for name in (PLAIN, PEFT, OURS))
        line = [f"{row['rows']} x {row['width']}", str(row["layers"]), row["dtype"]]
        line += [f"{row['dropout']:g}", row["pack_weight"], row["modes"][0]]
        line += [f"{us:,.1f}" for us in (plain, stock, ours)]
        body.append([*line, *(f"{x:.2f}" for x in (stock / ours, stock / plain, plain / ours))])
    return [
        f"{told(content)}. Adapters of rank {RANK} in "
        'float32; times of one layer. "ours / PEFT": how many times as fast as PEFT ours is, 1.40 '
        'is 1.4x faster; "plain / PEFT" is what an adapter that costs nothing would reach.',
        "",
        *piped((head, body)).splitlines(),
    ]


def run(cases: Sequence[Case], seconds: float) -> dict[str, Any]:
    rows = []
    for case in tqdm(cases, desc="layers of PEFT"):
        rows += measure(case, seconds)
    return origin("cpu", ("torch", "peft")) | {"rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peft_layer", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row of the table")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    content = run([*FEW_ROWS, *TRAINING], args.seconds)
    write(content, table(content), args.out, "peft_layer")
    print("\n".join(table(content)))


if __name__ == "__main__":
    main()
