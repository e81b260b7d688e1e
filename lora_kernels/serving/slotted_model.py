"""A model whose layers have slots for adapters: which ones, their replacement, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..layers.batches import Owner
from ..layers.multi import MultiLoRAEmbedding, MultiLoRALinear, unsupported_embedding_reason
from ..layers.multi_experts import ExpertSlots, MultiLoRAExperts
from ..layers.routed import matrices_of, weight_of
from ..models.config import LoRAConfig
from ..models.selection import select
from .adapters import HostAdapter, LayerIndex, SlotLimits, Weights

Layer = MultiLoRALinear | MultiLoRAEmbedding | ExpertSlots

# Reasons for which a layer has no slots at first, and may get them.
_GROW = frozenset(["output head", "classifier head", "in exclude_modules", "not in target_modules"])


class SlottedModel:
    """The layers of ``model`` that have slots, by their first path; of experts, by the Parameter's.

    The arguments are :class:`lora_kernels.AdapterStore`'s.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: int,
        max_rank: int,
        target_modules: Sequence[str] | str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        self.model, self.owner = model, Owner()
        self.layers: dict[str, Layer] = {}
        # Whether the layers' adapters train.
        self.trains = False
        self._slots, self._max_rank, self._device, self._dtype = slots, max_rank, device, dtype
        # path -> the layer that was there, all its paths, and what of it trained
        self._before: dict[str, tuple[nn.Module, list[str], list[nn.Parameter]]] = {}
        if not (target_modules is None or isinstance(target_modules, str)):
            target_modules = list(target_modules)
        self._open = target_modules is None
        # Looked for while they are of their own class.
        self._experts = {
            f"{path}.{name}": module
            for path, module in model.named_modules()
            for name in matrices_of(module)
        }
        targets, self.skipped = _select(model, LoRAConfig(target_modules=target_modules))
        self._refused = {
            path: reason for path, reason in self.skipped.items() if reason not in _GROW
        }
        self._insert(targets)
        self.linear = frozenset(
            path for path, layer in self.layers.items() if isinstance(layer, MultiLoRALinear)
        )

    def index(self) -> LayerIndex:
        return LayerIndex(self.model, self.layers, self._open, self._refused, self._experts)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of each layer's slots: the given one, else those of the slots that exist."""
        if self._dtype is not None:
            return dict.fromkeys((path for path, _ in self.model.named_modules()), self._dtype)
        return {path: layer.lora_A.dtype for path, layer in self.layers.items()}

    def devices(self) -> set[torch.device]:
        return {layer.lora_A.device for layer in self.layers.values()}

    def requires_grad_(self, requires_grad: bool) -> None:
        self.trains = requires_grad
        for layer in self.layers.values():
            layer.lora_A.requires_grad_(requires_grad)
            layer.lora_B.requires_grad_(requires_grad)

    def add(self, paths: Collection[str]) -> list[str]:
        """Give slots to the layers at ``paths`` that have none; these paths."""
        new = [path for path in paths if path not in self.layers]
        linear = [path for path in new if path not in self._experts]
        self._insert({self.model.get_submodule(path): self._paths_of(path) for path in linear})
        self._insert_experts([path for path in new if path in self._experts])
        return new

    def _paths_of(self, path: str) -> list[str]:
        module = self.model.get_submodule(path)
        named = self.model.named_modules(remove_duplicate=False)
        return [name for name, other in named if other is module]

    def _insert(self, targets: dict[nn.Module, list[str]]) -> None:
        """Give slots to ``targets``, modules with all their paths; all of them or none."""
        done: list[str] = []
        try:
            for module, paths in targets.items():
                parameters = list(module.parameters(recurse=False))
                trained = [parameter for parameter in parameters if parameter.requires_grad]
                self._before[paths[0]] = module, paths, trained
                done.append(paths[0])
                for parameter in parameters:
                    parameter.requires_grad_(False)
                self.layers[paths[0]] = layer = self._new_layer(module, paths[0])
                self._put(layer, paths)
        except BaseException:
            self.take_out(done)
            raise

    def _insert_experts(self, parameters: Sequence[str]) -> None:
        """Give slots to Parameters of experts; to all of them or none."""
        done: list[str] = []
        try:
            for path in parameters:
                module, name = self._experts[path], path.rpartition(".")[2]
                weight = weight_of(module, name)
                self._before[path] = module, [path], [weight] if weight.requires_grad else []
                done.append(path)
                self.layers[path] = MultiLoRAExperts.add(
                    module, name, self._slots, self._max_rank,
                    path=path, owner=self.owner, device=self._device, dtype=self._dtype,
                )  # fmt: skip
        except BaseException:
            self.take_out(done)
            raise

    def _new_layer(self, module: nn.Module, path: str) -> Layer:
        options: dict[str, Any] = {
            "path": path,
            "owner": self.owner,
            "device": self._device,
            "dtype": self._dtype,
        }
        layer: Layer
        if isinstance(module, nn.Embedding):
            layer = MultiLoRAEmbedding.from_embedding(
                module, self._slots, self._max_rank, **options
            )
        else:
            layer = MultiLoRALinear.from_linear(module, self._slots, self._max_rank, **options)
        for stack in (layer.lora_A, layer.lora_B):
            stack.requires_grad_(self.trains)
        return layer

    def _put(self, module: nn.Module, paths: Iterable[str]) -> None:
        for path in paths:
            parent, _, child = path.rpartition(".")
            setattr(self.model.get_submodule(parent), child, module)

    def limits(self) -> SlotLimits:
        """What the slots hold, and whether a GPU copies into them."""
        pinned = any(device.type == "cuda" for device in self.devices())
        return SlotLimits(self._max_rank, self.dtypes(), pinned)

    def read_slot(self, slot: int, host: HostAdapter) -> HostAdapter:
        """``host`` with the values that its slot has now."""
        layers = {}
        for path, weights in host.layers.items():
            a, b = self.layers[path].slot(slot, weights.rank)
            layers[path] = Weights(a.cpu().clone(), b.cpu().clone(), weights.scale)
        return replace(host, layers=layers)

    def take_out(self, paths: Iterable[str]) -> None:
        """Put the layers that were at ``paths`` back, trainable as they were."""
        for path in paths:
            module, places, trained = self._before[path]
            if path in self._experts:
                if isinstance(module, MultiLoRAExperts):
                    module.remove(path.rpartition(".")[2])
            else:
                if path in self.layers:
                    module.train(self.layers[path].training)
                self._put(module, places)
            for parameter in trained:
                parameter.requires_grad_(True)
            # Last, so that it can be done again if it is interrupted.
            self.layers.pop(path, None)
            del self._before[path]


