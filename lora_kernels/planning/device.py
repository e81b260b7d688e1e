"""Facts about a machine, as plain data. Asked once per device; nothing here runs at import."""

from __future__ import annotations

import functools
import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..spec import native


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """``kind`` is torch's device type; ``arch`` the compute capability ("sm_90", "gfx942") or the
    CPU capability.

    ``processors`` are SMs, compute units or threads; ``shared_memory`` is the most one block may
    ask for, in bytes; ``half_flops`` and ``bandwidth`` are the datasheet's kind of peak, per
    second; ``triton`` is whether Triton can be imported; ``native`` is the instruction set of the
    CPU extension that is loaded, or empty. Zero means unknown.
    """

    kind: str
    name: str
    arch: str
    processors: int = 0
    shared_memory: int = 0
    l2_bytes: int = 0
    memory_bytes: int = 0
    half_flops: float = 0.0
    bandwidth: float = 0.0
    triton: bool = True
    native: str = ""


# Half-precision FLOP per clock and multiprocessor, dense, from the vendors' data sheets.
_HALF_FLOPS_PER_CLOCK = {"sm_80": 2048, "sm_90": 4096, "sm_100": 8192, "gfx942": 2048}


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
            native=native.load() or "",
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
            half_flops=_HALF_FLOPS_PER_CLOCK.get(arch, 1024)
            * properties.multi_processor_count
            * getattr(properties, "clock_rate", 1_500_000)
            * 1e3,
            bandwidth=_bandwidth(properties),
            triton=importlib.util.find_spec("triton") is not None,
        )
    return DeviceFacts(kind=kind, name=kind, arch="unknown")


def _bandwidth(properties: Any) -> float:
    """Bytes per second at two transfers a clock; where torch does not say, a middling 2 TB/s."""
    clock_khz = getattr(properties, "memory_clock_rate", 0)
    width_bits = getattr(properties, "memory_bus_width", 0)
    return 2.0 * clock_khz * 1e3 * width_bits / 8 or 2e12


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
