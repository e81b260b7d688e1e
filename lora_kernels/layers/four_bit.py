"""The linear layer that holds a four-bit weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..spec.four_bit import quantize
from .foreign import carry_dispatch_hook
from .four_bit_parameter import FourBitParameter
from .packed import PackedLinear
from .replacing import share_linear, unsupported_reason


class QuantizedLinear(PackedLinear):
    """A linear layer with a frozen four-bit weight, as :func:`lora_kernels.quantize_base` puts one
    in place of an ``nn.Linear`` or Conv1D: ``y = x W^T + bias``, differentiable in x and bias.

    ``state_dict`` holds the bytes and, beside them, the keys of bitsandbytes' ``Linear4bit``.
    """

    weight: FourBitParameter

    @classmethod
    def from_linear(
        cls,
        module: nn.Module,
        quant_type: str = "nf4",
        *,
        double_quant: bool = True,
        block: int = 64,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantizedLinear:
        """A layer with the quantised weight of ``module``, and its bias and hooks.

        Args:
            quant_type: "nf4" or "fp4".
            double_quant: whether the absmax of the blocks are quantised too: 4.1 bits a weight
                instead of 4.5, with blocks of 64.
            block: how many weights share an absmax: 32, 64, ... 4096.
            compute_dtype: what x is cast to, and the result back from; None: x's own dtype.

        Raises:
            TypeError: ``module`` is something else, or its weight no plain float32, bfloat16 or
                float16 Parameter.
            ValueError: an unknown type or block.
        """
        reason = unsupported_reason(module)
        if reason is not None:
            raise TypeError(f"QuantizedLinear.from_linear: the module {reason}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        share_linear(self, module)
        self._init_packing()
        weight = self.weight.detach()
        self.weight = FourBitParameter(
            *quantize(weight, quant_type, block=block, double_quant=double_quant)
        )
        self.compute_dtype = compute_dtype
        carry_dispatch_hook(module, self)
        return self.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if self.compute_dtype is not None and self._casts(input):
            return self.forward(input.to(self.compute_dtype)).to(input.dtype)
        return self._base_forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.weight.quant_state.quant_type}"
