"""``FusedSVDLinear``: AdaLoRA's layers of PEFT on our kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from peft.tuners.adalora.layer import SVDLinear
from torch import Tensor

from ..functional.ops import PLAIN
from .peft_layers import NOT_PLAIN, NOTHING, FusedLayer, Offsets
from .peft_operands import Adapter, Base


class FusedSVDLinear(FusedLayer, SVDLinear):
    """``peft.tuners.adalora.SVDLinear`` on our kernels: a LoRA adapter whose A is ``A * E``.

    ``y = x W^T + scaling / (ranknum + 1e-5) * (dropout(x) (A * E)^T) B^T + bias`` with A [r, in],
    E [r, 1] and B [out, r]. The gradient of E is that of ``A * E`` times A, by rows, so a rank that
    PEFT's allocator masks (E = 0) has one, and may come back.

    Source: Zhang et al., "AdaLoRA" (arXiv:2303.10512).
    """

    peft_class = SVDLinear

    def _adapter_operands(self, name: str, x: Tensor, base: Base) -> Adapter | str:
        modules: dict[str, Any] = self._modules
        a, e, b, ranknum = (
            modules[part]._parameters[name] for part in ("lora_A", "lora_E", "lora_B", "ranknum")
        )
        if any(type(t) not in PLAIN for t in (a, e, b, ranknum)):
            return NOT_PLAIN
        if a.shape[0] == 0:
            return "a rank of 0"
        if e.shape != (a.shape[0], 1) or ranknum.numel() != 1 or e.dtype != a.dtype:
            return "E or ranknum that does not fit"
        dropout_p = self._dropout_of(name)
        if isinstance(dropout_p, str):
            return dropout_p
        if e.device != a.device:
            return "A and E are on different devices"
        scaling = (self.scaling[name] / (ranknum.detach() + 1e-5)).view(())
        adapter = Adapter(name, a * e, b, None, scaling, dropout_p)
        return self._misfit(adapter, x, base) or adapter

    def _forward_mixed(
        self, x: Tensor, adapter_names: Sequence[str], alora_offsets: Offsets = None
    ) -> Tensor | str:
        # PEFT's own error.
        return NOTHING

    def _delta(self, name: str, x: Tensor) -> Tensor:
        layer: Any = self
        a, b = layer.lora_A[name], layer.lora_B[name]
        rows = layer.lora_dropout[name](self._cast_input_dtype(x, a.dtype))
        delta: Tensor = rows @ (a * layer.lora_E[name]).t() @ b.t()
        return delta * self.scaling[name] / (layer.ranknum[name] + 1e-5)
