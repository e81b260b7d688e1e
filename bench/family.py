"""DoRA, AdaLoRA and loralib's layers beside our own LoRA layer: ``python -m bench.family``.

A step is forward + backward of one layer, 512 rows, 2048 x 2048, rank 16, a frozen base, no
dropout; adapters in float32 as PEFT keeps them, loralib's in the weight's dtype as it makes them.
The MergedLinear has four equal slices, two of them with an adapter. Results are
compared with float64 before anything is timed. Samples are interleaved and timed as in
:mod:`bench.peft_layer`; a ratio is the median of the ratios of samples that follow one another.

Beside them, what stays PEFT's own forward, against the same layer without an adapter: an embedding,
a convolution, and attention by nn.MultiheadAttention, each with 512 rows of its input.

Aims: each of ours at most 1.25 times our LoRA layer; DoRA at least 2x faster than PEFT's. All
numbers go into family.json, the table into family.md. The exit status is 1 if an aim is missed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import loralib
import peft
import torch
from torch import Tensor, nn
from tqdm import tqdm

import lora_kernels as lk
from lora_kernels.layers.adalora import AdaLoRALinear
from lora_kernels.layers.sliced import SlicedLoRALinear
from lora_kernels.testing.linear import assert_within_budget

from .peft_layer import samples_of, step_of
from .tables import number, origin, piped, told, write

OUT = Path(__file__).parent / "out" / "family"
RANK, ALPHA = 16, 32
SLICES = [True, False, True, False]
MOST, LEAST = 1.25, 2.0
PLAIN, LORA, DORA, ADALORA, MERGED = "plain linear", "LoRA", "DoRA", "AdaLoRA", "MergedLinear"


class Case(NamedTuple):
    rows: int = 512
    width: int = 2048
    dtype: str = "bfloat16"


class Pair(NamedTuple):
    """Our layer and its origin's with the same values, and the exact y for x in float64."""

    ours: nn.Module
    theirs: nn.Module | None
    exact: Callable[[Tensor], Tensor]


@torch.no_grad()
def pairs_of(case: Case) -> dict[str, Pair]:
    torch.manual_seed(0)
    n = k = case.width
    dtype = getattr(torch, case.dtype)
    base = nn.Linear(k, n, bias=False, dtype=dtype).requires_grad_(False)
    w = base.weight.double()
    a, b = torch.randn(RANK, k) * k**-0.5, torch.randn(n, RANK) * RANK**-0.5
    e, m = 0.5 + torch.rand(RANK, 1), 0.5 + torch.rand(n)
    scale = ALPHA / RANK

    def product(a: Tensor, b: Tensor) -> Tensor:
        return b.double() @ a.double()

    whole = w + scale * product(a, b)
    rows = m.double() / whole.norm(dim=1)
    adaptive = w + ALPHA / (RANK + 1e-5) * product(a * e, b)
    lora = filled(lk.FusedLoRALinear.from_linear(base, RANK, ALPHA), lora_A=a, lora_B=b)
    dora = lk.FusedLoRALinear.from_linear(base, RANK, ALPHA, use_dora=True)
    filled(dora, lora_A=a, lora_B=b, lora_magnitude_vector=m)
    ada = filled(AdaLoRALinear.from_linear(base, RANK, ALPHA), lora_A=a, lora_B=b, lora_E=e)
    merged = loralib.MergedLinear(k, n, RANK, ALPHA, enable_lora=SLICES, bias=False, dtype=dtype)
    merged.lora_B.normal_(std=RANK**-0.5)
    sliced = nn.Linear(k, n, bias=False, dtype=dtype)
    sliced.weight.copy_(merged.weight)
    ours = SlicedLoRALinear.from_linear(
        sliced, RANK, ALPHA, enable_lora=SLICES, autocast_adapter_dtype=False
    )
    filled(ours, lora_A=merged.lora_A, lora_B=merged.lora_B)
    side_by_side = merged.weight.double() + ours.delta_weight().double()
    return {
        PLAIN: Pair(base, None, lambda x: x @ w.t()),
        LORA: Pair(lora, stock(base, a, b), lambda x: x @ (w + scale * product(a, b)).t()),
        DORA: Pair(dora, stock(base, a, b, m=m), lambda x: x @ (rows[:, None] * whole).t()),
        ADALORA: Pair(ada, stock(base, a, b, e=e), lambda x: x @ adaptive.t()),
        MERGED: Pair(ours, merged, lambda x: x @ side_by_side.t()),
    }


