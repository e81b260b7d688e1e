"""Adapters of whole models in PEFT's format: ``save_adapter``, ``load_adapter``, and the writing of
the files."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..functional.checks import is_dtensor
from ..layers.adalora import AdaLoRALinear
from ..layers.fused import FusedLoRALinear
from ..layers.merging import write_obstacle
from ..layers.replacing import features
from .apply import (
    Applied,
    applied,
    insert,
    lora_layers,
    lost_layers,
    select,
    unwrap,
    warn_of_lost_layers,
)
from .config import LoRAConfig, exact_patterns
from .experts import expert_layers, file_prefixes, target_parameters, wanted_layers
from .foreign import stored_value, taken_for_experts
from .on_disk import (
    CONFIG_NAME,
    FACTORS,
    MAGNITUDE,
    PREFIX,
    WEIGHTS_NAME,
    Layer,
    first_few,
    names_of,
    places_of,
    read_adapter,
)
from .peft_config import heads_of_task

ModelT = TypeVar("ModelT", bound=nn.Module)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of ``model`` as PEFT does, so that ``PeftModel.from_pretrained`` reads it.

    The directory is made if it is missing; each of the two files is replaced whole. Biases that
    train, ``modules_to_save`` and embeddings that ``load_adapter`` brought go along. A scaling that
    was set by hand is saved as an alpha of its layer. A warning says what PEFT reads otherwise.

    Raises:
        ValueError: the model has no LoRA layers of this package.
        RuntimeError: the adapter was folded in by ``merge_adapter(model, keep_base=False)``, or its
            values are on the meta device.
        TypeError: the model is sharded (``fully_shard``, tensor parallelism).
    """
    root = unwrap(model)
    record = applied(root)
    layers, experts = lora_layers(root), expert_layers(root)
    if any(layer.lora_A is None for layer in layers.values()):
        raise RuntimeError(
            "merge_adapter(model, keep_base=False) removed the adapter: there is nothing to save"
        )
    warn_of_lost_layers(root)
    if not layers and not experts:
        raise ValueError(f"{type(root).__name__} has no LoRA layers left: there is nothing to save")
    _warn_of_shared(root, layers)
    tensors = _tensors(root, record, layers)
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise RuntimeError(
            f"{first_few(empty)} on the meta device, without values: offloaded weights come back "
            "with accelerate.hooks.remove_hook_from_module(model, recurse=True), others by "
            "loading them"
        )
    sharded = [key for key, tensor in tensors.items() if is_dtensor(tensor)]
    if sharded:
        raise TypeError(
            f"the model is sharded ({first_few(sharded)}): gather it with "
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) of "
            "torch.distributed.checkpoint.state_dict, load that into a model of one process and "
            "save this one"
        )
    write_adapter(
        Path(directory),
        root,
        record.config,
        {name: (layer.r, layer.scaling) for name, layer in layers.items()},
        tensors,
        fan_in_fan_out=bool(layers) and all(layer.fan_in_fan_out for layer in layers.values()),
        experts={
            f"{path}.{name}": (adapter.r, adapter.scaling)
            for path, module in experts.items()
            for name, adapter in module.adapters().items()
        },
        saved=record.report.modules_to_save,
    )


