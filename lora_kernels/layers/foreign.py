"""What the package knows of other people's layers: transformers' Conv1D, Falcon's linear layer, the
hook that accelerate's ``device_map`` sets on a module."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from .four_bit_parameter import FourBitParameter


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, without importing transformers for it."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return (
        utils is not None
        and isinstance(module, utils.Conv1D)
        and type(module).forward is utils.Conv1D.forward
    )


def is_falcon_linear(module: nn.Module) -> bool:
    """Whether ``module`` is Falcon's linear layer: ``x @ W.T``, then ``+ bias``."""
    falcon = sys.modules.get("transformers.models.falcon.modeling_falcon")
    return falcon is not None and type(module) is falcon.FalconLinear


def is_linear_4bit(module: nn.Module) -> bool:
    """Whether ``module`` is a four-bit linear layer of bitsandbytes with the forward of its
    class."""
    modules = sys.modules.get("bitsandbytes.nn")
    if modules is None or not isinstance(module, modules.Linear4bit):
        return False
    return type(module).forward is modules.Linear4bit.forward


def restore_quant_state(module: Any) -> None:
    """Give the weight of a four-bit linear layer of bitsandbytes its state back from the layer,
    where a copy has lost it."""
    if getattr(module.weight, "quant_state", None) is None and module.quant_state is not None:
        sys.modules["bitsandbytes.nn.modules"].fix_4bit_weight_quant_state_from_module(module)


def carry_dispatch_hook(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the accelerate hook that ``dispatch_model`` (``device_map=``) put on ``old``."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None and is_dispatched(old):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)


def is_dispatched(module: nn.Module) -> bool:
    """Whether the forward that was set on ``module`` is accelerate's hook around its class's."""
    state = vars(module)
    function = getattr(state.get("forward"), "func", None)
    inner = getattr(state.get("_old_forward"), "__func__", None)
    return (
        getattr(function, "__module__", None) == "accelerate.hooks"
        and inner is type(module).forward
    )


def expert_matrices(module: nn.Module) -> tuple[str, ...]:
    """The 3-D Parameters that transformers' experts multiply with, by name; () of other modules.

    Experts are those whose class ``use_experts_implementation`` (transformers >= 5) decorated: it
    says by attributes how any implementation computes them, whatever the family.
    """
    kind: Any = type(module)
    if kind.forward is getattr(kind, "_four_bit_forward", None):
        # Ours, over experts in four bits.
        kind = kind._kind
    code = getattr(kind.forward, "__code__", None)
    if "experts_interface" not in getattr(code, "co_freevars", ()):
        return ()
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def four_bit_original(module: Any, name: str) -> FourBitParameter | None:
    """The bytes of a Parameter that bitsandbytes decodes at every access
    (``replace_parameter_4bit``), or None where it does not, or something else has a part in it."""
    known = sys.modules.get("bitsandbytes.nn.parametrize")
    held = getattr(module, "_modules", {}).get("parametrizations")
    if known is None or held is None or name not in held:
        return None
    chain = held[name]
    if len(chain) != 1 or type(chain[0]) is not known.Bnb4bitParametrization:
        return None
    return FourBitParameter(chain.original.data, chain[0].quant_state)
