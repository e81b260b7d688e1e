"""LoRA, or another way to train few numbers?

LoRA runs on this package and is merged for inference; prefix-tuning (Li & Liang, 2021) is PEFT's;
bottleneck adapters (Houlsby et al., 2019) are in houlsby.py. Prefixes and bottlenecks get as many
numbers as LoRA of two ranks has; BitFit (Ben Zaken et al., 2022) trains the biases there are.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import peft
from torch import nn

import lora_kernels as lk
from bench.tables import Table, count, number

from ..demo.training import logits
from .houlsby import ENDS, add_bottlenecks
from .lab import Lab, Run, Unanswered, peft_model
from .wording import beside, costs, listed, mib, ranges, spread, times

QUESTION = "LoRA, or another way to train few numbers?"
AXES = 2

LORA, HOULSBY, PREFIX, BITFIT, FULL = "LoRA", "bottleneck", "prefix", "BitFit", "full fine-tuning"
SIZED = {LORA: "LoRA of rank {}", HOULSBY: "bottleneck of width {}", PREFIX: "prefix of {} tokens"}
RANKS = (1, 4)
# Times the lab's.
RATES = (0.3, 3.0, 30.0)


def adapted(lab: Lab, method: str, size: int, seed: int = 0) -> Any:
    """The base with what the method adds, in a size; what is trained has ``requires_grad``."""
    model = lab.fresh(seed)
    if method == LORA:
        return lk.apply_lora(model, r=size, lora_alpha=2 * size)
    if method == PREFIX:
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=size)
        return peft_model(model, config)
    if method == HOULSBY:
        return add_bottlenecks(model, size)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method == FULL or name.endswith("bias"))
    return model


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def matched(lab: Lab, method: str, budget: int, most: int) -> int:
    """The size at which the method trains about ``budget`` numbers."""
    one, two = (trained(adapted(lab, method, size)) for size in (1, 2))
    if not one:
        raise Unanswered(f"no layer of this model has one of the names {listed(ENDS)}")
    return min(max(1 + round((budget - one) / (two - one)), 1), most)


def measure(lab: Lab) -> dict[str, Any]:
    # A prefix takes positions away from the text, so that has half of them, for all methods.
    half = lab.rows.shape[1] // 2
    texts, held_out = (r[:, : 2 * half].reshape(-1, half) for r in (lab.rows, lab.held_out))
    cases = [(method, 0) for method in (BITFIT, FULL) if trained(adapted(lab, method, 0))]
    for rank in RANKS:
        budget = trained(adapted(lab, LORA, rank))
        cases += [(LORA, rank)]
        cases += [(method, matched(lab, method, budget, half)) for method in (HOULSBY, PREFIX)]
    names = {SIZED.get(method, method).format(size): (method, size) for method, size in cases}
    models: dict[str, Any] = {}

    def run(name: str, rate: float, seed: int) -> Run:
        models[name] = adapted(lab, *names[name], seed)
        options: Any = {"seed": seed, "rate": rate, "memory": seed == lab.seeds[-1]}
        return lab.finetune(models[name], rows=texts, held_out=held_out, **options)

    rates = [share * lab.rate for share in RATES]
    tuned = lab.tuned("methods", names, rates, run)
    for name, (method, _) in names.items():
        if method == LORA:
            lk.merge_adapter(models[name])
    probe = held_out[:8]
    seconds = lab.in_turns({name: partial(logits, models[name], probe) for name in models})
    rows = []
    for name, (rate, runs, _) in tuned.items():
        moments = 2 * sum(p.nbytes for p in models[name].parameters() if p.requires_grad)
        rows.append(
            {
                "name": name,
                "method": names[name][0],
                "parameters": runs[0].parameters,
                "rate": rate,
                "held_out": [run.held_out for run in runs],
                "step_s": median(run.step_s for run in runs),
                "memory_bytes": runs[-1].peak_bytes + moments,
                "infer_s": seconds[name],
            }
        )
    rows.sort(key=lambda row: row["parameters"])
    return {"rows": rows, "before": lab.evaluate(lab.base, held_out)}


def table(content: dict[str, Any]) -> Table:
    head = ["method", "trained parameters", "best rate", "held-out loss", "ms / step"]
    head += ["memory of a step and of Adam, MiB", "ms / inference (LoRA merged)"]
    body = [
        [row["name"], count(row["parameters"]), f"{row['rate']:g}", spread(row["held_out"])]
        + [number(row["step_s"] * 1e3), mib(row["memory_bytes"]), number(row["infer_s"] * 1e3)]
        for row in content["rows"]
    ]
    return head, body


def finding(content: dict[str, Any]) -> str:
    # Of each method the larger, if there are two.
    rows = {row["method"]: row for row in content["rows"]}
    lora, full = rows.pop(LORA), rows[FULL]
    losses = {f"{r['name']} ({count(r['parameters'])})": r["held_out"] for r in rows.values()}
    step = times(lora["step_s"], full["step_s"], "slower", "faster")
    memory = times(lora["memory_bytes"], full["memory_bytes"], "more", "less")
    inference = [
        f"{times(row['infer_s'], full['infer_s'], 'slower', 'faster')} with {what}"
        for what, row in (("LoRA merged", lora), *((m, rows[m]) for m in (HOULSBY, PREFIX)))
    ]
    return (
        f"{lora['name']} ({count(lora['parameters'])} numbers) ends "
        f"{beside(lora['held_out'], losses)}. Beside full fine-tuning its step is {step}, with "
        f"{memory} memory; inference is {listed(inference)}."
    )


def plot(content: dict[str, Any], axes: Any) -> None:
    losses, bars = axes
    rows = content["rows"]
    for method in (LORA, HOULSBY, PREFIX, BITFIT, FULL):
        if mine := [row for row in rows if row["method"] == method]:
            reach = ranges(row["held_out"] for row in mine)
            counts = [row["parameters"] for row in mine]
            losses.errorbar(counts, fmt="o-", label=method, **reach)
    losses.axhline(content["before"], color="black", linestyle=":", label="before")
    losses.set_xscale("log")
    losses.set_xlabel("trained parameters")
    losses.set_ylabel("held-out loss, with the seeds' range")
    losses.legend()
    full = next(row for row in rows if row["method"] == FULL)
    keys = {"a step": "step_s", "inference": "infer_s", "memory": "memory_bytes"}
    shares = {label: [row[key] / full[key] for row in rows] for label, key in keys.items()}
    costs(bars, [row["name"] for row in rows], shares, FULL)
