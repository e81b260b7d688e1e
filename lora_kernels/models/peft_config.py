"""What PEFT's configurations say beyond the fields that are ours too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

# Fields of PEFT's LoraConfig that say nothing of what a fresh adapter computes.
NO_PART_OF_A_LAYER = frozenset(
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
    ]
)

# PEFT's task types, and the ends of the names of heads that it trains in full with each.
HEADS_OF_TASKS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "SEQ_2_SEQ_LM": (),
    "CAUSAL_LM": (),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "FEATURE_EXTRACTION": (),
}

# Fields of PEFT's AdaLoraConfig that its LoraConfig has not, but for ``init_r``; and one that means
# something else there.
ADALORA = frozenset(
    ["target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"]
    + ["init_r", "rank_pattern", "alpha_pattern", "use_rslora"]
)


def adalora_fields(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields ``r`` and ``adalora`` of a :class:`LoRAConfig` for those of PEFT's AdaLoraConfig.

    >>> adalora_fields({"init_r": 2, "rank_pattern": {"h.fc.lora_E.default": [True, False]}})
    {'r': 2, 'adalora': {'rank_pattern': {'h.fc.lora_E': [True, False]}}}
    """
    schedule = {k: content[k] for k in content if k in ADALORA and k != "init_r"}
    pattern = schedule.get("rank_pattern")
    if isinstance(pattern, Mapping):
        # While a model of PEFT trains, the name of the adapter is behind.
        ends = {key: key.rpartition(".lora_E")[0] for key in pattern}
        schedule["rank_pattern"] = {f"{ends[key]}.lora_E": kept for key, kept in pattern.items()}
    return {"r": content.get("init_r", 12), "adalora": schedule}


def is_pefts(kind: type) -> bool:
    """Whether a class is PEFT's, or derived from one."""
    return any(cls.__module__.partition(".")[0] == "peft" for cls in kind.__mro__)


def heads_of_task(model: nn.Module, task: str | None) -> list[str]:
    """The modules of ``model`` that PEFT trains in full and looks for in files of ``task``."""
    ends = HEADS_OF_TASKS.get(task or "", ())
    names = (name for name, _ in model.named_modules(remove_duplicate=False))
    return [name for name in names if name.endswith(ends)]
