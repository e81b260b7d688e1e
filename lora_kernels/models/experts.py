"""Experts of mixtures: which of their Parameters a configuration adapts, and where PEFT's files
have their A and B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..layers.experts import FusedLoRAExperts
from ..layers.routed import matrices_of, sizes, unsupported_reason
from .config import LoRAConfig
from .on_disk import Layer


@dataclass
class ExpertSelection:
    """What a configuration means for the experts of a model."""

    # module -> its first path, and the Parameters that get an adapter, in the module's own order
    targets: dict[nn.Module, tuple[str, list[str]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def select_experts(
    model: nn.Module, config: LoRAConfig, saved: Mapping[str, nn.Module]
) -> ExpertSelection:
    """Resolve ``target_parameters`` and ``experts`` on ``model``.

    Raises:
        ValueError: a Parameter that ``target_parameters`` names cannot have an adapter.
    """
    selection = ExpertSelection()
    for path, module in model.named_modules():
        found: list[str] = []
        matrices = matrices_of(module)
        names = [name for name, _ in module.named_parameters(recurse=False)]
        # Those that bitsandbytes parametrised are no Parameters.
        for name in (*names, *(n for n in matrices if n not in names)):
            full = f"{path}.{name}"
            named = config.is_target_parameter(full)
            if not named and name not in matrices:
                continue
            reason = None if named else _skip_reason(full, path, config)
            if reason is None and any(f"{full}.".startswith(f"{s}.") for s in saved):
                reason = "in modules_to_save"
            if reason is None:
                reason = unsupported_reason(module)
                if reason is None and name not in matrices:
                    reason = "is no matrix of these experts"
                if reason is not None and named:
                    raise ValueError(
                        f"target_parameters: {full!r} is a Parameter of a {type(module).__name__}, "
                        f"which {reason}; name linear layers in target_modules"
                    )
            if reason is None:
                found.append(name)
            else:
                selection.skipped[full] = reason
        if found:
            found.sort(key=matrices.index)
            selection.targets[module] = path, found
    return selection


def _skip_reason(full: str, path: str, config: LoRAConfig) -> str | None:
    if not config.experts:
        return "not in target_parameters (experts=True adapts it)"
    if config.is_excluded(full) or config.is_excluded(path):
        return "in exclude_modules"
    return None if config.is_in_layers(full) else "not in layers_to_transform"


def adapt(selection: ExpertSelection, config: LoRAConfig) -> None:
    """Carry a selection out. :meth:`FusedLoRAExperts.restore` undoes it."""
    for module, (path, names) in selection.targets.items():
        FusedLoRAExperts.adapt(
            module, {name: config.expert_arguments(f"{path}.{name}") for name in names}
        )


def expert_layers(model: nn.Module) -> dict[str, FusedLoRAExperts]:
    """The adapted experts by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedLoRAExperts)}


def described(path: str, module: Any, names: Sequence[str]) -> dict[str, str]:
    """For the report: "kind [E, out, in], r" of every adapted Parameter."""
    texts, kind = {}, module._kind.__name__
    for name in names:
        experts, in_features, out_features = sizes(module, name)
        r = module.lora[name].r
        texts[f"{path}.{name}"] = f"{kind} [{experts}, {out_features}, {in_features}], r={r}"
    return texts


def file_prefixes(path: str, names: Sequence[str]) -> dict[str, str]:
    """Where PEFT's files have A and B of the Parameters ``names`` of one module: it wraps the
    module once for each, in the module's order, so that the last one's are outermost.

    >>> file_prefixes("mlp.experts", ["gate_up_proj", "down_proj"])
    {'gate_up_proj': 'mlp.experts.base_layer', 'down_proj': 'mlp.experts'}
    """
    last = len(names) - 1
    return {name: path + ".base_layer" * (last - i) for i, name in enumerate(names)}


def wanted_layers(
    path: str, module: nn.Module, ranks: Mapping[str, int]
) -> dict[str, tuple[str, Layer]]:
    """For every adapted Parameter the prefix of its keys in a file, and what A and B must fit."""
    wanted = {}
    for name, prefix in file_prefixes(path, list(ranks)).items():
        experts, in_features, out_features = sizes(module, name)
        wanted[name] = prefix, Layer(ranks[name] * experts, in_features, out_features)
    return wanted


def target_parameters(model: nn.Module, adapted: Sequence[str]) -> list[str]:
    """Names or endings by which PEFT finds the Parameters ``adapted`` and no other."""
    names = [name for name, _ in model.named_parameters()]
    endings = sorted({".".join(name.split(".")[-2:]) for name in adapted})
    matched = {name for name in names if name.endswith(tuple(f".{e}" for e in endings))}
    return endings if matched == set(adapted) else sorted(adapted)
