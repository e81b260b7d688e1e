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

# Below vLLM's own logger, whose handler and level it then has.
logger = logging.getLogger("vllm.lora_kernels")

ATTRIBUTE = "_lora_kernels_base"
_STACKS, _NAME = "_lora_kernels_stacks", "_lora_kernels_name"


class Base(NamedTuple):
    """The weight of a layer: its shape and dtype, and its values in panels. ``shape`` is one NaN
    seen as [N, K]: a kernel that read it would show."""

    shape: Tensor
    panels: Tensor


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
        lora_a, lora_b = _stacks_of(self)
        if (sum(b.shape[1] for b in lora_b), lora_a[0].shape[2]) != base.shape.shape:
            _log_once(f"the adapters of {type(self).__name__} do not fit its weight")
            return original(self, x, bias)
        rows = x if x.dim() == 2 else x.flatten(0, -2)
        name = self.__dict__.get(_NAME)
        if name is not None and is_forward_context_available():
            y = torch.ops.lora_kernels.vllm_layer(rows, bias, name, base.shape.shape[0])
        else:
            table = wrapper.table_of_tokens()
            y = torch.ops.lora_kernels.vllm_linear(rows, *base, lora_a, lora_b, table, bias)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])

    BaseLinearLayerWithLoRA.set_mapping = set_mapping_and_name
    BaseLinearLayerWithLoRA._apply_sync = _apply_sync


def _stacks_of(layer: Any) -> tuple[list[Tensor], list[Tensor]]:
    """A and B of a layer, whose views are made once: vLLM writes adapters into its stacks."""
    given = layer.lora_a_stacked, layer.lora_b_stacked
    held = layer.__dict__.get(_STACKS)
    if held is None or held[0] is not given[0] or held[1] is not given[1]:
        held = *given, stacks(given[0]), stacks(given[1])
        layer.__dict__[_STACKS] = held
    return held[2], held[3]


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
) -> Tensor:
    operands = x, shape, lora_a, lora_b, table
    return cpu.answer("segmented_linear_fwd", *operands, bias=bias, packed=panels)[0]


def _layer(x: Tensor, bias: Tensor | None, name: str, width: int) -> Tensor:
    from vllm.forward_context import get_forward_context

    layer = get_forward_context().no_compile_layers[name]
    base, (lora_a, lora_b) = getattr(layer.base_layer, ATTRIBUTE), _stacks_of(layer)
    table = layer.punica_wrapper.table_of_tokens()
    return _linear(x, base.shape, base.panels, lora_a, lora_b, table, bias)


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
