"""``FusedLayer``, ``FusedLinear``: what a LoRA layer of PEFT is while our kernels answer its calls.

Only a subclass at module level, with the attributes of its base, leaves everything of PEFT's as it
is: ``isinstance``, pickles, copies, names in ``state_dict``. Everything is read afresh in each
call, because PEFT replaces Parameters, scalings and modules behind a layer's back, and nothing is
kept that would have to notice a changed adapter: a fused optimizer or a write through ``.data``
changes values without moving ``Tensor._version``.

PEFT's forward answers, and the reason is counted, where

- an adapter is a variant other than DoRA, aLoRA and MiCA, several are active and one of them is
  DoRA or aLoRA, or one is not made of plain ``nn.Linear`` modules;
- a hook, a parametrisation or a forward of its own stands on the base layer or a module of the
  adapter, or a global hook on all modules: they expect to be called (accelerate's hooks that only
  send inputs to the weight's device are seen through);
- a weight is sharded, tensor-parallel, quantised in another way than bitsandbytes' four bits or
  otherwise no plain floating tensor, dtypes or devices differ, or x is a tensor subclass, nested
  or sparse;
- the call is traced for a file (``torch.export``, ``torch.jit.trace``) or transformed
  (``torch.func``, forward-mode derivatives);
- a mixed batch (``adapter_names=``) or aLoRA is compiled, or a mixed batch meets dropout or DoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
from peft.tuners import lora
from peft.tuners.lora.variants import ALoraLinearVariant, DoraLinearVariant
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..functional.checks import scale_tensor
from ..functional.linear import Operands, checked_lora_linear
from ..functional.ops import PLAIN, autocast_enabled
from ..functional.segmented import segmented_linear
from ..layers.foreign import is_conv1d, is_dispatched, is_falcon_linear
from ..layers.norms import DoRANorms
from ..layers.packed import Packing
from ..layers.shared_input import shared_result
from .peft_calls import Calls
from .peft_operands import Adapter, Base, add, biases, concatenated, runs_of, stacked, table_of

DTYPES = frozenset([torch.float16, torch.bfloat16, torch.float32, torch.float64])
# Of each sequence, how many of its last tokens an aLoRA adapter is for.
Offsets = Sequence[int | None] | None
_KNOWN_ARGUMENTS = frozenset(["adapter_names", "alora_offsets"])

# Variants of PEFT's that are computed here, not all of which every version has: what they are
# called in reports. MiCA computes as LoRA, with a frozen B.
VARIANTS = {
    "DoraLinearVariant": "DoRA",
    "ALoraLinearVariant": "aLoRA",
    "MiCALinearVariant": "MiCA",
}

# A call without an adapter to compute: PEFT's forward, and nothing to count.
NOTHING = ""

# Reasons that all kinds of layers give.
HOOK = "a hook, or a forward of its own, on a module of the adapter"
NOT_PLAIN = "a weight of the adapter that is no plain Parameter"


class FusedLayer(Packing, lora.LoraLayer):
    """What the kinds of layers have in common. A subclass has PEFT's class as its next base; it is
    made by :func:`lora_kernels.integrations.peft_kinds.swap`, never by a constructor.
    """

    peft_class: ClassVar[type[nn.Module]]
    kernel_calls: Calls
    _norms: DoRANorms
    # Whether share_inputs has found siblings.
    _shares_input = False

    def _adapter_operands(self, name: str, x: Tensor, base: Base) -> Adapter | str:
        """What the adapter ``name`` computes with; or why PEFT's own forward has to."""
        raise NotImplementedError

    def _delta(self, name: str, x: Tensor) -> Tensor:
        """What the adapter ``name`` adds, by PEFT's modules."""
        raise NotImplementedError

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in_features] -> [..., out_features], as PEFT's layer."""
        if self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        y: Tensor | str
        if not args and not kwargs:
            shared = None
            if self._shares_input and not torch.compiler.is_compiling():
                shared = shared_result(self, x)
            y = self._forward_active(x) if shared is None else shared
        elif args or not kwargs.keys() <= _KNOWN_ARGUMENTS:
            y = "arguments that the base layer would have to take"
        elif kwargs.get("adapter_names") is None:
            y = self._forward_active(x, kwargs.get("alora_offsets"))
        else:
            y = self._forward_mixed(x, **kwargs)
        counts = not torch.compiler.is_compiling()
        if not isinstance(y, str):
            if counts:
                self.kernel_calls.fused += 1
            return y
        if counts and y is not NOTHING:
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

    def _forward_active(self, x: Tensor, offsets: Offsets = None) -> Tensor | str:
        """The sum of the active adapters on the base; or why not."""
        names = self._active_names()
        if not names:
            return NOTHING
        base = self._base_operands(x)
        if isinstance(base, str):
            return base
        adapters = []
        for name in names:
            adapter = self._adapter_operands(name, x, base)
            if isinstance(adapter, str):
                return adapter
            adapters.append(adapter)
        if len(adapters) == 1 and not adapters[0].from_invocation:
            return self._fused(x, base, adapters[0])
        if len(adapters) == 1:
            return self._by_sequence(x, base, adapters, [0] * len(x), offsets)
        if any(t.magnitude is not None or t.from_invocation for t in adapters):
            return "several active adapters, one of which is DoRA or aLoRA"
        return self._fused_sum(x, base, adapters)

    def _active_names(self) -> list[str]:
        """The active adapters that this layer has."""
        held: Any = self._modules["lora_A"]
        active = self._active_adapter
        names = (active,) if isinstance(active, str) else active
        return [name for name in names if name in held]

    def _fused(self, x: Tensor, base: Base, adapter: Adapter) -> Tensor:
        bias = base.bias
        if adapter.bias is not None:
            bias = add(bias, adapter.bias * adapter.scaling)
        scale = scale_tensor(adapter.scaling, x.device, base.dtype)
        packed = self._packed_copies(base.weight, base.transposed, base.dtype)
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
                packed,
                training=self.training,
            )
        weight = base.weight if base.quant is None else base.weight.data
        operands = x, weight, adapter.a, adapter.b, scale, bias, None
        options = adapter.dropout_p, base.transposed, base.dtype, *packed
        y = checked_lora_linear(Operands(*operands, *options, base.quant))
        return y if base.quant is None else y.to(x.dtype)

    def _fused_sum(self, x: Tensor, base: Base, adapters: list[Adapter]) -> Tensor:
        # Adapters that see the same x are one adapter of the summed rank. Each mask makes an x of
        # its own, so of those with dropout one can be in the call; the others are PEFT's lines.
        together = [t for t in adapters if t.dropout_p == 0.0] or adapters[:1]
        apart = [t for t in adapters if t.dropout_p > 0.0 and t is not together[0]]
        y = self._fused(x, base, concatenated(together))
        dtype = y.dtype
        for adapter in apart:
            y = y + self._delta(adapter.name, x)
        return y.to(dtype)

    def _forward_mixed(
        self, x: Tensor, adapter_names: Sequence[str], alora_offsets: Offsets = None
    ) -> Tensor | str:
        """Each sequence of the batch with its own adapter; or why not."""
        if x.dim() < 2 or len(adapter_names) != x.shape[0]:
            # PEFT's own error.
            return NOTHING
        held: Any = self._modules["lora_A"]
        names = [n for n in dict.fromkeys(adapter_names) if n != "__base__" and n in held]
        if not names:
            return NOTHING
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
            adapters.append(adapter)
        slots = {name: slot for slot, name in enumerate(names)}
        return self._by_sequence(
            x, base, adapters, [slots.get(name, -1) for name in adapter_names], alora_offsets
        )

    def _by_sequence(
        self, x: Tensor, base: Base, adapters: list[Adapter], slots: list[int], offsets: Offsets
    ) -> Tensor | str:
        """Sequence i of the batch with the adapter ``slots[i]``, or none for -1; or why not."""
        if torch.compiler.is_compiling():
            return "adapter_names or aLoRA in compiled code"
        if any(adapter.magnitude is not None for adapter in adapters):
            return "adapter_names with DoRA"
        tokens = math.prod(x.shape[1:-1])
        last = [tokens] * len(slots)
        if any(adapter.from_invocation for adapter in adapters):
            offsets = [0] * len(slots) if offsets is None else offsets
            if x.dim() not in (2, 3) or len(offsets) != len(slots):
                return "aLoRA on an x that is not [batch, tokens, in]"
            last = [
                int(offset or 0) if slot >= 0 and adapters[slot].from_invocation else tokens
                for slot, offset in zip(slots, offsets, strict=True)
            ]
        table = table_of(
            *runs_of(slots, tokens, last),
            tuple([adapter.a.shape[0] for adapter in adapters]),
            tuple([float(adapter.scaling) for adapter in adapters]),
            x.device,
        )
        y = segmented_linear(
            x.to(base.dtype),
            base.weight,
            *stacked(adapters),
            table,
            base.bias,
            dropout_p=adapters[0].dropout_p,
            training=True,
            fan_in_fan_out=base.transposed,
            packed=self._packed_copies(base.weight, base.transposed, base.dtype),
        )
        y = y if base.quant is None else y.to(x.dtype)
        if all(adapter.bias is None for adapter in adapters):
            return y
        added = biases(adapters)[table.slot_of_row.long()].view(y.shape)
        return (y + added).to(y.dtype)

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
        return self._base_of(self._modules["base_layer"], x)

    def _base_of(self, layer: Any, x: Tensor) -> Base | str:
        transposed = orientation(layer)
        if isinstance(transposed, str):
            return transposed
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        if type(weight) not in PLAIN or not (bias is None or type(bias) in PLAIN):
            return "a weight of the base layer that is no plain Parameter"
        if x.device != weight.device:
            return "x and the base weight are on different devices"
        if not is_called_plainly(layer):
            return "a hook, or a forward of its own, on the base layer"
        dtype = x.dtype
        if dtype not in DTYPES or weight.dtype not in DTYPES:
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

    def _dropout_of(self, name: str) -> float | str:
        """The dropout of the adapter ``name``, 0.0 in evaluation mode; or why it has to be
        called."""
        # Past nn.Module.__getattr__, which costs more than the lookup.
        dropout: Any = self._modules["lora_dropout"]._modules[name]  # type: ignore[union-attr]
        if type(dropout) is nn.Identity:
            dropout_p = 0.0
        elif type(dropout) is nn.Dropout:
            dropout_p = dropout.p if dropout.training else 0.0
        else:
            return f"the dropout is a {type(dropout).__name__}"
        return dropout_p if is_called_plainly(dropout) else HOOK

    def _misfit(self, adapter: Adapter, x: Tensor, base: Base) -> str:
        """Why the kernels cannot compute ``adapter``, or nothing."""
        _, a, b, bias, scaling, dropout_p, magnitude, _ = adapter
        device = x.device
        if a.device != device or b.device != device:
            return "x and the adapter are on different devices"
        adapter_dtype = a.dtype
        if adapter_dtype not in DTYPES or b.dtype != adapter_dtype:
            return f"lora_A is {adapter_dtype}, lora_B {b.dtype}"
        if adapter_dtype != x.dtype and (base.dtype == x.dtype or base.quant is not None):
            # Outside autocast PEFT casts x, unless told not to; its result is then float64's, or
            # its error.
            if adapter_dtype == torch.float64:
                return "a float64 adapter on another base"
            if not self.cast_input_dtype_enabled:
                return "the cast of x to the adapter's dtype is switched off"
        if isinstance(scaling, Tensor) and (
            scaling.requires_grad or scaling.dim() != 0 or not scaling.is_floating_point()
        ):
            return "a scaling that trains, or is no single floating number"
        n, k = base.shape
        if a.shape[1] != k or b.shape[0] != n or a.shape[0] != b.shape[1] or not dropout_p < 1.0:
            return "shapes that do not fit, or dropout of everything"
        if magnitude is not None and bias is not None:
            return "DoRA with lora_bias"
        return ""

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
        return self.peft_class.__name__

    def extra_repr(self) -> str:
        return "on lora_kernels"


