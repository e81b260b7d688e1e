"""Adapters for whole models: which layers get one, what trains, merging, and a report of it all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .integrations import transformers as _transformers
from .integrations.lora_config import LoRAConfig
from .multi_lora import MultiLoRAEmbedding, MultiLoRALinear
from .nn import FusedLoRALinear, unsupported_reason
from .packed import check_pack_weight

logger = logging.getLogger("lora_kernels")

ModelT = TypeVar("ModelT", bound=nn.Module)

# Modules whose matrices nobody expects to get an adapter.
_NO_RAW_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.LayerNorm)

# Where the adapter of a model is written down on the model itself; None: it was taken off.
_APPLIED = "_lora_kernels_applied"


@dataclass
class LoRAReport:
    """What :func:`apply_lora` did.

    ``adapted``: name -> "kind [out, in], r"; ``skipped``: name -> reason; ``unreached``: matrices
    that are in no linear layer, as the experts of a mixture, "kind.parameter [shape]" -> how many.
    """

    adapted: dict[str, str]
    skipped: dict[str, str]
    modules_to_save: list[str]
    notes: list[str]
    trainable_parameters: int
    all_parameters: int
    unreached: dict[str, int]
    unreached_parameters: int

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.all_parameters, 1)
        lines = [
            f"LoRA on {len(self.adapted)} layers, {len(self.skipped)} linear layers skipped; "
            f"trainable {self.trainable_parameters:,} of {self.all_parameters:,} parameters "
            f"({share:.4f}%)"
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
    # Keys of embeddings that the adapter's file brought, and that are saved with it.
    embeddings: list[str] = field(default_factory=list)


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
    pack_weight: str = "eval",
) -> ModelT:
    """Replace linear layers of ``model`` by :class:`FusedLoRALinear`, in place, freeze the rest,
    and return the model.

    The arguments are the fields of PEFT's ``LoraConfig``, and ``pack_weight``; those not described
    here are :class:`FusedLoRALinear`'s. What was adapted, what was skipped and why, and the
    trainable parameters are in ``lora_report(model)``. A model of which a hundredth or more of the
    weights are matrices outside linear layers (the experts of a mixture) is warned of.

    Args:
        target_modules: a list of module names or their endings ("q_proj", "layers.0.mlp.up_proj");
            a regular expression that matches whole names; None or "all-linear": every ``nn.Linear``
            and Conv1D except the output head and classifier heads.
        exclude_modules: a list or regular expression of the same form; wins over
            ``target_modules``.
        bias: which biases train: "none", "all" of the model, or "lora_only", those of adapted
            layers.
        rank_pattern, alpha_pattern: rank and alpha for names ending in (or matching the regular
            expression) the key.
        layers_to_transform: indices of the layers to adapt; the index is the first number in the
            module's name, or the one behind ``layers_pattern`` ("layers", "h"). A name given in
            full in ``target_modules`` is not filtered.
        modules_to_save: names or endings of modules that are trained in full and saved with the
            adapter.

    Raises:
        ValueError: nothing matches; a matched layer cannot be adapted (not linear, or its forward
            is never called, as ``nn.MultiheadAttention.out_proj``); the model has LoRA layers
            already; a rank below 1 or another wrong value. The model is then as it was.

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
        target_modules=_plain(target_modules),
        exclude_modules=_plain(exclude_modules),
        lora_dropout=lora_dropout,
        bias=bias,
        use_rslora=use_rslora,
        init_lora_weights=init_lora_weights,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        layers_to_transform=_plain(layers_to_transform),
        layers_pattern=_plain(layers_pattern),
        modules_to_save=_plain(modules_to_save),
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    check_pack_weight(pack_weight)
    root = unwrap(model)
    insert(root, config, select(root, config))
    for layer in lora_layers(root).values():
        layer.pack_weight = pack_weight
    report = lora_report(root)
    if report.unreached_parameters >= 0.01 * report.all_parameters:
        warnings.warn(f"{type(root).__name__}: {report.notes[-1]}", stacklevel=2)
    return model


