"""The adapter of a whole model: merged and unmerged, taken off, switched off for a while."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TypeVar, cast

from torch import nn

from ..layers.embedding import LoRAEmbedding
from ..layers.experts import FusedLoRAExperts
from ..layers.foreign import carry_dispatch_hook
from ..layers.fused import FusedLoRALinear
from ..layers.replacing import replace_modules
from ..layers.shared_input import share_inputs
from .apply import (
    check_not_taken_off,
    forget_record,
    lora_layers,
    record_of,
    unwrap,
    warn_of_lost_layers,
)
from .experts import expert_layers

Adapted = dict[str, FusedLoRALinear | FusedLoRAExperts]

ModelT = TypeVar("ModelT", bound=nn.Module)


def merge_adapter(model: nn.Module, keep_base: bool = True) -> None:
    """Fold the adapter of every layer into its weight, so that it costs nothing.

    With ``keep_base`` the layers keep the adapter and their pristine weights too: ``state_dict``,
    so also transformers' ``save_pretrained``, saves those, merged or not, and
    :func:`unmerge_adapter` gives them back. To export the merged model, call
    ``merge_adapter(model, keep_base=False)``, then ``save_pretrained``: plain ``nn.Linear`` and
    Conv1D layers with the merged weights take the places of the adapted ones, as by PEFT's
    ``merge_and_unload``.

    Raises:
        ValueError: the model has no adapted layer.
        RuntimeError: a layer cannot be merged: offloaded by accelerate, pruned, parametrised; the
            message says what to do. Then no layer is.
    """
    layers = _some_lora_layers(model)
    _check_mergeable(layers)
    warn_of_lost_layers(model)
    for layer in layers.values():
        layer.merge(keep_base)
    for embedding in _embeddings(model):
        embedding.merge(keep_base)
    if not keep_base:
        _put_plain_layers(unwrap(model), layers)


def unmerge_adapter(model: nn.Module) -> None:
    """:meth:`FusedLoRALinear.unmerge` on every adapted layer; ValueError if there is none."""
    layers = _some_lora_layers(model)
    if any(layer.is_exported for layer in layers.values()):
        raise RuntimeError(
            "the adapter was merged with keep_base=False: the pristine weights are gone"
        )
    _check_mergeable(layers)
    warn_of_lost_layers(model)
    for layer in layers.values():
        layer.unmerge()
    for embedding in _embeddings(model):
        embedding.unmerge()


def unload(model: ModelT, merge: bool = False) -> ModelT:
    """Take the adapter off ``model``, in place, and return it with the plain layers that
    :func:`~lora_kernels.apply_lora` replaced (PEFT: ``unload()`` and ``merge_and_unload()``).

    The layers are new objects of the former classes. They share Parameters (which stay frozen),
    hooks and ``training`` with the adapted ones, and stand at all their places. A layer keeps the
    weight that it has now, so one that is merged keeps the merged weight; ``unmerge_adapter`` first
    gives the pristine model back. Biases and ``modules_to_save`` keep what they learned. Afterwards
    :func:`~lora_kernels.apply_lora` and ``load_adapter`` start anew.

    Args:
        merge: fold the adapter into the weights first; else it is dropped.

    Raises:
        As :func:`merge_adapter`, with or without ``merge``.

    >>> from lora_kernels import apply_lora
    >>> model = apply_lora(nn.Sequential(nn.Linear(8, 8)), r=2)
    >>> type(unload(model)[0]).__name__
    'Linear'
    """
    layers = _some_lora_layers(model)
    _check_mergeable(layers)
    if merge:
        merge_adapter(model)
    root = unwrap(model)
    if isinstance(root, FusedLoRALinear):
        return cast(ModelT, root.to_linear())
    _put_plain_layers(root, layers)
    return model


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """``with lk.disable_adapter(model):`` the model computes without its adapter, as a reference
    model of DPO does; merged layers compute with their pristine weights. PEFT:
    ``model.disable_adapter()``.

    What was trained in full (biases, ``modules_to_save``) stays, with a warning. The switch is the
    model's, not the thread's: other threads' calls meanwhile are without the adapter too. A
    checkpointed forward computes again in ``backward``, so keep that inside, or use ``no_grad``.

    Raises:
        ValueError: the model has no adapted layer.
        RuntimeError: the adapter was merged with ``keep_base=False``.
    """
    layers = _some_lora_layers(model)
    if any(layer.is_exported for layer in layers.values()):
        raise RuntimeError(
            "the adapter was merged with keep_base=False: the pristine weights are gone"
        )
    warn_of_lost_layers(model)
    record = record_of(model)
    if record and (record.config.bias != "none" or record.report.modules_to_save):
        warnings.warn(
            "disable_adapter leaves the trained biases and modules_to_save as they are: the model "
            "is not the one that it was before training",
            stacklevel=3,
        )
    before = {layer: layer._disabled for layer in layers.values()}
    try:
        for layer in before:
            layer._disabled = True
        yield
    finally:
        for layer, disabled in before.items():
            layer._disabled = disabled


def _put_plain_layers(root: nn.Module, layers: Adapted) -> None:
    """Replace every layer at all its places; the record of the adapter goes."""
    share_inputs(root, False)
    plain: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        if isinstance(layer, FusedLoRAExperts):
            layer.restore()
        else:
            plain[layer] = layer.to_linear()
    for linear, module in plain.items():
        carry_dispatch_hook(linear, module)
    replace_modules(root, plain)
    forget_record(root)


def _embeddings(model: nn.Module) -> list[LoRAEmbedding]:
    return [m for m in unwrap(model).modules() if isinstance(m, LoRAEmbedding)]


def _check_mergeable(layers: Adapted) -> None:
    for name, layer in layers.items():
        obstacle = layer.merge_obstacle()
        if obstacle is not None:
            raise RuntimeError(f"cannot merge or unmerge {name or 'the layer'}: {obstacle}")


def _some_lora_layers(model: nn.Module) -> Adapted:
    layers: Adapted = {**lora_layers(model), **expert_layers(unwrap(model))}
    if not layers:
        check_not_taken_off(model)
        warn_of_lost_layers(model)
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers of lora_kernels: call apply_lora first"
        )
    return layers
