"""What stands in for vLLM where it cannot be imported, and its wrapper's class from its source.

The stand-ins hold what vLLM's classes have at the seam, and nothing of what they compute.
"""

import contextlib
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from engine_sources import load

from lora_kernels.integrations import vllm as plugin
from lora_kernels.planning.device import facts


@dataclass
class LoRAMapping:
    index_mapping: tuple[int, ...]
    prompt_mapping: tuple[int, ...]
    is_prefill: bool = False


class StandInWrapper:
    """The parts of ``PunicaWrapperGPU`` that ours uses."""

    def __init__(self, max_num_batched_tokens, max_batches, device, **kwargs):
        self.tokens = self.prompts = None
        self.inherited = 0

    def _update_base_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size):
        index = {lora_id: slot for slot, lora_id in enumerate(lora_index_to_id) if lora_id}
        self.tokens = torch.tensor([index.get(i, -1) for i in mapping.index_mapping], device="cpu")
        self.prompts = torch.tensor(
            [index.get(i, -1) for i in mapping.prompt_mapping], device="cpu"
        )

    @property
    def token_lora_indices(self):
        return self.tokens

    @property
    def sampler_indices(self):
        return self.prompts

    def update_metadata(self, mapping, lora_index_to_id, max_loras, vocab_size, **kwargs):
        self.inherited += 1
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)


def wrapper_of_source(monkeypatch):
    """vLLM's own ``PunicaWrapperGPU``, its file executed over stand-ins for what needs a GPU."""

    def async_tensor_h2d(data, device=None, dtype=None, out=None):
        return torch.tensor(data, dtype=dtype, device=device)

    root = "vllm.lora.punica_wrapper"
    load(
        monkeypatch,
        "vllm",
        f"{root}.utils",
        {"vllm.utils.torch_utils": {"async_tensor_h2d": async_tensor_h2d}, root: {}},
    )
    load(monkeypatch, "vllm", f"{root}.punica_base", {})
    meta = load(monkeypatch, "vllm", "vllm.lora.ops.triton_ops.lora_kernel_metadata", {})
    kernels = {"LoRAKernelMeta": meta.LoRAKernelMeta, "fused_moe_lora": None}
    stand_ins = {
        "vllm.lora.layers": {"LoRAMapping": LoRAMapping},
        "vllm.lora.utils": {"get_captured_lora_counts": lambda slots, specialize: [slots + 1]},
        "vllm.triton_utils": {"HAS_TRITON": True, "triton": None},
        "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": contextlib.nullcontext},
        "vllm.utils.math_utils": {"round_up": None},
        "vllm.lora.ops.triton_ops": kernels | {"lora_expand": None, "lora_shrink": None},
        "vllm._custom_ops": {},
    }
    return load(monkeypatch, "vllm", f"{root}.punica_gpu", stand_ins).PunicaWrapperGPU


class Layer:
    def __init__(self, *matrices):
        self.lora_a = list(matrices) if len(matrices) > 1 else matrices[0]


class Model:
    """A ``LoRAModel``: what it has at the seam is the A of its layers."""

    def __init__(self, rank, head=None, experts=1):
        self.loras = {
            "lm_head": Layer(torch.zeros(rank if head is None else head, 6)),
            "qkv": Layer(torch.zeros(min(rank, 2), 6), None),
            "experts": Layer(torch.zeros(99, experts, 6)),
            "experts.base_layer": Layer(torch.zeros(99, 1, 6)),
            "o": Layer(torch.zeros(rank, 6)),
        }


class Manager:
    """A ``LoRAModelManager`` of a dense model: adapters in slots, told to its wrapper."""

    _is_moe = False
    is_pooling_model = False
    modules = ("lm_head", "qkv", "experts", "o")
    _classification_head = None
    _last_mapping = None

    def __init__(self, wrapper, lora_index_to_id, ranks):
        self.punica_wrapper_mapping = {"language_model": wrapper}
        self.lora_index_to_id = lora_index_to_id
        self.models = {lora_id: Model(rank) for lora_id, rank in ranks.items()}

    def list_adapters(self):
        return dict(self.models)

    def activate_adapter(self, lora_id):
        return True

    def set_adapter_mapping(self, mapping):
        if mapping != self._last_mapping:
            self._set_adapter_mapping(mapping)
            self._last_mapping = mapping

    def _set_adapter_mapping(self, mapping):
        for wrapper in self.punica_wrapper_mapping.values():
            slots = len(self.lora_index_to_id)
            wrapper.update_metadata(mapping, self.lora_index_to_id, slots + 1, 32000)


plugin.introduce_to_wrappers(Manager)


def make_wrapper(base, *, max_tokens, max_loras, max_rank):
    config = SimpleNamespace(
        max_loras=max_loras, max_lora_rank=max_rank, specialize_active_lora=False
    )
    cls = plugin.wrapper_class(base)
    return cls(max_tokens, max_batches=max_tokens, device="cpu", lora_config=config)


def served(answers, *operators):
    """Our kernels answered, each of these operators once."""
    backend = "cpu" if facts("cpu").native not in ("", "baseline") else "reference"
    assert [(a.op, a.backend) for a in answers] == [(op, backend) for op in operators]
