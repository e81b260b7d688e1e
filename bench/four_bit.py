"""A four-bit base against the plain linear, and against bitsandbytes' layer with PEFT's adapter;
``python -m bench.four_bit``.

NF4 in blocks of 64 with double quantisation, an adapter of rank 16 in float32. Columns: the frozen
plain linear in the rows' dtype, our layer on it, our layer on the four-bit weight, and PEFT's layer
on ``Linear4bit`` where both are installed. Forward in evaluation mode by rows; forward and backward
of 512 rows in training mode. Between two calls the caches are overwritten. Steps of all variants
are interleaved; a time is a median, a ratio is one of medians.

All numbers go into four_bit.json, the table into four_bit.md. The exit status is 1 if a call of
ours was not answered by the native kernels.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lora_kernels as lk

from .tables import origin, piped, told, write

OUT = Path(__file__).parent / "out" / "four_bit"
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
        made[PEFT] = peft_layer(plain, dtype)
    return {name: layer.train(case.train) for name, layer in made.items()}


def peft_layer(plain: nn.Linear, dtype: torch.dtype) -> nn.Module:
    import bitsandbytes
    import peft

    k = plain.in_features
    base = bitsandbytes.nn.Linear4bit(k, k, False, compute_dtype=dtype, quant_type="nf4")
    base.load_state_dict(plain.state_dict())
    model = nn.Sequential(base.to("cpu"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    config = peft.LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False)
    return peft.get_peft_model(model, config).base_model.model[0]


def measure(case: Case, seconds: float) -> dict[str, Any]:
    dtype = getattr(torch, case.dtype)
    x = torch.randn(case.rows, case.width, dtype=dtype, requires_grad=case.train)
    dy = torch.randn(case.rows, case.width, dtype=dtype)
    made = layers(case)

    def step(layer: Callable[[Tensor], Tensor]) -> None:
        if case.train:
            layer(x).backward(dy)
        else:
            with torch.no_grad():
                layer(x)

    with lk.record_plans() as answers:
        for layer in made.values():
            step(layer)
    if {(a.backend, a.plan) for a in answers} != {("cpu", "native")}:
        raise SystemExit(f"not answered by the native kernels: {answers}")
    times: dict[str, list[float]] = {name: [] for name in made}
    caches = torch.zeros(48 << 20, dtype=torch.uint8)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[PLAIN]) < 4:
        for name, layer in [*made.items()][:: 1 if len(times[PLAIN]) % 2 else -1]:
            caches.add_(1)
            start = time.perf_counter()
            step(layer)
            times[name].append(time.perf_counter() - start)
    us = {name: statistics.median(each) * 1e6 for name, each in times.items()}
    return {**case._asdict(), "us": us}


def table(content: dict[str, Any]) -> list[str]:
    names = [PLAIN, OURS, FOUR, PEFT]
    head = ["rows x width", "dtype", "step", *(f"{name} us" for name in names)]
    head += ["four bits / plain", "aim", "PEFT / four bits"]
    body = []
    for row in content["rows"]:
        us, key = row["us"], (row["rows"], row["train"])
        line = [f"{row['rows']} x {row['width']}", row["dtype"]]
        line += ["forward + backward" if row["train"] else "forward"]
        line += [f"{us[name]:,.0f}" if name in us else "" for name in names]
        line += [f"{us[FOUR] / us[PLAIN]:.2f}", f"{BARS[key]:.2f}"]
        body.append([*line, f"{us[PEFT] / us[FOUR]:.1f}" if PEFT in us else ""])
    return [
        f"{told(content)}. NF4, blocks of 64, double quantisation; rank {RANK}. "
        '"four bits / plain": below 1 the four-bit layer with its adapter is faster than the plain '
        'linear without one; "PEFT / four bits": above 1 ours is faster.',
        "",
        *piped((head, body)).splitlines(),
    ]


def run(cases: Sequence[Case], seconds: float) -> dict[str, Any]:
    found = [measure(case, seconds) for case in tqdm(cases, desc="four bits")]
    return origin("cpu", ("torch", "bitsandbytes", "peft")) | {"rows": found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.four_bit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row of the table")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    content = run(CASES, args.seconds)
    write(content, table(content), args.out, "four_bit")
    print("\n".join(table(content)))


if __name__ == "__main__":
    main()
