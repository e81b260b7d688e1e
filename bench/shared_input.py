"""Projections that share an input, as one call and as separate calls; ``python -m
bench.shared_input``.

q, k, v (of equal widths, and with fewer heads for k and v) and gate, up; adapters of rank 16 in
float32; forward and backward of 512 rows. Saved bytes are what autograd keeps besides parameters,
in multiples of x. ``--models``: training steps of small Llamas, with and without ``share_inputs``.
A call that the native kernels did not answer ends the run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import lora_kernels as lk
from lora_kernels.integrations.compare_memory import SavedTensors

from .command import Report
from .measure import medians, native_answers

RANK = 16
APART, TOGETHER = "separate calls", "lora_linears"


class Case(NamedTuple):
    width: int
    widths: tuple[int, ...]
    dtype: str
    dropout: float = 0.0
    rows: int = 512


CASES = [
    Case(width, widths, dtype, dropout)
    for dtype in ("bfloat16", "float32")
    for width, widths in (
        (576, (576, 192, 192)),
        (1024, (1024, 1024, 1024)),
        (2048, (2048, 512, 512)),
        (2048, (2048, 2048, 2048)),
        (2048, (5632, 5632)),
    )
    for dropout in (0.0, 0.1)
    if dropout == 0.0 or width == 2048
]


class Model(NamedTuple):
    hidden: int
    # Of k and v.
    groups: int
    dtype: str
    layers: int = 2
    rows: int = 512


MODELS = [
    Model(hidden, groups, dtype)
    for dtype in ("bfloat16", "float32")
    for hidden, groups in ((512, 8), (512, 2), (1024, 4), (2048, 8))
]


def measure(case: Case, seconds: float) -> dict[str, Any]:
    dtype, k = getattr(torch, case.dtype), case.width
    x = torch.randn(case.rows, k, dtype=dtype, requires_grad=True)
    weights = [(torch.randn(n, k) / k**0.5).to(dtype) for n in case.widths]
    a = [(torch.randn(RANK, k) / k**0.5).requires_grad_() for _ in case.widths]
    b = [torch.randn(n, RANK).requires_grad_() for n in case.widths]
    dy = [torch.randn(case.rows, n, dtype=dtype) for n in case.widths]
    dropout: dict[str, Any] = {"dropout_p": case.dropout, "training": case.dropout > 0}
    forwards: dict[str, Callable[[], Any]] = {
        APART: lambda: [
            lk.lora_linear(x, *each, 0.25, **dropout) for each in zip(weights, a, b, strict=True)
        ],
        TOGETHER: lambda: lk.lora_linears(x, weights, a, b, 0.25, **dropout),
    }

    def train(forward: Callable[[], Any]) -> None:
        torch.autograd.backward(forward(), dy)

    steps = {name: functools.partial(train, forward) for name, forward in forwards.items()}
    held = {}
    for name, forward in forwards.items():
        native_answers(steps[name])
        with SavedTensors([*weights, *a, *b]) as saved:
            forward()
        held[name] = saved.peak / x.nbytes
    return case._asdict() | {"us": medians(steps, seconds), "saved": held}


def measure_model(case: Model, seconds: float) -> dict[str, Any]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=8,
        num_key_value_heads=case.groups,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, case.dtype))
    lk.apply_lora(model, r=RANK, init_lora_weights=False).train()
    ids = torch.randint(config.vocab_size, (1, case.rows))

    def train() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def share(name: str) -> None:
        lk.share_inputs(model, name == TOGETHER)
        model.zero_grad()

    for name in (APART, TOGETHER):
        share(name)
        shared = sum(answer.op == "lora_linears_fwd" for answer in native_answers(train))
        if shared != (2 * case.layers if name == TOGETHER else 0):
            raise SystemExit(f"{name}: {shared} calls for several projections")
    times = medians({APART: train, TOGETHER: train}, seconds, before=share)
    return case._asdict() | {"us": times}


REPORT = Report(
    "shared_input",
    CASES,
    measure,
    seconds=5.0,
    packages=("torch", "transformers"),
    note=f"Forward and backward, adapters of rank {RANK} in float32. "
    '"together / separate": below 1 the one call is faster.',
    columns="rows x width: {rows} x {width} | widths: {widths} | dtype: {dtype} | "
    "dropout: {dropout:g} | separate calls us: {separate calls:,.0f} | "
    "lora_linears us: {lora_linears:,.0f} | together / separate: "
    "{lora_linears / separate calls:.3f} | saved, in x: {saved[lora_linears]:.2f} | "
    "separate: {saved[separate calls]:.2f}",
    lines=lambda row: [row | {"widths": " + ".join(map(str, row["widths"]))}],
)
OF_MODELS = Report(
    "shared_input_models",
    MODELS,
    measure_model,
    seconds=5.0,
    packages=REPORT.packages,
    note=f"Forward and backward of a Llama of 8 heads with adapters of rank {RANK} "
    'on all linear layers. "shared / separate": below 1 sharing is faster.',
    columns="tokens: {rows} | hidden: {hidden} | heads of k, v: {groups} | layers: {layers} | "
    "dtype: {dtype} | separate calls us: {separate calls:,.0f} | "
    "share_inputs us: {lora_linears:,.0f} | shared / separate: {lora_linears / separate calls:.3f}",
)

if __name__ == "__main__":
    REPORT.main(__doc__, models=OF_MODELS)
