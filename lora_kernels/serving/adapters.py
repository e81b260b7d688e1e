"""One adapter in the host's memory: read in PEFT's format and checked against a model, or drawn
anew; and written back."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional.dora import dora_norm
from ..layers import routed
from ..layers.batches import Adapter
from ..layers.multi import MultiLoRALinear, unsupported_embedding_reason
from ..layers.multi_experts import ExpertSlots, MultiLoRAExperts
from ..layers.replacing import features, unsupported_reason, weight_dtype
from ..models.checkpoints import write_adapter
from ..models.config import LoRAConfig
from ..models.experts import file_prefixes, wanted_layers
from ..models.on_disk import (
    MAGNITUDE,
    AdapterFiles,
    Layer,
    from_state_dict,
    names_of,
    read_adapter,
)
from ..spec.four_bit import quant_state_of

Source = str | os.PathLike[str] | Mapping[str, Tensor]


@dataclass
class Weights:
    """A and B of one layer as its slots hold them: a [r, in] and b [out, r]; of an embedding a is
    [V, r], of experts they are [E, r, in] and [E, out, r]. With DoRA the magnitude [out], and over
    the lengths of the rows of ``W + scale * B A`` the ratio [out]."""

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    ratio: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.b.shape[-1]


@dataclass(eq=False)
class HostAdapter:
    """An adapter by the paths of its layers."""

    config: LoRAConfig
    layers: dict[str, Weights]

    @functools.cached_property
    def ranks_and_scales(self) -> dict[str, tuple[int, float]]:
        return {path: (w.rank, w.scale) for path, w in self.layers.items()}

    def in_slot(self, name: str, slot: int) -> Adapter:
        """What a batch knows of it."""
        config = self.config
        return Adapter(name, slot, self.ranks_and_scales, config.lora_dropout, config.use_dora)


def check_trainable(adapters: Sequence[HostAdapter]) -> None:
    """Raise RuntimeError where one cannot train in its slot."""
    if any(adapter.config.use_dora for adapter in adapters):
        raise RuntimeError("a store serves DoRA adapters and does not train them: unload them")
    if any(adapter.config.target_parameters for adapter in adapters):
        raise RuntimeError(
            "a store serves adapters of experts and does not train them: unload them"
        )


def read(name: str, source: Source, config: Any, model: nn.Module) -> AdapterFiles:
    """An adapter of ``model`` in a directory or a state dict.

    Raises:
        FileNotFoundError, ValueError: see :func:`lora_kernels.load_adapter`.
        TypeError: a state dict without ``config``, or a directory with one.
    """
    if isinstance(source, Mapping):
        label = f"the state dict of {name!r}"
        if config is None:
            raise TypeError(f"{label} needs config=: what its adapter_config.json would say")
        for key, tensor in source.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{label}: {key} is a {type(tensor).__name__}, no tensor")
        return from_state_dict(source, _fields(config), model, label)
    if config is not None:
        raise TypeError("a directory has its own adapter_config.json: config= is for state dicts")
    return read_adapter(Path(source), model)


def _fields(config: Any) -> dict[str, Any]:
    """A mapping, a LoRAConfig or one of PEFT's as the contents of PEFT's file."""
    if isinstance(config, LoRAConfig):
        content = {f.name: getattr(config, f.name) for f in fields(config)} | {"peft_type": "LORA"}
    elif isinstance(config, Mapping):
        content = {"peft_type": "LORA", **config}
    elif hasattr(config, "to_dict"):
        content = config.to_dict()
    else:
        raise TypeError(f"config must be a mapping or a LoRAConfig, not {type(config).__name__}")
    return {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in content.items()}


class LayerIndex:
    """The layers of a model that an adapter may have, by every path that leads to them."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        open: bool,
        refused: Mapping[str, str],
        experts: Mapping[str, nn.Module],
    ) -> None:
        """``layers``: those that have slots already; ``open``: others may get them, but for those
        in ``refused``, by path with the reason; ``experts``: the modules of the 3-D Parameters of
        experts, by the Parameters' paths."""
        self.model, self.layers, self.open, self._refused = model, layers, open, refused
        self._experts = experts
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._first = {module: path for path, module in model.named_modules()}

    def resolve(self, path: str) -> tuple[str, nn.Module]:
        """The first path of the layer at ``path``, and the layer.

        Raises:
            ValueError: there is none, or it has no slots and cannot get them.
        """
        module = self._modules.get(path)
        if module is None:
            raise ValueError(f"the model has no layer {path!r}")
        first = self._first[module]
        if first in self.layers:
            return first, module
        if not self.open:
            raise ValueError(f"{path!r} is not among the store's target_modules")
        reason = self._reason(module)
        if reason is not None:
            raise ValueError(f"{path!r} {reason}")
        return first, module

    def experts_named_by(self, config: LoRAConfig) -> dict[str, tuple[nn.Module, list[str]]]:
        """The experts whose Parameters ``config`` names in ``target_parameters``, by path, and
        these Parameters in the module's own order.

        Raises:
            ValueError: one of them has no slots and cannot get them.
        """
        found: dict[str, tuple[nn.Module, list[str]]] = {}
        for parameter, module in self._experts.items():
            if not config.is_target_parameter(parameter):
                continue
            if parameter not in self.layers:
                reason: str | None = "is not among the store's target_modules"
                if self.open:
                    held = isinstance(module, MultiLoRAExperts)
                    reason = None if held else routed.unsupported_reason(module)
                if reason is not None:
                    raise ValueError(f"{parameter!r} {reason}")
            path, _, name = parameter.rpartition(".")
            found.setdefault(path, (module, []))[1].append(name)
        return found

    def named_by(self, config: LoRAConfig) -> set[str]:
        """The layers with slots, and those that could get them, that ``config`` names."""
        saved = [f".{name}." for name in config.modules_to_save or []]
        return {
            self._first[module]
            for path, module in self._modules.items()
            if not config.all_linear
            and config.is_target(path)
            and config.is_in_layers(path)
            and not config.is_excluded(path)
            and not any(s in f".{path}." for s in saved)
            and (self._first[module] in self.layers or (self.open and self._reason(module) is None))
        }

    def _reason(self, module: nn.Module) -> str | None:
        """Why a module without slots cannot get them, or None."""
        if isinstance(module, nn.Embedding):
            return unsupported_embedding_reason(module)
        return self._refused.get(self._first[module]) or unsupported_reason(module)


