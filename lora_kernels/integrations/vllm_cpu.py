"""vLLM on a CPU: a linear layer and its adapters in one operator, over a weight that we pack.

vLLM packs a linear layer's weight once it is loaded (:func:`pack_weights` puts our packing in its
place where the engine serves adapters) and computes base and adapters one after the other
(:func:`join_layers` puts one operator there). A layer of which either is not possible stays vLLM's,
with our wrapper for its adapters, and the log says why, once for each reason. vLLM compiles no
model with adapters on a CPU, since its own wrapper could not be traced; ours can
(:func:`keep_compiling`).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..backends import cpu
from ..functional.linear import packed_linear
from ..layers.slot_panels import SlotPanels

# Below vLLM's own logger, whose handler and level it then has.
logger = logging.getLogger("vllm.lora_kernels")

ATTRIBUTE = "_lora_kernels_base"
_STACKS, _NAME = "_lora_kernels_stacks", "_lora_kernels_name"


class Base(NamedTuple):
    """The weight of a layer: its shape and dtype, and its values in panels. ``shape`` is one NaN
    seen as [N, K]: a kernel that read it would show."""

    shape: Tensor
    panels: Tensor


class Stacks:
    """A and B of a layer's slots, [S, r, K] and [S, N, r] a slice: views of vLLM's, which it writes
    adapters into, and their values in panels, packed where an adapter or its rank has changed."""

    def __init__(self, layer: Any) -> None:
        self.given = layer.lora_a_stacked, layer.lora_b_stacked
        self.lora_a, self.lora_b = stacks(self.given[0]), stacks(self.given[1])
        self.changed = set[int]()
        self._held = SlotPanels()
        self._panels: list[Tensor] = []
        self._ranks: Sequence[int] | None = None

    def are_of(self, layer: Any) -> bool:
        return self.given[0] is layer.lora_a_stacked and self.given[1] is layer.lora_b_stacked

    def panels(self, ranks: Sequence[int], base: Tensor) -> list[Tensor]:
        """What ``segmented_linear_of_panels`` takes for a batch whose slots have these ranks. Empty
        where adapters and weight differ in dtype."""
        if self.changed or ranks is not self._ranks:
            if all(t.dtype == base.dtype for t in (*self.lora_a, *self.lora_b)):
                self._held.forget(self.changed)
                self._panels = self._held.pack(self.lora_a, self.lora_b, ranks)
            self._ranks = ranks
            self.changed.clear()
        return self._panels


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("lora_kernels: layers stay vLLM's, with our kernels for adapters: %s", reason)


def pack_weights() -> None:
    """Let vLLM, in this process, pack the weights of linear layers for our kernels if its engine
    serves adapters. The weight itself is freed, as by vLLM."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        config = get_current_vllm_config_or_none()
        # What keeps its weight is an embedding, or an output head: its adapters are the logits'.
        if config is None or config.lora_config is None or not remove_weight:
            return original(layer, remove_weight)
        weight = layer.weight.detach()
        if weight.is_meta or weight.dim() != 2:
            return original(layer, remove_weight)
        if not cpu.packs(weight):
            _log_once(f"weights of {weight.dtype} are not packed on this CPU")
            return original(layer, remove_weight)
        base = Base(
            weight.new_full((), math.nan).expand(weight.shape),
            torch.ops.lora_kernels_cpu.pack(weight.t()),
        )
        setattr(layer, ATTRIBUTE, base)
        layer.cpu_linear = lambda x, weight, bias: packed_linear(
            x, base.shape, bias, False, base.panels
        )
        layer.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)
        return None

    utils.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


def keep_compiling(platform: Any) -> None:
    """Let vLLM's platform choose how a model with adapters is compiled as if it had none."""
    original = platform.check_and_update_config.__func__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        adapters, vllm_config.lora_config = vllm_config.lora_config, None
        try:
            original(cls, vllm_config)
        finally:
            vllm_config.lora_config = adapters

    platform.check_and_update_config = classmethod(check_and_update_config)


