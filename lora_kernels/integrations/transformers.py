"""What the package knows of transformers' classes: Conv1D, where a model's heads are, hooks that dispatching adds."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..nn import TRANSPOSED_LINEARS

# Last name of a head where the model has no base model to tell it apart (T5, plain modules, wrappers).
_HEAD_NAMES = frozenset(
    "lm_head score classifier classification_head qa_outputs cls embed_out mlm_head pre_classifier "
    "start_logits end_logits span_classifier cls_classifier distillation_classifier class_labels_classifier".split()
)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, without importing transformers for it."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return utils is not None and isinstance(module, utils.Conv1D) and type(module).forward is utils.Conv1D.forward


TRANSPOSED_LINEARS.append(is_conv1d)


def head_reason(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why the linear ``module`` called ``name`` counts as an output or classifier head of ``model``, or None.

    A head is the output embedding, what stands outside the base model (``base_model_prefix``) of a transformers model,
    and elsewhere what bears a head's usual name.
    """
    get_output = getattr(model, "get_output_embeddings", None)
    if callable(get_output) and _output_embeddings(model) is module:
        return "output head"
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return None if name.startswith(prefix + ".") else "classifier head"
    if _HEAD_NAMES.intersection(name.split(".")):
        return "output head" if "lm_head" in name or "embed_out" in name else "classifier head"
    return None


def _output_embeddings(model: Any) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def carry_dispatch_hook(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the accelerate hook that ``dispatch_model`` (``device_map=``) put on ``old``."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)


def offload_reason(module: nn.Module) -> str | None:
    """Why a dispatched module cannot be replaced: its weights are elsewhere between two calls."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    if any(getattr(h, "offload", False) for h in hooks):
        return "its weight is offloaded by accelerate's device_map"
    return None
