"""What was fused of a PEFT model, what was skipped and why, and how many calls fell back."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..models.reports import grouped

logger = logging.getLogger("lora_kernels")


class Calls:
    """How many calls of a model's swapped layers our kernels answered.

    A call counts where there is an adapter to compute: not while adapters are disabled or merged,
    nor where none of the active ones is in the layer. Compiled calls are not counted: the count
    would be a part of the graph.

    Attributes:
        fused: calls that our kernels answered.
        fallen_back: reason -> calls that PEFT's own forward answered.
    """

    def __init__(self) -> None:
        self.fused = 0
        self.fallen_back: Counter[str] = Counter()

    def fall_back(self, reason: str) -> None:
        if reason not in self.fallen_back:
            logger.info("a call of a PEFT layer falls back to PEFT's own forward: %s", reason)
        self.fallen_back[reason] += 1

    @property
    def share(self) -> float:
        """The part of all counted calls that was fused; 1.0 where none was counted."""
        return self.fused / max(self.fused + self.fallen_back.total(), 1) if self else 1.0

    def reset(self) -> None:
        self.fused = 0
        self.fallen_back.clear()

    def __bool__(self) -> bool:
        return bool(self.fused or self.fallen_back)

    def __str__(self) -> str:
        if not self:
            return "no call yet"
        total = self.fused + self.fallen_back.total()
        lines = [f"{self.fused} of {total} calls fused ({100 * self.share:.1f}%)"]
        lines += [f"{n} fell back: {reason}" for reason, n in self.fallen_back.most_common()]
        return "; ".join(lines)

    # A copy of a model counts its own calls.
    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        return Calls()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


@dataclass
class PeftReport:
    """What :func:`accelerate_peft` did.

    ``fused``: name -> "kind [out, in], adapters"; ``skipped``: name -> reason; ``calls``: the
    running account of the calls, shared by all swapped layers of the model.
    """

    fused: dict[str, str]
    skipped: dict[str, str]
    calls: Calls
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{len(self.fused)} LoRA layers of PEFT on lora_kernels, {len(self.skipped)} left to "
            f"PEFT; {self.calls}"
        ]
        lines += [f"  fused    {line}" for line in grouped(self.fused)]
        lines += [f"  skipped  {line}" for line in grouped(self.skipped)]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)
