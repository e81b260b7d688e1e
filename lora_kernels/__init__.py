"""LoRA layers that cost what the frozen linear costs: one operator for ``x W^T + s (x A^T) B^T``,
forward and backward."""

from .functional.experts import expert_linear
from .functional.linear import lora_linear
from .functional.linears import lora_linears
from .functional.segmented import (
    segmented_expand,
    segmented_linear,
    segmented_lora,
    segmented_shrink,
)
from .integrations.peft_swap import accelerate_peft, restore_peft
from .layers.embedding import LoRAEmbedding
from .layers.experts import FusedLoRAExperts
from .layers.four_bit import QuantizedLinear
from .layers.four_bit_parameter import FourBitParameter
from .layers.fused import FusedLoRALinear
from .layers.multi import MultiLoRAEmbedding, MultiLoRALinear
from .layers.shared_input import share_inputs
from .layers.sliced import SlicedLoRALinear
from .models.apply import LoRAConfig, LoRAReport, apply_lora, lora_report
from .models.checkpoints import load_adapter, save_adapter
from .models.loralib import load_loralib, loralib_state_dict, save_loralib
from .models.quantizing import quantize_base
from .models.unloading import disable_adapter, merge_adapter, unload, unmerge_adapter
from .models.warming import warmup
from .planning.answers import Answer, last_plan, record_plans
from .planning.plan import batch_invariant, force_plan
from .serving.store import AdapterStore, UnknownAdapterError
from .spec.segments import SegmentTable

__version__ = "0.2.0"
__all__ = [
    "AdapterStore",
    "Answer",
    "FusedLoRAExperts",
    "FourBitParameter",
    "FusedLoRALinear",
    "LoRAEmbedding",
    "LoRAConfig",
    "LoRAReport",
    "MultiLoRAEmbedding",
    "MultiLoRALinear",
    "QuantizedLinear",
    "SegmentTable",
    "SlicedLoRALinear",
    "UnknownAdapterError",
    "accelerate_peft",
    "apply_lora",
    "batch_invariant",
    "disable_adapter",
    "expert_linear",
    "force_plan",
    "last_plan",
    "load_adapter",
    "load_loralib",
    "lora_linear",
    "lora_linears",
    "lora_report",
    "loralib_state_dict",
    "merge_adapter",
    "quantize_base",
    "record_plans",
    "restore_peft",
    "save_adapter",
    "save_loralib",
    "segmented_expand",
    "segmented_linear",
    "segmented_lora",
    "segmented_shrink",
    "share_inputs",
    "unload",
    "unmerge_adapter",
    "warmup",
]
