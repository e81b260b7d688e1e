"""Checkpoints of loralib (microsoft/LoRA 0.1.2): ``lora_A`` and ``lora_B`` beside the weights of a
``Linear``, a ``MergedLinear`` or an ``Embedding``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..layers.embedding import LoRAEmbedding
from ..layers.fused import FusedLoRALinear
from ..layers.replacing import replace_modules
from ..layers.sliced import SlicedLoRALinear
from .apply import unwrap
from .on_disk import first_few

ModelT = TypeVar("ModelT", bound=nn.Module)
Patterns = Sequence[bool] | Mapping[str, Sequence[bool]]

_ENDINGS = (".lora_A", ".lora_B")
_Layers = (FusedLoRALinear, LoRAEmbedding)


def load_loralib(
    model: ModelT,
    source: Mapping[str, Tensor] | str | os.PathLike[str],
    *,
    lora_alpha: float,
    enable_lora: Patterns | None = None,
    lora_dropout: float = 0.0,
) -> ModelT:
    """Put the layers of a loralib checkpoint into ``model``, in place, freeze the rest, and return
    the model.

    Every layer that the checkpoint has a ``lora_A`` and ``lora_B`` for gets an adapter; loralib
    stores no alpha and no pattern, so they are arguments. Other tensors of the checkpoint (biases,
    a whole ``state_dict``) are copied into the model.

    Args:
        source: a state dict, a ``.safetensors`` file, or a file of ``torch.save``, which is read
            with ``weights_only=True``.
        lora_alpha: the numerator of the scaling, for all layers.
        enable_lora: of the layers that were ``MergedLinear``, which equal slices of the outputs
            have an adapter: one list for all, or by the end of a layer's name.

    Raises:
        FileNotFoundError, ValueError: the source cannot be read, a layer is missing or its tensors
            do not fit (the message names it); the model is as it was.
        TypeError: a layer that is no plain linear or embedding.

    Example: a GPT-2 whose ``c_attn`` adapts queries and values::

        lk.load_loralib(model, "gpt2_lora.pt", lora_alpha=32, enable_lora=[True, False, True])
    """
    root = unwrap(model)
    tensors = dict(source) if isinstance(source, Mapping) else _read(Path(source))
    pairs, others = _pairs(tensors)
    if not pairs:
        raise ValueError("the checkpoint holds no lora_A and lora_B: it is none of loralib")
    modules = dict(root.named_modules())
    missing = [path for path in pairs if path not in modules]
    if missing:
        raise ValueError(f"the model has no {first_few(missing)}")
    adapted = [path for path in pairs if isinstance(modules[path], _Layers)]
    if adapted:
        raise ValueError(f"{first_few(adapted)} have an adapter already")
    state = root.state_dict(keep_vars=True)
    wrong = [
        key
        for key, tensor in others.items()
        if key not in state or state[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(f"the model has no place for {first_few(wrong)}, or of another shape")
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    try:
        layers: dict[nn.Module, Any] = {
            modules[path]: _layer(path, modules[path], a, b, lora_alpha, enable_lora, lora_dropout)
            for path, (a, b) in pairs.items()
        }
    except BaseException:
        for parameter in trained:
            parameter.requires_grad_(True)
        raise
    with torch.no_grad():
        for key, tensor in others.items():
            state[key].copy_(tensor)
    root.requires_grad_(False)
    replace_modules(root, layers)
    for layer in layers.values():
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
    return model


def loralib_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``lora_A`` and ``lora_B`` of every adapted layer, as loralib's ``lora_state_dict(model)``."""
    return {
        f"{path}{ending}": getattr(layer, ending[1:]).detach().clone()
        for path, layer in unwrap(model).named_modules()
        if isinstance(layer, _Layers)
        for ending in _ENDINGS
    }


def save_loralib(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Write :func:`loralib_state_dict`: a name that ends in ``.safetensors`` in that format, any
    other by ``torch.save``, as loralib's own examples do.

    Raises:
        ValueError: the model has no adapted layer.
    """
    tensors = loralib_state_dict(model)
    if not tensors:
        raise ValueError(f"{type(model).__name__} has no LoRA layers: there is nothing to save")
    if str(file).endswith(".safetensors"):
        save_file(tensors, file)
    else:
        torch.save(tensors, file)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is no readable checkpoint: {error}") from error
    if isinstance(content, Mapping) and isinstance(content.get("model_state_dict"), Mapping):
        content = content["model_state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path} holds no state dict")
    return dict(content)


def _pairs(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    paths = {key.removesuffix(end) for key in tensors for end in _ENDINGS if key.endswith(end)}
    half = [path for path in paths if not all(path + end in tensors for end in _ENDINGS)]
    if half:
        raise ValueError(f"the checkpoint has one of lora_A and lora_B only of {first_few(half)}")
    pairs = {path: (tensors[path + _ENDINGS[0]], tensors[path + _ENDINGS[1]]) for path in paths}
    # loralib's MergedLinear keeps a mask of its rows in older versions.
    others = {
        key: tensor for key, tensor in tensors.items() if not key.endswith((*_ENDINGS, ".lora_ind"))
    }
    return dict(sorted(pairs.items())), others


def _layer(
    path: str,
    module: nn.Module,
    a: Tensor,
    b: Tensor,
    lora_alpha: float,
    enable_lora: Patterns | None,
    lora_dropout: float,
) -> Any:
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} must be 2-D")
    layer: Any
    if isinstance(module, nn.Embedding):
        layer = LoRAEmbedding.from_embedding(module, b.shape[1], lora_alpha)
    else:
        options: Any = {"lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
        options["autocast_adapter_dtype"] = False
        pattern = _pattern(path, enable_lora)
        r = b.shape[1]
        if pattern is None:
            if a.shape[0] != r:
                raise ValueError(
                    f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are of a "
                    "MergedLinear: enable_lora= says which of its slices have an adapter"
                )
            layer = FusedLoRALinear.from_linear(module, r, **options)
        else:
            layer = SlicedLoRALinear.from_linear(module, r, enable_lora=pattern, **options)
    expected = layer.lora_A.shape, layer.lora_B.shape
    if (a.shape, b.shape) != expected:
        raise ValueError(
            f"{path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} do not fit the layer's "
            f"{list(expected[0])} and {list(expected[1])}"
        )
    with torch.no_grad():
        layer.lora_A.copy_(a)
        layer.lora_B.copy_(b)
    return layer


def _pattern(path: str, enable_lora: Patterns | None) -> Sequence[bool] | None:
    if not isinstance(enable_lora, Mapping):
        return enable_lora
    for name, pattern in enable_lora.items():
        if path == name or path.endswith(f".{name}"):
            return pattern
    return None
