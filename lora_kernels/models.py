"""Adapters for whole models: which linear layers get one, what stays trainable, merging, and the report of it all."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from .integrations import transformers as _transformers
from .nn import FusedLoRALinear, check_lora_arguments, unsupported_reason

logger = logging.getLogger("lora_kernels")

ModelT = TypeVar("ModelT", bound=nn.Module)

# Where the adapter of a model is written down on the model itself.
_APPLIED = "_lora_kernels_applied"


@dataclass
class LoRAConfig:
    """What was applied to a model; fields and their meaning as in PEFT's ``LoraConfig``."""

    r: int = 8
    lora_alpha: float = 16
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    autocast_adapter_dtype: bool = True

    def rank(self, name: str) -> int:
        return _by_pattern(self.rank_pattern, name, self.r)

    def alpha(self, name: str) -> float:
        return _by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def layer_arguments(self, name: str) -> dict[str, Any]:
        return {
            "r": self.rank(name),
            "lora_alpha": self.alpha(name),
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "init_lora_weights": self.init_lora_weights,
            "autocast_adapter_dtype": self.autocast_adapter_dtype,
        }


@dataclass
class LoRAReport:
    """What :func:`apply_lora` did. ``adapted``: name -> "kind [out, in], r"; ``skipped``: name -> reason."""

    adapted: dict[str, str]
    skipped: dict[str, str]
    modules_to_save: list[str]
    notes: list[str]
    trainable_parameters: int
    all_parameters: int

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.all_parameters, 1)
        lines = [
            f"LoRA on {len(self.adapted)} layers, {len(self.skipped)} linear layers skipped; "
            f"trainable {self.trainable_parameters:,} of {self.all_parameters:,} parameters ({share:.4f}%)"
        ]
        lines += [f"  adapted  {name}: {what}" for name, what in self.adapted.items()]
        lines += [f"  skipped  {name}: {why}" for name, why in self.skipped.items()]
        lines += [f"  trained in full  {name}" for name in self.modules_to_save]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


@dataclass
class Applied:
    """The record kept on an adapted model: its configuration and the report."""

    config: LoRAConfig
    report: LoRAReport


