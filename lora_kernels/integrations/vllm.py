"""vLLM: its LoRA layers on a GPU or a CPU computed by our segmented operators, through its plug-in
group.

Installed, the plug-in does nothing. It is asked for by name in vLLM's own switch, which its engine
and worker processes inherit::

    VLLM_PLUGINS=lora_kernels vllm serve ... --enable-lora

(as every use of that variable this leaves out the plug-ins that it does not name). Written against
vLLM 0.33.0; ``tests/integrations/test_vllm_contract.py`` holds the signatures to its source, and
``tests/engines`` starts it on a CPU, where base and adapters of a linear layer are one operator
(``vllm_cpu.py``).

    A  per slice [max_loras, 1, max_rank, in]     B  per slice [max_loras, 1, out, max_rank]

The scale is merged into B. What differs from vLLM's own wrapper: shrink and expand are one call, S
is rounded to the rows' dtype (of float16 rows it stays float32), compute follows the rank of each
adapter, rows without one are neither read nor written, and a step of a dense model does not wait
for the device. On a GPU the experts of mixtures stay vLLM's (on a CPU: ``vllm_experts.py``), and
full classification heads on both.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import ops
from ..spec.reference import tail_dtype
from ..spec.segments import SegmentTable
from . import vllm_cpu, vllm_experts
from .vllm_cpu import stacks

PLUGIN = "lora_kernels"
WRAPPER = f"{__name__}.PunicaWrapper"

Table = list[Tensor]


def register() -> None:
    """The entry point: :func:`enable` if ``VLLM_PLUGINS`` names this plug-in, else nothing."""
    if PLUGIN in os.environ.get("VLLM_PLUGINS", "").split(","):
        enable()


def enable() -> None:
    """Let vLLM's CUDA or CPU platform use :class:`PunicaWrapper` in this process.

    vLLM's engine and workers are other processes: ``VLLM_PLUGINS`` reaches them, a call does not.
    """
    named = classmethod(lambda cls: WRAPPER)
    if _on_cpu():
        from vllm.platforms.cpu import CpuPlatform

        CpuPlatform.get_punica_wrapper = named
        vllm_cpu.pack_weights()
        vllm_experts.serve_experts()
        vllm_cpu.keep_compiling(CpuPlatform)
    else:
        from vllm.platforms.cuda import CudaPlatformBase

        CudaPlatformBase.get_punica_wrapper = named


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def __getattr__(name: str) -> Any:
    """``PunicaWrapper``, made when vLLM asks for it: its base class is vLLM's."""
    if name != "PunicaWrapper":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.lora.model_manager import LoRAModelManager

    introduce_to_wrappers(LoRAModelManager)
    if _on_cpu():
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        vllm_cpu.join_layers(SegmentedPunicaWrapper)
        vllm_experts.rewire_routers()
        return wrapper_class(PunicaWrapperCPU)
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    return wrapper_class(PunicaWrapperGPU)


@functools.cache
def wrapper_class(base: type) -> type:
    """The wrapper, derived from vLLM's ``PunicaWrapperGPU`` or ``PunicaWrapperCPU``, or from a
    substitute for them."""
    return type("PunicaWrapper", (SegmentedPunicaWrapper, base), {"__module__": __name__})


def introduce_to_wrappers(manager_class: type) -> None:
    """Make a ``LoRAModelManager`` known to its wrappers before it tells them of a batch: it alone
    knows the ranks of its adapters. It tells them of the next batch anew after an adapter has come
    into a slot: one that replaces another in place, of another rank, leaves the batch as it was."""
    original = manager_class._set_adapter_mapping  # type: ignore[attr-defined]
    if getattr(original, "introduces", False):
        return

    @functools.wraps(original)
    def _set_adapter_mapping(self: Any, mapping: Any) -> None:
        for wrapper in self.punica_wrapper_mapping.values():
            if isinstance(wrapper, SegmentedPunicaWrapper):
                wrapper.manager = weakref.ref(self)
        original(self, mapping)

    activate = manager_class.activate_adapter  # type: ignore[attr-defined]

    @functools.wraps(activate)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        activated = activate(self, lora_id)
        if activated:
            self._last_mapping = None
            _warn_of_dropped(self, lora_id)
        return activated

    _set_adapter_mapping.introduces = True  # type: ignore[attr-defined]
    manager_class._set_adapter_mapping = _set_adapter_mapping  # type: ignore[attr-defined]
    manager_class.activate_adapter = activate_adapter  # type: ignore[attr-defined]


