"""Which adapter is in which slot: who may be evicted, who waits, what a running batch holds. Plain
bookkeeping; the copying is its caller's."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from .adapters import HostAdapter


class Resident:
    """An adapter under a name; a replacement is another one."""

    def __init__(self, name: str, host: HostAdapter) -> None:
        self.name, self.host = name, host
        self.slot: int | None = None
        # Batches that run with it.
        self.users = 0
        self.pinned = False
        self.last_used = 0
        # Whether its slot may hold newer values than the host.
        self.trained = False
        # Unloaded or replaced: its slot is free when its batches have ended.
        self.withdrawn = False


class Copies(Protocol):
    """What moves an adapter's tensors."""

    def fill(self, resident: Resident, slot: int) -> None:
        """Copy the host's values into the slot, which nobody uses."""

    def write_back(self, resident: Resident) -> None:
        """Copy the values of its slot to the host."""


class Slots:
    """Adapters in ``count`` slots, least recently used out first.

    One lock guards all of it. It is held while an adapter is copied into its slot, so that no batch
    begins with half of one, and not while files are read or a batch runs.
    """

    def __init__(self, count: int, copies: Copies) -> None:
        self.condition = threading.Condition(threading.RLock())
        # Whether nobody is evicted (while the adapters train).
        self.held = False
        self._copies = copies
        self._of_slot: list[Resident | None] = [None] * count
        self._clock = 0
        # Batches that wait, in the order of their arrival; and what each thread's batches hold.
        self._queue: deque[object] = deque()
        self._holds: dict[int, Counter[Resident]] = {}

    @property
    def count(self) -> int:
        return len(self._of_slot)

    def residents(self) -> list[Resident]:
        """Those in a slot, the least recently used first."""
        with self.condition:
            found = [resident for resident in self._of_slot if resident is not None]
            return sorted(found, key=lambda r: r.last_used)

    def free(self) -> int:
        return self._of_slot.count(None)

    @contextlib.contextmanager
    def holding(
        self, resolve: Callable[[], Sequence[Resident]], timeout: float | None
    ) -> Iterator[list[Resident]]:
        """The adapters that ``resolve`` names, each in a slot until the block is left.

        All of them get their slots at once, or none: two batches cannot each hold what the other
        one needs. A batch that does not fit waits for running ones to end, first come, first
        served.

        Raises:
            RuntimeError: waiting would not help.
            TimeoutError: it did not help for ``timeout`` seconds.
        """
        thread = threading.get_ident()
        residents = self._acquire(resolve, timeout)
        try:
            yield residents
        finally:
            self._release(residents, thread)

    @contextlib.contextmanager
    def holding_again(self, residents: Sequence[Resident], slots: Sequence[int]) -> Iterator[None]:
        """The adapters of a batch that may have ended, in the slots that they had.

        Raises:
            RuntimeError: one has been evicted or replaced since.
        """
        with self.condition:
            for resident, slot in zip(residents, slots, strict=True):
                if resident.slot != slot:
                    raise RuntimeError(
                        f"adapter {resident.name!r} has left its slot since its batch ended: pin "
                        "the adapters of a batch that is computed again in the backward pass"
                    )
            self._hold(residents)
        thread = threading.get_ident()
        try:
            yield
        finally:
            self._release(residents, thread)

    def _acquire(
        self, resolve: Callable[[], Sequence[Resident]], timeout: float | None
    ) -> list[Resident]:
        deadline = None if timeout is None else time.monotonic() + timeout
        ticket = object()
        with self.condition:
            # Behind whoever waits for this thread's own slots it would wait for itself.
            first = bool(self._holds.get(threading.get_ident()))
            try:
                while True:
                    residents = list(dict.fromkeys(resolve()))
                    my_turn = first or not self._queue or self._queue[0] is ticket
                    if my_turn and self._place(residents):
                        self._hold(residents)
                        return residents
                    self._check_that_waiting_helps(residents)
                    if ticket not in self._queue:
                        self._queue.append(ticket)
                    left = None if deadline is None else deadline - time.monotonic()
                    if left is not None and left <= 0 or not self.condition.wait(left):
                        raise TimeoutError(
                            f"no slots for {_names(residents)} within {timeout:g} seconds: all "
                            f"{self.count} are pinned or in use by running batches"
                        )
            finally:
                if ticket in self._queue:
                    self._queue.remove(ticket)
                    self.condition.notify_all()

    def _hold(self, residents: Sequence[Resident]) -> None:
        self._clock += 1
        holds = self._holds.setdefault(threading.get_ident(), Counter())
        for resident in residents:
            resident.users += 1
            resident.last_used = self._clock
            holds[resident] += 1

    def _release(self, residents: Sequence[Resident], thread: int) -> None:
        with self.condition:
            holds = self._holds[thread]
            for resident in residents:
                resident.users -= 1
                holds[resident] -= 1
                if not holds[resident]:
                    del holds[resident]
                if resident.withdrawn and not resident.users:
                    self._vacate(resident)
            if not holds:
                del self._holds[thread]
            self.condition.notify_all()

    def _evictable(self, besides: Sequence[Resident]) -> list[Resident]:
        if self.held:
            return []
        return [r for r in self.residents() if not (r.users or r.pinned or r in besides)]

    def _place(self, residents: Sequence[Resident]) -> bool:
        """Give a slot to each that has none, if that is possible for all."""
        wanting = [resident for resident in residents if resident.slot is None]
        evictable = self._evictable(residents)
        if len(wanting) > self.free() + len(evictable):
            return False
        for resident in wanting:
            if not self.free():
                self._evict(evictable.pop(0))
            self._fill(resident, self._of_slot.index(None))
        return True

    def _check_that_waiting_helps(self, residents: Sequence[Resident]) -> None:
        if len(residents) > self.count:
            raise RuntimeError(
                f"the batch uses {len(residents)} adapters, and the store has {self.count} slots"
            )
        own = self._holds.get(threading.get_ident(), Counter())
        others = [r for r in self._of_slot if r is not None and r not in residents]
        pinned = [r for r in others if r.pinned]
        nested = [r for r in others if r in own and not r.pinned]
        trained = [r for r in others if self.held and not (r.pinned or r.withdrawn or r in own)]
        wanting = sum(resident.slot is None for resident in residents)
        room = self.free() + len(others) - len(pinned) - len(nested) - len(trained)
        if wanting <= room:
            return
        reasons = [
            f"{_names(found)} {why}"
            for found, why in (
                (pinned, "pinned"),
                (nested, "in use by a batch around this one"),
                (trained, "training: nobody is evicted while the adapters require grad"),
            )
            if found
        ]
        raise RuntimeError(
            f"the batch needs {wanting} more of the store's {self.count} slots, of which {room} "
            f"can become free: {'; '.join(reasons)}"
        )

    def _fill(self, resident: Resident, slot: int) -> None:
        self._copies.fill(resident, slot)
        self._of_slot[slot] = resident
        resident.slot = slot
        resident.trained = self.held

    def _vacate(self, resident: Resident) -> None:
        assert resident.slot is not None
        self._of_slot[resident.slot] = None
        resident.slot = None

    def _evict(self, resident: Resident) -> None:
        if resident.trained:
            self._copies.write_back(resident)
        self._vacate(resident)

    def hold_all(self, held: bool) -> None:
        """``held``: from now on nobody is evicted, and slots may get newer values than the host."""
        with self.condition:
            self.held = held
            for resident in self.residents():
                resident.trained |= held

    def enter(self, resident: Resident) -> None:
        """Take a free slot, if there is one.

        Raises:
            RuntimeError: there is none, and nobody is evicted.
        """
        if self.free():
            self._fill(resident, self._of_slot.index(None))
        elif self.held:
            raise RuntimeError(
                f"no slot is free for {resident.name!r}, and nobody is evicted while the adapters "
                "require grad"
            )

    def replace(self, old: Resident, new: Resident) -> None:
        """``new`` takes the slot of ``old``, or while that is in use another one; on an error all
        is as it was, but that ``old`` may have left its slot.

        Raises:
            RuntimeError: ``old`` is pinned and in use, and its successor has nowhere to go.
        """
        slot = old.slot
        if slot is None:
            return
        if not old.users:
            self._evict(old)
            self._fill(new, slot)
        elif old.pinned or self.held:
            if not self._place([new, old]):
                raise RuntimeError(
                    f"{old.name!r} is in use and its successor must have a slot, but none is free"
                )
        elif self.free():
            self._fill(new, self._of_slot.index(None))
        new.pinned, new.last_used = old.pinned, old.last_used
        self._withdraw(old)

    def _withdraw(self, resident: Resident) -> None:
        """It has no name any more: its slot is free as soon as its batches have ended."""
        resident.pinned, resident.withdrawn = False, True
        if resident.slot is not None and not resident.users:
            self._vacate(resident)
        self.condition.notify_all()

    def leave(self, resident: Resident) -> None:
        """Unload an adapter.

        Raises:
            RuntimeError: it is pinned or in use.
        """
        if resident.pinned:
            raise RuntimeError(f"adapter {resident.name!r} is pinned: unpin it first")
        if resident.users:
            raise RuntimeError(
                f"adapter {resident.name!r} is in use by {resident.users} running batches"
            )
        self._withdraw(resident)


def _names(residents: Sequence[Resident]) -> str:
    return ", ".join(repr(resident.name) for resident in residents)
