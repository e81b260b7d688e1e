"""What stands in for SGLang where it cannot be imported, and its backend's base class from source.

The stand-ins hold what SGLang's classes have at the seam, and nothing of what they compute.
"""

import sys
from enum import Enum
from types import ModuleType, SimpleNamespace

import torch
from engine_sources import load

from lora_kernels.integrations import sglang as plugin

UTILS = "sglang.srt.lora.utils"


class Kind(str, Enum):
    LINEAR = "linear"
    EMBEDDING = "embedding"
    LM_HEAD = "lm_head"
    SINK_DOWN = "sink_down"


class ForwardMode:
    """A ``ForwardMode``, by the questions that are asked of it."""

    def __init__(self, name):
        self.name = name

    def is_idle(self):
        return self.name == "idle"

    def is_decode(self):
        return self.name == "decode"

    def is_target_verify(self):
        return self.name == "verify"

    def is_draft_extend_v2(self):
        return self.name == "draft"

    def is_extend(self, include_draft_extend_v2=False):
        return self.name in ("extend", "verify")

    def is_extend_without_speculative(self):
        return self.name == "extend"


def forward_batch(mode, lengths, starts=None):
    """A ``ForwardBatch`` whose requests have these rows."""
    return SimpleNamespace(
        forward_mode=ForwardMode(mode),
        batch_size=len(lengths),
        extend_seq_lens_cpu=list(lengths),
        extend_num_tokens=sum(lengths),
        extend_logprob_start_lens_cpu=starts,
        return_logprob=starts is not None,
        spec_info=SimpleNamespace(draft_token_num=max(lengths, default=0)),
    )


def one_row_each(batch):
    return None if batch.forward_mode.is_decode() else [1] * batch.batch_size


class StandInBackend:
    """The parts of ``BaseLoRABackend`` that ours uses."""

    def __init__(self, max_loras_per_batch, device):
        self.max_loras_per_batch, self.device = max_loras_per_batch, device
        self.batch_info = self.lm_head_batch_info = None
        self.lm_head_pass_batch_infos = self._lm_head_pass_idx = None
        self.prefill_cuda_graph_batch_info = None
        self.is_moe_lora = False

    def reset_batch_state(self):
        self.batch_info = self.lm_head_batch_info = None

    def _get_lm_head_pass_segments(self, weight_indices, pruned_lens):
        return None


def stand_in_backend(monkeypatch):
    module = ModuleType(UTILS)
    module.get_lm_head_pruned_lens = one_row_each
    for name in ("sglang", "sglang.srt", "sglang.srt.lora"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, UTILS, module)
    return StandInBackend


def backend_of_source(monkeypatch, chunk=4):
    """SGLang's own ``BaseLoRABackend``, its file executed over stand-ins for what needs a GPU.
    Log-probabilities are computed in passes of ``chunk`` rows."""

    def setting(value):
        return SimpleNamespace(get=lambda: value)

    settings = SimpleNamespace(
        SGLANG_LOGPROB_CHUNK_SIZE=setting(chunk), SGLANG_ENABLE_LOGPROB_CHUNK=setting(True)
    )
    stand_ins = {
        "sglang.srt.model_executor.forward_batch_info": {"ForwardBatch": object},
        "sglang.srt.utils.hf_transformers_utils": {"AutoConfig": object},
        "sglang.srt.environ": {"envs": settings},
        "sglang.srt.runtime_context": {"LoRABatchLayout": object},
        "sglang.srt.utils.common": {"empty_device_cache": None},
        "sglang.srt.lora.backend": {},
    }
    load(monkeypatch, "sglang", UTILS, stand_ins)
    backend = "sglang.srt.lora.backend"
    load(monkeypatch, "sglang", f"{backend}.lmhead_mixing", {})
    return load(monkeypatch, "sglang", f"{backend}.base_backend", {}).BaseLoRABackend


def make_backend(base, slots):
    cls = plugin.backend_class(base)
    return cls(max_loras_per_batch=slots, device=torch.device("cpu"), server_args=None)
