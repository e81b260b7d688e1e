"""Adapters on a mixture's experts; ``python -m bench.experts``.

Qwen3-MoE's shape with hidden size 512, 32 experts of 192, 4 for every token, 256 tokens, rank 16:
forward and backward of one experts module, and of a model of two layers around it, frozen, with
PEFT's ``target_parameters``, with these on our kernels, and with ``apply_lora``. Times are medians
of interleaved samples; memory is the most that one step allocates. All compute the same, within the
error budget.

All numbers go into experts.json, the table into experts.md. The exit status is 1 if a call was not
answered by our kernels.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Qwen3MoeConfig, Qwen3MoeModel

import lora_kernels as lk
from lora_kernels.integrations.compare_memory import step_peak
from lora_kernels.testing.linear import assert_within_budget

from .peft_layer import interleaved
from .tables import origin, piped, told, write

OUT = Path(__file__).parent / "out" / "experts"
HIDDEN, EXPERTS, TOP, INTERMEDIATE, TOKENS, RANK = 512, 32, 4, 192, 256, 16
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
FROZEN, PEFT, SWAPPED, OURS = "frozen", "PEFT", "PEFT on our kernels", "apply_lora"


def model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP,
        decoder_sparse_step=1,
        initializer_range=0.05,
    )
    return Qwen3MoeModel(config).to(dtype).requires_grad_(False)


def variants(dtype: torch.dtype) -> tuple[dict[str, nn.Module], lk.PeftReport | Any]:
    """The models, with the same adapter."""
    bare = model(dtype)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=[],
        target_parameters=TARGETS,
        init_lora_weights=False,
    )
    stock: Any = peft.get_peft_model(copy.deepcopy(bare), config)
    swapped = copy.deepcopy(stock)
    report = lk.accelerate_peft(swapped)
    ours = lk.apply_lora(
        copy.deepcopy(bare), r=RANK, lora_alpha=RANK, target_modules=[], target_parameters=TARGETS
    )
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


def steps_of(models: dict[str, Any], what: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype)
    dy = torch.randn(1, TOKENS, HIDDEN, generator=generator).to(dtype)
    index = torch.rand(TOKENS, EXPERTS, generator=generator).topk(TOP).indices
    weights = torch.rand(TOKENS, TOP, generator=generator).to(dtype)

    def step(one: Any) -> Callable[[], Any]:
        rows = x.clone().requires_grad_()
        trained = [rows, *(p for p in one.parameters() if p.requires_grad)]

        def run() -> Tensor:
            if what == "experts":
                y = one.layers[0].mlp.experts(rows[0], index, weights)[None]
            else:
                y = one(inputs_embeds=rows).last_hidden_state
            y.backward(dy)
            for leaf in trained:
                leaf.grad = None
            return y.detach()

        return run

    return {name: step(one) for name, one in models.items()}


def measure(what: str, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    models, report = variants(dtype)
    steps = steps_of(models, what, dtype)
    exact_models, _ = variants(dtype)
    exact = exact_models[OURS].double()
    exact_y = steps_of({OURS: exact}, what, torch.float64)[OURS]()
    if what == "experts":
        stock = steps[PEFT]()
        for name in (SWAPPED, OURS):
            assert_within_budget(name, steps[name](), stock, exact_y)
    with lk.record_plans() as answers:
        steps[OURS]()
    if report.calls.fallen_back or {a.plan for a in answers} != {"native"}:
        raise SystemExit(f"not answered by lora_kernels: {report.calls}, {answers}")
    us = interleaved(steps, seconds)
    peaks = {name: step_peak(step, "cpu") for name, step in steps.items()}
    held = sum(
        p.nbytes
        for name, p in models[FROZEN].named_parameters()
        if ".experts." in name and (what == "model" or "layers.0" in name)
    )
    kind = str(dtype).removeprefix("torch.")
    return {"what": what, "dtype": kind, "us": us, "peak": peaks, "experts_bytes": held}


def table(content: dict[str, Any]) -> list[str]:
    head = ["what", "dtype", *(f"{name} us" for name in (FROZEN, PEFT, SWAPPED)), "apply_lora us"]
    head += ["apply_lora / PEFT", "frozen / apply_lora"]
    head += ["frozen MB", "PEFT MB", "apply_lora MB", "experts MB"]
    body = []
    for row in content["rows"]:
        us, peak = row["us"], row["peak"]
        line = [row["what"], row["dtype"], *(f"{us[name]:,.0f}" for name in us)]
        line += [f"{us[PEFT] / us[OURS]:.2f}", f"{us[OURS] / us[FROZEN]:.2f}"]
        sizes = [peak[FROZEN], peak[PEFT], peak[OURS], row["experts_bytes"]]
        body.append([*line, *(f"{size / 1e6:.1f}" for size in sizes)])
    return [
        f"{told(content)}. Forward + backward, {TOKENS} tokens, hidden {HIDDEN}, {EXPERTS} experts "
        f'of {INTERMEDIATE}, {TOP} for every token, rank {RANK}. "apply_lora / PEFT": how many '
        'times as fast as PEFT, 1.40 is 1.4x faster; "frozen / apply_lora": how many times as long '
        "as the frozen model's step it takes. MB: the most that a step allocates, and the weights "
        "of the experts.",
        "",
        *piped((head, body)).splitlines(),
    ]


def run(seconds: float, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)) -> Any:
    cases = [(what, dtype) for what in ("experts", "model") for dtype in dtypes]
    rows = [measure(*case, seconds) for case in tqdm(cases, desc="experts")]
    return origin("cpu", ("torch", "peft", "transformers")) | {"rows": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.experts", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=6.0, help="for each row of the table")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    content = run(args.seconds)
    write(content, table(content), args.out, "experts")
    print("\n".join(table(content)))


if __name__ == "__main__":
    main()
