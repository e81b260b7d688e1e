"""Adapters on a mixture's experts; ``python -m bench.experts``.

Forward and backward of one experts module of Qwen3-MoE's shape, and of a model of two layers around
it: frozen, with PEFT's ``target_parameters``, with these on our kernels, and with ``apply_lora``.
Memory is the most that one step allocates. All compute the same, within the error budget; a call
that our kernels did not answer ends the run.
"""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeModel

import lora_kernels as lk
from lora_kernels.integrations.compare_memory import step_peak
from lora_kernels.integrations.peft_calls import PeftReport
from lora_kernels.testing.linear import assert_within_budget

from .command import Report, Row
from .measure import medians, native_answers
from .peft_layer import SAMPLE, TRAINING, step_of

RANK = 16
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
FROZEN, PEFT, SWAPPED, OURS = "frozen", "PEFT", "PEFT on our kernels", "apply_lora"


class Case(NamedTuple):
    what: str
    dtype: str
    hidden: int = 512
    experts: int = 32
    top: int = 4
    intermediate: int = 192
    tokens: int = 256


CASES = [Case(what, dtype) for what in ("experts", "model") for dtype in ("float32", "bfloat16")]


def variants(case: Case) -> tuple[dict[str, nn.Module], PeftReport]:
    """The models, with the same adapter."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 256,
        "hidden_size": case.hidden,
        "intermediate_size": case.hidden,
        "moe_intermediate_size": case.intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "num_experts": case.experts,
        "num_experts_per_tok": case.top,
        "decoder_sparse_step": 1,
        "initializer_range": 0.05,
    }
    bare = (
        Qwen3MoeModel(Qwen3MoeConfig.from_dict(shape))
        .to(getattr(torch, case.dtype))
        .requires_grad_(False)
    )
    options: Any = {"r": RANK, "lora_alpha": RANK, "target_modules": []}
    options["target_parameters"] = TARGETS
    stock: Any = peft.get_peft_model(
        copy.deepcopy(bare), peft.LoraConfig(**options, init_lora_weights=False)
    )
    swapped = copy.deepcopy(stock)
    report = lk.accelerate_peft(swapped)
    ours = lk.apply_lora(copy.deepcopy(bare), **options)
    inner = stock.base_model.model
    for path, module in ours.named_modules():
        if isinstance(module, lk.FusedLoRAExperts):
            outer = inner.get_submodule(path)
            for wrapper in (outer, outer.base_layer):
                own = module.adapters()[wrapper.parameter_name]
                with torch.no_grad():
                    own.lora_A.copy_(wrapper.lora_A["default"].weight)
                    own.lora_B.copy_(wrapper.lora_B["default"].weight)
    return {FROZEN: bare, PEFT: inner, SWAPPED: swapped.base_model.model, OURS: ours}, report


class Part(nn.Module):
    """What is measured of a model: y of its rows."""

    def __init__(self, model: Any, case: Case) -> None:
        super().__init__()
        self.whole = case.what == "model"
        self.part = model if self.whole else model.layers[0].mlp.experts
        generator = torch.Generator().manual_seed(1)
        drawn = torch.rand(case.tokens, case.experts, generator=generator)
        self.index = drawn.topk(case.top).indices
        weights = torch.rand(case.tokens, case.top, generator=generator)
        self.weights = weights.to(getattr(torch, case.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.whole:
            return self.part(inputs_embeds=x).last_hidden_state
        return self.part(x[0], self.index, self.weights.to(x.dtype))[None]


def measure(case: Case, seconds: float) -> Row:
    models, report = variants(case)
    parts = {name: Part(model, case) for name, model in models.items()}
    dtype = getattr(torch, case.dtype)
    x, dy = (torch.randn(1, case.tokens, case.hidden, dtype=dtype) for _ in "xy")
    steps = {name: step_of(part, TRAINING, x, dy) for name, part in parts.items()}
    if case.what == "experts":
        with torch.no_grad():
            exact = copy.deepcopy(parts[OURS]).double()(x.double())
            for name in (SWAPPED, OURS):
                assert_within_budget(name, parts[name](x), parts[PEFT](x), exact)
    for name in (SWAPPED, OURS):
        native_answers(steps[name])
    if report.calls.fallen_back:
        raise SystemExit(f"not answered by lora_kernels: {report.calls}")
    held = sum(p.nbytes for p in parts[FROZEN].parameters() if p.dim() == 3)
    return case._asdict() | {
        "us": medians(steps, seconds, lasting=SAMPLE),
        "peak": {name: step_peak(step, "cpu") for name, step in steps.items()},
        "experts_bytes": held,
    }


REPORT = Report(
    "experts",
    CASES,
    measure,
    seconds=6.0,
    packages=("torch", "peft", "transformers"),
    note=f"Forward + backward, {CASES[0].tokens} tokens, hidden {CASES[0].hidden}, "
    f"{CASES[0].experts} experts of {CASES[0].intermediate}, {CASES[0].top} for every token, rank "
    f'{RANK}. "apply_lora / PEFT": how many '
    'times as fast as PEFT, 1.40 is 1.4x faster; "frozen / apply_lora": how many times as long '
    "as the frozen model's step it takes. MB: the most that a step allocates, and the weights "
    "of the experts.",
    columns="what: {what} | dtype: {dtype} | "
    + "".join(f"{name} us: {{{name}:,.0f}} | " for name in (FROZEN, PEFT, SWAPPED, OURS))
    + "apply_lora / PEFT: {PEFT / apply_lora:.2f} | frozen / apply_lora: {apply_lora / frozen:.2f}"
    + "".join(f" | {name} MB: {{mb[{name}]:.1f}}" for name in (FROZEN, PEFT, OURS))
    + " | experts MB: {mb[experts]:.1f}",
    lines=lambda row: [
        row
        | {"mb": {k: v / 1e6 for k, v in (row["peak"] | {"experts": row["experts_bytes"]}).items()}}
    ],
)

if __name__ == "__main__":
    REPORT.main(__doc__)
