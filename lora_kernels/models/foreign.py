"""What the package knows of other people's models: where the heads are, whose forward is bypassed,
what accelerate offloaded, who checkpoints."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..layers.batches import CarryingCheckpoint
from ..layers.merging import is_offloaded

# Last name of a head where the model has no base model to tell it apart (T5, plain modules,
# wrappers).
_HEAD_NAMES = frozenset(
    [
        "lm_head",
        "score",
        "classifier",
        "classification_head",
        "qa_outputs",
        "cls",
        "embed_out",
        "mlm_head",
        "pre_classifier",
        "start_logits",
        "end_logits",
        "span_classifier",
        "cls_classifier",
        "distillation_classifier",
        "class_labels_classifier",
    ]
)


# Modules that read the weights of these children on some path instead of calling them, by the name
# of the class: transformers 5.23 and mamba_ssm.
_READ_BY = {
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "LayoutLMv2Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "LayoutLMv3Encoder": ("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"),
    "PPDocLayoutV2ReadingOrderEncoder": ("rel_pos_bias",),
    "Gemma4AssistantForCausalLM": ("lm_head",),
    "Gemma4UnifiedAssistantForCausalLM": ("lm_head",),
    "NeoMMEForMaskedLM": ("unembedding_projection",),
    "Mamba": ("in_proj", "x_proj", "dt_proj", "out_proj"),
    "Mamba2": ("out_proj",),
}

# What is asked of a linear or its weight by those who do not compute with it.
_ABOUT = frozenset(
    ["dtype", "device", "shape", "size", "dim", "ndim", "requires_grad", "is_cuda"]
    + ["bias", "in_features", "out_features"]
)


# Names of layers that PEFT takes for experts, by transformers' name of the kind of mixture: before
# transformers 5 the experts' own layers were called so.
_EXPERT_NAMES = {
    "mixtral": frozenset({"gate", "w1", "w2", "w3"}),
    "qwen2_moe": frozenset({"gate", "gate_proj", "up_proj", "down_proj"}),
}


def head_reason(model: nn.Module, name: str, module: nn.Module, outputs: set[object]) -> str | None:
    """Why the linear ``module`` called ``name`` counts as a head of ``model``, or None.

    A head is one of ``outputs`` (:func:`output_heads`), what stands outside the base model
    (``base_model_prefix``) of a transformers model, and elsewhere what bears a head's usual name.
    """
    if module in outputs or module.weight in outputs:
        return "output head"
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return None if name.startswith(prefix + ".") else "classifier head"
    if _HEAD_NAMES.intersection(name.split(".")):
        return "output head" if "lm_head" in name or "embed_out" in name else "classifier head"
    return None


def output_heads(model: Any) -> set[object]:
    """The output embeddings (Musicgen has a list of them), and the weights tied to embeddings."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    heads: set[object] = set(head.modules()) if isinstance(head, nn.Module) else set()
    return heads | {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}


def bypass_reason(by_name: dict[str, nn.Module], names: list[str]) -> str | None:
    """Why an adapter in a linear would do nothing: a module around it computes with its weight.

    ``by_name`` is every module of the model, ``names`` the paths of the linear. Known are some
    classes (:data:`_READ_BY`), and forwards that read the weight and plainly do nothing else with
    the linear. What slips through, ``lora_report`` names after a forward.
    """
    for name in names:
        parts = name.split(".")
        for depth in reversed(range(len(parts))):
            owner, path = by_name[".".join(parts[:depth])], ".".join(parts[depth:])
            kind: Any = type(owner)
            if isinstance(owner, nn.TransformerEncoderLayer) and path in ("linear1", "linear2"):
                return (
                    f"its forward is skipped by the fast path of {kind.__name__}, which reads "
                    "its weight"
                )
            if kind.__module__.startswith(("transformers", "mamba_ssm")) and path in _READ_BY.get(
                kind.__name__, ()
            ):
                return f"its forward is skipped by {kind.__name__}, which reads its weight"
            if path in _only_read(kind):
                return f"its forward is never called: {kind.__name__} reads its weight"
    return None


