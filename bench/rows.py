"""A row of ``pytest bench``: its variants held against float64, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import lora_kernels as lk
from lora_kernels.backends.tune import CapturedCall

from . import checks
from .baselines import Variant
from .measure import EagerStep, Rounds, Step, memory, quartiles
from .peers import tolerated


@dataclass
class Prepared:
    """The right variants of a row, ready to be timed, and why the others are not."""

    # What every round draws anew.
    drawn: list[Tensor]
    # A step for each copy of the weight.
    steps: dict[str, list[Step]] = field(default_factory=dict)
    # Bytes.
    held: dict[str, dict[str, int]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    plans: dict[str, dict[str, str]] = field(default_factory=dict)
    # Packed ones.
    copies: dict[str, int] = field(default_factory=dict)

    def add(
        self,
        variant: type[Variant],
        setting: Any,
        device: str,
        make: Callable[[], list[EagerStep]],
        check: Callable[[Variant, Step], None],
    ) -> None:
        """A variant; on a GPU captured in graphs."""
        key = variant.key
        reason = variant.missing(setting, device)
        if reason is not None:
            self.missing[key] = reason
            return
        with tolerated(variant, self.missing, self.steps), lk.record_plans() as answers:
            eager = make()
            captured = device == "cuda" and variant.captured
            self.steps[key] = [CapturedCall(step) for step in eager] if captured else [*eager]
            check(eager[0].variant, self.steps[key][0])
            self.held[key] = memory(eager[0])
        if key not in self.missing and variant.operators:
            self.plans[key] = checks.plans_of(answers, device, operators_of(variant, setting))
            self.copies[key] = eager[0].variant.copies()


def operators_of(variant: type[Variant], setting: Any) -> tuple[str, ...]:
    training = getattr(setting, "mode", "forward") == "training"
    return (*variant.operators, *("lora_linear_dx", "lora_linear_dab") * training)


def timed(
    found: Prepared,
    variants: Mapping[str, type[Variant]],
    leader: str,
    setting: Any,
    benchmark: Any,
    session: Any,
) -> None:
    """Time the variants of a row, and hand what was found to the session."""
    rounds = Rounds(session.clock, found.steps, leader, found.drawn)
    seconds = rounds.warm_up(session.clock.warmup, session.clock.warmup_seconds)
    count = session.rounds_for(setting, seconds)
    with lk.record_plans() as answers:
        benchmark.pedantic(rounds.lead, setup=rounds.before, rounds=count, iterations=1)
    if session.device != "cuda":
        # A replayed graph asks no planner: what was captured is what was timed.
        for key in sorted({leader, "fused"} & found.steps.keys()):
            operators = operators_of(variants[key], setting)
            own = (a for a in answers if a.op in operators and a.problem.r == setting.r)
            checks.plans_of(own, session.device, operators)
    measured = {key: quartiles(taken) | found.held[key] for key, taken in rounds.samples.items()}
    benchmark.extra_info.update(session.add_row(setting, measured, found))
