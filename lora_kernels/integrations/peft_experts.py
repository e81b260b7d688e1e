"""``FusedParamWrapper``: what PEFT's wrapper around a 3-D Parameter of experts
(``target_parameters``) is while our kernels answer its calls.

PEFT adds the delta of the whole weight in every forward, by a parametrisation. Here the outermost
wrapper computes the experts in one grouped product a Parameter, with the A and B of all wrappers
inside it. PEFT's forward answers, and the reason is counted, where the base is not what
transformers decorates as experts, a module has a hook or a forward of its own, several adapters are
active, or the call is traced by torch.jit or transformed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..functional import ops
from ..layers import routed
from .peft_calls import Calls
from .peft_layers import is_called_plainly

# A call that is not counted: without an adapter to compute, or inside another wrapper's.
_NOTHING = ""


class FusedParamWrapper(ParamWrapper):
    """``peft.tuners.lora.ParamWrapper`` on our kernels; made by :func:`swap`."""

    kernel_calls: Calls

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the experts inside: hidden_states [T, H], top_k_index and top_k_weights [T, k]."""
        if self.disable_adapters:
            y: Tensor = super().forward(x, *args, **kwargs)
            return y
        found = self._factors(kwargs)
        counts = not torch.compiler.is_compiling()
        if isinstance(found, str):
            if counts and found is not _NOTHING:
                self.kernel_calls.fall_back(found)
            y = super().forward(x, *args, **kwargs)
            return y
        if counts:
            self.kernel_calls.fused += 1
        return routed.experts_forward(self.get_base_layer(), found, x, *args, **kwargs)

    def warmup_call(
        self, rows: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """For :func:`lora_kernels.warmup`; counts as no call."""
        base, found = self.get_base_layer(), self._factors({})
        if isinstance(found, str):
            # PEFT's forward answers: there is nothing to compile.
            return torch.zeros(0), lambda x: x.detach()
        x, *routing = routed.warmup_inputs(base, rows, dtype)
        return x, lambda x: routed.experts_forward(base, found, x, *routing)

    def _factors(self, kwargs: dict[str, Any]) -> dict[str, routed.Factors] | str:
        """The active adapters of this wrapper and of those inside it; or why PEFT's forward has to
        be called."""
        base: Any = self.get_base_layer()
        if _is_parametrised(base):
            return _NOTHING
        if "adapter_names" in kwargs:
            return "adapter_names on experts"
        if ops.is_transformed() or torch._C._get_tracing_state() is not None:
            return "experts traced by torch.jit or transformed"
        reason = routed.unsupported_reason(base)
        if reason is not None:
            return f"its base {reason}"
        if not is_called_plainly(base):
            return "a hook, or a forward of its own, on the experts"
        factors: dict[str, routed.Factors] = {}
        for wrapper in _chain(self):
            if wrapper is not self and not is_called_plainly(wrapper):
                return "a hook, or a forward of its own, on a wrapper"
            own = _active_factors(wrapper, base)
            if isinstance(own, str):
                return own
            if own is not None:
                factors[wrapper.parameter_name] = own
        return factors or _NOTHING


# PEFT knows its wrapper by this name, when it adds another adapter. Pickles go by __qualname__.
FusedParamWrapper.__name__ = ParamWrapper.__name__


def _is_parametrised(base: Any) -> bool:
    """Whether something else than bitsandbytes' decoding is: an adapter, by PEFT's forward."""
    names = getattr(base, "parametrizations", ())
    return any(routed.weight_of(base, name) is None for name in names)


def _chain(layer: Any) -> list[ParamWrapper]:
    """The wrapper and those inside it."""
    found = []
    while isinstance(layer, ParamWrapper):
        found.append(layer)
        layer = layer.base_layer
    return found


def _active_factors(wrapper: Any, base: Any) -> routed.Factors | None | str:
    """A, B and the scale of the one active adapter, None without one; or why not."""
    if wrapper.merged or wrapper.disable_adapters:
        return None
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if not names:
        return None
    if len(names) > 1:
        return "several active adapters on experts"
    parts = wrapper.lora_A[names[0]], wrapper.lora_B[names[0]]
    if any(type(part) is not nn.Linear or not is_called_plainly(part) for part in parts):
        return "lora_A or lora_B is no plain nn.Linear"
    a, b = (part._parameters["weight"] for part in parts)
    if type(a) not in ops.PLAIN or type(b) not in ops.PLAIN or parts[1].bias is not None:
        return "a weight of the adapter that is no plain Parameter"
    count, in_features, out_features = routed.sizes(base, wrapper.parameter_name)
    if a.shape[1] != in_features or b.shape[0] != out_features or a.shape[0] % count:
        return "shapes that do not fit"
    scaling: Any = wrapper.scaling[names[0]]
    return routed.Factors(*routed.stored_factors(a, b, count), scaling)


def unsupported_reason(layer: ParamWrapper) -> str | None:
    """Why no call of this wrapper could be fused, or None if some could."""
    base: Any = layer.get_base_layer()
    reason = routed.unsupported_reason(base)
    if reason is not None:
        return f"is a ParamWrapper, and its base {reason}"
    if layer.parameter_name not in routed.expert_matrices(base):
        return f"wraps {layer.parameter_name}, which is no matrix of these experts"
    return None


def swap(layer: Any, calls: Calls) -> None:
    """Make a wrapper for which :func:`unsupported_reason` is None a :class:`FusedParamWrapper`."""
    layer.__class__ = FusedParamWrapper
    layer.kernel_calls = calls


def restore(layer: Any) -> None:
    """Undo :func:`swap`."""
    vars(layer).pop("kernel_calls", None)
    layer.__class__ = ParamWrapper


def description(layer: Any) -> str:
    """ "kind.Parameter [E, out, in], adapters" of a swapped wrapper."""
    base = layer.get_base_layer()
    count, in_features, out_features = routed.sizes(base, layer.parameter_name)
    adapters = [f"{name} r={a.weight.shape[0] // count}" for name, a in layer.lora_A.items()]
    kind = f"{type(base).__name__}.{layer.parameter_name}"
    return f"{kind} [{count}, {out_features}, {in_features}], {', '.join(adapters)}"
