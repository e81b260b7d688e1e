"""A frozen weight in the layout of the CPU's kernels: packed once, dropped when it has changed."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import cpu


class _Copy(NamedTuple):
    weight: weakref.ref[Tensor]
    data_ptr: int
    version: int
    panels: Tensor


class PackedWeight:
    """The packed copies of one module's frozen weight, each as large as the weight: one for
    ``x W^T`` and one for ``dY W``.

    The module drops them when it does something to the weight. They are checked on every use as
    well, against the weight's identity, address and version, and, since a write through
    ``Tensor.data`` leaves no trace in these, against some 64 of its values. A copy or a pickle of
    the module starts without them.
    """

    def __init__(self) -> None:
        self._copies: dict[bool, _Copy] = {}

    def get(self, weight: Tensor, fan_in_fan_out: bool, *, for_dx: bool = False) -> Tensor | None:
        """The packed weight, made now if there is none that holds; None where it cannot be packed:
        not on a CPU with native kernels, not float32 or bfloat16, not frozen, or no plain tensor
        (fake, sharded, being traced)."""
        if not _is_plain(weight) or weight.requires_grad or not cpu.packs(weight):
            return None
        # The inner axis first: [K, N] for the forward, [N, K] for dX.
        operand = weight.detach() if fan_in_fan_out != for_dx else weight.detach().t()
        held = self._copies.get(for_dx)
        if (
            held is not None
            and held.weight() is weight
            and held.data_ptr == weight.data_ptr()
            and held.version == weight._version
            and torch.ops.lora_kernels_cpu.is_packed(operand, held.panels)
        ):
            return held.panels
        # Gone before its successor comes, not after.
        self._copies.pop(for_dx, None)
        panels = torch.ops.lora_kernels_cpu.pack(operand)
        self._copies[for_dx] = _Copy(
            weakref.ref(weight), weight.data_ptr(), weight._version, panels
        )
        return panels

    def drop(self) -> None:
        """Forget the copies: the weight has changed, or will not be used for a while."""
        self._copies.clear()

    def __len__(self) -> int:
        return len(self._copies)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return PackedWeight()

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, ()


def _is_plain(weight: Tensor) -> bool:
    # An inference tensor has no version to compare.
    return type(weight) in (Tensor, nn.Parameter) and not weight.is_inference()
