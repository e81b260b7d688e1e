"""What does a four-bit base cost, and what does it save?

The base's linear layers in NF4 and in FP4, with and without double quantisation (QLoRA, Dettmers
et al., 2023), below an adapter in float32; everything else is in bfloat16, as is the base that they
are compared with.
"""

from __future__ import annotations

from itertools import product
from statistics import median
from typing import Any

import torch

import lora_kernels as lk
from bench.tables import Table, number

from ..demo.training import adapted_weights, logits
from .lab import Lab
from .wording import BLUE, GREY, changes, costs, listed, ranges, spread, times

QUESTION = "What does a four-bit base cost, and what does it save?"
AXES = 2

PLAIN = "bfloat16"
# A kind's type, and whether its absmax are quantised too.
KINDS = {
    "NF4": ("nf4", False),
    "NF4 double": ("nf4", True),
    "FP4": ("fp4", False),
    "FP4 double": ("fp4", True),
}
NAMES = (PLAIN, *KINDS)
RANK = 8


def base(lab: Lab, name: str, seed: int) -> Any:
    model = lab.fresh(seed).to(torch.bfloat16)
    if name == PLAIN:
        return model
    kind, double = KINDS[name]
    return lk.quantize_base(model, kind, double_quant=double)


def measure(lab: Lab) -> dict[str, Any]:
    runs: dict[str, list[Any]] = {name: [] for name in NAMES}
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Any] = {}
    for seed, name in lab.each("four_bit", product(lab.seeds, NAMES)):
        model = base(lab, name, seed)
        if name not in rows:
            rows[name] = {"name": name, "before": lab.evaluate(model)}
        lk.apply_lora(model, r=RANK, lora_alpha=2 * RANK)
        runs[name].append(lab.finetune(model, seed=seed))
        rows[name]["bytes"], rows[name]["weights"] = adapted_weights(model)
        calls[name] = lambda model=model: logits(model, lab.held_out[:4])
    seconds = lab.in_turns(calls)
    for name, row in rows.items():
        row["after"] = [run.held_out for run in runs[name]]
        row["step_s"] = median(run.step_s for run in runs[name])
        row["infer_s"] = seconds[name]
    return {"rows": list(rows.values())}


def table(content: dict[str, Any]) -> Table:
    head = ["linear layers", "bits / weight", "their weights, MiB", "held-out loss before"]
    head += ["after", "ms / step", "ms / inference"]
    body = [
        [row["name"], f"{bits(row):.2f}", f"{row['bytes'] / 2**20:.3f}", f"{row['before']:.4f}"]
        + [spread(row["after"]), number(row["step_s"] * 1e3), number(row["infer_s"] * 1e3)]
        for row in content["rows"]
    ]
    return head, body


def bits(row: dict[str, Any]) -> float:
    return 8 * row["bytes"] / row["weights"]


def finding(content: dict[str, Any]) -> str:
    plain, *four = content["rows"]
    least = min(four, key=bits)
    lost = listed([f"{row['before'] - plain['before']:+.4f} in {row['name']}" for row in four])
    after = changes({row["name"]: row["after"] for row in four}, plain["after"])
    step, infer = (
        listed([f"{times(r[key], plain[key], 'slower', 'faster')} with {r['name']}" for r in four])
        for key in ("step_s", "infer_s")
    )
    return (
        f"Four bits change the base's held-out loss by {lost}; after training, beside {PLAIN}, it "
        f"{after}. The weights shrink {bits(plain) / bits(least):.1f}x, to {bits(least):.2f} bits "
        f"({least['name']}). A step is {step}; inference is {infer}."
    )


def plot(content: dict[str, Any], axes: Any) -> None:
    losses, bars = axes
    plain, *four = rows = content["rows"]
    # Of the same seed, which draws the same batches.
    after = [[a - b for a, b in zip(r["after"], plain["after"], strict=True)] for r in four]
    before = [row["before"] - plain["before"] for row in four]
    names = [row["name"] for row in four]
    losses.plot(names, before, "o", color=GREY, label="before training")
    losses.errorbar(names, fmt="o", color=BLUE, label="after", **ranges(after))
    losses.axhline(0, color="black", linewidth=0.8)
    losses.margins(x=0.15)
    losses.set_ylabel(f"held-out loss above {PLAIN}'s, with the seeds' range")
    keys = {"weights": "bytes", "a step": "step_s", "inference": "infer_s"}
    shares = {label: [row[key] / plain[key] for row in rows] for label, key in keys.items()}
    costs(bars, [row["name"] for row in rows], shares, PLAIN)
    losses.legend()
