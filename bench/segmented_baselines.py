"""What a batch that mixes adapters can be computed with: ``segmented_lora`` and its rivals, one
class each, and the same rivals without the base linear.

All variants of a row share the frozen weight and hold the same adapters.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.layers.packed import PackedWeight
from lora_kernels.spec import native

from .baselines import (
    Plain,
    Variant,
    frozen_linear,
    keyed,
    packed_linear,
    peft_missing,
    unpacked_reason,
)

# Beyond this the gathered weights of a batch are not worth the memory.
_MOST_GATHERED = 8 * 2**30


class Tail(Variant):
    """An adapter part ``add`` and the base linear under it."""

    computes = "mixed"

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y = F.linear(x, self.weight)
        self.add(x, y)
        return y

    def add(self, x: Tensor, y: Tensor) -> None:
        """``y += `` the part of every row's adapter."""
        raise NotImplementedError


class Ours(Tail):
    key, label = "segmented", "ours"
    what = "F.linear, then segmented_lora(out=y)"
    package = "lora_kernels"
    operators: ClassVar[tuple[str, ...]] = ("segmented_lora_",)

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        self.table = inputs.table()

    def add(self, x: Tensor, y: Tensor) -> None:
        lk.segmented_lora(x, self.inputs.lora_a, self.inputs.lora_b, self.table, out=y)


class PackedBase(Ours):
    key, label = "packed", "ours, packed base"
    what = "our own packed linear (a merged FusedLoRALinear), then segmented_lora(out=y)"
    operators = ("lora_linear_fwd", "segmented_lora_")

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        self.layer = packed_linear(inputs.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.add(x, y)
        return y

    @classmethod
    def missing(cls, setting: Any, device: str) -> str | None:
        return unpacked_reason(setting, device)


class Fused(Variant):
    computes = "mixed"
    key, label = "fused", "ours, fused"
    what = "segmented_linear: base and adapters in one operator, on a CPU over a packed weight"
    package = "lora_kernels"
    operators = ("segmented_linear_fwd",)

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        self.table = inputs.table()
        self.packed = PackedWeight().get(inputs.weight, False)

    def forward(self, x: Tensor) -> Tensor:
        inputs, packed = self.inputs, (self.packed, None)
        return lk.segmented_linear(
            x, inputs.weight, inputs.lora_a, inputs.lora_b, self.table, packed=packed
        )

    @classmethod
    def missing(cls, setting: Any, device: str) -> str | None:
        return (
            None if device != "cpu" or native.load() else f"no native kernels: {native.why_not()}"
        )


class Peft(Variant):
    computes = "mixed"
    key, label = "peft", "PEFT"
    what = (
        "PEFT's lora.Linear with adapter_names=, one layer for each slice, adapters in the dtype "
        "of the base (on a GPU called by the host: it copies its lists of rows to the device)"
    )
    package = "peft"
    captured = False

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        import peft

        names = [f"adapter{slot}" for slot in range(setting.adapters)]
        config = peft.LoraConfig(r=setting.r, lora_alpha=setting.r, target_modules=["linear"])
        self.names = [names[slot] for slot in inputs.slots]
        self.layers: list[Any] = []
        weights = inputs.weight.split(setting.widths)
        for weight, a, b in zip(weights, inputs.lora_a, inputs.lora_b, strict=True):
            model = nn.ModuleDict({"linear": frozen_linear(weight)})
            for slot, name in enumerate(names):
                with warnings.catch_warnings():
                    # Several adapters are what this is about.
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")
                    peft.inject_adapter_in_model(config, model, adapter_name=name)
                layer = cast(Any, model["linear"])
                layer.lora_A[name].weight = nn.Parameter(a[slot], requires_grad=False)
                layer.lora_B[name].weight = nn.Parameter(b[slot], requires_grad=False)
                layer.scaling[name] = inputs.scales[slot]
            self.layers.append(layer.eval())

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x, adapter_names=self.names) for layer in self.layers]

    @classmethod
    def missing(cls, setting: Any, device: str) -> str | None:
        return peft_missing()


