"""Is it right? Asked of every variant, of the very step that is timed, before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels.planning.config import MIXED_LINEAR_OPS
from lora_kernels.testing import linear as testing

from .baselines import Variant
from .cases import Setting

_SEED = 1234

# Rows of y and dX that are held against float64 on a CPU, whose float64 product of a large row
# would take longer than all that is timed.
_CPU_ROWS = 64

Outputs = tuple[Tensor, ...]
_NAMES = ("y", "dx", "da", "db")


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
        self._known: dict[bool, list[dict[str, Tensor]]] = {}

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
        adapted = variant.computes != "plain"
        known = self._known.get(adapted)
        if known is None or mask is not None:
            dtypes = torch.float64, self.inputs.case.dtype
            known = [self._naive(adapted, mask, dtype) for dtype in dtypes]
            if mask is None:
                self._known[adapted] = known
        return known

    @torch.no_grad()
    def _naive(self, adapted: bool, mask: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
        """The formula as people write it, in ``dtype``."""
        given, rows = self.inputs, self.rows
        x, dy, w, a, b = (
            t.to(dtype) for t in (given.x, given.dy, given.weight, given.lora_a, given.lora_b)
        )
        b = b if adapted else torch.zeros_like(b)
        scale = self.setting.scale / (1.0 if mask is None else 1.0 - self.setting.p)
        dropped = x if mask is None else x.where(mask, 0)
        s = scale * (dropped @ a.t())
        found = {"y": x[rows] @ w.t() + s[rows] @ b.t()}
        if self.setting.mode == "training":
            d = scale * (dy @ b)
            tail = d[rows] @ a
            found["dx"] = dy[rows] @ w + (tail if mask is None else tail.where(mask[rows], 0))
            found |= {"da": d.t() @ dropped, "db": dy.t() @ s}
        return found


def without_base(inputs: testing.Inputs) -> testing.Inputs:
    return replace(inputs, weight=torch.zeros_like(inputs.weight))


def plans_of(answers: Iterable[lk.Answer], device: str, operators: Sequence[str]) -> dict[str, str]:
    """{operator: plan}; fails where one was not asked, or not answered by the device, or by two
    plans, or where anything but our own kernels answered a segmented operator."""
    plans: dict[str, str] = {}
    for answer in answers:
        assert answer.backend == device, f"answered by {answer.backend}, not {device}: {answer}"
        plan = plans.setdefault(answer.op, answer.plan)
        assert plan == answer.plan, f"{answer.op} was answered by {plan}, then by {answer.plan}"
        own = answer.plan == "native" if device == "cpu" else answer.plan not in _NOT_OURS
        # The library's GEMM, and our kernels that add the adapters to it.
        own |= device == "cuda" and answer.op in MIXED_LINEAR_OPS and answer.plan == "vendor"
        assert own or not answer.op.startswith("segmented"), f"answered by {answer.plan}: {answer}"
    unseen = [op for op in operators if op not in plans]
    assert not unseen, f"{unseen} never called: the step was computed without us"
    return {op: plans[op] for op in operators}


_NOT_OURS = ("reference", "vendor", "native")