def lora_report(model: nn.Module) -> LoRAReport:
    """What :func:`apply_lora` (or ``load_adapter``) did to ``model``; print it. Adapted layers that
    something has replaced since are listed as skipped.

    Raises:
        ValueError: the model has no LoRA layers of this package.
    """
    report = applied(model).report
    lost = lost_layers(model)
    if not lost:
        return report
    return replace(
        report,
        adapted={name: what for name, what in report.adapted.items() if name not in lost},
        skipped=report.skipped | {name: f"adapter lost: {what}" for name, what in lost.items()},
    )


def applied(model: nn.Module) -> Applied:
    check_not_taken_off(model)
    record = record_of(model)
    if record is None:
        raise ValueError(f"{type(model).__name__} was not adapted by apply_lora or load_adapter")
    return record


def record_of(model: nn.Module) -> Applied | None:
    return vars(unwrap(model)).get(_APPLIED)


def forget_record(model: nn.Module) -> None:
    """The adapter was taken off: :func:`apply_lora` may come again."""
    if record_of(model) is not None:
        setattr(unwrap(model), _APPLIED, None)


def check_not_taken_off(model: nn.Module) -> None:
    root = unwrap(model)
    if _APPLIED in vars(root) and record_of(root) is None:
        raise RuntimeError(
            f"merge_adapter(model, keep_base=False) or unload took the adapter off this "
            f"{type(root).__name__}, for good: call apply_lora or load_adapter for another"
        )


def lora_layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    """The adapted layers by name; one that stands at several paths appears under its first."""
    return {n: m for n, m in unwrap(model).named_modules() if isinstance(m, FusedLoRALinear)}


def lost_layers(model: nn.Module) -> dict[str, str]:
    """Layers that were adapted and have no adapter now: name -> what happened."""
    root = unwrap(model)
    record = record_of(root)
    lost = {}
    for name in record.report.adapted if record else ():
        try:
            module = root.get_submodule(name)
        except AttributeError:
            lost[name] = "the module is gone"
            continue
        # A wrapper that somebody put around the layer has it inside.
        if not any(isinstance(m, FusedLoRALinear) for m in module.modules()):
            lost[name] = f"a {type(module).__name__} took its place"
    return lost


def warn_of_lost_layers(model: nn.Module) -> None:
    lost = [f"{name} ({what})" for name, what in lost_layers(model).items()]
    if lost:
        warnings.warn(
            f"the adapter of {', '.join(lost)} is lost: something replaced the layer after "
            "apply_lora (resize_token_embeddings, set_output_embeddings, ...). Resize before "
            "apply_lora, or exclude the layer",
            stacklevel=3,
        )


def select(model: nn.Module, config: LoRAConfig) -> Selection:
    """Resolve ``config`` on ``model`` without changing it; a user's errors are raised here."""
    config.check()
    _check_not_applied(model)
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    by_name = {name: module for module, names in paths.items() for name in names}
    saved = _modules_to_save(paths, config)
    outputs = _transformers.output_heads(model)
    targets: dict[nn.Module, list[str]] = {}
    skipped: dict[str, str] = {}
    for module, names in paths.items():
        name = next(filter(config.is_target, names), names[0])
        reason = _skip_reason(model, module, name, config, saved, outputs)
        if reason is not None and not _is_linear(module):
            continue
        bypass = (
            unsupported_reason(module)
            or _transformers.offload_reason(module)
            or _transformers.bypass_reason(by_name, names)
        )
        if reason is None and bypass is None:
            targets[module] = names
        elif reason is None and not config.all_linear and _is_wrong_target(module, config):
            raise ValueError(
                f"target module {name!r} {bypass}; remove it from target_modules or exclude it"
            )
        elif _is_linear(module):
            skipped[name] = reason or bypass or ""
    if not targets:
        raise ValueError(_nothing_matches(config, skipped))
    if "" in {name for names in targets.values() for name in names}:
        raise ValueError(
            "the model itself is the linear layer: use FusedLoRALinear.from_linear(model)"
        )
    return Selection(targets, skipped, saved)


