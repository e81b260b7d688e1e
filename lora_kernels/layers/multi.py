"""``MultiLoRALinear`` and ``MultiLoRAEmbedding``: frozen layers with the adapters of many slots,
every row of a batch with its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import cpu
from ..functional import ops
from ..functional.checks import compute_dtype, is_foreign
from ..functional.dora import dora_rows
from ..functional.segmented import (
    checked_segmented_linear,
    segmented_expand,
    segmented_linear,
    segmented_lora,
)
from ..functional.segmented_autograd import Call
from ..spec.reference import accumulate_dtype, tail_dtype
from ..spec.segments import SegmentTable
from .batches import Owner, active_batch
from .foreign import carry_dispatch_hook
from .packed import PackedLinear
from .replacing import own_behaviour, share_hooks, share_linear, unsupported_reason
from .slot_panels import SlotPanels


class SlottedLayer(nn.Module):
    """What both kinds of layer have: two stacks, and the batch that says which slot a row uses."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def _add_slots(
        self,
        path: str,
        owner: Owner,
        shape_a: tuple[int, ...],
        shape_b: tuple[int, ...],
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        weight: Tensor,
    ) -> None:
        self.path, self._owner = path, owner
        # The adapters train also if a store is made while nothing may: not an inference tensor.
        with torch.inference_mode(False):
            for name, shape in (("lora_A", shape_a), ("lora_B", shape_b)):
                stack = torch.zeros(
                    shape, device=device or weight.device, dtype=dtype or weight.dtype
                )
                self.register_parameter(name, nn.Parameter(stack, requires_grad=False))

    def slot(self, slot: int, rank: int) -> tuple[Tensor, Tensor]:
        """Views of the A and B in ``slot``, as wide as ``rank``."""
        raise NotImplementedError

    def _capacity(self) -> tuple[int, int]:
        """How many slots there are, and their largest rank."""
        return self.lora_A.shape[0], self.lora_B.shape[2]

    def _input_of(self, rows: int, dtype: torch.dtype | None) -> Tensor:
        raise NotImplementedError

    def ratio_of(self, slot: int) -> Tensor:
        """A view of the ratio [out] by which DoRA scales the outputs of ``slot``."""
        raise NotImplementedError

    def _adapted(
        self,
        input: Tensor,
        table: SegmentTable,
        dropout_p: float,
        is_dora: Tensor | None = None,
    ) -> Tensor:
        raise NotImplementedError

    def _table(
        self, shape: torch.Size, device: torch.device
    ) -> tuple[SegmentTable, float, Tensor | None] | None:
        """The rows' table, the adapters' dropout and which slots are DoRA's; None: the base
        model."""
        if torch.compiler.is_dynamo_compiling():
            # Compiled code asks at every call: a table that was traced would stay. (No decorator:
            # that would import the compiler with this package.)
            return torch.compiler.disable(SlottedLayer._find_table)(self, shape, device)
        return self._find_table(shape, device)

    def _find_table(
        self, shape: torch.Size, device: torch.device
    ) -> tuple[SegmentTable, float, Tensor | None] | None:
        batch = active_batch(self._owner, self.path)
        if batch is None:
            return None
        table = batch.table(self.path, shape, device)
        if table is None:
            return None
        dropout_p = batch.dropout_p(self.path) if self.training else 0.0
        return table, dropout_p, batch.dora_slots(self.path, device)

    def warmup_call(
        self, rows: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """For :func:`lora_kernels.warmup`: the slots take turns."""
        slots, max_rank = self._capacity()
        table = SegmentTable.from_rows(
            [i % slots for i in range(rows)],
            [max_rank] * slots,
            [1.0] * slots,
            device=self.lora_A.device,
        )
        return self._input_of(rows, dtype), lambda x: self._adapted(x, table, 0.0)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in ("lora_A", "lora_B"):
            del destination[prefix + name]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, found, unexpected_keys, error_msgs
        )
        own = {prefix + "lora_A", prefix + "lora_B"}
        missing_keys += [key for key in found if key not in own]