def join_layers(wrapper_class: Any) -> None:
    """Let vLLM's linear layers with adapters, in this process, compute with them in one operator
    if their wrapper is a ``wrapper_class`` and their weight is packed."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.forward_context import is_forward_context_available
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    original, set_mapping = BaseLinearLayerWithLoRA._apply_sync, BaseLinearLayerWithLoRA.set_mapping
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(set_mapping)
    def set_mapping_and_name(self: Any, punica_wrapper: Any) -> None:
        set_mapping(self, punica_wrapper)
        config, prefix = get_current_vllm_config_or_none(), getattr(self.base_layer, "prefix", "")
        if config is not None and prefix:
            name = f"{prefix}.lora_kernels"
            layers = config.compilation_config.static_forward_context
            self.__dict__[_NAME] = name if layers.setdefault(name, self) is self else None

    @functools.wraps(original)
    def _apply_sync(self: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        base, wrapper = getattr(self.base_layer, ATTRIBUTE, None), self.punica_wrapper
        if base is None or not isinstance(wrapper, wrapper_class):
            return original(self, x, bias)
        # vLLM's compiler traces this: shapes alone, until an operator is reached.
        width = sum(b.shape[-2] for b in self.lora_b_stacked)
        if (width, self.lora_a_stacked[0].shape[-1]) != base.shape.shape:
            _log_once(f"the adapters of {type(self).__name__} do not fit its weight")
            return original(self, x, bias)
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        name = self.__dict__.get(_NAME)
        if name is not None and is_forward_context_available():
            y = torch.ops.lora_kernels.vllm_layer(rows, bias, name, width)
        else:
            held, table = _stacks_of(self), wrapper.table_of_tokens()
            y = torch.ops.lora_kernels.vllm_linear(
                rows, *base, held.lora_a, held.lora_b, table, bias
            )
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    _watch_slots(BaseLinearLayerWithLoRA)
    BaseLinearLayerWithLoRA.set_mapping = set_mapping_and_name
    BaseLinearLayerWithLoRA._apply_sync = _apply_sync


def _stacks_of(layer: Any) -> Stacks:
    """A and B of a layer, whose views are made once."""
    held: Stacks | None = layer.__dict__.get(_STACKS)
    if held is None or not held.are_of(layer):
        held = layer.__dict__[_STACKS] = Stacks(layer)
    return held


def _watch_slots(layer_class: type) -> None:
    """Let the layers of a class and of those below it, in this process, know of the slots that vLLM
    writes to."""

    def noting(write: Any) -> Any:
        @functools.wraps(write)
        def noted(self: Any, index: int, *args: Any, **kwargs: Any) -> Any:
            held = self.__dict__.get(_STACKS)
            if held is not None:
                held.changed.add(index)
            return write(self, index, *args, **kwargs)

        return noted

    for name in ("set_lora", "reset_lora"):
        if name in vars(layer_class):
            setattr(layer_class, name, noting(vars(layer_class)[name]))
    below: type
    for below in layer_class.__subclasses__():
        _watch_slots(below)


def stacks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """[S, r, K] of vLLM's [S, 1, r, K]; its linear layers have one where others have none."""
    return [t.squeeze(1) if t.dim() == 4 else t for t in tensors]


def _linear(
    x: Tensor,
    shape: Tensor,
    panels: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    table: list[Tensor],
    bias: Tensor | None,
    panels_of_slots: Sequence[Tensor] = (),
) -> Tensor:
    operands = x, shape, lora_a, lora_b, table
    return cpu.segmented_linear(*operands, bias, panels, panels_of_slots)


def _layer(x: Tensor, bias: Tensor | None, name: str, width: int) -> Tensor:
    from vllm.forward_context import get_forward_context

    layer = get_forward_context().no_compile_layers[name]
    base, held, wrapper = (
        getattr(layer.base_layer, ATTRIBUTE),
        _stacks_of(layer),
        layer.punica_wrapper,
    )
    panels = held.panels(wrapper.ranks_of_layers, base.panels)
    table = wrapper.table_of_tokens()
    shape, packed = base
    return _linear(x, shape, packed, held.lora_a, held.lora_b, table, bias, panels)


_library = torch.library.Library("lora_kernels", "FRAGMENT")
for _name, _arguments, _function, _fake in (
    (
        "vllm_linear",
        "Tensor x, Tensor shape, Tensor panels, Tensor[] lora_a, Tensor[] lora_b, Tensor[] table, "
        "Tensor? bias",
        _linear,
        lambda x, shape, *rest: x.new_empty(x.shape[0], shape.shape[0]),
    ),
    # The same for a layer that vLLM's forward context knows by its name: its twenty tensors are no
    # arguments, which a compiled graph would make anew for every call.
    (
        "vllm_layer",
        "Tensor x, Tensor? bias, str name, int width",
        _layer,
        lambda x, bias, name, width: x.new_empty(x.shape[0], width),
    ),
):
    _library.define(f"{_name}({_arguments}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", _fake, lib=_library)