class SlotLimits(NamedTuple):
    """What the slots hold: their ranks, their dtypes by path of the layer (else the weight's), and
    whether copies into them want pinned memory."""

    max_rank: int
    dtypes: Mapping[str, torch.dtype]
    pinned: bool

    def weights(
        self, path: str, default: torch.dtype, a: Tensor, b: Tensor, scale: float
    ) -> Weights:
        """Copies of A and B: the caller's tensors, or a mapped file, may change afterwards.
        ``default``: the dtype where the slots do not exist yet."""
        dtype = self.dtypes.get(path, default)
        own = [
            torch.empty(t.shape, dtype=dtype, device="cpu", pin_memory=self.pinned) for t in (a, b)
        ]
        for there, here in zip(own, (a, b), strict=True):
            there.copy_(here.detach())
        return Weights(own[0], own[1], scale)

    def with_magnitude(self, weights: Weights, module: nn.Module, magnitude: Tensor) -> Weights:
        """``weights`` of a DoRA adapter of the linear layer ``module``."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        a, b = weights.a.to(weight.device), weights.b.to(weight.device)
        scale = torch.tensor(weights.scale, dtype=torch.float64, device=weight.device)
        norm = dora_norm(weight, a, b, scale, is_transposed(module)).cpu()
        own = torch.empty(magnitude.shape, dtype=norm.dtype, device="cpu", pin_memory=self.pinned)
        own.copy_(magnitude.detach())
        ratio = torch.empty_like(own, pin_memory=self.pinned)
        return replace(weights, magnitude=own, ratio=torch.div(own, norm, out=ratio))


def match(
    index: LayerIndex, files: AdapterFiles, limits: SlotLimits, load_embedding_layers: bool
) -> HostAdapter:
    """The adapter that ``files`` are.

    Raises:
        ValueError: tensors are missing, left over, not floating or of the wrong shape; a rank is
            above ``max_rank`` or not the configuration's.
    """
    config, label = files.config, files.label
    names = names_of(index.model)
    found: dict[str, str] = {}
    wanted: dict[str, Layer] = {}
    # Parameter of experts -> the prefix of its keys
    prefixes: dict[str, str] = {}
    try:
        experts = index.experts_named_by(config)
        for path, (module, own) in experts.items():
            ranks = {name: config.rank(f"{path}.{name}") for name in own}
            for name, (prefix, layer) in wanted_layers(path, module, ranks).items():
                _check_rank(f"{path}.{name}", ranks[name], limits.max_rank)
                prefixes[f"{path}.{name}"], wanted[prefix] = prefix, layer
        for path in files.paths(names):
            if path in wanted:
                continue
            first, module = index.resolve(path)
            if first in found:
                raise ValueError(
                    f"{path!r} is the same layer as {found[first]!r}, which it has too"
                )
            found[first] = path
            wanted[path] = _layer(path, module, config, limits)
        config.modules_to_save = files.modules_to_save(index.model) or None
        for first in sorted(index.named_by(config) - found.keys()):
            _, module = index.resolve(first)
            wanted[first] = _layer(first, module, config, limits)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    if not wanted:
        raise ValueError(f"{label} holds no lora_A and lora_B")
    layers = {}
    pairs = files.take_pairs(index.model, wanted)
    for parameter, prefix in prefixes.items():
        a, b = pairs.pop(prefix)
        path, _, name = parameter.rpartition(".")
        module = experts[path][0]
        a, b = routed.stored_factors(a, b, routed.sizes(module, name)[0])
        scale = config.scaling(parameter, b.shape[2])
        dtype = routed.weight_dtype(module, name)
        layers[parameter] = limits.weights(parameter, dtype, a, b, scale)
    for path, (a, b, *others) in pairs.items():
        first, module = index.resolve(path)
        if b.shape[1] == 0:
            # AdaLoRA's allocator took it whole.
            continue
        scale = config.scaling(path, b.shape[1])
        if config.adalora is not None:
            a = a * others[0]
        a = a.t() if wanted[path].is_embedding else a
        layers[first] = limits.weights(first, weight_dtype(module), a, b, scale)
        if config.use_dora:
            layers[first] = limits.with_magnitude(layers[first], module, others[0])
    files.match_rest(
        index.model,
        {name: index.model.get_submodule(name) for name in config.modules_to_save or []},
        wanted.keys(),
        load_embedding_layers=load_embedding_layers,
        shared_base=True,
    )
    adapted = wanted.keys() - set(prefixes.values()) | prefixes.keys()
    config.warn_of_unmatched(adapted, names)
    return HostAdapter(replace(config, adalora=None), layers)


def _layer(path: str, module: nn.Module, config: LoRAConfig, limits: SlotLimits) -> Layer:
    """What the adapter's A and B must fit at ``path``."""
    rank = config.rank(path)
    _check_rank(path, rank, limits.max_rank)
    embedding = isinstance(module, nn.Embedding)
    if embedding and config.use_dora:
        raise ValueError(f"{path!r} is an embedding with use_dora, which a store does not serve")
    if config.use_dora and quant_state_of(module.weight) is not None:
        raise ValueError(f"{path!r} has a four-bit weight, on which DoRA is not computed")
    adaptive = config.adalora is not None
    return Layer(rank, *features(module), embedding, config.use_dora, adaptive)


