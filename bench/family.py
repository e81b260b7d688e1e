"""DoRA, AdaLoRA and loralib's layers beside our own LoRA layer: ``python -m bench.family``.

A step is forward + backward of one layer over a frozen base, without dropout; adapters in float32
as PEFT keeps them, loralib's in the weight's dtype as it makes them. The MergedLinear has four
equal slices, two of them with an adapter. Results are compared with float64 before anything is
timed; a ratio is the median of the ratios of samples that follow one another. Beside them, what
stays PEFT's own forward, against the same layer without an adapter.

Aims: each of ours at most 1.25 times our LoRA layer; DoRA at least 2x faster than PEFT's. The exit
status is 1 if an aim is missed.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import loralib
import peft
import torch
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.layers.adalora import AdaLoRALinear
from lora_kernels.layers.sliced import SlicedLoRALinear
from lora_kernels.testing.linear import assert_within_budget

from .command import Report, Row
from .measure import native_answers, samples
from .peft_layer import SAMPLE, TRAINING, step_of
from .tables import number

RANK, ALPHA = 16, 32
SLICES = [True, False, True, False]
MOST, LEAST = 1.25, 2.0
PLAIN, LORA, DORA, ADALORA, MERGED = "plain linear", "LoRA", "DoRA", "AdaLoRA", "MergedLinear"


class Case(NamedTuple):
    rows: int = 512
    width: int = 2048
    dtype: str = "bfloat16"


class Pair(NamedTuple):
    """Our layer, its origin's with the same values, and the weight of both in float64."""

    ours: nn.Module
    theirs: nn.Module | None
    exact: Tensor


