"""What every layer of a mixture's experts computes: rows dealt out by a router, one grouped product
a Parameter, with the adapters of one model or of many slots; which experts can be served, and where
their weights are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import ops
from ..functional.experts import expert_linear
from ..functional.segmented import segmented_lora
from ..spec.four_bit import QuantState, quant_state_of
from ..spec.segments import SegmentTable
from .foreign import expert_matrices, four_bit_original
from .merging import is_offloaded
from .replacing import is_forward_of_class


class Factors(NamedTuple):
    """One adapter as :func:`expert_linear` takes it: A [E, r, in], B [E, out, r], the scale."""

    a: Tensor
    b: Tensor
    scale: float | Tensor


class SlotFactors(NamedTuple):
    """The adapters of many slots: A [S*E, r_max, in] and B [S*E, out, r_max], the experts of a slot
    one after the other, or one of each for every slice of the output; ``table`` has the slot of
    each row of hidden_states."""

    a: Tensor | Sequence[Tensor]
    b: Tensor | Sequence[Tensor]
    table: SegmentTable

    def routed(self, expert: Tensor, token: Tensor, experts: int) -> SegmentTable:
        """The table of rows that were dealt out: of which expert, and of which row before that.
        Nothing waits for the device."""
        if torch.compiler.is_dynamo_compiling():
            # A table is made by the host, and no graph has one.
            return torch.compiler.disable(SlotFactors._routed)(self, expert, token, experts)
        return self._routed(expert, token, experts)

    def _routed(self, expert: Tensor, token: Tensor, experts: int) -> SegmentTable:
        seg = self.table
        slot = seg.slot_of_row[token]
        own = torch.where((slot >= 0) & (expert < experts), slot * experts + expert, -1)
        slots = len(seg.rank_of_slot) * experts
        ranks, scales = (
            t.repeat_interleave(experts, output_size=slots)
            for t in (seg.rank_of_slot, seg.scale_of_slot)
        )
        return SegmentTable.from_token_mapping(
            own, slots, seg.max_rank, rank_of_slot=ranks, scale_of_slot=scales
        )

    def onto(self, y: Tensor, rows: Tensor, table: SegmentTable) -> Tensor:
        """y and what the adapters make of ``rows``; in y's place where no gradient is wanted."""
        rows = rows.to(y.dtype)
        if ops.records_gradients():
            return y + segmented_lora(rows, self.a, self.b, table)
        return segmented_lora(rows, self.a, self.b, table, out=y)


def unsupported_reason(module: nn.Module) -> str | None:
    """Why ``module`` cannot be adapted as experts, or None if it can."""
    names = expert_matrices(module)
    if not names:
        return "is no experts module that transformers' use_experts_implementation made"
    if not is_forward_of_class(module):
        return "computes in its own way: forward was set on the module object"
    for name in names:
        weight = weight_of(module, name)
        if getattr(weight, "quant_state", None) is not None:
            reason = _four_bit_reason(weight)
            if reason is not None:
                return f"its {name} {reason}"
            continue
        if weight is None or weight.dim() != 3:
            return f"its {name} is no 3-D Parameter (parametrised or sharded)"
        if type(weight) not in ops.PLAIN or not weight.is_floating_point() or weight.itemsize < 2:
            return f"its {name} is a {type(weight).__name__} of {weight.dtype}"
    if is_offloaded(module):
        return "its weights are offloaded by accelerate"
    return None


def _four_bit_reason(weight: Any) -> str | None:
    try:
        quant = quant_state_of(weight)
    except ValueError as error:
        return f"is a four-bit weight that cannot be read: {error}"
    if quant is None or len(quant.shape) != 3:
        return "is no four-bit weight of experts [E, d1, d2]"
    return None


def weight_of(module: Any, name: str) -> Any:
    """The Parameter ``name`` of experts as it is stored, which :func:`expert_linear` takes: of one
    in four bits its bytes. None where there is none."""
    # An engine's experts are no module.
    held = getattr(module, "_parameters", {}).get(name)
    return held if held is not None else four_bit_original(module, name)


def quant_of(module: nn.Module, name: str) -> QuantState | None:
    """What the bytes of a Parameter of experts mean, None of one that is not in four bits."""
    return quant_state_of(weight_of(module, name))


def sizes(module: Any, name: str) -> tuple[int, int, int]:
    """E, in and out features of the Parameter ``name`` of experts."""
    quant = quant_of(module, name)
    count, one, other = getattr(module, name).shape if quant is None else quant.shape
    return (count, one, other) if module.is_transposed else (count, other, one)