@dataclass
class Selection:
    """What a configuration means for one model, before anything is changed."""

    # module -> every path it stands at; the first one names it
    targets: dict[nn.Module, list[str]]
    skipped: dict[str, str]
    modules_to_save: dict[str, nn.Module]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``'s and DistributedDataParallel's wrappers."""
    while True:
        if isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def apply_lora(
    model: ModelT,
    r: int = 8,
    lora_alpha: float = 16,
    target_modules: Sequence[str] | str | None = None,
    *,
    exclude_modules: Sequence[str] | str | None = None,
    lora_dropout: float = 0.0,
    bias: str = "none",
    use_rslora: bool = False,
    init_lora_weights: bool | str = True,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    layers_pattern: Sequence[str] | str | None = None,
    modules_to_save: Sequence[str] | None = None,
    autocast_adapter_dtype: bool = True,
) -> ModelT:
    """Replace linear layers of ``model`` by :class:`FusedLoRALinear`, in place, freeze the rest, and return the model.

    The arguments are the fields of PEFT's ``LoraConfig``; those not described here are :class:`FusedLoRALinear`'s.
    What was adapted, what was skipped and why, and the trainable parameters are in ``lora_report(model)``.

    Args:
        target_modules: a list of module names or their endings ("q_proj", "layers.0.mlp.up_proj"); a regular
            expression that matches whole names; None or "all-linear": every ``nn.Linear`` and Conv1D except the output
            head and classifier heads.
        exclude_modules: a list or regular expression of the same form; wins over ``target_modules``.
        bias: which biases train: "none", "all" of the model, or "lora_only", those of adapted layers.
        rank_pattern, alpha_pattern: rank and alpha for names ending in (or matching the regular expression) the key.
        layers_to_transform: indices of the layers to adapt; the index is the first number in the module's name, or the
            one behind ``layers_pattern`` ("layers", "h").
        modules_to_save: names or endings of modules that are trained in full and saved with the adapter.

    Raises:
        ValueError: nothing matches; a matched layer cannot be adapted (not linear, or its forward is never called, as
            ``nn.MultiheadAttention.out_proj``); the model has LoRA layers already; a rank below 1 or another wrong value.
            The model is then as it was.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = apply_lora(model, r=2, target_modules=["0"])
    >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)
    ['0.lora_A', '0.lora_B']
    >>> lora_report(model).skipped
    {'2': 'not in target_modules'}
    """
    config = LoRAConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules=_names(target_modules),
        exclude_modules=_names(exclude_modules),
        lora_dropout=lora_dropout,
        bias=bias,
        use_rslora=use_rslora,
        init_lora_weights=init_lora_weights,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        layers_to_transform=_indices(layers_to_transform),
        layers_pattern=_names(layers_pattern),
        modules_to_save=None if modules_to_save is None else list(modules_to_save),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    root = unwrap(model)
    insert(root, config, select(root, config))
    return model


def lora_report(model: nn.Module) -> LoRAReport:
    """What :func:`apply_lora` (or ``load_adapter``) did to ``model``; print it.

    Raises:
        ValueError: the model has no LoRA layers of this package.
    """
    return applied(model).report


def applied(model: nn.Module) -> Applied:
    record = getattr(unwrap(model), _APPLIED, None)
    if record is None:
        raise ValueError(f"{type(model).__name__} has no LoRA layers of lora_kernels: call apply_lora first")
    return record


def lora_layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    """The adapted layers by name; one that stands at several paths appears under its first."""
    return {n: m for n, m in unwrap(model).named_modules() if isinstance(m, FusedLoRALinear)}


def merge_adapter(model: nn.Module, keep_base: bool = True) -> None:
    """:meth:`FusedLoRALinear.merge` on every adapted layer; ValueError if there is none."""
    for layer in _some_lora_layers(model):
        layer.merge(keep_base)


def unmerge_adapter(model: nn.Module) -> None:
    """:meth:`FusedLoRALinear.unmerge` on every adapted layer; ValueError if there is none."""
    layers = _some_lora_layers(model)
    if any(layer.merged and layer.lora_A is None for layer in layers):
        raise RuntimeError("the adapter was merged with keep_base=False: the pristine weights are gone")
    for layer in layers:
        layer.unmerge()


def _some_lora_layers(model: nn.Module) -> list[FusedLoRALinear]:
    layers = list(lora_layers(model).values())
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layers of lora_kernels: call apply_lora first")
    return layers


def select(model: nn.Module, config: LoRAConfig) -> Selection:
    """Resolve ``config`` on ``model`` without changing it; every error that a user can cause is raised here."""
    _check_config(config)
    _check_not_applied(model)
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    by_name = {name: module for module, names in paths.items() for name in names}
    explicit = config.target_modules not in (None, "all-linear")
    saved = _modules_to_save(paths, config)
    targets: dict[nn.Module, list[str]] = {}
    skipped: dict[str, str] = {}
    for module, names in paths.items():
        name = next((n for n in names if _is_target(n, config)), names[0])
        reason = _skip_reason(model, module, name, config, saved)
        bypass = (
            unsupported_reason(module)
            or _transformers.offload_reason(module)
            or _transformers.bypass_reason(by_name, names)
        )
        if reason is None and bypass is None:
            targets[module] = names
        elif reason is None and explicit and _is_wrong_target(module, config):
            raise ValueError(f"target module {name!r} {bypass}; remove it from target_modules or exclude it")
        elif _is_linear(module):
            skipped[name] = reason or bypass or ""
    if not targets:
        raise ValueError(_nothing_matches(config, skipped))
    if "" in {name for names in targets.values() for name in names}:
        raise ValueError("the model itself is the linear layer: use FusedLoRALinear.from_linear(model)")
    for names in targets.values():
        check_lora_arguments(
            config.rank(names[0]), config.alpha(names[0]), config.lora_dropout, config.init_lora_weights
        )
    return Selection(targets, skipped, saved)


def insert(model: nn.Module, config: LoRAConfig, selection: Selection) -> None:
    """Carry a selection out: build every layer, then put them in; on an error the model is as it was."""
    frozen_before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        layers: dict[nn.Module, FusedLoRALinear] = {}
        for module, names in selection.targets.items():
            layers[module] = FusedLoRALinear.from_linear(module, **config.layer_arguments(names[0]))
            _transformers.carry_dispatch_hook(module, layers[module])
    except BaseException:
        for parameter, requires_grad in frozen_before.items():
            parameter.requires_grad_(requires_grad)
        raise
    owners = _owners_of_parameters(model)
    for module, names in selection.targets.items():
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layers[module])
    _set_trainable(model, config, selection, layers.values())
    report = _report(model, selection, owners)
    setattr(model, _APPLIED, Applied(config, report))
    logger.info("%s", report)


def _set_trainable(
    model: nn.Module, config: LoRAConfig, selection: Selection, layers: Iterable[FusedLoRALinear]
) -> None:
    model.requires_grad_(False)
    for layer in layers:
        layer.lora_A.requires_grad_(True)
        layer.lora_B.requires_grad_(True)
        if config.bias == "lora_only" and layer.bias is not None:
            layer.bias.requires_grad_(True)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name.split(".")[-1] == "bias":
                parameter.requires_grad_(True)
    for module in selection.modules_to_save.values():
        module.requires_grad_(True)


def _report(model: nn.Module, selection: Selection, owners: dict[nn.Parameter, list[str]]) -> LoRAReport:
    adapted, notes = {}, []
    for module, names in selection.targets.items():
        layer = model.get_submodule(names[0])
        assert isinstance(layer, FusedLoRALinear)
        adapted[names[0]] = f"{type(module).__name__} [{layer.out_features}, {layer.in_features}], r={layer.r}"
        if len(names) > 1:
            notes.append(f"{names[0]} is one module at {len(names)} places and has one adapter: {', '.join(names)}")
        others = [owner for owner in owners[layer.weight] if owner not in {f"{name}.weight" for name in names}]
        if others:
            notes.append(f"the weight of {names[0]} is tied to {', '.join(others)}, which its adapter does not change")
    parameters = list(model.parameters())
    return LoRAReport(
        adapted=adapted,
        skipped=selection.skipped,
        modules_to_save=list(selection.modules_to_save),
        notes=notes,
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        all_parameters=sum(p.numel() for p in parameters),
    )


def _owners_of_parameters(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    owners: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    return owners


def _check_config(config: LoRAConfig) -> None:
    check_lora_arguments(config.r, config.lora_alpha, config.lora_dropout, config.init_lora_weights)
    if config.bias not in ("none", "all", "lora_only"):
        raise ValueError(f"bias must be 'none', 'all' or 'lora_only', not {config.bias!r}")
    for pattern in (config.target_modules, config.exclude_modules):
        if isinstance(pattern, str):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def _check_not_applied(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, FusedLoRALinear):
            raise ValueError(
                f"{type(model).__name__} has LoRA layers already ({name!r}): load another adapter with load_adapter, or "
                "fold this one in with merge_adapter(model, keep_base=False) and start from that checkpoint"
            )
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            raise ValueError(f"{name!r} is a LoRA layer of PEFT already: apply_lora wants the plain model")


def _modules_to_save(paths: dict[nn.Module, list[str]], config: LoRAConfig) -> dict[str, nn.Module]:
    saved: dict[str, nn.Module] = {}
    for wanted in config.modules_to_save or []:
        found = {n: m for m, names in paths.items() for n in names if n == wanted or n.endswith(f".{wanted}")}
        if not found:
            raise ValueError(f"modules_to_save: no module is called {wanted!r}")
        saved.update(found)
    inside = {parameter for module in saved.values() for parameter in module.parameters()}
    for module, names in paths.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter in inside and not any((n + ".").startswith(s + ".") for n in names for s in saved):
                raise ValueError(
                    f"modules_to_save: a parameter of {', '.join(saved)} is tied to {names[0]}.{parameter_name}, which "
                    "would train with it; untie them first, or name both"
                )
    return saved


def _skip_reason(
    model: nn.Module, module: nn.Module, name: str, config: LoRAConfig, saved: dict[str, nn.Module]
) -> str | None:
    """Why the configuration does not want ``module``, or None if it does."""
    if _excluded(name, config):
        return "in exclude_modules"
    if any((name + ".").startswith(s + ".") for s in saved):
        return "in modules_to_save"
    if config.target_modules in (None, "all-linear"):
        if not _is_linear(module):
            return "not linear"
        reason = _transformers.head_reason(model, name, module)
        if reason is not None:
            return reason
    elif not _matches(config.target_modules, name):
        return "not in target_modules"
    if not _in_layers(name, config):
        return "not in layers_to_transform"
    return None


def _is_target(name: str, config: LoRAConfig) -> bool:
    return config.target_modules in (None, "all-linear") or _matches(config.target_modules, name)


def _excluded(name: str, config: LoRAConfig) -> bool:
    return bool(config.exclude_modules) and _matches(config.exclude_modules, name)


def _is_wrong_target(module: nn.Module, config: LoRAConfig) -> bool:
    # A regular expression may sweep containers along; a name that a list gives was meant.
    return isinstance(config.target_modules, list) or _is_linear(module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _transformers.is_conv1d(module)


def _matches(pattern: list[str] | str | None, name: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in pattern or [])


def _in_layers(name: str, config: LoRAConfig) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == [] or isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            index = int(match.group(1))
            return index == wanted if isinstance(wanted, int) else index in wanted
    return False


def _nothing_matches(config: LoRAConfig, skipped: dict[str, str]) -> str:
    target = config.target_modules or "all-linear"
    if not skipped:
        return f"target_modules={target!r}: the model has no linear layers"
    lines = [f"{name} ({reason})" for name, reason in list(skipped.items())[:8]]
    more = f" and {len(skipped) - 8} more" if len(skipped) > 8 else ""
    return f"target_modules={target!r} leaves no layer to adapt; the model's linear layers: {', '.join(lines)}{more}"


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _names(value: Sequence[str] | str | None) -> list[str] | str | None:
    return value if value is None or isinstance(value, str) else list(value)


def _indices(value: Sequence[int] | int | None) -> list[int] | int | None:
    return value if value is None or isinstance(value, int) else list(value)

