"""What a LoRA layer can be computed with: the fused layer and its rivals, one class each.

All variants of a row share the frozen weight and hold the same adapter. What the report calls them,
and what stands behind each name, is in the class attributes.
"""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.backends import cpu
from lora_kernels.spec import native
from lora_kernels.testing.linear import Inputs

from .cases import Setting

# plain: x W^T. merged: the LoRA output without dropout. lora: the LoRA output and gradients, the
# mask included.
Computes = Literal["plain", "merged", "lora"]


class Variant:
    """One way to compute the layer; ``trainable`` are its A and B, where it trains them."""

    key: ClassVar[str]
    label: ClassVar[str]
    what: ClassVar[str]
    package: ClassVar[str] = "torch"
    computes: ClassVar[Computes] = "lora"
    # Where it is measured unless told otherwise.
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    # Somebody else's code, whose failure is a reason and no failure of the run.
    peer: ClassVar[bool] = False
    trainable: tuple[Tensor, ...] = ()

    def __init__(self, setting: Setting, inputs: Inputs) -> None:
        self.setting = setting
        self.weight = inputs.weight

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    @classmethod
    def missing(cls, setting: Setting, device: str) -> str | None:
        """Why this variant has no number in such a row, or None if it has."""
        return None

    def _own_adapter(self, inputs: Inputs) -> None:
        self.a = nn.Parameter(inputs.lora_a.clone())
        self.b = nn.Parameter(inputs.lora_b.clone())
        self.trainable = (self.a, self.b)


