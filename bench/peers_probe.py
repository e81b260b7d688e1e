"""Which peers must not run in the process that measures: those that break a GPU's context.

Whatever a peer raises becomes a reason beside its name, but an access out of bounds ends every
later call of its process, ours included. So each peer first computes every row in a process of its
own, all of them at once. That compiles their kernels too, into the cache that the rows then find
them in.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import checks, peers, report, segmented_cases
from .baselines import Variant
from .cases import Setting
from .measure import CapturedStep, EagerStep, Step
from .peers_serving import MIXED_PEERS
from .peers_training import TRAINING_PEERS
from .segmented_baselines import MixedVariant
from .segmented_cases import MixedSetting

_ROOT = Path(__file__).parent.parent
# A process begins no row after so many seconds, and is stopped after as many more as its longest
# row may take to compile.
_SECONDS, _LONGEST_ROW_S = 60.0, 60.0


def broken_here(
    training: Sequence[str],
    settings: Sequence[Setting],
    mixed: Sequence[str],
    mixed_settings: Sequence[MixedSetting],
) -> dict[str, str]:
    """{key: why} of the peers among these variants that have a copy and break their process in
    one of these rows."""
    keys = [key for key in training if key in TRAINING_PEERS and settings]
    keys += [key for key in mixed if mixed_settings]
    keys = [key for key in keys if peers.version(_variant(key).package) is not None]
    work = {
        "training": [asdict(setting) for setting in settings],
        "mixed": [asdict(setting) for setting in mixed_settings],
    }
    command = [sys.executable, "-m", "bench.peers_probe", "--peers", str(peers.directory())]
    return broken(keys, command, json.dumps(work), _SECONDS + _LONGEST_ROW_S)


def broken(
    keys: Sequence[str], command: Sequence[str], work: str, seconds: float
) -> dict[str, str]:
    """{key: why} of those for which ``command KEY`` fails or takes longer than ``seconds``."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = pool.map(lambda key: _reason([*command, key], work, seconds), keys)
        return {key: reason for key, reason in zip(keys, reasons, strict=True) if reason}


def _reason(command: Sequence[str], work: str, seconds: float) -> str | None:
    try:
        done = subprocess.run(
            command, cwd=_ROOT, input=work, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired as stopped:
        said = stopped.stdout or b""
        output = said.decode() if isinstance(said, bytes) else said
        why = f"stopped after {seconds:.0f} s"
    else:
        if not done.returncode:
            return None
        output, why = done.stdout, f"exit status {done.returncode}"
    last = (output.strip().splitlines() or ["before its first row"])[-1]
    return f"missing: it breaks its process ({why}; {last})"


def _variant(key: str) -> type[Variant] | type[MixedVariant]:
    return MIXED_PEERS[key] if key in MIXED_PEERS else TRAINING_PEERS[key]


def _rows(key: str, work: dict[str, list[dict[str, Any]]]) -> Iterator[Setting | MixedSetting]:
    """The rows that the peer takes."""
    found = (
        [segmented_cases.setting_of({"setting": each}) for each in work["mixed"]]
        if key in MIXED_PEERS
        else [report.setting_of({"setting": each}) for each in work["training"]]
    )
    variant: Any = _variant(key)
    return (setting for setting in found if variant.missing(setting, "cuda") is None)


def _step(key: str, setting: Any) -> Step:
    """What is measured in that row."""
    if key in MIXED_PEERS:
        from .bench_segmented import MixedStep

        mixed = MIXED_PEERS[key]
        step: Any = MixedStep(mixed(setting, segmented_cases.draw(setting, "cuda")))
        return CapturedStep(step) if mixed.captured else step
    inputs = checks.draw(setting, "cuda")
    inputs.x.requires_grad_(setting.mode == "training")
    variant = TRAINING_PEERS[key](setting, inputs)
    return CapturedStep(EagerStep(variant, setting.mode, inputs.x, inputs.dy))


def _try(key: str, setting: Setting | MixedSetting) -> None:
    try:
        _step(key, setting)()
        torch.cuda.synchronize()
    except Exception as error:
        # Its row will say so, if the device still answers.
        first_line = (str(error) or repr(error)).splitlines()[0]
        try:
            torch.cuda.synchronize()
            torch.ones(8, device="cuda").sum().item()
        except Exception:
            print(f"{setting}: {first_line}", flush=True)
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers_probe", description=__doc__)
    parser.add_argument("--peers", type=Path, default=peers.DEFAULT_DIRECTORY)
    parser.add_argument("key", choices=[*MIXED_PEERS, *TRAINING_PEERS])
    chosen = parser.parse_args()
    peers.use(chosen.peers)
    end = time.monotonic() + _SECONDS
    for setting in _rows(chosen.key, json.load(sys.stdin)):
        if time.monotonic() > end:
            break
        print(setting, flush=True)
        _try(chosen.key, setting)


if __name__ == "__main__":
    main()
