"""Projections of one input (q, k, v; gate, up) as one call of ``lora_linears`` where a module calls
each of them by itself.

:func:`share_inputs` gives attention and MLP modules two hooks, which tell when a call of the module
begins and ends. Inside it the first projection that is called computes all of them. Each of the
others takes its result if it would compute with the very tensors that this was computed from;
otherwise it computes by itself.

Which layers belong together is known by name, never learnt from calls: under checkpointing the
recomputation has to save what the forward saved.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..functional.checks import scale_tensor
from ..functional.linear import Operands
from ..functional.linears import checked_lora_linears
from ..functional.ops import is_observed, records_gradients
from .packed import gathered_by_fsdp

# As transformers' attention and MLP modules name them.
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)

# Parts of an argument's name with which a forward may give its projections different inputs.
_OTHER_INPUTS = ("encoder", "cross", "context", "quer", "key", "value", "kv", "latent")


def share_inputs(model: nn.Module, enabled: bool = True) -> list[str]:
    """Compute the projections of one input together (q, k, v; gate, up) while ``model`` trains;
    the names of the modules whose projections do.

    For layers of :func:`lora_kernels.apply_lora`, ``load_adapter`` and ``accelerate_peft``. The
    projections are called as before, by the model's own code; they share one shrink, one saved x
    and one sum of its gradients, see :func:`lora_kernels.lora_linears`. Dropout draws other masks
    than separate layers do for the same seed.

    Layers compute by themselves where one of them has a hook or a forward of its own, DoRA, several
    active adapters, a four-bit base or another dropout than the others; is merged, disabled or
    sharded; is given another x or called a second time; and wherever no gradients are recorded or
    the call is compiled.

    Modules whose forward takes a second input (cross attention) are left as they are, and so are
    those with fewer than two adapted projections. Calling it again includes layers that came since;
    ``enabled=False`` undoes it, as do ``unload`` and ``restore_peft``.

    >>> import torch
    >>> import lora_kernels as lk
    >>> class Gated(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
    ...     def forward(self, x):
    ...         return self.gate_proj(x).sigmoid() * self.up_proj(x)
    >>> model = lk.apply_lora(nn.Sequential(Gated()), r=2).train()
    >>> lk.share_inputs(model)
    ['0']
    >>> with lk.record_plans() as answers:
    ...     y = model(torch.ones(3, 8))
    >>> [answer.op for answer in answers]
    ['lora_linears_fwd']
    """
    names = []
    for name, parent in model.named_modules():
        _detach(parent)
        groups = _groups_of(parent) if enabled else ()
        if groups:
            parent.register_forward_pre_hook(_Opening(groups))
            parent.register_forward_hook(_close, always_call=True)
            for member in (name for group in groups for name in group):
                vars(parent._modules[member])["_shares_input"] = True
            names.append(name)
    return names


def shared_result(layer: Any, x: Tensor) -> Tensor | None:
    """What was computed of x for ``layer``, together with its siblings; None: it has to compute by
    itself."""
    calls = _local.calls
    return calls[-1].result(layer, x) if calls else None


def _groups_of(parent: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of the projections that ``parent`` calls with one input."""
    held = parent._modules
    adapted = [
        tuple([name for name in group if hasattr(held.get(name), "operands_to_share")])
        for group in GROUPS
        if all(name in held for name in group)
    ]
    groups = tuple([group for group in adapted if len(group) > 1])
    # Such a layer of Gemma takes k and v of another one.
    if not groups or getattr(parent, "is_kv_shared_layer", False):
        return ()
    for argument in [*inspect.signature(parent.forward).parameters][1:]:
        name = argument.removeprefix("past_key_value")
        if any(part in name for part in _OTHER_INPUTS):
            return ()
    return groups


def _detach(parent: nn.Module) -> None:
    for key, hook in [*parent._forward_pre_hooks.items()]:
        if isinstance(hook, _Opening):
            del parent._forward_pre_hooks[key]
            for member in (name for group in hook.groups for name in group):
                layer = parent._modules.get(member)
                if layer is not None:
                    vars(layer).pop("_shares_input", None)
    for key, hook in [*parent._forward_hooks.items()]:
        if hook is _close:
            del parent._forward_hooks[key]
            parent._forward_hooks_always_called.pop(key, None)


class _Local(threading.local):
    def __init__(self) -> None:
        # The innermost last.
        self.calls: list[_Call] = []


_local = _Local()


class _Opening:
    """The forward pre-hook of a module with ``groups`` of projections, by name."""

    def __init__(self, groups: tuple[tuple[str, ...], ...]) -> None:
        self.groups = groups

    def __call__(self, parent: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():
            _local.calls.append(_Call(parent, self.groups))


def _close(parent: nn.Module, args: Any, result: Any) -> None:
    """Its forward hook, which is called after an error too."""
    if torch.compiler.is_compiling():
        return
    calls = _local.calls
    # What an interrupt left open above goes too.
    if any(call.parent is parent for call in calls):
        while calls.pop().parent is not parent:
            pass


class _Call:
    """One call of a module with groups of projections."""

    def __init__(self, parent: nn.Module, groups: Sequence[Sequence[str]]) -> None:
        self.parent = parent
        held = parent._modules
        self._groups = [_Group([held.get(name) for name in group]) for group in groups]
        self._mode = _mode()

    def result(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        mode = _mode()
        alike = mode is not None and mode == self._mode
        for group in self._groups:
            for j, member in enumerate(group.layers):
                if member is layer:
                    return group.result(j, x, alike)
        return None


def _mode() -> Any:
    """What has to be the same for all members, besides their operands; None: nothing is shared."""
    if not records_gradients() or is_observed():
        return None
    # Checkpointing of one projection, or another place for what it saves.
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return True if hooks is None else tuple([id(hook) for hook in hooks[:2]])


class _Result(NamedTuple):
    y: Tensor
    operands: Operands
    states: list[tuple[int, bool]]


class _Group:
    """Projections of one call, and what is computed for them."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self._results: list[_Result | None] | None = None

    def result(self, j: int, x: Tensor, alike: bool) -> Tensor | None:
        if self._results is None:
            # The first call decides for all: nothing is computed twice.
            self._results = [*self._computed(x)] if alike else []
            if not self._results:
                return None
            own, self._results[j] = self._results[j], None
            return None if own is None else own.y
        held = self._results[j] if self._results else None
        if held is None or not alike:
            return None
        self._results[j] = None
        operands = _operands_of(self.layers[j], x)
        if operands is None or not _are_same(operands, held.operands):
            return None
        return held.y if _states(operands) == held.states else None

    def _computed(self, x: Tensor) -> list[_Result]:
        """A result for each layer, or none."""
        operands: list[Operands] = []
        for layer in self.layers:
            o = _operands_of(layer, x)
            if o is None or (operands and o[7:10] != operands[0][7:10]):
                return []
            operands.append(o)
        states = [_states(o) for o in operands]
        scaled = [o._replace(scale=scale_tensor(o.scale, x.device, o.dtype)) for o in operands]
        ys = checked_lora_linears(scaled, None)
        return [_Result(*each) for each in zip(ys, operands, states, strict=True)]


def _operands_of(layer: Any, x: Tensor) -> Operands | None:
    """What ``layer`` would compute with; None where the call makes no graph, or where a hook or
    another feature needs the layer's own call. The scale is as the layer has it."""
    held = vars(layer) if layer is not None else {}
    if (
        not held.get("_shares_input")
        or "forward" in held
        or held.get("_compiled_call_impl") is not None
        or layer._forward_hooks
        or layer._forward_pre_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or gathered_by_fsdp(layer)
        or _has_any_global_hook()
    ):
        return None
    try:
        o: Operands | None = layer.operands_to_share(x)
    except (TypeError, ValueError):
        # A wrong call, which is that layer's to report.
        return None
    if o is None or o.weight.requires_grad or x.is_inference() or o.weight.is_inference():
        return None
    return o if x.requires_grad or o.lora_a.requires_grad or o.lora_b.requires_grad else None


def _are_same(one: Operands, other: Operands) -> bool:
    return all(
        s is t or (not isinstance(s, Tensor) and not isinstance(t, Tensor) and s == t)
        for s, t in zip(one, other, strict=True)
    )


def _states(o: Operands) -> list[tuple[int, bool]]:
    """What in-place changes of the operands change."""
    return [(t._version, t.requires_grad) for t in o[:6] if isinstance(t, Tensor)]
