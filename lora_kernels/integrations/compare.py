"""``python -m lora_kernels compare``: how much time and memory your own model saves.

One model is loaded. Two PEFT models share its frozen weights and have the same adapter: one as PEFT
made it, one after ``accelerate_peft``. Both first compute the same batch, with dropout off, and
must agree; then their steps take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.packed import PackedWeight
from ..planning.device import facts
from ..spec.problem import dtype_name
from .compare_memory import SavedTensors, step_peak
from .compare_model import (
    NEW_TOKENS,
    Source,
    UserError,
    adapted,
    available_bytes,
    check_memory,
    describe,
    find,
    first_line,
    inputs_for,
    linear_layers,
    load,
    or_error,
    outline_of,
    required_bytes,
    shared_copy,
)
from .peft_calls import PeftReport
from .peft_swap import accelerate_peft

PEFT, OURS = "PEFT", "ours"
WARM_UP = 2
# How much further apart the two may be than PEFT is from itself with one more rounding, of a full
# step of the dtype, of the output and its gradient in every adapted layer. A guess that leaves room
# for the order of a sum; a missing adapter or a wrong scale is far outside.
ROUNDINGS = 4
# Above this part of the median the middle half of the steps says that the machine was busy.
BUSY = 0.15
# A speed is told where the middle half of the rounds' ratios is no wider than this.
CLEAR = 1.5
_SAME = "the same"


@dataclass
class Side:
    """One of the two models and its numbers."""

    model: Any
    step: Callable[[], Any]
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    saved_bytes: int = 0
    packed_bytes: int = 0


@dataclass
class Difference:
    """How far apart two results are, as a part of their size."""

    what: str
    ours: float
    limit: float

    @property
    def equal(self) -> bool:
        return self.ours <= self.limit

    def __str__(self) -> str:
        return f"{self.what} differ by {self.ours:.1e} of their size (limit {self.limit:.1e})"


# The command line.


def add_arguments(parser: argparse.ArgumentParser, dtype: Callable[[str], torch.dtype]) -> None:
    """``dtype`` reads the name of one."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="a model's folder (without weight files they are random), the folder of an adapter "
        "of PEFT, or a name in the Hugging Face cache",
    )
    add(
        "--adapter",
        type=Path,
        metavar="DIR",
        help="an adapter of PEFT; default: a new one on all linear layers but the head",
    )
    add("--r", type=int, metavar="R", help="rank of a new adapter; default: 16")
    add("--dropout", type=float, metavar="P", help="of a new adapter; default: 0")
    add(
        "--rows",
        type=_rows,
        metavar="BxT",
        help="sequences x tokens of a batch, or a number of images; default: 4x128, 1x32 with "
        "--generate",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--train", action="store_true", help="time training steps; the default")
    what.add_argument(
        "--generate", action="store_true", help=f"time the generation of {NEW_TOKENS} tokens"
    )
    add("--steps", type=int, default=10, metavar="N", help="timed steps of each; default: 10")
    add("--dtype", type=dtype, help="of the frozen weights; default: the model's own")
    add("--device", help="default: the GPU, else the CPU")


def _rows(text: str) -> tuple[int, int | None]:
    sizes = text.lower().split("x")
    if len(sizes) > 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not BxT, such as 4x128, nor one number")
    return int(sizes[0]), int(sizes[1]) if len(sizes) == 2 else None


def main(arguments: argparse.Namespace) -> int:
    """Run the command; the exit status is 0, 1 if the results differ or nothing was fused, 2 for
    an error of the user's."""
    try:
        return run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(arguments: argparse.Namespace) -> int:
    _check_arguments(arguments)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = find(arguments.model, arguments.adapter)
    config, model_class = describe(source.folder)
    outline = outline_of(source, config, model_class)
    dtype = arguments.dtype or getattr(config, "dtype", None) or torch.float32
    r, generate = arguments.r or 16, arguments.generate
    inputs = inputs_for(outline, arguments.rows, generate)
    need = required_bytes(outline, inputs, dtype, r, generate)
    check_memory(need, available_bytes(device))

    dropout = arguments.dropout or 0.0
    stock = adapted(load(source, config, model_class, dtype).to(device), source, r, dropout)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    # What PEFT alone cannot compute is not ours to compare.
    with torch.no_grad():
        made = f"{source.folder}: {model_class.__name__} fails on {' and '.join(inputs)} alone"
        or_error(made, lambda: logits(stock, inputs))
    ours = shared_copy(stock)
    report = accelerate_peft(ours)
    print("\n".join(headline(source, stock, report, inputs, generate)), flush=True)

    from tqdm import tqdm

    with tqdm(total=2 * (WARM_UP + arguments.steps) + 3, unit="step", leave=False) as bar:
        bar.set_description("are the results equal?")
        differences = check(stock, ours, inputs, generate)
        bar.update()
        make = generation if generate else training
        sides = {name: Side(m, make(m, inputs)) for name, m in ((PEFT, stock), (OURS, ours))}
        measure(sides, arguments.steps, generate, bar)
    print("\n".join(["", *table(sides, inputs, generate), "", *account(report, stock)]))
    print("results: " + "; ".join(map(str, differences)))
    failures = [f"{d.what} of PEFT and ours are not equal" for d in differences if not d.equal]
    if not report.calls.fused:
        failures.append("no call was fused: both columns are PEFT's own forward")
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    packages = ("transformers", "peft")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"compare needs {' and '.join(missing)}: pip install transformers peft")
    for name in ("steps", "r"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    for name in ("r", "dropout"):
        if getattr(arguments, name) is not None and arguments.adapter is not None:
            raise UserError(f"--{name} is for a new adapter: leave it out with --adapter")
    if not 0.0 <= (arguments.dropout or 0.0) < 1.0:
        raise UserError(f"--dropout must be at least 0 and below 1, not {arguments.dropout}")
    if arguments.device is not None:
        try:
            torch.empty(0, device=arguments.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"--device {arguments.device}: {first_line(error)}") from None
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


# Do both compute the same?


def check(stock: Any, ours: Any, inputs: dict[str, Tensor], generate: bool) -> list[Difference]:
    """The logits of both and, for training, the gradients of their adapters, without dropout."""
    expected, found = results(stock, inputs, generate), results(ours, inputs, generate)
    hooks = [
        module.register_forward_hook(_rounded_again)
        for module in stock.modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    ]
    torch.manual_seed(2)
    rounded = results(stock, inputs, generate)
    for hook in hooks:
        hook.remove()
    return [
        Difference(what, _apart(found[what], e), ROUNDINGS * _apart(rounded[what], e))
        for what, e in expected.items()
    ]


def results(model: Any, inputs: dict[str, Tensor], generate: bool) -> dict[str, list[Tensor]]:
    model.eval()
    with torch.set_grad_enabled(not generate):
        y = logits(model, inputs)
    if generate:
        return {"logits": [y]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(y), trainable, allow_unused=True)
    return {"logits": [y.detach()], "gradients": [g for g in gradients if g is not None]}


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    output = model(**inputs)
    found = getattr(output, "logits", None)
    return output[0] if found is None else found


def loss(y: Tensor) -> Tensor:
    """Cross entropy against classes at random, the same ones for the same shape: any model's."""
    generator = torch.Generator().manual_seed(3)
    y = y.flatten(0, -2)
    classes = torch.randint(y.shape[-1], y.shape[:1], generator=generator).to(y.device)
    return F.cross_entropy(y.float(), classes)


def _rounded_again(module: Any, arguments: Any, y: Tensor) -> Tensor:
    def moved(t: Tensor) -> Tensor:
        size = torch.finfo(t.dtype).eps * t.detach().float().square().mean().sqrt()
        return t + (torch.randn_like(t).sign() * size).to(t.dtype)

    y = moved(y)
    if y.requires_grad:
        y.register_hook(moved)
    return y


def _apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The root of the mean square, over the tensors, of |difference| / |expected|."""
    parts = [
        ((f.double() - e.double()).norm() / e.double().norm().clamp_min(1e-300)).item()
        for f, e in zip(found, expected, strict=True)
    ]
    return (sum(part**2 for part in parts) / max(len(parts), 1)) ** 0.5


# Time and memory.


def training(model: Any, inputs: dict[str, Tensor]) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        loss(logits(model, inputs)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def generation(model: Any, inputs: dict[str, Tensor]) -> Callable[[], None]:
    model.eval()
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    inputs = inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}

    def step() -> None:
        with torch.no_grad():
            model.generate(**inputs, **length, do_sample=False, num_beams=1)

    return step


def measure(sides: dict[str, Side], steps: int, generate: bool, bar: Any) -> None:
    """Fill in the numbers of both sides: the timed steps take turns, the first one changes."""
    order = list(sides.values())
    bar.set_description("warm-up")
    for side in order * WARM_UP:
        side.step()
        bar.update()
    bar.set_description("timed steps")
    for _ in range(steps):
        for side in order:
            side.seconds.append(_timed(side))
            bar.update()
        order.reverse()
    # Only now: what observes takes time and memory of its own.
    bar.set_description("memory")
    for side in order:
        if not generate:
            with SavedTensors([*side.model.parameters(), *side.model.buffers()]) as saved:
                side.step()
            side.saved_bytes = saved.peak
        side.peak_bytes = step_peak(side.step, next(side.model.parameters()).device.type)
        held = (getattr(module, "_packed", None) for module in side.model.modules())
        side.packed_bytes = sum(p.nbytes for p in held if isinstance(p, PackedWeight))
        bar.update()


def _timed(side: Side) -> float:
    device = next(side.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    side.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# What is printed.


def headline(
    source: Source, stock: Any, report: PeftReport, inputs: dict[str, Tensor], generate: bool
) -> list[str]:
    parameters = list(stock.parameters())
    frozen = [p for p in parameters if not p.requires_grad]
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    device, dtype = parameters[0].device, dtype_name(max(frozen, key=Tensor.numel).dtype)
    machine = facts(device)
    units = "threads" if device.type == "cpu" else "processors"
    weights = "" if source.has_weights else ", random weights"
    layers = len(report.fused) + len(report.skipped)
    adapter = f"adapter {source.adapter}" if source.adapter else "new adapter of PEFT"
    dropout = stock.active_peft_config.lora_dropout
    size = " x ".join(map(str, next(iter(inputs.values())).shape))
    task = f"generation of {NEW_TOKENS} tokens after prompts" if generate else "training steps"
    return [
        f"{type(stock.get_base_model()).__name__} in {source.folder}{weights}: "
        f"{sum(p.numel() for p in frozen) / 1e6:,.1f} M frozen parameters, {dtype}, "
        f"{_mib(sum(p.nbytes for p in frozen))} MiB, shared by both",
        f"{adapter}: {layers} layers, {trainable / 1e6:,.2f} M trainable parameters"
        + f", dropout {dropout:g}" * (not generate),
        f"{task} of {size}; {machine.name} ({machine.arch}, {machine.processors} {units}), "
        f"torch {torch.__version__}, peft {version('peft')}, {date.today()}",
    ]


def table(sides: dict[str, Side], inputs: dict[str, Tensor], generate: bool) -> list[str]:
    stock, ours = sides[PEFT], sides[OURS]
    first = next(iter(inputs.values()))
    images = "pixel_values" in inputs
    items = len(first) if images else len(first) * NEW_TOKENS if generate else first.numel()
    times = [statistics.median(side.seconds) for side in (stock, ours)]
    per = NEW_TOKENS if generate else 1
    ratios = [s / o for s, o in zip(stock.seconds, ours.seconds, strict=True)]
    speed = statistics.median(ratios)
    low, high = _middle_half(ratios)
    clear = (low > 1 or high < 1) and high / low <= CLEAR
    rows = [
        (
            f"ms per {'token' if generate else 'step'}",
            *(f"{t / per * 1e3:,.2f}" for t in times),
            f"{_ratio(speed, 'faster', 'slower')} (half of the rounds: {low:.2f} to {high:.2f})"
            if clear
            else f"no clear difference (half of the rounds: {low:.2f} to {high:.2f})",
        ),
        (f"{'images' if images else 'tokens'} per second", *(f"{items / t:,.0f}" for t in times)),
        _bytes_row("peak memory of a step", stock.peak_bytes, ours.peak_bytes),
    ]
    if not generate:
        saved = _bytes_row("saved activations", stock.saved_bytes, ours.saved_bytes)
        if saved[-1] == _SAME and not stock.model.active_peft_config.lora_dropout:
            saved = (*saved[:-1], f"{_SAME}: without dropout PEFT saves no copy of x (--dropout)")
        rows.append(saved)
    if ours.packed_bytes:
        rows.append(("packed weights, MiB", "0.0", _mib(ours.packed_bytes), "kept by ours alone"))
    lines = [f"{'':28}{PEFT:>12}{OURS:>12}"]
    for title, theirs, own, *said in rows:
        lines.append(f"{title:28}{theirs:>12}{own:>12}   {' '.join(said)}".rstrip())
    return lines + [_spread(sides, len(ratios))]


def _bytes_row(title: str, theirs: int, ours: int) -> tuple[str, ...]:
    said = _ratio(theirs / ours, "less", "more") if theirs and ours else ""
    return f"{title}, MiB", _mib(theirs), _mib(ours), said


def _ratio(value: float, better: str, worse: str) -> str:
    """``value`` is PEFT's over ours: above 1 ours is better."""
    word, value = (better, value) if value >= 1 else (worse, 1 / value)
    return f"ours {value:.2f}x {word}" if f"{value:.2f}" != "1.00" else _SAME


def _spread(sides: dict[str, Side], rounds: int) -> str:
    widths = {}
    for name, side in sides.items():
        low, high = _middle_half(side.seconds)
        widths[name] = (high - low) / statistics.median(side.seconds)
    said = ", ".join(f"{name} {100 * width:.0f}%" for name, width in widths.items())
    # Threads that spin while they wait made a step 30 times as long (two cores, load 16).
    hint = "; the machine was busy: repeat, with OMP_WAIT_POLICY=PASSIVE if it stays so"
    busy = hint if max(widths.values()) > BUSY else ""
    few = "; few steps: take more" if rounds < 5 else ""
    return (
        f"medians of {rounds} steps in turns; half of the times lie within (part of the median): "
        f"{said}{busy or few}"
    )


def _middle_half(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def account(report: PeftReport, stock: Any) -> list[str]:
    """What was fused, what was not, and why; equal layers in one line."""
    calls = report.calls
    lines = [
        f"fused: {len(report.fused)} layers ({_kinds(report.fused)}), {calls.fused:,} calls"
        if report.fused
        else "fused: no layer"
    ]
    by_reason: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        by_reason.setdefault(reason, []).append(name)
    lines += [f"left to PEFT: {_kinds(names)}: {why}" for why, names in by_reason.items()]
    lines += [f"fell back to PEFT: {n:,} calls: {why}" for why, n in calls.fallen_back.items()]
    inside = tuple(f"{name}." for name in (*report.fused, *report.skipped))
    bare = [name for name in linear_layers(stock) if not name.startswith(inside)]
    if bare:
        lines.append(f"without an adapter: {_kinds(bare)}")
    return lines


def _kinds(names: Iterable[str]) -> str:
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(f"{n} {name}" if n > 1 else name for name, n in counts.items())


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
