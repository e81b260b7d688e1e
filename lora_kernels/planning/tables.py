"""Measured plans on disk.

One JSON file per device: {"device", "versions", "kernels", "date", "plans": {key: {"config",
"median_us"}}}.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..spec import native
from .config import Config
from .device import DeviceFacts


def cache_directory() -> Path:
    """Where tuned tables live: ``$LORA_KERNELS_CACHE``, else the platform's cache directory of the
    user."""
    chosen = os.environ.get("LORA_KERNELS_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "lora_kernels"


def table_name(facts: DeviceFacts) -> str:
    return (
        re.sub(r"[^a-z0-9]+", "-", f"{facts.kind}-{facts.name}-{facts.arch}".lower()).strip("-")
        + ".json"
    )


@functools.cache
def kernel_sources_hash(kind: str) -> str:
    """A hash of everything whose change makes a measurement on such a device stale: of a GPU the
    kernels and launchers as they lie in the package, of a CPU the kernels as they were built. So a
    checkout and a copy of it that is installed have the same."""
    package, cpu = Path(__file__).parent.parent, kind == "cpu"
    files = [package / "backends" / f"{name}.py" for name in ("cpu" if cpu else "cuda", "vendor")]
    if not cpu:
        files += sorted((package / "kernels").glob("*.py"))
    digest = hashlib.sha256(native.built_from().encode() if cpu else b"")
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def versions(kind: str) -> dict[str, str]:
    """Versions a measurement on such a device depends on; a table from others is ignored. On a GPU
    torch's build string is none: Triton compiles what a plan times."""
    if kind == "cpu":
        return {"torch": torch.__version__}
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {"triton": triton}


@functools.cache
def table(facts: DeviceFacts) -> dict[str, Config]:
    """The measured configurations for a device."""
    return read_table(cache_directory() / table_name(facts))


def read_table(path: Path) -> dict[str, Config]:
    """The plans of one table; empty if it does not exist or was measured with other versions or
    other kernels."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        kind = content["device"]["kind"]
        if content["versions"] != versions(kind) or content["kernels"] != kernel_sources_hash(kind):
            return {}
        return {key: Config(**entry["config"]) for key, entry in content["plans"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"the tuned plans in {path} cannot be read ({error!r}); heuristics answer", stacklevel=2
        )
        return {}


def write_table(path: Path, facts: DeviceFacts, measured: dict[str, dict[str, Any]]) -> None:
    """Write ``measured`` = {key: {"config": Config, ...}} whole and atomically, keeping other keys
    that still hold."""
    kept = {key: {"config": asdict(config)} for key, config in read_table(path).items()}
    new = {key: {**entry, "config": asdict(entry["config"])} for key, entry in measured.items()}
    content = {
        "device": asdict(facts),
        "versions": versions(facts.kind),
        "kernels": kernel_sources_hash(facts.kind),
        "plans": dict(sorted((kept | new).items())),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