class Gather(Tail):
    key, label = "gather", "gather"
    what = "F.linear, then A and B of every row gathered and two einsums for each slice"
    gathered: ClassVar[torch.dtype | None] = None

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        device = inputs.x.device
        self.slots = torch.tensor(inputs.slots, device=device)
        self.scales = torch.tensor(inputs.scales, device=device)[self.slots, None]

    def add(self, x: Tensor, y: Tensor) -> None:
        dtype = self.gathered or x.dtype
        stacks = zip(self.inputs.lora_a, self.inputs.lora_b, strict=True)
        first = 0
        rows = x.to(dtype)
        for a, b in stacks:
            s = torch.einsum("mk,mrk->mr", rows, a[self.slots].to(dtype)).mul_(self.scales)
            width = b.shape[1]
            y[:, first : first + width] += torch.einsum("mr,mnr->mn", s, b[self.slots].to(dtype))
            first += width

    @classmethod
    def missing(cls, setting: Any, device: str) -> str | None:
        if cls.gathered and setting.dtype == "float32":
            return "the same as 'gather' in float32"
        if setting.gathered_bytes > _MOST_GATHERED:
            return f"it would gather {setting.gathered_bytes / 2**30:.0f} GiB"
        return None


class Loop(Tail):
    key, label = "loop", "loop"
    what = (
        "F.linear, then for each adapter index_select, two mm and index_add_; the rows of each are "
        "looked up once, outside the time"
    )

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        slots = torch.tensor(inputs.slots, device=inputs.x.device)
        self.rows = [(slot, (slots == slot).nonzero()[:, 0]) for slot in set(inputs.slots)]

    def add(self, x: Tensor, y: Tensor) -> None:
        views = y.split(self.setting.widths, dim=1)
        for slot, rows in self.rows:
            chosen, scale = x.index_select(0, rows), self.inputs.scales[slot]
            for view, a, b in zip(views, self.inputs.lora_a, self.inputs.lora_b, strict=True):
                s = torch.mm(chosen, a[slot].t())
                view.index_add_(0, rows, torch.mm(s, b[slot].t()), alpha=scale)


class Part(Tail):
    """The adapter's part alone, added to the same y every time."""

    computes = "part"

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        self.y = inputs.x.new_zeros(setting.m, setting.n)

    def forward(self, x: Tensor) -> Tensor:
        self.add(x, self.y)
        return self.y


def part(of: type[Tail], *named: str, **changes: Any) -> type[Variant]:
    bases = type("Part", (Part, of), {})
    return cast(Any, bases).but(*named, **changes)


class Table(Variant):
    key, label = "table", "the table"
    what = "SegmentTable.update_ for a new batch: once for all layers, in no other column"
    package = "lora_kernels"
    computes = "nothing"

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        self.table = inputs.table()
        self.slots = torch.tensor(inputs.slots, device=inputs.x.device)

    def forward(self, x: Tensor) -> list[Tensor]:
        self.table.update_(self.slots, validate=False)
        return []


_FLOAT32 = {"gathered": torch.float32}
MIXED_VARIANTS = keyed(
    *(Plain, PackedBase, Fused, Peft),
    Gather.but(
        "gather_fp32",
        "gather fp32",
        "gather with the gathered weights in float32, as engines do it on CPUs",
        **_FLOAT32,
    ),
    *(Gather, Loop),
    part(
        Gather,
        "gather_fp32_part",
        "gather fp32 alone",
        "gather + einsum in float32 without the base linear",
        **_FLOAT32,
    ),
    part(Gather, "gather_part", "gather alone", "gather + einsum without the base linear"),
    part(Ours, "segmented_part", "ours alone", "segmented_lora(out=y) alone"),
    *(Table, Ours),
)
