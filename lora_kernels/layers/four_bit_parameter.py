"""A four-bit weight as a Parameter."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..spec.four_bit import QuantState, dequantize, from_state_dict, quant_state_of, to_state_dict


class FourBitParameter(nn.Parameter):
    """The bytes of a four-bit weight, uint8 [ceil(N K / 2), 1], or of the weights of a mixture's
    experts, and in ``quant_state`` what they mean
    (:class:`lora_kernels.spec.four_bit.QuantState`).

    Copies, pickles and moves take the state along. Casts leave it and the bytes alone; it never
    trains.
    """

    quant_state: QuantState

    def __new__(cls, data: Tensor, quant_state: QuantState) -> FourBitParameter:
        self = torch.Tensor._make_subclass(cls, data, False)
        self.quant_state = quant_state
        return self

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight [N, K], of experts [E, N, K], in the dtype that it was quantised from or in
        ``dtype``."""
        return dequantize(self.data, self.quant_state, dtype)

    def requires_grad_(self, requires_grad: bool = True) -> FourBitParameter:
        if requires_grad:
            raise RuntimeError("a four-bit weight does not train: adapt its layer")
        return self

    def detach(self) -> FourBitParameter:
        return type(self)(self.data, self.quant_state)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        moved = self.data.to(*args, **kwargs)
        if moved.device == self.device or moved.dtype != torch.uint8:
            return self if moved.dtype == torch.uint8 else moved
        return type(self)(moved, self.quant_state.to(moved.device))

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def cuda(self, device: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cuda" if device is None else device)

    def __deepcopy__(self, memo: dict[int, Any]) -> FourBitParameter:
        memo[id(self)] = made = type(self)(self.data.clone(), copy.deepcopy(self.quant_state))
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), (self.data, self.quant_state)

    def __repr__(self) -> str:  # type: ignore[override]
        kind, shape = self.quant_state.quant_type, list(self.quant_state.shape)
        return f"FourBitParameter({kind}, {shape}, device={self.device})"


def save_quant_state(weight: Tensor, destination: dict[str, Any], key: str) -> None:
    """The bytes of ``weight`` at ``key`` of a state_dict and, behind it, what they mean, as
    bitsandbytes saves them; nothing of a plain weight."""
    quant = quant_state_of(weight)
    if quant is not None:
        destination[key] = weight.data
        for name, value in to_state_dict(quant).items():
            destination[f"{key}.{name}"] = value


def load_quant_state(
    module: nn.Module,
    name: str,
    quant: QuantState,
    found: Any,
    prefix: str,
    assign: bool,
    error_msgs: list[str],
) -> None:
    """What the bytes of ``module``'s Parameter ``name`` mean, from behind its key of a state_dict
    that was loaded: written into ``quant``, which they had before, or with ``assign`` taken."""
    key, held = prefix + name, module._parameters
    if key not in found:
        return
    mine = f"{key}."
    try:
        state = {k[len(mine) :]: v for k, v in found.items() if k.startswith(mine)}
        given = from_state_dict(state, found[key].device if assign else quant.absmax.device)
    except ValueError as error:
        error_msgs.append(f"{key}: {error}")
        return
    ours, theirs = quant.tensors(), given.tensors()
    if quant[:3] != given[:3] or len(ours) != len(theirs):
        error_msgs.append(f"{key} is {quant[:3]}, and the state_dict has {given[:3]}")
        return
    weight = held[name]
    if assign and weight is not None and weight.dtype == torch.uint8:
        held[name] = FourBitParameter(weight.data, given)
        return
    with torch.no_grad():
        for one, other in zip(ours[1:], theirs[1:], strict=True):
            one.copy_(other)