def _check_rank(path: str, rank: int, max_rank: int) -> None:
    if rank > max_rank:
        raise ValueError(f"the rank {rank} of {path!r} is above the store's max_rank={max_rank}")


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is [in, out] (of an embedding: entries first)."""
    if isinstance(module, MultiLoRALinear):
        return module.fan_in_fan_out
    return not isinstance(module, nn.Linear)


def draw(
    index: LayerIndex,
    config: LoRAConfig,
    paths: Collection[str],
    limits: SlotLimits,
) -> HostAdapter:
    """An untrained adapter on the layers at ``paths``, as ``init_lora_weights`` says.

    Raises:
        ValueError: there are none, or a rank is above ``max_rank``.
    """
    if not paths:
        raise ValueError(f"target_modules={config.target_modules!r} names no layer of the store")
    layers = {}
    for path in sorted(paths):
        _, module = index.resolve(path)
        rank = config.rank(path)
        _check_rank(path, rank, limits.max_rank)
        in_features, out_features = features(module)
        embedding = isinstance(module, nn.Embedding)
        a = torch.zeros(rank, in_features, device="cpu")
        b = torch.zeros(out_features, rank, device="cpu")
        if embedding:
            # PEFT's choice: what is looked up is zero, so that B trains second.
            nn.init.normal_(b)
        elif config.init_lora_weights == "gaussian":
            nn.init.normal_(a, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        if config.init_lora_weights is False:
            nn.init.kaiming_uniform_(a if embedding else b, a=math.sqrt(5))
        scale = config.scaling(path, rank)
        a = a.t() if embedding else a
        layers[path] = limits.weights(path, weight_dtype(module), a, b, scale)
    config.warn_of_unmatched(layers, names_of(index.model))
    return HostAdapter(config, layers)


def peft_tensors(adapter: HostAdapter, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Copies by PEFT's keys, without ``base_model.model.``."""
    tensors = {}
    for prefix, weights in _experts_of(adapter, layers).items():
        experts, r, _ = weights.a.shape
        tensors[f"{prefix}.lora_A.weight"] = weights.a.reshape(experts * r, -1).clone()
        stored = weights.b.permute(1, 2, 0).reshape(-1, r * experts)
        tensors[f"{prefix}.lora_B.weight"] = stored.contiguous()
    for path, weights in adapter.layers.items():
        if isinstance(layers[path], ExpertSlots):
            continue
        embedding = isinstance(layers[path], nn.Embedding)
        key_a, key_b = Layer(weights.rank, *features(layers[path]), embedding).shapes(path)
        if weights.magnitude is not None:
            tensors[path + MAGNITUDE] = weights.magnitude.clone()
        a = weights.a.t() if embedding else weights.a
        tensors[key_a] = a.clone(memory_format=torch.contiguous_format)
        tensors[key_b] = weights.b.clone()
    return tensors


