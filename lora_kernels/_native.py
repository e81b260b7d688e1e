"""Finds and loads the CPU extension: the widest instruction set that was built and this CPU has.

The extensions all define the same operators, ``torch.ops.lora_kernels_cpu.*``, so that a process
loads one of them, at first use. ``LORA_KERNELS_CPU_ISA`` in {baseline, avx2, avx512, none} chooses
it for a test.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import torch

# Narrowest first.
ISAS = ("baseline", "avx2", "avx512")
VARIABLE = "LORA_KERNELS_CPU_ISA"
DIRECTORY = Path(__file__).parent

_lock = threading.Lock()
# (instruction set, reason why there is none), once decided.
_outcome: tuple[str | None, str | None] | None = None


def load() -> str | None:
    """The instruction set of the loaded extension, or None where there is none (see ``why_not``).

    The first call loads it, the others return what that one found. Raises ``ValueError`` if
    ``LORA_KERNELS_CPU_ISA`` names no instruction set, or one that this CPU does not have.
    """
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                _outcome = _load(DIRECTORY, os.environ.get(VARIABLE))
    return _outcome[0]


def why_not() -> str | None:
    """One line on why no extension is loaded; None if one is."""
    load()
    assert _outcome is not None
    return _outcome[1]


def available() -> tuple[str, ...]:
    """The instruction sets built for this torch that this CPU has, narrowest first."""
    info = _build_info(DIRECTORY)
    if info.get("torch") != torch.__version__:
        return ()
    return tuple(isa for isa in _supported() if isa in info["built"])


def _supported() -> tuple[str, ...]:
    # ATen's own judgement: ATEN_CPU_CAPABILITY, which holds its kernels back, holds ours back too.
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return ISAS
    return ISAS[:2] if capability == "AVX2" else ISAS[:1]


def _build_info(directory: Path) -> dict[str, Any]:
    """What setup.py wrote: ``built`` [isa], ``failed`` {isa: reason}, ``compiler``, ``torch``."""
    try:
        return json.loads((directory / "_build_info.json").read_text())
    except OSError:
        return {}


def _load(directory: Path, forced: str | None) -> tuple[str | None, str | None]:
    choices = (*_supported(), "none")
    if forced and forced not in choices:
        raise ValueError(f"{VARIABLE}={forced!r}: this CPU has the choice of {', '.join(choices)}")
    if forced == "none":
        return None, f"turned off by {VARIABLE}=none"

    info = _build_info(directory)
    if not info:
        return None, "the CPU extensions were not built: lora_kernels was never installed with pip"
    if info["built"] and info["torch"] != torch.__version__:
        return None, (
            f"the CPU extensions were built for torch {info['torch']} and this is torch "
            f"{torch.__version__}: install lora_kernels again"
        )

    wanted = [forced] if forced else [*reversed(_supported())]
    failures = {isa: info["failed"].get(isa, f"{isa} was not built") for isa in wanted}
    for isa in wanted:
        if isa in info["built"]:
            try:
                _load_library(directory / f"_C_{isa}.so")
            except Exception as error:  # of several types; the reference answers in its place
                failures[isa] = " ".join(str(error).split())
            else:
                return isa, None
    return None, "; ".join(dict.fromkeys(failures.values()))


def _load_library(path: Path) -> None:
    # Registering the operators twice ends the process, and the package may be imported twice.
    if hasattr(torch.ops.lora_kernels_cpu, "isa"):
        loaded = torch.ops.lora_kernels_cpu.isa()
        if path.name != f"_C_{loaded}.so":
            raise RuntimeError(f"the {loaded} extension is loaded in this process already")
        return
    torch.ops.load_library(str(path))
