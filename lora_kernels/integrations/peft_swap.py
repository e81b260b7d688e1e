"""``accelerate_peft`` and ``restore_peft``: PEFT's LoRA layers onto our kernels, in place and back,
and the account of what was fused, what was not, and which calls fell back."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..packed import check_pack_weight
from ..reports import grouped

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


_LATER = (
    "an adapter that is added to a fused layer later is served at once; for layers that PEFT makes "
    "later (add_adapter, load_adapter with other target modules) call accelerate_peft again"
)
_ONCE = "gradients are defined once: second derivatives raise"


def accelerate_peft(model: nn.Module, *, pack_weight: str = "eval") -> PeftReport:
    """Run the LoRA layers of a ``PeftModel``, or of a transformers model with loaded adapters, on
    our kernels, in place.

    Each ``peft.tuners.lora.Linear`` that can be served gets a subclass of itself as its class, with
    another ``forward``. Parameters, names, hooks and files stay PEFT's and so does every method;
    what the kernels do not serve in a call (:mod:`lora_kernels.integrations.peft_layers` lists it)
    is answered by PEFT's forward and counted, with the reason, in ``report.calls``.

    The adapter is computed in x's dtype (or autocast's) with float32 accumulation; PEFT without
    autocast computes float32 adapters on a half-precision base in float32. Dropout draws other
    masks than PEFT's for the same seed.

    Calling it again is idempotent and includes the layers that came since. Undone by
    :func:`restore_peft`.

    Args:
        model: what holds the layers, wrapped or not.
        pack_weight: as for :class:`lora_kernels.FusedLoRALinear`: frozen weights on a CPU are kept
            a second time in the order in which the kernels read them: "eval" in evaluation mode,
            "always" in training too (two copies), "never". Part of no state.

    Raises:
        ValueError: the model has no LoRA layers of PEFT, or an unknown ``pack_weight``.
    """
    check_pack_weight(pack_weight)
    from . import peft_layers

    layers = peft_layers.lora_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers of PEFT: add an adapter to it first"
        )
    held = (m.kernel_calls for m in layers.values() if isinstance(m, peft_layers.FusedLinear))
    report = PeftReport({}, {}, next(held, Calls()), [_LATER, _ONCE])
    for name, layer in layers.items():
        reason = peft_layers.unsupported_reason(layer)
        if reason is None:
            peft_layers.swap(layer, report.calls, pack_weight)
            report.fused[name] = _description(layer)
        else:
            report.skipped[name] = reason
    logger.info("%s", report)
    return report


def restore_peft(model: nn.Module) -> list[str]:
    """Give every swapped layer of ``model`` PEFT's own class back; the names of these layers.

    Nothing of :func:`accelerate_peft` stays behind; a model without swapped layers is left as it
    is.
    """
    from . import peft_layers

    restored = []
    for name, layer in peft_layers.lora_layers(model).items():
        if isinstance(layer, peft_layers.FusedLinear):
            peft_layers.restore(layer)
            restored.append(name)
    return restored


def _description(layer: Any) -> str:
    """ "kind [out, in], adapters" of a swapped layer."""
    adapters = []
    for name, module in layer.lora_A.items():
        variant = layer.lora_variant.get(name)
        what = f"r={module.weight.shape[0]}" if variant is None else f"{type(variant).__name__}"
        adapters.append(f"{name} {what}" + " by PEFT" * (variant is not None))
    kind = type(layer.base_layer).__name__
    return f"{kind} [{layer.out_features}, {layer.in_features}], {', '.join(adapters)}"
