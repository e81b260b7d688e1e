"""Which backend and plan answered the calls of operators, for whoever asks."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.problem import Problem
from .config import Config


class Answer(NamedTuple):
    """What answered one operator call: ``backend`` is "cpu", "cuda" or "reference"."""

    backend: str
    config: Config
    problem: Problem

    @property
    def op(self) -> str:
        return self.problem.op

    @property
    def plan(self) -> str:
        return self.config.plan


_last: Answer | None = None
_recorders: list[list[Answer]] = []
_watchers = 0

# Shared with a node of the graph that answers without Python: whether somebody asks who answers, or
# forces an answer (the node then calls the operators), and whether it has answered since an
# operator did.
_shared = torch.zeros(2, dtype=torch.int64, device="cpu")
_asked, _noted = (ctypes.c_int64.from_address(_shared.data_ptr() + 8 * i) for i in range(2))
_last_of_node: Callable[[], Answer] | None = None


def record(backend: str, config: Config, problem: Problem) -> None:
    """Each backend calls this once per operator call, before it computes."""
    global _last
    _last = Answer(backend, config, problem)
    _noted.value = 0
    for recorder in _recorders:
        recorder.append(_last)


def last_plan() -> Answer | None:
    """What answered the most recent operator call of this process, or None before the first.

    >>> import torch, lora_kernels as lk
    >>> x, w, a, b = (torch.ones(s) for s in ((2, 3), (4, 3), (1, 3), (4, 1)))
    >>> _ = lk.lora_linear(x, w, a, b)
    >>> lk.last_plan().op, lk.last_plan().backend, lk.last_plan().plan in ("native", "vendor")
    ('lora_linear_fwd', 'cpu', True)
    """
    if _noted.value and _last_of_node is not None:
        return _last_of_node()
    return _last


def share(last_of_node: Callable[[], Answer]) -> Tensor:
    """For a node that answers without Python: the cells that it reads and writes. ``last_of_node``
    tells what it answered last."""
    global _last_of_node
    _last_of_node = last_of_node
    return _shared


@contextlib.contextmanager
def asked() -> Iterator[None]:
    """Inside the block the node calls the operators, each of which is recorded."""
    global _watchers
    _watchers += 1
    _asked.value = 1
    try:
        yield
    finally:
        _watchers -= 1
        _asked.value = _watchers > 0


@contextlib.contextmanager
def record_plans() -> Iterator[list[Answer]]:
    """Collect an :class:`Answer` for every operator call inside the block, from all threads,
    backward included."""
    recorder: list[Answer] = []
    _recorders.append(recorder)
    try:
        with asked():
            yield recorder
    finally:
        # By identity: two recorders that hold equal answers are still two recorders.
        _recorders[:] = [other for other in _recorders if other is not recorder]
