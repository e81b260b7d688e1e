"""Memory of one step: what autograd keeps for the backward, and the most that is allocated."""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class SavedTensors:
    """Counts what autograd keeps: ``peak``, the most bytes of distinct storages saved at a time.

    Storages of ``apart`` (parameters, buffers) do not count: they are there anyway.
    """

    def __init__(self, apart: Iterable[Tensor]) -> None:
        self.peak = self.now = 0
        self._apart = {_storage(tensor) for tensor in apart}
        self._references: Counter[int] = Counter()
        self._hooks: Any = None

    def __enter__(self) -> SavedTensors:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: _Held(self, tensor), lambda held: held.tensor
        )
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
    # While the tensor lives, its storage's address is unique.
    return tensor.untyped_storage().data_ptr()


def step_peak(step: Callable[[], Any], device: str) -> int:
    """The most bytes that torch's allocator had out during ``step``, above those at its start."""
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # It reports its start and its end between the lines of a progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    assert recorded.profiler is not None
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda event: event[0]):
        now += change
        peak = max(peak, now)
    return peak
