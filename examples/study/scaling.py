"""Which alpha, and which learning rate with it?

The factor in front of B A is alpha / r. With Adam a larger factor works much as a larger learning
rate does, so both are asked together, in runs of half the steps.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import lora_kernels as lk
from bench.tables import Table

from .lab import Lab, Run
from .wording import NO_DIFFERENCE, banded, gap, listed, spread

QUESTION = "Which alpha, and which learning rate with it?"
AXES = 2

RANK = 8
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# Of the lab's learning rate.
SHARES = (0.25, 1.0, 4.0)


def measure(lab: Lab) -> dict[str, Any]:
    rates, steps = [lab.rate * share for share in SHARES], lab.steps // 2

    def run(factor: str, rate: float, seed: int) -> Run:
        model = lk.apply_lora(lab.fresh(seed), r=RANK, lora_alpha=float(factor) * RANK)
        return lab.finetune(model, seed=seed, rate=rate, steps=steps)

    runs = lab.sweep("scaling", map(str, FACTORS), rates, run)
    rows = [
        {"factor": float(factor), "held_out": [[run.held_out for run in r] for r in found.values()]}
        for factor, found in runs.items()
    ]
    return {"rows": rows, "rates": rates, "steps": steps, "before": lab.before}


def table(content: dict[str, Any]) -> Table:
    head = ["alpha / r", "alpha", *(f"held-out loss, rate {rate:g}" for rate in content["rates"])]
    body = [
        [f"{row['factor']:g}", f"{row['factor'] * RANK:g}", *map(spread, row["held_out"])]
        for row in content["rows"]
    ]
    return head, body


def best_rate(content: dict[str, Any], row: dict[str, Any]) -> tuple[float, list[float]]:
    """The rate that suits the row's factor, and the seeds' losses with it."""
    at = min(range(len(content["rates"])), key=lambda i: fmean(row["held_out"][i]))
    return content["rates"][at], row["held_out"][at]


def finding(content: dict[str, Any]) -> str:
    rows, rates = content["rows"], content["rates"]
    chosen = [best_rate(content, row) for row in rows]
    low, high = chosen[0][0], chosen[-1][0]
    moved = f"is {low:g} at both ends"
    if high != low:
        moved = f"{'falls' if high < low else 'rises'} from {low:g} to {high:g}"
    order = sorted(range(len(rows)), key=lambda i: fmean(chosen[i][1]))
    best, worst = order[0], order[-1]
    apart = gap(chosen[worst][1], chosen[best][1])
    own = (
        f"the factors are then at most {apart:.4f} apart" if apart else f"there is {NO_DIFFERENCE}"
    )
    at = f"{rows[best]['factor']:g} at {chosen[best][0]:g}"
    said = [f"{_cost(rows, i)} at {rate:g}" for i, rate in enumerate(rates)]
    return (
        f"In runs of {content['steps']} steps, from alpha / r = {rows[0]['factor']:g} to "
        f"{rows[-1]['factor']:g}, the best of the learning rates {moved}; {own} (the lowest is "
        f"{at}). At one rate for all factors the worst is above the best by {listed(said)}, from "
        "seed to seed."
    )


def _cost(rows: list[dict[str, Any]], at: int) -> str:
    """How far the worst factor is above the best at a rate, from seed to seed."""
    best, *_, worst = sorted((row["held_out"][at] for row in rows), key=fmean)
    apart = [a - b for a, b in zip(worst, best, strict=True)]
    return f"{min(apart):.4f} to {max(apart):.4f}"


def plot(content: dict[str, Any], axes: Any) -> None:
    from matplotlib import colormaps

    lines, grid = axes
    rows, rates = content["rows"], content["rates"]
    factors = [row["factor"] for row in rows]
    for at, rate in enumerate(rates):
        colour = colormaps["viridis"](0.85 * at / max(len(rates) - 1, 1))
        values = [row["held_out"][at] for row in rows]
        banded(lines, factors, values, color=colour, label=f"rate {rate:g}")
    before, means = content["before"], [[fmean(v) for v in row["held_out"]] for row in rows]
    lines.axhline(before, color="black", linewidth=0.8, linestyle=":", label="base")
    lines.set_xscale("log", base=2)
    lines.set_xticks(factors, [f"{factor:g}" for factor in factors])
    lines.set_xlabel("alpha / r")
    lines.set_ylabel("held-out loss, with the seeds' range")
    # What is far above the base would hide the differences below it, and has one colour.
    least = min(min(v) for row in rows for v in row["held_out"])
    if least < before:
        lines.set_ylim(1.1 * least - 0.1 * before, 1.5 * before - 0.5 * least)
    lines.legend()
    most = max(before, min(map(min, means)))
    image = grid.imshow(means, cmap="viridis_r", vmax=most, aspect="auto")
    for y, line in enumerate(means):
        for x, value in enumerate(line):
            colour = "black" if image.norm(value) < 0.5 else "white"
            grid.text(x, y, f"{value:.3f}", ha="center", va="center", color=colour)
    grid.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
    grid.set_yticks(range(len(rows)), [f"{factor:g}" for factor in factors])
    grid.set_xlabel("learning rate")
    grid.set_ylabel("alpha / r")
    grid.spines[:].set_visible(False)