class FusedLinear(FusedLayer, lora.Linear):
    """``peft.tuners.lora.Linear`` on our kernels."""

    peft_class = lora.Linear

    def _adapter_operands(self, name: str, x: Tensor, base: Base) -> Adapter | str:
        variant = self.lora_variant.get(name)
        magnitude: Any = None
        if type(variant) is DoraLinearVariant:
            held = self.lora_magnitude_vector[name]
            magnitude = held.weight if is_called_plainly(held) else None
            if type(magnitude) not in PLAIN or magnitude.device != x.device:
                return "a magnitude of DoRA that is no plain Parameter beside x, or has a hook"
        elif variant is not None and type(variant).__name__ not in VARIANTS:
            return f"the adapter is a {type(variant).__name__}"
        modules: dict[str, Any] = self._modules
        lora_a = modules["lora_A"]._modules[name]
        lora_b = modules["lora_B"]._modules[name]
        if type(lora_a) is not nn.Linear or type(lora_b) is not nn.Linear:
            return "lora_A or lora_B is no plain nn.Linear"
        dropout_p = self._dropout_of(name)
        if isinstance(dropout_p, str):
            return dropout_p
        if not (is_called_plainly(lora_a) and is_called_plainly(lora_b)):
            return HOOK
        a: Any = lora_a._parameters.get("weight")
        b: Any = lora_b._parameters.get("weight")
        bias = lora_b._parameters.get("bias")
        if (
            type(a) not in PLAIN
            or type(b) not in PLAIN
            or not (bias is None or type(bias) in PLAIN)
            or lora_a._parameters.get("bias") is not None
        ):
            return NOT_PLAIN
        activated = type(variant) is ALoraLinearVariant
        adapter = Adapter(name, a, b, bias, self.scaling[name], dropout_p, magnitude, activated)
        return self._misfit(adapter, x, base) or adapter

    def operands_to_share(self, x: Tensor) -> Operands | None:
        """For :mod:`lora_kernels.layers.shared_input`."""
        names = self._active_names()
        if type(self) is not FusedLinear or self._disable_adapters or self.merged_adapters:
            return None
        base = self._base_operands(x)
        if isinstance(base, str) or len(names) != 1:
            return None
        t = self._adapter_operands(names[0], x, base)
        if isinstance(t, str) or t.bias is not None or t.magnitude is not None or t.from_invocation:
            return None
        packed = self._packed_copies(base.weight, base.transposed, base.dtype)
        scale: Any = t.scaling
        options = t.dropout_p, base.transposed, base.dtype, *packed
        return Operands(x, base.weight, t.a, t.b, scale, base.bias, None, *options)

    def _delta(self, name: str, x: Tensor) -> Tensor:
        lora_a, lora_b = cast(Any, self.lora_A[name]), self.lora_B[name]
        rows = self._cast_input_dtype(x, lora_a.weight.dtype)
        delta: Tensor = lora_b(lora_a(self.lora_dropout[name](rows))) * self.scaling[name]
        return delta


def _is_own_forward(forward: Any, module: nn.Module) -> bool:
    """Whether ``forward`` is that of the module's class, bound."""
    return getattr(forward, "__func__", None) is type(module).forward


def _is_exporting() -> bool:
    """Whether torch.export traces the call, as told in traced code."""
    if torch.__version__ < "2.13":
        # There ``torch.compiler.is_exporting()`` is True of everything that Dynamo traces.
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


def is_called_plainly(module: Any) -> bool:
    """Whether calling ``module`` is running its class's forward, and nothing else."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ) and not _only_caches(module):
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


def _only_caches(module: nn.Module) -> bool:
    """Whether the hooks are those of bitsandbytes' parametrisation, for what it decodes."""
    own = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return not (module._backward_hooks or module._backward_pre_hooks) and all(
        getattr(hook, "__module__", None) == "bitsandbytes.nn.parametrize" for hook in own
    )


def _is_device(device: Any, module: nn.Module) -> bool:
    parameter = next(module.parameters(), None)
    if device is None or parameter is None:
        return True
    wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    index = wanted.index or 0
    return wanted.type == parameter.device.type and index == (parameter.device.index or 0)


def orientation(module: nn.Module) -> bool | str:
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
