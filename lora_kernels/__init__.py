"""LoRA layers that cost what the frozen linear costs: one operator for ``x W^T + s (x A^T) B^T``,
forward and backward."""

from .functional import lora_linear
from .integrations.peft import load_adapter, save_adapter
from .integrations.peft_swap import accelerate_peft, restore_peft
from .models import LoRAConfig, LoRAReport, apply_lora, lora_report
from .multi_lora import MultiLoRAEmbedding, MultiLoRALinear
from .nn import FusedLoRALinear
from .plan import Answer, batch_invariant, force_plan, last_plan, record_plans
from .segmented import segmented_expand, segmented_linear, segmented_lora, segmented_shrink
from .segments import SegmentTable
from .serving import AdapterStore, UnknownAdapterError
from .unloading import disable_adapter, merge_adapter, unload, unmerge_adapter
from .warming import warmup

__version__ = "0.1.0"
__all__ = [
    "AdapterStore",
    "Answer",
    "FusedLoRALinear",
    "LoRAConfig",
    "LoRAReport",
    "MultiLoRAEmbedding",
    "MultiLoRALinear",
    "SegmentTable",
    "UnknownAdapterError",
    "accelerate_peft",
    "apply_lora",
    "batch_invariant",
    "disable_adapter",
    "force_plan",
    "last_plan",
    "load_adapter",
    "lora_linear",
    "lora_report",
    "merge_adapter",
    "record_plans",
    "restore_peft",
    "save_adapter",
    "segmented_expand",
    "segmented_linear",
    "segmented_lora",
    "segmented_shrink",
    "unload",
    "unmerge_adapter",
    "warmup",
]
