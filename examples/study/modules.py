"""Which layers should get an adapter?

Sets of layers of a GPT-2 and of a Llama, once at the same rank and once at ranks that give all sets
about the same count of trained parameters. The Llama is small and pre-trained for a moment, here;
of your own model (``--model``) the sets of its family are asked.
"""

from __future__ import annotations

import copy
from statistics import fmean
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lora_kernels as lk
from bench.tables import Table, count

from .lab import Lab, Unanswered
from .wording import BLUE, ORANGE, beside, change, spread, times

QUESTION = "Which layers should get an adapter?"
AXES = 2

RANK = 8
ALL = "all linear"
_MLP = ["gate_proj", "up_proj", "down_proj"]
# Names or endings of them, as target_modules takes them: GPT-2's c_proj is in both halves of a
# block. The first set is the usual one, the last has everything.
SETS = {
    "GPT-2": {
        "c_attn": ["c_attn"],
        "attention": ["c_attn", "attn.c_proj"],
        "c_attn + c_proj": ["c_attn", "c_proj"],
        "MLP": ["c_fc", "mlp.c_proj"],
        ALL: ["c_attn", "c_proj", "c_fc"],
    },
    "Llama": {
        "q + v": ["q_proj", "v_proj"],
        "MLP": _MLP,
        ALL: ["q_proj", "k_proj", "v_proj", "o_proj", *_MLP],
    },
}


def measure(lab: Lab) -> dict[str, Any]:
    rows = []
    for family, base in bases(lab).items():
        sets, before = SETS[family], lab.evaluate(base)
        # The factor in front of B A is 1 at every rank.
        first = {name: lk.lora_report(_adapted(base, sets[name], 1)) for name in sets}
        each = {name: report.trainable_parameters for name, report in first.items()}
        ranks = {name: [RANK, max(1, round(RANK * each[ALL] / each[name]))] for name in sets}
        plan = [(name, rank) for name in sets for rank in dict.fromkeys(ranks[name])]
        runs: dict[tuple[str, int], list[float]] = {key: [] for key in plan}
        turns = [(seed, *key) for seed in lab.seeds for key in plan]
        for seed, name, rank in lab.each(f"modules, {family}", turns):
            model = _adapted(base, sets[name], rank, seed)
            runs[name, rank].append(lab.finetune(model, seed=seed, steps=lab.steps // 2).held_out)
        rows += [
            {"base": family, "before": before, "layers": name, "ranks": ranks[name]}
            | {"parameters": [each[name] * rank for rank in ranks[name]]}
            | {"held_out": [runs[name, rank] for rank in ranks[name]]}
            for name in sets
        ]
    return {"rows": rows, "steps": lab.steps // 2}


def bases(lab: Lab) -> dict[str, Any]:
    if lab.settings.model is None:
        return {"GPT-2": lab.base, "Llama": small_llama(lab)}
    names = {name.rpartition(".")[2] for name, _ in lab.base.named_modules()}
    for family, sets in SETS.items():
        if names.issuperset(sets[ALL]):
            return {family: lab.base}
    raise Unanswered(f"{type(lab.base).__name__}'s layers have not {' or '.join(SETS)}'s names")


def small_llama(lab: Lab) -> Any:
    """As large as the demo's GPT-2, pre-trained on the same text for half of its time."""
    width = lab.budget.width
    torch.manual_seed(lab.settings.seed)
    config = LlamaConfig(
        vocab_size=len(lab.tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3 // 8 * 8,
        num_hidden_layers=lab.budget.layers,
        num_attention_heads=max(width // 64, 1),
        max_position_embeddings=lab.settings.context,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    )
    return lab.pretrain(LlamaForCausalLM(config), 0.5)


def _adapted(base: Any, layers: list[str], rank: int, seed: int = 0) -> Any:
    """With the factor 1 in front of B A, whatever the rank."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    return lk.apply_lora(model, r=rank, lora_alpha=rank, target_modules=layers)


def table(content: dict[str, Any]) -> Table:
    head = ["base, its held-out loss", "layers", f"parameters, rank {RANK}", "held-out loss"]
    head += ["rank", "parameters, equal", "loss"]
    body = [
        [f"{row['base']}, {row['before']:.4f}", row["layers"]]
        + [count(row["parameters"][0]), spread(row["held_out"][0]), str(row["ranks"][1])]
        + [count(row["parameters"][1]), spread(row["held_out"][1])]
        for row in content["rows"]
    ]
    return head, body


def finding(content: dict[str, Any]) -> str:
    said = []
    for family in dict.fromkeys(row["base"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["base"] == family]
        few, every = rows[0], rows[-1]
        by_rank, by_count = map(change, every["held_out"], few["held_out"])
        more = times(every["parameters"][0], few["parameters"][0], "more", "fewer")
        best, *others = sorted(rows, key=lambda row: fmean(row["held_out"][1]))
        theirs = {row["layers"]: row["held_out"][1] for row in others}
        said.append(
            f"{family}: from {few['layers']} to {every['layers']} the held-out loss {by_rank} at "
            f"rank {RANK} ({more} parameters) and {by_count} at an equal count, where the lowest "
            f"is that of {best['layers']}: {beside(best['held_out'][1], theirs)}."
        )
    return f"After {content['steps']} steps: {' '.join(said)}"


def plot(content: dict[str, Any], axes: Any) -> None:
    families = list(dict.fromkeys(row["base"] for row in content["rows"]))
    for ax, family in zip(axes, families, strict=False):
        rows = [row for row in content["rows"] if row["base"] == family]
        first = rows[0]["held_out"][0]
        looks = {f"rank {RANK}": ORANGE, "an equal count of parameters": BLUE}
        for kind, (label, colour) in enumerate(looks.items()):
            for place, row in enumerate(rows):
                apart = [a - b for a, b in zip(row["held_out"][kind], first, strict=True)]
                at = [place - 0.1 + 0.2 * kind] * len(apart)
                ax.plot(apart, at, "o-", color=colour, label=None if place else label)
        ax.set_yticks(range(len(rows)), [row["layers"] for row in rows])
        ax.invert_yaxis()
        ax.set_title(family, loc="left")
        ax.set_xlabel(f"held-out loss minus that of {rows[0]['layers']}, rank {RANK}, by seeds")
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1))
    for ax in axes[len(families) :]:
        ax.set_axis_off()
