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

from .lab import Lab, Run, best_rate
from .wording import BLUE, GREEN, ORANGE, PURPLE, changes, listed, ranges, spread, times

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
    runs = lab.sweep("variants", VARIANTS, rates, run)
    rows = []
    for name, tried in runs.items():
        best = tried[best_rate(tried)]
        rows.append(
            {
                "name": name,
                "parameters": best[0].parameters,
                "rates": rates,
                "held_out": [[run.held_out for run in at_rate] for at_rate in tried.values()],
                # Of every step, the seeds' mean, at the best rate.
                "losses": list(map(fmean, zip(*(run.losses for run in best), strict=True))),
                "step_s": median(run.step_s for at_rate in tried.values() for run in at_rate),
            }
        )
    return {"rows": rows}


def best(row: dict[str, Any]) -> list[float]:
    """The seeds' losses at the row's best rate."""
    return min(row["held_out"], key=fmean)


def table(content: dict[str, Any]) -> Table:
    rates = content["rows"][0]["rates"]
    head = ["variant", "trained parameters", *(f"held-out loss at {rate:g}" for rate in rates)]
    head += ["best of them", "ms / step"]
    body = [
        [row["name"], count(row["parameters"]), *map(spread, row["held_out"])]
        + [f"{fmean(best(row)):.4f}", number(row["step_s"] * 1e3)]
        for row in content["rows"]
    ]
    return head, body


def finding(content: dict[str, Any]) -> str:
    plain, *others = content["rows"]
    said = changes({row["name"]: best(row) for row in others}, best(plain))
    slower = [
        f"{times(row['step_s'], plain['step_s'], 'slower', 'faster')} with {row['name']}"
        for row in others
    ]
    return (
        f"Beside {PLAIN}, each at its best rate, the held-out loss after {len(plain['losses'])} "
        f"steps {said}. A step is {listed(slower)}."
    )


def plot(content: dict[str, Any], axes: Any) -> None:
    held_out, curves = axes
    for row in content["rows"]:
        colour = _COLOURS[row["name"]]
        reach = ranges(row["held_out"])
        held_out.errorbar(row["rates"], fmt="o-", color=colour, label=row["name"], **reach)
        rate = row["rates"][row["held_out"].index(best(row))]
        curves.plot(row["losses"], color=colour, label=f"{row['name']}, at {rate:g}")
    held_out.set_xscale("log")
    held_out.set_xticks(rates := content["rows"][0]["rates"], [f"{rate:g}" for rate in rates])
    held_out.minorticks_off()
    # Rates at which training diverges would leave no room for the others.
    held_out.set_ylim(top=min(held_out.get_ylim()[1], 1.05 * content["rows"][0]["losses"][0]))
    held_out.set_xlabel("learning rate (LoRA+: of A)")
    held_out.set_ylabel("held-out loss, with the seeds' range")
    curves.set_xlabel("step")
    curves.set_ylabel("training loss, the seeds' mean")
    for ax in axes:
        ax.legend()