class Plain(Variant):
    key, label = "plain", "plain linear"
    what = "F.linear with the frozen weight, no adapter: the floor"
    computes = "plain"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Merged(Variant):
    key, label = "merged", "merged"
    what = "F.linear with the adapter folded into the weight: no dropout, trains nothing"
    devices = ("cuda",)
    computes = "merged"

    def __init__(self, setting: Setting, inputs: Inputs) -> None:
        super().__init__(setting, inputs)
        delta = inputs.lora_b.double() @ inputs.lora_a.double() * setting.scale
        self.weight = (inputs.weight.double() + delta).to(inputs.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def naive(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    return F.linear(x, weight) + scale * F.linear(F.linear(F.dropout(x, p), a), b)


class Eager(Variant):
    key, label = "eager", "eager"
    what = "F.linear(x, W) + scale * (dropout(x) A^T) B^T as written, by autograd"
    devices = ("cuda",)

    def __init__(self, setting: Setting, inputs: Inputs) -> None:
        super().__init__(setting, inputs)
        self._own_adapter(inputs)

    def forward(self, x: Tensor) -> Tensor:
        setting = self.setting
        return naive(x, self.weight, self.a, self.b, setting.scale, setting.p)


class Compiled(Variant):
    key, label = "compiled", "torch.compile"
    what = "torch.compile of the eager line, for exactly these shapes"
    devices = ("cuda",)

    def __init__(self, setting: Setting, inputs: Inputs) -> None:
        super().__init__(setting, inputs)
        self._own_adapter(inputs)
        self.compiled = torch.compile(naive, dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        setting = self.setting
        return self.compiled(x, self.weight, self.a, self.b, setting.scale, setting.p)

    @classmethod
    def missing(cls, setting: Setting, device: str) -> str | None:
        return _compiler_missing(device)


@functools.cache
def _compiler_missing(device: str) -> str | None:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    # Inductor raises what its compilers raise: any of it means that users have no torch.compile
    # here either.
    except Exception as error:
        first_line = (str(error).strip() or repr(error)).splitlines()[0]
        return f"torch.compile does not work here: {first_line[:200]}"
    return None


class _AddmmFunction(torch.autograd.Function):
    """The library's GEMM, in-place updates and a backward by hand: eager code at its best."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, p: float
    ) -> Tensor:
        mask = None
        dropped = x
        if p:
            dropped, mask = torch.native_dropout(x, p, True)
        s = torch.mm(dropped, a.t())
        y = F.linear(x, weight)
        y.addmm_(s, b.t(), alpha=scale)
        ctx.save_for_backward(dropped, s, weight, a, b, mask)
        ctx.scale, ctx.p = scale, p
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, s, weight, a, b, mask = ctx.saved_tensors
        d = torch.mm(dy, b)
        dx = torch.mm(dy, weight)
        if mask is None:
            dx.addmm_(d, a, alpha=ctx.scale)
        else:
            dx.addcmul_(torch.mm(d, a), mask, value=ctx.scale / (1.0 - ctx.p))
        da = torch.mm(d.t(), dropped).mul_(ctx.scale)
        db = torch.mm(dy.t(), s).mul_(ctx.scale)
        return dx, None, da, db, None, None


class Addmm(Variant):
    key, label = "addmm", "addmm_"
    what = "F.linear, then the tail by in-place addmm_, with a hand-written backward"

    def __init__(self, setting: Setting, inputs: Inputs) -> None:
        super().__init__(setting, inputs)
        self._own_adapter(inputs)

    def forward(self, x: Tensor) -> Tensor:
        setting = self.setting
        return _AddmmFunction.apply(x, self.weight, self.a, self.b, setting.scale, setting.p)


class Peft(Variant):
    key, label = "peft", "PEFT"
    what = "PEFT's lora.Linear, adapter in the dtype of the base"
    package = "peft"
    adapter_dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, setting: Setting, inputs: Inputs) -> None:
        super().__init__(setting, inputs)
        import peft

        config = peft.LoraConfig(
            r=setting.r,
            lora_alpha=setting.alpha,
            lora_dropout=setting.p,
            target_modules=["linear"],
        )
        model = nn.ModuleDict({"linear": frozen_linear(inputs.weight)})
        peft.inject_adapter_in_model(config, model)
        self.layer = cast(Any, model["linear"])
        dtype = self.adapter_dtype or inputs.weight.dtype
        a: Any = self.layer.lora_A["default"]
        b: Any = self.layer.lora_B["default"]
        a.weight = nn.Parameter(inputs.lora_a.to(dtype, copy=True))
        b.weight = nn.Parameter(inputs.lora_b.to(dtype, copy=True))
        self.trainable = (a.weight, b.weight)
        self.layer.train(_trains(setting))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    @classmethod
    def missing(cls, setting: Setting, device: str) -> str | None:
        return peft_missing() or _same_as(cls.adapter_dtype, setting, "peft")


class PeftFloat32(Peft):
    key, label = "peft_fp32", "PEFT, fp32 adapter"
    what = "PEFT's lora.Linear as people run it: float32 adapter on a half-precision base"
    adapter_dtype = torch.float32


class Ours(Variant):
    """A FusedLoRALinear over the frozen weight."""

    package = "lora_kernels"
    pack_weight: ClassVar[str] = "eval"
    layer: lk.FusedLoRALinear

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def copies(self) -> int:
        """How many packed copies of the weight the layer holds after a step; fails where they are
        not those that the variant is reported with."""
        wanted = 2 if self.setting.mode == "training" else 1
        never = self.pack_weight == "never" or (self.pack_weight == "eval" and self.layer.training)
        if never or unpacked_reason(self.setting, self.weight.device.type):
            wanted = 0
        found = len(self.layer._packed)
        assert found == wanted, f"{self.key} {self.setting}: {found} packed copies, not {wanted}"
        return found


class Packed(Ours):
    key, label = "packed", "packed linear"
    what = "our own packed linear: a merged FusedLoRALinear, r = 0 of the fused layer's kernel"
    computes = "plain"
    devices = ("cpu",)

    def __init__(self, setting: Setting, inputs: Inputs) -> None:
        super().__init__(setting, inputs)
        self.layer = packed_linear(inputs.weight)

    @classmethod
    def missing(cls, setting: Setting, device: str) -> str | None:
        if setting.mode == "training":
            return "a merged layer trains nothing"
        return unpacked_reason(setting, device)


class Fused(Ours):
    key, label = "fused", "fused"
    what = "lora_kernels.FusedLoRALinear, adapter in the dtype of the base"
    adapter_dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, setting: Setting, inputs: Inputs) -> None:
        super().__init__(setting, inputs)
        self.layer = lk.FusedLoRALinear.from_linear(
            frozen_linear(inputs.weight),
            r=setting.r,
            lora_alpha=setting.alpha,
            lora_dropout=setting.p,
            autocast_adapter_dtype=self.adapter_dtype == torch.float32,
            pack_weight=self.pack_weight,
        )
        self.layer.set_lora(inputs.lora_a, inputs.lora_b, lora_alpha=setting.alpha)
        assert self.layer.lora_A is not None and self.layer.lora_B is not None
        self.trainable = (self.layer.lora_A, self.layer.lora_B)
        self.layer.train(_trains(setting))

    @classmethod
    def missing(cls, setting: Setting, device: str) -> str | None:
        return _same_as(cls.adapter_dtype, setting, "fused")


class FusedFloat32(Fused):
    key, label = "fused_fp32", "fused, fp32 adapter"
    what = (
        "lora_kernels.FusedLoRALinear as its default is: float32 adapter on a half-precision base"
    )
    devices = ("cuda",)
    adapter_dtype = torch.float32


class FusedUnpacked(Fused):
    key, label = "unpacked", "fused, never packed"
    what = 'the fused layer with pack_weight="never": it reads the weight as it lies'
    devices = ("cpu",)
    pack_weight = "never"

    @classmethod
    def missing(cls, setting: Setting, device: str) -> str | None:
        if _trains(setting):
            return "the same as 'fused' where it trains"
        return unpacked_reason(setting, device)


class FusedAlways(Fused):
    key, label = "always", "fused, always packed"
    what = 'the fused layer with pack_weight="always": copies for training\'s forward and its dX'
    devices = ("cpu",)
    pack_weight = "always"

    @classmethod
    def missing(cls, setting: Setting, device: str) -> str | None:
        if not _trains(setting):
            return "the same as 'fused' in eval mode"
        return unpacked_reason(setting, device)


def unpacked_reason(setting: Any, device: str) -> str | None:
    """Why no weight is packed in such a row, or None if one is."""
    if device != "cpu":
        return "weights are packed for the CPU's kernels only"
    if cpu.packs(torch.empty(0, dtype=getattr(torch, setting.dtype))):
        return None
    return f"no weight is packed here: {native.why_not() or setting.dtype}"


def packed_linear(weight: Tensor) -> lk.FusedLoRALinear:
    """Our packed linear without an adapter: its B is zero, so that it merges the plain weight."""
    layer = lk.FusedLoRALinear.from_linear(frozen_linear(weight), r=1).eval()
    layer.merge()
    return layer


def peft_missing() -> str | None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        return f"peft cannot be imported: {error}"
    return None


VARIANTS: dict[str, type[Variant]] = {
    variant.key: variant
    for variant in (
        Plain,
        Merged,
        Eager,
        Compiled,
        Addmm,
        Peft,
        PeftFloat32,
        FusedFloat32,
        Packed,
        FusedUnpacked,
        FusedAlways,
        Fused,
    )
}


def frozen_linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _trains(setting: Setting) -> bool:
    return setting.mode == "training" or setting.p > 0


def _same_as(adapter_dtype: torch.dtype | None, setting: Setting, other: str) -> str | None:
    if adapter_dtype == torch.float32 and setting.dtype == "float32":
        return f"the same as {other!r} in float32"
    return None


def version(package: str) -> str:
    if package == "lora_kernels":
        return lk.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
