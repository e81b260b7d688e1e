"""vLLM on a CPU: a mixture's experts with the adapters of many slots, by our operators.

vLLM serves mixtures on a CPU, but none with adapters: for those it chooses its Triton experts,
which a CPU does not run. :func:`serve_experts` lets it choose :class:`SegmentedExperts` for the
mixtures that its own class for a CPU serves without adapters. Routing and shared experts stay
vLLM's; base products and adapters are ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functional.segmented import segmented_lora
from ..layers.routed import SlotFactors, experts_forward
from ..spec.segments import SegmentTable

INTERLEAVED = "swigluoai"


def serve_experts() -> None:
    """Let vLLM, in this process, compute experts by our class if its engine serves adapters."""
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method as method
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    original = method.select_unquantized_moe_backend
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def select_unquantized_moe_backend(moe_config: Any) -> tuple[Any, type | None]:
        if not moe_config.is_lora_enabled:
            found: tuple[Any, type | None] = original(moe_config)
            return found
        activation = moe_config.activation.value
        if activation not in GATES:
            raise NotImplementedError(
                f"lora_kernels: vLLM serves no experts with the activation {activation!r} on a "
                "CPU, with adapters or without"
            )
        return UnquantizedMoeBackend.CPU, experts_class()

    method.select_unquantized_moe_backend = select_unquantized_moe_backend


def rewire_routers() -> None:
    """Let adapters of a router, in this process, reach it where the runner of the experts calls it:
    vLLM 0.32 gives its layer with adapters to the experts' own, not to the runner below."""
    from vllm.lora.layers.fused_moe import FusedMoEWithLoRA

    original = FusedMoEWithLoRA.__setattr__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def __setattr__(self: Any, name: str, value: Any) -> None:
        original(self, name, value)
        if name == "gate":
            self.base_layer.gate = value

    FusedMoEWithLoRA.__setattr__ = __setattr__


def experts_class() -> type:
    """:class:`SegmentedExperts` on vLLM's experts for a CPU."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.experts.lora_experts_mixin import LoRAExpertsMixin

    return _class_on(LoRAExpertsMixin, CPUUnquantizedExperts)


@functools.cache
def _class_on(*bases: type) -> type:
    return type("SegmentedExperts", (SegmentedExperts, *bases), {"__module__": __name__})


class SegmentedExperts:
    """What our class overrides of vLLM's experts.

    Of the ``MoELoRAContext`` it reads the stacks, A [S, E, r, in] and B [S, E, out, r] of each
    slice (gate and up, or both in one; down), ``adapter_enabled`` [S + 1] and the wrapper, whose
    table has the slot of each token.
    """

    moe_config: Any
    w1_bias: Tensor | None
    w2_bias: Tensor | None
    _lora_context: Any = None
    _layer_name: str

    def process_weights_after_loading(self, layer: Any) -> None:
        """The weights stay as they are, [E, 2I, H] and [E, H, I]: vLLM packs for its own kernel."""
        self._layer_name = layer.layer_name

    def set_lora_context(self, ctx: Any) -> None:
        """vLLM's layer with adapters calls it.

        Raises:
            ValueError: the engine lays the stacks out in a way that is not served on a CPU.
        """
        for option in ("fully_sharded", "enable_moe_shared_loras"):
            if getattr(ctx, option):
                raise ValueError(f"lora_kernels: no adapters of experts on a CPU with {option}")
        self._lora_context = ctx

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        """``output`` [T, H] = the sum over the k experts of each token, by their weights."""
        if apply_router_weight_on_input:  # They are in hidden_states.
            topk_weights = torch.ones_like(topk_weights)
        torch.ops.lora_kernels.vllm_experts_(
            output, hidden_states, w1, w2, topk_weights, topk_ids, expert_map, self._layer_name
        )

    def compute(self, x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """x [T, H], w13 [E, 2I, H], w2 [E, H, I], weights and index [T, k] -> [T, H]. An index out
        of [0, E) is another device's expert."""
        experts = SimpleNamespace(
            num_experts=len(w13), has_gate=True, is_transposed=False,
            _apply_gate=GATES[self.moe_config.activation.value], has_bias=self.w1_bias is not None,
            gate_up_proj=w13, gate_up_proj_bias=self.w1_bias,
            down_proj=w2, down_proj_bias=self.w2_bias,
        )  # fmt: skip
        index = torch.where(index < 0, len(w13), index).long()
        return experts_forward(experts, self._adapters(len(x)), x, index, weights)

    def _adapters(self, rows: int) -> dict[str, SlotFactors]:
        """Those of the batch; empty where no slot has any for these experts."""
        ctx = self._lora_context
        if ctx is None or not ctx.adapter_enabled.any():
            return {}
        slots, ranks, max_rank = ctx.punica_wrapper.slots_of_tokens(rows)
        if ctx.local_token_lora_mapping is not None:
            slots = ctx.local_token_lora_mapping
        # An adapter that leaves these experts alone has rank 0 here.
        ranks = ranks * ctx.adapter_enabled[: len(ranks)]
        table = SegmentTable.from_token_mapping(slots, len(ranks), max_rank, rank_of_slot=ranks)
        first, second = (
            ([t.flatten(0, 1) for t in a], [t.flatten(0, 1) for t in b])
            for a, b in (
                (ctx.w13_lora_a_stacked, ctx.w13_lora_b_stacked),
                (ctx.w2_lora_a_stacked, ctx.w2_lora_b_stacked),
            )
        )
        two = self.moe_config.activation.value == INTERLEAVED and len(first[0]) == 2
        return {
            "gate_up_proj": (InterleavedFactors if two else SlotFactors)(*first, table),
            "down_proj": SlotFactors(*second, table),
        }


class InterleavedFactors(SlotFactors):
    """Adapters of gate and up, one after the other, of a weight in which their rows alternate."""

    def onto(self, y: Tensor, rows: Tensor, table: SegmentTable) -> Tensor:
        delta = segmented_lora(rows.to(y.dtype), self.a, self.b, table)
        y.unflatten(1, (-1, 2)).add_(delta.unflatten(1, (2, -1)).transpose(1, 2))
        return y


def _halves(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gated(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, -1)
        return act(gate) * up

    return gated


def _alternating(rows: Tensor) -> Tensor:
    """gpt-oss's, with its constants."""
    gate, up = rows[:, ::2].clamp(max=7.0), rows[:, 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


# The activations of vLLM's own experts for a CPU.
GATES = {
    "silu": _halves(F.silu),
    "gelu": _halves(F.gelu),
    "gelu_tanh": _halves(functools.partial(F.gelu, approximate="tanh")),
    INTERLEAVED: _alternating,
}


def _experts_(
    y: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    index: Tensor,
    expert_map: Tensor | None,
    layer: str,
) -> None:
    from vllm.forward_context import get_forward_context

    runner = get_forward_context().no_compile_layers[layer]
    experts = runner.routed_experts.quant_method.moe_kernel.fused_experts
    index = index if expert_map is None else expert_map[index.long()]
    with torch.no_grad():
        y.copy_(experts.compute(x, w13, w2, weights, index))


# Opaque, as the experts' adapters are found by the layer's name: see ``vllm_layer``.
_library = torch.library.Library("lora_kernels", "FRAGMENT")
_library.define(
    "vllm_experts_(Tensor(a!) y, Tensor x, Tensor w13, Tensor w2, Tensor weights, Tensor index, "
    "Tensor? expert_map, str layer) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("vllm_experts_", _experts_, "CompositeExplicitAutograd")
torch.library.register_fake("lora_kernels::vllm_experts_", lambda *args: None, lib=_library)
