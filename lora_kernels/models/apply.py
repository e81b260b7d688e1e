"""Adapters for whole models: which layers get one, what trains, merging, and a report of it all."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..layers.experts import FusedLoRAExperts
from ..layers.fused import FusedLoRALinear
from ..layers.packed import check_pack_weight
from .config import LoRAConfig
from .experts import adapt, described, expert_layers
from .peft_config import heads_of_task, is_pefts
from .reports import LoRAReport, pattern
from .selection import Selection, select

logger = logging.getLogger("lora_kernels")

ModelT = TypeVar("ModelT", bound=nn.Module)

# Where the adapter of a model is written down on the model itself; None: it was taken off.
_APPLIED = "_lora_kernels_applied"


@dataclass
class Applied:
    """The record kept on an adapted model: its configuration and the report."""

    config: LoRAConfig
    report: LoRAReport
    # Keys of embeddings that the adapter's file brought, and that are saved with it.
    embeddings: list[str] = field(default_factory=list)


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
    r: int | Any = LoRAConfig.r,
    lora_alpha: float = LoRAConfig.lora_alpha,
    target_modules: Sequence[str] | str | None = None,
    *,
    config: Any = None,
    autocast_adapter_dtype: bool = True,
    pack_weight: str = "eval",
    **fields: Any,
) -> ModelT:
    """Replace linear layers of ``model`` by :class:`FusedLoRALinear`, in place, freeze the rest,
    and return the model.

    The arguments are the fields of :class:`LoRAConfig`, named as in PEFT's, and ``pack_weight``;
    those not described here are :class:`FusedLoRALinear`'s. What was adapted, what was skipped and
    why, and the trainable parameters are in ``lora_report(model)``. A warning says which kinds of
    module hold weights that were wanted and have no adapter (experts in 3-D Parameters without
    ``experts=True``, weights that are multiplied without a linear layer).

    Args:
        r: the rank; or the configuration, as ``config``.
        config: a ``LoraConfig`` or ``AdaLoraConfig`` of PEFT, or an ``lk.LoRAConfig``, in place of
            the fields. One of PEFT's keeps PEFT's defaults: without ``target_modules`` it adapts
            the layers that PEFT chooses for the model's ``model_type`` (q and v of Llama).
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
        task_type: PEFT's, as "CAUSAL_LM"; its ``AutoPeftModel`` classes read it in the file. As in
            PEFT, "SEQ_CLS", "TOKEN_CLS" and "QUESTION_ANS" train the heads in full (``classifier``,
            ``score``; ``qa_outputs``).
        target_parameters: names or endings of 3-D Parameters of experts
            ("experts.gate_up_proj"); such adapters have no dropout and no DoRA. Linear layers are
            still those of ``target_modules``: ``[]`` for none.
        experts: adapt every experts module of a mixture, whatever its family (transformers >= 5).

    Raises:
        TypeError: an unknown field; a ``config`` that is none.
        ValueError: nothing matches; a matched layer cannot be adapted (not linear, or its forward
            is never called, as ``nn.MultiheadAttention.out_proj``); the model has LoRA layers
            already; a rank below 1 or another wrong value; a configuration that uses what the
            layers do not compute (``lora_bias``, ``layer_replication``, DoRA on a four-bit weight,
            ...). The model is then as it was.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = apply_lora(model, r=2, target_modules=["0"])
    >>> sorted(name for name, p in model.named_parameters() if p.requires_grad)
    ['0.lora_A', '0.lora_B']
    >>> lora_report(model).skipped
    {'2': 'not in target_modules'}
    """
    root = unwrap(model)
    if config is None and LoRAConfig.is_like(r):
        config, r = r, LoRAConfig.r
    given = LoRAConfig.of_fields(
        r=r, lora_alpha=lora_alpha, target_modules=target_modules, **fields
    )
    if config is not None:
        twice = [name for name, value in vars(given).items() if value != vars(LoRAConfig())[name]]
        if twice:
            raise ValueError(f"{', '.join(twice)} belongs into the config that is given as well")
        given = LoRAConfig.of(config, root)
    given.autocast_adapter_dtype &= autocast_adapter_dtype
    check_pack_weight(pack_weight)
    given.check()
    saved = [*(given.modules_to_save or []), *heads_of_task(root, given.task_type)]
    given.modules_to_save = list(dict.fromkeys(saved)) or None
    selection = select(root, given)
    insert(root, given, selection)
    selection.warn_of_missed(stacklevel=3)
    for layer in lora_layers(root).values():
        layer.pack_weight = pack_weight
    return model


def lora_report(model: nn.Module) -> LoRAReport:
    """What :func:`apply_lora` (or ``load_adapter``) did to ``model``, whether it is merged, and,
    once the model has been called, which adapted layers no call has reached; print it. Adapted
    layers that something has replaced since are listed as skipped.

    Raises:
        ValueError: the model has no LoRA layers of this package.
    """
    report = applied(model).report
    layers = lora_layers(model)
    report.never_called = _never_called(layers)
    experts = expert_layers(unwrap(model))
    report.merged = sum(layer.merged for layer in layers.values())
    report.merged += sum(module.merged for module in experts.values())
    lost = lost_layers(model)
    if not lost:
        return report
    return replace(
        report,
        adapted={name: what for name, what in report.adapted.items() if name not in lost},
        skipped=report.skipped | {name: f"adapter lost: {what}" for name, what in lost.items()},
    )


def _never_called(layers: dict[str, FusedLoRALinear]) -> list[str]:
    reached = {name: layer.reached() for name, layer in layers.items()}
    if not any(map(any, reached.values())):
        return []
    traced = {pattern(name) for name, (_, by_compiler) in reached.items() if by_compiler}
    return [n for n, (called, _) in reached.items() if not called and pattern(n) not in traced]


def applied(model: nn.Module) -> Applied:
    check_not_taken_off(model)
    record = record_of(model)
    if record is None:
        advice = ""
        if is_pefts(type(unwrap(model))):
            advice = "; print what accelerate_peft returns, save with PEFT's save_pretrained"
        raise ValueError(
            f"{type(model).__name__} was not adapted by apply_lora or load_adapter{advice}"
        )
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
        owner, _, parameter = name.rpartition(".")
        try:
            experts = root.get_submodule(owner)
            if isinstance(experts, FusedLoRAExperts) and parameter in experts.lora:
                continue
            module = root.get_submodule(name)
        except AttributeError:
            lost[name] = "the module is gone"
            continue
        # A wrapper put around the layer since has it inside.
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


def insert(model: nn.Module, config: LoRAConfig, selection: Selection) -> None:
    """Carry a selection out; on an error the model is as it was."""
    frozen_before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    owners = _owners_of_parameters(model)
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        layers: dict[nn.Module, FusedLoRALinear] = {}
        for module, names in selection.targets.items():
            arguments = config.layer_arguments(names[0])
            layers[module] = config.layer_class.from_linear(module, **arguments)
        for module, names in selection.targets.items():
            for name in names:
                parent_name, _, child = name.rpartition(".")
                parent = model.get_submodule(parent_name)
                replaced.append((parent, child, module))
                setattr(parent, child, layers[module])
        adapt(selection.experts, config)
        _set_trainable(model, config, selection, layers.values())
        report = _report(model, selection, owners)
        names = [name for name, _ in model.named_modules(remove_duplicate=False)]
        report.notes += config.warn_of_unmatched(report.adapted, names)
    except BaseException:
        for parent, child, module in replaced:
            setattr(parent, child, module)
        for experts in expert_layers(model).values():
            experts.restore()
        for parameter, requires_grad in frozen_before.items():
            parameter.requires_grad_(requires_grad)
        raise
    setattr(model, _APPLIED, Applied(config, report))
    logger.info("%s", report)


def _set_trainable(
    model: nn.Module, config: LoRAConfig, selection: Selection, layers: Iterable[FusedLoRALinear]
) -> None:
    model.requires_grad_(False)
    for experts in expert_layers(model).values():
        experts.lora.requires_grad_(True)
    for layer in layers:
        trained = [getattr(layer, name) for name in layer._adapter_names()]
        trained += [layer.bias] * (config.bias == "lora_only")
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
    for module, (path, names) in selection.experts.targets.items():
        adapted |= described(path, module, names)
    parameters = list(model.parameters())
    return LoRAReport(
        adapted=adapted,
        skipped=selection.skipped,
        modules_to_save=list(selection.modules_to_save),
        notes=notes,
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        all_parameters=sum(p.numel() for p in parameters),
        unreached=selection.unreached,
    )


def _owners_of_parameters(model: nn.Module) -> dict[Tensor, list[str]]:
    owners: dict[Tensor, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    return owners
