"""What does an adapter cost when the model answers, and what do ten of them?

An adapter is merged, or beside the base as PEFT computes it and as we do. Ten are ten merged models
(two are made, which take turns), in PEFT's model, or in an ``lk.AdapterStore``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from itertools import cycle
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lora_kernels as lk
from bench.tables import Table, number

from ..demo.training import peft_model, with_shared_weights
from .lab import Lab
from .wording import BLUE, GREEN, ORANGE, OURS, PEFT, listed, times

QUESTION = "What does an adapter cost when the model answers, and what do ten of them?"
AXES = 2

BASE, MERGED = "base", "merged"
COLOURS = {MERGED: GREEN, PEFT: ORANGE, OURS: BLUE}
BATCHES = (1, 8, 32)
NAMES, RANK = [str(number) for number in range(10)], 8
PROMPT, ANSWER = 16, 16
GREEDY = {"do_sample": False, "min_new_tokens": ANSWER, "max_new_tokens": ANSWER, "pad_token_id": 0}
TEN = {"stored_mb": "ten stored, MB", "loaded_ms": "one loaded, ms"}
TEN |= {"switched_ms": "one switched to, ms", "batch_ms": "ten in a batch, ms"}


@torch.no_grad()
def measure(lab: Lab) -> dict[str, Any]:
    prompts = lab.held_out.repeat(BATCHES[-1], 1)[: BATCHES[-1], :PROMPT].to(lab.device)
    mask = torch.ones_like(prompts)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for name in NAMES:
            # Drawn numbers: times and sizes are those of trained ones.
            model = with_shared_weights(lab.base)
            lk.save_adapter(lk.apply_lora(model, RANK, init_lora_weights=False), folder / name)
        pair = (lk.load_adapter(lab.fresh(), folder / name) for name in NAMES[:2])
        copies = [lk.unload(model, merge=True).eval() for model in pair]
        models = {BASE: lab.base, MERGED: copies[0]}
        models[PEFT] = peft_model(lab.base, folder / "0")
        models[OURS] = lk.load_adapter(with_shared_weights(lab.base), folder / "0")
        answers = []
        for batch in lab.each("inference", BATCHES, "batch"):
            given = GREEDY | {"input_ids": prompts[:batch], "attention_mask": mask[:batch]}
            calls = {k: partial(model.eval().generate, **given) for k, model in models.items()}
            answers.append(lab.in_turns(calls))
        found = ten(lab, folder, copies, prompts[: len(NAMES)])
    own = {kind: {"answer_ms": [1e3 * a[kind] for a in answers]} for kind in models}
    return {"rows": [{"kind": kind} | own[kind] | found.get(kind, {}) for kind in models]}


def ten(lab: Lab, folder: Path, copies: Any, prompts: Tensor) -> dict[str, dict[str, Any]]:
    """What ten adapters take: merged, in PEFT's model, and in our store."""
    copies[0].save_pretrained(folder / "merged")
    theirs = peft_model(lab.base, folder / "0", adapter_name="first")
    store = lk.AdapterStore(with_shared_weights(lab.base), len(NAMES), RANK)

    def run_merged(names: list[str]) -> Tensor:
        rows = zip(names, prompts.split(1), strict=False)
        return torch.cat([copies[int(name) % 2](input_ids=row).logits for name, row in rows])

    def run_theirs(names: list[str]) -> Tensor:
        if len(names) > 1:
            return theirs(input_ids=prompts, adapter_names=names).logits
        theirs.set_adapter(names[0])
        return theirs(input_ids=prompts[:1]).logits

    def run_ours(names: list[str]) -> Tensor:
        with store.batch(names):
            return store.model(input_ids=prompts[: len(names)]).logits

    # Each is loaded once, and the first does not count.
    loads: dict[str, Callable[[], Any]] = {
        MERGED: lambda: AutoModelForCausalLM.from_pretrained(folder / "merged"),
        PEFT: partial(next, (theirs.load_adapter(str(folder / n), n) for n in NAMES)),
        OURS: partial(next, (store.load(name, folder / name) for name in NAMES)),
    }
    loaded = lab.in_turns(loads, len(NAMES) - 1)
    runs = {MERGED: run_merged, PEFT: run_theirs, OURS: run_ours}
    ones = {kind: map(run, cycle([name] for name in NAMES)) for kind, run in runs.items()}
    # To switch is to read a row with another adapter than before.
    switched = lab.in_turns({kind: partial(next, each) for kind, each in ones.items()})
    batched = lab.in_turns({kind: partial(run, NAMES) for kind, run in runs.items()})
    found = {}
    for kind in runs:
        files = (folder / ("merged" if kind == MERGED else "0")).iterdir()
        stored = len(NAMES) * sum(file.stat().st_size for file in files) / 1e6
        ms = (1e3 * seconds[kind] for seconds in (loaded, switched, batched))
        found[kind] = dict(zip(TEN, (stored, *ms), strict=True))
    return found


def table(content: dict[str, Any]) -> Table:
    head = ["adapter", *(f"{ANSWER} tokens, batch {n}, ms" for n in BATCHES), *TEN.values()]
    body = [
        [row["kind"], *map(number, row["answer_ms"])]
        + [number(row[key]) if key in row else "-" for key in TEN]
        for row in content["rows"]
    ]
    return head, body


def finding(content: dict[str, Any]) -> str:
    by = {row["kind"]: row for row in content["rows"]}
    said = []
    for kind in COLOURS:
        ratios = map(truediv, by[kind]["answer_ms"], by[BASE]["answer_ms"])
        said.append(f"{listed([f'{ratio:.2f}' for ratio in ratios])} ({kind})")
    load, switch, batch = (f"{by[OURS][key] / by[PEFT][key]:.2f}" for key in [*TEN][1:])
    size = times(by[OURS]["stored_mb"], by[MERGED]["stored_mb"], "larger", "smaller")
    return (
        f"An answer to {listed([str(n) for n in BATCHES])} prompts takes {', '.join(said)} times "
        f"the base's time. Ten adapters are {size} on disk than ten merged models; {OURS} loads "
        f"one in {load} of PEFT's time, switches in {switch} of it, and answers ten in a batch in "
        f"{batch} of it, {by[OURS]['batch_ms'] / by[MERGED]['batch_ms']:.2f} of the time that the "
        "merged models take one by one."
    )


def plot(content: dict[str, Any], axes: Any) -> None:
    answers, tens = axes
    by = {row["kind"]: row for row in content["rows"]}
    for place, (kind, colour) in enumerate(COLOURS.items()):
        look = {"width": 0.24, "color": colour, "label": kind}
        at = [i + 0.26 * (place - 1) for i in range(len(TEN))]
        beside = [*map(truediv, by[kind]["answer_ms"], by[BASE]["answer_ms"])]
        answers.bar(at[: len(beside)], beside, **look)
        tens.bar(at, [by[kind][key] / by[PEFT][key] for key in TEN], **look)
    answers.set_xticks(range(len(BATCHES)), [f"batch {n}" for n in BATCHES])
    tens.set_xticks(range(len(TEN)), [head.split(",")[0] for head in TEN.values()])
    answers.set_ylabel("time of an answer, base = 1")
    tens.set(yscale="log", ylabel="ten adapters, PEFT = 1")
    tens.yaxis.set_major_formatter("{x:g}")
    tens.legend()
    for ax in axes:
        ax.axhline(1, color="black", linewidth=0.8, linestyle=":")
