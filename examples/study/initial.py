"""How should A and B start?

PEFT initialises, and ``lk.accelerate_peft`` trains it on our kernels. With B zero (A Kaiming or
gaussian) the adapter adds nothing at first; "orthogonal" makes both non-zero with B A = 0; PiSSA
(Meng et al., 2024) moves the weight's largest singular values into B A. Each way gets the best of
several learning rates, for none suits them all.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import peft

import lora_kernels as lk
from bench.tables import Table

from .lab import Lab, Run, peft_model
from .wording import BLUE, GREEN, GREY, ORANGE, PURPLE, changes, curve_beside, listed, spread

QUESTION = "How should A and B start?"
AXES = 2

RANK = 8
ZERO = "B zero"
# PEFT's `init_lora_weights`.
WAYS: dict[str, bool | str] = {
    ZERO: True,
    "both Kaiming": False,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "PiSSA": "pissa",
}
_COLOURS = dict(zip(WAYS, (GREY, ORANGE, GREEN, PURPLE, BLUE), strict=True))
# Of the lab's learning rate.
SHARES = (0.5, 1.0, 2.0)
# A start within this of the base's loss is the base's: PiSSA's singular values are rounded.
SAME = 1e-3


def measure(lab: Lab) -> dict[str, Any]:
    rates = [share * lab.rate for share in SHARES]
    starts: dict[str, dict[int, float]] = {way: {} for way in WAYS}

    def run(way: str, rate: float, seed: int) -> Run:
        model = adapted(lab.fresh(seed), WAYS[way])
        if seed not in starts[way]:
            starts[way][seed] = lab.evaluate(model)
        return lab.finetune(model, seed=seed, rate=rate)

    rows = [
        {
            "way": way,
            "start": list(starts[way].values()),
            "rate": rate,
            # The first seed's, at every rate.
            "tried": [run.held_out for run in tried.values()],
            "held_out": [run.held_out for run in runs],
            # Of every step, the seeds' mean.
            "losses": list(map(fmean, zip(*(run.losses for run in runs), strict=True))),
        }
        for way, (rate, runs, tried) in lab.tuned("initial", WAYS, rates, run).items()
    ]
    return {"rows": rows, "rates": rates, "before": lab.before}


def adapted(base: Any, way: bool | str) -> Any:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=way
    )
    model = peft_model(base, config)
    lk.accelerate_peft(model)
    return model


def table(content: dict[str, Any]) -> Table:
    head = ["start", "loss at step 0", *(f"first seed at {rate:g}" for rate in content["rates"])]
    head += ["best rate", "held-out loss"]
    body = [
        [row["way"], spread(row["start"]), *(f"{loss:.4f}" for loss in row["tried"])]
        + [f"{row['rate']:g}", spread(row["held_out"])]
        for row in content["rows"]
    ]
    return head, body


def finding(content: dict[str, Any]) -> str:
    rows, before = content["rows"], content["before"]
    # The seed that is farthest from the base.
    away = {row["way"]: max((s - before for s in row["start"]), key=abs) for row in rows}
    same = [way for way, apart in away.items() if abs(apart) < SAME]
    said = [
        f"with {way} it is up to {abs(apart):.4f} {'above' if apart > 0 else 'below'} it"
        for way, apart in away.items()
        if way not in same
    ]
    said[:0] = [f"the base's with {listed(same)}"] * bool(same)
    zero = next(row for row in rows if row["way"] == ZERO)
    others = {row["way"]: row["held_out"] for row in rows if row is not zero}
    return (
        f"At step 0 the held-out loss is {'; '.join(said)}. After {len(zero['losses'])} steps, "
        f"each start at its best rate, the loss {changes(others, zero['held_out'])}, beside {ZERO}."
    )


def plot(content: dict[str, Any], axes: Any) -> None:
    during, after = axes
    rows, rates = content["rows"], content["rates"]
    zero = next(row["losses"] for row in rows if row["way"] == ZERO)
    for row in rows:
        colour = _COLOURS[row["way"]]
        curve_beside(during, row["losses"], zero, color=colour, label=row["way"])
        after.plot(rates, row["tried"], "o-", color=colour, label=row["way"])
    during.set_xlabel("steps, each start at its best rate")
    during.set_ylabel(f"mean training loss so far, minus that of {ZERO}")
    after.axhline(content["before"], color="black", linewidth=0.8, linestyle=":", label="base")
    after.set_xscale("log")
    after.set_xticks(rates, [f"{rate:g}" for rate in rates])
    after.minorticks_off()
    after.set_xlabel("learning rate")
    after.set_ylabel("held-out loss afterwards, the first seed's")
    for ax in axes:
        ax.legend()
