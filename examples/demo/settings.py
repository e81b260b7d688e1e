"""What the demo is asked for. Nothing here imports torch: a wrong argument is told at once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

OURS, PEFT, FOUR_BITS = "lora_kernels", "PEFT", "four bits"
OUT = Path(__file__).parent / "out"


class UserError(Exception):
    """Something that the user must change; the message says what, and is all that is shown."""


@dataclass
class Settings:
    out: Path = OUT
    model: str | None = None
    data: str | None = None
    peft: bool = True
    dtype: str = "auto"
    seed: int = 0

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    learning_rate: float | None = None
    batch: int = 8
    context: int = 256
    steps: int = 120
    finetune_seconds: float = 100.0
    evaluation_blocks: int = 64

    # Of the model that is made; None: by the device.
    layers: int | None = None
    width: int | None = None
    pretrain_seconds: float = 60.0

    adapter_steps: int = 80
    adapter_seconds: float = 25.0
    served_tokens: int = 48
    stream_batches: int = 8

    @property
    def rate(self) -> float:
        # A model that has learned for a minute takes more than one that has learned for months.
        return self.learning_rate or (2e-4 if self.model else 1e-2)

    @property
    def usual_dropout(self) -> float:
        """At which the memory of a step is measured: without dropout nothing is saved for it."""
        return self.dropout or 0.1

    @property
    def is_default(self) -> bool:
        """Whether the model and all text are the demo's own, so that it knows what they do."""
        return self.model is None and self.data is None


_HELP = {
    "rank": "of the adapter",
    "alpha": "of the adapter",
    "dropout": "of the adapter's input; 0 makes the losses comparable",
    "learning_rate": "of the fine-tuning; by the model",
    "batch": "sequences per step",
    "context": "tokens per sequence",
    "steps": "of fine-tuning, at most",
    "finetune_seconds": "for the fine-tuning of all models together",
    "pretrain_seconds": "for the pre-training of the demo's own model",
    "seed": "of everything",
}


def parse(arguments: list[str] | None, description: str) -> Settings:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=description)
    add = parser.add_argument
    add("--model", metavar="NAME", help="a causal language model: a directory, or a hub's name")
    add("--data", metavar="PATH", help="a text file, or a directory of them, to fine-tune on")
    add("--out", type=Path, default=OUT, help="where to write (default: examples/demo/out)")
    add("--no-peft", dest="peft", action="store_false", help="leave the comparison out")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 for --model on a GPU")
    for name, text in _HELP.items():
        default = getattr(Settings, name)
        kind = float if default is None else type(default)
        shown = "" if default is None else f" ({default})"
        option = f"--{name.replace('_', '-')}"
        add(option, type=kind, default=default, metavar="N", help=text + shown)
    settings = Settings(**vars(parser.parse_args(arguments)))
    for name in _HELP.keys() - {"seed", "dropout"}:
        value = getattr(settings, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')}: {value} is not above 0")
    if not 0 <= settings.dropout < 1:
        parser.error(f"--dropout: {settings.dropout} is not in [0, 1)")
    if settings.served_tokens >= settings.context:
        parser.error(f"--context must be above the {settings.served_tokens} served tokens")
    return settings
