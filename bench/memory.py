"""How memory is counted: what autograd saves, a step's peak, and the resident set."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class SavedTensors:
    """Counts what autograd keeps: ``peak``, the most bytes of distinct storages saved at a time.

    Storages of ``apart`` (parameters, buffers) do not count: they are there anyway.
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        self.peak = self.now = 0
        self._apart = {_storage(tensor) for tensor in apart}
        self._references: Counter[int] = Counter()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Held(self, tensor), lambda held: held.tensor
        )

    def __enter__(self) -> SavedTensors:
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

    def __init__(self, counter: SavedTensors, tensor: Tensor) -> None:
        self.counter, self.tensor = counter, tensor
        # Taken now: an in-place change of the tensor's storage must not move it to another key.
        self.storage, self.size = _storage(tensor), tensor.untyped_storage().nbytes()
        counter.take(self.storage, self.size)

    def __del__(self) -> None:
        self.counter.release(self.storage, self.size)


def _storage(tensor: Tensor) -> int:
    # While somebody holds the tensor, its storage's address is nobody else's.
    return tensor.untyped_storage().data_ptr()


def step_peak(step: Callable[[], Any], device: str) -> int:
    """The most bytes that torch's allocator had out during ``step``, above those at its start."""
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


class Resident:
    """What this process's resident set has grown by at most since the construction."""

    def __init__(self) -> None:
        gc.collect()
        # Linux: the high-water mark starts again from here; where that is not allowed it stays.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _resident_set("VmRSS")

    def grown(self) -> int | None:
        """Bytes; None where the system does not tell."""
        peak = _resident_set("VmHWM")
        return None if peak is None or self._before is None else peak - self._before


def _resident_set(field: str) -> int | None:
    """Bytes: "VmRSS", the resident set, or "VmHWM", the most it was."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    # Only the maximum is told, in bytes on macOS and in KiB elsewhere.
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024
