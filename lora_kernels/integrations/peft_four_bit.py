"""``FusedLinear4bit``: the class that a LoRA layer of PEFT on a four-bit base of bitsandbytes has
while our kernels answer its calls. It is used only with bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor

from ..functional.ops import PLAIN
from ..layers.replacing import holds_four_bits
from ..spec.four_bit import quant_state_of
from .peft_layers import DTYPES, FusedLayer, FusedLinear, is_called_plainly
from .peft_operands import Adapter, Base

PEFT_CLASS: Any = getattr(lora, "Linear4bit", lora.Linear)


def four_bit_reason(base: Any) -> str | None:
    """Why the bytes of a four-bit base layer cannot be read, or None."""
    if not holds_four_bits(base):
        return f"its base layer is a {type(base).__name__}, whose four-bit weight is not read"
    try:
        quant_state_of(base.weight)
    except ValueError as error:
        return f"its four-bit weight cannot be read: {error}"
    return None


class FusedLinear4bit(FusedLayer, PEFT_CLASS):
    """``peft.tuners.lora.bnb.Linear4bit`` on our kernels. The compute dtype is the base layer's
    ``compute_dtype``, else x's; the result is in x's dtype, also under autocast."""

    peft_class = PEFT_CLASS
    _delta = FusedLinear._delta

    def _adapter_operands(self, name: str, x: Tensor, base: Base) -> Adapter | str:
        found: Adapter | str = FusedLinear._adapter_operands(self, name, x, base)
        if isinstance(found, Adapter) and found.magnitude is not None:
            return "DoRA on a four-bit base"
        return found

    def warmup_call(
        self, rows: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """For :func:`lora_kernels.warmup`; counts as no call."""
        layer: Any = self
        return super().warmup_call(rows, dtype or layer.base_layer.compute_dtype or torch.float32)

    def _base_of(self, layer: Any, x: Tensor) -> Base | str:
        reason = four_bit_reason(layer)
        if reason is not None:
            return reason
        weight, bias = layer.weight, layer._parameters.get("bias")
        quant = quant_state_of(weight)
        assert quant is not None
        if not is_called_plainly(layer) or not (bias is None or type(bias) in PLAIN):
            return "a hook, or a forward of its own, on the base layer"
        if x.device != weight.device:
            return "x and the base weight are on different devices"
        if x.dtype not in DTYPES:
            return f"x is {x.dtype}"
        if x.dim() == 0 or x.shape[-1] != quant.shape[1]:
            return "shapes that do not fit"
        return Base(weight, bias, False, layer.compute_dtype or x.dtype, quant)


def set_repacking(layer: Any, allowed: bool) -> None:
    """Whether the base layer may repack its bytes, for a kernel of its own, at a call in evaluation
    mode."""
    from bitsandbytes.functional import has_avx512bf16

    layer.base_layer.support_avx512bf16_for_cpu = allowed and bool(has_avx512bf16())
