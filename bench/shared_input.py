"""Projections that share an input, as one call and as separate calls; ``python -m
bench.shared_input``.

q, k, v (of equal widths, and with fewer heads for k and v) and gate, up; adapters of rank 16 in
float32 on a frozen base of the rows' dtype; forward and backward of 512 rows, with the gradients of
x and of every adapter. Steps of both variants are interleaved; a time is a median, and the ratio is
that of the medians.

Saved bytes are what autograd keeps besides parameters, in multiples of x.

``--models`` measures training steps of small Llamas instead, with adapters on all linear layers,
with and without ``share_inputs``: forward and backward of one sequence of 512 tokens.

All numbers go into shared_input.json, the table into shared_input.md (with ``--models``
shared_input_models). The exit status is 1 if a call was not answered by the native kernels.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import lora_kernels as lk

from .tables import origin, piped, told, write

OUT = Path(__file__).parent / "out" / "shared_input"
RANK, ROWS = 16, 512
APART, TOGETHER = "separate calls", "lora_linears"


class Case(NamedTuple):
    width: int
    widths: tuple[int, ...]
    dtype: str
    dropout: float = 0.0


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


MODELS = [
    Model(hidden, groups, dtype)
    for dtype in ("bfloat16", "float32")
    for hidden, groups in ((512, 8), (512, 2), (1024, 4), (2048, 8))
]


def steps_of(case: Case, rows: int) -> tuple[dict[str, Callable[[], Any]], Tensor, list[Tensor]]:
    """The forwards, which return every Y; x; and the parameters."""
    dtype, k = getattr(torch, case.dtype), case.width
    x = torch.randn(rows, k, dtype=dtype, requires_grad=True)
    weights = [(torch.randn(n, k) / k**0.5).to(dtype) for n in case.widths]
    a = [(torch.randn(RANK, k) / k**0.5).requires_grad_() for _ in case.widths]
    b = [torch.randn(n, RANK).requires_grad_() for n in case.widths]
    dropout: dict[str, Any] = {"dropout_p": case.dropout, "training": case.dropout > 0}

    def apart() -> list[Tensor]:
        operands = zip(weights, a, b, strict=True)
        return [lk.lora_linear(x, *each, 0.25, **dropout) for each in operands]

    def together() -> tuple[Tensor, ...]:
        return lk.lora_linears(x, weights, a, b, 0.25, **dropout)

    return {APART: apart, TOGETHER: together}, x, [*weights, *a, *b]


def saved(forward: Callable[[], Any], x: Tensor, parameters: Sequence[Tensor]) -> float:
    """Bytes that autograd keeps besides parameters, in multiples of x."""
    kept: dict[int, int] = {}
    known = {t.data_ptr() for t in parameters}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in known:
            kept[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward()
    return sum(kept.values()) / x.nbytes


def interleaved(
    steps: dict[str, Callable[[], Any]],
    seconds: float,
    before: Callable[[str], Any] = lambda name: None,
) -> dict[str, float]:
    """The median of each step in microseconds; ``before`` is called outside the clock."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[APART]) < 4:
        for name, step in [*steps.items()][:: 1 if len(times[APART]) % 2 else -1]:
            before(name)
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) * 1e6 for name, each in times.items()}


def measure(case: Case, seconds: float, rows: int = ROWS) -> dict[str, Any]:
    forwards, x, parameters = steps_of(case, rows)
    dy = [torch.randn(rows, n, dtype=x.dtype) for n in case.widths]

    def train(forward: Callable[[], Any]) -> None:
        torch.autograd.backward(forward(), dy)

    with lk.record_plans() as answers:
        for forward in forwards.values():
            train(forward)
    if {(a.backend, a.plan) for a in answers} != {("cpu", "native")}:
        raise SystemExit(f"not answered by the native kernels: {answers}")
    steps = {name: functools.partial(train, forward) for name, forward in forwards.items()}
    us = interleaved(steps, seconds)
    bytes_ = {name: saved(forward, x, parameters) for name, forward in forwards.items()}
    return {**case._asdict(), "rows": rows, "us": us, "saved": bytes_}


def measure_model(case: Model, seconds: float, rows: int = ROWS) -> dict[str, Any]:
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
    ids = torch.randint(config.vocab_size, (1, rows))

    def train() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def share(name: str) -> None:
        lk.share_inputs(model, name == TOGETHER)
        model.zero_grad()

    for name in (APART, TOGETHER):
        share(name)
        with lk.record_plans() as answers:
            train()
        shared = sum(a.op == "lora_linears_fwd" for a in answers)
        native = {(a.backend, a.plan) for a in answers} == {("cpu", "native")}
        if shared != (2 * case.layers if name == TOGETHER else 0) or not native:
            raise SystemExit(f"not answered by the native kernels as asked: {answers}")
    us = interleaved({APART: train, TOGETHER: train}, seconds, share)
    return {**case._asdict(), "rows": rows, "us": us}


def table_of_models(content: dict[str, Any]) -> list[str]:
    head = ["tokens", "hidden", "heads of k, v", "layers", "dtype", f"{APART} us"]
    head += ["share_inputs us", "shared / separate"]
    body = []
    for row in content["rows"]:
        apart, together = row["us"][APART], row["us"][TOGETHER]
        line = [str(row[name]) for name in ("rows", "hidden", "groups", "layers", "dtype")]
        body.append([*line, f"{apart:,.0f}", f"{together:,.0f}", f"{together / apart:.3f}"])
    return [
        f"{told(content)}. Forward and backward of a Llama of 8 heads with adapters of rank {RANK} "
        'on all linear layers. "shared / separate": below 1 sharing is faster.',
        "",
        *piped((head, body)).splitlines(),
    ]


def table(content: dict[str, Any]) -> list[str]:
    """Of layers, or of the models that ``--models`` measured."""
    if "layers" in content["rows"][0]:
        return table_of_models(content)
    head = ["rows x width", "widths", "dtype", "dropout", f"{APART} us", f"{TOGETHER} us"]
    head += ["together / separate", "saved, in x", "separate"]
    body = []
    for row in content["rows"]:
        apart, together = row["us"][APART], row["us"][TOGETHER]
        line = [f"{row['rows']} x {row['width']}", " + ".join(map(str, row["widths"]))]
        line += [row["dtype"], f"{row['dropout']:g}", f"{apart:,.0f}", f"{together:,.0f}"]
        line += [f"{together / apart:.3f}"]
        body.append([*line, *(f"{row['saved'][name]:.2f}" for name in (TOGETHER, APART))])
    return [
        f"{told(content)}. Forward and backward, adapters of rank {RANK} in float32. "
        '"together / separate": below 1 the one call is faster.',
        "",
        *piped((head, body)).splitlines(),
    ]


def run(
    cases: Sequence[Any],
    seconds: float,
    rows: int = ROWS,
    measured: Callable[[Any, float, int], dict[str, Any]] = measure,
) -> dict[str, Any]:
    found = [measured(case, seconds, rows) for case in tqdm(cases, desc="shared inputs")]
    return origin("cpu", ("torch", "transformers")) | {"rows": found}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.shared_input", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=5.0, help="for each row of the table")
    parser.add_argument("--models", action="store_true", help="training steps of models instead")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(arguments)
    if args.models:
        content = run(MODELS, args.seconds, measured=measure_model)
        name = "shared_input_models"
    else:
        content, name = run(CASES, args.seconds), "shared_input"
    write(content, table(content), args.out, name)
    print("\n".join(table(content)))


if __name__ == "__main__":
    main()
