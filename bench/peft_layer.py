"""LoRA layers of PEFT, as they are and after ``accelerate_peft``; ``python -m bench.peft_layer``.

Adapters of rank 16 in float32 on a frozen base of the row's dtype. One row: what the swap costs
where there is little to compute. 512 rows: training, one layer alone, whose weight stays in the
cache if it is small, and eight in a row, as in a model. The plain frozen linear, with the gradient
of its input, is the floor. Results are checked first; a call that our kernels did not answer ends
the run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.integrations.peft_calls import PeftReport
from lora_kernels.testing.linear import assert_within_budget

from .command import Report
from .measure import medians

RANK, ALPHA = 16, 32
TRAINING = "forward + backward"
PLAIN, PEFT, OURS = "plain linear", "PEFT", "accelerate_peft"
# A sample lasts as long as this at least, in seconds.
SAMPLE = 0.02


class Case(NamedTuple):
    rows: int
    width: int
    dtype: str
    mode: str = TRAINING
    dropout: float = 0.0
    pack_weight: str = "eval"
    layers: int = 1


CASES = [
    Case(1, width, dtype, mode)
    for dtype in ("float32", "bfloat16")
    for width in (64, 256, 1024, 2048)
    for mode in ("evaluation", "forward", TRAINING)
]
CASES += [
    Case(512, width, "bfloat16", TRAINING, dropout, pack_weight, layers)
    for pack_weight, widths in (("eval", (512, 768, 1024, 2048)), ("always", (2048,)))
    for layers in (1, 8)
    for dropout in (0.0, 0.1)
    for width in widths
]


def layers_of(case: Case, accelerated: bool) -> tuple[list[Any], PeftReport | None]:
    torch.manual_seed(0)
    size, dtype = (case.width, case.width), getattr(torch, case.dtype)
    plain = nn.Sequential(*(nn.Linear(*size, False, dtype=dtype) for _ in range(case.layers)))
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[f"{i}" for i in range(case.layers)],
        lora_dropout=case.dropout,
        init_lora_weights=False,
    )
    model: Any = peft.get_peft_model(plain, config)
    report = lk.accelerate_peft(model, pack_weight=case.pack_weight) if accelerated else None
    return list(model.base_model.model), report


def step_of(model: Any, mode: str, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    x = x.detach().requires_grad_(mode != "evaluation")
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]

    @torch.no_grad()
    def evaluate() -> Tensor:
        return model(x)

    def train() -> None:
        model(x).backward(dy)
        for leaf in trained:
            leaf.grad = None

    return {"evaluation": evaluate, "forward": lambda: model(x), TRAINING: train}[mode]


def check(stock: Any, ours: Any, x: Tensor) -> None:
    weight, a, b = (
        layer.weight.double()
        for layer in (stock.base_layer, stock.lora_A["default"], stock.lora_B["default"])
    )
    exact = x.double() @ weight.t() + ALPHA / RANK * (x.double() @ a.t()) @ b.t()
    with torch.no_grad():
        assert_within_budget("y", ours(x), stock(x), exact.detach())


def measure(case: Case, seconds: float) -> dict[str, Any]:
    (stock, _), (ours, report) = layers_of(case, False), layers_of(case, True)
    assert report is not None
    x, dy = (torch.randn(case.rows, case.width, dtype=getattr(torch, case.dtype)) for _ in "xy")
    for theirs, own in zip(stock, ours, strict=True):
        check(theirs.eval(), own.eval(), x)
    steps = {}
    for name, layers in (
        (PLAIN, [layer.base_layer for layer in stock]),
        (PEFT, stock),
        (OURS, ours),
    ):
        model = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        steps[name] = step_of(model.train(case.mode != "evaluation"), case.mode, x, dy)
    times = medians(steps, seconds, lasting=SAMPLE)
    if report.calls.fallen_back or not report.calls.fused:
        raise SystemExit(f"not answered by lora_kernels: {report.calls}")
    each = {name: time / case.layers for name, time in times.items()}
    return case._asdict() | {"modes": [case.mode], "us": each}


REPORT = Report(
    "peft_layer",
    CASES,
    measure,
    seconds=2.0,
    packages=("torch", "peft"),
    note=f"Adapters of rank {RANK} in "
    'float32; times of one layer. "ours / PEFT": how many times as fast as PEFT ours is, 1.40 '
    'is 1.4x faster; "plain / PEFT" is what an adapter that costs nothing would reach.',
    columns="rows x width: {rows} x {width} | layers: {layers} | dtype: {dtype} | "
    "dropout: {dropout:g} | pack_weight: {pack_weight} | pass: {modes[0]} | "
    "plain linear us: {plain linear:,.1f} | PEFT us: {PEFT:,.1f} | ours us: {accelerate_peft:,.1f} "
    "| ours / PEFT: {PEFT / accelerate_peft:.2f} | plain / PEFT: {PEFT / plain linear:.2f} | "
    "ours / plain: {plain linear / accelerate_peft:.2f}",
)

if __name__ == "__main__":
    REPORT.main(__doc__)
