"""What the package knows of other people's modules: transformers' Conv1D, where a model's heads are, whose forward is
bypassed, hooks that dispatching adds."""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
from collections import defaultdict
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


def bypass_reason(by_name: dict[str, nn.Module], names: list[str]) -> str | None:
    """Why a linear's own forward is not what the model computes with, so that an adapter in it would do nothing.

    ``by_name`` is every module of the model, ``names`` the paths of the linear. Read from the source of the modules
    around it, since nothing else tells before a forward has run: Mamba's reads ``out_proj.weight`` only where its
    kernels are installed. What the source does not name (children of containers, classes without source) counts as
    called.
    """
    for name in names:
        parts = name.split(".")
        used: dict[str, str] = {}
        for depth in range(len(parts) - 1, -1, -1):
            module = by_name[".".join(parts[:depth])]
            kind = type(module).__name__
            if depth == len(parts) - 1 and isinstance(module, nn.TransformerEncoderLayer):
                return f"its forward is skipped by the fast path of {kind}, which reads its weight"
            for use in _uses_of_children(type(module)).get(".".join(parts[depth:]), ()):
                used.setdefault(use, kind)
        if "weight" in used and "module" not in used:
            return f"its forward is never called: {used['weight']} reads its weight"
        if "operand" in used:
            return f"its forward is skipped on one path of {used['operand']}, which reads its weight"
    return None


@functools.cache
def _uses_of_children(cls: type) -> dict[str, set[str]]:
    """How the methods of ``cls`` use what is below self: dotted path -> uses.

    "module": the child itself is mentioned, so called or passed on; "weight": its weight is mentioned, be it for the
    dtype; "operand": a forward multiplies with its weight or passes it, among others, to a function.
    """
    uses: dict[str, set[str]] = defaultdict(set)
    for base in cls.__mro__:
        if base in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            # Who knows what it does: whatever else reads the weight, the child may be called here.
            continue
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                _collect_uses(function, uses)
    return dict(uses)


def _collect_uses(function: ast.FunctionDef | ast.AsyncFunctionDef, uses: dict[str, set[str]]) -> None:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            path = _path_below_self(node)
            if path is None:
                continue
            uses[path.removesuffix(".forward").removesuffix(".__call__")].add("module")
            owner, _, last = path.rpartition(".")
            if last == "weight":
                uses[owner].add("weight")
        operands: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            operands = [node.left, node.right]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") != "isinstance":
            operands = [*node.args, *(keyword.value for keyword in node.keywords)]
        if "forward" in function.name and len(operands) > 1:
            for path in map(_path_below_self, operands):
                if path is not None and path.endswith(".weight"):
                    uses[path.removesuffix(".weight")].add("operand")


def _path_below_self(node: ast.expr) -> str | None:
    """"a.b" for the expression ``self.a.b``, None for any other."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed(parts)) if parts and isinstance(node, ast.Name) and node.id == "self" else None


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
