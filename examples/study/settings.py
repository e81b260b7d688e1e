"""What the study is asked for. Nothing here imports torch: a wrong argument is told at once."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from ..demo.settings import Settings, UserError
from . import QUESTIONS
from . import __doc__ as description

OUT = Path(__file__).parent / "out"


@dataclass(frozen=True)
class Budget:
    """How much is measured, and on how large a model.

    A question that trains takes ``steps`` steps a run and every seed of ``seeds``; one that takes
    times takes ``rounds`` of them. Altogether it may take about ``seconds`` on two cores.
    """

    seconds: float = 90.0
    steps: int = 40
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 15
    quick: bool = False

    # Of the demo's own model, and of a step.
    layers: int = 4
    width: int = 128
    pretrain_seconds: float = 45.0
    batch: int = 4
    context: int = 128
    evaluation_blocks: int = 48

    def settings(self, **given: object) -> Settings:
        """The demo's settings of this size."""
        names = ("layers", "width", "pretrain_seconds", "batch", "context", "evaluation_blocks")
        sizes = {name: getattr(self, name) for name in names}
        return replace(Settings(**sizes), **given)


FULL = Budget()
QUICK = Budget(
    seconds=12.0,
    steps=4,
    rounds=3,
    quick=True,
    layers=2,
    width=64,
    pretrain_seconds=5.0,
    context=64,
    evaluation_blocks=16,
)


@dataclass(frozen=True)
class Study:
    """Which questions are asked, and of what."""

    questions: tuple[str, ...]
    settings: Settings
    budget: Budget
    again: bool


def parse(arguments: list[str] | None) -> Study:
    """The command line.

    Raises:
        UserError: there is no such question.
    """
    parser = argparse.ArgumentParser(
        prog="python -m examples.study",
        description=description,
        epilog=f"questions: {_listed()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("questions", nargs="*", metavar="QUESTION", help="a name or a number; default: all")
    add("--model", metavar="DIR", help="your causal language model, a directory or a hub's name")
    add("--data", metavar="PATH", help="a text file, or a directory of them, to fine-tune on")
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: examples/study/out; with --quick its folder quick",
    )
    add("--quick", action="store_true", help="minutes instead of twenty, and numbers to match")
    add("--again", action="store_true", help="measure also what has been measured")
    given = parser.parse_args(arguments)
    budget = QUICK if given.quick else FULL
    # A quick look must not take the place of twenty minutes' results.
    out = given.out or (OUT / "quick" if given.quick else OUT)
    settings = budget.settings(out=out, model=given.model, data=given.data)
    chosen = {_name(question) for question in given.questions} or set(QUESTIONS)
    ordered = tuple(name for name in QUESTIONS if name in chosen)
    return Study(ordered, settings, budget, given.again)


def _name(question: str) -> str:
    if question in QUESTIONS:
        return question
    if question.isdecimal() and 0 < int(question) <= len(QUESTIONS):
        return QUESTIONS[int(question) - 1]
    raise UserError(f"there is no question {question!r}; there are {_listed()}")


def _listed() -> str:
    return ", ".join(f"{number} {name}" for number, name in enumerate(QUESTIONS, 1))
