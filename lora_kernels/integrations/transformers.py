"""What the package knows of other people's modules: transformers' Conv1D, where a model's heads
are, whose forward is bypassed, hooks that dispatching adds."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
from collections import defaultdict
from typing import Any

from torch import nn

from ..batches import CarryingCheckpoint
from ..merging import is_offloaded
from ..nn import PLAIN_LINEARS, TRANSPOSED_LINEARS

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


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D, without importing transformers for it."""
    utils = sys.modules.get("transformers.pytorch_utils")
    return (
        utils is not None
        and isinstance(module, utils.Conv1D)
        and type(module).forward is utils.Conv1D.forward
    )


def is_falcon_linear(module: nn.Module) -> bool:
    """Whether ``module`` is Falcon's linear layer: ``x @ W.T``, then ``+ bias``."""
    falcon = sys.modules.get("transformers.models.falcon.modeling_falcon")
    return falcon is not None and type(module) is falcon.FalconLinear


TRANSPOSED_LINEARS.append(is_conv1d)
PLAIN_LINEARS.append(is_falcon_linear)


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
    """Why a linear's own forward is not what the model computes with, so that an adapter in it
    would do nothing.

    ``by_name`` is every module of the model, ``names`` the paths of the linear. Read from the
    source of the modules around it, since nothing else tells before a forward has run (Mamba's
    reads ``out_proj.weight`` only where its kernels are installed). What the source does not name,
    as children of containers, counts as called.
    """
    for name in names:
        parts = name.split(".")
        kinds: dict[str, str] = {}
        for depth in reversed(range(len(parts))):
            module = by_name[".".join(parts[:depth])]
            cls: Any = type(module)
            kind = cls.__name__
            if depth == len(parts) - 1 and isinstance(module, nn.TransformerEncoderLayer):
                return f"its forward is skipped by the fast path of {kind}, which reads its weight"
            uses = _uses_of_children(cls)
            if uses is None:
                break
            for use in uses.get(".".join(parts[depth:]), ()):
                kinds.setdefault(use, kind)
        else:
            if "weight" in kinds and "module" not in kinds:
                return f"its forward is never called: {kinds['weight']} reads its weight"
            if "operand" in kinds:
                kind = kinds["operand"]
                return f"its forward is skipped on one path of {kind}, which reads its weight"
    return None


@functools.cache
def _uses_of_children(cls: type) -> dict[str, set[str]] | None:
    """How the methods of ``cls`` use what is below self: dotted path -> uses; None without source.

    "module": the child itself is mentioned, so called or passed on; "weight": its weight is
    mentioned, be it for the dtype; "operand": a forward multiplies by its weight, or passes it to a
    function along with something else.
    """
    sources = [_source(base) for base in cls.__mro__ if base not in (nn.Module, object)]
    if None in sources:
        return None
    uses: dict[str, set[str]] = defaultdict(set)
    if not any(re.search(r"\bself\.[\w.]+\.weight\b", source or "") for source in sources):
        return uses
    for source in sources:
        tree = ast.parse(textwrap.dedent(source or ""))
        # Of self.a.b.c only the whole: its beginnings are Attribute nodes too.
        beginnings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Load)
                and node not in beginnings
            ):
                path = _path_below_self(node)
                uses[path.removesuffix(".forward")].add("module")
                if ".weight" in path:
                    uses[path[: path.index(".weight")]].add("weight")
            elif isinstance(node, ast.FunctionDef) and "forward" in node.name:
                for path in _weight_operands(node):
                    uses[path].add("operand")
    return uses


@functools.cache
def _source(cls: type) -> str | None:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return None


def _weight_operands(function: ast.FunctionDef) -> set[str]:
    found = set()
    for node in ast.walk(function):
        operands: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            operands = [node.left, node.right]
        elif isinstance(node, ast.Call) and not (
            isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr", "getattr")
        ):
            operands = node.args + [keyword.value for keyword in node.keywords]
        if len(operands) > 1:
            found |= {path for path in map(_path_below_self, operands) if path.endswith(".weight")}
    return {path.removesuffix(".weight") for path in found}


def _path_below_self(node: ast.expr) -> str:
    """'a.b' for the expression ``self.a.b``, '' for any other."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else ""


def carry_dispatch_hook(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the accelerate hook that ``dispatch_model`` (``device_map=``) put on ``old``."""
    hook = getattr(old, "_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, hook)


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
