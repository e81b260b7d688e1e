"""Engines whose kernels serve a mixed batch: vLLM's and SGLang's default.

Each does what its engine does for one layer: the base linear, then the engine's own code over
metadata that the engine's own code built. The metadata is built once per batch for all layers, so
its time is a row of its own, as that of our table is.
"""

from __future__ import annotations

import contextlib
import enum
import logging
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import peers
from .baselines import Variant, keyed

# Up to so many rows a batch decodes, a token for each request; beyond, it is a prefill.
_MOST_DECODING = 512


class Peer(peers.Peer):
    computes = "mixed"
    # As the engine lays the adapters out.
    a: Any
    b: Any

    def build(self) -> None:
        """The metadata of the batch, in the way the engine builds it for every batch."""
        raise NotImplementedError


def table_of(peer: type[Peer], what: str) -> type[Variant]:
    """The metadata alone, host and device. Nothing of it is captured, as in the engines."""

    def forward(self: Any, x: Tensor) -> list[Tensor]:
        self.build()
        return []

    own = {"computes": "nothing", "captured": False, "forward": forward}
    return peer.but(f"{peer.key}_table", f"{peer.label}'s table", what, **own)


def _capability(major: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= major


class Vllm(Peer):
    key, label = "vllm", "vLLM"
    what = (
        "F.linear, then PunicaWrapperGPU.add_lora_linear (zero, shrink, expand; as many slots as "
        "adapters, all of the batch's rank; the scale inside B, as the engine loads it)"
    )
    package = "vllm"

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        device, self.adapters = inputs.x.device, setting.adapters
        scales = torch.tensor(inputs.scales, device=device)[:, None, None]
        # [slots, 1, rank, in] and [slots, 1, out, rank], one for each slice.
        self.a = tuple(a[:, None].contiguous() for a in inputs.lora_a)
        self.b = tuple((b * scales).to(b.dtype)[:, None].contiguous() for b in inputs.lora_b)
        # Its tables of pointers are found by address and never dropped; an engine's stacks never
        # move, while ours of the last row lay where these are.
        self.engine.pointers._LORA_A_PTR_DICT.pop(tuple(a.data_ptr() for a in self.a), None)
        self.engine.pointers._LORA_B_PTR_DICT.pop(tuple(b.data_ptr() for b in self.b), None)
        config = SimpleNamespace(max_loras=self.adapters, specialize_active_lora=False)
        self.wrapper = self.engine.wrapper(setting.m, setting.m, device, lora_config=config)
        # Names of adapters are numbers from 1; 0 is the base model.
        names = tuple(slot + 1 for slot in inputs.slots)
        self.mapping = SimpleNamespace(
            index_mapping=names, prompt_mapping=names, is_prefill=setting.m > _MOST_DECODING
        )
        self.build()

    def build(self) -> None:
        names: list[int | None] = [slot + 1 for slot in range(self.adapters)]
        self.wrapper.update_metadata(self.mapping, names, self.adapters, 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y = F.linear(x, self.inputs.weight)
        self.wrapper.add_lora_linear(y, x, self.a, self.b, 1.0, self.setting.widths)
        return y

    @classmethod
    def load(cls) -> Any:
        import triton
        import triton.language as tl

        logger = logging.getLogger("vllm")
        told_once = SimpleNamespace(info_once=logger.info, warning_once=logger.debug)
        platform = SimpleNamespace(
            is_cuda=torch.cuda.is_available,
            is_device_capability=lambda n: torch.cuda.get_device_capability()[0] == n // 10,
            has_device_capability=lambda n: _capability(n // 10),
        )
        # The defaults.
        unset = ["BATCH_INVARIANT", "LORA_DISABLE_PDL", "LORA_ENABLE_DUAL_STREAM"]
        environment = dict.fromkeys((f"VLLM_{name}" for name in unset), False)
        own: peers.StandIns = {
            "vllm.envs": environment | {"VLLM_TUNED_CONFIG_FOLDER": None},
            "vllm.logger": {"init_logger": lambda name: told_once},
            "vllm.platforms": {"current_platform": platform},
            "vllm.triton_utils": {"tl": tl, "triton": triton, "HAS_TRITON": True},
            "vllm.utils.math_utils": {
                "next_power_of_2": triton.next_power_of_2,
                "round_up": lambda value, multiple: triton.cdiv(value, multiple) * multiple,
            },
            "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": contextlib.nullcontext},
            "vllm.utils.torch_utils": {
                "async_tensor_h2d": _to_device,
                "direct_register_custom_op": _register_nothing,
            },
            "vllm.lora.utils": {"get_captured_lora_counts": lambda most, special: [most + 1]},
        }
        operators = "vllm.lora.ops.triton_ops"
        names = ("lora_kernel_metadata", "lora_shrink_op", "lora_expand_op", "utils")
        modules = [operators, *(f"{operators}.{name}" for name in names)]
        package, metadata, shrink, expand, pointers = peers.load("vllm", modules, own, {})
        # What its __init__ would have collected.
        vars(package).update(
            LoRAKernelMeta=metadata.LoRAKernelMeta,
            lora_shrink=shrink.lora_shrink,
            lora_expand=expand.lora_expand,
        )
        (wrapper,) = peers.load("vllm", ["vllm.lora.punica_wrapper.punica_gpu"], own, {})
        return SimpleNamespace(wrapper=wrapper.PunicaWrapperGPU, pointers=pointers)


def _to_device(data: Any, device: Any = None, dtype: Any = None, out: Any = None) -> Tensor:
    """From pinned memory, without waiting."""
    held = torch.as_tensor(data, dtype=dtype)
    if torch.device(device).type == "cuda":
        held = held.pin_memory()
    return held.to(device, non_blocking=True) if out is None else out.copy_(held, non_blocking=True)


def _register_nothing(**kwargs: object) -> None:
    # Their modules then call the plain function: an operator of torch's would only add to the
    # host's time, and a graph has none.
    raise AttributeError("no operator is registered here")


class _Layout(enum.Enum):
    DP_LOCAL = 1
    TP_GLOBAL = 2


class _Unset:
    """The defaults of SGLang's environment variables."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(get=lambda: None, is_set=lambda: False)


def _mode(decodes: bool) -> Any:
    """A batch that decodes, or one whose requests are all prefilled."""
    names = ("idle", "target_verify", "draft_extend_v2")
    modes = dict.fromkeys((f"is_{name}" for name in names), lambda: False)
    extends = dict.fromkeys(("is_extend", "is_extend_without_speculative"), lambda: not decodes)
    return SimpleNamespace(**modes, **extends, is_decode=lambda: decodes)


class Sglang(Peer):
    """A request is one token, so that any row has any adapter."""

    key, label = "sglang_csgmv", "SGLang csgmv"
    what = "F.linear, then SGLang's default: chunked shrink and expand (chunks of 16 rows)"
    package = "sglang"

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        device, m = inputs.x.device, setting.m
        self.decodes = m <= _MOST_DECODING
        # [slots, slices * rank, in], packed by rank, and [slots, out, rank].
        self.a = torch.cat(inputs.lora_a, dim=1).contiguous()
        self.b = torch.cat(inputs.lora_b, dim=1).contiguous()
        ends = torch.tensor([0, *setting.widths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.offsets_cpu, self.offsets = ends, ends.to(device)
        if device.index is None and device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        self.backend = self.engine(
            max_loras_per_batch=setting.adapters, device=device, server_args=None
        )
        lengths = torch.ones(m, dtype=torch.int32)
        self.batch = SimpleNamespace(
            forward_mode=_mode(self.decodes),
            batch_size=m,
            extend_seq_lens=lengths.to(device),
            extend_seq_lens_cpu=lengths.tolist(),
            extend_num_tokens=m,
            return_logprob=False,
        )
        if self.decodes:
            # The graph of a decoding batch is captured for its size.
            self.backend.init_decode_cuda_graph_batch_info(m, 1)
        self.build()

    def build(self) -> None:
        inputs, ranks = self.inputs, [self.setting.r] * self.setting.adapters
        self.backend.prepare_lora_batch(
            self.batch, inputs.slots, ranks, inputs.scales, self.decodes
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        widths, backend, stacks = self.setting.widths, self.backend, (self.a, self.b)
        options = {"output_offset": self.offsets, "output_offset_cpu": self.offsets_cpu}
        options["base_output"] = F.linear(x, self.weight)
        if len(widths) == 1:
            s = backend.run_lora_a_sgemm(x, self.a)
            return backend.run_lora_b_sgemm(x=s, weights=self.b, **options)
        if len(widths) == 2 and widths[0] == widths[1]:
            return backend.run_gate_up_lora(x, *stacks, **options)
        most, slices = max(widths), len(widths)
        return backend.run_qkv_lora(x, *stacks, max_qkv_out_dim=most, n_slices=slices, **options)

    @classmethod
    def load(cls) -> Any:
        settings = SimpleNamespace(max_lora_chunk_size=16)
        layout = SimpleNamespace(lora_batch_layout=_Layout.DP_LOCAL)
        own: peers.StandIns = {
            "sglang.srt.environ": {"envs": _Unset()},
            "sglang.srt.runtime_context": {
                "LoRABatchLayout": _Layout,
                "get_lora": lambda: settings,
                "get_forward": lambda: layout,
            },
            "sglang.srt.utils": {
                # Theirs finds a compiled kernel by fewer things than tell two kernels apart when
                # rows of several ranks follow each other in one process.
                "cached_triton_kernel": lambda key: lambda kernel: kernel,
                "get_device_name": _device_name,
            },
        }
        modules = ["sglang.srt.lora.backend.chunked_backend"]
        return peers.load("sglang", modules, own, {})[0].ChunkedSgmvLoRABackend


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def mixed_peers(device: str) -> dict[str, type[Variant]]:
    """Those that a device's rows have; on a CPU none, without a word."""
    return MIXED_PEERS if device == "cuda" else {}


_HOST = "for a new batch, called by the host"
MIXED_PEERS = keyed(
    Vllm,
    Sglang,
    table_of(Vllm, f"PunicaWrapperGPU.update_metadata {_HOST}"),
    table_of(Sglang, f"its prepare_lora_batch {_HOST}"),
)