def weight_dtype(module: Any, name: str) -> torch.dtype:
    """Of a Parameter of experts, or of what a four-bit one is decoded to."""
    quant = quant_of(module, name)
    if quant is None:
        dtype: torch.dtype = getattr(module, name).dtype
        return dtype
    return compute_dtype(module) or quant.dtype


def compute_dtype(module: Any) -> torch.dtype | None:
    """What experts in four bits compute in, whatever x is; None: in x's own dtype."""
    return getattr(module, "compute_dtype", None)


def matrices_of(module: nn.Module) -> list[str]:
    """The Parameters of :func:`expert_matrices` that ``module`` has itself, in its own order."""
    names, own = expert_matrices(module), list(module._parameters)
    if any(name not in own for name in names):
        # Parametrised: their order is lost.
        return [name for name in names if weight_of(module, name) is not None]
    return [name for name in own if name in names]


def stored_factors(lora_a: Tensor, lora_b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Views A [E, r, in] and B [E, out, r] of PEFT's lora_A [r*E, in], where an expert's rows are
    neighbours, and lora_B [out, r*E], where the experts of a column of B are."""
    r = lora_a.shape[0] // experts
    b = lora_b.reshape(lora_b.shape[0], r, experts).permute(2, 0, 1)
    return lora_a.reshape(experts, r, lora_a.shape[1]), b


def experts_forward(
    experts: Any,
    adapters: Mapping[str, Factors | SlotFactors],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """What transformers' experts compute (``ExpertsInterface``), with ``adapters`` on the
    Parameters of these names: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H].

    Rows are sorted by expert once. Activations and routing weights are the module's own and the
    sum over k is that of transformers' ``grouped_mm``. An index from E on (another device's expert)
    adds nothing.
    """
    k = top_k_index.shape[-1]
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    every = torch.arange(experts.num_experts, device=expert.device)
    offs = torch.searchsorted(expert, every, right=True).int()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    # Of a batch's tables; usually both Parameters have the same.
    tables: dict[int, SegmentTable] = {}

    def product(rows: Tensor, name: str) -> Tensor:
        weight, dtype = weight_of(experts, name), compute_dtype(experts)
        if weight is None:
            weight = getattr(experts, name)
        if getattr(weight, "quant_state", None) is None:
            dtype = weight.dtype
        bias = getattr(experts, f"{name}_bias") if experts.has_bias else None
        if dtype is not None and not torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(dtype)
        own, kn = adapters.get(name), experts.is_transposed
        if isinstance(own, Factors):
            a, b, scale = own
            return expert_linear(rows, weight, a, b, offs, scale, bias, fan_in_fan_out=kn)
        y = expert_linear(rows, weight, None, None, offs, bias=bias, fan_in_fan_out=kn)
        if own is None:
            return y
        if id(own.table) not in tables:
            tables[id(own.table)] = own.routed(expert, order // k, len(every))
        return own.onto(y, rows, tables[id(own.table)])

    rows: Tensor = _Sorted.apply(hidden_states, order, place, k)
    if experts.has_gate:
        rows = experts._apply_gate(product(rows, "gate_up_proj"))
    else:
        rows = experts.act_fn(product(rows, "up_proj"))
    rows = product(rows, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    rows = _Unsorted.apply(rows, order, place).view(*top_k_index.shape, -1)
    return (rows * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def warmup_inputs(experts: Any, rows: int, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """For :func:`lora_kernels.warmup`: hidden_states of zeros, and a router that deals them out to
    as many experts a row as the model's does, in turns."""
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    weight, (count, in_features, _) = weight_of(experts, first), sizes(experts, first)
    x = weight.new_zeros(rows, in_features, dtype=dtype or weight_dtype(experts, first))
    k = getattr(getattr(experts, "config", None), "num_experts_per_tok", None) or 1
    index = torch.arange(rows * k, device=x.device).view(rows, k) % count
    return x, index, x.new_ones(rows, k)


class _Sorted(torch.autograd.Function):
    """Row ``order[i] // k`` of x for every i; the gradient is a sum over k instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, place: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        rows = grad.index_select(0, place).view(-1, ctx.k, grad.shape[1])
        return rows.sum(1), None, None, None


class _Unsorted(torch.autograd.Function):
    """The rows in the order that they had."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None
