"""The two files of an adapter in PEFT's format, ``adapter_config.json`` and
``adapter_model.safetensors``, read and matched against a model."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..layers.sliced import spread
from .config import LoRAConfig
from .peft_config import ADALORA, NO_PART_OF_A_LAYER, adalora_fields

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

# Far above a configuration that names every layer of a large mixture.
_MAX_CONFIG_BYTES = 4 * 2**20

# What can be copied into a parameter.
_FLOATS = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

# Fields of PEFT's LoraConfig that change what a layer computes in a way FusedLoRALinear does not.
_UNSUPPORTED = (
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
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
_IRRELEVANT = NO_PART_OF_A_LAYER | {
    "init_lora_weights",
    # Of releases before 0.3; resolved by _without_slices.
    "enable_lora",
    "merge_weights",
}

# Fields that PEFT writes as null where they are not set.
_MAY_BE_NULL = frozenset(
    {
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "target_parameters",
    }
)


class Layer(NamedTuple):
    """What A and B must fit; an embedding has its entries as ``in_features``."""

    rank: int
    in_features: int
    out_features: int
    is_embedding: bool = False
    use_dora: bool = False
    adalora: bool = False

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of A, B and DoRA's magnitude or AdaLoRA's factors, by their keys."""
        ending_a, ending_b = EMBEDDING if self.is_embedding else LINEAR
        shapes: dict[str, tuple[int, ...]] = {
            name + ending_a: (self.rank, self.in_features),
            name + ending_b: (self.out_features, self.rank),
        }
        if self.adalora:
            shapes[name + FACTORS] = (self.rank, 1)
        return shapes | ({name + MAGNITUDE: (self.out_features,)} if self.use_dora else {})


LINEAR = (".lora_A.weight", ".lora_B.weight")
EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
MAGNITUDE = ".lora_magnitude_vector"
# AdaLoRA's, beside ".lora_A" and ".lora_B", which have no ".weight" there.
FACTORS = ".lora_E"