def load_adapter(
    model: ModelT, directory: str | os.PathLike[str], *, load_embedding_layers: bool = True
) -> ModelT:
    """Load an adapter that :func:`save_adapter` or PEFT wrote, and return the model.

    On a model without LoRA layers the adapter's own configuration is applied first; on one that has
    them, layers and ranks must agree, and the file's alpha decides the scaling. Local directories
    and safetensors only.

    Args:
        load_embedding_layers: embeddings and an output head that were saved along (PEFT's
            ``save_embedding_layers``) replace the values of the model's; False leaves these as
            they are.

    Raises:
        FileNotFoundError: the directory or one of its two files is missing.
        ValueError: a file is corrupt, of another method than LoRA and AdaLoRA, or uses what
            :class:`FusedLoRALinear` does not compute (a bias on lora_B, ``layer_replication``,
            ...); tensors are missing, left over, or of the wrong shape (a resized vocabulary too).
            The message names the file and the modules, and the model is as it was.
    """
    root = unwrap(model)
    folder = Path(directory)
    files = read_adapter(folder, root)
    config = files.config
    layers, experts = lora_layers(root), expert_layers(root)
    # (path, Parameter) -> prefix of its keys
    prefixes: dict[tuple[str, str], str] = {}
    ranks: dict[tuple[nn.Module, str], dict[str, int]]
    if layers or experts:
        selection = None
        warn_of_lost_layers(root)
        present = applied(root).config
        if config.bias != present.bias:
            raise ValueError(
                f"{folder / CONFIG_NAME}: bias is {config.bias!r}, the model was adapted with "
                f"bias={present.bias!r}"
            )
        removed = [name for name, layer in layers.items() if layer.lora_A is None]
        if removed:
            raise ValueError(
                f"merge_adapter(model, keep_base=False) removed the adapter of {first_few(removed)}"
            )
        adaptive = config.adalora is not None
        wanted = {
            n: Layer(m.r, m.in_features, m.out_features, use_dora=m.use_dora, adalora=adaptive)
            for n, m in layers.items()
        }
        ranks = {
            (module, path): {name: own.r for name, own in module.adapters().items()}
            for path, module in experts.items()
        }
        if config.use_dora != present.use_dora:
            raise ValueError(
                f"{folder / CONFIG_NAME}: use_dora is {config.use_dora}, the model was adapted "
                f"with use_dora={present.use_dora}"
            )
        if (present.adalora is not None) != adaptive or adaptive and present.r != config.r:
            raise ValueError(
                f"{folder / CONFIG_NAME}: this is {_method(config)}, the model was adapted by "
                + _method(present)
            )
        saved = {name: root.get_submodule(name) for name in applied(root).report.modules_to_save}
    else:
        config.modules_to_save = files.modules_to_save(root) or None
        selection = select(root, config, folder)
        wanted = {}
        for module, names in selection.targets.items():
            rank = config.rank(names[0])
            wanted[names[0]] = Layer(
                rank,
                *features(module),
                use_dora=config.use_dora,
                adalora=config.adalora is not None,
            )
        saved = selection.modules_to_save
        ranks = {
            (module, path): {name: config.rank(f"{path}.{name}") for name in names}
            for module, (path, names) in selection.experts.targets.items()
        }
    for (module, path), own in ranks.items():
        for name, (prefix, shape) in wanted_layers(path, module, own).items():
            wanted[prefix], prefixes[path, name] = shape, prefix
    pairs = files.take_pairs(root, wanted)
    for name, layer in layers.items():
        obstacle = write_obstacle(layer, layer._adapter_names())
        if obstacle is not None:
            raise ValueError(f"no adapter can be loaded into {name}: {obstacle}")
    others, embeddings = files.match_rest(
        root, saved, wanted.keys(), load_embedding_layers=load_embedding_layers
    )
    if selection is None:
        config.warn_of_unmatched(wanted.keys(), names_of(root), stacklevel=3)
    else:
        insert(root, config, selection)
        layers = lora_layers(root)
        _warn_of_shared(root, layers)
    with torch.no_grad():
        for parameter, tensor in others.values():
            parameter.copy_(tensor)
    # After the base weights: a merged layer merges again.
    for (path, name), prefix in prefixes.items():
        alpha = config.alpha(f"{path}.{name}")
        expert_layers(root)[path].set_lora(
            name, *pairs.pop(prefix), lora_alpha=alpha, use_rslora=config.use_rslora
        )
    for name, tensors in pairs.items():
        alpha, use_rslora = config.alpha(name), config.use_rslora
        layers[name].set_lora(*tensors, lora_alpha=alpha, use_rslora=use_rslora)
    # Which layers there are, and how they train, stays what it was.
    record = applied(root)
    record.config = replace(
        record.config,
        lora_alpha=config.lora_alpha,
        alpha_pattern=config.alpha_pattern,
        use_rslora=config.use_rslora,
        adalora=config.adalora,
        task_type=config.task_type or record.config.task_type,
    )
    record.embeddings = sorted({*record.embeddings, *embeddings})
    return model


