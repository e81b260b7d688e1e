"""``accelerate_peft`` and ``restore_peft``: PEFT's LoRA layers on our kernels, and back."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ..layers.packed import check_pack_weight
from ..layers.shared_input import share_inputs
from .peft_calls import Calls, PeftReport

logger = logging.getLogger("lora_kernels")

_LATER = (
    "an adapter that is added to a fused layer later is served at once; for layers that PEFT makes "
    "later (add_adapter, load_adapter with other target modules) call accelerate_peft again"
)

_ONCE = "gradients are defined once: second derivatives raise"


def accelerate_peft(model: nn.Module, *, pack_weight: str = "eval") -> PeftReport:
    """Run the LoRA layers of a ``PeftModel``, or of a transformers model with loaded adapters, on
    our kernels, in place.

    Each ``peft.tuners.lora.Linear``, each ``SVDLinear`` of AdaLoRA and each ``ParamWrapper`` of
    experts (``target_parameters``) that can be served gets a subclass of itself as its class, with
    another ``forward``. Parameters, names, hooks and files stay PEFT's and so does every method;
    what the kernels do not serve in a call (:mod:`lora_kernels.integrations.peft_layers` and
    ``peft_experts`` list it) falls back to PEFT's forward and is counted, with the reason, in
    ``report.calls``.

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
    from . import peft_experts, peft_kinds

    layers = peft_kinds.lora_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers of PEFT: add an adapter to it first"
        )
    fused = peft_kinds.FusedLayer, peft_experts.FusedParamWrapper
    held = (m.kernel_calls for m in layers.values() if isinstance(m, fused))
    report = PeftReport({}, {}, next(held, Calls()), [_LATER, _ONCE])
    for name, layer in layers.items():
        of_experts = isinstance(layer, peft_experts.ParamWrapper)
        reason = (peft_experts if of_experts else peft_kinds).unsupported_reason(layer)
        if reason is None and of_experts:
            peft_experts.swap(layer, report.calls)
            report.fused[name] = peft_experts.description(layer)
        elif reason is None:
            peft_kinds.swap(layer, report.calls, pack_weight)
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
    from . import peft_experts, peft_kinds

    share_inputs(model, False)
    restored = []
    for name, layer in peft_kinds.lora_layers(model).items():
        if isinstance(layer, peft_experts.FusedParamWrapper):
            peft_experts.restore(layer)
        elif isinstance(layer, peft_kinds.FusedLayer):
            peft_kinds.restore(layer)
        else:
            continue
        restored.append(name)
    return restored


def _description(layer: Any) -> str:
    """ "kind [out, in], adapters" of a swapped layer."""
    from . import peft_layers

    adapters = []
    for name, module in layer.lora_A.items():
        rank = getattr(module, "weight", module).shape[0]
        variant = type(layer.lora_variant.get(name)).__name__
        what = peft_layers.VARIANTS.get(variant, f"{variant} by PEFT")
        adapters.append(f"{name} r={rank}" + f" {what}" * (variant != "NoneType"))
    kind = type(layer.base_layer).__name__
    return f"{kind} [{layer.out_features}, {layer.in_features}], {', '.join(adapters)}"
