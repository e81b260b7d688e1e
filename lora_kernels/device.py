"""Facts about a machine, as plain data. Asked once per device; nothing here runs at import."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """``kind`` is torch's device type; ``arch`` the compute capability ("sm_90", "gfx942") or the
    CPU capability.

    ``processors`` are SMs, compute units or threads; ``shared_memory`` is the most one block may
    ask for, in bytes. Zero stands for unknown.
    """

    kind: str
    name: str
    arch: str
    processors: int = 0
    shared_memory: int = 0
    l2_bytes: int = 0
    memory_bytes: int = 0


def facts(device: torch.device | str) -> DeviceFacts:
    """The facts of one device. An unknown kind of device gets its name and nothing else, never an
    error."""
    device = torch.device(device)
    index: int | None = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    return _facts(device.type, index)


@functools.cache
def _facts(kind: str, index: int | None) -> DeviceFacts:
    if kind == "cpu":
        return DeviceFacts(
            kind="cpu",
            name=_cpu_name(),
            arch=torch.backends.cpu.get_cpu_capability().lower(),
            processors=torch.get_num_threads(),
        )
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip is not None:
            arch = properties.gcnArchName.split(":")[0]
        else:
            arch = f"sm_{properties.major}{properties.minor}"
        return DeviceFacts(
            kind="cuda",
            name=properties.name,
            arch=arch,
            processors=properties.multi_processor_count,
            shared_memory=getattr(properties, "shared_memory_per_block_optin", 0),
            l2_bytes=getattr(properties, "L2_cache_size", 0),
            memory_bytes=properties.total_memory,
        )
    return DeviceFacts(kind=kind, name=kind, arch="unknown")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
