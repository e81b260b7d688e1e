"""What others train a LoRA linear with, as variants of the fused layer: LoRAFusion's kernels and
Unsloth's autograd function."""

from __future__ import annotations

import logging
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from lora_kernels.testing.linear import Inputs

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
        return peers.unavailable(cls, setting, device)

    @classmethod
    def load(cls) -> Any:
        """The peer's function; raises ``peers.MissingPeerError``."""
        raise NotImplementedError


@peers.load_once
def _lorafusion() -> Any:
    own = {
        "lorafusion.utils.common": {"get_device_short_name": _short_device_name},
        # Written for a descriptor interface that Triton has dropped; where that is so, the function
        # that the other file defines is chosen by its own code.
        "lorafusion.ops.triton_ops.tma_utils": {"HAS_TMA_DESC": False},
        "lorafusion.ops.triton_ops.fused_lora_xw_sb_tma": {},
        "lorafusion.ops.triton_ops.fused_lora_dyw_dsa_tma": {},
    }
    foreign = {"loguru": {"logger": logging.getLogger("lorafusion")}}
    (module,) = peers.load("lorafusion", ["lorafusion.ops.lora_v1"], own, foreign)
    return module.fused_linear_lora


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
    load = staticmethod(_lorafusion)

    def forward(self, x: Tensor) -> Tensor:
        s, weights = self.setting, (self.weight, self.a, self.b)
        # It takes a batch of sequences alone.
        return self.engine(x[None], *weights, alpha=s.scale, seed=_SEED, dropout_p=s.p)[0]


@peers.load_once
def _unsloth() -> Any:
    own = {
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
    (module,) = peers.load("unsloth", ["unsloth.kernels.fast_lora"], own, foreign)
    return module.LoRA_W


class Unsloth(Peer):
    key, label = "unsloth", "Unsloth"
    what = "Unsloth's autograd function of one linear, LoRA_W (its apply_lora_o)"
    package = "unsloth"
    load = staticmethod(_unsloth)

    def forward(self, x: Tensor) -> Tensor:
        arguments = (x[None], self.weight, None, self.a, self.b, self.setting.scale)
        # What apply_lora_o gives it where the layer has no dropout, or has.
        dropout = (self.setting.p, None) if self.setting.p else ()
        return self.engine.apply(*arguments, *dropout)[0]


TRAINING_PEERS: dict[str, type[Variant]] = {
    variant.key: variant for variant in (LoraFusion, Unsloth)
}