def insert(model: nn.Module, config: LoRAConfig, selection: Selection) -> None:
    """Carry a selection out; on an error the model is as it was."""
    frozen_before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    owners = _owners_of_parameters(model)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        layers: dict[nn.Module, FusedLoRALinear] = {}
        for module, names in selection.targets.items():
            layers[module] = FusedLoRALinear.from_linear(module, **config.layer_arguments(names[0]))
        for module, names in selection.targets.items():
            for name in names:
                parent_name, _, child = name.rpartition(".")
                parent = model.get_submodule(parent_name)
                replaced.append((parent, child, module))
                setattr(parent, child, layers[module])
        _set_trainable(model, config, selection, layers.values())
        report = _report(model, selection, owners)
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        report.notes += config.warn_of_unmatched(report.adapted, names)
    except BaseException:
        for parent, child, module in replaced:
            setattr(parent, child, module)
        for parameter, requires_grad in frozen_before.items():
            parameter.requires_grad_(requires_grad)
        raise
    setattr(model, _APPLIED, Applied(config, report))
    logger.info("%s", report)


def _set_trainable(
    model: nn.Module, config: LoRAConfig, selection: Selection, layers: Iterable[FusedLoRALinear]
) -> None:
    model.requires_grad_(False)
    for layer in layers:
        trained = [layer.lora_A, layer.lora_B] + [layer.bias] * (config.bias == "lora_only")
        for parameter in trained:
            if parameter is not None:
                parameter.requires_grad_(True)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name.split(".")[-1] == "bias":
                parameter.requires_grad_(True)
    for module in selection.modules_to_save.values():
        module.requires_grad_(True)


def _report(model: nn.Module, selection: Selection, owners: dict[Tensor, list[str]]) -> LoRAReport:
    adapted, notes = {}, []
    for module, names in selection.targets.items():
        layer = model.get_submodule(names[0])
        assert isinstance(layer, FusedLoRALinear)
        adapted[names[0]] = (
            f"{type(module).__name__} [{layer.out_features}, {layer.in_features}], r={layer.r}"
        )
        if len(names) > 1:
            notes.append(
                f"{names[0]} is one module at {len(names)} places and has one adapter: "
                + ", ".join(names)
            )
        others = [
            owner
            for owner in owners[layer.weight]
            if owner not in {f"{name}.weight" for name in names}
        ]
        if others:
            notes.append(
                f"the weight of {names[0]} is tied to {', '.join(others)}, which its adapter "
                "does not change"
            )
    parameters = list(model.parameters())
    all_parameters = sum(p.numel() for p in parameters)
    unreached, numel = _unreached(model, selection)
    if unreached:
        kinds = [f"{kind}, {n} times" if n > 1 else kind for kind, n in unreached.items()]
        notes.append(
            f"{100 * numel / all_parameters:.1f}% of the weights cannot get an adapter, for they "
            f"are in no linear layer, and stay frozen: {'; '.join(kinds)}"
        )
    return LoRAReport(
        adapted=adapted,
        skipped=selection.skipped,
        modules_to_save=list(selection.modules_to_save),
        notes=notes,
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        all_parameters=all_parameters,
        unreached=unreached,
        unreached_parameters=numel,
    )


def _unreached(model: nn.Module, selection: Selection) -> tuple[dict[str, int], int]:
    """The matrices that no choice of target modules reaches, by kind, and their number of elements.

    Those are 2-D and larger Parameters outside linear layers, as the experts of a mixture in
    transformers 5, its router, or ``nn.MultiheadAttention.in_proj_weight``. Embeddings,
    convolutions and what is but added (position embeddings, [1, ...]) are not meant, nor what
    trains in full.
    """
    trained = {p for module in selection.modules_to_save.values() for p in module.parameters()}
    seen: set[Tensor] = set(trained)
    for module in model.modules():
        if isinstance(module, _NO_RAW_MATRICES) or _is_linear(module):
            seen.update(module.parameters(recurse=False))
    kinds: dict[str, int] = {}
    numel = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            matrix = sum(size > 1 for size in parameter.shape) > 1 and parameter.shape[0] > 1
            if not matrix or parameter in seen or name.endswith("bias"):
                continue
            seen.add(parameter)
            kind = f"{type(module).__name__}.{name} {list(parameter.shape)}"
            kinds[kind] = kinds.get(kind, 0) + 1
            numel += parameter.numel()
    return kinds, numel