@dataclass
class AdapterFiles:
    """An adapter as it was read, with ``tensors`` by their paths in the model; ``label`` names
    their source in errors."""

    config: LoRAConfig
    tensors: dict[str, Tensor]
    label: str

    def paths(self, modules: Collection[str]) -> list[str]:
        """The layers that have an A or B; ``modules`` are the model's own names."""
        found: dict[str, None] = {}
        for key in self.tensors:
            # The weight of a module that happens to be called lora_A is no adapter's.
            if key.rpartition(".")[0] not in modules:
                for ending in LINEAR + EMBEDDING:
                    if key.endswith(ending):
                        found[key.removesuffix(ending)] = None
        return list(found)

    def take_pairs(
        self, model: nn.Module, layers: Mapping[str, Layer]
    ) -> dict[str, tuple[Tensor, ...]]:
        """A and B (with DoRA the magnitude, of AdaLoRA E) of every layer of ``model``, which are
        removed from ``tensors``.

        Raises:
            ValueError: one is missing, of the wrong shape, or no floating point numbers.
        """
        pairs: dict[str, tuple[Tensor, ...]] = {}
        missing, wrong = [], []
        for name, layer in layers.items():
            pair: list[Tensor] = []
            for key, shape in layer.shapes(name).items():
                tensor = self.tensors.pop(key, None)
                if tensor is None:
                    missing.append(key)
                elif tuple(tensor.shape) != shape:
                    wrong.append(
                        f"{key} is {list(tensor.shape)}, the model's layer wants {list(shape)}"
                        + (" (its vocabulary differs)" if name in _embeddings(model) else "")
                    )
                elif tensor.dtype not in _FLOATS:
                    wrong.append(f"{key} is {tensor.dtype}")
                else:
                    pair.append(tensor)
            pairs[name] = tuple(pair)
        if wrong:
            raise ValueError(f"{self.label}: {first_few(wrong)}")
        if missing:
            raise ValueError(f"{self.label} has no {first_few(missing)}")
        return pairs

    def modules_to_save(self, model: nn.Module) -> list[str]:
        """The modules of ``model`` that the adapter replaces whole.

        PEFT takes every module whose name ends in an entry ("classifier" means "pre_classifier"
        too), and lists usual names that the model may not have. So what the file holds decides.
        """
        entries = [entry for entry in self.config.modules_to_save or [] if entry]

        def is_here(name: str, module: nn.Module) -> bool:
            keys = module.state_dict().keys()
            return bool(keys) and all(f"{name}.{key}" in self.tensors for key in keys)

        return [
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if f".{name}".endswith(tuple(f".{entry}" for entry in entries))
            or name.endswith(tuple(entries))
            and is_here(name, module)
        ]

    def match_rest(
        self,
        model: nn.Module,
        saved: Mapping[str, nn.Module],
        adapted: Collection[str],
        *,
        load_embedding_layers: bool,
        shared_base: bool = False,
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], set[str]]:
        """What is not A or B: modules trained in full, biases and embeddings, each by its key with
        its place in the model; and the keys of embeddings that are not the model's already.

        ``saved``: the modules trained in full; ``adapted``: the layers with an adapter;
        ``shared_base``: nothing of the model may be written.

        Raises:
            ValueError: something is missing, has no place, or does not fit it.
        """
        places = places_of(model, adapted)
        wanted = {f"{name}.{key}" for name, module in saved.items() for key in module.state_dict()}
        embeddings = _embeddings(model)
        embedded = {
            key for key in places if _owner(key, adapted) in embeddings and key not in wanted
        }
        missing = sorted(wanted - self.tensors.keys())
        if missing:
            raise ValueError(
                f"{self.label} has no {first_few(missing)}, though "
                f"modules_to_save={self.config.modules_to_save}"
            )
        bias = self.config.bias
        biases = {
            key
            for key in places
            if key.rpartition(".")[2] == "bias"
            and (bias == "all" or bias == "lora_only" and _owner(key, adapted) in adapted)
        }
        # With bias="all" PEFT also writes the biases of its wrappers around modules_to_save.
        doubled = tuple(
            f"{name}.{part}." for name in saved for part in ("original_module", "modules_to_save")
        )
        trained = set() if shared_base else wanted | biases
        written = set() if shared_base else trained | embedded
        found: dict[str, tuple[Tensor, Tensor]] = {}
        known: dict[str, tuple[Tensor, Tensor]] = {}
        unexpected, wrong = [], []
        for key, tensor in self.tensors.items():
            place = places.get(key)
            if key in embedded and not load_embedding_layers:
                continue
            if place is None:
                if not key.startswith(doubled):
                    unexpected.append(key)
            elif key not in trained and _has_values(place, tensor):
                # PEFT saves an output head with its base weight; one that the model has is no news.
                known[key] = place, tensor
            elif key not in written:
                unexpected.append(key)
            else:
                reason = _misfit(place, tensor, key in embedded)
                if reason is None:
                    found[key] = place, tensor
                else:
                    wrong.append(f"{key} {reason}")
        if wrong:
            raise ValueError(f"{self.label}: {first_few(wrong)}")
        if unexpected:
            why = ""
            if embedded.intersection(unexpected):
                why = "; load_embedding_layers=False leaves out embeddings"
            elif shared_base:
                why = "; a store serves A and B, no biases and no modules trained in full"
            raise ValueError(
                f"{self.label} holds what the model has no place for, or with other values: "
                + first_few(sorted(unexpected))
                + why
            )
        self._check_tied(known | found)
        return found, embedded & found.keys()

    def _check_tied(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """One parameter cannot take two values."""
        first: dict[Tensor, str] = {}
        for key, (place, tensor) in found.items():
            other = first.setdefault(place, key)
            if not torch.equal(found[other][1], tensor):
                raise ValueError(
                    f"{self.label}: {other} and {key} differ, and are one parameter of the model"
                )


def read_adapter(folder: Path, model: nn.Module) -> AdapterFiles:
    """The adapter in ``folder``, its configuration checked to be one that this package computes.

    Raises:
        FileNotFoundError: the directory or one of its two files is missing.
        ValueError: a file cannot be read, or says what is not computed here.
    """
    content, names = _read_json(folder), names_of(model)
    config = _checked(content, folder / CONFIG_NAME, names)
    return _files(config, content, _read_tensors(folder), names, str(folder / WEIGHTS_NAME))


def from_state_dict(
    tensors: Mapping[str, Tensor], content: Mapping[str, Any], model: nn.Module, label: str
) -> AdapterFiles:
    """As :func:`read_adapter`, of tensors with PEFT's keys and the fields of PEFT's file."""
    names = names_of(model)
    return _files(_checked(content, label, names), content, tensors, names, label)


def _files(
    config: LoRAConfig,
    content: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    names: Collection[str],
    label: str,
) -> AdapterFiles:
    if config.adalora is not None:
        # A and B by the keys that they have in LoRA.
        bare = (".lora_A", ".lora_B")
        tensors = {k + ".weight" * k.endswith(bare): tensor for k, tensor in tensors.items()}
    own = without_prefix(tensors, names)
    if content.get("enable_lora") is not None:
        _without_slices(config, own, content["enable_lora"], label)
    return AdapterFiles(config, own, label)


def _without_slices(
    config: LoRAConfig, tensors: dict[str, Tensor], enable_lora: Any, label: str
) -> None:
    """Turn the adapters of PEFT before 0.3, whose layers were loralib's ``MergedLinear``, into
    plain ones of e times the rank for e enabled slices, with the same product."""
    if not (isinstance(enable_lora, list) and any(enable_lora)):
        raise ValueError(f"{label}: enable_lora is {enable_lora!r}, no list that enables a slice")
    for key, tensor in tensors.items():
        if key.endswith(LINEAR[1]):
            if tensor.dim() == 3:
                tensor = tensor.squeeze(-1)
            if tensor.dim() != 2 or len(tensor) % sum(enable_lora):
                raise ValueError(
                    f"{label}: {key} is {list(tensor.shape)}, enable_lora {enable_lora}"
                )
            tensors[key] = spread(tensor, enable_lora)
    config.r *= sum(enable_lora)
    config.lora_alpha *= sum(enable_lora)


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no adapter directory {folder}")
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}: it is not a PEFT adapter")
    size = path.stat().st_size
    if size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size} bytes: it is no adapter's configuration")
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object: {type(content).__name__}")
    return content


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        ((twin, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twin!r} is in it twice")
    return content


def _checked(content: Mapping[str, Any], path: Path | str, names: Collection[str]) -> LoRAConfig:
    """The configuration in ``content``, fields as in PEFT's file; ``path`` names it in errors."""
    peft_type = content.get("peft_type")
    if peft_type not in ("LORA", "ADALORA"):
        raise ValueError(
            f"{path}: peft_type is {peft_type!r}; only LORA and ADALORA adapters can be loaded"
        )
    adaptive = peft_type == "ADALORA"
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
    others = _IRRELEVANT | ADALORA if adaptive else _IRRELEVANT
    unknown = [k for k, v in content.items() if v and k not in known and k not in others]
    if unknown:
        warnings.warn(
            f"{path}: ignored fields that are not known here: {first_few(unknown)}", stacklevel=4
        )
    # What PEFT leaves out is at PEFT's defaults, which are not all ours.
    values = {"r": 8, "lora_alpha": 8} | {
        k: v for k, v in content.items() if k in known and not (v is None and k in _MAY_BE_NULL)
    }
    values["init_lora_weights"] = True
    # No field of PEFT's.
    values.pop("adalora", None)
    if adaptive:
        values = {k: v for k, v in values.items() if k not in ADALORA} | adalora_fields(content)
    if values.get("target_parameters") and "target_modules" not in values:
        values["target_modules"] = []
    config = LoRAConfig(**values)
    try:
        config.check()
        config.check_patterns_end(names)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        if pickle.exists():
            raise ValueError(
                f"{pickle} is a pickle, which can run code: convert it to {WEIGHTS_NAME} first"
            )
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_NAME}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file (truncated or another format): {error}"
        ) from error