@torch.no_grad()
def pairs_of(case: Case) -> dict[str, Pair]:
    torch.manual_seed(0)
    n = k = case.width
    dtype = getattr(torch, case.dtype)
    base = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)
    w, scale = base.weight.double(), ALPHA / RANK
    a, b = torch.randn(RANK, k) * k**-0.5, torch.randn(n, RANK) * RANK**-0.5
    e, m = 0.5 + torch.rand(RANK, 1), 0.5 + torch.rand(n)
    whole = w + scale * b.double() @ a.double()
    adaptive = w + ALPHA / (RANK + 1e-5) * b.double() @ (a * e).double()

    def pair(exact: Tensor, ours: nn.Module, config: Any, **more: Tensor) -> Pair:
        values = {"lora_A": a, "lora_B": b} | more
        return Pair(filled(ours, **values), filled(peft_layer(base, config), **values), exact)

    def lora(**options: Any) -> tuple[nn.Module, Any]:
        ours = lk.FusedLoRALinear.from_linear(base, RANK, ALPHA, **options)
        return ours, peft.LoraConfig(r=RANK, **_OF_CONFIG, **options)

    ada = peft.AdaLoraConfig(init_r=RANK, target_r=RANK // 2, total_step=9, **_OF_CONFIG)
    merged = loralib.MergedLinear(k, n, RANK, ALPHA, enable_lora=SLICES, bias=False, dtype=dtype)
    merged.lora_B.normal_(std=RANK**-0.5)
    plain = nn.Linear(k, n, bias=False, dtype=dtype)
    plain.weight.copy_(merged.weight)
    sliced = SlicedLoRALinear.from_linear(
        plain, RANK, ALPHA, enable_lora=SLICES, autocast_adapter_dtype=False
    )
    filled(sliced, lora_A=merged.lora_A, lora_B=merged.lora_B)
    magnitude: dict[str, Any] = {"lora_magnitude_vector": m}
    return {
        PLAIN: Pair(base, None, w),
        LORA: pair(whole, *lora()),
        DORA: pair((m / whole.norm(dim=1))[:, None] * whole, *lora(use_dora=True), **magnitude),
        ADALORA: pair(adaptive, AdaLoRALinear.from_linear(base, RANK, ALPHA), ada, lora_E=e),
        MERGED: Pair(sliced, merged, merged.weight.double() + sliced.delta_weight().double()),
    }


_OF_CONFIG: dict[str, Any] = {"lora_alpha": ALPHA, "target_modules": ["0"]}


def peft_layer(base: nn.Module, config: Any) -> nn.Module:
    model: Any = peft.get_peft_model(nn.Sequential(base), config)
    return model.base_model.model[0]


def filled(layer: nn.Module, **values: Tensor) -> nn.Module:
    """Ours, or PEFT's, whose parameters lie below the adapter's name."""
    for name, value in values.items():
        found: Any = getattr(layer, name)
        if isinstance(found, (nn.ModuleDict, nn.ParameterDict)):
            found = found["default"]
        getattr(found, "weight", found).copy_(value)
    return layer


@torch.no_grad()
def left_to_peft(case: Case) -> dict[str, dict[str, Callable[[], Any]]]:
    """Steps of other kinds of layers, the plain one's and PEFT's."""
    width, dtype = case.width // 4, getattr(torch, case.dtype)
    x = torch.randn(1, case.rows, width, dtype=dtype)
    image = torch.randn(2, width // 8, 16, 16, dtype=dtype)
    kinds: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "Embedding": (nn.Embedding(32000, width), (torch.randint(32000, (1, case.rows)),)),
        "Conv2d": (nn.Conv2d(width // 8, width // 8, 3, padding=1), (image,)),
        "MultiheadAttention": (nn.MultiheadAttention(width, 8, batch_first=True), (x, x, x)),
    }
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, (layer, given) in kinds.items():
        layer = layer.to(dtype).requires_grad_(False)
        theirs = peft_layer(copy.deepcopy(layer), peft.LoraConfig(r=RANK, **_OF_CONFIG))
        given = tuple(t.requires_grad_(t.is_floating_point()) for t in given)
        both = {"plain": layer, "PEFT": theirs}
        found[name] = {who: functools.partial(call, one, given) for who, one in both.items()}
    return found


def call(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
    """A forward of ``layer``, and the backward where it trains."""
    y = layer(*given)
    y = y[0] if isinstance(y, tuple) else y
    if y.requires_grad:
        y.sum().backward()


def check(name: str, pair: Pair, x: Tensor) -> None:
    """No speed of a wrong result is printed. The library's linear is not ours to judge."""
    if pair.theirs is not None:
        with torch.no_grad():
            exact = x.double() @ pair.exact.t()
            assert_within_budget(name, pair.ours(x), pair.theirs(x), exact)


def measure(case: Case, seconds: float) -> Row:
    x = torch.randn(case.rows, case.width, dtype=getattr(torch, case.dtype))
    steps: dict[str, Callable[[], Any]] = {}
    for name, pair in pairs_of(case).items():
        check(name, pair, x)
        for who, layer in (("ours", pair.ours), ("theirs", pair.theirs)):
            if layer is not None:
                layer.train()
                steps[f"{name} {who}"] = step_of(layer, TRAINING, x, torch.randn_like(x))
    for name in (LORA, DORA, ADALORA, MERGED):
        native_answers(steps[f"{name} ours"])
    left = {
        name: samples(pair, seconds / 10, lasting=SAMPLE)
        for name, pair in left_to_peft(case).items()
    }
    times = samples(steps, seconds, lasting=SAMPLE)
    return case._asdict() | {"samples_us": times, "left": left}


def ratio(samples: dict[str, list[float]], name: str, other: str) -> float:
    pairs = zip(samples[name], samples[other], strict=True)
    return statistics.median(mine / its for mine, its in pairs)


def misses(row: Row) -> list[str]:
    """The aims that a row misses."""
    times = row["samples_us"]
    beside = {
        name: ratio(times, f"{name} ours", f"{LORA} ours") for name in (DORA, ADALORA, MERGED)
    }
    found = [
        f"{row['dtype']}: {name} takes {value:.2f} of our LoRA layer's time"
        for name, value in beside.items()
        if value > MOST
    ]
    speed = ratio(times, f"{DORA} theirs", f"{DORA} ours")
    return found + [f"{row['dtype']}: DoRA is {speed:.2f}x faster than PEFT's"] * (speed < LEAST)


def lines(row: Row) -> list[Row]:
    """A line for each layer."""
    times, found = row["samples_us"], []
    for name in (PLAIN, LORA, DORA, ADALORA, MERGED):
        ours, theirs = f"{name} ours", f"{name} theirs"
        line = {"layer": name, "dtype": row["dtype"], "theirs": "", "faster": ""}
        for key in {ours, theirs} & times.keys():
            line[key.rpartition(" ")[2]] = number(statistics.median(times[key]) / 1000)
        if theirs in times:
            line["faster"] = f"{ratio(times, theirs, ours):.2f}x"
        line |= {other: ratio(times, ours, f"{other} ours") for other in (LORA, PLAIN)}
        found.append(line)
    return found


def after(rows: list[Row]) -> list[str]:
    missed = [miss for row in rows for miss in misses(row)]
    left = [
        f"{row['dtype']} "
        + ", ".join(
            f"{name} {ratio(both, 'PEFT', 'plain'):.2f}" for name, both in row["left"].items()
        )
        for row in rows
    ]
    return [
        "",
        f"Misses its aim: {'; '.join(missed)}." if missed else "All aims are met.",
        "",
        "What stays PEFT's own forward, over the same layer without an adapter (both passes): "
        f"{'; '.join(left)}.",
    ]


REPORT = Report(
    "family",
    [Case(dtype=dtype) for dtype in ("bfloat16", "float32")],
    measure,
    seconds=30.0,
    packages=("torch", "peft", "loralib"),
    note=f"Forward + backward of one layer, {Case().rows} rows, width {Case().width}, rank {RANK}. "
    "Ratios of times: smaller is better; in the last column larger is.",
    columns="dtype: {dtype} | layer: {layer} | ours ms: {ours} | of our LoRA layer: {LoRA:.2f} | "
    "of the plain linear: {plain linear:.2f} | origin ms: {theirs} | "
    "ours faster than the origin: {faster}",
    lines=lines,
    after=after,
    misses=misses,
)

if __name__ == "__main__":
    REPORT.main(__doc__)
