"""Batches that mix adapters: ``segmented_lora`` against its rivals, one row per batch and layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels.backends.tune import CapturedCall
from lora_kernels.planning.config import MIXED_LINEAR_OPS
from lora_kernels.testing import linear as testing

from . import checks
from .measure import Outputs, Rounds, Step, quartiles
from .peers import tolerated
from .peers_serving import mixed_peers
from .segmented_baselines import MIXED_VARIANTS, MixedVariant, Part
from .segmented_cases import MixedInputs, MixedSetting, draw

# Rows that are held against float64 on a CPU.
_CPU_ROWS = 64


def test_segmented_lora(mixed: MixedSetting, benchmark: Any, session: Any) -> None:
    session.skip_if_late()
    torch.manual_seed(0)
    device, clock = session.device, session.clock
    inputs = draw(mixed, device)
    truth = Truth(mixed, inputs)
    copies = clock.sets(inputs.weight, inputs.x.new_empty(mixed.m, mixed.n))
    if copies > 1:
        # Several of the variants read no weight, so as many copies again are passed over.
        copies *= 2
    sets = [inputs, *(inputs.copy() for _ in range(copies - 1))]

    steps: dict[str, list[Step]] = {}
    missing: dict[str, str] = {}
    plans: dict[str, dict[str, str]] = {}
    for key, variant in (MIXED_VARIANTS | mixed_peers(device)).items():
        reason = session.broken_peers.get(key) or variant.missing(mixed, device)
        if reason is not None:
            missing[key] = reason
            continue
        with tolerated(variant, missing, steps), lk.record_plans() as answers:
            eager = [MixedStep(variant(mixed, one)) for one in sets]
            captured = device == "cuda" and variant.captured
            steps[key] = [CapturedCall(step) for step in eager] if captured else [*eager]
            truth.check(eager[0].variant, steps[key][0])
        if variant.operators:
            plans[key] = plans_of(answers, device, variant.operators)

    rounds = Rounds(clock, steps, "segmented", [inputs.x])
    seconds = rounds.warm_up(session.warmup, session.mixed_warmup_seconds)
    benchmark.group = f"mixed batches, {mixed.dtype}"
    with lk.record_plans() as answers:
        benchmark.pedantic(
            rounds.lead,
            setup=rounds.before,
            rounds=session.mixed_count(seconds),
            iterations=1,
        )
    if device != "cuda":
        # A replayed graph asks no planner: what was captured is what was timed.
        for key in ("segmented", "fused"):
            if key in steps:
                operators = MIXED_VARIANTS[key].operators
                plans_of((a for a in answers if a.op in operators), device, operators)
    measured = {key: quartiles(found) for key, found in rounds.samples.items()}
    benchmark.extra_info.update(session.add_row(mixed, measured, missing, plans))


class MixedStep:
    """One step of a variant, without gradients."""

    def __init__(self, variant: MixedVariant) -> None:
        self.variant, self.x = variant, variant.inputs.x

    def __call__(self) -> Outputs:
        with torch.no_grad():
            y = self.variant.forward(self.x)
        return tuple(y) if isinstance(y, list) else (y,)


class Truth:
    """The exact results of a row's inputs, and those of the same formula in its own dtype: the
    base, and adapter after adapter its rows."""

    def __init__(self, setting: MixedSetting, inputs: MixedInputs) -> None:
        self.setting = setting
        limit = setting.m if inputs.x.is_cuda else _CPU_ROWS
        self.rows = checks.rows_to_check(setting.m, limit).to(inputs.x.device)
        own = inputs.x.dtype
        self.known = [self._naive(inputs, dtype) for dtype in (torch.float64, own)]

    def check(self, variant: MixedVariant, step: Step) -> None:
        """Fail unless what ``step`` returns keeps the budget."""
        if isinstance(variant, Part):
            variant.y.zero_()
        if not (outputs := step()):
            return
        y = torch.cat(outputs, dim=1)
        title = f"{variant.key} {self.setting}"
        assert y.shape == (self.setting.m, self.setting.n), f"{title}: {tuple(y.shape)}"
        assert y.isfinite().all(), f"{title}: holds NaN or infinity"
        exact, eager = (results[variant.computes] for results in self.known)
        testing.assert_within_budget(title, y[self.rows], eager, exact)

    @torch.no_grad()
    def _naive(self, inputs: MixedInputs, dtype: torch.dtype) -> dict[str, Tensor]:
        x = inputs.x[self.rows].to(dtype)
        slots = torch.tensor(inputs.slots, device=x.device)[self.rows]
        # Slice by slice: a large weight would not fit in float64 beside its copies.
        weights = inputs.weight.split(self.setting.widths)
        plain = torch.cat([x @ weight.to(dtype).t() for weight in weights], dim=1)
        part = torch.zeros_like(plain)
        for slot in slots.unique().tolist():
            chosen = slots == slot
            pieces = [
                inputs.scales[slot] * (x[chosen] @ a[slot].to(dtype).t()) @ b[slot].to(dtype).t()
                for a, b in zip(inputs.lora_a, inputs.lora_b, strict=True)
            ]
            part[chosen] = torch.cat(pieces, dim=1)
        return {"plain": plain, "part": part, "mixed": plain + part}


def plans_of(
    answers: Iterable[lk.Answer], device: str, operators: tuple[str, ...]
) -> dict[str, str]:
    """{operator: plan} of our steps; fails where anything but the device's own kernels answered a
    segmented operator."""
    answers = list(answers)
    plans = checks.plans_by_operator(answers, device, operators)
    for answer in answers:
        own = answer.plan == "native" if device == "cpu" else answer.plan not in _NOT_OURS
        # The library's GEMM, and our kernels that add the adapters to it.
        own |= device == "cuda" and answer.op in MIXED_LINEAR_OPS and answer.plan == "vendor"
        assert own or not answer.op.startswith("segmented"), f"answered by {answer.plan}: {answer}"
    return plans


_NOT_OURS = ("reference", "vendor", "native")
