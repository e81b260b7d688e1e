"""Others' kernels in Triton's interpreter, from the copies that ``bench.peers`` collects.

Run by test_bench_peers.py as
``TRITON_INTERPRET=1 python -m tests.bench.peers_interpreted DIR KEY...``: an interpreted function
cannot be compiled, and what a copy stands in for must not be seen by other tests. It prints
``KEY SETTING: right``, or raises what bench would have reported.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton.runtime import interpreter

from bench import bench_lora_linear, bench_segmented, checks, peers
from bench.cases import Setting
from bench.peers import TRAINING_PEERS
from bench.peers_serving import MIXED_PEERS
from bench.segmented_cases import MixedSetting, draw

# Unequal slices, equal ones, one; M and K between multiples of the tiles.
BATCHES = (
    MixedSetting("T2", "qkv", 21, 280, (160, 64, 64), 16, "modulo", 3, "float16"),
    MixedSetting("T2", "gate_up", 21, 280, (144, 144), 16, "modulo", 3, "float16"),
    MixedSetting("T2", "down", 21, 280, (144,), 32, "zipf", 7, "float16"),
    # As few rows as a GPU's plans have a way of their own for.
    MixedSetting("T4", "", 4, 1024, (200,), 16, "modulo", 4, "float16"),
    # More than a decoding batch has.
    MixedSetting("T3", "", 514, 64, (48, 48, 48), 16, "modulo", 4, "float16"),
)
STEPS = tuple(
    Setting(160, 256, 128, 16, 16, p, "float16", mode)
    for p in (0.0, 0.1)
    for mode in ("forward", "training")
)
# It asks for the shape of a mask that is not there.
CRASHES = {("lorafusion", 0.0, "training")}


def prepare() -> None:
    """What their host code asks of a GPU and its driver, answered as an H200 would."""

    def unpinned(make: Any) -> Any:
        return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)

    for name in ("tensor", "empty", "arange", "zeros"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    # A machine with a GPU may lack what is installed here.
    peers._installed = lambda module: False
    torch.cuda.device = contextlib.nullcontext  # type: ignore[assignment,misc]
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H200"
    masked_load = interpreter.InterpreterBuilder.create_masked_load

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        # A number of Python's compared with a tensor makes a mask of integers here, and of bits
        # where it is compiled.
        mask.data = mask.data.astype(bool)
        return masked_load(self, pointers, mask, *rest)

    interpreter.InterpreterBuilder.create_masked_load = load


def check_batch(key: str, setting: MixedSetting, shifted: bool) -> None:
    """``shifted``: the peer is told that every row uses the adapter of the next."""
    inputs = draw(setting, "cpu")
    told = replace(inputs, slots=inputs.slots[1:] + inputs.slots[:1]) if shifted else inputs
    step = bench_segmented.step_of(MIXED_PEERS[key], setting, told)
    bench_segmented.Truth(setting, inputs).check(step.variant, step)


def check_step(key: str, setting: Setting) -> None:
    variant = TRAINING_PEERS[key]
    inputs = checks.draw(setting, "cpu")
    inputs.x.requires_grad_(setting.mode == "training")
    step = bench_lora_linear.step_of(variant, inputs, setting)
    without_base = bench_lora_linear.without_base(setting, inputs, variant)
    checks.Truth(setting, inputs).check(step.variant, step, without_base)


def main(directory: str, *keys: str) -> None:
    prepare()
    peers.use(Path(directory))
    for key in keys:
        if key in TRAINING_PEERS:
            for setting in STEPS:
                if (key, setting.p, setting.mode) not in CRASHES:
                    check_step(key, setting)
                    print(f"{key} {setting}: right", flush=True)
            continue
        for batch in BATCHES:
            check_batch(key, batch, shifted=False)
            print(f"{key} {batch}: right", flush=True)
        try:
            check_batch(key, BATCHES[0], shifted=True)
        except AssertionError as error:
            print(f"{key} told wrong slots: {error}", flush=True)
        else:
            raise SystemExit(f"{key}: wrong slots went unseen")


if __name__ == "__main__":
    main(*sys.argv[1:])
