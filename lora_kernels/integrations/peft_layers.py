"""``FusedLinear``: the class that a LoRA layer of PEFT has while our kernels answer its calls.

Only a subclass at module level, with the attributes of its base, leaves everything of PEFT's as it
is: ``isinstance``, pickles, copies, names in ``state_dict``. Everything is read afresh in each
call, because PEFT replaces Parameters, scalings and modules behind a layer's back, and nothing is
kept that would have to notice a changed adapter: a fused optimizer or a write through ``.data``
changes values without moving ``Tensor._version``.

PEFT's forward answers, and the reason is counted, where

- an adapter is a variant (aLoRA, ...), several are active and one is DoRA, or one is not made of
  plain ``nn.Linear`` modules;
- a hook, a parametrisation or a forward of its own stands on the base layer or a module of the
  adapter, or a global hook on all modules: they expect to be called (accelerate's hooks that only
  send inputs to the weight's device are seen through);
- a weight is no plain floating tensor (quantised, sharded, tensor-parallel), dtypes or devices
  differ, or x is a tensor subclass, nested or sparse;
- the call is traced for a file (``torch.export``, ``torch.jit.trace``) or transformed
  (``torch.func``, forward-mode derivatives);
- a mixed batch (``adapter_names=``) is compiled, or meets dropout or ``lora_bias``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..functional.checks import scale_tensor
from ..functional.linear import Operands, checked_lora_linear
from ..functional.ops import PLAIN, autocast_enabled
from ..functional.segmented import segmented_linear
from ..layers import replacing
from ..layers.foreign import is_conv1d, is_dispatched, is_falcon_linear
from ..layers.norms import DoRANorms
from ..layers.packed import PackedWeight, Packing
from ..models.foreign import offload_reason
from .peft_calls import Calls
from .peft_operands import Adapter, Base, add, concatenated, stacked, table_of

_DTYPES = frozenset([torch.float16, torch.bfloat16, torch.float32, torch.float64])
_KNOWN_ARGUMENTS = frozenset(["adapter_names", "alora_offsets"])

# A call without an adapter to compute: PEFT's forward, and nothing to count.
_NOTHING = ""


class FusedLinear(Packing, lora.Linear):
    """``peft.tuners.lora.Linear`` on our kernels; made by :func:`swap`, never by a constructor."""

    kernel_calls: Calls
    _norms: DoRANorms

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in_features] -> [..., out_features], as PEFT's layer."""
        if self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        y: Tensor | str
        if not args and not kwargs:
            y = self._forward_active(x)
        elif args or not kwargs.keys() <= _KNOWN_ARGUMENTS:
            y = "arguments that the base layer would have to take"
        elif kwargs.get("adapter_names") is None:
            y = self._forward_active(x)
        else:
            y = self._forward_mixed(x, kwargs["adapter_names"])
        counts = not torch.compiler.is_compiling()
        if not isinstance(y, str):
            if counts:
                self.kernel_calls.fused += 1
            return y
        if counts and y is not _NOTHING:
            self.kernel_calls.fall_back(y)
        return super().forward(x, *args, **kwargs)

    def warmup_call(
        self, rows: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """For :func:`lora_kernels.warmup`; counts as no call."""

        def call(x: Tensor) -> Tensor:
            y = self._forward_active(x)
            return x.detach() if isinstance(y, str) else y

        layer: Any = self
        return layer.base_layer.weight.new_zeros(rows, layer.in_features, dtype=dtype), call

    def _forward_active(self, x: Tensor) -> Tensor | str:
        """The sum of the active adapters on the base; or why not."""
        held = cast(Any, self._modules["lora_A"])._modules
        active = self._active_adapter
        names = (active,) if isinstance(active, str) else active
        names = [name for name in names if name in held]
        if not names:
            return _NOTHING
        base = self._base_operands(x)
        if isinstance(base, str):
            return base
        adapters = []
        for name in names:
            adapter = self._adapter_operands(name, x, base)
            if isinstance(adapter, str):
                return adapter
            adapters.append(adapter)
        if len(adapters) == 1:
            return self._fused(x, base, adapters[0])
        if any(adapter.magnitude is not None for adapter in adapters):
            return "several active adapters, one of which is DoRA"
        return self._fused_sum(x, base, adapters)

    def _fused(self, x: Tensor, base: Base, adapter: Adapter) -> Tensor:
        bias = base.bias
        if adapter.bias is not None:
            bias = add(bias, adapter.bias * adapter.scaling)
        scale = scale_tensor(adapter.scaling, x.device, base.dtype)
        if adapter.magnitude is not None:
            return self._norms.linear(
                x,
                base.weight,
                adapter.a,
                adapter.b,
                adapter.magnitude,
                scale,
                base.bias,
                base.transposed,
                adapter.dropout_p,
                training=self.training,
            )
        packed = self._packed_copies(base.weight, base.transposed, base.dtype)
        operands = x, base.weight, adapter.a, adapter.b, scale, bias, None
        options = adapter.dropout_p, base.transposed, base.dtype, *packed
        return checked_lora_linear(Operands(*operands, *options))

    def _fused_sum(self, x: Tensor, base: Base, adapters: list[Adapter]) -> Tensor:
        # Adapters that see the same x are one adapter of the summed rank. Each mask makes an x of
        # its own, so of those with dropout one can be in the call; the others are PEFT's lines.
        together = [t for t in adapters if t.dropout_p == 0.0] or adapters[:1]
        apart = [t for t in adapters if t.dropout_p > 0.0 and t is not together[0]]
        y = self._fused(x, base, concatenated(together))
        dtype = y.dtype
        for name, _, _, _, scaling, *_ in apart:
            lora_a, lora_b = cast(Any, self.lora_A[name]), self.lora_B[name]
            rows = self._cast_input_dtype(x, lora_a.weight.dtype)
            y = y + lora_b(lora_a(self.lora_dropout[name](rows))) * scaling
        return y.to(dtype)

    def _forward_mixed(self, x: Tensor, adapter_names: Sequence[str]) -> Tensor | str:
        """Each sequence of the batch with its own adapter; or why not."""
        if torch.compiler.is_compiling():
            return "adapter_names in compiled code"
        if x.dim() < 2 or len(adapter_names) != x.shape[0]:
            # PEFT's own error.
            return _NOTHING
        held = cast(Any, self._modules["lora_A"])._modules
        names = [n for n in dict.fromkeys(adapter_names) if n != "__base__" and n in held]
        if not names:
            return _NOTHING
        base = self._base_operands(x)
        if isinstance(base, str):
            return base
        adapters = []
        for name in names:
            adapter = self._adapter_operands(name, x, base)
            if isinstance(adapter, str):
                return adapter
            if adapter.dropout_p > 0.0:
                return "adapter_names with dropout in training mode"
            if adapter.bias is not None or adapter.magnitude is not None:
                return "adapter_names with lora_bias or DoRA"
            adapters.append(adapter)
        slots = {name: slot for slot, name in enumerate(names)}
        table = table_of(
            tuple([slots.get(name, -1) for name in adapter_names]),
            math.prod(x.shape[1:-1]),
            tuple([adapter.a.shape[0] for adapter in adapters]),
            tuple([float(adapter.scaling) for adapter in adapters]),
            x.device,
        )
        return segmented_linear(
            x.to(base.dtype),
            base.weight,
            *stacked(adapters),
            table,
            base.bias,
            fan_in_fan_out=base.transposed,
            packed=self._packed_copies(base.weight, base.transposed, base.dtype),
        )

    def _base_operands(self, x: Tensor) -> Base | str:
        """What the base layer computes with; or why its forward has to be called."""
        if type(x) not in PLAIN or x.is_nested or x.layout is not torch.strided:
            return "x is no plain tensor"
        # Dynamo knows nothing of these and needs none of them.
        if not torch.compiler.is_compiling():
            if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
                return "a transformation of torch.func, or a forward-mode derivative"
            if torch._C._get_tracing_state() is not None:
                return "traced by torch.jit"
        elif _is_exporting():
            return "traced by torch.export"
        if _has_any_global_hook():
            return "a global hook on all modules"
        layer: Any = self._modules["base_layer"]
        transposed = _orientation(layer)
        if isinstance(transposed, str):
            return transposed
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if type(weight) not in PLAIN or not (bias is None or type(bias) in PLAIN):
            return "a weight of the base layer that is no plain Parameter"
        if x.device != weight.device:
            return "x and the base weight are on different devices"
        if not _is_called_plainly(layer):
            return "a hook, or a forward of its own, on the base layer"
        dtype = x.dtype
        if dtype not in _DTYPES or weight.dtype not in _DTYPES:
            return f"x is {dtype}, the base weight {weight.dtype}"
        if dtype != torch.float64 and autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            if weight.dtype == torch.float64:
                return "a float64 weight under autocast"
        elif dtype != weight.dtype:
            return f"x is {dtype}, the base weight {weight.dtype}"
        if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[0 if transposed else 1]:
            return "shapes that do not fit"
        return Base(weight, bias, transposed, dtype)

    def _adapter_operands(self, name: str, x: Tensor, base: Base) -> Adapter | str:
        """What the adapter ``name`` computes with; or why its modules have to be called."""
        variant = self.lora_variant.get(name)
        magnitude: Any = None
        if type(variant) is DoraLinearVariant:
            held = self.lora_magnitude_vector[name]
            magnitude = held.weight if _is_called_plainly(held) else None
            if type(magnitude) not in PLAIN or magnitude.device != x.device:
                return "a magnitude of DoRA that is no plain Parameter beside x, or has a hook"
        elif variant is not None:
            return f"the adapter is a {type(variant).__name__}"
        # Past nn.Module.__getattr__, which costs more than the lookup.
        modules: dict[str, Any] = self._modules
        lora_a = modules["lora_A"]._modules[name]
        lora_b = modules["lora_B"]._modules[name]
        dropout = modules["lora_dropout"]._modules[name]
        if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
            return "lora_A or lora_B is no plain nn.Linear"
        if type(dropout) is nn.Identity:
            dropout_p = 0.0
        elif type(dropout) is nn.Dropout:
            dropout_p = dropout.p if dropout.training else 0.0
        else:
            return f"the dropout is a {type(dropout).__name__}"
        if not (
            _is_called_plainly(lora_a)
            and _is_called_plainly(lora_b)
            and _is_called_plainly(dropout)
        ):
            return "a hook, or a forward of its own, on a module of the adapter"
        a: Any = lora_a._parameters.get("weight")
        b: Any = lora_b._parameters.get("weight")
        bias = lora_b._parameters.get("bias")
        if (
            type(a) not in PLAIN
            or type(b) not in PLAIN
            or not (bias is None or type(bias) in PLAIN)
            or lora_a._parameters.get("bias") is not None
        ):
            return "a weight of the adapter that is no plain Parameter"
        device = x.device
        if a.device != device or b.device != device:
            return "x and the adapter are on different devices"
        adapter_dtype = a.dtype
        if adapter_dtype not in _DTYPES or b.dtype != adapter_dtype:
            return f"lora_A is {adapter_dtype}, lora_B {b.dtype}"
        if adapter_dtype != x.dtype and base.dtype == x.dtype:
            # Outside autocast PEFT casts x, unless told not to; its result is then float64's, or
            # its error.
            if adapter_dtype == torch.float64:
                return "a float64 adapter on another base"
            if not self.cast_input_dtype_enabled:
                return "the cast of x to the adapter's dtype is switched off"
        scaling = self.scaling[name]
        if isinstance(scaling, Tensor) and (
            scaling.requires_grad or scaling.dim() != 0 or not scaling.is_floating_point()
        ):
            return "a scaling that trains, or is no single floating number"
        n, k = base.weight.shape[::-1] if base.transposed else base.weight.shape
        if a.shape[1] != k or b.shape[0] != n or a.shape[0] != b.shape[1] or not dropout_p < 1.0:
            return "shapes that do not fit, or dropout of everything"
        if magnitude is not None and bias is not None:
            return "DoRA with lora_bias"
        return Adapter(name, a, b, bias, scaling, dropout_p, magnitude)

    # What PEFT writes into the base weight, it writes through .data, a small adapter perhaps in few
    # places: the packed copies go first. While merged none is made, so unmerging finds none.

    def merge(self, *args: Any, **kwargs: Any) -> None:
        self.drop_packed()
        super().merge(*args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        # PiSSA, OLoRA and their like take their adapter out of the weight.
        self.drop_packed()
        super().update_layer(*args, **kwargs)

    def set_base_weight(self, weight_data: Tensor) -> None:
        self.drop_packed()
        super().set_base_weight(weight_data)

    def _get_name(self) -> str:
        # What PEFT prints of it is known by heart to others' code.
        return lora.Linear.__name__

    def extra_repr(self) -> str:
        return "on lora_kernels"


def lora_layers(model: nn.Module) -> dict[str, lora.LoraLayer]:
    """PEFT's LoRA layers by name; one that stands at several paths appears under its first."""
    return {n: m for n, m in model.named_modules() if isinstance(m, lora.LoraLayer)}


def unsupported_reason(layer: Any) -> str | None:
    """Why no call of this layer could be fused, or None if some could."""
    if type(layer) not in (lora.Linear, FusedLinear):
        return f"is a {type(layer).__name__}; lora.Linear is served"
    if layer.quantization_backend is not None:
        return "its base is quantised"
    base = layer.base_layer
    transposed = _orientation(base)
    if isinstance(transposed, str):
        return transposed
    reason = replacing.unsupported_reason(base)
    if reason is not None:
        return f"its base layer {reason}"
    if type(base.weight) not in PLAIN:
        return f"its weight is a {type(base.weight).__name__}"
    reason = offload_reason(layer) or offload_reason(base)
    if reason is not None:
        return reason
    if not replacing.is_forward_of_class(layer):
        return "its forward was replaced on the instance"
    reasons = [_adapter_reason(layer, name) for name in layer.lora_A]
    found = sorted({reason for reason in reasons if reason is not None})
    return ", ".join(found) if found and None not in reasons else None


def _adapter_reason(layer: Any, name: str) -> str | None:
    """Why no call of one adapter could be fused, or None."""
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"its adapter is a {type(variant).__name__}"
    for part in ("lora_A", "lora_B"):
        module = getattr(layer, part)[name]
        reason = replacing.unsupported_reason(module)
        if reason is not None or type(module) is not nn.Linear:
            return f"its {part} {reason or f'is a {type(module).__name__}'}"
    return None


def swap(layer: Any, calls: Calls, pack_weight: str) -> None:
    """Make ``layer``, for which :func:`unsupported_reason` is None, a :class:`FusedLinear`."""
    if not isinstance(layer, FusedLinear):
        layer.__class__ = FusedLinear
        layer._packed, layer._norms = PackedWeight(), DoRANorms()
        _rebind(layer)
    layer.kernel_calls = calls
    if vars(layer).get("_pack_weight") != pack_weight:
        layer.pack_weight = pack_weight


def restore(layer: Any) -> None:
    """Undo :func:`swap`."""
    for name in ("kernel_calls", "_packed", "_pack_weight", "_norms"):
        vars(layer).pop(name, None)
    layer.__class__ = lora.Linear
    _rebind(layer)


def _rebind(layer: Any) -> None:
    # accelerate keeps the forward that it found, bound, and calls that one.
    # When a hook is removed, it becomes the instance's forward.
    for name in ("_old_forward", "forward"):
        held = vars(layer).get(name)
        if getattr(held, "__func__", None) in (lora.Linear.forward, FusedLinear.forward):
            setattr(layer, name, type(layer).forward.__get__(layer))


def _is_own_forward(forward: Any, module: nn.Module) -> bool:
    """Whether ``forward`` is that of the module's class, bound."""
    return getattr(forward, "__func__", None) is type(module).forward


def _is_exporting() -> bool:
    """Whether torch.export traces the call, as told in traced code."""
    if torch.__version__ < "2.13":
        # There ``torch.compiler.is_exporting()`` is True of everything that Dynamo traces.
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


def _is_called_plainly(module: Any) -> bool:
    """Whether calling ``module`` is running its class's forward, and nothing else."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return False
    forward = module.__dict__.get("forward")
    if forward is None or _is_own_forward(forward, module):
        return True
    # With x on the weight's device, sending it there is nothing.
    if not is_dispatched(module):
        return False
    hook = module._hf_hook
    return (
        type(hook).__name__ == "AlignDevicesHook"
        and not hook.offload
        and _is_device(hook.execution_device, module)
    )


def _is_device(device: Any, module: nn.Module) -> bool:
    parameter = next(module.parameters(), None)
    if device is None or parameter is None:
        return True
    wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    index = wanted.index or 0
    return wanted.type == parameter.device.type and index == (parameter.device.index or 0)


def _orientation(module: nn.Module) -> bool | str:
    """Whether the class of ``module`` keeps its weight as [in, out]; or why it is not served."""
    kind: Any = type(module)
    forward, transposed = _ORIENTATIONS.get(kind, (None, False))
    # A class may be given another forward at any time.
    if forward is not kind.forward:
        transposed = is_conv1d(module)
        if not transposed:
            plain = kind.forward is _LINEAR_FORWARD and kind.__call__ is nn.Module.__call__
            plain = plain or is_falcon_linear(module)
            if not plain or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
                return f"its base layer is a {kind.__name__}, which does not compute as nn.Linear"
        _ORIENTATIONS[kind] = kind.forward, transposed
    return transposed


_LINEAR_FORWARD = nn.Linear.forward
_ORIENTATIONS: dict[type, tuple[Any, bool]] = {nn.Linear: (_LINEAR_FORWARD, False)}