@torch.no_grad()
def left_to_peft(case: Case) -> dict[str, tuple[nn.Module, nn.Module, tuple[Tensor, ...]]]:
    """Kinds of layers: the plain one, PEFT's around it, and their input."""
    width, dtype = case.width // 4, getattr(torch, case.dtype)
    x = torch.randn(1, case.rows, width, dtype=dtype)
    kinds: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "Embedding": (nn.Embedding(32000, width), (torch.randint(32000, (1, case.rows)),)),
        "Conv2d": (
            nn.Conv2d(width // 8, width // 8, 3, padding=1),
            (torch.randn(2, width // 8, 16, 16, dtype=dtype),),
        ),
        "MultiheadAttention": (nn.MultiheadAttention(width, 8, batch_first=True), (x, x, x)),
    }
    found = {}
    for name, (layer, given) in kinds.items():
        layer = layer.to(dtype).requires_grad_(False)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
        model: Any = peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config)
        found[name] = layer, model.base_model.model[0], given
    return found


def call(layer: nn.Module, given: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A forward of ``layer``, and the backward where it trains."""

    def step() -> None:
        y = layer(*given)
        y = y[0] if isinstance(y, tuple) else y
        if y.requires_grad:
            y.sum().backward()

    return step


def filled(layer: nn.Module, **values: Tensor) -> nn.Module:
    for name, value in values.items():
        getattr(layer, name).copy_(value)
    return layer


def stock(
    base: nn.Linear, a: Tensor, b: Tensor, m: Tensor | None = None, e: Tensor | None = None
) -> nn.Module:
    """PEFT's layer."""
    options: dict[str, Any] = {"lora_alpha": ALPHA, "target_modules": ["0"]}
    config: Any = (
        peft.LoraConfig(r=RANK, use_dora=m is not None, **options)
        if e is None
        else peft.AdaLoraConfig(init_r=RANK, target_r=RANK // 2, total_step=9, **options)
    )
    model: Any = peft.get_peft_model(nn.Sequential(base), config)
    layer = model.base_model.model[0]
    if e is not None:
        parts = layer.lora_A, layer.lora_B, layer.lora_E
        for part, value in zip(parts, (a, b, e), strict=True):
            part["default"].copy_(value)
        return layer
    layer.lora_A["default"].weight.copy_(a)
    layer.lora_B["default"].weight.copy_(b)
    if m is not None:
        layer.lora_magnitude_vector["default"].weight.copy_(m)
    return layer


def check(name: str, pair: Pair, x: Tensor) -> None:
    """No speed of a wrong result is printed. The library's linear is not ours to judge."""
    if pair.theirs is None:
        return
    with torch.no_grad():
        assert_within_budget(name, pair.ours(x), pair.theirs(x), pair.exact(x.double()))


def measure(case: Case, seconds: float) -> dict[str, Any]:
    pairs = pairs_of(case)
    x = torch.randn(case.rows, case.width, dtype=getattr(torch, case.dtype))
    steps: dict[str, Callable[[], Any]] = {}
    for name, pair in pairs.items():
        check(name, pair, x)
        for who, layer in (("ours", pair.ours), ("theirs", pair.theirs)):
            if layer is not None:
                dy = torch.randn(*layer(x).shape, dtype=x.dtype)
                # loralib's returns nothing.
                layer.train()
                steps[f"{name} {who}"] = step_of(layer, "forward + backward", x, dy)
    with lk.record_plans() as answers:
        for name in (LORA, DORA, ADALORA, MERGED):
            steps[f"{name} ours"]()
    if len(answers) != 12 or {answer.backend for answer in answers} != {"cpu"}:
        raise SystemExit(f"not answered by lora_kernels: {[str(answer) for answer in answers]}")
    left = {}
    for name, (plain, theirs, given) in left_to_peft(case).items():
        given = tuple(t.requires_grad_(t.is_floating_point()) for t in given)
        pair = {"plain": call(plain, given), "PEFT": call(theirs, given)}
        left[name] = samples_of(pair, seconds / 10)
    return case._asdict() | {"samples_us": samples_of(steps, seconds), "left": left}


def ratio(row: dict[str, Any], name: str, other: str, of: str = "") -> float:
    samples = row["left"][of] if of else row["samples_us"]
    return statistics.median(
        mine / its for mine, its in zip(samples[name], samples[other], strict=True)
    )


def missed(row: dict[str, Any]) -> list[str]:
    """The aims that a row misses."""
    found = [
        f"{name} takes {ratio(row, f'{name} ours', f'{LORA} ours'):.2f} of our LoRA layer's time"
        for name in (DORA, ADALORA, MERGED)
        if ratio(row, f"{name} ours", f"{LORA} ours") > MOST
    ]
    speed = ratio(row, f"{DORA} theirs", f"{DORA} ours")
    return found + [f"DoRA is {speed:.2f}x faster than PEFT's"] * (speed < LEAST)


def table(content: dict[str, Any]) -> list[str]:
    head = ["dtype", "layer", "ours ms", "of our LoRA layer", "of the plain linear", "origin ms"]
    head += ["ours faster than the origin"]
    body, misses = [], []
    for row in content["rows"]:
        misses += [f"{row['dtype']}: {miss}" for miss in missed(row)]
        for name in (PLAIN, LORA, DORA, ADALORA, MERGED):
            ours, theirs = f"{name} ours", f"{name} theirs"
            line = [row["dtype"], name, milliseconds(row, ours)]
            line += [f"{ratio(row, ours, f'{other} ours'):.2f}" for other in (LORA, PLAIN)]
            if theirs in row["samples_us"]:
                line += [milliseconds(row, theirs), f"{ratio(row, theirs, ours):.2f}x"]
            else:
                line += ["", ""]
            body.append(line)
    return [
        f"{told(content)}. Forward + backward of one layer, {content['rows'][0]['rows']} rows, "
        f"width {content['rows'][0]['width']}, rank {RANK}. Ratios of times: smaller is better; in "
        "the last column larger is.",
        "",
        *piped((head, body)).splitlines(),
        "",
        f"Misses its aim: {'; '.join(misses)}." if misses else "All aims are met.",
        "",
        "What stays PEFT's own forward, over the same layer without an adapter (both passes): "
        + "; ".join(
            f"{row['dtype']} "
            + ", ".join(f"{name} {ratio(row, 'PEFT', 'plain', name):.2f}" for name in row["left"])
            for row in content["rows"]
        )
        + ".",
    ]


def milliseconds(row: dict[str, Any], name: str) -> str:
    return number(statistics.median(row["samples_us"][name]) / 1000)


def run(cases: Sequence[Case], seconds: float) -> dict[str, Any]:
    rows = [measure(case, seconds) for case in tqdm(cases, desc="the family")]
    return origin("cpu", ("torch", "peft", "loralib")) | {"rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.family", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=30.0, help="for each dtype")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    cases = [Case(dtype=dtype) for dtype in ("bfloat16", "float32")]
    content = run(cases, args.seconds)
    write(content, table(content), args.out, "family")
    print("\n".join(table(content)))
    sys.exit(any(missed(row) for row in content["rows"]))


if __name__ == "__main__":
    main()
