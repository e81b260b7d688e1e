from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import __doc__ as description
from .settings import FOUR_BITS, OURS, PEFT, Settings, UserError, parse
from .text import finetuning_corpus, largest_packages, parts, pretraining_text


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status: 1 for a failed check, 2 for a wrong argument."""
    settings = parse(arguments, (description or "").split("\n\n")[1])
    try:
        prepare_environment(settings)
        content = run(settings)
    except UserError as error:
        # Other libraries' messages go on over several lines; their first says what is wrong.
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    from . import report

    print("\n".join(report.write(content, settings.out)))
    return 0 if all(check.passed for check in report.checks(content)) else 1


def prepare_environment(settings: Settings) -> None:
    """What must be set before torch and transformers are imported, and a folder to write to.

    Raises:
        UserError: the model or the folder cannot be used.
    """
    # Threads that spin while they wait for each other stand still on a machine that is busy with
    # something else: 60 ms a step instead of 1100 (two cores, load 4, November 2026).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not may_use_the_network(settings.model):
        os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        # Whatever repository it lies in: nothing here is to be committed.
        (settings.out / ".gitignore").write_text("*\n")
    except OSError as error:
        raise UserError(f"cannot write to {settings.out}: {error.strerror}") from error
    # Every library starts from the adapter in it: one of an earlier run is of another shape.
    shutil.rmtree(settings.out / "initial-adapter", ignore_errors=True)


def may_use_the_network(model: str | None) -> bool:
    """For a name on the hub alone; a path where there is no model is an error."""
    if model is None:
        return False
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} holds no model: there is no config.json in it")
    elif path.exists():
        raise UserError(f"{path} is a file: a model is a directory, or a name on the hub")
    elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
        return True
    else:
        raise UserError(f"there is no model directory {path}")
    return False


def run(settings: Settings) -> dict[str, Any]:
    """Everything but the report; returns what can be written as JSON."""
    began = time.perf_counter()
    corpus = finetuning_corpus(settings.data)
    print(f"text to fine-tune on: {corpus}")

    import transformers

    import lora_kernels as lk
    from bench import tables

    from . import serving, training

    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(settings.seed)
    tokenizer = training.load_tokenizer(settings)
    rows, held_out = training.finetuning_rows(settings, tokenizer, corpus)
    if settings.model is None:
        text = pretraining_text(without=corpus.files)
        print(f"text to pre-train on: {len(text):,} characters of the library")
        base = training.new_model(settings, tokenizer).to(training.DEVICE)
        text_rows = training.rows_of(tokenizer, text, settings.context)
        pretraining = training.pretrain(settings, base, text_rows)
    else:
        base, pretraining = training.load_model(settings).to(training.DEVICE), None
    base.eval().requires_grad_(False)
    libraries = [OURS] + [PEFT] * (settings.peft and training.has_peft())
    try:
        bases = dict.fromkeys(libraries, base) | {FOUR_BITS: training.quantised(base)}
        models = {
            name: training.adapted(name, settings, each, settings.dropout)
            for name, each in bases.items()
        }
    except ValueError as error:
        raise UserError(str(error)) from error
    adapters = lk.lora_report(models[OURS])
    content = tables.origin(
        training.DEVICE, ["torch", "transformers", *(["peft"] if PEFT in models else [])]
    )
    content |= {
        "settings": {k: v for k, v in asdict(settings).items() if k != "out"},
        "learning_rate": settings.rate,
        "saved_at_dropout": settings.usual_dropout,
        "is_default": settings.is_default,
        "corpus": str(corpus),
        "base": {
            "name": settings.model or f"{type(base).__name__}, made here",
            "dtype": str(base.dtype).removeprefix("torch."),
            "parameters": adapters.all_parameters - adapters.trainable_parameters,
            "adapted_layers": len(adapters.adapted),
            "trainable_parameters": adapters.trainable_parameters,
            "pretraining": pretraining,
            "before": training.evaluate(settings, base, held_out, "base model"),
        },
    }
    quantised, probe = bases[FOUR_BITS], held_out[:4]
    logits, exact = (training.logits(model, probe) for model in (quantised, base))
    four_bits = {
        "before": training.evaluate(settings, quantised, held_out, "base in four bits"),
        "difference": training.difference(logits, exact),
    }
    runs = content["runs"] = training.finetune(settings, models, rows)
    for name, result in runs.items():
        result |= training.memory(name, settings, bases[name], rows[: settings.batch])
        result["after"] = training.evaluate(settings, models[name], held_out, f"adapted, {name}")
    for name in (OURS, FOUR_BITS):
        runs[name]["weight_bytes"], _ = training.adapted_weights(models[name])
    content["four_bits"] = runs.pop(FOUR_BITS) | four_bits
    runs[OURS] |= training.examine(settings, base, models[OURS], probe)
    texts = largest_packages() if settings.data is None else parts(corpus, settings.context)
    content["serving"] = serving.serve(settings, base, tokenizer, texts)
    content["seconds"] = time.perf_counter() - began
    return json.loads(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
