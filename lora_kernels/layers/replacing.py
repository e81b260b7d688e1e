"""Which modules a layer with an adapter can replace, and what it takes over from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..functional.checks import is_foreign
from ..spec.four_bit import quant_state_of
from .foreign import is_conv1d, is_dispatched, is_falcon_linear, is_linear_4bit, restore_quant_state
from .four_bit_parameter import FourBitParameter
from .packed import PackedLinear

# What a replacement takes over from the module it replaces: the very dicts, so that handles still
# remove their hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

# Methods that a subclass may have of its own without another result or another state.
_HARMLESS = frozenset(
    ["__init__", "__new__", "__init_subclass__", "__repr__", "_get_name", "extra_repr"]
    + ["reset_parameters", "__annotate__", "__annotate_func__", "_compiled_call_impl"]
)

# As they were when this was imported: a class may be given others at any time.
_LINEAR_FORWARD = nn.Linear.forward

_BASE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def unsupported_reason(module: nn.Module) -> str | None:
    """Why no layer of ours can replace the linear layer ``module``, or None if one can."""
    kind = type(module).__name__
    if holds_four_bits(module):
        return _four_bit_reason(module)
    if isinstance(module, PackedLinear):
        return f"is a {kind} already"
    transposed = is_conv1d(module)
    if not isinstance(module, nn.Linear) and not transposed:
        return f"is a {kind}, neither nn.Linear nor transformers' Conv1D"
    plain = type(module).forward is _LINEAR_FORWARD or is_falcon_linear(module)
    if not transposed and not plain:
        return f"is a {kind}, a linear layer with a forward of its own"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "its forward is never called: nn.MultiheadAttention reads its weight"
    if isinstance(module.weight, nn.UninitializedParameter):
        return "is lazy: its weight has no shape yet"
    return _weight_reason(module) or own_behaviour(module)


def holds_four_bits(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer with a four-bit weight that we can read: ours, or
    bitsandbytes' ``Linear4bit``."""
    ours = isinstance(module, PackedLinear) and "lora_A" not in module._parameters
    if is_linear_4bit(module):
        restore_quant_state(module)
    elif not ours:
        return False
    return getattr(module._parameters.get("weight"), "quant_state", None) is not None


def _four_bit_reason(module: nn.Module) -> str | None:
    try:
        quant_state_of(module.weight)
    except ValueError as error:
        return f"has a four-bit weight that cannot be read: {error}"
    if not is_forward_of_class(module):
        return "computes in its own way: a forward was set on the module object"
    return None


def own_behaviour(module: nn.Module) -> str | None:
    """What ``module`` does besides the forward of its class, which a replacement by its weight and
    bias would lose, as a reason to leave it; or None."""
    kind = type(module)
    overridden: list[str] = []
    for cls in kind.__mro__:
        if "forward" in vars(cls):
            break
        overridden += _methods(vars(cls))
    if overridden:
        return f"is a {kind.__name__}, which overrides {_some(overridden)}"
    set_on_it = _methods(vars(module))
    if "forward" in set_on_it and is_forward_of_class(module):
        set_on_it.remove("forward")
    if set_on_it:
        return f"computes in its own way: {_some(set_on_it)} was set on the module object"
    held = (*module._parameters, *module._buffers, *module._modules)
    more = [name for name in held if name not in ("weight", "bias")]
    if more:
        return f"holds more than weight and bias: {_some(more)}"
    # These hold the module that they were made for.
    if any(getattr(h, "with_module", False) for h in module._load_state_dict_pre_hooks.values()):
        return "has a load_state_dict pre-hook of its own"
    return None


def _methods(names: Mapping[str, Any]) -> list[str]:
    """Those of ``names`` that replace a method of ``nn.Module``."""
    return [
        name
        for name, value in names.items()
        if name not in _HARMLESS
        and (callable(value) or isinstance(value, (property, classmethod, staticmethod)))
        and hasattr(nn.Module, name)
    ]


