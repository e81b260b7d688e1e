"""PEFT's adapter format on disk, both ways: ``adapter_config.json`` and
``adapter_model.safetensors``."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..functional import is_dtensor
from ..merging import write_obstacle
from ..models import (
    applied,
    insert,
    lora_layers,
    lost_layers,
    select,
    unwrap,
    warn_of_lost_layers,
)
from ..nn import FusedLoRALinear
from .lora_config import LoRAConfig
from .transformers import stored_value

ModelT = TypeVar("ModelT", bound=nn.Module)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Fields of PEFT's LoraConfig that change what a layer computes in a way FusedLoRALinear does not.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "megatron_config",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)

# Initialisations that rewrite the base weight: the adapter belongs to another base than this one.
_BASE_CHANGING_INIT = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Fields that do not touch what the layers compute once the weights are loaded.
_IRRELEVANT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of ``model`` as PEFT does, so that ``PeftModel.from_pretrained`` reads it.

    The directory is made if it is missing; each of the two files is replaced whole. Biases that
    train and ``modules_to_save`` go along. A scaling that was set by hand is saved as an alpha of
    its layer.

    Raises:
        ValueError: the model has no LoRA layers of this package.
        RuntimeError: the adapter was folded in by ``merge_adapter(model, keep_base=False)``, or its
            values are on the meta device.
        TypeError: the model is sharded (``fully_shard``, tensor parallelism).
    """
    root = unwrap(model)
    config = applied(root).config
    layers = lora_layers(root)
    if any(layer.lora_A is None for layer in layers.values()):
        raise RuntimeError(
            "merge_adapter(model, keep_base=False) removed the adapter: there is nothing to save"
        )
    warn_of_lost_layers(root)
    if not layers:
        raise ValueError(f"{type(root).__name__} has no LoRA layers left: there is nothing to save")
    _warn_of_shared(root, layers)
    tensors = _tensors(root, config)
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise RuntimeError(
            f"{some(empty)} on the meta device, without values: offloaded weights come back with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True), others by loading them"
        )
    sharded = [key for key, tensor in tensors.items() if is_dtensor(tensor)]
    if sharded:
        raise TypeError(
            f"the model is sharded ({some(sharded)}): gather it with get_model_state_dict(model, "
            "options=StateDictOptions(full_state_dict=True)) of torch.distributed.checkpoint."
            "state_dict, load that into a model of one process and save this one"
        )
    write_adapter(Path(directory), _to_peft(root, config, layers), tensors)


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write both files, each whole or not at all; ``tensors`` by their paths in the model."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps(config, indent=2, sort_keys=True) + "\n"
    # Tied parameters may appear under two keys; safetensors wants storage of their own.
    unique = {
        _PREFIX + key: tensor.detach().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(unique, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG_NAME, lambda path: path.write_text(content))


def load_adapter(model: ModelT, directory: str | os.PathLike[str]) -> ModelT:
    """Load an adapter that :func:`save_adapter` or PEFT wrote, and return the model.

    On a model without LoRA layers the adapter's own configuration is applied first; on one that has
    them, layers and ranks must agree, and the file's alpha decides the scaling. Local directories
    and safetensors only.

    Raises:
        FileNotFoundError: the directory or one of its two files is missing.
        ValueError: a file is corrupt, of another method than LoRA, or uses what
            :class:`FusedLoRALinear` does not compute (DoRA, a bias on lora_B, ...); tensors are
            missing, left over, or of the wrong shape. The message names the file and the modules,
            and the model is as it was.
    """
    root = unwrap(model)
    folder = Path(directory)
    config = read_config(folder)
    tensors = read_tensors(folder)
    config.modules_to_save = _present(root, config.modules_to_save)
    layers = lora_layers(root)
    shapes: dict[str, tuple[int, int, int]] = {}
    if layers:
        selection = None
        warn_of_lost_layers(root)
        present = applied(root).config
        if config.bias != present.bias:
            raise ValueError(
                f"{folder / CONFIG_NAME}: bias is {config.bias!r}, the model was adapted with "
                f"bias={present.bias!r}"
            )
        for name, layer in layers.items():
            if layer.lora_A is None:
                raise ValueError(
                    f"merge_adapter(model, keep_base=False) removed the adapter of {name}"
                )
            shapes[name] = (layer.r, layer.in_features, layer.out_features)
        saved = {name: root.get_submodule(name) for name in applied(root).report.modules_to_save}
    else:
        selection = select(root, config)
        for module, names in selection.targets.items():
            weight = module.weight
            assert isinstance(weight, Tensor)
            transposed = not isinstance(module, nn.Linear)
            out_features, in_features = weight.shape[::-1] if transposed else weight.shape
            shapes[names[0]] = (config.rank(names[0]), in_features, out_features)
        saved = selection.modules_to_save
    pairs = _take_pairs(tensors, shapes, folder / WEIGHTS_NAME)
    for name, layer in layers.items():
        obstacle = write_obstacle(layer, ("lora_A", "lora_B"))
        if obstacle is not None:
            raise ValueError(f"no adapter can be loaded into {name}: {obstacle}")
    others = match_others(root, tensors, saved, set(shapes), config, folder / WEIGHTS_NAME)
    if selection is not None:
        insert(root, config, selection)
        layers = lora_layers(root)
        _warn_of_shared(root, layers)
    for name, (lora_a, lora_b) in pairs.items():
        alpha, use_rslora = config.alpha(name), config.use_rslora
        layers[name].set_lora(lora_a, lora_b, lora_alpha=alpha, use_rslora=use_rslora)
    with torch.no_grad():
        for parameter, tensor in others:
            parameter.copy_(tensor)
    # Which layers there are, and how they train, stays what it was.
    record = applied(root)
    record.config = replace(
        record.config,
        lora_alpha=config.lora_alpha,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.use_rslora,
    )
    return model


def _warn_of_shared(model: nn.Module, layers: dict[str, FusedLoRALinear]) -> None:
    adapted = set(layers.values())
    for name, module in model.named_modules(remove_duplicate=False):
        if module in adapted and name not in layers:
            warnings.warn(
                f"{name} is one module with another place of the model, and its adapter works at "
                "both; PEFT applies it at the first place only",
                stacklevel=3,
            )


def _present(model: nn.Module, modules_to_save: list[str] | None) -> list[str] | None:
    """PEFT lists heads by their usual names ("classifier", "score"), also those a model has not."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    found = [m for m in modules_to_save or [] if any(f".{n}".endswith(f".{m}") for n in names)]
    return found or modules_to_save


def read_config(folder: Path) -> LoRAConfig:
    """The configuration in ``folder``, checked to be one that this package computes."""
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter directory {folder}")
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}: it is not a PEFT adapter")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: {type(content).__name__}")
    return parse_config(content, path)


def parse_config(content: Mapping[str, Any], path: Path | str) -> LoRAConfig:
    """The configuration in ``content``, fields as in PEFT's file; ``path`` names it in errors."""
    peft_type = content.get("peft_type")
    if peft_type != "LORA":
        raise ValueError(f"{path}: peft_type is {peft_type!r}; only LORA adapters can be loaded")
    used = [name for name in _UNSUPPORTED if content.get(name)]
    if used:
        raise ValueError(f"{path} uses {', '.join(used)}, which FusedLoRALinear does not compute")
    init = content.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_BASE_CHANGING_INIT):
        raise ValueError(
            f"{path}: init_lora_weights={init!r} changed the base weights; convert the adapter to "
            "plain LoRA when saving it (PEFT's path_initial_model_for_weight_conversion)"
        )
    known = {f.name for f in fields(LoRAConfig)}
    unknown = [k for k, v in content.items() if v and k not in known and k not in _IRRELEVANT]
    if unknown:
        warnings.warn(
            f"{path}: ignored fields that are not known here: {', '.join(unknown)}", stacklevel=3
        )
    # What PEFT leaves out is at PEFT's defaults, which are not all ours.
    values = {"r": 8, "lora_alpha": 8} | {
        k: v for k, v in content.items() if k in known and v is not None
    }
    values["init_lora_weights"] = True
    config = LoRAConfig(**values)
    try:
        config.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``folder`` by PEFT's keys without the ``base_model.model.`` prefix."""
    path = folder / WEIGHTS_NAME
    if not path.exists():
        pickle = folder / "adapter_model.bin"
        if pickle.exists():
            raise ValueError(
                f"{pickle} is a pickle, which can run code: convert it to {WEIGHTS_NAME} first"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_NAME}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file (truncated or another format): {error}"
        ) from error
    return without_prefix(tensors)


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}