class MultiLoRALinear(SlottedLayer, PackedLinear):
    """A linear layer that adds to every row the adapter of the row's own slot; a drop-in for
    ``nn.Linear``, inserted by :class:`lora_kernels.AdapterStore`.

    ``y_i = x_i W^T + bias + scale_t (x_i A_t^T) B_t^T`` with t the slot of row i in the store's
    active batch; without one, or in rows without an adapter, the base linear. ``weight`` and
    ``bias`` are the very Parameters of the layer that it replaces, frozen (transformers' Conv1D
    stays stored as [in, out]: ``fan_in_fan_out``). ``lora_A`` [S, r_max, in] and ``lora_B``
    [S, out, r_max] are Parameters too: they move with the model and can train. They are no part of
    its ``state_dict``, which is that of the base model, to be saved and loaded with and without a
    store; adapters are saved by ``store.save``.

    Rows of a DoRA adapter are brought to its lengths afterwards. In evaluation mode a CPU keeps
    packed copies of ``weight`` and of the stacks, see ``pack_weight`` of
    :class:`lora_kernels.FusedLoRALinear`.

    >>> import lora_kernels as lk
    >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
    >>> store = lk.AdapterStore(model, max_adapters=3, max_rank=8)
    >>> model[0]
    MultiLoRALinear(in_features=4, out_features=2, bias=False, slots=3, max_rank=8)
    >>> sorted(model.state_dict())
    ['0.weight']
    """

    # Of DoRA [S, out], once a slot has had one: no Parameter, and of its own dtype.
    _ratio: Tensor | None
    _slot_panels: SlotPanels

    @classmethod
    def from_linear(
        cls,
        module: nn.Module,
        slots: int,
        max_rank: int,
        *,
        path: str = "",
        owner: Owner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MultiLoRALinear:
        """Wrap an ``nn.Linear`` or Conv1D, whose Parameters and hooks the new layer shares.

        Args:
            slots, max_rank: S and r_max of the stacks.
            path: of the layer in its model, by which adapters know it.
            owner: of the batches that it computes with.
            device, dtype: of the stacks; default: those of the weight.

        Raises:
            TypeError: ``module`` is something else, or has a forward of its own.
        """
        reason = unsupported_reason(module)
        if reason is not None:
            raise TypeError(f"MultiLoRALinear.from_linear: the module {reason}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        share_linear(self, module)
        self._init_packing()
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        shapes = (slots, max_rank, self.in_features), (slots, self.out_features, max_rank)
        dtype = dtype or self.weight_dtype()
        self._add_slots(path, owner or Owner(), *shapes, device, dtype, self.weight)
        self._ratio, self._slot_panels = None, SlotPanels()
        carry_dispatch_hook(module, self)
        return self.train(module.training)

    def ratio_of(self, slot: int) -> Tensor:
        if self._ratio is None:
            stack, dtype = self.lora_B, accumulate_dtype(self.weight.dtype)
            with torch.inference_mode(False):
                self._ratio = torch.empty(stack.shape[:2], dtype=dtype, device=stack.device)
            if stack.is_cuda:
                # Another stream writes to memory that this one may still be using.
                torch.cuda.synchronize(stack.device)
        return self._ratio[slot]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MultiLoRALinear:
        super()._apply(fn, recurse)
        if self._ratio is not None:
            # Its dtype is not the weight's.
            self._ratio = self._ratio.to(self.lora_B.device)
        return self

    def slot(self, slot: int, rank: int) -> tuple[Tensor, Tensor]:
        return self.lora_A.detach()[slot, :rank], self.lora_B.detach()[slot, :, :rank]

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], see :func:`lora_kernels.segmented_linear`."""
        if self.compute_dtype is not None and self._casts(input):
            return self.forward(input.to(self.compute_dtype)).to(input.dtype)
        found = self._table(input.shape[:-1], input.device)
        if found is None:
            return self._base_forward(input)
        return self._adapted(input, *found)

    def _input_of(self, rows: int, dtype: torch.dtype | None) -> Tensor:
        dtype = dtype or self.weight_dtype()
        return self.weight.new_zeros(rows, self.in_features, dtype=dtype)

    def _adapted(
        self,
        input: Tensor,
        table: SegmentTable,
        dropout_p: float,
        is_dora: Tensor | None = None,
    ) -> Tensor:
        if is_dora is not None:
            assert self._ratio is not None
            if dropout_p > 0.0:
                raise RuntimeError("a batch with DoRA adapters has no dropout: call model.eval()")
            y = self._adapted(input, table, 0.0)
            return dora_rows(y, self.bias, self._ratio, is_dora, table.slot_of_row)
        (weight, bias, a, b), kn = self._tensors(), self.fan_in_fan_out
        if not self._fits(input, weight, bias, a, b, table):
            # It says what does not fit, or takes what is no plain tensor.
            options: Any = {"dropout_p": dropout_p, "training": True, "fan_in_fan_out": kn}
            return segmented_linear(input, weight, a, b, table, bias, **options)
        dtype = compute_dtype(input, weight)
        packed = self._packed_copies(weight, kn, dtype)
        if (
            packed[0] is not None
            and dropout_p == 0.0
            and not torch.is_grad_enabled()
            and input.dtype == a.dtype == b.dtype == dtype
        ):
            panels = self._slot_panels.of(a, b, table.rank_of_slot)
            rows = input if input.dim() == 2 else input.flatten(0, -2)
            operands = rows, weight.t() if kn else weight, [a], [b], table.tensors()
            y = cpu.segmented_linear(*operands, bias, packed[0], panels)
            return y if input.dim() == 2 else y.view(*input.shape[:-1], y.shape[1])
        call = Call(table.tensors(), 0, dropout_p, kn, dtype, packed)
        return checked_segmented_linear(input, weight, bias, None, call, [a], [b])

    def _fits(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        table: SegmentTable,
    ) -> bool:
        """Whether x and the layer's own tensors fit. The rows of the table are those of x, for
        which the batch made it."""
        n, k, (slots, r) = self.out_features, self.in_features, a.shape[:2]
        return (
            type(x) in ops.PLAIN
            and type(weight) in ops.PLAIN
            and x.device == weight.device == a.device == b.device == table.slot_of_row.device
            and x.is_floating_point()
            and x.dim() > 0
            and x.shape[-1] == k
            and weight.shape == ((k, n) if self.fan_in_fan_out else (n, k))
            and a.shape == (slots, r, k)
            and b.shape == (slots, n, r)
            and table.rank_of_slot.shape[0] == slots
            and table.max_rank <= r
            and (bias is None or (bias.device == x.device and bias.shape == (n,)))
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, slots={self.lora_A.shape[0]}"
        text += f", max_rank={self.lora_A.shape[1]}"
        return text + (", fan_in_fan_out=True" if self.fan_in_fan_out else "")


_EMBEDDING_FORWARD = nn.Embedding.forward


def unsupported_embedding_reason(module: nn.Module) -> str | None:
    """Why ``module`` cannot become a :class:`MultiLoRAEmbedding`, or None if it can."""
    if not isinstance(module, nn.Embedding):
        return f"is a {type(module).__name__}, no nn.Embedding"
    if type(module).forward is not _EMBEDDING_FORWARD:
        return f"is a {type(module).__name__}, an embedding with a forward of its own"
    if module.max_norm is not None:
        return "renormalises its weight (max_norm)"
    if is_foreign(module.weight):
        return f"has a weight of {type(module.weight).__name__}, no plain Parameter"
    return own_behaviour(module)


class MultiLoRAEmbedding(SlottedLayer, nn.Embedding):
    """An embedding that adds to every token the adapter of its row's slot:
    ``y_i = W[id_i] + scale_t A_t[id_i] B_t^T``.

    As :class:`MultiLoRALinear`, with ``lora_A`` [S, num_embeddings, r_max] (the transposed
    ``lora_embedding_A`` of PEFT, so that a token's part is one row) and ``lora_B``
    [S, embedding_dim, r_max]. A module that shares the weight, as a tied output head does, computes
    without this adapter.
    """

    @classmethod
    def from_embedding(
        cls,
        module: nn.Embedding,
        slots: int,
        max_rank: int,
        *,
        path: str = "",
        owner: Owner | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MultiLoRAEmbedding:
        """Wrap an ``nn.Embedding``; the arguments are :meth:`MultiLoRALinear.from_linear`'s.

        Raises:
            TypeError: ``module`` has a forward of its own, or renormalises its weight.
        """
        reason = unsupported_embedding_reason(module)
        if reason is not None:
            raise TypeError(f"MultiLoRAEmbedding.from_embedding: the module {reason}")
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(module, name))
        self.weight = module.weight
        share_hooks(self, module)
        self.weight.requires_grad_(False)
        shapes = (
            (slots, self.num_embeddings, max_rank),
            (slots, self.embedding_dim, max_rank),
        )
        self._add_slots(path, owner or Owner(), *shapes, device, dtype, self.weight)
        carry_dispatch_hook(module, self)
        self.train(module.training)
        return self

    def slot(self, slot: int, rank: int) -> tuple[Tensor, Tensor]:
        return self.lora_A.detach()[slot, :, :rank], self.lora_B.detach()[slot, :, :rank]

    def forward(self, input: Tensor) -> Tensor:
        """int [...] -> [..., embedding_dim]."""
        found = self._table(input.shape, input.device)
        return super().forward(input) if found is None else self._adapted(input, *found)

    def _input_of(self, rows: int, dtype: torch.dtype | None) -> Tensor:
        return self.weight.new_zeros(rows, dtype=torch.long)

    def _adapted(
        self,
        input: Tensor,
        table: SegmentTable,
        dropout_p: float,
        is_dora: Tensor | None = None,
    ) -> Tensor:
        y = nn.Embedding.forward(self, input)
        slots, embeddings, max_rank = self.lora_A.shape
        dtype = tail_dtype(y.dtype)
        # A row without an adapter looks one up as well, of which its rank 0 leaves nothing.
        used = table.slot_of_row >= 0
        slot = torch.where(used, table.slot_of_row, 0).long()
        rank = torch.where(used, table.rank_of_slot[slot], 0)
        ids = slot * embeddings + input.flatten()
        parts = F.embedding(ids, self.lora_A.view(slots * embeddings, max_rank)).to(dtype)
        live = torch.arange(max_rank, device=y.device) < rank[:, None]
        parts = torch.where(live, parts, 0)
        if ops.records_gradients() and any(t.requires_grad for t in (y, self.lora_A, self.lora_B)):
            # Through the identity as its A: that is differentiable in the parts and in B.
            unit = torch.eye(max_rank, device=y.device, dtype=dtype).expand(slots, -1, -1)
            delta = segmented_lora(parts, unit, self.lora_B, table).view(y.shape)
            return (y + delta).to(y.dtype)
        s = (parts.float() * table.scale_of_slot[slot, None]).to(dtype)
        rows = y.view(-1, self.embedding_dim)
        return segmented_expand(s[:, None], self.lora_B, table, out=rows).view(y.shape)

    def extra_repr(self) -> str:
        slots, _, max_rank = self.lora_A.shape
        return f"{super().extra_repr()}, slots={slots}, max_rank={max_rank}"
