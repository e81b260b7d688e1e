"""The kernels of serving engines as variants of a mixed batch: vLLM's and SGLang's.

Each does what its engine does for one layer: the base linear, then the engine's own code over
metadata that the engine's own code built. The metadata is built once per batch for all layers, so
its time is a row of its own, as that of our table is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import logging
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import peers
from .segmented_baselines import MixedVariant
from .segmented_cases import MixedInputs, MixedSetting

# Up to so many rows a batch decodes, a token for each request; beyond, it is a prefill.
_MOST_DECODING = 512


class Peer(MixedVariant):
    """Base and adapters of a layer as an engine computes them."""

    peer = True

    @classmethod
    def missing(cls, setting: MixedSetting, device: str) -> str | None:
        return peers.unavailable(cls, setting, device)

    @classmethod
    def load(cls) -> Any:
        """The peer's module; raises ``peers.MissingPeerError``."""
        raise NotImplementedError

    def build(self) -> None:
        """The metadata of the batch, in the way the engine builds it for every batch."""
        raise NotImplementedError


class PeerTable(Peer):
    """The metadata alone, host and device. Nothing of it is captured, as in the engines."""

    computes = "nothing"
    captured = False

    def forward(self, x: Tensor) -> list[Tensor]:
        self.build()
        return []


