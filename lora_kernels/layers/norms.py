"""The row norms of DoRA, kept while what they were made of has not changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional.dora import dora_linear, dora_norm, squared_rows
from ..functional.linear import Packed
from ..functional.ops import is_observed


def _state(*tensors: Tensor) -> tuple[Any, ...]:
    return tuple((t.data_ptr(), t._version, t.shape, t.dtype, t.device) for t in tensors)


class DoRANorms:
    """``||W||^2`` of a frozen weight, and in evaluation mode ``||W + s B A||``, by rows.

    A write through ``.data`` leaves no trace: ``drop()`` after it. In training the second is made
    anew by every call, since optimizers write so.
    """

    def __init__(self) -> None:
        self._squares: tuple[Any, Tensor] | None = None
        self._norm: tuple[Any, Tensor] | None = None

    def get(
        self,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: Tensor,
        fan_in_fan_out: bool,
        *,
        training: bool,
    ) -> Tensor:
        """``||W + s B A||`` by rows, [N]."""
        if is_observed() or any(t.is_inference() for t in (weight, lora_a, lora_b, scale)):
            return dora_norm(weight, lora_a, lora_b, scale, fan_in_fan_out)
        key = _state(weight)
        if weight.requires_grad or self._squares is None or self._squares[0] != key:
            with torch.inference_mode(False):
                self._squares = key, squared_rows(weight, fan_in_fan_out)
        squares = self._squares[1]
        if training:
            self._norm = None
            return dora_norm(weight, lora_a, lora_b, scale, fan_in_fan_out, squares)
        key = _state(weight, lora_a, lora_b, scale)
        if self._norm is None or self._norm[0] != key:
            with torch.inference_mode(False):
                norm = dora_norm(weight, lora_a, lora_b, scale, fan_in_fan_out, squares)
            self._norm = key, norm
        return self._norm[1]

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        fan_in_fan_out: bool,
        dropout_p: float,
        packed: Packed,
        *,
        training: bool,
    ) -> Tensor:
        """:func:`dora_linear` with the norm from here; ``dropout_p`` is 0 where nothing drops."""
        norm = self.get(weight, lora_a, lora_b, scale, fan_in_fan_out, training=training)
        return dora_linear(
            x,
            weight,
            lora_a,
            lora_b,
            magnitude,
            scale,
            bias,
            dropout_p=dropout_p,
            training=True,
            fan_in_fan_out=fan_in_fan_out,
            norm=norm,
            packed=packed,
        )

    def drop(self) -> None:
        """Forget them: the weight or the adapter has changed."""
        self._squares = self._norm = None

    def __deepcopy__(self, memo: dict[int, Any]) -> DoRANorms:
        return DoRANorms()

    def __reduce__(self) -> tuple[Any, ...]:
        return DoRANorms, ()
