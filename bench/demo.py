"""The main job on real input: fine-tune a LoRA adapter, and what follows from it; ``make demo``.

By default a small GPT-2 is pre-trained for a minute on the standard library's sources, without one
of its packages, and then fine-tuned on that package through ``apply_lora`` and transformers'
Trainer, in turns with the same run through PEFT. The adapter is merged, unmerged, saved, loaded
into a fresh model and used to generate. Then ten more adapters, for ten other packages, are trained
in mixed batches and served together through an ``AdapterStore``. Every number at the end is a
measurement of that run; the exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import demo_report
from .demo_processes import OURS, PEFT, Call, Settings, Turns, run_together
from .demo_text import UserError, finetuning_corpus, largest_packages, pretraining_text

# Beside this file, wherever the demo is started from.
OUT = Path(__file__).parent / "out" / "demo"

# How a sentence of the default package begins.
PROMPT = "The "

# A model that has learned for a minute takes more than one that has learned for months.
LEARNING_RATE, LEARNING_RATE_OF_USERS_MODEL = 1e-2, 2e-4


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status: 1 for a failed check, 2 for a wrong argument."""
    args = _parser().parse_args(arguments)
    try:
        content = run(args)
    except UserError as error:
        # Other libraries' messages go on over several lines; their first says what is wrong.
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print("\n".join(demo_report.write(content, args.out)))
    return 0 if all(check.passed for check in demo_report.checks(content)) else 1


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Everything but the report; returns what can be written as JSON.

    Raises:
        UserError: an argument that cannot be used; what can be told without loading the model is
            told before anything slow.
    """
    began = time.perf_counter()
    environment = child_environment(args.model)
    if args.generated_tokens >= args.context:
        raise UserError("--generated-tokens must be below --context: the prompt needs room")
    if args.served_tokens >= args.context:
        raise UserError("--served-tokens must be below --context: the prompt needs room")
    corpus = finetuning_corpus(args.data)
    _make_directory(args.out)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATE_OF_USERS_MODEL if args.model else LEARNING_RATE
    own: dict[str, Any] = {
        "train_text": corpus.train,
        "held_out_text": corpus.held_out,
        "pretraining_text": "" if args.model else pretraining_text(without=corpus.files),
        "prompt": args.prompt or (PROMPT if args.data is None else corpus.held_out.strip()[:40]),
        "packages": {
            name: (package.train, package.held_out)
            for name, package in largest_packages(args.packages).items()
        },
    }
    settings = Settings(
        **own, **{f.name: getattr(args, f.name) for f in fields(Settings) if f.name not in own}
    )
    print(f"text to fine-tune on: {corpus}")
    if not args.model:
        print(f"text to pre-train on: {len(settings.pretraining_text):,} characters of the library")
    (base,) = run_together([Call("prepare", (settings,))], environment)

    libraries = [OURS, PEFT] if args.peft and importlib.util.find_spec("peft") else [OURS]
    turns = Turns(len(libraries), args.finetune_seconds)
    calls = [
        Call("adapt", (library, party, settings, turns)) for party, library in enumerate(libraries)
    ]
    results = dict(zip(libraries, run_together(calls, environment), strict=True))
    serving = None
    if settings.packages:
        (serving,) = run_together([Call("serve", (settings,), "demo_serving")], environment)
    packages = ["torch", "transformers", *(["peft"] if PEFT in results else [])]
    return {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "versions": {package: version(package) for package in packages},
        "settings": {key: value for key, value in vars(args).items() if key != "out"},
        "corpus": str(corpus),
        "prompt": settings.prompt,
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo", description=(__doc__ or "").split("\n\n")[1]
    )
    number, count = _above_zero(float), _above_zero(int)
    what = parser.add_argument_group("what to run on")
    what.add_argument(
        "--model", metavar="NAME", help="a causal language model, a directory or a name on the hub"
    )
    what.add_argument(
        "--data", metavar="PATH", help="a text file, or a directory of them, to fine-tune on"
    )
    what.add_argument("--prompt", help="what the generated text continues")
    what.add_argument(
        "--out", type=Path, default=OUT, help="where to write (default: bench/out/demo)"
    )
    what.add_argument(
        "--no-peft", dest="peft", action="store_false", help="leave the comparison out"
    )
    rest = parser.add_argument_group("how")
    for name, kind, default, text in (
        ("rank", count, 8, "of the adapter"),
        ("alpha", number, 16.0, "of the adapter"),
        ("dropout", _probability, 0.0, "of the adapter's input; 0 makes the losses comparable"),
        ("steps", count, 120, "of fine-tuning, at most"),
        ("finetune-seconds", number, 75.0, "for the fine-tuning of all libraries together"),
        ("learning-rate", number, None, "of the fine-tuning; by the model"),
        ("batch", count, 8, "sequences per step"),
        ("context", count, 256, "tokens per sequence"),
        ("pretrain-seconds", number, 60.0, "for the pre-training"),
        ("pretrain-batch", count, None, "sequences per step of it; by the device"),
        ("pretrain-learning-rate", number, None, "of it; by the device"),
        ("layers", count, None, "of the model that is pre-trained; by the device"),
        ("width", count, None, "of the model that is pre-trained; by the device"),
        ("evaluation-blocks", count, 64, "sequences of held-out text, at most"),
        ("generated-tokens", count, 160, "after the prompt"),
        ("packages", count, 10, "of the standard library that get an adapter each"),
        ("package-steps", count, 80, "of training these, at most"),
        ("package-seconds", number, 25.0, "for training these"),
        ("served-tokens", count, 48, "generated for each request"),
        ("stream-batches", count, 8, "through a store of six slots"),
        ("seed", int, 0, "of everything"),
    ):
        text = text if default is None else f"{text} (%(default)s)"
        rest.add_argument(f"--{name}", type=kind, default=default, metavar="N", help=text)
    rest.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the base; auto is float32, and bfloat16 for --model on a GPU",
    )
    return parser


def _above_zero(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__
    return parse


def _probability(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


if __name__ == "__main__":
    sys.exit(main())
