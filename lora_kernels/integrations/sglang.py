"""SGLang: a LoRA backend on our segmented operators, registered through its plug-in entry point.

Installed, the plug-in adds a name to SGLang's registry and nothing else. The switch is SGLang's own
choice of a backend (the command line knows a fixed list of names; an ``Engine`` takes any)::

    sglang.Engine(model_path=..., enable_lora=True, lora_backend="lora_kernels")

Written against SGLang 0.5.23; its source holds the signatures:
``tests/integrations/test_sglang.py``.

    A  [slots, n*max_rank, in], packed by live rank: slice j of a slot of rank r begins in row j*r
    B  [slots, out_total, max_rank], its slices at the layer's output offsets
    rank 0: the slot of the base model

The model's layers call :meth:`SegmentedBackend.forward_with_base`, which owns base and adapter; the
``run_*`` methods are what it replaces, for code that calls them alone. With tensor parallelism the
sum over devices is taken once, of base and adapter together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..functional import ops
from ..spec.reference import tail_dtype
from ..spec.segments import SegmentTable

BACKEND = "lora_kernels"


def register() -> None:
    """The entry point: make ``lora_backend="lora_kernels"`` known. It is made when it is chosen."""
    from sglang.srt.lora.backend.lora_registry import register_lora_backend

    @register_lora_backend(BACKEND)
    def create() -> type:
        from sglang.srt.lora.backend.base_backend import BaseLoRABackend

        return backend_class(BaseLoRABackend)


@functools.cache
def backend_class(base: type) -> type:
    """The backend, derived from SGLang's ``BaseLoRABackend`` or from a substitute for it."""
    return type("LoRAKernelsBackend", (SegmentedBackend, base), {"__module__": __name__})


@dataclass
class Batch:
    """One batch, under the names by which SGLang reads a ``LoRABatchInfo``. Of fixed address where
    it belongs to captured graphs."""

    table: SegmentTable
    seg_indptr: Tensor
    weight_indices: Tensor
    use_cuda_graph: bool = False
    bs: int = 0
    num_segments: int = 0
    max_len: int = 0
    expected_tokens: int = 0
    has_active_lora: bool = False
    is_prefill: bool = False
    permutation: None = None
    req_seg_indptr: None = None
    req_weight_indices: None = None
    moe_lora_info: Any = None

    @property
    def lora_ranks(self) -> Tensor:
        return self.table.rank_of_slot

    @property
    def scalings(self) -> Tensor:
        return self.table.scale_of_slot


