"""Finds and loads the CPU extension: the widest instruction set that was built and this CPU has.

The extensions all define the same operators, ``torch.ops.lora_kernels_cpu.*``, so that a process
loads one of them, at first use. ``LORA_KERNELS_CPU_ISA`` in {baseline, avx2, avx512, avx512_bf16,
brgemm, none} chooses it for a test. The names from avx512 on share one extension and differ in what
multiplies pairs of bfloat16.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import torch

# Narrowest first.
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "brgemm")
# The AVX-512 extension's products of bfloat16: each half as a float, AVX512-BF16's instruction, and
# ATen's brgemm, which is AMX where the CPU has it.
_PRODUCTS = {"avx512": "float", "avx512_bf16": "dot", "brgemm": "brgemm"}
VARIABLE = "LORA_KERNELS_CPU_ISA"
DIRECTORY = Path(__file__).parent.parent

_lock = threading.Lock()
# (instruction set, reason why there is none), once decided.
_outcome: tuple[str | None, str | None] | None = None


def load() -> str | None:
    """The instruction set that answers, or None where no extension is loaded (see ``why_not``).

    The first call loads it, the others return what that one found. It warns where there is none,
    unless that was asked for. Raises ``ValueError`` if ``LORA_KERNELS_CPU_ISA`` names no
    instruction set, or one that this CPU does not have.
    """
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                forced = os.environ.get(VARIABLE) or None
                _outcome = isa, reason = _load(DIRECTORY, forced)
                if isa is None and forced != "none":
                    warnings.warn(
                        "lora_kernels has no native CPU kernels and PyTorch computes in their "
                        f"place, more slowly: {reason}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
    return _outcome[0]


def why_not() -> str | None:
    """One line on why no extension is loaded; None if one is."""
    load()
    assert _outcome is not None
    return _outcome[1]


def available() -> tuple[str, ...]:
    """The instruction sets built for this torch that this CPU has, narrowest first."""
    info = _build_info(DIRECTORY)
    if not _fits(info):
        return ()
    return tuple(isa for isa in _supported() if _extension(isa) in info["built"])


def built_from() -> str:
    """A hash of the sources and flags that the extensions for this torch were built from; "" where
    there are none."""
    info = _build_info(DIRECTORY)
    return info.get("sources", "") if info.get("built") and _fits(info) else ""


def _fits(info: dict[str, Any]) -> bool:
    return info.get("torch") == torch.__version__


def _supported() -> tuple[str, ...]:
    # ATen's own judgement: ATEN_CPU_CAPABILITY, which holds its kernels back, holds ours back too.
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        # Not among what torch promises to keep.
        dots = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return ISAS if dots else ISAS[:3]
    return ISAS[:2] if capability == "AVX2" else ISAS[:1]


def _extension(isa: str) -> str:
    """The name of the extension that serves an instruction set."""
    return "avx512" if isa in _PRODUCTS else isa


def _in_use() -> str:
    """What the extension that this process has loaded computes with."""
    extension = torch.ops.lora_kernels_cpu.isa()
    if extension != "avx512":
        return extension
    product = torch.ops.lora_kernels_cpu.bfloat16_product()
    return next(isa for isa in _PRODUCTS if _PRODUCTS[isa] == product)


def _build_info(directory: Path) -> dict[str, Any]:
    """What setup.py wrote: ``built`` [isa], ``failed`` {isa: reason}, ``compiler``, ``torch``,
    ``sources``."""
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
        return None, (
            f"{directory} holds the sources alone: start Python in another folder, where it finds "
            "the installed package, or install with pip install --no-build-isolation -e"
        )
    if info["built"] and not _fits(info):
        return None, (
            f"the CPU extensions were built for torch {info['torch']} and this is torch "
            f"{torch.__version__}: build them again, with pip install --no-build-isolation "
            "--force-reinstall --no-deps and what lora_kernels was installed from"
        )

    wanted = [forced] if forced else [*reversed(_supported())]
    failures: dict[str, str] = {}
    for extension in dict.fromkeys(map(_extension, wanted)):
        failures[extension] = info["failed"].get(extension, f"{extension} was not built")
        if extension in info["built"]:
            try:
                return _load_extension(directory, extension, forced), None
            except ValueError:
                raise
            except Exception as error:  # of several types; the reference computes instead
                failures[extension] = " ".join(str(error).split())
    return None, "; ".join(dict.fromkeys(failures.values()))


def _load_extension(directory: Path, extension: str, forced: str | None) -> str:
    """Load one extension and say what it computes with: ``forced``, or what it finds best."""
    operators = torch.ops.lora_kernels_cpu
    # Registering the operators twice ends the process, and the package may be imported twice. What
    # another import computes with is not changed either.
    if hasattr(operators, "isa"):
        if operators.isa() != extension or forced not in (None, _in_use()):
            raise RuntimeError(f"the {_in_use()} extension is loaded in this process already")
        return _in_use()
    torch.ops.load_library(str(directory / f"_C_{extension}.so"))
    if forced in _PRODUCTS and not operators.set_bfloat16_product(_PRODUCTS[forced]):
        raise ValueError(f"{VARIABLE}={forced!r}: this CPU has no AVX512-BF16")
    return _in_use()