def is_forward_of_class(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class, perhaps inside one that is carried
    along."""
    forward = vars(module).get("forward")
    own = forward is None or getattr(forward, "__func__", None) is type(module).forward
    return own or is_dispatched(module)


def _weight_reason(module: nn.Module) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return "its weight is no 2-D Parameter (parametrised, pruned or sharded)"
    bias = module._parameters.get("bias")
    if bias is None and module.bias is not None:
        return "its bias is no Parameter (parametrised or pruned)"
    for name, parameter in module.named_parameters(recurse=False):
        if is_foreign(parameter):
            kind = type(parameter).__name__
            return f"has a {name} of {kind}, no plain Parameter (PEFT adapts quantised layers)"
        if parameter.layout is not torch.strided or parameter.is_nested:
            return f"its {name} is sparse or nested"
    if weight.dtype not in _BASE_DTYPES:
        return f"its weight is {weight.dtype}"
    return None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def replace_modules(root: nn.Module, successors: Mapping[nn.Module, nn.Module]) -> None:
    """Put the successor of each module at all the places that it has below ``root``."""
    for parent in list(root.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in successors:
                setattr(parent, name, successors[child])


def share_linear(layer: PackedLinear, module: nn.Module) -> None:
    """Give ``layer`` the Parameters and the hooks of ``module``, an ``nn.Linear`` or Conv1D."""
    layer.fan_in_fan_out = is_conv1d(module)
    weight = cast(nn.Parameter, module.weight)
    quant = quant_state_of(weight)
    if quant is not None:
        held: Any = module
        layer.fan_in_fan_out |= getattr(held, "fan_in_fan_out", False)
        layer.compute_dtype = held.compute_dtype
        if type(weight) is nn.Parameter:
            # Of a layer of bitsandbytes that was pickled.
            weight = FourBitParameter(weight.data, quant)
    shape = weight.shape if quant is None else quant.shape
    shape = shape[::-1] if layer.fan_in_fan_out else shape
    layer.out_features, layer.in_features = shape
    layer.weight, layer.bias = weight, cast(nn.Parameter, module.bias)
    share_hooks(layer, module)


def features(module: nn.Module) -> tuple[int, int]:
    """The width of the input and of the output of a linear layer or Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    inside, outside = cast(nn.Parameter, module.weight).shape
    return inside, outside


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a layer's weight, or the one that a four-bit layer computes in."""
    weight: Any = module.weight
    quant = quant_state_of(weight)
    held: Any = module
    return weight.dtype if quant is None else held.compute_dtype or quant.dtype


def share_hooks(layer: nn.Module, module: nn.Module) -> None:
    for name in _HOOKS:
        setattr(layer, name, getattr(module, name))


_made: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def become(module: nn.Module, family: type[nn.Module]) -> None:
    """Give ``module`` the subclass of ``family`` and its own class, whose ``_kind`` that is."""
    _set_class(module, _class_of(family, type(module)))


def put_back(module: Any) -> nn.Module:
    """Give the module the class back that it had before :func:`become`."""
    _set_class(module, module._kind)
    return cast(nn.Module, module)


def _class_of(family: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    if (family, kind) not in _made:
        name = family.__name__.removesuffix("Experts") + kind.__name__
        classes = family, *vars(kind).get("_classes", (kind,))
        own = {"_kind": kind, "_classes": classes}
        own["__reduce__"] = lambda self: (_blank, classes, self.__dict__)
        _made[family, kind] = type(name, (family, kind), own)
    return _made[family, kind]


def _blank(*classes: type[nn.Module]) -> nn.Module:
    """An instance without a state, of the last class and the families that it became one of."""
    *families, made = classes
    for family in reversed(families):
        made = _class_of(family, made)
    return made.__new__(made)


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    dispatched = is_dispatched(module)
    module.__class__ = kind
    if dispatched:
        # accelerate's hook calls the forward that it found.
        vars(module)["_old_forward"] = kind.forward.__get__(module)