def _method(config: LoRAConfig) -> str:
    return "LoRA" if config.adalora is None else f"AdaLoRA with init_r={config.r}"


def _warn_of_shared(model: nn.Module, layers: dict[str, FusedLoRALinear]) -> None:
    adapted = set(layers.values())
    for name, module in model.named_modules(remove_duplicate=False):
        if module in adapted and name not in layers:
            warnings.warn(
                f"{name} is one module with another place of the model, and its adapter works at "
                "both; PEFT applies it at the first place only",
                stacklevel=3,
            )


def _tensors(
    model: nn.Module, record: Applied, layers: dict[str, FusedLoRALinear]
) -> dict[str, Tensor]:
    config = record.config
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        assert layer.lora_A is not None and layer.lora_B is not None
        ending = ".weight"
        if isinstance(layer, AdaLoRALinear):
            ending = ""
            # One alpha is the whole file's.
            factor = layer.scaling / config.scaling(name, layer.r)
            tensors[name + FACTORS] = stored_value(layer, FACTORS[1:]) * factor
        tensors[f"{name}.lora_A{ending}"] = stored_value(layer, "lora_A")
        tensors[f"{name}.lora_B{ending}"] = stored_value(layer, "lora_B")
        if layer.use_dora:
            tensors[name + MAGNITUDE] = stored_value(layer, MAGNITUDE[1:])
        if config.bias != "none" and layer.bias is not None:
            tensors[f"{name}.base_layer.bias"] = stored_value(layer, "bias")
    for path, module in expert_layers(model).items():
        adapters = module.adapters()
        for name, prefix in file_prefixes(path, list(adapters)).items():
            for key in ("lora_A", "lora_B"):
                tensors[f"{prefix}.{key}.weight"] = stored_value(adapters[name], key)
    if config.bias == "all":
        for name, _ in model.named_parameters():
            owner, _, last = name.rpartition(".")
            if last == "bias" and owner not in layers:
                tensors[name] = stored_value(model.get_submodule(owner), last)
    for name in record.report.modules_to_save:
        for key, tensor in model.get_submodule(name).state_dict().items():
            owner, _, last = f"{name}.{key}".rpartition(".")
            if tensor.is_meta:
                tensor = stored_value(model.get_submodule(owner), last)
            tensors[f"{name}.{key}"] = tensor
    if record.embeddings:
        places = places_of(model, layers)
        tensors |= {key: places[key] for key in record.embeddings}
    return tensors


def write_adapter(
    folder: Path,
    model: nn.Module,
    config: LoRAConfig,
    layers: Mapping[str, tuple[int, float]],
    tensors: Mapping[str, Tensor],
    *,
    fan_in_fan_out: bool,
    saved: Collection[str] = (),
    experts: Mapping[str, tuple[int, float]] | None = None,
) -> None:
    """Write both files as PEFT does, each whole or not at all.

    ``layers``: rank and scaling of the adapted layers, by name; ``tensors`` by their paths in the
    model; ``saved``: the modules trained in full; ``experts``: rank and scaling of the adapted
    Parameters of experts.
    """
    content = _content(model, config, layers, fan_in_fan_out, experts or {})
    content["modules_to_save"], more = _modules_to_save(model, config, layers, saved)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    # Tied parameters may appear under two keys; safetensors wants storage of their own.
    unique = {
        PREFIX + key: tensor.detach().clone(memory_format=torch.contiguous_format)
        for key, tensor in {**more, **tensors}.items()
    }
    _replace(folder / WEIGHTS_NAME, lambda path: save_file(unique, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))


