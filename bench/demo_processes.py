"""The demo's processes: what they must agree on, how they take turns, and how they are run.

Nothing here imports torch: a wrong argument is told at once, and the process that waits for the
others stays small.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .demo_text import UserError

OURS, PEFT = "lora_kernels", "PEFT"

# Started anew, not forked: no process inherits another's threads, memory or device.
CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Settings:
    """Everything that the processes must agree on."""

    model: str | None
    train_text: str
    held_out_text: str
    pretraining_text: str
    out: Path
    prompt: str
    # Of the model that is made, None: by the device; a model of the user's has its own.
    layers: int | None
    width: int | None
    context: int
    batch: int
    pretrain_seconds: float
    pretrain_batch: int | None
    pretrain_learning_rate: float | None
    steps: int
    finetune_seconds: float
    learning_rate: float
    rank: int
    alpha: float
    dropout: float
    evaluation_blocks: int
    generated_tokens: int
    # package -> its text to train an adapter on, and what is held out of it
    packages: dict[str, tuple[str, str]]
    package_steps: int
    package_seconds: float
    served_tokens: int
    stream_batches: int
    dtype: str
    seed: int

    @property
    def base(self) -> str:
        """Where the base model that gets adapted is loaded from."""
        return self.model or str(self.out / "base")

    @property
    def initial_adapter(self) -> Path:
        """The untrained adapter that every library starts from."""
        return self.out / "initial-adapter"

    @property
    def adapter(self) -> Path:
        return self.out / "adapter"

    @property
    def adapters(self) -> Path:
        """One for each package."""
        return self.out / "adapters"


class Turns:
    """Training processes that each wait for the others, take turns, and stop at the same step.

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
        """Wait until all are ready to train and it is this one's turn."""
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


@dataclass(frozen=True)
class Call:
    """A call of a function by name, in ``bench.demo_stages`` or another module of ``bench``."""

    stage: str
    arguments: tuple[Any, ...]
    module: str = "demo_stages"


def run_together(calls: list[Call], environment: Mapping[str, str]) -> list[Any]:
    """Make each call in a process of its own, all at the same time; returns their results in order.

    Raises:
        UserError: a call raised it.
        RuntimeError: a call raised something else, which has been printed, or its process ended.
        The other processes are then stopped.
    """
    processes = []
    ready: Any
    waiting: dict[Any, int] = {}
    results: list[Any] = [None] * len(calls)
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
            for ready in connection.wait(list(waiting)):
                index = waiting.pop(ready)
                try:
                    results[index], error = ready.recv()
                except EOFError:
                    processes[index].join()
                    code = processes[index].exitcode
                    raise RuntimeError(
                        f"the process of {calls[index].stage} ended with exit code {code}"
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


def _answer(call: Call, sender: Connection) -> None:
    try:
        stage = getattr(importlib.import_module(f".{call.module}", __package__), call.stage)
        sender.send((stage(*call.arguments), None))
    except UserError as error:
        sender.send((None, error))
    except KeyboardInterrupt:
        # The user stopped the parent, too, and it is the parent that says so.
        pass
    except Exception:
        traceback.print_exc()
        sender.send((None, RuntimeError(f"{call.stage} failed, see above")))


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
