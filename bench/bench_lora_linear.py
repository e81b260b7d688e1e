"""The fused layer against its rivals, one row per shape, dtype, rank, dropout and mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels.backends.tune import CapturedCall
from lora_kernels.testing.linear import Inputs

from . import checks
from .baselines import VARIANTS, Ours, Variant
from .cases import Setting
from .measure import Clock, EagerStep, Rounds, Step, memory, quartiles
from .peers import TRAINING_PEERS, tolerated


def test_lora_linear(setting: Setting, benchmark: Any, session: Any) -> None:
    session.skip_if_late()
    if "compiled" in session.variants:
        torch.compiler.reset()
    torch.manual_seed(0)
    device, clock = session.device, session.clock
    found = prepare(setting, device, clock, session.variants, session.broken_peers)
    rounds = Rounds(clock, found.steps, "fused", found.drawn)
    seconds = rounds.warm_up(session.warmup, session.warmup_seconds)
    count = session.rounds_for(setting, seconds)
    benchmark.group = f"{setting.dtype}, {setting.mode}"
    with lk.record_plans() as answers:
        benchmark.pedantic(rounds.lead, setup=rounds.before, rounds=count, iterations=1)
    if device != "cuda":
        # A replayed graph asks no planner: what was captured is what was timed.
        adapted = [answer for answer in answers if answer.problem.r == setting.r]
        checks.plans_of(adapted, device, setting)
    measured = {key: quartiles(taken) | found.held[key] for key, taken in rounds.samples.items()}
    row = session.add_row(setting, measured, found.missing, found.plans, found.copies)
    benchmark.extra_info.update(row)


class Prepared(NamedTuple):
    """The right variants of one row, ready to be timed, and why the others are not.

    ``steps``: a step for each copy of the weight; ``held``: bytes; ``drawn``: what every round
    draws anew; ``copies``: packed ones.
    """

    steps: dict[str, list[Step]]
    held: dict[str, dict[str, int]]
    missing: dict[str, str]
    plans: dict[str, dict[str, str]]
    copies: dict[str, int]
    drawn: list[Tensor]


def prepare(
    setting: Setting,
    device: str,
    clock: Clock,
    variants: Sequence[str],
    broken: Mapping[str, str] | None = None,
) -> Prepared:
    """The row's ``variants``, each held against float64; on a GPU captured in graphs."""
    inputs = checks.draw(setting, device)
    inputs.x.requires_grad_(setting.mode == "training")
    truth = checks.Truth(setting, inputs)
    weights = [inputs.weight]
    weights += [inputs.weight.clone() for _ in range(clock.sets(inputs.weight, inputs.dy) - 1)]

    steps: dict[str, list[Step]] = {}
    held: dict[str, dict[str, int]] = {}
    missing: dict[str, str] = {}
    plans: dict[str, dict[str, str]] = {}
    copies: dict[str, int] = {}
    for key in variants:
        variant = (VARIANTS | TRAINING_PEERS)[key]
        reason = (broken or {}).get(key) or variant.missing(setting, device)
        if reason is not None:
            missing[key] = reason
            continue
        with tolerated(variant, missing, steps, held), lk.record_plans() as answers:
            eager = [
                step_of(variant, replace(inputs, weight=weight), setting) for weight in weights
            ]
            steps[key] = [CapturedCall(step) for step in eager] if device == "cuda" else [*eager]
            truth.check(eager[0].variant, steps[key][0], _without_base(setting, inputs, variant))
            held[key] = memory(eager[0])
        if key not in missing and isinstance(eager[0].variant, Ours):
            plans[key] = checks.plans_of(answers, device, setting)
            copies[key] = eager[0].variant.copies()

    drawn = [inputs.x, inputs.dy] if setting.mode == "training" else [inputs.x]
    return Prepared(steps, held, missing, plans, copies, drawn)


def step_of(variant: type[Variant], inputs: Inputs, setting: Setting) -> EagerStep:
    return EagerStep(variant(setting, inputs), setting.mode, inputs.x, inputs.dy)


def _without_base(setting: Setting, inputs: Inputs, variant: type[Variant]) -> Step | None:
    """The training step over a weight of zero, which shows the variant's dropout mask."""
    if not setting.p or variant.computes != "lora":
        return None
    x = inputs.x.detach().requires_grad_()
    return EagerStep(variant(setting, checks.without_base(inputs)), "training", x, inputs.dy)