def _warn_of_dropped(manager: Any, lora_id: int) -> None:
    """vLLM does not say which matrices of an adapter have names that no layer of it has."""
    model = manager.list_adapters()[lora_id]
    if manager.is_pooling_model or model in _looked_at:
        return
    _looked_at.add(model)
    dropped = {name.removesuffix(".base_layer") for name in model.loras} - set(manager.modules)
    if dropped:
        vllm_cpu.logger.warning(
            "lora_kernels: adapter %d has %d layers that vLLM has not and leaves out, as %s",
            lora_id,
            len(dropped),
            min(dropped),
        )


_looked_at = weakref.WeakSet[Any]()


class SegmentedPunicaWrapper:
    """What our wrapper overrides of vLLM's own, which :func:`wrapper_class` puts below it.

    Two tables are refilled in place by :meth:`update_metadata`, one for the rows of the layers and
    one for those of the logits, so that captured graphs see each batch. Everything that the layers
    call is one opaque operator that declares what it writes.
    """

    _update_base_metadata: Any
    token_lora_indices: Tensor
    sampler_indices: Tensor

    def __init__(
        self,
        max_num_batched_tokens: int,
        max_batches: int,
        device: torch.device | str,
        **kwargs: Any,
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)  # type: ignore[call-arg]
        config = kwargs["lora_config"]
        self.max_rank: int = config.max_lora_rank
        self.manager: weakref.ref[Any] | None = None
        self._tokens, self._prompts = (
            SegmentTable.from_token_mapping(
                torch.full((max_num_batched_tokens,), -1, device=device),
                config.max_loras,
                self.max_rank,
            )
            for _ in range(2)
        )
        # On the CPU, whatever the default device is, as vLLM's own flag: read inside the operators,
        # which are not traced, so that a graph captured for batches without adapters holds no
        # launch of ours.
        self._tokens_idle, self._prompts_idle = (
            torch.tensor([True], device="cpu") for _ in range(2)
        )
        # Of the adapter in each slot: in the layers, and in the output head.
        self._ranks = [(self.max_rank, self.max_rank)] * config.max_loras
        self.ranks_of_layers = [self.max_rank] * config.max_loras
        self._ranks_of_model: weakref.WeakKeyDictionary[Any, tuple[int, int]] = (
            weakref.WeakKeyDictionary()
        )

    def update_metadata(
        self,
        mapping: Any,
        lora_index_to_id: list[int | None],
        max_loras: int,
        vocab_size: int,
        **kwargs: Any,
    ) -> None:
        """Refill the tables for the next batch. Only where the model has layers that stay vLLM's is
        the device waited for, by what prepares their metadata."""
        manager = None if self.manager is None else self.manager()
        if _all_dense(manager):
            self.is_prefill = mapping.is_prefill
            self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        else:
            super().update_metadata(  # type: ignore[misc]
                mapping, lora_index_to_id, max_loras, vocab_size, **kwargs
            )
        ranks = self._live_ranks(manager, lora_index_to_id)
        changed: Sequence[Tensor | None] = (None, None)
        if ranks != self._ranks:
            self._ranks = ranks
            self.ranks_of_layers = [rank for rank, _ in ranks]
            on_gpu = self._tokens.device.type == "cuda"
            both = torch.tensor(ranks, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
            changed = both.to(self._tokens.device, non_blocking=True).unbind(1)
        self._tokens.update_(self.token_lora_indices, changed[0], validate=False)
        self._prompts.update_(self.sampler_indices, changed[1], validate=False)
        heads = {i for i, (_, rank) in zip(lora_index_to_id, ranks, strict=True) if rank} - {None}
        self._tokens_idle[0] = not any(i > 0 for i in mapping.index_mapping)
        self._prompts_idle[0] = heads.isdisjoint(mapping.prompt_mapping)

    def table_of_tokens(self) -> Table:
        """The table for the rows of the layers."""
        return self._tokens.tensors()

    def slots_of_tokens(self, rows: int) -> tuple[Tensor, Tensor, int]:
        """The slot of each row of the layers, the rank of each slot, and what ranks may reach."""
        table = self._tokens
        return table.slot_of_row[:rows], table.rank_of_slot, table.max_rank

    def add_shrink(
        self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any
    ) -> None:
        """``y[j] = scale * x A_j^T``: x [M, K], y [n, M, r], zero in rows without an adapter."""
        table, x = self.table_of_tokens(), x.view(-1, x.shape[-1])
        torch.ops.lora_kernels.vllm_shrink_(
            y, x, lora_a_stacked, table, self._tokens_idle, scale, self.max_rank
        )

    def add_expand(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """``y[:, slice j] += x_j B_j^T``: x [n, M, r], y [..., N], its columns from
        ``offset_start``; ``=`` without ``add_inputs``, in rows with an adapter."""
        table, y = self.table_of_tokens(), y.view(-1, y.shape[-1])
        torch.ops.lora_kernels.vllm_expand_(
            y, x, lora_b_stacked, table, self._tokens_idle, offset_start, add_inputs
        )

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """``y += x B^T``, where x [M, r] are the rows that a lookup found in A."""
        torch.ops.lora_kernels.vllm_expand_(
            y, x[None], (lora_b_stacked,), self.table_of_tokens(), self._tokens_idle, 0, add_inputs
        )

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """``y[:, slice j] += scale * (x A_j^T) B_j^T`` for all slices in one call: x [M, K],
        y [M, N]. ``add_inputs=False`` writes instead, in rows with an adapter."""
        assert buffer is None, "S is this operator's own"
        torch.ops.lora_kernels.vllm_lora_(
            y.view(-1, y.shape[-1]),
            x.view(-1, x.shape[-1]),
            lora_a_stacked,
            lora_b_stacked,
            self.table_of_tokens(),
            self._tokens_idle,
            scale,
            kwargs.get("add_inputs", True),
        )

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """The same for the logits, with the adapter of each prompt. y may be wider than B."""
        assert buffer is None, "S is this operator's own"
        torch.ops.lora_kernels.vllm_lora_(
            y.view(-1, y.shape[-1]),
            x.view(-1, x.shape[-1]),
            (lora_a_stacked,),
            (lora_b_stacked,),
            self._prompts.tensors(),
            self._prompts_idle,
            scale,
            True,
        )

    def _live_ranks(
        self, manager: Any, lora_index_to_id: Sequence[int | None]
    ) -> list[tuple[int, int]]:
        """The ranks of the adapter in each slot; the largest possible where they are not known."""
        models = {} if manager is None else manager.list_adapters()
        ranks = []
        for lora_id in lora_index_to_id:
            model = models.get(lora_id)
            if model is not None and model not in self._ranks_of_model:
                layers, head = _ranks_of(model)
                largest = min(max(layers, head) or self.max_rank, self.max_rank)
                self._ranks_of_model[model] = largest, min(head, self.max_rank)
            known = None if model is None else self._ranks_of_model[model]
            ranks.append(known or (self.max_rank, self.max_rank))
        return ranks


def _all_dense(manager: Any) -> bool:
    """Whether nothing of the model reads the metadata of vLLM's own kernels."""
    return manager is not None and not manager._is_moe and manager._classification_head is None


def _ranks_of(model: Any) -> tuple[int, int]:
    """The largest rank of a ``LoRAModel`` in its layers and in its output head (``rank_pattern``
    gives layers their own)."""
    ranks = [0, 0]
    for name, layer in model.loras.items():
        of_head = "lm_head" in name  # by which vLLM knows it, too
        matrices = layer.lora_a if isinstance(layer.lora_a, list) else [layer.lora_a]
        # Those of experts are [E, r, in].
        found = (a.shape[-2] for a in matrices if a is not None)
        ranks[of_head] = max(ranks[of_head], *found, 0)
    return ranks[0], ranks[1]


def lora_shrink(
    inputs: Tensor,
    lora_a_weights: Sequence[Tensor],
    output_tensor: Tensor,
    token_lora_mapping: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    num_tokens_per_lora: Tensor,
    lora_token_start_loc: Tensor,
    lora_ids: Tensor,
    no_lora_flag_cpu: Tensor,
    num_active_loras: Tensor,
    scaling: float,
) -> None:
    """vLLM's ``lora_shrink``, argument for argument: ``output_tensor[j] = scaling * x A_j^T``.

    inputs [M, K], weights n x [S, r, K] or [S, 1, r, K], output [n, M, r] of any floating dtype, in
    which rows without an adapter become zero (with ``no_lora_flag_cpu`` nothing is written). Of the
    metadata ``token_lora_mapping`` [M] is read, the rest is derived anew, which is for studies and
    tests: the wrapper does it once per batch. Values are rounded to the dtype of ``inputs``, of
    float16 ones not at all.
    """
    r = lora_a_weights[0].shape[-2]
    table = SegmentTable.from_token_mapping(token_lora_mapping, len(lora_a_weights[0]), r)
    torch.ops.lora_kernels.vllm_shrink_(
        output_tensor, inputs, lora_a_weights, table.tensors(), no_lora_flag_cpu, scaling, r
    )


def lora_expand(
    inputs: Tensor,
    lora_b_weights: Sequence[Tensor],
    output_tensor: Tensor,
    token_lora_mapping: Tensor,
    token_indices_sorted_by_lora_ids: Tensor,
    num_tokens_per_lora: Tensor,
    lora_token_start_loc: Tensor,
    lora_ids: Tensor,
    no_lora_flag_cpu: Tensor,
    num_active_loras: Tensor,
    offset_start: int = 0,
    add_inputs: bool = False,
) -> None:
    """vLLM's ``lora_expand``, argument for argument: ``output_tensor[:, slice j] += x_j B_j^T``,
    or ``=`` without ``add_inputs``.

    inputs [n, M, r], weights n x [S, N_j, r] or [S, 1, N_j, r], output [M, N], whose slices begin
    at column ``offset_start``; rows without an adapter are not written. See :func:`lora_shrink`.
    """
    r = lora_b_weights[0].shape[-1]
    table = SegmentTable.from_token_mapping(token_lora_mapping, len(lora_b_weights[0]), r)
    torch.ops.lora_kernels.vllm_expand_(
        output_tensor,
        inputs,
        lora_b_weights,
        table.tensors(),
        no_lora_flag_cpu,
        offset_start,
        add_inputs,
    )


def _scaled(table: Table, scale: float) -> Table:
    return table if scale == 1.0 else [*table[:2], table[2] * scale, *table[3:]]


def _columns(y: Tensor, lora_b: Sequence[Tensor], table: Table, first: int, add: bool) -> Tensor:
    """The columns of y that the slices add to, emptied where the result is to be written."""
    columns = y[:, first : first + sum(b.shape[1] for b in lora_b)]
    if not add:
        slots = table[0][: len(y)]
        columns.masked_fill_((slots >= 0)[:, None], 0)
    return columns


def _shrink_(
    y: Tensor, x: Tensor, lora_a: list[Tensor], table: Table, idle: Tensor, scale: float, rank: int
) -> None:
    if idle.item():
        return
    a = stacks(lora_a)
    r = a[0].shape[1]
    if r != rank:
        # A part of a rank that is sharded over devices, or a full layer that is shrunk by: the live
        # rank says nothing of it.
        table = [table[0], torch.full_like(table[1], r), *table[2:]]
    y.copy_(ops.segmented_shrink(x, a, _scaled(table, scale)).transpose(0, 1))


def _expand_(
    y: Tensor, x: Tensor, lora_b: list[Tensor], table: Table, idle: Tensor, first: int, add: bool
) -> None:
    if idle.item():
        return
    b = stacks(lora_b)
    s = x.transpose(0, 1).to(tail_dtype(y.dtype))
    ops.segmented_expand_(_columns(y, b, table, first, add), s, b, table)


def _lora_(
    y: Tensor,
    x: Tensor,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    table: Table,
    idle: Tensor,
    scale: float,
    add: bool,
) -> None:
    if idle.item():
        return
    a, b = stacks(lora_a), stacks(lora_b)
    # Logits may be float32 over a half-precision model.
    columns = _columns(y, b, table, 0, add)
    ops.segmented_lora_(columns, x.to(y.dtype), a, b, _scaled(table, scale))


_library = torch.library.Library("lora_kernels", "FRAGMENT")
_TABLE = "Tensor[] table, Tensor idle"
for _name, _schema, _function in (
    (
        "vllm_shrink_",
        f"(Tensor(a!) y, Tensor x, Tensor[] lora_a, {_TABLE}, float scale, int rank) -> ()",
        _shrink_,
    ),
    (
        "vllm_expand_",
        f"(Tensor(a!) y, Tensor x, Tensor[] lora_b, {_TABLE}, int first, bool add) -> ()",
        _expand_,
    ),
    (
        "vllm_lora_",
        "(Tensor(a!) y, Tensor x, Tensor[] lora_a, Tensor[] lora_b, "
        f"{_TABLE}, float scale, bool add) -> ()",
        _lora_,
    ),
):
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lora_kernels::{_name}", lambda *args: None, lib=_library)
