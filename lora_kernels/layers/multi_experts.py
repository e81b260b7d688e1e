"""``MultiLoRAExperts``: a mixture's experts with the adapters of many slots, every row of a batch
with its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ..spec.segments import SegmentTable
from .batches import Owner
from .four_bit_experts import give_back, take_over
from .multi import SlottedLayer
from .replacing import become, put_back
from .routed import (
    SlotFactors,
    experts_forward,
    sizes,
    unsupported_reason,
    warmup_inputs,
    weight_dtype,
    weight_of,
)


class ExpertSlots(SlottedLayer):
    """The slots of one 3-D Parameter of experts: ``lora_A`` [S*E, r_max, in] and ``lora_B``
    [S*E, out, r_max], the experts of a slot one after the other. An adapter's scale and rank are
    those of all its experts."""

    def __init__(
        self,
        weight: Tensor,
        shape: tuple[int, int, int],
        slots: int,
        max_rank: int,
        *,
        path: str,
        owner: Owner,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts, in_features, out_features = shape
        shapes = (slots * self.experts, max_rank, in_features), (
            slots * self.experts, out_features, max_rank,
        )  # fmt: skip
        self._add_slots(path, owner, *shapes, device, dtype, weight)

    def slot(self, slot: int, rank: int) -> tuple[Tensor, Tensor]:
        """Views [E, rank, in] and [E, out, rank]."""
        own = slice(slot * self.experts, (slot + 1) * self.experts)
        return self.lora_A.detach()[own, :rank], self.lora_B.detach()[own, :, :rank]

    def factors(self, hidden_states: Tensor) -> SlotFactors | None:
        """What the active batch has for these rows; None: the base model."""
        found = self._table(hidden_states.shape[:-1], hidden_states.device)
        return None if found is None else SlotFactors(self.lora_A, self.lora_B, found[0])

    def turns(self, rows: int) -> SlotFactors:
        """As if the slots took turns among the rows, with adapters of the largest rank."""
        slots, max_rank = len(self.lora_A) // self.experts, self.lora_A.shape[1]
        of_row, device = [i % slots for i in range(rows)], self.lora_A.device
        table = SegmentTable.from_rows(of_row, [max_rank] * slots, [1.0] * slots, device=device)
        return SlotFactors(self.lora_A, self.lora_B, table)

    # The whole module's is MultiLoRAExperts'.
    warmup_call = None  # type: ignore[assignment]

    def extra_repr(self) -> str:
        slots, max_rank = self.lora_A.shape[0] // self.experts, self.lora_A.shape[1]
        return f"experts={self.experts}, slots={slots}, max_rank={max_rank}"


class MultiLoRAExperts(nn.Module):
    """Experts that add to every row, on its way through each adapted Parameter, the adapter of the
    row's own slot; inserted by :class:`lora_kernels.AdapterStore`.

    The module keeps its Parameters, frozen, its attributes and hooks, and gets a subclass of its
    own class, with ``slots`` [name of the Parameter] beside the weights. The base products have
    their rows sorted by expert; the adapters are added to them by (slot, expert). Without a batch
    the model's own code computes.
    """

    _kind: type[nn.Module]
    slots: nn.ModuleDict

    @staticmethod
    def add(
        module: nn.Module,
        name: str,
        slots: int,
        max_rank: int,
        *,
        path: str,
        owner: Owner,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ExpertSlots:
        """Give the Parameter ``name`` of ``module`` slots; ``path`` is its own.

        Raises:
            TypeError: ``module`` is not what this serves; the message says why.
        """
        if not isinstance(module, MultiLoRAExperts):
            reason = unsupported_reason(module)
            if reason is not None:
                raise TypeError(f"the module {reason}")
        weight, dtype = weight_of(module, name), dtype or weight_dtype(module, name)
        own = ExpertSlots(
            weight, sizes(module, name), slots, max_rank,
            path=path, owner=owner, device=device, dtype=dtype,
        ).train(module.training)  # fmt: skip
        weight.requires_grad_(False)
        if not isinstance(module, MultiLoRAExperts):
            take_over(module)
            become(module, MultiLoRAExperts)
            module.slots = nn.ModuleDict()
        cast(nn.ModuleDict, module.slots)[name] = own
        return own

    def remove(self, name: str) -> None:
        """Take the slots of a Parameter away; with the last ones the module is what it was."""
        if name in self.slots:
            del self.slots[name]
        if not self.slots:
            del self._modules["slots"]
            give_back(put_back(self))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H], [T, k] and [T, k] -> [T, H]."""
        every = {name: cast(ExpertSlots, own) for name, own in self.slots.items()}
        found = {name: own.factors(hidden_states) for name, own in every.items()}
        factors = {name: own for name, own in found.items() if own is not None}
        if not factors:
            y: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return y
        return experts_forward(self, factors, hidden_states, top_k_index, top_k_weights)

    def warmup_call(
        self, rows: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """For :func:`lora_kernels.warmup`: the slots take turns."""
        x, *routing = warmup_inputs(self, rows, dtype)
        every = {name: cast(ExpertSlots, own).turns(rows) for name, own in self.slots.items()}
        return x, lambda x: experts_forward(self, every, x, *routing)
