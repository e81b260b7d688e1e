"""How do I reduce memory? One trick after the other, with PEFT and with us; ``make memory``.

Every cell trains in a process of its own: the same small Llama with random weights, the same batch,
the same optimizer. Measured are

- saved activations: bytes of the distinct storages that autograd holds at most between forward and
  backward, parameters and buffers excluded, counted by ``saved_tensors_hooks``. What a checkpointed
  block saves while it is recomputed is not among them, but is in the next two;
- the step's peak: the most that torch's allocator had out during a step, above what it had at its
  beginning (on a CPU from the profiler's events, on a GPU from ``torch.cuda``);
- resident: what training added at most to the process's resident set (on a CPU), libraries that
  load at the first step included;
- the median time of a step, without hooks and without a profiler.

All numbers go into memory.json, the table into memory.md. The exit status is 1 if a cell failed,
trained something else than PEFT does, or was not computed by our kernels.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "out" / "memory"
JSON_NAME, TABLE_NAME = "memory.json", "memory.md"

PEFT, OURS, SWAPPED = "PEFT", "lora_kernels", "PEFT, accelerate_peft"

# Of a cell: importing, building and training it, on a machine that does other things as well.
CELL_SECONDS = 600

# What two libraries may differ by in the loss of the first step, where both adapters add nothing
# yet. It is bfloat16's step at the size of a loss; a wrong batch or model differs by far more.
LOSS_LIMIT = 2**-7


@dataclass(frozen=True)
class Setting:
    """One row: what is trained, and how."""

    title: str
    micro_batches: int = 1
    autocast: bool = False
    checkpointing: bool = False
    half_weights: bool = False


@dataclass(frozen=True)
class Size:
    """The model, the batch, and the adapter of every cell."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int
    rank: int = 16
    dropout: float = 0.1
    # Timed steps: at least so many, and more until the seconds are over.
    steps: int = 3
    seconds: float = 3.0


BASELINE = Setting("baseline: float32, one batch")


def settings(micro_batches: int) -> list[Setting]:
    """Each trick with all those before it."""
    accumulation = replace(BASELINE, title="+ gradient accumulation", micro_batches=micro_batches)
    mixed = replace(accumulation, title="+ mixed precision (bfloat16 autocast)", autocast=True)
    checkpointing = replace(mixed, title="+ gradient checkpointing", checkpointing=True)
    half = replace(checkpointing, title="+ frozen weights in bfloat16", half_weights=True)
    return [BASELINE, accumulation, mixed, checkpointing, half]


