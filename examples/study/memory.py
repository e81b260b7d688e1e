"""What makes training smaller: each trick alone, and all together?

An adapter is trained with gradient accumulation, bfloat16 autocast, gradient checkpointing and a
base in four bits. What the weights take, what autograd saves for the backward and the most that a
step allocates are counted; ``make memory`` does it for larger models, PEFT's beside them.
"""

from __future__ import annotations

import warnings
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lora_kernels as lk
from bench.tables import Table, number

from ..demo.training import Loss, loss_of
from .lab import Lab
from .wording import BLUE, GREY, ORANGE, change, mib, spread, times

QUESTION = "What makes training smaller: each trick alone, and all together?"
AXES = 2


class Tricks(NamedTuple):
    accumulation: bool = False
    autocast: bool = False
    checkpointing: bool = False
    four_bits: bool = False


# The first has none, the last has all.
CASES = {
    "none": Tricks(),
    "accumulation": Tricks(accumulation=True),
    "bfloat16 autocast": Tricks(autocast=True),
    "checkpointing": Tricks(checkpointing=True),
    "four-bit base": Tricks(four_bits=True),
    "accumulation, autocast": Tricks(True, True),
    "accumulation, autocast, checkpointing": Tricks(True, True, True),
    "all four": Tricks(True, True, True, True),
}


def measure(lab: Lab) -> dict[str, Any]:
    runs: dict[str, list[Any]] = {name: [] for name in CASES}
    # Some of the tricks take several times as long for a step.
    weights, steps = {}, -(-lab.steps // 4)
    turns = [(seed, name) for seed in lab.seeds for name in CASES]
    for seed, name in lab.each("memory", turns):
        tricks = CASES[name]
        model = lab.fresh(seed)
        if tricks.four_bits:
            lk.quantize_base(model)
        lk.apply_lora(model, r=8, lora_alpha=16)
        if tricks.checkpointing:
            with warnings.catch_warnings():
                # transformers 5.23 has a new name for it.
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False
        # In the state a four-bit weight has its scales beside it; tied weights count once.
        weights[name] = sum({t.data_ptr(): t.nbytes for t in model.state_dict().values()}.values())
        loss, memory = loss_with(tricks), not runs[name]
        runs[name].append(lab.finetune(model, seed=seed, steps=steps, loss=loss, memory=memory))
    rows = [
        {
            "tricks": name,
            "weight_bytes": weights[name],
            "saved_bytes": found[0].saved_bytes,
            "peak_bytes": found[0].peak_bytes,
            "step_s": median(run.step_s for run in found),
            "held_out": [run.held_out for run in found],
        }
        for name, found in runs.items()
    ]
    return {"rows": rows, "steps": steps}


def loss_with(tricks: Tricks) -> Loss:
    def loss(model: Any, rows: Tensor) -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=tricks.autocast):
            return loss_of(model, rows)

    return partial(in_parts, loss) if tricks.accumulation else loss


def in_parts(loss_of: Loss, model: Any, rows: Tensor) -> Tensor:
    """Gradient accumulation: a backward for each row but the last, whose graph alone is left."""
    if not torch.is_grad_enabled():
        return loss_of(model, rows)
    *parts, last = rows.split(1)
    done = torch.zeros((), device=model.device)
    for part in parts:
        loss = loss_of(model, part).sum() / len(rows)
        loss.backward()
        done += loss.detach()
    return done + loss_of(model, last).sum() / len(rows)


def table(content: dict[str, Any]) -> Table:
    head = ["tricks", "weights, MiB", "saved activations, MiB", "peak of a step, MiB", "ms / step"]
    head += ["held-out loss"]
    body = [
        [row["tricks"], *(mib(row[f"{key}_bytes"]) for key in ("weight", "saved", "peak"))]
        + [number(row["step_s"] * 1e3), spread(row["held_out"])]
        for row in content["rows"]
    ]
    return head, body


def finding(content: dict[str, Any]) -> str:
    none, *others, every = content["rows"]
    alone = [row for row in others if sum(CASES[row["tricks"]]) == 1]
    said = []
    for key, what in (("peak_bytes", "a step's peak"), ("weight_bytes", "the weights")):
        best = min(alone, key=lambda row: row[key])
        said.append(f"{best['tricks']} helps {what} most ({_beside(best, none, key)})")
    return (
        f"Alone, {said[0]}, and {said[1]}. With {every['tricks']} the peak is "
        f"{_beside(every, none, 'peak_bytes')}, the weights are "
        f"{_beside(every, none, 'weight_bytes')}, a step is "
        f"{times(every['step_s'], none['step_s'], 'slower', 'faster')}, and the held-out loss "
        f"after {content['steps']} steps {change(every['held_out'], none['held_out'])}."
    )


def _beside(row: dict[str, Any], other: dict[str, Any], key: str) -> str:
    return times(row[key], other[key], "larger", "smaller")


def plot(content: dict[str, Any], axes: Any) -> None:
    sizes, steps = axes
    rows = content["rows"]
    places = range(len(rows))
    weights, peaks = ([row[f"{key}_bytes"] / 2**20 for row in rows] for key in ("weight", "peak"))
    sizes.barh(places, weights, color=GREY, label="weights")
    sizes.barh(places, peaks, left=weights, color=BLUE, label="peak of a step, above them")
    sizes.set_xlabel("MiB")
    sizes.set_yticks(places, [row["tricks"] for row in rows])
    sizes.legend()
    steps.barh(places, [row["step_s"] * 1e3 for row in rows], color=ORANGE)
    steps.set_xlabel("ms / step")
    steps.set_yticks(places, [""] * len(rows))
    for ax in axes:
        ax.invert_yaxis()
