"""How do I reduce memory? One trick after the other, with PEFT and with us; ``make memory``.

Every cell trains the same small Llama in a process of its own. Measured are

- saved activations: bytes of the distinct storages that autograd holds at most between forward and
  backward, parameters and buffers excluded. What a checkpointed block saves while it is recomputed
  is not among them, but is in the next two;
- the step's peak: the most that torch's allocator had out during a step, above its beginning;
- resident: what training added at most to the process's resident set (on a CPU), libraries that
  load at the first step included;
- the median time of a step, without hooks and without a profiler.

The exit status is 1 if a cell failed, trained something else than PEFT does, or was not computed by
our kernels.
"""

from __future__ import annotations

import concurrent.futures
import gc
import importlib.util
import multiprocessing
import re
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import lora_kernels as lk
from lora_kernels.integrations.compare_memory import SavedTensors, step_peak
from lora_kernels.spec.four_bit import quant_state_of

from .command import Content, finish, parser_of
from .tables import origin, piped, told

PEFT, OURS, SWAPPED = "PEFT", "lora_kernels", "PEFT, accelerate_peft"

# Of a cell: importing, building and training it, on a machine that does other things as well.
CELL_SECONDS = 600

# What two libraries may differ by in the loss of the first step, where both adapters add nothing
# yet. It is bfloat16's step at the size of a loss; a wrong batch or model differs by far more.
LOSS_LIMIT = 2**-7


class Setting(NamedTuple):
    """One row: what is trained, and how."""

    title: str
    micro_batches: int = 1
    autocast: bool = False
    checkpointing: bool = False
    half_weights: bool = False
    four_bits: bool = False


_TRICKS: tuple[dict[str, Any], ...] = (
    {"title": "+ gradient accumulation", "micro_batches": 4},
    {"title": "+ mixed precision (bfloat16 autocast)", "autocast": True},
    {"title": "+ gradient checkpointing", "checkpointing": True},
    {"title": "+ frozen weights in bfloat16", "half_weights": True},
    {"title": "+ linear layers in four bits (NF4)", "four_bits": True},
)
# Each trick with all those before it.
SETTINGS = [Setting("baseline: float32, one batch")]
for _trick in _TRICKS:
    SETTINGS.append(SETTINGS[-1]._replace(**_trick))


class Size(NamedTuple):
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


# library, setting, size, device: what `measure` takes.
Cell = tuple[str, Setting, Size, str]