@functools.cache
def _only_read(kind: type[nn.Module]) -> frozenset[str]:
    """Paths below self whose ``.weight`` the forward of ``kind`` reads, while no method of the
    class mentions them otherwise or hands on self; none without source."""
    forward: Any = kind.forward
    if "weight" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    owners = {node.value: node for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    read: set[str] = set()
    mentioned: set[str] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name) or node.id not in ("self", "super"):
            continue
        path = []
        while node in owners:
            node = owners[node]
            path.append(node.attr)
        # Self, or an iterator over the children, is passed on to other code.
        if not path or callable(getattr(nn.Module, path[0], None)):
            return frozenset()
        if "weight" in path[1:]:
            at = path.index("weight", 1)
            if path[at + 1 :][:1] and path[at + 1] in _ABOUT:
                continue
            read.add(".".join(path[:at]))
        elif path[-1] not in _ABOUT:
            mentioned.add(".".join(path))
    others = _names_in_methods(kind)
    return frozenset(
        path
        for path in read
        if path.split(".")[0] not in others
        and not any(f"{path}.".startswith(f"{m}.") or m.startswith(f"{path}.") for m in mentioned)
    )


def _names_in_methods(kind: type[nn.Module]) -> set[str]:
    """Names that the methods of ``kind`` use, but for its forward and constructors."""
    names: set[str] = set()
    for cls in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, value in vars(cls).items():
            value = getattr(value, "fget", value)
            codes = [] if name == "__init__" or value is kind.forward else [value]
            codes = [c.__code__ for c in codes if hasattr(c, "__code__")]
            while codes:
                code = codes.pop()
                names.update(code.co_names)
                codes += [c for c in code.co_consts if hasattr(c, "co_names")]
    return names


def offload_reason(module: nn.Module) -> str | None:
    """Why a dispatched module cannot be replaced: its weights are elsewhere between two calls."""
    if is_offloaded(module):
        return "its weight is offloaded by accelerate's device_map"
    return None


def stored_value(module: nn.Module, name: str) -> Any:
    """The tensor ``name`` of ``module``, fetched from where accelerate offloaded it."""
    tensor = getattr(module, name)
    if tensor is not None and tensor.is_meta:
        hook = getattr(module, "_hf_hook", None)
        for offloading in getattr(hook, "hooks", [hook]):
            weights = getattr(offloading, "weights_map", None)
            if weights is not None and name in [key for key, _ in module.named_parameters()]:
                return weights[name]
    return tensor


def taken_for_experts(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """The layers that PEFT does not look for where it reads their names."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str):
        return []
    try:
        from transformers.conversion_mapping import (
            _MODEL_TO_CONVERSION_PATTERN,
            get_checkpoint_conversion_mapping,
        )
    except ImportError:
        # No transformers, or one from before it fused experts.
        return []
    if get_checkpoint_conversion_mapping(model_type) is None:
        return []
    kinds = {"mixtral": "mixtral"} | _MODEL_TO_CONVERSION_PATTERN
    names = _EXPERT_NAMES.get(kinds.get(model_type, ""), ())
    return [name for name in layers if name.rpartition(".")[2] in names]


def default_targets(model: nn.Module, method: str) -> list[str] | str:
    """The ``target_modules`` that PEFT chooses for ``model`` where a configuration names none.

    Raises:
        ValueError: PEFT knows none for its ``model_type``.
    """
    from peft import utils

    known = getattr(utils, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    targets = known.get(model_type)
    if targets is None:
        raise ValueError(
            f"PEFT has no default target_modules for model_type {model_type!r}: name them in the "
            'config, or give target_modules="all-linear"'
        )
    return targets if isinstance(targets, str) else list(targets)


def checkpointing_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that ``gradient_checkpointing_enable`` gives a function to."""
    return [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]


def carry_batches(modules: list[nn.Module]) -> None:
    """Make their checkpointing functions, where they have one now, compute again with the batches
    of their forwards."""
    for module in modules:
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, CarryingCheckpoint):
            module.__dict__["_gradient_checkpointing_func"] = CarryingCheckpoint(function)


def carry_no_batches(modules: list[nn.Module]) -> None:
    """Undo :func:`carry_batches`."""
    for module in modules:
        function = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(function, CarryingCheckpoint):
            module.__dict__["_gradient_checkpointing_func"] = function.checkpoint