def _take_pairs(
    tensors: dict[str, Tensor], shapes: dict[str, tuple[int, int, int]], path: Path
) -> dict[str, tuple[Tensor, Tensor]]:
    """Remove every layer's A and B from ``tensors``; ``shapes``: name -> (r, in, out)."""
    pairs = {}
    missing, wrong = [], []
    for name, (r, in_features, out_features) in shapes.items():
        pair = []
        for key, shape in (
            (f"{name}.lora_A.weight", (r, in_features)),
            (f"{name}.lora_B.weight", (out_features, r)),
        ):
            tensor = tensors.pop(key, None)
            if tensor is None:
                missing.append(key)
            elif tuple(tensor.shape) != shape:
                wrong.append(
                    f"{key} is {list(tensor.shape)}, the model's layer wants {list(shape)}"
                )
            else:
                pair.append(tensor)
        if len(pair) == 2:
            pairs[name] = (pair[0], pair[1])
    if wrong:
        raise ValueError(f"{path}: {some(wrong)}")
    if missing:
        raise ValueError(f"{path} has no {some(missing)}")
    return pairs


def match_others(
    model: nn.Module,
    tensors: dict[str, Tensor],
    saved: dict[str, nn.Module],
    adapted: set[str],
    config: LoRAConfig,
    path: Path | str,
) -> list[tuple[Tensor, Tensor]]:
    """Modules trained in full and biases of the file, each with its place in the model."""
    # With bias="all" PEFT also writes the biases of its wrappers around modules_to_save.
    for name in saved:
        inside = (f"{name}.original_module.", f"{name}.modules_to_save.")
        for key in [key for key in tensors if key.startswith(inside)]:
            del tensors[key]
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    wanted = {f"{name}.{key}" for name, module in saved.items() for key in module.state_dict()}
    missing = sorted(wanted - tensors.keys())
    if missing:
        raise ValueError(
            f"{path} has no {some(missing)}, though modules_to_save={config.modules_to_save}"
        )
    found = []
    unexpected, wrong = [], []
    for key, tensor in tensors.items():
        name, _, last = key.rpartition(".")
        owner = name.removesuffix(".base_layer")
        place = state.get(f"{owner}.{last}" if owner else last)
        is_bias = (
            last == "bias" and config.bias != "none" and (config.bias == "all" or owner in adapted)
        )
        if place is None or not (key in wanted or is_bias):
            # PEFT saves an output head with its base weight; one that the model has is no news.
            if place is None or place.shape != tensor.shape or not _has_values(place, tensor):
                unexpected.append(key)
        elif place.shape != tensor.shape:
            wrong.append(f"{key} is {list(tensor.shape)}, the model's is {list(place.shape)}")
        else:
            found.append((place, tensor))
    if wrong:
        raise ValueError(f"{path}: {some(wrong)}")
    if unexpected:
        raise ValueError(
            f"{path} holds what the model has no place for, or with other values: "
            + some(sorted(unexpected))
        )
    return found