def _content(
    model: nn.Module,
    config: LoRAConfig,
    layers: Mapping[str, tuple[int, float]],
    fan_in_fan_out: bool,
    experts: Mapping[str, tuple[int, float]],
) -> dict[str, Any]:
    content = asdict(config)
    del content["autocast_adapter_dtype"], content["experts"]
    content["target_parameters"] = target_parameters(model, list(experts)) or None
    taken = taken_for_experts(model, layers)
    if taken:
        endings = sorted({name.rpartition(".")[2] for name in taken})
        warnings.warn(
            f"PEFT takes {first_few(endings)} of this model for its fused experts, and does not "
            f"find the adapters of {first_few(taken)} in this file; "
            "lora_kernels.load_adapter does. For PEFT, adapt the model without them "
            "(exclude_modules)",
            stacklevel=4,
        )
    if taken or config.all_linear or config.layers_to_transform is not None or lost_layers(model):
        # Resolved: "all" is another set of layers in PEFT, it finds no index in "layers.0.x", and
        # of a mixture it takes a regular expression for the last names that match.
        content["target_modules"] = _targets(model, layers)
        content["layers_to_transform"] = content["layers_pattern"] = None
    adalora = content.pop("adalora")
    shared = {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "peft_type": "LORA" if adalora is None else "ADALORA",
    }
    if adalora is not None:
        # Its r is not used, and PEFT warns of any but its default.
        return content | shared | {"init_r": config.r, "r": 8} | adalora
    alphas = {}
    for name, (rank, scaling) in {**layers, **experts}.items():
        alpha = scaling * (math.sqrt(rank) if config.use_rslora else rank)
        own = config.alpha(name)
        alphas[name] = rank, own if math.isclose(alpha, own, rel_tol=1e-12) else alpha
    return content | exact_patterns(config, alphas) | shared


def _modules_to_save(
    model: nn.Module, config: LoRAConfig, adapted: Collection[str], saved: Collection[str]
) -> tuple[list[str] | None, dict[str, Tensor]]:
    """Entries by which PEFT finds the modules ``saved``, and the tensors of others that it then
    looks for too: it takes every module whose name ends in an entry."""
    names = names_of(model)
    entries = config.modules_to_save or [] if saved else []
    if {name for name in names if name.endswith(tuple(entries))} != set(saved):
        entries = sorted(saved)
    wanted = {name for name in names if name.endswith(tuple(entries))}
    wanted.update(heads_of_task(model, config.task_type))
    others = [name for name in names if name in wanted and name not in saved]
    more: dict[str, Tensor] = {}
    for name in others:
        if any(f"{layer}.".startswith(f"{name}.") for layer in adapted):
            warnings.warn(
                f"PEFT reads modules_to_save={entries} and task_type={config.task_type!r} as "
                f"{name} too, which has an adapter: it cannot load this file",
                stacklevel=4,
            )
            continue
        state = model.get_submodule(name).state_dict()
        more |= {f"{name}.{key}": tensor for key, tensor in state.items()}
    return entries or None, more


def _targets(model: nn.Module, layers: Collection[str]) -> list[str] | str:
    """What selects these layers and no other: their last names, their whole names (which may end
    others), or a regular expression."""
    names = [name for name, _ in model.named_modules()]
    for entries in {name.rpartition(".")[2] for name in layers}, set(layers):
        config = LoRAConfig(target_modules=sorted(entries))
        if {name for name in names if config.is_target(name)} == set(layers):
            return sorted(entries)
    return "|".join(re.escape(name) for name in sorted(layers))


def _replace(path: Path, write: Any) -> None:
    """Write beside ``path`` and move into place, so that a reader never sees half a file."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
