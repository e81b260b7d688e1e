"""Do LoRA's variants learn more in the same steps?

rsLoRA (Kalajdzievski, 2023) scales by alpha / sqrt(r), DoRA (Liu et al., 2024) trains the length of
the weight's rows apart, and LoRA+ (Hayou et al., 2024) gives B a higher learning rate than A, here
by PEFT's optimizer. Every variant is tried at several learning rates.
"""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

import torch
from peft.optimizers import create_loraplus_optimizer

import lora_kernels as lk
from bench.tables import Table, count, number

from .lab import Lab, Run
from .wording import BLUE, GREEN, ORANGE, PURPLE, changes, curve_beside, listed, spread, times

QUESTION = "Do LoRA's variants learn more in the same steps?"
AXES = 2

RANK, ALPHA = 16, 16
# The learning rate of B over that of A; the paper's.
RATIO = 16
PLAIN, PLUS = "LoRA", f"LoRA+ (B's rate {RATIO}x)"
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    PLUS: {},
}
_COLOURS = dict(zip(VARIANTS, (BLUE, GREEN, ORANGE, PURPLE), strict=True))
# Times the lab's; LoRA+'s are those of A.
RATES = (0.1, 0.4, 1.5, 6.0)


def groups(model: Any, name: str, rate: float) -> Any:
    """What is trained, as an optimizer takes it."""
    if name != PLUS:
        return [p for p in model.parameters() if p.requires_grad]
    options = {"lr": rate, "loraplus_lr_ratio": RATIO}
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **options)
    return [group for group in optimizer.param_groups if group["params"]]


def measure(lab: Lab) -> dict[str, Any]:
    def run(name: str, rate: float, seed: int) -> Run:
        model = lk.apply_lora(lab.fresh(seed), r=RANK, lora_alpha=ALPHA, **VARIANTS[name])
        return lab.finetune(model, seed=seed, parameters=groups(model, name, rate), rate=rate)

    rates = [share * lab.rate for share in RATES]
    rows = [
        {
            "name": name,
            "parameters": runs[0].parameters,
            "rate": rate,
            # The first seed's, at every rate.
            "tried": [run.held_out for run in tried.values()],
            "held_out": [run.held_out for run in runs],
            # Of every step, the seeds' mean.
            "losses": list(map(fmean, zip(*(run.losses for run in runs), strict=True))),
            "step_s": median(run.step_s for run in tried.values()),
        }
        for name, (rate, runs, tried) in lab.tuned("variants", VARIANTS, rates, run).items()
    ]
    return {"rows": rows, "rates": rates}


def table(content: dict[str, Any]) -> Table:
    head = ["variant", "trained parameters", *(f"first seed at {r:g}" for r in content["rates"])]
    head += ["best rate", "held-out loss", "ms / step"]
    body = [
        [row["name"], count(row["parameters"]), *(f"{loss:.4f}" for loss in row["tried"])]
        + [f"{row['rate']:g}", spread(row["held_out"]), number(row["step_s"] * 1e3)]
        for row in content["rows"]
    ]
    return head, body


def finding(content: dict[str, Any]) -> str:
    plain, *others = content["rows"]
    said = changes({row["name"]: row["held_out"] for row in others}, plain["held_out"])
    slower = [
        f"{times(row['step_s'], plain['step_s'], 'slower', 'faster')} with {row['name']}"
        for row in others
    ]
    return (
        f"Beside {PLAIN}, each at its best rate, the held-out loss after {len(plain['losses'])} "
        f"steps {said}. A step is {listed(slower)}."
    )


def plot(content: dict[str, Any], axes: Any) -> None:
    ends, curves = axes
    rows, rates = content["rows"], content["rates"]
    plain = rows[0]["losses"]
    for row in rows:
        colour = _COLOURS[row["name"]]
        ends.plot(rates, row["tried"], "o-", color=colour, label=row["name"])
        curve_beside(curves, row["losses"], plain, color=colour, label=row["name"])
    # Rates at which training diverges would leave no room for the others.
    ends.set_ylim(top=min(ends.get_ylim()[1], 1.05 * plain[0]))
    ends.set_xscale("log")
    ends.set_xticks(rates, [f"{rate:g}" for rate in rates])
    ends.minorticks_off()
    ends.set_xlabel("learning rate (LoRA+: of A)")
    ends.set_ylabel("held-out loss, the first seed's")
    curves.set_xlabel("step")
    curves.set_ylabel(f"mean loss so far, minus {PLAIN}'s")
    ends.legend()
    curves.legend()
