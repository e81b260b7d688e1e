from __future__ import annotations

import importlib.util
import os
import re
import sys
import time
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.turns import Call, Turns, UserError, run_together

from . import __doc__ as description
from . import report
from .settings import OURS, PEFT, Settings, parse
from .text import finetuning_corpus, largest_packages, parts, pretraining_text


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status: 1 for a failed check, 2 for a wrong argument."""
    settings = parse(arguments, (description or "").split("\n\n")[1])
    try:
        content = run(settings)
    except UserError as error:
        # Other libraries' messages go on over several lines; their first says what is wrong.
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("\n".join(report.write(content, settings.out)))
    return 0 if all(check.passed for check in report.checks(content)) else 1


def run(settings: Settings) -> dict[str, Any]:
    """Everything but the report; returns what can be written as JSON.

    Raises:
        UserError: an argument that cannot be used; what can be told without loading the model is
            told before anything slow.
    """
    began = time.perf_counter()
    environment = child_environment(settings.model)
    if settings.served_tokens >= settings.context:
        raise UserError(f"--context must be above the {settings.served_tokens} served tokens")
    corpus = finetuning_corpus(settings.data)
    _make_directory(settings.out)
    settings.train_text, settings.held_out_text = corpus.train, corpus.held_out
    settings.texts = (
        parts(corpus, settings.context) if settings.data is not None else largest_packages()
    )
    print(f"text to fine-tune on: {corpus}")
    if not settings.model:
        settings.pretraining_text = pretraining_text(without=corpus.files)
        print(f"text to pre-train on: {len(settings.pretraining_text):,} characters of the library")
    (base,) = run_together([Call("examples.demo.training:prepare", (settings,))], environment)

    libraries = [OURS, PEFT] if settings.peft and importlib.util.find_spec("peft") else [OURS]
    turns = Turns(len(libraries), settings.finetune_seconds)
    calls = [
        Call("examples.demo.training:adapt", (library, party, settings, turns))
        for party, library in enumerate(libraries)
    ]
    results = dict(zip(libraries, run_together(calls, environment), strict=True))
    (serving,) = run_together([Call("examples.demo.serving:serve", (settings,))], environment)
    packages = ["torch", "transformers", *(["peft"] if PEFT in results else [])]
    kept = {
        k: v
        for k, v in asdict(settings).items()
        if k != "out" and not k.endswith(("_text", "texts"))
    }
    return {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "versions": {package: version(package) for package in packages},
        "settings": kept | {"learning_rate": settings.rate},
        "saved_at_dropout": settings.usual_dropout,
        "is_default": settings.is_default,
        "corpus": str(corpus),
        "base": base,
        "runs": results,
        "serving": serving,
        "seconds": time.perf_counter() - began,
    }


def child_environment(model: str | None) -> dict[str, str]:
    """What the processes get: one GPU at most, and no network unless ``model`` is a hub's name.

    Raises:
        UserError: ``model`` is a directory without a model, or a path where there is nothing.
    """
    # The first GPU: the Trainer would spread a model over all that it sees.
    environment = {
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that spin while they wait for each other stand still on a machine that is busy
        # with something else: 60 ms a step instead of 1100 (two cores, load 4, November 2026).
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
    if model is not None:
        path = Path(model).expanduser()
        if path.is_dir():
            if not (path / "config.json").is_file():
                raise UserError(f"{path} holds no model: there is no config.json in it")
        elif path.exists():
            raise UserError(f"{path} is a file: a model is a directory, or a name on the hub")
        elif re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", model):
            return environment
        else:
            raise UserError(f"there is no model directory {path}")
    return environment | {"HF_HUB_OFFLINE": "1"}


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Whatever repository it lies in: nothing here is to be committed.
        (path / ".gitignore").write_text("*\n")
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
