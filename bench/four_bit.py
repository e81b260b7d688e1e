"""A four-bit base against the plain linear, and against bitsandbytes' layer with PEFT's adapter;
``python -m bench.four_bit``.

NF4 in blocks of 64 with double quantisation, an adapter of rank 16 in float32: forward in
evaluation mode by rows; forward and backward of 512 rows in training mode. The weights are cold:
each call takes another copy of the layer (``measure``). A call of ours that the native kernels did
not answer ends the run.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from typing import Any, NamedTuple

import torch
from torch import nn

import lora_kernels as lk

from .command import Report
from .measure import CpuClock, medians, native_answers
from .peft_layer import TRAINING, step_of

RANK = 16
PLAIN, OURS, FOUR, PEFT = "plain linear", "ours, plain base", "ours, four bits", "PEFT, Linear4bit"


class Case(NamedTuple):
    width: int
    rows: int
    dtype: str
    train: bool = False


CASES = [
    Case(width, rows, dtype, train)
    for dtype in ("bfloat16", "float32")
    for width in (2048, 4096)
    for rows, train in ((1, False), (16, False), (128, False), (512, False), (512, True))
]

# Time over the plain linear's.
BARS = {(1, False): 0.60, (16, False): 0.80, (128, False): 1.10, (512, False): 1.10}
BARS |= {(512, True): 1.15}


def layers(case: Case) -> dict[str, Any]:
    dtype, k = getattr(torch, case.dtype), case.width
    torch.manual_seed(0)
    plain = nn.Linear(k, k, bias=False, dtype=dtype).requires_grad_(False)
    options: Any = {"r": RANK, "init_lora_weights": False}
    base = lk.QuantizedLinear.from_linear(copy.deepcopy(plain), compute_dtype=dtype)
    made: dict[str, Any] = {
        PLAIN: plain,
        OURS: lk.FusedLoRALinear.from_linear(copy.deepcopy(plain), **options),
        FOUR: lk.FusedLoRALinear.from_linear(base, **options),
    }
    if all(importlib.util.find_spec(name) for name in ("bitsandbytes", "peft")):
        import peft

        model: Any = nn.Sequential(linear_4bit(plain, dtype).to("cpu"))
        model.is_loaded_in_4bit = True
        config = peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False)
        adapted: Any = peft.get_peft_model(model, config)
        made[PEFT] = adapted.base_model.model[0]
    return {name: layer.train(case.train) for name, layer in made.items()}


def linear_4bit(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer, which quantises when it is moved to a device."""
    import bitsandbytes

    sizes = linear.in_features, linear.out_features, False
    found = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4")
    found.load_state_dict(linear.state_dict())
    return found


class InTurn(nn.ModuleList):
    """Copies of a layer, of which each call takes the next."""

    def __init__(self, layer: nn.Module, count: int) -> None:
        super().__init__(copy.deepcopy(layer) for _ in range(count))
        self.turns = itertools.cycle(self)

    def forward(self, x: torch.Tensor) -> Any:
        return next(self.turns)(x)


def measure(case: Case, seconds: float) -> dict[str, Any]:
    x, dy = (torch.randn(case.rows, case.width, dtype=getattr(torch, case.dtype)) for _ in "xy")
    mode = TRAINING if case.train else "evaluation"
    made = layers(case)
    copies = CpuClock().sets(made[PLAIN].weight, dy)
    steps = {name: step_of(InTurn(layer, copies), mode, x, dy) for name, layer in made.items()}
    native_answers(lambda: [step() for step in steps.values() for _ in range(copies)])
    return case._asdict() | {"us": medians(steps, seconds)}


REPORT = Report(
    "four_bit",
    CASES,
    measure,
    seconds=5.0,
    packages=("torch", "bitsandbytes", "peft"),
    note=f"NF4, blocks of 64, double quantisation; rank {RANK}. "
    '"four bits / plain": below 1 the four-bit layer with its adapter is faster than the plain '
    'linear without one; "PEFT / four bits": above 1 ours is faster.',
    columns="rows x width: {rows} x {width} | dtype: {dtype} | step: {step} | "
    + " | ".join(f"{name} us: {{{name}:,.0f}}" for name in (PLAIN, OURS, FOUR, PEFT))
    + " | four bits / plain: {ours, four bits / plain linear:.2f} | aim: {aim:.2f} | "
    "PEFT / four bits: {PEFT, Linear4bit / ours, four bits:.1f}",
    lines=lambda row: [
        row
        | {"step": TRAINING if row["train"] else "forward", "aim": BARS[row["rows"], row["train"]]}
    ],
)

if __name__ == "__main__":
    REPORT.main(__doc__)
