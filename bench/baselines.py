"""What a LoRA layer can be computed with: the fused layer and its rivals, one class each.

All variants of a row share the frozen weight and hold the same adapter. What the report calls them,
and what stands behind each name, is in the class attributes.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lora_kernels as lk
from lora_kernels.backends import cpu
from lora_kernels.spec import native


class Variant:
    """One way to compute a row; ``trainable`` are its A and B, where it trains them.

    ``computes``: "plain" is x W^T, "merged" the LoRA output without dropout, "lora" the LoRA output
    and gradients, the mask included. Of batches that mix adapters: "mixed" is with every row's
    adapter, "part" that adapter's part alone, "nothing" no tensor to check.
    """

    key: ClassVar[str]
    label: ClassVar[str]
    what: ClassVar[str]
    package: ClassVar[str] = "torch"
    computes: ClassVar[str] = "lora"
    # Where it is measured unless told otherwise.
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    # Another project's code: its failure is a reason in the report, not a failure of the run.
    peer: ClassVar[bool] = False
    # Whether a CUDA graph can hold it; else the host's time is in its own.
    captured: ClassVar[bool] = True
    # Our operators that must have answered.
    operators: ClassVar[tuple[str, ...]] = ()
    trainable: tuple[Tensor, ...] = ()

    def __init__(self, setting: Any, inputs: Any) -> None:
        self.setting, self.inputs, self.weight = setting, inputs, inputs.weight

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """y, or one tensor for each slice."""
        raise NotImplementedError

    @classmethod
    def missing(cls, setting: Any, device: str) -> str | None:
        """Why this variant has no number in such a row, or None if it has."""
        return None

    def copies(self) -> int:
        """How many packed copies of the weight it holds after a step."""
        return 0

    @classmethod
    def but(cls, key: str, label: str, what: str, **changes: Any) -> type[Any]:
        """This variant with other attributes."""
        return type(key, (cls,), {"key": key, "label": label, "what": what} | changes)

    def own_adapter(self) -> None:
        inputs = self.inputs
        self.a, self.b = (nn.Parameter(t.clone()) for t in (inputs.lora_a, inputs.lora_b))
        self.trainable = (self.a, self.b)


class Plain(Variant):
    key, label = "plain", "plain linear"
    what = "F.linear with the frozen weight, no adapter: the floor"
    computes = "plain"

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Merged(Plain):
    key, label = "merged", "merged"
    what = "F.linear with the adapter folded into the weight: no dropout, trains nothing"
    devices = ("cuda",)
    computes = "merged"

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        delta = inputs.lora_b.double() @ inputs.lora_a.double() * setting.scale
        self.weight = (inputs.weight.double() + delta).to(inputs.weight.dtype)


def naive(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
    return F.linear(x, weight) + scale * F.linear(F.linear(F.dropout(x, p), a), b)


class Eager(Variant):
    key, label = "eager", "eager"
    what = "F.linear(x, W) + scale * (dropout(x) A^T) B^T as written, by autograd"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    function: Any = staticmethod(naive)

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        self.own_adapter()

    def forward(self, x: Tensor) -> Tensor:
        setting = self.setting
        return self.function(x, self.weight, self.a, self.b, setting.scale, setting.p)


class Compiled(Eager):
    key, label = "compiled", "torch.compile"
    what = "torch.compile of the eager line, for exactly these shapes"
    # Where there is no compiler, the report says so.
    peer = True

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        self.function = torch.compile(naive, dynamic=False)


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


class Addmm(Eager):
    key, label = "addmm", "addmm_"
    what = "F.linear, then the tail by in-place addmm_, with a hand-written backward"
    devices = ("cpu", "cuda")
    function = _AddmmFunction.apply


class Peft(Variant):
    key, label = "peft", "PEFT"
    what = "PEFT's lora.Linear, adapter in the dtype of the base"
    package = "peft"
    adapter_dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, setting: Any, inputs: Any) -> None:
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
        layers: Any = self.layer.lora_A["default"], self.layer.lora_B["default"]
        for layer, values in zip(layers, (inputs.lora_a, inputs.lora_b), strict=True):
            layer.weight = nn.Parameter(values.to(dtype, copy=True))
        self.trainable = tuple(layer.weight for layer in layers)
        self.layer.train(_trains(setting))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    @classmethod
    def missing(cls, setting: Any, device: str) -> str | None:
        return peft_missing() or _same(cls.adapter_dtype, setting, cls.__base__)


class Ours(Variant):
    """A FusedLoRALinear over the frozen weight."""

    package = "lora_kernels"
    operators: ClassVar[tuple[str, ...]] = ("lora_linear_fwd",)
    pack_weight: ClassVar[str] = "eval"
    layer: lk.FusedLoRALinear

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def copies(self) -> int:
        """Fails where they are not those that the variant is reported with."""
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

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        self.layer = packed_linear(inputs.weight)

    @classmethod
    def missing(cls, setting: Any, device: str) -> str | None:
        if setting.mode == "training":
            return "a merged layer trains nothing"
        return unpacked_reason(setting, device)


class Fused(Ours):
    key, label = "fused", "fused"
    what = "lora_kernels.FusedLoRALinear, adapter in the dtype of the base"
    adapter_dtype: ClassVar[torch.dtype | None] = None

    def __init__(self, setting: Any, inputs: Any) -> None:
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
    def missing(cls, setting: Any, device: str) -> str | None:
        if cls.pack_weight == "eval":
            return _same(cls.adapter_dtype, setting, cls.__base__)
        if _trains(setting) != (cls.pack_weight == "always"):
            return "the same as 'fused'"
        return unpacked_reason(setting, device)


def _same(adapter_dtype: torch.dtype | None, setting: Any, other: Any) -> str | None:
    if adapter_dtype == torch.float32 and setting.dtype == "float32":
        return f"the same as {other.key!r} in float32"
    return None


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


def keyed(*variants: type[Variant]) -> dict[str, type[Variant]]:
    return {variant.key: variant for variant in variants}


VARIANTS = keyed(
    *(Plain, Merged, Eager, Compiled, Addmm, Peft),
    Peft.but(
        "peft_fp32",
        "PEFT, fp32 adapter",
        "PEFT's lora.Linear as people run it: float32 adapter on a half-precision base",
        adapter_dtype=torch.float32,
    ),
    Fused.but(
        "fused_fp32",
        "fused, fp32 adapter",
        "FusedLoRALinear as its default is: float32 adapter on a half-precision base",
        devices=("cuda",),
        adapter_dtype=torch.float32,
    ),
    Packed,
    Fused.but(
        "unpacked",
        "fused, never packed",
        'the fused layer with pack_weight="never": it reads the weight as it lies',
        devices=("cpu",),
        pack_weight="never",
    ),
    Fused.but(
        "always",
        "fused, always packed",
        'the fused layer with pack_weight="always": copies for training\'s forward and its dX',
        devices=("cpu",),
        pack_weight="always",
    ),
    Fused,
)


def frozen_linear(weight: Tensor) -> nn.Linear:
    n, k = weight.shape
    linear = nn.Linear(k, n, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _trains(setting: Any) -> bool:
    return setting.mode == "training" or setting.p > 0


def version(package: str) -> str:
    if package == "lora_kernels":
        return lk.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
