"""Processes that are measured against each other: started apart, they take turns on the machine.

Nothing here imports torch: the process that waits for the others stays small.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any, NamedTuple

# Started anew, not forked: no process inherits another's threads, memory or device.
CONTEXT = multiprocessing.get_context("spawn")


class UserError(Exception):
    """Something that the user must change; the message says what, and is all that is shown."""


class Turns:
    """Processes that each wait for the others, take turns, and stop at the same step.

    The first of them decides, at the end of a turn, when the time is over; it is ahead of the
    others by no more than that turn, so they can still stop where it did.
    """

    def __init__(self, parties: int, limit_s: float, steps_per_turn: int = 4) -> None:
        self.limit_s = limit_s
        self.steps_per_turn = steps_per_turn
        self._all = CONTEXT.Barrier(parties)
        self._machine = CONTEXT.Lock()
        self._gates = [CONTEXT.Semaphore(0) for _ in range(parties)]
        self._last_step = CONTEXT.Value("i", 0)

    def begin(self, party: int) -> None:
        """Wait until all are ready and it is this one's turn."""
        if self._all.wait() == 0:
            self._gates[0].release()
        self._gates[party].acquire()
        self._began = time.perf_counter()

    def step_done(self, party: int, step: int) -> bool:
        """Called after each step; at the end of a turn waits for the next. Whether to stop."""
        if step % self.steps_per_turn:
            return False
        if party == 0 and time.perf_counter() - self._began > self.limit_s:
            self._last_step.value = step
        if step == self._last_step.value:
            return True
        self._pass_on(party)
        self._gates[party].acquire()
        return False

    def end(self, party: int) -> None:
        """Called once after the last step; waits until all have come to theirs."""
        self._pass_on(party)
        self._all.wait()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What a process does after ``end``, while no other is here: two at once would crawl."""
        with self._machine:
            yield

    def _pass_on(self, party: int) -> None:
        self._gates[(party + 1) % len(self._gates)].release()


class Call(NamedTuple):
    """A call of a function by name, "package.module:function"."""

    function: str
    arguments: tuple[Any, ...] = ()


def run_together(
    calls: Sequence[Call], environment: Mapping[str, str], seconds: float | None = None
) -> list[Any]:
    """Make each call in a process of its own, all at the same time; returns their results in order.

    Raises:
        UserError: a call raised it.
        RuntimeError: a call raised something else (its traceback has been printed), took more than
            ``seconds``, or its process ended. The other processes are then stopped.
    """
    processes = []
    waiting: dict[Any, int] = {}
    results: list[Any] = [None] * len(calls)
    end = None if seconds is None else time.monotonic() + seconds
    try:
        for index, call in enumerate(calls):
            receiver, sender = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=_answer, args=(call, sender), daemon=True)
            with _environment(environment):
                process.start()
            sender.close()
            processes.append(process)
            waiting[receiver] = index
        while waiting:
            left = None if end is None else max(end - time.monotonic(), 0.0)
            ready: list[Any] = connection.wait(list(waiting), left)
            if not ready:
                raise RuntimeError(f"not done after {seconds:.0f} s")
            for receiver in ready:
                index = waiting.pop(receiver)
                try:
                    results[index], error = receiver.recv()
                except EOFError:
                    processes[index].join()
                    code = processes[index].exitcode
                    raise RuntimeError(
                        f"the process of {calls[index].function} ended with exit code {code}"
                    ) from None
                if error is not None:
                    raise error
    finally:
        for process in processes:
            # With its result sent, a process has nothing left to do but to exit.
            process.join(0 if waiting else 10)
            process.terminate()
            process.join()
    return results


def _answer(call: Call, sender: Any) -> None:
    try:
        module, _, name = call.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        sender.send((function(*call.arguments), None))
    except UserError as error:
        sender.send((None, error))
    except KeyboardInterrupt:
        # The user stopped the parent, too, and it is the parent that says so.
        pass
    except Exception as error:
        traceback.print_exc()
        told = f"{call.function} failed: {type(error).__name__}: {error}"
        sender.send((None, RuntimeError(told[:800])))


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the processes started inside; this one's are then as they were."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