class SegmentedBackend:
    """What our backend overrides of SGLang's ``BaseLoRABackend``, which :func:`backend_class` puts
    below it."""

    name = BACKEND
    supports_prefill_cuda_graph = True
    skip_inactive_dense_lora = True

    max_loras_per_batch: int
    device: torch.device
    batch_info: Any
    is_moe_lora: bool
    _add_moe_lora_info: Any
    _get_lm_head_pass_segments: Any

    def __init__(self, max_loras_per_batch: int, device: torch.device, **kwargs: Any) -> None:
        super().__init__(max_loras_per_batch, device)  # type: ignore[call-arg]
        self.decode_cuda_graph_batch_info: Batch | None = None
        self._eager: Batch | None = None
        self._prunes_lm_head = False
        self._ones = torch.ones(max_loras_per_batch, device=device)

    def validate_lora_targets(self, base_model: Any, target_modules: set[str]) -> None:
        """Refuse the projection whose adapter SGLang absorbs into attention with its own kernels.

        Raises:
            ValueError: ``kv_b_proj`` is among the targets.
        """
        if "kv_b_proj" in target_modules:
            raise ValueError(f"lora_backend={BACKEND!r} does not serve adapters of kv_b_proj")
        self._prunes_lm_head = "lm_head" in target_modules

    def init_decode_cuda_graph_batch_info(
        self, max_bs_in_cuda_graph: int, num_tokens_per_req: int
    ) -> None:
        batch = self._allocate(max_bs_in_cuda_graph, max_bs_in_cuda_graph * num_tokens_per_req)
        batch.use_cuda_graph, batch.max_len = True, num_tokens_per_req
        self.decode_cuda_graph_batch_info = batch

    def init_prefill_cuda_graph_batch_info(
        self, max_num_tokens: int, max_num_requests: int | None = None
    ) -> None:
        requests = max_num_tokens if max_num_requests is None else max_num_requests
        self.prefill_cuda_graph_batch_info = self._allocate(requests, max_num_tokens)
        self.prefill_cuda_graph_batch_info.use_cuda_graph = True
        self.prefill_cuda_graph_max_bs = requests
        self.prefill_cuda_graph_max_tokens = max_num_tokens

    def prepare_lora_batch(
        self,
        forward_batch: Any,
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
        use_decode_cuda_graph: bool,
        use_prefill_cuda_graph: bool = False,
    ) -> None:
        """Refill the table that the batch reads: the captured graphs' own, or that of eager runs.

        Raises:
            RuntimeError: a graph's table was not allocated.
            ValueError: the batch is larger than its graph, or not of one slot per request.
        """
        lengths = _lengths(forward_batch)
        if len(weight_indices) != len(lengths):
            raise ValueError(f"{len(weight_indices)} slots for {len(lengths)} requests")
        if use_decode_cuda_graph or use_prefill_cuda_graph:
            kind = "decode" if use_decode_cuda_graph else "prefill"
            batch = getattr(self, f"{kind}_cuda_graph_batch_info", None)
            if batch is None:
                raise RuntimeError(f"the table of the {kind} graph was not allocated")
            if use_decode_cuda_graph and any(length != batch.max_len for length in lengths):
                raise ValueError(f"requests of {lengths} rows in a graph of {batch.max_len} each")
        else:
            batch = self._eager_batch(len(lengths), sum(lengths))
        self._fill(batch, lengths, weight_indices, lora_ranks, scalings)
        self.batch_info = batch
        if self.is_moe_lora:
            self.batch_info = self._add_moe_lora_info(forward_batch, batch)
        if self._prunes_lm_head:
            self._prepare_lm_head(forward_batch, weight_indices, lora_ranks, scalings)

    def prepare_lora_token_segments(
        self,
        *,
        segment_lens: list[int],
        weight_indices: list[int],
        lora_ranks: list[int],
        scalings: list[float],
    ) -> None:
        self.reset_batch_state()  # type: ignore[attr-defined]
        batch = self._eager_batch(len(segment_lens), sum(segment_lens))
        self._fill(batch, segment_lens, weight_indices, lora_ranks, scalings)
        self.batch_info = batch

    def forward_with_base(
        self,
        layer: Any,
        x: Tensor,
        base_fn: Callable[[], Tensor],
        lora_a: Tensor,
        lora_b: Tensor,
        output_offset: Tensor,
        offsets: Sequence[int],
        *,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        kind: str = "linear",
        pruned_batch_info: Batch | None = None,
    ) -> Tensor:
        """``base_fn() + scale * (x A^T) B^T`` for every row with its own adapter.

        Args:
            layer: SGLang's layer; of an embedding its vocabulary is read.
            x: [M, K], or the token ids [M] of an embedding.
            base_fn: computes the base's output [M, N], to which is added in place.
            lora_a, lora_b: see the module; A of an embedding is [slots, max_rank, vocabulary].
            offsets: where the slices begin in the first ``offsets[-1]`` columns, and end.
            all_reduce: the sum over devices, taken of base and adapter together.
            kind: ``DenseLoraKind``, which is a string: linear, embedding or lm_head.
            pruned_batch_info: the rows of the logits where they are fewer than the batch's.

        Raises:
            NotImplementedError: one of the kinds that belong to one model.
        """
        if kind not in ("linear", "embedding", "lm_head"):
            raise NotImplementedError(f"lora_backend={BACKEND!r} has no layers of kind {kind!r}")
        table = self._table(pruned_batch_info)
        output = base_fn()
        if kind == "embedding":
            extra = getattr(layer, "new_embeddings_buffer", None)
            s = self.run_lora_a_embedding(x, lora_a, layer.vocab_size, extra)
            self.run_lora_b_sgemm(s, lora_b, base_output=output)
        else:
            _add(output, x, lora_a, lora_b, table, _widths(offsets))
        return output if all_reduce is None else all_reduce(output)

    def run_lora_a_embedding(
        self,
        input_ids: Tensor,
        weights: Tensor,
        vocab_size: int,
        extra_embeddings: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``A[:, id]`` of each token's own slot: ids [M], A [slots, max_rank, vocabulary] ->
        [M, max_rank], zero beyond the live rank and for tokens that A does not have."""
        slots, ranks = self._table().tensors()[:2]
        ids = input_ids.reshape(-1)
        slot = slots[: len(ids)].long()
        own = slot.clamp(min=0)
        columns = torch.arange(weights.shape[1], device=ids.device)
        live = (slot >= 0)[:, None] & (columns < ranks[own][:, None])
        known = (ids < vocab_size)[:, None]
        s = weights[own, :, ids.clamp(max=vocab_size - 1)]
        if extra_embeddings is None:
            live = live & known
        else:
            beyond = (ids - vocab_size).clamp(0, extra_embeddings.shape[1] - 1)
            s = torch.where(known, s, extra_embeddings[own, beyond])
        return torch.where(live, s, 0)

    def run_lora_a_sgemm(
        self,
        x: Tensor,
        weights: Tensor,
        pruned_batch_info: Batch | None = None,
        stack_num: int = 1,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``x A^T``: [M, K] -> [M, n*max_rank] without the scale, slice j of a row of rank r in
        columns j*r to (j+1)*r, as A has it."""
        slots, ranks, _, *rest = self._table(pruned_batch_info).tensors()
        # n slices packed by live rank are one slice of n times the rank.
        table = [slots, ranks * stack_num, self._ones, *rest]
        return ops.segmented_shrink(x, [weights], table).flatten(1)

    def run_lora_b_sgemm(
        self,
        x: Tensor,
        weights: Tensor,
        base_output: Tensor | None = None,
        pruned_batch_info: Batch | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``base_output += scale * x B^T`` in place, or into zeros: [M, max_rank] -> [M, N]."""
        slots, _, scales, *_ = table = self._table(pruned_batch_info).tensors()
        rows = slots[: len(x)].long()
        s = x.float() * scales[rows.clamp(min=0)][:, None]
        if base_output is None:
            # S of a float16 model is float32.
            dtype = weights.dtype if x.dtype == tail_dtype(weights.dtype) else x.dtype
            base_output = x.new_zeros(len(x), weights.shape[1], dtype=dtype)
        s = s.to(tail_dtype(base_output.dtype))[:, None]
        ops.segmented_expand_(base_output[:, : weights.shape[1]], s, [weights], table)
        return base_output

    def run_qkv_lora(
        self,
        x: Tensor,
        qkv_lora_a: Tensor,
        qkv_lora_b: Tensor,
        output_offset: Tensor,
        max_qkv_out_dim: int,
        base_output: Tensor | None = None,
        n_slices: int = 3,
        *args: Any,
        output_offset_cpu: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``base_output += scale * (x A^T) B^T`` of slices of any widths, in one call."""
        offsets = output_offset if output_offset_cpu is None else output_offset_cpu
        return self._run(x, qkv_lora_a, qkv_lora_b, _widths(offsets.tolist()), base_output)

    def run_gate_up_lora(
        self,
        x: Tensor,
        gate_up_lora_a: Tensor,
        gate_up_lora_b: Tensor,
        base_output: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """``base_output += scale * (x A^T) B^T`` of two slices of one width, in one call."""
        widths = [gate_up_lora_b.shape[1] // 2] * 2
        return self._run(x, gate_up_lora_a, gate_up_lora_b, widths, base_output)

    def _run(
        self, x: Tensor, a: Tensor, b: Tensor, widths: list[int], base_output: Tensor | None
    ) -> Tensor:
        if base_output is None:
            base_output = x.new_zeros(len(x), b.shape[1])
        return _add(base_output, x, a, b, self._table(), widths)

    def _table(self, pruned: Batch | None = None) -> SegmentTable:
        batch = self.batch_info if pruned is None else pruned
        assert batch is not None, "an adapter was asked for before a batch was prepared"
        return batch.table

    def _allocate(self, requests: int, tokens: int) -> Batch:
        # Ranks are SGLang's own and are clamped to nothing here.
        table = SegmentTable(tokens, self.max_loras_per_batch, 2**16, self.device)
        return Batch(
            table,
            seg_indptr=torch.zeros(requests + 1, dtype=torch.int32, device=self.device),
            weight_indices=torch.zeros(requests, dtype=torch.int32, device=self.device),
        )

    def _eager_batch(self, requests: int, tokens: int) -> Batch:
        """The batch of eager runs, one after the other on a stream, made anew only to grow."""
        now = self._eager
        if now is None or tokens > now.table.rows or requests > len(now.weight_indices):
            # Twice the room each time, so that it soon stays.
            if now is not None:
                requests = max(requests, 2 * len(now.weight_indices))
                tokens = max(tokens, 2 * now.table.rows)
            now = self._allocate(requests, tokens)
            self._eager = now
        return now

    def _fill(
        self,
        batch: Batch,
        lengths: Sequence[int],
        weight_indices: Sequence[int],
        lora_ranks: Sequence[int],
        scalings: Sequence[float],
    ) -> None:
        requests, tokens = len(lengths), sum(lengths)
        if requests > len(batch.weight_indices) or tokens > batch.table.rows:
            raise ValueError(
                f"{requests} requests of {tokens} rows, the table has room for "
                f"{len(batch.weight_indices)} of {batch.table.rows}"
            )
        indptr = [0]
        for length in lengths:
            indptr.append(indptr[-1] + length)
        # Requests that a graph has room for beyond these are empty.
        indptr += [tokens] * (len(batch.weight_indices) - requests)
        batch.seg_indptr.copy_(self._from_host(indptr), non_blocking=True)
        batch.weight_indices[:requests].copy_(self._from_host(weight_indices), non_blocking=True)
        batch.table.update_segments_(
            batch.seg_indptr,
            batch.weight_indices,
            self._from_host(lora_ranks).to(self.device, non_blocking=True),
            self._from_host(scalings, torch.float32).to(self.device, non_blocking=True),
            rows=tokens,
        )
        batch.bs = batch.num_segments = requests
        batch.expected_tokens = tokens
        if not batch.use_cuda_graph:
            batch.max_len = max(lengths, default=0)
        batch.has_active_lora = any(lora_ranks[slot] > 0 for slot in weight_indices)

    def _from_host(self, values: Sequence[float], dtype: torch.dtype = torch.int32) -> Tensor:
        pinned = torch.device(self.device).type == "cuda"
        return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=pinned)

    def _prepare_lm_head(
        self,
        forward_batch: Any,
        weight_indices: list[int],
        lora_ranks: Sequence[int],
        scalings: Sequence[float],
    ) -> None:
        """Tables for the rows that reach the head where they are fewer than the batch's: of all of
        them, and of each of the passes in which their log-probabilities are computed."""
        from sglang.srt.lora.utils import get_lm_head_pruned_lens

        def batch(slots: list[int], lengths: list[int]) -> Batch:
            made = self._allocate(len(lengths), sum(lengths))
            self._fill(made, lengths, slots, lora_ranks, scalings)
            return made

        self.lm_head_batch_info = self.lm_head_pass_batch_infos = self._lm_head_pass_idx = None
        lengths = get_lm_head_pruned_lens(forward_batch)
        if lengths is None:
            return
        self.lm_head_batch_info = batch(weight_indices, lengths)
        passes = self._get_lm_head_pass_segments(weight_indices, lengths)
        if passes is not None:
            self.lm_head_pass_batch_infos = [batch(*segments) for segments in passes]


def _lengths(forward_batch: Any) -> list[int]:
    """The rows of each request of a batch, known on the host."""
    mode, requests = forward_batch.forward_mode, forward_batch.batch_size
    if mode.is_idle():
        return []
    if mode.is_decode():
        return [1] * requests
    if mode.is_target_verify():
        return [forward_batch.spec_info.draft_token_num] * requests
    if not mode.is_extend():
        raise ValueError(f"unknown forward mode: {mode}")
    lengths = [int(length) for length in forward_batch.extend_seq_lens_cpu]
    if mode.is_extend_without_speculative():
        return lengths
    return [max(lengths)] * requests


def _widths(offsets: Sequence[int]) -> list[int]:
    return [end - start for start, end in zip(offsets, offsets[1:], strict=False)]


def _add(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, table: SegmentTable, widths: list[int]
) -> Tensor:
    """``y += delta`` in its first columns, all slices at once; y is returned."""
    columns = y[:, : b.shape[1]]
    slices = list(b.split(widths, dim=1))
    packed = len(widths) if len(widths) > 1 else 0
    ops.segmented_lora_(columns, x.to(y.dtype), [a], slices, table.tensors(), packed)
    return y