def _experts_of(adapter: HostAdapter, layers: Mapping[str, nn.Module]) -> dict[str, Weights]:
    """The adapter's parts on Parameters of experts, by the prefixes of their keys."""
    names: dict[str, list[str]] = {}
    for parameter in adapter.layers:
        if isinstance(layers[parameter], ExpertSlots):
            path, _, name = parameter.rpartition(".")
            names.setdefault(path, []).append(name)
    return {
        prefix: adapter.layers[f"{path}.{name}"]
        for path, own in names.items()
        for name, prefix in file_prefixes(path, own).items()
    }


def write(
    model: nn.Module, adapter: HostAdapter, layers: Mapping[str, nn.Module], folder: Path
) -> None:
    """Write ``adapter`` as PEFT does."""
    every = adapter.ranks_and_scales
    experts = {path: own for path, own in every.items() if isinstance(layers[path], ExpertSlots)}
    write_adapter(
        folder,
        model,
        # Resolved: which layers a number of a layer means is not the same everywhere.
        replace(
            adapter.config,
            target_modules=None,
            exclude_modules=None,
            layers_to_transform=None,
            layers_pattern=None,
            bias="none",
        ),
        {path: own for path, own in every.items() if path not in experts},
        peft_tensors(adapter, layers),
        fan_in_fan_out=all(
            getattr(layers[path], "fan_in_fan_out", False) for path in adapter.layers
        ),
        experts=experts,
    )