SIZES = {
    "quick": Size(64, 96, 1, 4, 128, batch=4, tokens=32, steps=1, seconds=0.0),
    "cpu": Size(256, 704, 4, 4, 2048, batch=8, tokens=256),
    "cuda": Size(2048, 5632, 8, 16, 32000, batch=16, tokens=1024, steps=10),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("memory", __doc__)
    parser.prog = "python -m bench.training_memory"
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--quick", action="store_true", help="a tiny model, to see that all of it works")
    add("--rows", type=int, metavar="N", help="the first N rows alone")
    add("--no-times", action="store_true", help="memory alone, of one step: for a busy machine")
    args = parser.parse_args(arguments)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = SIZES["quick" if args.quick else device]
    if args.no_times:
        size = size._replace(steps=1, seconds=0.0)
    content = run(device, size, SETTINGS[: args.rows])
    return finish("memory", content, table(content), args.out, content["failures"])


def run(device: str, size: Size, chosen: Sequence[Setting]) -> Content:
    """Measure every cell in a process of its own; "failures" says what went wrong."""
    libraries = [PEFT, OURS, SWAPPED] if importlib.util.find_spec("peft") else [OURS]
    rows = []
    failures: list[str] = []
    bar = tqdm(total=len(chosen) * len(libraries))
    for setting in chosen:
        cells: dict[str, Any] = {}
        for library in libraries:
            bar.set_description(f"{setting.title}, {library}")
            try:
                cells[library] = _apart((library, setting, size, device))
            except RuntimeError as error:
                failures.append(f"{setting.title}, {library}: {error}")
            bar.update()
        failures += [f"{setting.title}, {problem}" for problem in problems(cells, device)]
        rows.append({"setting": setting._asdict(), "cells": cells})
    bar.close()
    packages = ["torch", "transformers", *(["peft"] if PEFT in libraries else [])]
    found = {"device": device, "size": size._asdict(), "libraries": libraries, "rows": rows}
    return origin(device, packages) | found | {"failures": failures}


def _apart(cell: Cell) -> dict[str, Any]:
    return call_apart(measure, cell, CELL_SECONDS)


def call_apart(function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float) -> Any:
    """Call in a process of its own, where nothing has been allocated or loaded before.

    Raises:
        RuntimeError: the call raised something, took more than ``seconds``, or its process ended.
    """
    # Started anew, not forked: it inherits no threads, memory or device.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        future = pool.submit(function, *arguments)
        try:
            return future.result(seconds)
        except concurrent.futures.TimeoutError:
            for process in pool._processes.values():
                process.kill()
            raise RuntimeError(f"not done after {seconds:.0f} s") from None
        except Exception as error:
            traceback.print_exc()
            raise RuntimeError(f"{type(error).__name__}: {error}"[:800]) from None


def problems(cells: dict[str, Any], device: str) -> list[str]:
    """What makes the cells of a row no comparison."""
    found = []
    for library, cell in cells.items():
        if library != PEFT and (
            not cell["answers"] or any(device not in a for a in cell["answers"])
        ):
            found.append(f"{library}: answered by {cell['answers'] or 'no kernel'}")
        if PEFT in cells:
            theirs = cells[PEFT]["loss"]
            if not abs(cell["loss"] - theirs) <= LOSS_LIMIT * abs(theirs):
                found.append(f"{library}: a loss of {cell['loss']:.4f}, PEFT's is {theirs:.4f}")
    return found


# One cell.


def measure(library: str, setting: Setting, size: Size, device: str) -> dict[str, Any]:
    """Train the cell's model and return its numbers: bytes, seconds, who answered, a loss."""
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

    resident = Resident()
    with lk.record_plans() as answers:
        first_loss = step()
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < size.steps or time.perf_counter() - began < size.seconds:
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    grown = resident.grown() if device == "cpu" else None
    # Only now: what observes takes memory and time of its own.
    with SavedTensors([*model.parameters(), *model.buffers()]) as saved:
        step()
    peak = step_peak(step, device)
    return {
        "saved_bytes": saved.peak,
        "step_peak_bytes": peak,
        "resident_bytes": grown,
        "weight_bytes": sum(map(weight_bytes, model.parameters())),
        "step_s": statistics.median(seconds),
        "steps": len(seconds),
        "tokens_per_s": size.batch * size.tokens / statistics.median(seconds),
        "loss": first_loss,
        "answers": dict(Counter(f"{a.backend}: {a.plan}" for a in answers)),
    }


def weight_bytes(parameter: torch.Tensor) -> int:
    """Of a four-bit weight, its scales too."""
    quant = quant_state_of(parameter)
    return parameter.nbytes + (0 if quant is None else quant.nbytes)


class Resident:
    """What this process's resident set has grown by at most since the construction; on Linux."""

    def __init__(self) -> None:
        gc.collect()
        # The high-water mark starts again from here; where that is not allowed it stays.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._now("VmRSS")

    def grown(self) -> int | None:
        """Bytes; None where the system does not tell."""
        peak = self._now("VmHWM")
        return None if peak is None or self._before is None else peak - self._before

    @staticmethod
    def _now(field: str) -> int | None:
        with suppress(OSError):
            status = Path("/proc/self/status").read_text()
            if found := re.search(rf"^{field}:\s*(\d+) kB", status, re.MULTILINE):
                return 1024 * int(found[1])
        return None


def build(library: str, setting: Setting, size: Size, device: str) -> Any:
    """The same weights for the same size, with an adapter on every linear layer but the head."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    # transformers 5.23 has renamed what PEFT reads and what is called here for 5.17 as well.
    warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
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
    model: Any = LlamaForCausalLM(config)
    model.to(device=device, dtype=dtype)
    if setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if setting.four_bits:
        if library == OURS:
            lk.quantize_base(model, compute_dtype=dtype)
        else:
            _quantize_by_bitsandbytes(model, dtype)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter: dict[str, Any] = {"r": size.rank, "lora_alpha": 2 * size.rank}
    adapter |= {"lora_dropout": size.dropout, "target_modules": targets}
    if library == OURS:
        lk.apply_lora(model, **adapter)
    else:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(**adapter))
        if library == SWAPPED:
            lk.accelerate_peft(model)
    return model.train()


def _quantize_by_bitsandbytes(model: Any, dtype: torch.dtype) -> None:
    """As transformers loads a model in four bits: every linear layer but the head."""
    from .four_bit import linear_4bit

    device = model.device
    for path, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, linear_4bit(layer, dtype).to(device))
    model.is_loaded_in_4bit = True


# The report.

_COLUMNS = {
    "saved_bytes": "saved activations, MiB",
    "step_peak_bytes": "peak of a step, MiB",
    "resident_bytes": "resident, MiB",
    "weight_bytes": "weights, MiB",
    "step_s": "ms / step",
}


def table(content: Content) -> list[str]:
    """Markdown: a line per trick and library, each number beside PEFT's without any trick."""
    size = Size(**content["size"])
    cells = [cell for row in content["rows"] for cell in row["cells"].values()]
    columns = {
        key: head
        for key, head in _COLUMNS.items()
        if any(cell.get(key) is not None for cell in cells)
        # The time of one step, the quick size's, says nothing.
        and (key != "step_s" or size.steps > 1)
    }
    body = []
    for row in content["rows"]:
        setting, title = row["setting"], row["setting"]["title"]
        if setting["micro_batches"] > 1 and not setting["autocast"]:
            title += f", {setting['micro_batches']} parts"
        for library in content["libraries"]:
            cell = row["cells"].get(library)
            numbers = [
                "failed" if cell is None else _number(key, cell.get(key), cells[0].get(key))
                for key in columns
            ]
            body.append([title, library, *numbers])
    return [
        f"{told(content)}. A Llama of {size.layers} "
        f"blocks, {size.hidden} wide; {size.batch} x {size.tokens} tokens per step; adapters of "
        f"rank {size.rank} on all linear layers but the head, dropout {size.dropout:g}, AdamW. "
        "In brackets: how many times as much the first line takes.",
        "",
        *piped((["trick", "library", *columns.values()], body)).splitlines(),
    ]


def _number(key: str, value: float | None, first: float | None) -> str:
    if value is None:
        return "-"
    text = f"{value * 1e3:,.0f}" if key == "step_s" else f"{value / 2**20:,.1f}"
    return f"{text} ({first / value:.2f}x)" if first and value else text


if __name__ == "__main__":
    sys.exit(main())
