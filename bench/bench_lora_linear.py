"""The fused layer against its rivals, one row per shape, dtype, rank, dropout and mode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lora_kernels.testing.linear import Inputs

from . import checks
from .baselines import VARIANTS, Variant
from .cases import Setting
from .measure import Clock, EagerStep, Step
from .peers import TRAINING_PEERS
from .rows import Prepared, timed


def test_lora_linear(setting: Setting, benchmark: Any, session: Any) -> None:
    if "compiled" in session.variants:
        torch.compiler.reset()
    torch.manual_seed(0)
    benchmark.group = f"{setting.dtype}, {setting.mode}"
    found = prepare(setting, session.device, session.clock, session.variants)
    timed(found, VARIANTS, "fused", setting, benchmark, session)


def prepare(setting: Setting, device: str, clock: Clock, variants: Sequence[str]) -> Prepared:
    """The row's ``variants``."""
    inputs = checks.draw(setting, device)
    training = setting.mode == "training"
    inputs.x.requires_grad_(training)
    truth = checks.Truth(setting, inputs)
    copies = clock.sets(inputs.weight, inputs.dy) - 1
    weights = [inputs.weight, *(inputs.weight.clone() for _ in range(copies))]
    found = Prepared([inputs.x, inputs.dy] if training else [inputs.x])
    for key in variants:
        variant = (VARIANTS | TRAINING_PEERS)[key]

        def make(variant: type[Variant] = variant) -> list[EagerStep]:
            return [step_of(variant, replace(inputs, weight=w), setting) for w in weights]

        def check(made: Variant, step: Step) -> None:
            truth.check(made, step, without_base(setting, inputs, type(made)))

        found.add(variant, setting, device, make, check)
    return found


def step_of(variant: type[Variant], inputs: Inputs, setting: Setting) -> EagerStep:
    return EagerStep(variant(setting, inputs), setting.mode, inputs.x, inputs.dy)


def without_base(setting: Setting, inputs: Inputs, variant: type[Variant]) -> Step | None:
    """The training step over a weight of zero, which shows the variant's dropout mask."""
    if not setting.p or variant.computes != "lora":
        return None
    x = inputs.x.detach().requires_grad_()
    return EagerStep(variant(setting, checks.without_base(inputs)), "training", x, inputs.dy)
