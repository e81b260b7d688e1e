"""Batches that mix adapters: ``segmented_lora`` against its rivals, one row per batch and layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lora_kernels.testing import linear as testing

from . import checks
from .baselines import Variant
from .measure import EagerStep, Step
from .rows import Prepared, timed
from .segmented_baselines import Part
from .segmented_cases import MixedInputs, MixedSetting, draw

# Rows that are held against float64 on a CPU.
_CPU_ROWS = 64


def test_segmented_lora(mixed: MixedSetting, benchmark: Any, session: Any) -> None:
    torch.manual_seed(0)
    benchmark.group = f"mixed batches, {mixed.dtype}"
    inputs = draw(mixed, session.device)
    truth = Truth(mixed, inputs)
    copies = session.clock.sets(inputs.weight, inputs.x.new_empty(mixed.m, mixed.n))
    if copies > 1:
        # Several of the variants read no weight, so as many copies again are passed over.
        copies *= 2
    sets = [inputs, *(inputs.copy() for _ in range(copies - 1))]
    found = Prepared([inputs.x])
    for variant in session.mixed_variants.values():

        def make(variant: type[Variant] = variant) -> list[EagerStep]:
            return [step_of(variant, mixed, one) for one in sets]

        found.add(variant, mixed, session.device, make, truth.check)
    timed(found, session.mixed_variants, "segmented", mixed, benchmark, session)


def step_of(variant: type[Variant], setting: MixedSetting, inputs: MixedInputs) -> EagerStep:
    return EagerStep(variant(setting, inputs), "forward", inputs.x)


class Truth:
    """The exact results of a row's inputs, and those of the same formula in its own dtype: the
    base, and adapter after adapter its rows."""

    def __init__(self, setting: MixedSetting, inputs: MixedInputs) -> None:
        self.setting = setting
        limit = setting.m if inputs.x.is_cuda else _CPU_ROWS
        self.rows = checks.rows_to_check(setting.m, limit).to(inputs.x.device)
        own = inputs.x.dtype
        self.known = [self._naive(inputs, dtype) for dtype in (torch.float64, own)]

    def check(self, variant: Variant, step: Step) -> None:
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