def without_prefix(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """``tensors`` by their paths in the model whose modules are ``names``."""
    containers = {name.rpartition(".")[0] for name in names}
    layers = set(names) - containers
    stripped = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}

    def fitting(keys: Iterable[str]) -> int:
        return sum(key.removesuffix(e) in layers for key in keys for e in LINEAR + EMBEDDING)

    # A model may have a base_model.model of its own, and keys of it without PEFT's.
    return dict(tensors) if fitting(tensors) > fitting(stripped) else stripped


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules(remove_duplicate=False)]


def places_of(model: nn.Module, adapted: Collection[str]) -> dict[str, Tensor]:
    """The model's own tensors by their keys in a file."""
    places = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        owner, _, last = key.rpartition(".")
        if owner in adapted and last in ("lora_A", "lora_B", FACTORS[1:], MAGNITUDE[1:]):
            continue
        if isinstance(tensor, Tensor):
            places[key] = tensor
            if owner in adapted:
                places[f"{owner}.base_layer.{last}"] = tensor
    return places


def _owner(key: str, adapted: Collection[str]) -> str:
    owner = key.rpartition(".")[0]
    base = owner.removesuffix(".base_layer")
    return base if base in adapted else owner


def _embeddings(model: nn.Module) -> set[str]:
    """The modules that PEFT saves with ``save_embedding_layers``."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, getter)())
        except (AttributeError, NotImplementedError):
            # No model of transformers', or one without embeddings.
            continue
    named = model.named_modules(remove_duplicate=False)
    return {name for name, module in named if any(module is other for other in found)}


@torch.no_grad()
def _has_values(place: Tensor, tensor: Tensor) -> bool:
    if place.is_meta or place.shape != tensor.shape:
        return False
    return torch.equal(place, tensor.to(place.device, place.dtype))


def _misfit(place: Tensor, tensor: Tensor, is_embedding: bool) -> str | None:
    """Why ``tensor`` cannot be copied to its place, or None."""
    if place.is_meta:
        return "has its place on the meta device (offloaded): load the model without offloading"
    if is_embedding and place.shape[1:] == tensor.shape[1:] and len(place) != len(tensor):
        return (
            f"has {len(tensor)} rows, the model's has {len(place)}: call "
            f"model.resize_token_embeddings({len(tensor)}) first, or keep the model's own with "
            "load_embedding_layers=False"
        )
    if place.shape != tensor.shape:
        return f"is {list(tensor.shape)}, the model's is {list(place.shape)}"
    if tensor.dtype not in (_FLOATS if place.dtype in _FLOATS else (place.dtype,)):
        return f"is {tensor.dtype}, the model's is {place.dtype}"
    return None


def first_few(items: list[str], count: int = 4) -> str:
    more = len(items) - count
    return ", ".join(items[:count]) + (f" and {more} more" if more > 0 else "")
