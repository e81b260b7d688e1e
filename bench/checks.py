"""Is it right? Asked of every variant, of the very step that is timed, before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels.testing import linear as testing

from .baselines import Variant
from .cases import Setting

_SEED = 1234

# Rows of y and dX that are held against float64 on a CPU, whose float64 product of a large row
# would take longer than all that is timed.
_CPU_ROWS = 64

Outputs = tuple[Tensor, ...]
_NAMES = ("y", "dx", "da", "db")


@dataclass(frozen=True)
class _Masked(testing.Inputs):
    """Inputs with a dropout mask that somebody else drew."""

    given: Tensor | None = None

    def mask(self) -> Tensor | None:
        return self.given


def draw(setting: Setting, device: str) -> testing.Inputs:
    """The tensors of one row; the adapter's part of y and of dx is as large as the base's."""
    case = testing.Case(
        m=setting.m,
        n=setting.n,
        k=setting.k,
        r=setting.r,
        dtype=getattr(torch, setting.dtype),
        bias=False,
        dropout_p=setting.p,
        scale=setting.scale,
        device=device,
    )
    return case.draw()


def rows_to_check(m: int, limit: int) -> Tensor:
    """All of m rows, or ``limit`` of them: the first, the last, and others drawn at random."""
    if m <= limit:
        return torch.arange(m)
    generator = torch.Generator().manual_seed(_SEED)
    inner = torch.randperm(m - 2, generator=generator)[: limit - 2] + 1
    return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([m - 1])])


class Truth:
    """The float64 results of one row and the budget around them, for any variant's mask.

    Of y and dX on a CPU some rows, of dA and dB, which sum over all rows, every element.
    """

    def __init__(self, setting: Setting, inputs: testing.Inputs) -> None:
        self.setting = setting
        self.inputs = inputs
        limit = setting.m if inputs.x.is_cuda else _CPU_ROWS
        self.rows = rows_to_check(setting.m, limit).to(inputs.x.device)
        self._known: dict[str, list[dict[str, Tensor]]] = {}

    def check(
        self,
        variant: Variant,
        step: Callable[[], Outputs],
        without_base: Callable[[], Outputs] | None,
    ) -> None:
        """Fail unless the outputs of ``step`` keep the budget.

        ``without_base`` is the training step of the same variant over a weight of zero. Run from
        the same seed, its dX is ``mask * (D A)`` and nothing else, so it shows the mask that the
        variant draws, whichever generator it uses.
        """
        mask = None
        if self.setting.p and variant.computes == "lora":
            assert without_base is not None
            torch.manual_seed(_SEED)
            mask = without_base()[1] != 0
            self._check_share(variant, mask)
        exact, eager = self._results(variant, mask)
        torch.manual_seed(_SEED)
        for name, result in zip(_NAMES, step(), strict=False):
            title = f"{variant.key} {self.setting} {name}"
            if name in ("y", "dx"):
                width = self.setting.n if name == "y" else self.setting.k
                assert result.shape == (self.setting.m, width), f"{title}: {tuple(result.shape)}"
                assert result.isfinite().all(), f"{title}: holds NaN or infinity"
                result = result[self.rows]
            testing.assert_within_budget(title, result, eager[name], exact[name])

    def _check_share(self, variant: Variant, mask: Tensor) -> None:
        p = self.setting.p
        dropped = 1.0 - mask.double().mean().item()
        deviation = (p * (1 - p) / mask.numel()) ** 0.5
        # 2**-16: the mask compares 16-bit numbers.
        allowed = 6 * deviation + 2.0**-16
        assert abs(dropped - p) <= allowed, f"{variant.key}: dropout of {p} dropped {dropped:.4f}"

    def _results(self, variant: Variant, mask: Tensor | None) -> list[dict[str, Tensor]]:
        computes = "plain" if variant.computes == "plain" else "adapted"
        known = self._known.get(computes)
        if known is None or mask is not None:
            inputs = self._inputs(computes, mask)
            known = [self._naive(inputs, dtype) for dtype in (torch.float64, inputs.case.dtype)]
            if mask is None:
                self._known[computes] = known
        return known

    def _inputs(self, computes: str, mask: Tensor | None) -> testing.Inputs:
        inputs = self.inputs
        if computes == "plain":
            inputs = replace(inputs, lora_b=torch.zeros_like(inputs.lora_b))
        if mask is None:
            return replace(inputs, case=replace(inputs.case, dropout_p=0.0), rng=None)
        return _Masked(**{f.name: getattr(inputs, f.name) for f in fields(inputs)}, given=mask)

    def _naive(self, inputs: testing.Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
        chosen = replace(inputs, x=inputs.x[self.rows], dy=inputs.dy[self.rows])
        mask = inputs.mask()
        if mask is not None:
            chosen = replace(chosen, given=mask[self.rows])
        results = testing.naive(chosen, dtype)
        if self.setting.mode == "training":
            results |= _adapter_gradients(inputs, dtype)
        return results


@torch.no_grad()
def _adapter_gradients(inputs: testing.Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """dA and dB over all rows, as ``testing.naive`` has them by autograd, without the base."""
    case, mask = inputs.case, inputs.mask()
    x, dy, a, b = (t.to(dtype) for t in (inputs.x, inputs.dy, inputs.lora_a, inputs.lora_b))
    dropped = x if mask is None else x.where(mask, 0)
    scale = inputs.scale.item() / (1 - case.dropout_p)
    s, d = scale * (dropped @ a.t()), scale * (dy @ b)
    return {"da": d.t() @ dropped, "db": dy.t() @ s}


def without_base(inputs: testing.Inputs) -> testing.Inputs:
    return replace(inputs, weight=torch.zeros_like(inputs.weight))


def plans_of(answers: Iterable[lk.Answer], device: str, setting: Setting) -> dict[str, str]:
    """{operator: plan} of a fused step; fails where another backend than the device's answered."""
    backward = ["lora_linear_dx", "lora_linear_dab"] * (setting.mode == "training")
    return plans_by_operator(answers, device, ["lora_linear_fwd", *backward])


def plans_by_operator(
    answers: Iterable[lk.Answer], device: str, operators: Sequence[str]
) -> dict[str, str]:
    """{operator: plan}; fails where one is not asked, or not answered by the device, or by two."""
    plans: dict[str, str] = {}
    for answer in answers:
        assert answer.backend == device, f"answered by {answer.backend}, not {device}: {answer}"
        plan = plans.setdefault(answer.op, answer.plan)
        assert plan == answer.plan, f"{answer.op} was answered by {plan}, then by {answer.plan}"
    unseen = [op for op in operators if op not in plans]
    assert not unseen, f"{unseen} never called: the step was computed without us"
    return {op: plans[op] for op in operators}