def _owners_of_parameters(model: nn.Module) -> dict[Tensor, list[str]]:
    owners: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    return owners


def _check_not_applied(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, FusedLoRALinear):
            raise ValueError(
                f"{type(model).__name__} has LoRA layers already ({name!r}): load another adapter "
                "with load_adapter, or fold this one in with merge_adapter(model, keep_base=False) "
                "and start from that checkpoint"
            )
        if isinstance(module, (MultiLoRALinear, MultiLoRAEmbedding)):
            raise ValueError(
                f"{type(model).__name__} has an AdapterStore already ({name!r}): close that first"
            )
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
            where = f"{name!r} is" if name else "this is"
            raise ValueError(
                f"{where} a {type(module).__name__} of PEFT already: the plain model is needed"
            )


def _modules_to_save(paths: dict[nn.Module, list[str]], config: LoRAConfig) -> dict[str, nn.Module]:
    saved: dict[str, nn.Module] = {}
    for wanted in config.modules_to_save or []:
        found = {
            n: m
            for m, names in paths.items()
            for n in names
            if n == wanted or n.endswith(f".{wanted}")
        }
        if not found:
            raise ValueError(f"modules_to_save: no module is called {wanted!r}")
        saved.update(found)
    inside = {parameter for module in saved.values() for parameter in module.parameters()}
    for module, names in paths.items():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter in inside and not any(
                (n + ".").startswith(s + ".") for n in names for s in saved
            ):
                raise ValueError(
                    f"modules_to_save: a parameter of {', '.join(saved)} is tied to "
                    f"{names[0]}.{parameter_name}, which would train with it; untie them first, or "
                    "name both"
                )
    return saved


def _skip_reason(
    model: nn.Module,
    module: nn.Module,
    name: str,
    config: LoRAConfig,
    saved: dict[str, nn.Module],
    outputs: set[object],
) -> str | None:
    """Why the configuration does not want ``module``, or None if it does."""
    if config.is_excluded(name):
        return "in exclude_modules"
    if any((name + ".").startswith(s + ".") for s in saved):
        return "in modules_to_save"
    if config.all_linear:
        if not _is_linear(module):
            return "not linear"
        reason = _transformers.head_reason(model, name, module, outputs)
        if reason is not None:
            return reason
    elif not config.is_target(name):
        return "not in target_modules"
    if not config.is_in_layers(name):
        return "not in layers_to_transform"
    return None


def _is_wrong_target(module: nn.Module, config: LoRAConfig) -> bool:
    # A regular expression may sweep containers along; a name that a list gives was meant.
    return isinstance(config.target_modules, list) or _is_linear(module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _transformers.is_conv1d(module)


def _nothing_matches(config: LoRAConfig, skipped: dict[str, str]) -> str:
    target = "all-linear" if config.all_linear else config.target_modules
    if not skipped:
        return f"target_modules={target!r}: the model has no linear layers"
    lines = [f"{name} ({reason})" for name, reason in list(skipped.items())[:8]]
    more = f" and {len(skipped) - 8} more" if len(skipped) > 8 else ""
    listed = ", ".join(lines) + more
    return f"target_modules={target!r} leaves no layer to adapt; the linear layers are {listed}"


def _plain(value: Any) -> Any:
    """Lists for tuples, sets and their like, as JSON has them."""
    return value if value is None or isinstance(value, (str, int)) else list(value)
