"""Is a merged adapter the same adapter, and does unmerging give the weights back?

An adapter is trained and saved; both libraries load it into the base in three precisions. A layer
is called merged with the very input that it had unmerged.
"""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import peft
import torch
from torch import Tensor

import lora_kernels as lk
from bench.tables import Table

from ..demo.training import difference, logits
from .lab import Lab
from .wording import COLOURS, OURS, PEFT, listed

QUESTION = "Is a merged adapter the same adapter, and does unmerging give the weights back?"
AXES = 2

DTYPES = ("float32", "bfloat16", "float16")
# After how many times of merging and unmerging the weights are looked at.
CYCLES = (1, 2, 5, 10, 20, 50, 100)


def measure(lab: Lab) -> dict[str, Any]:
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    keys = list(product(DTYPES, (OURS, PEFT)))
    seeds = lab.seeds[:1] if lab.quick else lab.seeds
    for seed, (dtype, library) in lab.each("merging", product(seeds, keys)):
        folder = lab.out / "merging" / f"seed-{seed}"
        if (dtype, library) == keys[0]:
            model = lk.apply_lora(lab.fresh(seed), r=8, lora_alpha=16)
            lab.finetune(model, seed=seed)
            lk.save_adapter(model, folder)
        model = loaded(library, lab.fresh(seed).to(getattr(torch, dtype)), str(folder))
        cases.setdefault((dtype, library), []).append(examine(model, lab.held_out[:4]))
    # The largest of the seeds': bounds are asked for.
    rows = [
        {"dtype": dtype, "library": library}
        | {key: max(case[key] for case in found) for key in ("layer", "logits", "changed")}
        | {"drift": [max(each) for each in zip(*(case["drift"] for case in found), strict=True)]}
        for (dtype, library), found in cases.items()
    ]
    return {"rows": rows, "cycles": CYCLES}


def loaded(library: str, base: Any, folder: str) -> Any:
    if library == OURS:
        return lk.load_adapter(base, folder).eval()
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return peft.PeftModel.from_pretrained(base, folder).eval()


@torch.no_grad()
def examine(model: Any, probe: Tensor) -> dict[str, Any]:
    """What merging changes, and what many merges leave behind; of the largest number each."""
    kinds = (lk.FusedLoRALinear, peft.tuners.lora.LoraLayer)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, kinds)]
    calls: list[tuple[Any, Tensor, Tensor]] = []

    def keep(layer: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        calls.append((layer, inputs[0], output))

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    expected = logits(model, probe)
    for hook in hooks:
        hook.remove()
    linears = [getattr(layer, "base_layer", layer) for layer in layers]
    before = [linear.weight.clone() for linear in linears]
    peft_s = model if isinstance(model, peft.PeftModel) else None
    found: dict[str, Any] = {"drift": []}
    for cycle in range(1, CYCLES[-1] + 1):
        peft_s.merge_adapter() if peft_s else lk.merge_adapter(model)
        if cycle == 1:
            found["layer"] = max(difference(layer(x), y) for layer, x, y in calls)
            found["logits"] = difference(logits(model, probe), expected)
        peft_s.unmerge_adapter() if peft_s else lk.unmerge_adapter(model)
        if cycle in CYCLES:
            pairs = [(linear.weight, w) for linear, w in zip(linears, before, strict=True)]
            found["drift"].append(max(difference(now, w) for now, w in pairs))
    changed = sum((now != w).sum().item() for now, w in pairs)
    return found | {"changed": changed / sum(w.numel() for w in before)}


def table(content: dict[str, Any]) -> Table:
    many = content["cycles"][-1]
    head = ["dtype", "library", "a layer's output, merged", "the logits, merged"]
    head += [f"the weights after {many} cycles", "weights that have changed"]
    body = [
        [row["dtype"], row["library"], f"{row['layer']:.1e}", f"{row['logits']:.1e}"]
        + [f"{row['drift'][-1]:.1e}" if row["drift"][-1] else "0 (exact)", f"{row['changed']:.1%}"]
        for row in content["rows"]
    ]
    return head, body


def finding(content: dict[str, Any]) -> str:
    many = content["cycles"][-1]
    ours, theirs = ([r for r in content["rows"] if r["library"] == lib] for lib in (OURS, PEFT))
    single, *half = ours
    roundings = single["layer"] / torch.finfo(torch.float32).eps
    rounded = listed([f"{row['layer']:.0e} in {row['dtype']}" for row in half])
    return (
        f"In {single['dtype']} a layer's output changes by {single['layer']:.1e} of its largest "
        f"value when {OURS} merges it ({roundings:.0f} times the type's precision) and by "
        f"{theirs[0]['layer']:.1e} when PEFT does; the rounding of the merged weight makes ours "
        f"{rounded}. After {many} times of merging and unmerging the weights of {OURS} "
        f"{_left(ours)}, and those of PEFT {_left(theirs)}."
    )


def _left(rows: list[dict[str, Any]]) -> str:
    moved = [row for row in rows if row["changed"]]
    if not moved:
        return "are the base's bit for bit"
    drifts = [f"{row['drift'][-1]:.0e} in {row['dtype']}" for row in moved]
    return f"have drifted by {listed(drifts)} of the largest"


def plot(content: dict[str, Any], axes: Any) -> None:
    merged, drift = axes
    for place, (library, colour) in enumerate(COLOURS.items()):
        rows = [row for row in content["rows"] if row["library"] == library]
        at = [index + 0.36 * place - 0.18 for index in range(len(rows))]
        merged.bar(at, [row["layer"] for row in rows], 0.34, color=colour, label=library)
        for row, style in zip(rows, ("o-", "s--", "^:"), strict=True):
            label = f"{library}, {row['dtype']}"
            drift.plot(content["cycles"], row["drift"], style, color=colour, label=label)
    merged.set_yscale("log")
    merged.set_xticks(range(len(DTYPES)), DTYPES)
    merged.set_ylabel("a layer's output, merged from unmerged")
    # 0 is a value here, and the one that is hoped for.
    drift.set_yscale("symlog", linthresh=1e-9)
    drift.set_xscale("log")
    drift.set_xticks(content["cycles"], [str(cycle) for cycle in content["cycles"]])
    drift.minorticks_off()
    drift.set_xlabel("times merged and unmerged")
    drift.set_ylabel("largest change of a weight")
    merged.legend()
    drift.legend(loc=(0.02, 0.42), ncols=2)
