"""Which class a layer of PEFT gets while our kernels answer its calls, and back."""

from __future__ import annotations

from typing import Any

from peft.tuners import lora
from peft.tuners.adalora.layer import SVDLinear
from torch import nn

from ..functional.ops import PLAIN
from ..layers import replacing
from ..layers.norms import DoRANorms
from ..layers.packed import PackedWeight
from ..models.foreign import offload_reason
from .peft_adalora import FusedSVDLinear
from .peft_calls import Calls
from .peft_four_bit import PEFT_CLASS, FusedLinear4bit, four_bit_reason, set_repacking
from .peft_layers import VARIANTS, FusedLayer, FusedLinear, orientation

# Without bitsandbytes PEFT has no layer for the first.
_FUSED: dict[type, type[FusedLayer]] = {
    kind.peft_class: kind for kind in (FusedLinear4bit, FusedLinear, FusedSVDLinear)
}
_FORWARDS = [vars(kind)["forward"] for kind in _FUSED]


def lora_layers(model: nn.Module) -> dict[str, lora.LoraLayer]:
    """PEFT's LoRA layers by name; one that stands at several paths appears under its first."""
    return {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)}


def unsupported_reason(layer: Any) -> str | None:
    """Why no call of this layer could be fused, or None if some could."""
    if not isinstance(layer, FusedLayer) and type(layer) not in _FUSED:
        served = " and ".join(kind.__name__ for kind in _FUSED)
        return f"is a {type(layer).__name__}; {served} are served"
    base = layer.base_layer
    if isinstance(layer, PEFT_CLASS) and PEFT_CLASS is not lora.Linear:
        return four_bit_reason(base) or _layer_reason(layer)
    if getattr(layer, "quantization_backend", None) is not None:
        return "its base is quantised"
    transposed = orientation(base)
    if isinstance(transposed, str):
        return transposed
    reason = replacing.unsupported_reason(base)
    if reason is not None:
        return f"its base layer {reason}"
    if type(base.weight) not in PLAIN:
        return f"its weight is a {type(base.weight).__name__}"
    return _layer_reason(layer)


def _layer_reason(layer: Any) -> str | None:
    base = layer.base_layer
    reason = offload_reason(layer) or offload_reason(base)
    if reason is not None:
        return reason
    if not replacing.is_forward_of_class(layer):
        return "its forward was replaced on the instance"
    reasons = [_adapter_reason(layer, name) for name in layer.lora_A]
    found = sorted({reason for reason in reasons if reason is not None})
    return ", ".join(found) if found and None not in reasons else None


def _adapter_reason(layer: Any, name: str) -> str | None:
    """Why no call of one adapter could be fused, or None."""
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant).__name__ not in VARIANTS:
        return f"its adapter is a {type(variant).__name__}"
    for part in ("lora_A", "lora_B"):
        module = getattr(layer, part)[name]
        if isinstance(layer, SVDLinear):
            if type(module) not in PLAIN:
                return f"its {part} is a {type(module).__name__}"
            continue
        reason = replacing.unsupported_reason(module)
        if reason is not None or type(module) is not nn.Linear:
            return f"its {part} {reason or f'is a {type(module).__name__}'}"
    return None


def swap(layer: Any, calls: Calls, pack_weight: str) -> None:
    """Make ``layer``, for which :func:`unsupported_reason` is None, a :class:`FusedLayer`."""
    if not isinstance(layer, FusedLayer):
        layer.__class__ = _FUSED[type(layer)]
        layer._packed, layer._norms = PackedWeight(), DoRANorms()
        if isinstance(layer, FusedLinear4bit):
            set_repacking(layer, False)
        _rebind(layer)
    layer.kernel_calls = calls
    if vars(layer).get("_pack_weight") != pack_weight:
        layer.pack_weight = pack_weight


def restore(layer: Any) -> None:
    """Undo :func:`swap`."""
    for name in ("kernel_calls", "_packed", "_pack_weight", "_norms"):
        vars(layer).pop(name, None)
    if isinstance(layer, FusedLinear4bit):
        set_repacking(layer, True)
    layer.__class__ = layer.peft_class
    _rebind(layer)


def _rebind(layer: Any) -> None:
    # accelerate keeps the forward that it found, bound, and calls that one.
    # When a hook is removed, it becomes the instance's forward.
    for name in ("_old_forward", "forward"):
        held = vars(layer).get(name)
        if getattr(held, "__func__", None) in (FusedLayer.forward, *_FORWARDS):
            setattr(layer, name, type(layer).forward.__get__(layer))