def _select(
    model: nn.Module, config: LoRAConfig
) -> tuple[dict[nn.Module, list[str]], dict[str, str]]:
    """The modules that get slots, with their paths, and the linear layers that do not, with the
    reasons."""
    embeddings: dict[nn.Module, list[str]] = {}
    named: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        named.setdefault(module, []).append(path)
    if not config.all_linear:
        for module, paths in named.items():
            if isinstance(module, nn.Embedding) and any(map(config.is_target, paths)):
                reason = unsupported_embedding_reason(module)
                if reason is not None:
                    raise ValueError(f"target module {paths[0]!r} {reason}")
                embeddings[module] = paths
    routed = {
        path: "has its rows chosen by a router"
        for module, paths in named.items()
        for path in paths
        if "experts" in path.split(".") and isinstance(module, nn.Linear)
    }
    others = [
        path
        for module, paths in named.items()
        if module not in embeddings
        for path in paths
        if not config.all_linear and config.is_target(path)
    ]
    wrong = [path for path in others if path in routed]
    if wrong:
        raise ValueError(f"target module {wrong[0]!r} {routed[wrong[0]]}")
    excluded = [path for paths in embeddings.values() for path in paths] + list(routed)
    if embeddings and not others:
        # For what it refuses; of linear layers nothing is wanted.
        selection = select(model, LoRAConfig(exclude_modules=excluded))
        targets = embeddings
    else:
        # Experts can have slots later.
        config = replace(config, exclude_modules=excluded or None, experts=True)
        selection = select(model, config)
        selection.warn_of_missed(stacklevel=5)
        targets = selection.targets | embeddings
    reason = "gets slots when an adapter has it" if config.all_linear else "not in target_modules"
    later = {
        f"{path}.{name}": reason
        for path, names in selection.experts.targets.values()
        for name in names
    }
    return targets, selection.skipped | routed | later
