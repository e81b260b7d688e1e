"""What others train a LoRA linear with, as variants of the fused layer: LoRAFusion's kernels and
Unsloth's autograd function.

A copy that is not there is a reason (``missing``), whatever a peer raises becomes one
(``peers.tolerated``).
"""

from __future__ import annotations

import functools
import importlib
import logging
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from lora_kernels.testing import Inputs

from . import peers
from .baselines import Variant
from .cases import Setting

# Its seeds are the host's numbers, so a captured step has one, and every step may have the same.
_SEED = 1234
# The plans it has for a Hopper GPU, under its name for an H100; the name of any other is an error.
_HOPPER = "h100-80gb-hbm3"


class Peer(Variant):
    peer = True
    devices = ("cuda",)

    def __init__(self, setting: Setting, inputs: Inputs) -> None:
        super().__init__(setting, inputs)
        self._own_adapter(inputs)
        self.engine = self.load()

    @classmethod
    def missing(cls, setting: Setting, device: str) -> str | None:
        if device != "cuda":
            return "it is measured on a GPU"
        if setting.dtype not in ("bfloat16", "float16"):
            return f"it takes no {setting.dtype}"
        try:
            cls.load()
        except peers.MissingPeerError as error:
            return str(error)
        return None

    @classmethod
    def load(cls) -> Any:
        """The peer's function; raises ``peers.MissingPeerError``."""
        raise NotImplementedError


@functools.cache
def _lorafusion() -> Any:
    logger = logging.getLogger("lorafusion")
    # Of its utilities the kernels' files need two names; the rest is for their own benchmarks.
    bench = {name: peers.unused(name) for name in ("benchmark", "set_warmup_and_number")}
    compare = "assert_verbose_allclose_two_rounds"
    # Written for a descriptor interface that Triton has dropped; where that is so, the function
    # that the other file defines is chosen by its own code.
    descriptors = {"HAS_TMA_DESC": False}
    files = "lorafusion.ops.triton_ops"
    own = {
        "lorafusion.utils": {},
        "lorafusion.utils.benchmark": bench,
        "lorafusion.utils.common": {"get_device_short_name": _short_device_name},
        "lorafusion.utils.testing": {compare: peers.unused(compare)},
        f"{files}.tma_utils": descriptors,
        **{
            f"{files}.{name}_tma": {f"{name}_tma": peers.unused(f"{name}_tma")}
            for name in ("fused_lora_xw_sb", "fused_lora_dyw_dsa")
        },
    }
    module = "lorafusion.ops.lora_v1"
    peers.load("lorafusion", (module,), own, {"loguru": {"logger": logger}})
    return importlib.import_module(module).fused_linear_lora


def _short_device_name() -> str:
    name = torch.cuda.get_device_name().replace("NVIDIA ", "").strip().replace(" ", "-").lower()
    return _HOPPER if torch.cuda.get_device_capability()[0] == 9 else name


class LoraFusion(Peer):
    key, label = "lorafusion", "LoRAFusion"
    what = (
        "LoRAFusion's fused_linear_lora without descriptors, by its plans for an H100 on any "
        "Hopper GPU; one dropout seed for all steps"
    )
    package = "lorafusion"

    def forward(self, x: Tensor) -> Tensor:
        setting = self.setting
        # It takes a batch of sequences alone.
        y = self.engine(
            x[None],
            self.weight,
            self.a,
            self.b,
            alpha=setting.scale,
            seed=_SEED,
            dropout_p=setting.p,
        )
        return y[0]

    @classmethod
    def load(cls) -> Any:
        return _lorafusion()


@functools.cache
def _unsloth() -> Any:
    absent = {
        "fp8": ("weight_dequant", "fp8_linear", "can_use_fp8_rowwise_gemv", "fp8_rowwise_gemv"),
        "nvfp4": ("nvfp4_dequantize", "nvfp4_linear"),
        "int4_packed": ("int4_dequantize_weight", "int4_matmul"),
        "swiglu": ("swiglu_fg_kernel", "swiglu_DWf_DW_dfg_kernel"),
        "geglu": tuple(
            f"geglu_{form}_{way}_kernel"
            for form in ("exact", "approx")
            for way in ("forward", "backward")
        ),
    }
    own: dict[str, dict[str, Any]] = {
        f"unsloth.kernels.{file}": {name: peers.unused(name) for name in names}
        for file, names in absent.items()
    }
    # Formats of a quantized base, told by their types.
    for file, name in (("nvfp4", "NVFP4QuantState"), ("int4_packed", "Int4QuantState")):
        own[f"unsloth.kernels.{file}"][name] = type(name, (), {})
    own |= {
        "unsloth.kernels.indexing": {"long_indexing": peers.unused("long_indexing")},
        "unsloth.kernels.rms_layernorm": {},
        "unsloth.bnb_availability": {"native_kernels_ready": lambda *ignored: False},
        "unsloth.device_type": {
            "is_hip": lambda: False,
            "get_device_type": lambda: "cuda",
            "DEVICE_TYPE": "cuda",
            "DEVICE_TYPE_TORCH": "cuda",
            "DEVICE_COUNT": torch.cuda.device_count(),
            "ALLOW_PREQUANTIZED_MODELS": False,
        },
    }
    foreign = {"unsloth_zoo": {}, "unsloth_zoo.utils": {"Version": lambda text: Version(text)}}
    module = "unsloth.kernels.fast_lora"
    peers.load("unsloth", (module,), own, foreign)
    return importlib.import_module(module).LoRA_W


class Unsloth(Peer):
    key, label = "unsloth", "Unsloth"
    what = "Unsloth's autograd function of one linear, LoRA_W (its apply_lora_o)"
    package = "unsloth"

    def forward(self, x: Tensor) -> Tensor:
        arguments = (x[None], self.weight, None, self.a, self.b, self.setting.scale)
        # What apply_lora_o gives it where the layer has no dropout, or has.
        dropout = (self.setting.p, None) if self.setting.p else ()
        return self.engine.apply(*arguments, *dropout)[0]

    @classmethod
    def load(cls) -> Any:
        return _unsloth()


TRAINING_PEERS: dict[str, type[Variant]] = {
    variant.key: variant for variant in (LoraFusion, Unsloth)
}