@torch.no_grad()
def _has_values(place: Tensor, tensor: Tensor) -> bool:
    return torch.equal(place, tensor.to(place.device, place.dtype))


def _tensors(model: nn.Module, config: LoRAConfig) -> dict[str, Tensor]:
    layers = lora_layers(model)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert layer.lora_A is not None and layer.lora_B is not None
        tensors[f"{name}.lora_A.weight"] = stored_value(layer, "lora_A")
        tensors[f"{name}.lora_B.weight"] = stored_value(layer, "lora_B")
        if config.bias != "none" and layer.bias is not None:
            tensors[f"{name}.base_layer.bias"] = stored_value(layer, "bias")
    if config.bias == "all":
        for name, _ in model.named_parameters():
            owner, _, last = name.rpartition(".")
            if last == "bias" and owner not in layers:
                tensors[name] = stored_value(model.get_submodule(owner), last)
    for name in applied(model).report.modules_to_save:
        for key, tensor in model.get_submodule(name).state_dict().items():
            owner, _, last = f"{name}.{key}".rpartition(".")
            if tensor.is_meta:
                tensor = stored_value(model.get_submodule(owner), last)
            tensors[f"{name}.{key}"] = tensor
    return tensors


def _to_peft(
    model: nn.Module, config: LoRAConfig, layers: dict[str, FusedLoRALinear]
) -> dict[str, Any]:
    alpha_pattern = {}
    for name, layer in layers.items():
        alpha = layer.scaling * (math.sqrt(layer.r) if config.use_rslora else layer.r)
        if not math.isclose(alpha, config.alpha(name), rel_tol=1e-12):
            # Anchored, and before the user's patterns: PEFT takes the first that matches.
            alpha_pattern[f"^{name}"] = alpha
    content = asdict(config)
    del content["autocast_adapter_dtype"]
    if config.all_linear or config.layers_to_transform is not None or lost_layers(model):
        # Resolved: "all" is another set of layers in PEFT, and it finds no index in "layers.0.x".
        content["target_modules"] = endings(model, layers)
        content["layers_to_transform"] = content["layers_pattern"] = None
    content["alpha_pattern"] = alpha_pattern | config.alpha_pattern
    return content | fields_of_model(model, all(layer.fan_in_fan_out for layer in layers.values()))


def fields_of_model(model: nn.Module, fan_in_fan_out: bool) -> dict[str, Any]:
    """What PEFT's file says besides the fields of ``LoRAConfig``."""
    return {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "peft_type": "LORA",
        "task_type": None,
    }


def endings(model: nn.Module, layers: Collection[str]) -> list[str]:
    """The adapted layers' last names if they select nothing else, else their whole names."""
    last = {name.rpartition(".")[2] for name in layers}
    selected = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return sorted(last) if selected == set(layers) else sorted(layers)


def _replace(path: Path, write: Any) -> None:
    """Write beside ``path`` and move into place, so that a reader never sees half a file."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def some(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
