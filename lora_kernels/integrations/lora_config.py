"""The fields of PEFT's ``LoraConfig`` and the rules by which they select modules."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ..nn import check_lora_arguments

# Fields of PEFT's LoraConfig that say nothing of what a fresh adapter computes.
_NO_PART_OF_A_LAYER = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    ]
)


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

    @staticmethod
    def is_like(value: Any) -> bool:
        """Whether ``value`` is a configuration: one of these, or one of PEFT's."""
        return isinstance(value, LoRAConfig) or hasattr(value, "peft_type")

    @classmethod
    def of(cls, config: Any) -> LoRAConfig:
        """A copy of ``config``, one of these or PEFT's ``LoraConfig``.

        Raises:
            TypeError: it is neither.
            ValueError: it is of another method, or has fields set that are not computed here.
        """
        if isinstance(config, LoRAConfig):
            return replace(config)
        if not cls.is_like(config):
            raise TypeError(
                f"config must be a LoraConfig of PEFT or an lk.LoRAConfig, not {config!r}"
            )
        method = getattr(config.peft_type, "value", config.peft_type)
        if method != "LORA":
            raise ValueError(f"config is of {method}; only LORA is computed here")
        own = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        others = []
        for f in fields(config):
            value = getattr(config, f.name)
            default = f.default_factory() if callable(f.default_factory) else f.default
            if f.name in own:
                values[f.name] = sorted(value) if isinstance(value, (set, frozenset)) else value
            elif value != default and value and f.name not in _NO_PART_OF_A_LAYER:
                others.append(f.name)
        if others:
            raise ValueError(
                f"config sets {', '.join(others)}, which is not computed here: leave it out, or "
                "use PEFT's get_peft_model and then accelerate_peft"
            )
        return cls(**values)

    @property
    def all_linear(self) -> bool:
        """Whether every linear layer is meant, and none by its name."""
        target = self.target_modules
        return target is None or isinstance(target, str) and target.lower() == "all-linear"

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
        patterns = self.layers_pattern or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
            if match:
                index = int(match.group(1))
                return index == wanted if isinstance(wanted, int) else index in wanted
        return False

    def check(self) -> None:
        """Raise ValueError for what no model could make sense of."""
        check_lora_arguments(self.r, self.lora_alpha, self.lora_dropout, self.init_lora_weights)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias must be 'none', 'all' or 'lora_only', not {self.bias!r}")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_pattern(name, value)
            elif value is not None and not _is_list_of(str, value):
                raise ValueError(f"{name} must be names or a regular expression, not {value!r}")
        if self.modules_to_save is not None and not _is_list_of(str, self.modules_to_save):
            raise ValueError(f"modules_to_save must be a list of names, not {self.modules_to_save}")
        layers = self.layers_to_transform
        if not isinstance(layers, int | None) and not _is_list_of(int, layers):
            raise ValueError(f"layers_to_transform must be one or more indices, not {layers!r}")
        is_regex = isinstance(self.target_modules, str) and not self.all_linear
        if is_regex and layers not in (None, []):
            raise ValueError("layers_to_transform wants a list of target_modules, not a regex")
        if self.layers_pattern and layers is None:
            raise ValueError("layers_pattern is used with layers_to_transform only")
        self._check_patterns()

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                raise ValueError(f"{name} must be a dictionary, not {patterns!r}")
            for pattern, value in patterns.items():
                _check_pattern(name, pattern)
                r, alpha = (value, self.lora_alpha) if name == "rank_pattern" else (self.r, value)
                try:
                    check_lora_arguments(r, alpha, self.lora_dropout, self.init_lora_weights)
                except ValueError as error:
                    raise ValueError(f"{name}[{pattern!r}]: {error}") from error


def _matches(pattern: list[str] | str | None, name: str) -> bool:
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == ending or name.endswith(f".{ending}") for ending in pattern or [])


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _check_pattern(name: str, pattern: Any) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from error


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
