"""Which rank, and which scaling with it?

Adapters of several ranks on every linear layer but the head, each with three rules for the factor
in front of B A: alpha / r with the same alpha for all ranks, alpha = r (the factor is 1), and
rsLoRA's alpha / sqrt(r) (Kalajdzievski, 2023).
"""

from __future__ import annotations

from itertools import product
from statistics import fmean, median
from typing import Any

import lora_kernels as lk
from bench.tables import Table, count, number

from .lab import Lab
from .wording import (
    BLUE,
    GREEN,
    NO_DIFFERENCE,
    ORANGE,
    banded,
    change,
    gap,
    listed,
    mib,
    spread,
    times,
)

QUESTION = "Which rank, and which scaling with it?"
AXES = 2

RANKS = (2, 4, 8, 16, 32, 64)
ALPHA = 16
FIXED, EQUAL, STABLE = f"alpha = {ALPHA}", "alpha = r", f"rsLoRA, alpha = {ALPHA}"
SCALINGS: dict[str, dict[str, Any]] = {
    FIXED: {"lora_alpha": ALPHA},
    EQUAL: {},
    STABLE: {"lora_alpha": ALPHA, "use_rslora": True},
}
_COLOURS = dict(zip(SCALINGS, (ORANGE, BLUE, GREEN), strict=True))


def measure(lab: Lab) -> dict[str, Any]:
    runs: dict[tuple[int, str], list[Any]] = {key: [] for key in product(RANKS, SCALINGS)}
    # The seeds outermost: what the machine does meanwhile falls on all ranks alike.
    for seed, (rank, scaling) in lab.each("rank", product(lab.seeds, runs)):
        fields = {"lora_alpha": rank} | SCALINGS[scaling]
        model = lk.apply_lora(lab.fresh(seed), r=rank, **fields)
        memory = not runs[rank, FIXED]
        runs[rank, scaling].append(lab.finetune(model, seed=seed, memory=memory))
    rows = []
    for rank in RANKS:
        first, every = runs[rank, FIXED][0], sum((runs[rank, s] for s in SCALINGS), [])
        rows.append(
            {
                "rank": rank,
                "parameters": first.parameters,
                "held_out": {s: [run.held_out for run in runs[rank, s]] for s in SCALINGS},
                "step_s": median(run.step_s for run in every),
                "saved_bytes": first.saved_bytes,
                "peak_bytes": first.peak_bytes,
            }
        )
    return {"rows": rows, "before": lab.before}


def table(content: dict[str, Any]) -> Table:
    head = ["rank", "trained parameters", *(f"held-out loss, {name}" for name in SCALINGS)]
    head += ["ms / step", "saved activations, MiB", "peak of a step, MiB"]
    body = [
        [
            str(row["rank"]),
            count(row["parameters"]),
            *(spread(row["held_out"][name]) for name in SCALINGS),
            number(row["step_s"] * 1e3),
            mib(row["saved_bytes"]),
            mib(row["peak_bytes"]),
        ]
        for row in content["rows"]
    ]
    return head, body


def finding(content: dict[str, Any]) -> str:
    rows = content["rows"]
    low, high = rows[0], rows[-1]
    said: dict[str, list[str]] = {}
    for name in SCALINGS:
        what = change(high["held_out"][name], low["held_out"][name])
        said.setdefault(what, []).append(name)
    changes = [f"{what} with {listed(names)}" for what, names in said.items()]
    means = {name: fmean(high["held_out"][name]) for name in SCALINGS}
    best, *others = sorted(means, key=means.__getitem__)
    behind = [
        f"{gap(high['held_out'][name], high['held_out'][best]):.4f} below {name}"
        for name in others
        if gap(high["held_out"][name], high["held_out"][best])
    ]
    lead = f"{best} is best ({listed(behind)})" if behind else f"the scalings show {NO_DIFFERENCE}"
    slower = times(high["step_s"], low["step_s"], "slower", "faster")
    larger = times(high["saved_bytes"], low["saved_bytes"], "larger", "smaller")
    parameters = f"{high['parameters'] / low['parameters']:.0f}x the parameters"
    costs = [parameters, f"a step that is {slower}", f"saved activations that are {larger}"]
    return (
        f"From rank {low['rank']} to {high['rank']} the held-out loss {listed(changes)}; at rank "
        f"{high['rank']} {lead}. The price of it: {listed(costs)}."
    )


def plot(content: dict[str, Any], axes: Any) -> None:
    losses, costs = axes
    rows = content["rows"]
    ranks = [row["rank"] for row in rows]
    for name, colour in _COLOURS.items():
        values = [row["held_out"][name] for row in rows]
        banded(losses, ranks, values, color=colour, label=name)
    losses.set_ylabel("held-out loss, with the seeds' range")
    for key, label, colour in (
        ("parameters", "trained parameters", ORANGE),
        ("step_s", "time of a step", BLUE),
        ("saved_bytes", "saved activations", GREEN),
    ):
        relative = [row[key] / rows[0][key] for row in rows]
        costs.plot(ranks, relative, "o-", color=colour, label=label)
    costs.set_yscale("log", base=2)
    costs.yaxis.set_major_formatter("{x:g}x")
    costs.set_ylabel(f"beside rank {ranks[0]}")
    for ax in axes:
        ax.set_xscale("log", base=2)
        ax.set_xticks(ranks, [str(rank) for rank in ranks])
        ax.set_xlabel("rank")
        ax.legend()