def _capability(major: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= major


@peers.load_once
def _vllm() -> Any:
    import triton
    import triton.language as tl

    logger = logging.getLogger("vllm")
    told_once = SimpleNamespace(info_once=logger.info, warning_once=logger.debug)
    platform = SimpleNamespace(
        is_cuda=torch.cuda.is_available,
        is_device_capability=lambda wanted: torch.cuda.get_device_capability()[0] == wanted // 10,
        has_device_capability=lambda wanted: _capability(wanted // 10),
    )
    own = {
        # As they are where nobody sets them.
        "vllm.envs": {
            "VLLM_BATCH_INVARIANT": False,
            "VLLM_TUNED_CONFIG_FOLDER": None,
            "VLLM_LORA_DISABLE_PDL": False,
            "VLLM_LORA_ENABLE_DUAL_STREAM": False,
        },
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
    loaded = peers.load("vllm", [operators, *(f"{operators}.{name}" for name in names)], own, {})
    package, metadata, shrink, expand, pointers = loaded
    # What its __init__ would have collected.
    vars(package).update(
        LoRAKernelMeta=metadata.LoRAKernelMeta,
        lora_shrink=shrink.lora_shrink,
        lora_expand=expand.lora_expand,
    )
    (wrapper,) = peers.load("vllm", ["vllm.lora.punica_wrapper.punica_gpu"], own, {})
    return SimpleNamespace(wrapper=wrapper.PunicaWrapperGPU, pointers=pointers)


def _to_device(
    data: Any, device: Any = None, dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """From pinned memory, without waiting."""
    held = torch.as_tensor(data, dtype=dtype)
    if torch.device(device).type == "cuda":
        held = held.pin_memory()
    return held.to(device, non_blocking=True) if out is None else out.copy_(held, non_blocking=True)


def _register_nothing(**kwargs: object) -> None:
    # Their modules then call the plain function: an operator of torch's would only add to the
    # host's time, and a graph has none.
    raise AttributeError("no operator is registered here")


class Vllm(Peer):
    key, label = "vllm", "vLLM"
    what = (
        "F.linear, then PunicaWrapperGPU.add_lora_linear (zero, shrink, expand; as many slots as "
        "adapters, all of the batch's rank; the scale inside B, as the engine loads it)"
    )
    package = "vllm"

    def __init__(self, setting: MixedSetting, inputs: MixedInputs) -> None:
        super().__init__(setting, inputs)
        self.engine = self.load()
        device = inputs.x.device
        scales = torch.tensor(inputs.scales, device=device)[:, None, None]
        # [slots, 1, rank, in] and [slots, 1, out, rank], one for each slice.
        self.a = tuple(a[:, None].contiguous() for a in inputs.lora_a)
        self.b = tuple((b * scales).to(b.dtype)[:, None].contiguous() for b in inputs.lora_b)
        for known, stacks in (
            (self.engine.pointers._LORA_A_PTR_DICT, self.a),
            (self.engine.pointers._LORA_B_PTR_DICT, self.b),
        ):
            # Those tables are found by address and never dropped; an engine's stacks never move,
            # while ours of the last row lay where these are.
            known.pop(tuple(stack.data_ptr() for stack in stacks), None)
        self.adapters = setting.adapters
        config = SimpleNamespace(max_loras=self.adapters, specialize_active_lora=False)
        self.wrapper = self.engine.wrapper(setting.m, setting.m, device, lora_config=config)
        # Names of adapters are numbers from 1; 0 is the base model.
        names = tuple(slot + 1 for slot in inputs.slots)
        self.mapping = SimpleNamespace(
            index_mapping=names, prompt_mapping=names, is_prefill=setting.m > _MOST_DECODING
        )
        self.build()

    @classmethod
    def load(cls) -> Any:
        return _vllm()

    def build(self) -> None:
        names: list[int | None] = [slot + 1 for slot in range(self.adapters)]
        self.wrapper.update_metadata(self.mapping, names, self.adapters, 1)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y = F.linear(x, self.inputs.weight)
        self.wrapper.add_lora_linear(y, x, self.a, self.b, 1.0, self.setting.widths)
        return y


class VllmTable(PeerTable, Vllm):
    key, label = "vllm_table", "vLLM's table"
    what = "PunicaWrapperGPU.update_metadata for a new batch, called by the host"


class _Layout(enum.Enum):
    DP_LOCAL = 1
    TP_GLOBAL = 2


class _Variables:
    """SGLang's environment variables where nobody sets them: off, or none."""

    def __init__(self) -> None:
        self.set: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(get=lambda: self.set.get(name), is_set=lambda: name in self.set)


_VARIABLES = _Variables()
_SPLIT_K = "SGLANG_ENABLE_LORA_CSGMV_SPLIT_K"
# Their backends, by the names that --lora-backend takes.
_BACKENDS = {
    "csgmv": ("chunked_backend", "ChunkedSgmvLoRABackend"),
    "triton": ("triton_backend", "TritonLoRABackend"),
    "triton_v2": ("triton_v2_backend", "TritonV2LoRABackend"),
}
_SGLANG = "sglang.srt.lora"


@peers.load_once
def _sglang(backend: str) -> Any:
    settings = SimpleNamespace(max_lora_chunk_size=16)
    layout = SimpleNamespace(lora_batch_layout=_Layout.DP_LOCAL)
    own = {
        "sglang.srt.environ": {"envs": _VARIABLES},
        "sglang.srt.runtime_context": {
            "LoRABatchLayout": _Layout,
            "get_lora": lambda: settings,
            "get_forward": lambda: layout,
        },
        "sglang.srt.utils": {
            # Theirs finds a compiled kernel by fewer things than tell two kernels apart when rows
            # of several ranks follow each other in one process.
            "cached_triton_kernel": lambda key: lambda kernel: kernel,
            "get_device_name": _device_name,
        },
        "sglang.srt.utils.common": {"empty_device_cache": torch.cuda.empty_cache},
        "sglang.kernels.jit.utils": {"is_arch_support_pdl": lambda: _capability(9)},
    }
    module, name = _BACKENDS[backend]
    modules = [f"{_SGLANG}.backend.{module}", "sglang.kernels.ops.lora.common.routing"]
    found, routing = peers.load("sglang", modules, own, {"msgspec": {"Struct": _Struct}})
    # Between 513 and 16383 rows it builds the route by a CUDA kernel that is compiled against its
    # own headers; the builder for more rows, in Triton, takes these too.
    routing._LARGE_ROUTE_MIN_PAIRS = routing._SMALL_ROUTE_MAX_PAIRS + 1
    return getattr(found, name)


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


class _Struct:
    """Stands in for msgspec's."""

    def __init_subclass__(cls, **options: bool) -> None:
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)


class _Mode:
    """A batch that decodes, or one whose requests are all prefilled."""

    def __init__(self, decodes: bool) -> None:
        self.decodes = decodes

    def is_decode(self) -> bool:
        return self.decodes

    def is_extend(self) -> bool:
        return not self.decodes

    is_extend_without_speculative = is_extend

    def is_idle(self) -> bool:
        return False

    is_target_verify = is_draft_extend_v2 = is_idle


class Sglang(Peer):
    """One of SGLang's backends. A request is one token, so that any row has any adapter."""

    package = "sglang"
    backend_name: ClassVar[str]
    # Whether every batch decodes, whatever its size.
    always_decodes: ClassVar[bool] = False

    def __init__(self, setting: MixedSetting, inputs: MixedInputs) -> None:
        super().__init__(setting, inputs)
        backend = self.load()
        device, m = inputs.x.device, setting.m
        self.decodes = self.always_decodes or m <= _MOST_DECODING
        # [slots, slices * rank, in], packed by rank, and [slots, out, rank].
        self.a = torch.cat(inputs.lora_a, dim=1).contiguous()
        self.b = torch.cat(inputs.lora_b, dim=1).contiguous()
        ends = torch.tensor([0, *setting.widths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.offsets_cpu, self.offsets = ends, ends.to(device)
        if device.index is None and device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        self.backend = backend(
            max_loras_per_batch=setting.adapters, device=device, server_args=None
        )
        lengths = torch.ones(m, dtype=torch.int32)
        self.batch = SimpleNamespace(
            forward_mode=_Mode(self.decodes),
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

    @classmethod
    def load(cls) -> Any:
        return _sglang(cls.backend_name)

    def build(self) -> None:
        ranks = [self.setting.r] * self.setting.adapters
        self.backend.prepare_lora_batch(
            self.batch, self.inputs.slots, ranks, self.inputs.scales, self.decodes
        )

    def base(self) -> Tensor:
        return F.linear(self.inputs.x, self.inputs.weight)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y, widths = self.base(), self.setting.widths
        offsets = {"output_offset": self.offsets, "output_offset_cpu": self.offsets_cpu}
        if len(widths) == 1:
            s = self.backend.run_lora_a_sgemm(x, self.a)
            return self.backend.run_lora_b_sgemm(x=s, weights=self.b, base_output=y, **offsets)
        if len(widths) == 2 and widths[0] == widths[1]:
            return self.backend.run_gate_up_lora(x, self.a, self.b, base_output=y, **offsets)
        return self.backend.run_qkv_lora(
            x,
            self.a,
            self.b,
            max_qkv_out_dim=max(widths),
            base_output=y,
            n_slices=len(widths),
            **offsets,
        )


class SglangCsgmv(Sglang):
    key, label = "sglang_csgmv", "SGLang csgmv"
    what = "F.linear, then SGLang's default: chunked shrink and expand (chunks of 16 rows)"
    backend_name = "csgmv"


class SglangCsgmvSplit(SglangCsgmv):
    key, label = "sglang_csgmv_split", "SGLang csgmv, split K"
    what = f"the same with {_SPLIT_K}=1, which it ships turned off"

    @classmethod
    def missing(cls, setting: MixedSetting, device: str) -> str | None:
        reason = super().missing(setting, device)
        if reason is None and (setting.r != 32 or setting.k not in (4096, 12288)):
            return "it splits K of 4096 and 12288 at rank 32 alone"
        return reason

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        _VARIABLES.set[_SPLIT_K] = True
        try:
            return super().forward(x)
        finally:
            del _VARIABLES.set[_SPLIT_K]


class SglangTriton(Sglang):
    key, label = "sglang_triton", "SGLang triton"
    what = "F.linear, then its sgemm_lora_a and (qkv_, gate_up_)lora_b, always as a decoding batch"
    backend_name = "triton"
    # Its prefill works request by request, which requests of one token would make absurd.
    always_decodes = True


class SglangTritonV2(Sglang):
    key, label = "sglang_triton_v2", "SGLang triton_v2"
    what = (
        "its forward_with_base around F.linear, by its plan for this GPU (shrink beside the base "
        "GEMM where that says so); the route is built once per batch"
    )
    backend_name = "triton_v2"

    def __init__(self, setting: MixedSetting, inputs: MixedInputs) -> None:
        super().__init__(setting, inputs)
        self.ends = tuple(self.offsets_cpu.tolist())
        if not inputs.x.is_cuda:
            return
        # Its buffers and routes belong to a stream: let there be some of that which captures.
        stream = torch.cuda.graph(torch.cuda.CUDAGraph()).capture_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            self.forward(inputs.x)
        torch.cuda.current_stream().wait_stream(stream)

    def build(self) -> None:
        super().build()
        # A layer's first use would build it.
        kind = peers.load("sglang", [f"{_SGLANG}.dense.plan"], {}, {})[0].DenseLoraKind.LINEAR
        runner, setting = self.backend.runner, self.setting
        plan = runner.plan_for(kind, setting.r, setting.k, setting.n, num_tokens=setting.m)
        if plan.needs_aligned_route:
            runner.route(plan.block_size)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        return self.backend.forward_with_base(
            None, x, self.base, self.a, self.b, self.offsets, self.ends
        )


class SglangCsgmvTable(PeerTable, SglangCsgmv):
    key, label = "sglang_csgmv_table", "csgmv's table"
    what = "csgmv's prepare_lora_batch for a new batch, called by the host"


class SglangTritonTable(PeerTable, SglangTriton):
    key, label = "sglang_triton_table", "triton's table"
    what = "triton's prepare_lora_batch for a new batch, called by the host"


class SglangTritonV2Table(PeerTable, SglangTritonV2):
    key, label = "sglang_triton_v2_table", "triton_v2's table"
    what = "triton_v2's prepare_lora_batch and route for a new batch, called by the host"


def mixed_peers(device: str) -> dict[str, type[MixedVariant]]:
    """Those that a device's rows have; on a CPU none, without a word."""
    return MIXED_PEERS if device == "cuda" else {}


MIXED_PEERS: dict[str, type[MixedVariant]] = {
    variant.key: variant
    for variant in (
        Vllm,
        SglangCsgmv,
        SglangCsgmvSplit,
        SglangTriton,
        SglangTritonV2,
        VllmTable,
        SglangCsgmvTable,
        SglangTritonTable,
        SglangTritonV2Table,
    )
}
