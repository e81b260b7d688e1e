"""One linear layer that is several projections side by side, some of which have an adapter: the
``MergedLinear`` of loralib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .fused import FusedLoRALinear


def spread(lora_b: Tensor, enable_lora: Sequence[bool]) -> Tensor:
    """B of the enabled slices, [e * n, r] one below the other, as one B [slices * n, e * r] for
    their A, [e * r, in]: block j of the columns holds slice j, other rows are zero.

    >>> spread(torch.tensor([[1.0], [2.0]]), [True, False, True])
    tensor([[1., 0.],
            [0., 0.],
            [0., 2.]])
    """
    enabled = [i for i, on in enumerate(enable_lora) if on]
    r, n = lora_b.shape[1], lora_b.shape[0] // len(enabled)
    parts = iter(lora_b.split(n))
    rows = []
    for i in range(len(enable_lora)):
        if i in enabled:
            j = enabled.index(i)
            rows.append(nn.functional.pad(next(parts), (j * r, (len(enabled) - 1 - j) * r)))
        else:
            rows.append(lora_b.new_zeros(n, len(enabled) * r))
    return torch.cat(rows)


class SlicedLoRALinear(FusedLoRALinear):
    """``FusedLoRALinear`` of equal slices of ``out_features``, of which those in ``enable_lora``
    have an adapter of rank r each: ``lora_A`` [e * r, in], ``lora_B`` [e * out / slices, r] for e
    enabled slices, as loralib's ``MergedLinear`` has them.

    All slices are computed in one call of the operator, with a B that is zero between them.

    Source: microsoft/LoRA (loralib 0.1.2).
    """

    enable_lora: tuple[bool, ...]

    def _add_lora(  # type: ignore[override]
        self, *args: Any, enable_lora: Sequence[bool], **options: Any
    ) -> None:
        self.enable_lora = tuple(map(bool, enable_lora))
        if not any(self.enable_lora) or self.out_features % len(self.enable_lora):
            raise ValueError(
                f"enable_lora={list(enable_lora)} must enable a slice, and divide the layer's "
                f"{self.out_features} outputs"
            )
        super()._add_lora(*args, **options)

    def _adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        enabled = sum(self.enable_lora)
        rows = self.out_features // len(self.enable_lora) * enabled
        return {"lora_A": (self.r * enabled, self.in_features), "lora_B": (rows, self.r)}

    def _tensors(self) -> tuple[Any, Any, Any, Any]:
        weight, bias, a, b = super()._tensors()
        return weight, bias, a, spread(b, self.enable_lora)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, enable_lora={list(self.enable_lora)}"
