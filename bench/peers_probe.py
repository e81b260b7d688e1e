"""Which peers must not run in the process that measures: those that break a GPU's context.

Whatever a peer raises becomes a reason beside its name, but an access out of bounds ends every
later call of the process, ours included. So each peer first computes a few batches in a process of
its own, where it leaves the kernels compiled.

``python -m bench.peers_probe KEY...`` is that process; it says ``begin KEY`` and ``end KEY``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_kernels.testing import Inputs

from . import checks, peers
from .baselines import Variant
from .cases import QUICK_SHAPES, Setting
from .measure import CapturedStep, EagerStep, Step
from .peers_serving import MIXED_PEERS
from .peers_training import TRAINING_PEERS
from .segmented_baselines import MixedVariant
from .segmented_cases import MixedSetting, draw

_ROOT = Path(__file__).parent.parent
# For one process, which compiles some tens of kernels; another begins after one that was stopped.
_SECONDS = 120.0
_LAYER = ("qkv", 4096, (8192, 1024, 1024))
_ROWS = (1, 32, 1024, 8192)


def broken(
    keys: Sequence[str], command: Sequence[str], seconds: float = _SECONDS
) -> dict[str, str]:
    """{key: why} of those that ended their process, or kept it for longer than ``seconds``."""
    left, found = list(keys), {}
    while left:
        status, output = _run([*command, *left], seconds)
        lines = [line.split(maxsplit=1) for line in output.splitlines()]
        begun = [line[1] for line in lines if line[0:1] == ["begin"] and len(line) == 2]
        ended = {line[1] for line in lines if line[0:1] == ["end"] and len(line) == 2}
        culprit = next((key for key in begun if key not in ended), None)
        if culprit is None:
            # Those it did not come to are no safer in the process that measures.
            unseen = [key for key in left if key not in ended]
            return found | dict.fromkeys(unseen, f"missing: nothing tried it ({status})")
        told = next((line[1] for line in reversed(lines) if line[0:1] == ["broken"]), status)
        found[culprit] = f"missing: it breaks the process ({told})"
        left = left[left.index(culprit) + 1 :]
    return found


def _run(command: Sequence[str], seconds: float) -> tuple[str | None, str]:
    """How it went wrong, or None, and what it said."""
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout or b""
        return f"stopped after {seconds:.0f} s", said.decode() if isinstance(said, bytes) else said
    return (f"exit status {done.returncode}" if done.returncode else None), done.stdout


def broken_here(training: Sequence[str], mixed: Sequence[str]) -> dict[str, str]:
    """``broken`` of those of the variants that are peers with a copy."""
    keys = [key for key in training if key in TRAINING_PEERS and _copied(TRAINING_PEERS[key])]
    keys += [key for key in mixed if _copied(MIXED_PEERS[key])]
    command = [sys.executable, "-m", "bench.peers_probe", "--peers", str(peers.directory())]
    return broken(keys, command)


def _copied(variant: type[Variant] | type[MixedVariant]) -> bool:
    return peers.version(variant.package) is not None


def _mixed_steps(variant: type[MixedVariant]) -> list[Step]:
    from .bench_segmented import MixedStep

    layer, k, widths = _LAYER
    steps: list[Step] = []
    for rows in _ROWS:
        setting = MixedSetting("T2", layer, rows, k, widths, 32, "modulo", min(8, rows))
        if variant.missing(setting, "cuda") is None:
            steps.append(MixedStep(variant(setting, draw(setting, "cuda"))))
    return steps


def _training_steps(variant: type[Variant]) -> list[Step]:
    steps: list[Step] = []
    for p in (0.0, 0.1):
        setting = Setting(*QUICK_SHAPES["cuda"][0], 16, 16, p, "bfloat16", "training")
        if variant.missing(setting, "cuda") is None:
            inputs: Inputs = checks.draw(setting, "cuda")
            inputs.x.requires_grad_()
            steps.append(EagerStep(variant(setting, inputs), setting.mode, inputs.x, inputs.dy))
    return steps


def _try(key: str) -> None:
    try:
        if key in MIXED_PEERS:
            mixed = MIXED_PEERS[key]
            steps, captured = _mixed_steps(mixed), mixed.captured
        else:
            steps, captured = _training_steps(TRAINING_PEERS[key]), True
        for step in steps:
            (CapturedStep(step) if captured else step)()
            torch.cuda.synchronize()
    except Exception as error:
        # Its row will say so, if the device still answers.
        first_line = (str(error) or repr(error)).splitlines()[0]
        try:
            torch.cuda.synchronize()
            torch.ones(8, device="cuda").sum().item()
        except Exception:
            print(f"broken {first_line}", flush=True)
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers_probe", description=__doc__)
    parser.add_argument("--peers", type=Path, default=peers.DEFAULT_DIRECTORY)
    parser.add_argument("keys", nargs="+", choices=[*MIXED_PEERS, *TRAINING_PEERS])
    chosen = parser.parse_args()
    peers.use(chosen.peers)
    for key in chosen.keys:
        print(f"begin {key}", flush=True)
        _try(key)
        print(f"end {key}", flush=True)


if __name__ == "__main__":
    main()
