"""Which backend and plan answered the calls of operators."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import NamedTuple

import torch

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


# The arguments of the last call of record: an Answer is made where one is read.
_last: tuple[str, Config, Problem] | None = None
_recorders: list[list[Answer]] = []

# How many recorders and forced plans are active. The C++ node reads it in place: its backward then
# calls the operators, each of which is recorded.
watchers = torch.zeros(1, dtype=torch.int64, device="cpu")
_count = ctypes.c_int64.from_address(watchers.data_ptr())


def record(backend: str, config: Config, problem: Problem) -> None:
    """Each backend calls this once per operator call, before it computes."""
    global _last
    _last = backend, config, problem
    for recorder in _recorders:
        recorder.append(Answer(*_last))


def last_plan() -> Answer | None:
    """What answered the most recent operator call of this process, or None before the first.

    A backward on a CPU whose forward and backward the native plan answers is not recorded, and the
    call before it is then reported; :func:`record_plans` records the backward too.

    >>> import torch, lora_kernels as lk
    >>> x, w, a, b = (torch.ones(s) for s in ((2, 3), (4, 3), (1, 3), (4, 1)))
    >>> _ = lk.lora_linear(x, w, a, b)
    >>> lk.last_plan().op, lk.last_plan().backend, lk.last_plan().plan in ("native", "vendor")
    ('lora_linear_fwd', 'cpu', True)
    """
    return None if _last is None else Answer(*_last)


@contextlib.contextmanager
def asked() -> Iterator[None]:
    """Inside the block every operator call of a backward is recorded."""
    _count.value += 1
    try:
        yield
    finally:
        _count.value -= 1


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
