"""``python -m lora_kernels``: what is installed and what answers where; ``compare``: how much a
model of yours saves; ``tune``: measure the plans."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__
from .backends import tune
from .functional.ops import OPERATORS, SEGMENTED_OPERATORS
from .integrations import compare
from .planning import plan, tables
from .planning.config import PLANS, Config
from .planning.device import facts
from .planning.validity import invalid_reason
from .spec import native
from .spec.problem import Problem, dtype_name

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def report() -> str:
    """What is installed, which devices there are, and which plan answers each operator on them,
    with reasons."""
    lines = [
        f"lora_kernels {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    ]
    for package, without in (
        ("triton", "no Triton kernels"),
        ("transformers", "no Conv1D, no demo"),
        ("peft", "adapters in PEFT's format still load and save"),
    ):
        version = _version(package)
        lines.append(
            f"{package} {version}" if version else f"{package} is not installed: {without}"
        )
    isa = native.load()
    lines.append(
        f"CPU kernels: {isa}, for float32, bfloat16 and float16"
        if isa
        else f"CPU kernels: NONE, PyTorch computes in their place, more slowly: {native.why_not()}"
    )
    if not torch.cuda.is_available():
        lines.append(f"GPU: none that torch {torch.__version__} can use")
    lines.append(f"tuned plans of the user: {tables.cache_directory()}")
    for device in _devices():
        lines += ["", *_device_report(device)]
    return "\n".join(lines)


def _device_report(device: str) -> list[str]:
    known = facts(device)
    lines = [f"{device}: {known.name} ({known.arch}), {len(tables.table(known))} tuned plans"]
    plans_of: dict[str, list[str]] = {}
    for name in DTYPES:
        answers: dict[str, list[str]] = {}
        for op in (*OPERATORS, *SEGMENTED_OPERATORS):
            slots = 8 if op in SEGMENTED_OPERATORS else 0
            problem = Problem(op, 512, 4096, 4096, 16, name, name, slots=slots)
            config = plan.plan(problem, known)
            answers.setdefault(config.plan, []).append(op)
        by_plan = [f"{plan_name}: {', '.join(ops)}" for plan_name, ops in answers.items()]
        said = "; ".join(answers if len(answers) == 1 else by_plan)
        plans_of.setdefault(said, []).append(name)
    lines += [f"  {', '.join(dtypes)} by {plans}" for plans, dtypes in plans_of.items()]
    lines.append("  why not another plan (512 rows, 4096 x 4096, r 16):")
    plans_for: dict[str, list[str]] = {}
    for name in PLANS:
        reasons: dict[str, list[str]] = {}
        for dtype in DTYPES:
            reason = invalid_reason(
                Config(name), Problem(OPERATORS[1], 512, 4096, 4096, 16, dtype, dtype), known
            )
            if reason:
                reasons.setdefault(reason, []).append(dtype)
        for reason, dtypes in reasons.items():
            where = "" if len(dtypes) == len(DTYPES) else f" for {', '.join(dtypes)}"
            plans_for.setdefault(reason, []).append(f"{name}{where}")
    return lines + [f"    {', '.join(plans)}: {reason}" for reason, plans in plans_for.items()]


def _devices() -> list[str]:
    devices = ["cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shapes(text: str) -> list[tune.Shape]:
    shapes: list[tune.Shape] = []
    for part in text.split(","):
        try:
            rows, inner, columns = part.lower().split("x")
            m, k, widths = int(rows), int(inner), [int(width) for width in columns.split("+")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} is not MxKxN, such as 512x4096x4096 (or with slices 32x4096x4096+1024)"
            ) from None
        if min(m, k, *widths) < 1:
            raise argparse.ArgumentTypeError(f"{part!r} has a size below 1")
        shapes.append((m, k, widths[0] if len(widths) == 1 else tuple(widths)))
    return shapes


def _dtype(text: str) -> torch.dtype:
    name = ALIASES.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join([*DTYPES, *ALIASES])}")
    return DTYPES[name]


def _ops(text: str) -> list[str]:
    ops, known = text.split(","), (*OPERATORS, *SEGMENTED_OPERATORS)
    for op in ops:
        if op not in known:
            raise argparse.ArgumentTypeError(f"{op!r} is none of {', '.join(known)}")
    return ops


def _tune(arguments: argparse.Namespace) -> None:
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    print(f"tuning on {facts(device).name}, {dtype_name(arguments.dtype)}, r {arguments.r}")
    for measurement in tune.tune(
        arguments.shapes,
        arguments.ops,
        r=arguments.r,
        slots=arguments.slots,
        dtype=arguments.dtype,
        adapter_dtype=arguments.adapter_dtype,
        dropout_p=arguments.dropout,
        fan_in_fan_out=arguments.fan_in_fan_out,
        four_bit=arguments.four_bit,
        device=device,
        seconds=arguments.seconds,
    ):
        problem = measurement.problem
        times = ", ".join(
            f"{'decoding ' * config.decodes}{config.plan} {us:.1f} us"
            for config, us in measurement.medians_us.items()
        )
        slots = f" slots {problem.slots} slices {problem.slices}" * (problem.slots > 0)
        sizes = f"M {problem.m} K {problem.k} N {problem.n}{slots}"
        print(f"{problem.op:16} {sizes}: {times}", flush=True)
    print(f"written to {tune.table_path(device)}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lora_kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"lora_kernels {__version__}")
    commands = parser.add_subparsers(dest="command")
    comparing = commands.add_parser(
        "compare", help="time and memory of a model with PEFT's LoRA layers and with ours"
    )
    compare.add_arguments(comparing, _dtype)
    tuning = commands.add_parser("tune", help="measure the plans for given shapes on this machine")
    tuning.add_argument("--shapes", type=_shapes, required=True, metavar="MxKxN,...")
    tuning.add_argument("--ops", type=_ops, metavar="OP,...", help="default: all of them")
    tuning.add_argument("--r", type=int, default=16)
    tuning.add_argument(
        "--slots",
        type=int,
        default=0,
        help="the operators of batches that mix so many adapters; N may be slices, as N+N+N",
    )
    tuning.add_argument("--dtype", type=_dtype, default=torch.bfloat16)
    tuning.add_argument("--adapter-dtype", type=_dtype, default=None, help="default: the same")
    tuning.add_argument("--dropout", type=float, default=0.0)
    tuning.add_argument(
        "--fan-in-fan-out", action="store_true", help="the weight is stored as [K, N]"
    )
    tuning.add_argument("--four-bit", action="store_true", help="the weight is NF4 (QLoRA)")
    tuning.add_argument("--device", default=None, help="default: the GPU, else the CPU")
    tuning.add_argument("--seconds", type=float, default=2.0, help="per operator and shape")
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        print(report())
        return 0
    if arguments.command == "compare":
        return compare.main(arguments)
    if arguments.r < 1 or not 0 <= arguments.dropout < 1:
        parser.error("--r must be at least 1 and --dropout in [0, 1)")
    mixed = arguments.slots > 0
    arguments.ops = arguments.ops or list(SEGMENTED_OPERATORS if mixed else OPERATORS)
    for op in arguments.ops:
        if (op in SEGMENTED_OPERATORS) != mixed:
            parser.error(f"--ops: {op} is {'not ' if mixed else ''}an operator with --slots")
    if not mixed and not all(isinstance(shape[2], int) for shape in arguments.shapes):
        parser.error("--shapes: slices, as in N+N, are of batches with --slots")
    try:
        _tune(arguments)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _main_of_a_pipe() -> int:
    """:func:`main` whose reader may go away, as ``head`` does."""
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer is flushed once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(_main_of_a_pipe())
