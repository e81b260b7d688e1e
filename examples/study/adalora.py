"""Do ranks that move to where they are needed bring more than fixed ones?

AdaLoRA (Zhang et al., 2023) starts with more ranks than it may keep and takes the least useful away
while it trains: PEFT's model and allocator, on this package's kernels. LoRA has the rank that it
ends with on average, or the one that it starts with.
"""

from __future__ import annotations

import re
from statistics import fmean, median
from typing import Any

import peft
from torch import Tensor

import lora_kernels as lk
from bench.tables import Table, count, number

from ..demo.training import loss_of
from .lab import Lab, Run, peft_model
from .wording import BLUE, beside, heat_map, ranges, spread, times

QUESTION = "Do ranks that move to where they are needed bring more than fixed ones?"
AXES = 2

# Of the ranks, at the end and at first; and of alpha to the rank.
KEPT, FIRST, SCALE = 4, 8, 2
ADA, SAME, MORE = "AdaLoRA", f"LoRA of rank {KEPT}", f"LoRA of rank {FIRST}"
FIXED = {SAME: KEPT, MORE: FIRST}
NAMES = (ADA, SAME, MORE)
# Times the lab's.
RATES = (1.0, 3.0, 10.0)


def adaptive(lab: Lab, seed: int, steps: int) -> Any:
    """PEFT's AdaLoRA, on the kernels."""
    schedule = {"total_step": steps, "tinit": steps // 8, "tfinal": max(steps // 4, 1)}
    config = peft.AdaLoraConfig(
        target_modules="all-linear",
        init_r=FIRST,
        target_r=KEPT,
        lora_alpha=SCALE * FIRST,
        orth_reg_weight=0.1,
        **schedule,
    )
    base = lab.fresh(seed)
    # GPT-2 names none, and transformers would say so.
    base.loss_type = "ForCausalLM"
    model = peft_model(base, config)
    lk.accelerate_peft(model)
    return model


def loss(model: Any, rows: Tensor) -> Tensor:
    """With labels PEFT adds its regularisation, which is for training only."""
    if not model.training:
        return loss_of(model, rows)
    rows = rows.to(model.device)
    return model(input_ids=rows, labels=rows).loss


def by_place(ranks: dict[str, float]) -> dict[str, dict[str, float]]:
    """Layers' ranks by the name in a block, and the block's number."""
    found: dict[str, dict[str, float]] = {}
    for layer, rank in ranks.items():
        place = re.search(r"\.(\d+)\.(.+)", layer)
        kind, block = (place[2], place[1]) if place else (layer, "")
        found.setdefault(kind, {})[block] = rank
    return found


def measure(lab: Lab) -> dict[str, Any]:
    left: dict[int, dict[str, int]] = {}

    def run(name: str, rate: float, seed: int) -> Run:
        options: Any = {"seed": seed, "rate": rate, "steps": 3 * lab.steps // 2}
        if name == ADA:
            model = adaptive(lab, seed, options["steps"])
            options |= {"loss": loss, "after_step": model.base_model.update_and_allocate}
            found = lab.finetune(model, **options)
            pattern = model.peft_config["default"].rank_pattern
            ranks = {key.split(".lora_E")[0]: sum(kept) for key, kept in pattern.items()}
        else:
            model = lk.apply_lora(lab.fresh(seed), r=FIXED[name], lora_alpha=SCALE * FIXED[name])
            found = lab.finetune(model, **options)
            ranks = dict.fromkeys(lk.lora_report(model).adapted, FIXED[name])
        left[id(found)] = ranks
        return found

    rates = [share * lab.rate for share in RATES]
    rows = []
    for name, (rate, runs, _) in lab.tuned("adalora", NAMES, rates, run).items():
        ranks = [left[id(run)] for run in runs]
        rows.append(
            {
                "name": name,
                "rate": rate,
                "parameters": runs[0].parameters,
                "held_out": [run.held_out for run in runs],
                # Of every layer, the seeds' mean.
                "ranks": {layer: fmean(r[layer] for r in ranks) for layer in ranks[0]},
                "step_s": median(run.step_s for run in runs),
            }
        )
    return {"rows": rows}


def total(row: dict[str, Any]) -> float:
    return sum(row["ranks"].values())


def table(content: dict[str, Any]) -> Table:
    head = ["method", "parameters in training", "ranks at the end", "best rate", "held-out loss"]
    body = [
        [row["name"], count(row["parameters"]), f"{total(row):.0f}", f"{row['rate']:g}"]
        + [spread(row["held_out"]), number(row["step_s"] * 1e3)]
        for row in content["rows"]
    ]
    return [*head, "ms / step"], body


def finding(content: dict[str, Any]) -> str:
    rows = {row["name"]: row for row in content["rows"]}
    ada, same = rows.pop(ADA), rows[SAME]
    losses = {f"{name} ({total(row):.0f} ranks)": row["held_out"] for name, row in rows.items()}
    mean = {kind: fmean(blocks.values()) for kind, blocks in by_place(ada["ranks"]).items()}
    most, least = max(mean, key=mean.__getitem__), min(mean, key=mean.__getitem__)
    slower = times(ada["step_s"], same["step_s"], "slower", "faster")
    return (
        f"{ADA} ({total(ada):.0f} ranks at the end) ends {beside(ada['held_out'], losses)}; its "
        f"step is {slower} than that of {SAME}. Its ranks went to {most} most "
        f"({mean[most]:.1f} in a layer), to {least} least ({mean[least]:.1f})."
    )


def plot(content: dict[str, Any], axes: Any) -> None:
    losses, heat = axes
    rows = content["rows"]
    losses.errorbar(NAMES, fmt="o", color=BLUE, **ranges(row["held_out"] for row in rows))
    losses.margins(x=0.2)
    losses.set_ylabel("held-out loss, with the seeds' range")
    ranks = by_place(next(row["ranks"] for row in rows if row["name"] == ADA))
    heat_map(heat, ranks, FIRST)
    heat.set_ylabel("block")
    heat.set_title(f"ranks that {ADA} has left of {FIRST}, the seeds' mean", fontsize=10)