SIZES = {
    "quick": Size(64, 96, 1, 4, 128, batch=4, tokens=32, steps=1, seconds=0.0),
    "cpu": Size(256, 704, 4, 4, 2048, batch=8, tokens=256),
    "cuda": Size(2048, 5632, 8, 16, 32000, batch=16, tokens=1024, steps=10),
}
MICRO_BATCHES = 4


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.cell is not None:
        print(json.dumps(measure(**_from_json(args.cell))))
        return 0
    content = run(args)
    lines = table(content)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / JSON_NAME).write_text(json.dumps(content, indent=1) + "\n")
    (args.out / TABLE_NAME).write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    print(f"\nwrote {args.out / JSON_NAME}, {TABLE_NAME}")
    for line in content["failures"]:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if content["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.training_memory", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, default=OUT, metavar="DIR", help="where the results go")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--quick", action="store_true", help="a tiny model, to see that all of it works")
    add("--rows", type=int, metavar="N", help="the first N rows alone")
    add("--cell", help=argparse.SUPPRESS)
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every cell in a process of its own; what went wrong stands under "failures"."""
    import torch

    import lora_kernels as lk
    from lora_kernels.device import facts

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES["quick" if args.quick else device]
    libraries = [PEFT] * (importlib.util.find_spec("peft") is not None) + [OURS]
    libraries += [SWAPPED] * (PEFT in libraries and hasattr(lk, "accelerate_peft"))
    machine = facts(device)
    units = "threads" if device == "cpu" else "processors"
    rows = []
    failures: list[str] = []
    for setting in settings(MICRO_BATCHES)[: args.rows]:
        cells: dict[str, Any] = {}
        for library in libraries:
            print(f"{setting.title}, {library} ...", file=sys.stderr, flush=True)
            cell = {"library": library, "setting": setting, "size": size, "device": device}
            try:
                cells[library] = _in_a_process(cell)
            except RuntimeError as error:
                failures.append(f"{setting.title}, {library}: {error}")
        failures += [f"{setting.title}, {problem}" for problem in problems(cells, device)]
        rows.append({"setting": asdict(setting), "cells": cells})
    packages = ["torch", "transformers", *(["peft"] if PEFT in libraries else [])]
    return {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "device": device,
        "device_name": f"{machine.name} ({machine.arch}, {machine.processors} {units})",
        "versions": {package: version(package) for package in packages},
        "size": asdict(size),
        "libraries": libraries,
        "rows": rows,
        "failures": failures,
    }


def _in_a_process(cell: dict[str, Any]) -> dict[str, Any]:
    """:func:`measure` where nothing has been allocated before.

    Raises:
        RuntimeError: it ended with an error or took too long; the message has its last lines.
    """
    text = json.dumps({k: v if isinstance(v, str) else asdict(v) for k, v in cell.items()})
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "bench.training_memory", "--cell", text]
    try:
        answer = subprocess.run(
            command,
            cwd=root,
            env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=CELL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done after {CELL_SECONDS} s") from None
    if answer.returncode:
        raise RuntimeError(f"exit status {answer.returncode}: {answer.stderr[-800:].strip()}")
    return json.loads(answer.stdout.splitlines()[-1])


def _from_json(text: str) -> dict[str, Any]:
    cell = json.loads(text)
    return cell | {"setting": Setting(**cell["setting"]), "size": Size(**cell["size"])}


def problems(cells: dict[str, Any], device: str) -> list[str]:
    """What makes the cells of a row no comparison."""
    found = []
    for library, cell in cells.items():
        if library != PEFT and (
            not cell["answers"] or any(device not in a for a in cell["answers"])
        ):
            found.append(f"{library}: answered by {cell['answers'] or 'nobody'}")
        if PEFT in cells:
            theirs = cells[PEFT]["loss"]
            if not abs(cell["loss"] - theirs) <= LOSS_LIMIT * abs(theirs):
                found.append(f"{library}: a loss of {cell['loss']:.4f}, PEFT's is {theirs:.4f}")
    return found


# One cell.


def measure(library: str, setting: Setting, size: Size, device: str) -> dict[str, Any]:
    """Train the cell's model and return its numbers: bytes, seconds, who answered, a loss."""
    import torch

    import lora_kernels as lk

    from .demo_training import Memory

    model = build(library, setting, size, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # With weights in half precision the adapters stay float32, as PEFT and we make them.
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    shape = (size.batch, size.tokens)
    ids = torch.randint(size.vocabulary, shape, generator=generator).to(device)

    def step() -> float:
        losses = []
        for micro in ids.chunk(setting.micro_batches):
            with torch.autocast(device, torch.bfloat16, enabled=setting.autocast):
                loss = model(input_ids=micro, labels=micro).loss
            (loss / setting.micro_batches).backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().item()

    memory = Memory(torch.device(device))
    with lk.record_plans() as answers:
        first_loss = step()
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < size.steps or time.perf_counter() - began < size.seconds:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    memory.stop()
    # Only now: what observes takes memory and time of its own.
    with SavedTensors([*model.parameters(), *model.buffers()]) as saved:
        step()
    peak = step_peak(step, device)
    resident = None
    if device == "cpu" and memory.peak is not None and memory.before is not None:
        resident = memory.peak - memory.before
    return {
        "saved_bytes": saved.peak,
        "step_peak_bytes": peak,
        "resident_bytes": resident,
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "step_s": statistics.median(seconds),
        "steps": len(seconds),
        "tokens_per_s": size.batch * size.tokens / statistics.median(seconds),
        "loss": first_loss,
        "answers": dict(Counter(f"{a.backend}: {a.plan}" for a in answers)),
    }


def build(library: str, setting: Setting, size: Size, device: str) -> Any:
    """The same weights for the same size, with an adapter on every linear layer but the head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    import lora_kernels as lk

    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.tokens,
        use_cache=False,
    )
    dtype = torch.bfloat16 if setting.half_weights else torch.float32
    model: Any = LlamaForCausalLM(config).to(device=device, dtype=dtype)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = {"r": size.rank, "lora_alpha": 2 * size.rank, "lora_dropout": size.dropout}
    if library == OURS:
        lk.apply_lora(model, target_modules=targets, **adapter)
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **adapter))
        if library == SWAPPED:
            lk.accelerate_peft(model)  # type: ignore[attr-defined]
    return model.train()


class SavedTensors:
    """Counts what autograd keeps: ``peak``, the most bytes of distinct storages saved at a time.

    Storages of ``apart`` (parameters, buffers) do not count: they are there anyway.
    """

    def __init__(self, apart: Iterable[Any]) -> None:
        self.peak = self.now = 0
        self._apart = {_storage(tensor) for tensor in apart}
        self._references: Counter[int] = Counter()
        self._hooks: Any = None

    def __enter__(self) -> SavedTensors:
        import torch

        def pack(tensor: Any) -> Any:
            return _Held(self, tensor)

        def unpack(held: Any) -> Any:
            return held.tensor

        self._hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._hooks.__exit__(*exception)

    def take(self, storage: int, size: int) -> None:
        if storage in self._apart:
            return
        self._references[storage] += 1
        if self._references[storage] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)

    def release(self, storage: int, size: int) -> None:
        if storage in self._apart:
            return
        self._references[storage] -= 1
        if not self._references[storage]:
            self.now -= size


class _Held:
    """A saved tensor for as long as autograd has it."""

    def __init__(self, counter: SavedTensors, tensor: Any) -> None:
        self.counter, self.tensor = counter, tensor
        # Taken now: an in-place change of the tensor's storage must not move it to another key.
        self.storage, self.size = _storage(tensor), tensor.untyped_storage().nbytes()
        counter.take(self.storage, self.size)

    def __del__(self) -> None:
        self.counter.release(self.storage, self.size)


def _storage(tensor: Any) -> int:
    # While somebody holds the tensor, its storage's address is nobody else's.
    return tensor.untyped_storage().data_ptr()


def step_peak(step: Callable[[], Any], device: str) -> int:
    """The most bytes that torch's allocator had out during ``step``, above those at its start."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        now += change
        peak = max(peak, now)
    return peak


# The report.

_COLUMNS = (
    ("saved_bytes", "saved activations, MiB"),
    ("step_peak_bytes", "peak of a step, MiB"),
    ("resident_bytes", "resident, MiB"),
    ("weight_bytes", "weights, MiB"),
    ("step_s", "ms / step"),
)


def table(content: dict[str, Any]) -> list[str]:
    """Markdown: a line per trick and library, each number with its ratio to PEFT's first line."""
    size = Size(**content["size"])
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    columns = [
        (key, head)
        for key, head in _COLUMNS
        if any(c.get(key) is not None for row in content["rows"] for c in row["cells"].values())
    ]
    lines = [
        f"{content['date']}, {content['device_name']}, {versions}. A Llama of {size.layers} "
        f"blocks, {size.hidden} wide; {size.batch} x {size.tokens} tokens per step; adapters of "
        f"rank {size.rank} on all linear layers but the head, dropout {size.dropout:g}, AdamW. "
        "In brackets: as a part of the first line.",
        "",
        "| | " + " | ".join(["", *(head for _, head in columns)]) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    first: dict[str, Any] = {}
    for row in content["rows"]:
        title = row["setting"]["title"]
        if row["setting"]["micro_batches"] > 1 and not row["setting"]["autocast"]:
            title += f", {row['setting']['micro_batches']} parts"
        for library in content["libraries"]:
            cell = row["cells"].get(library)
            if cell is None:
                lines.append(f"| {title} | {library} |" + " failed |" * len(columns))
                continue
            first = first or cell
            numbers = [_number(key, cell.get(key), first.get(key)) for key, _ in columns]
            lines.append(f"| {title} | {library} | " + " | ".join(numbers) + " |")
    return lines


def _number(key: str, value: float | None, first: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value * 1e3:,.0f}" if key == "step_s" else f"{value / 2**20:,.1f}"
    return f"{text} ({value / first:.2f})" if first else text


if __name__ == "__main__":
    sys.exit(main())
