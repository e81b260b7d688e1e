"""Which layers of a model a configuration gives an adapter, and why not the others."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ..layers.experts import FusedLoRAExperts
from ..layers.foreign import is_conv1d
from ..layers.fused import FusedLoRALinear
from ..layers.multi import MultiLoRAEmbedding, MultiLoRALinear
from ..layers.replacing import unsupported_reason
from . import foreign
from .config import LoRAConfig, near
from .experts import ExpertSelection, select_experts
from .on_disk import first_few
from .peft_config import is_pefts
from .reports import grouped, unreached


@dataclass
class Selection:
    """What a configuration means for one model, before anything is changed."""

    # module -> every path it stands at; the first one names it
    targets: dict[nn.Module, list[str]]
    experts: ExpertSelection
    skipped: dict[str, str]
    modules_to_save: dict[str, nn.Module]
    # As in LoRAReport; and its kinds that the configuration does not exclude.
    unreached: dict[str, str]
    missed: list[str]

    def warn_of_missed(self, stacklevel: int) -> None:
        if self.missed:
            kinds = "; ".join(f"{kind}: {self.unreached[kind]}" for kind in self.missed)
            warnings.warn(
                f"no adapter is possible in {kinds}. They stay as they are: only linear layers "
                "that are called can have one, and experts of transformers 5 (experts=True)",
                stacklevel=stacklevel,
            )


def select(model: nn.Module, config: LoRAConfig, source: Path | None = None) -> Selection:
    """Resolve ``config`` on ``model`` without changing it; a user's errors are raised here.

    ``source``: the adapter that brought the configuration.
    """
    config.check()
    _check_not_applied(model)
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    by_name = {name: module for module, names in paths.items() for name in names}
    saved = _modules_to_save(paths, config)
    outputs = foreign.output_heads(model)
    targets: dict[nn.Module, list[str]] = {}
    skipped: dict[str, str] = {}
    refused: dict[nn.Module, str] = {}
    for module, names in paths.items():
        name = next(filter(config.is_target, names), names[0])
        reason = _skip_reason(model, module, name, config, saved, outputs)
        if reason is not None and not _is_linear(module):
            continue
        bypass = (
            unsupported_reason(module)
            or foreign.offload_reason(module)
            or foreign.bypass_reason(by_name, names)
        )
        if reason is None and bypass is None:
            targets[module] = names
        elif reason is None and not config.all_linear and _is_wrong_target(module, config):
            raise ValueError(
                f"target module {name!r} {bypass}; remove it from target_modules or exclude it"
            )
        elif _is_linear(module):
            skipped[name] = reason or bypass or ""
            if reason is None:
                refused[module] = bypass or ""
    experts = select_experts(model, config, saved)
    if not targets and not experts.targets:
        raise ValueError(_nothing_matches(config, skipped, source))
    skipped |= experts.skipped
    if "" in {name for names in targets.values() for name in names}:
        raise ValueError(
            "the model itself is the linear layer: use FusedLoRALinear.from_linear(model)"
        )
    known = [module for module in paths if _is_linear(module) and module not in refused]
    missing = unreached(
        model,
        [*known, *saved.values(), *experts.targets],
        refused,
        lambda path: not config.is_excluded(path),
    )
    return Selection(targets, experts, skipped, saved, *missing)


def _check_not_applied(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (FusedLoRALinear, FusedLoRAExperts)):
            raise ValueError(
                f"{type(model).__name__} has LoRA layers already ({name!r}): load another adapter "
                "with load_adapter, or fold this one in with merge_adapter(model, keep_base=False) "
                "and start from that checkpoint"
            )
        if isinstance(module, (MultiLoRALinear, MultiLoRAEmbedding)):
            raise ValueError(
                f"{type(model).__name__} has an AdapterStore already ({name!r}): close that first"
            )
        if is_pefts(type(module)):
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
        reason = foreign.head_reason(model, name, module, outputs)
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
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _nothing_matches(config: LoRAConfig, skipped: dict[str, str], source: Path | None) -> str:
    target = "all-linear" if config.all_linear else config.target_modules or []
    some = target[:200] if isinstance(target, str) else target[:8]
    shown = f"target_modules={some!r}" + (" and more" if len(some) < len(target) else "")
    where = "" if source is None else f"{source}: "
    if not skipped:
        return f"{where}{shown}: the model has no linear layers"
    wanted = grouped({name: why for name, why in skipped.items() if config.is_target(name)})
    if wanted:
        more = f"; and {len(wanted) - 8} more" if len(wanted) > 8 else ""
        return f"{where}{shown} leaves no layer to adapt: {'; '.join(wanted[:8])}{more}"
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in skipped))
    here = f"Linear layers here: {first_few(names, 16)}"
    if source is not None:
        return f"{source} is for other layers than this model's: {shown}. {here}"
    if isinstance(target, str):
        advice = "; a string is a regular expression of whole names"
        if any(replace(config, target_modules=[target]).is_target(name) for name in skipped):
            advice += f". For every layer of that name give [{target!r}]"
    else:
        advice = next(filter(None, (near(entry, skipped) for entry in target)), "")
    end = "" if advice.endswith("?") else "."
    return f"{shown} leaves no layer to adapt{advice}{end} {here}"
