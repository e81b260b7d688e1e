"""How few numbers adapt a vision transformer to classes that it has never seen?

A small ViT learns the digits 0 to 4 of scikit-learn's 8 x 8 images. It then gets a new head for the
digits 5 to 9, and ten examples of each: the head alone is trained, or LoRA of several ranks with
it, or everything. Every method takes the best of several learning rates.
"""

from __future__ import annotations

import copy
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import lora_kernels as lk
from bench.tables import Table, count, number

from .lab import Lab, Run, Unanswered
from .wording import BLUE, GREY, beside, ranges, spread

QUESTION = "How few numbers adapt a vision transformer to classes that it has never seen?"

CLASSES = 5
# Of each new class, to train on.
EXAMPLES = 10
BATCH = 25
HEAD, FULL = "the head alone", "everything"
LORA = {f"LoRA of rank {rank}": rank for rank in (1, 4, 16)}
METHODS = (HEAD, *LORA, FULL)
RATES = (1e-3, 3e-3, 1e-2)


def digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of the old and of the new classes, [images, 65]: grey values in [-1, 1], and the class."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise Unanswered("the images are scikit-learn's: pip install scikit-learn") from error
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    rows = torch.cat([images / 8 - 1, labels[:, None] % CLASSES], dim=1).float().to(device)
    return rows[labels < CLASSES], rows[labels >= CLASSES]


def loss(model: Any, rows: Tensor) -> Tensor:
    """The loss of each row; in evaluation mode whether the model is wrong, 1 or 0."""
    y = model(pixel_values=rows[:, :-1].view(-1, 1, 8, 8)).logits
    labels = rows[:, -1].long()
    if model.training:
        return nn.functional.cross_entropy(y, labels, reduction="none")
    return (y.argmax(1) != labels).float()


def pretrained(lab: Lab, rows: Tensor) -> Any:
    """A ViT that knows the old classes."""
    torch.manual_seed(0)
    width = lab.budget.width // 2
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": CLASSES}
    sizes |= {"hidden_size": width, "intermediate_size": 4 * width}
    sizes |= {"num_hidden_layers": lab.budget.layers, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**sizes)).to(lab.device)
    sets: Any = {"rows": rows, "held_out": rows[:1], "batch": 2 * BATCH}
    lab.finetune(model, rate=1e-3, steps=10 * lab.steps, loss=loss, **sets)
    return model


def adapted(base: Any, method: str, seed: int) -> Any:
    """A copy of the base with a new head; what is to be trained has ``requires_grad``."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    model.classifier.reset_parameters()
    if method in LORA:
        rank = LORA[method]
        return lk.apply_lora(model, r=rank, lora_alpha=rank, modules_to_save=["classifier"])
    model.requires_grad_(method == FULL)
    model.classifier.requires_grad_(True)
    return model


def chosen(rows: Tensor, seed: int, held_out: int) -> tuple[Tensor, Tensor]:
    """The seed's examples of each class, and so many other rows."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    rows = rows[order.to(rows.device)]
    of_class = [rows[rows[:, -1] == label] for label in range(CLASSES)]
    examples = torch.cat([images[:EXAMPLES] for images in of_class])
    others = torch.cat([images[EXAMPLES:][: held_out // CLASSES] for images in of_class])
    return examples, others


def measure(lab: Lab) -> dict[str, Any]:
    old, new = digits(lab.device)
    base = pretrained(lab, old)

    def run(method: str, rate: float, seed: int) -> Run:
        examples, others = chosen(new, seed, 8 * lab.budget.evaluation_blocks)
        sets: Any = {"rows": examples, "held_out": others, "batch": BATCH, "loss": loss}
        model = adapted(base, method, seed)
        return lab.finetune(model, seed=seed, rate=rate, steps=2 * lab.steps, **sets)

    rows = [
        {
            "method": method,
            "parameters": runs[0].parameters,
            "rate": rate,
            "accuracy": [1 - run.held_out for run in runs],
            "step_s": median(run.step_s for run in runs),
        }
        for method, (rate, runs, _) in lab.tuned("vision", METHODS, RATES, run).items()
    ]
    return {"rows": rows}


def table(content: dict[str, Any]) -> Table:
    head = ["what is trained", "trained parameters", "best rate", "accuracy, %", "ms / step"]
    body = [
        [row["method"], count(row["parameters"]), f"{row['rate']:g}"]
        + [spread([100 * a for a in row["accuracy"]], 1), number(row["step_s"] * 1e3)]
        for row in content["rows"]
    ]
    return head, body


def finding(content: dict[str, Any]) -> str:
    head, *lora, full = content["rows"]
    best = max(lora, key=lambda row: fmean(row["accuracy"]))
    points = {row["method"]: [100 * a for a in row["accuracy"]] for row in (best, head, full)}
    share = best["parameters"] / full["parameters"]
    return (
        f"{best['method']} and a new head ({count(best['parameters'])} numbers, {share:.1%} of "
        f"everything) recognise {fmean(best['accuracy']):.1%} of the unseen images of the new "
        f"classes: in points {beside(points.pop(best['method']), points, 1)}."
    )


def plot(content: dict[str, Any], axes: Any) -> None:
    rows = content["rows"]
    counts = [row["parameters"] for row in rows]
    reach = ranges([100 * a for a in row["accuracy"]] for row in rows)
    axes.errorbar(counts, fmt="o-", color=BLUE, ecolor=GREY, **reach)
    for row, x, y in zip(rows, counts, reach["y"], strict=True):
        axes.annotate(row["method"], (x, y), (4, -12), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("unseen images recognised, %")
