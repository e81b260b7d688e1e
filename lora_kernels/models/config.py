"""The fields of PEFT's ``LoraConfig`` and the rules by which they select modules."""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import nn

from ..layers.adalora import AdaLoRALinear
from ..layers.fused import FusedLoRALinear, check_lora_arguments, default_scaling
from .foreign import default_targets
from .peft_config import ADALORA, HEADS_OF_TASKS, NO_PART_OF_A_LAYER, adalora_fields, is_pefts

# One process tries all patterns; honest ones take milliseconds.
_PATTERN_SECONDS = 10.0

# Of one kind: an entry for every layer of a large mixture. All stay compiled.
_MAX_PATTERNS = 2**15

# Of entries that match nothing, these are said one by one.
_MAX_NOTES = 20


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
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    # Of AdaLoRA, whose ``init_r`` is ``r``: what PEFT's configuration has besides (its schedule,
    # its ``rank_pattern`` of booleans).
    adalora: dict[str, Any] | None = None
    target_parameters: list[str] | None = None
    # Not PEFT's: every matrix of every experts module.
    experts: bool = False
    autocast_adapter_dtype: bool = True

    def __post_init__(self) -> None:
        # PEFT's TaskType is an Enum.
        self.task_type = getattr(self.task_type, "value", self.task_type)

    @staticmethod
    def is_like(value: Any) -> bool:
        """Whether ``value`` is a configuration: one of these, or one of PEFT's."""
        return isinstance(value, LoRAConfig) or hasattr(value, "peft_type")

    @classmethod
    def of_fields(cls, **values: Any) -> LoRAConfig:
        """A configuration of ``values``; lists for tuples, sets and their like, as JSON has them.

        Raises:
            TypeError: there is no field of such a name.
        """
        known = [f.name for f in fields(cls)]
        for name in values.keys() - set(known):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
            raise TypeError(f"there is no field {name!r}{hint}")
        plain: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                plain[name] = dict(value)
            elif isinstance(value, Collection) and not isinstance(value, str):
                plain[name] = list(value)
            # None is PEFT's way to leave a pattern out.
            elif value is not None or not name.endswith("_pattern"):
                plain[name] = value
        return cls(**plain)

    @classmethod
    def of(cls, config: Any, model: nn.Module) -> LoRAConfig:
        """A copy of ``config``, one of these or PEFT's ``LoraConfig``; where that names no targets,
        they are those that PEFT chooses for ``model``.

        Raises:
            TypeError: it is neither.
            ValueError: it is of another method, has fields set that are not computed here, or
                names no targets for a model that PEFT does not know.
        """
        if isinstance(config, LoRAConfig):
            return replace(config)
        if not cls.is_like(config):
            raise TypeError(
                f"config must be a LoraConfig of PEFT or an lk.LoRAConfig, not {config!r}"
            )
        method = getattr(config.peft_type, "value", config.peft_type)
        if method not in ("LORA", "ADALORA"):
            raise ValueError(f"config is of {method}; only LORA and ADALORA are computed here")
        own = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        others = []
        if method == "ADALORA":
            values = adalora_fields(vars(config))
        for f in fields(config):
            value = getattr(config, f.name)
            default = f.default_factory() if callable(f.default_factory) else f.default
            if f.name in values or method == "ADALORA" and f.name in ADALORA:
                continue
            if f.name in own:
                values[f.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
            elif value != default and value and f.name not in NO_PART_OF_A_LAYER:
                others.append(f.name)
        if others:
            raise ValueError(
                f"config sets {', '.join(others)}, which is not computed here: leave it out, or "
                "use PEFT's get_peft_model and then accelerate_peft"
            )
        if values.get("target_modules") is None and is_pefts(type(config)):
            only_parameters = values.get("target_parameters") is not None
            values["target_modules"] = [] if only_parameters else default_targets(model, method)
        return cls(**values)

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer is meant, and none by its name."""
        target = self.target_modules
        return target is None or isinstance(target, str) and target.lower() == "all-linear"

    def rank(self, name: str) -> int:
        if self.adalora is not None:
            kept = (self.adalora.get("rank_pattern") or {}).get(f"{name}.lora_E")
            return self.r if kept is None else sum(kept)
        return by_pattern(self.rank_pattern, name, self.r)

    def scaling(self, name: str, r: int) -> float:
        """The scaling of the layer ``name``, whose rank is ``r``."""
        if self.adalora is not None:
            return self.lora_alpha / (self.r + 1e-5)
        return default_scaling(self.alpha(name), r, self.use_rslora)

    def alpha(self, name: str) -> float:
        return by_pattern(self.alpha_pattern, name, self.lora_alpha)

    def layer_arguments(self, name: str) -> dict[str, Any]:
        """The arguments of :meth:`layer_class` for the layer ``name``."""
        return ({} if self.adalora is None else {"init_r": self.r}) | {
            "r": self.rank(name),
            "lora_alpha": self.alpha(name),
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "init_lora_weights": self.init_lora_weights,
            "use_dora": self.use_dora,
            "autocast_adapter_dtype": self.autocast_adapter_dtype,
        }

    @property
    def layer_class(self) -> type[FusedLoRALinear]:
        return FusedLoRALinear if self.adalora is None else AdaLoRALinear

    def expert_arguments(self, name: str) -> dict[str, Any]:
        """The arguments of the adapter on the Parameter ``name`` of experts."""
        without = ("lora_dropout", "use_dora", "init_r")
        return {k: v for k, v in self.layer_arguments(name).items() if k not in without}

    def is_target_parameter(self, name: str) -> bool:
        return _matches(self.target_parameters, name)

    def is_target(self, name: str) -> bool:
        return self.all_linear or _matches(self.target_modules, name)

    def is_excluded(self, name: str) -> bool:
        return bool(self.exclude_modules) and _matches(self.exclude_modules, name)

    def is_in_layers(self, name: str) -> bool:
        """Whether ``layers_to_transform`` admits ``name``; a target named in full always."""
        wanted = self.layers_to_transform
        if wanted is None or wanted == []:
            return True
        if isinstance(self.target_modules, list) and name in self.target_modules:
            return True
        for pattern in _as_list(self.layers_pattern) or [r"[^.]*"]:
            match = _compiled(_before_index(pattern)).match(name)
            if match:
                return int(match["idx"]) in _as_list(wanted)
        return False

    def check(self) -> None:
        """Raise ValueError for what no model could make sense of."""
        _check_alpha("lora_alpha", self.lora_alpha)
        if isinstance(self.lora_dropout, bool):
            raise ValueError(f"lora_dropout must be in [0, 1), not {self.lora_dropout!r}")
        check_lora_arguments(self.r, self.lora_alpha, self.lora_dropout, self.init_lora_weights)
        for name in ("use_rslora", "use_dora", "autocast_adapter_dtype", "experts"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', not {self.bias!r}")
        if self.task_type not in [None, *HEADS_OF_TASKS]:
            tasks = ", ".join(HEADS_OF_TASKS)
            raise ValueError(f"task_type must be one of {tasks}, not {self.task_type!r}")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_pattern(name, value, value)
            elif value is not None and not _is_list_of(str, value):
                raise ValueError(f"{name} must be names or a regular expression, not {value!r}")
        for name in ("modules_to_save", "target_parameters"):
            value = getattr(self, name)
            if value is not None and not _is_list_of(str, value):
                raise ValueError(f"{name} must be a list of names, not {value!r}")
        plain = not (self.lora_dropout or self.use_dora or self.adalora)
        if (self.experts or self.target_parameters) and not plain:
            raise ValueError(
                "adapters of experts have neither dropout nor DoRA nor AdaLoRA's ranks, as in PEFT:"
                " adapt them without lora_dropout, use_dora and AdaLoRA"
            )
        layers = self.layers_to_transform
        if not isinstance(layers, int | None) and not _is_list_of(int, layers):
            raise ValueError(f"layers_to_transform must be one or more indices, not {layers!r}")
        if self.adalora is not None:
            self._check_adalora()
        is_regex = isinstance(self.target_modules, str) and not self.all_linear
        if is_regex and layers not in (None, []):
            raise ValueError("layers_to_transform wants a list of target_modules, not a regex")
        if self.layers_pattern and layers is None:
            raise ValueError("layers_pattern is used with layers_to_transform only")
        for pattern in _as_list(self.layers_pattern):
            _check_pattern("layers_pattern", pattern, _before_index(pattern))
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                raise ValueError(f"{name} must be a dictionary, not {patterns!r}")
            if len(patterns) > _MAX_PATTERNS:
                raise ValueError(
                    f"{name} has {len(patterns)} patterns, more than {_MAX_PATTERNS}: let one "
                    "match several layers"
                )
            for pattern, value in patterns.items():
                _check_pattern(name, pattern, _at_end(pattern))
                if name == "alpha_pattern":
                    _check_alpha(f"{name}[{pattern!r}]", value)
                    continue
                try:
                    check_lora_arguments(value, 1, 0.0, True)
                except ValueError as error:
                    raise ValueError(f"{name}[{pattern!r}]: {error}") from error

    def _check_adalora(self) -> None:
        pattern = self.adalora and self.adalora.get("rank_pattern") or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"rank_pattern must be a dictionary, not {pattern!r}")
        for name, kept in pattern.items():
            if not _is_list_of(bool, kept) or len(kept) != self.r:
                raise ValueError(f"rank_pattern[{name!r}] must be init_r={self.r} booleans")
        if self.use_dora or self.lora_alpha <= 0:
            raise ValueError("AdaLoRA has no DoRA, and wants a lora_alpha above 0")

    def check_patterns_end(self, names: Collection[str]) -> None:
        """Raise ValueError where a regular expression takes for ever on one of ``names``.

        Nothing stops a match inside a process, so another one tries first.
        """
        patterns = [entry for entry in self._patterns() if re.search(r"[*+?{|]", entry[1])]
        if not patterns:
            return
        work = json.dumps([[[how, regex] for _, _, how, regex in patterns], list(names)])
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", "-c", _TRY_PATTERNS],
                input=work.encode(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_PATTERN_SECONDS,
            )
        except subprocess.TimeoutExpired:
            listed = [f"{name} {pattern[:80]!r}" for name, pattern, _, _ in patterns[:4]]
            raise ValueError(
                f"matching {', '.join(listed)} against the model's layers took more than "
                f"{_PATTERN_SECONDS:.0f} s: name the layers without repeats inside repeats"
            ) from None
        except OSError:
            # This Python cannot start another one; refusing every pattern would be worse.
            return

    def _patterns(self) -> Iterator[tuple[str, str, str, str]]:
        """field, regular expression, method of ``re``, and what that is given."""
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and not (name == "target_modules" and self.all_linear):
                yield name, value, "fullmatch", value
        for pattern in _as_list(self.layers_pattern):
            yield "layers_pattern", pattern, "match", _before_index(pattern)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                yield name, pattern, "match", _at_end(pattern)

    def warn_of_unmatched(
        self, adapted: Collection[str], names: Collection[str], stacklevel: int = 4
    ) -> list[str]:
        """Warn of every entry that means none of the layers, and return the sentences.

        ``adapted``: the layers with an adapter; ``names``: all modules of the model.
        """
        notes = [
            f"{field}: {entry!r} matches {what} and is ignored{advice}"
            for field, entry, what, advice in itertools.islice(
                self._unmatched(adapted, names), _MAX_NOTES + 1
            )
        ]
        if len(notes) > _MAX_NOTES:
            notes[-1] = "more entries of the configuration match no layer and are ignored"
        for note in notes:
            warnings.warn(note, stacklevel=stacklevel)
        return notes

    def _unmatched(
        self, adapted: Collection[str], names: Collection[str]
    ) -> Iterator[tuple[str, str | int, str, str]]:
        """field, entry, what it does not match, and what may have been meant."""
        containers = {name.rpartition(".")[0] for name in names}
        layers = [name for name in names if name not in containers]
        for field_name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, field_name):
                if not any(map(_compiled(_at_end(pattern)).match, adapted)):
                    known = any(_matches([pattern], name) for name in layers)
                    advice = "" if known else near(pattern, adapted)
                    yield field_name, pattern, "no adapted layer", advice
        for entry in self.target_parameters or []:
            if not any(_matches([entry], name) for name in adapted):
                yield "target_parameters", entry, "no Parameter", ""
        for field_name in ("target_modules", "exclude_modules"):
            value = getattr(self, field_name)
            if field_name == "target_modules" and isinstance(value, str):
                # Its layers are none, which is an error.
                continue
            for entry in _as_list(value):
                is_regex = isinstance(value, str)
                meant = entry if is_regex else [entry]
                if not any(_matches(meant, name) for name in layers):
                    holds = any(_matches(meant, name) for name in containers)
                    inside = _inside(entry if is_regex else re.escape(entry))
                    advice = inside if holds else near(entry, layers)
                    yield field_name, entry, "no layer", advice
        targets = [name for name in layers if self.is_target(name)]
        for index in _as_list(self.layers_to_transform):
            if not any(replace(self, layers_to_transform=index).is_in_layers(n) for n in targets):
                yield "layers_to_transform", index, "no layer of target_modules", ""


def exact_patterns(
    config: LoRAConfig, layers: Mapping[str, tuple[int, float]]
) -> dict[str, dict[str, Any]]:
    """``rank_pattern`` and ``alpha_pattern`` that give the layers, by name, their rank and alpha.

    They are the configuration's own where these do so when sorted, as PEFT and JSON's writer here
    sort them: the first that matches decides. Else there is an entry for each layer, which matches
    no other name.
    """
    content = {}
    for i, name, default in (0, "rank_pattern", config.r), (1, "alpha_pattern", config.lora_alpha):
        patterns = dict(sorted(getattr(config, name).items()))
        values = {layer: pair[i] for layer, pair in layers.items()}
        if not all(_is_close(v, by_pattern(patterns, n, default)) for n, v in values.items()):
            patterns = {
                f"^{re.escape(layer)}": value
                for layer, value in values.items()
                if not _is_close(value, default)
            }
        content[name] = patterns
    return content


def _matches(pattern: list[str] | str | None, name: str) -> bool:
    if isinstance(pattern, str):
        return _compiled(pattern).fullmatch(name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in pattern or [])


def by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of the first pattern that the end of ``name`` matches."""
    for pattern, value in patterns.items():
        if _compiled(_at_end(pattern)).match(name):
            return value
    return default


_compiled = functools.lru_cache(maxsize=2 * _MAX_PATTERNS)(re.compile)


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _before_index(pattern: str) -> str:
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


_TRY_PATTERNS = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for how, pattern in patterns:
    match = getattr(re.compile(pattern), how)
    for name in names:
        match(name)
"""


def _check_pattern(name: str, pattern: Any, regex: str) -> None:
    """``regex``: what is compiled, ``pattern`` and what is put around it."""
    try:
        if not isinstance(pattern, str):
            raise TypeError("it is no string")
        re.compile(regex)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from error


def _check_alpha(name: str, value: Any) -> None:
    """A scaling is a float32 on the device, and none is above its alpha."""
    limit = torch.finfo(torch.float32).max
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not -limit <= value <= limit:
        raise ValueError(f"{name} must be a finite number, not {value!r}")


def _inside(pattern: str) -> str:
    return rf"; to mean the layers inside, use the regular expression (.*\.)?{pattern}\..*"


def near(entry: str, names: Collection[str]) -> str:
    """Which of ``names`` may have been meant by ``entry``, as the end of a message."""
    name = re.sub(r"\\(.)", r"\1", entry).strip("^$")
    if len(name) > 200:
        return ""
    parts = name.count(".") + 1
    endings = {".".join(other.split(".")[-parts:]) for other in names}
    found = difflib.get_close_matches(name, sorted(endings), 1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _is_close(value: float, other: float) -> bool:
    return math.isclose(value, other, rel_tol=1e-12)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None or value == "" else [value]


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
