"""Which adapter is in which slot: who may be evicted, who waits, what a running batch holds. Plain
bookkeeping; the copying is its caller's.

An interruption may come between any two lines. So each fact has one place, which one statement
changes, and a batch's or a caller's hold is an object, which ends it when it is deleted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from .adapters import HostAdapter

# An interrupted holder of slots wakes no waiter up, so waiters look again after so long.
_POLL_S = 1.0


class UnknownAdapterError(KeyError, ValueError):
    """There is no adapter of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class Resident:
    """An adapter under a name; a replacement is another one."""

    def __init__(self, name: str, host: HostAdapter) -> None:
        self.name, self.host = name, host
        self.pinned = False
        self.last_used = 0
        # Whether its slot may hold newer values than the host.
        self.trained = False
        # Running batches, and callers that want this version whatever its name means meanwhile.
        self.holds: weakref.WeakSet[Hold] = weakref.WeakSet()
        self.versions: weakref.WeakSet[_Grip] = weakref.WeakSet()
        # The table of the slots that it was put into.
        self._slot_of: dict[Resident, int] = {}

    @property
    def slot(self) -> int | None:
        return self._slot_of.get(self)

    @property
    def users(self) -> int:
        """How many running batches use it."""
        return len(self.holds)


class _Grip:
    """A caller's hold of a version: it lasts as long as this object."""


class HeldAdapter(str):
    """The name of an adapter that means one version of it, until :meth:`release`, the end of a
    ``with`` block, or the object's own end; :meth:`AdapterStore.hold` makes it."""

    slots: Slots
    _resident: Resident | None
    _grip: _Grip | None

    @classmethod
    def of(cls, resident: Resident, slots: Slots) -> HeldAdapter:
        self = cls(resident.name)
        self._resident, self._grip, self.slots = resident, _Grip(), slots
        resident.versions.add(self._grip)
        return self

    @property
    def resident(self) -> Resident | None:
        return self._resident

    def release(self) -> None:
        """Let go of the version; once is enough."""
        self._resident = self._grip = None

    def __enter__(self) -> HeldAdapter:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"the hold of adapter {str(self)!r} is of this process: it has no copies")


class Hold:
    """What a running batch keeps in its slots, until it is released or its own end."""

    def __init__(self, residents: Sequence[Resident]) -> None:
        self.residents = residents
        self.thread = threading.get_ident()


# The holds of the batches around: of this thread, or of this task of an event loop.
_AROUND: ContextVar[tuple[weakref.ref[Hold], ...]] = ContextVar("lora_kernels_around", default=())


class Copies(Protocol):
    """What moves an adapter's tensors."""

    def fill(self, resident: Resident, slot: int) -> None:
        """Copy the host's values into the slot, which no batch uses."""

    def write_back(self, resident: Resident) -> None:
        """Copy the values of its slot to the host."""


class _Ticket:
    """A batch's place in the queue."""

    _numbers = itertools.count()

    def __init__(self, wake: Callable[[], object] | None = None) -> None:
        self.number, self.thread, self.wake = next(self._numbers), threading.get_ident(), wake


class Slots:
    """Adapters in ``count`` slots, least recently used out first.

    One lock guards all of it. It is held while an adapter is copied into its slot, so that no batch
    begins with half of one, and not while files are read or a batch runs.
    """

    def __init__(self, count: int, copies: Copies) -> None:
        # Entered by itself, not through the condition, whose methods can be interrupted.
        self.lock = threading.RLock()
        self._condition = threading.Condition(self.lock)
        self.count = count
        # The adapter that each name means.
        self.named: dict[str, Resident] = {}
        # Whether eviction is off (while the adapters train).
        self.held = False
        self._copies = copies
        self._slot_of: dict[Resident, int] = {}
        self._clock = 0
        # Batches that wait.
        self._queue: weakref.WeakSet[_Ticket] = weakref.WeakSet()

    def residents(self) -> list[Resident]:
        """The adapters in a slot, the least recently used first."""
        with self.lock:
            return sorted(self._slot_of, key=lambda r: (r.last_used, self._slot_of[r]))

    def is_named(self, resident: Resident) -> bool:
        """Whether it has not been unloaded or replaced."""
        return self.named.get(resident.name) is resident

    def free(self) -> int:
        return self.count - len(self._slot_of)

    def acquire(self, resolve: Callable[[], Sequence[Resident]], timeout: float | None) -> Hold:
        """Hold the adapters that ``resolve`` names, each in a slot.

        All of them get their slots at once, or none: two batches cannot each hold what the other
        one needs. A batch that does not fit waits for running ones to end, first come, first
        served.

        Raises:
            RuntimeError: waiting would not help.
            TimeoutError: it did not help for ``timeout`` seconds.
        """
        deadline = _deadline(timeout)
        ticket = _Ticket()
        with self.lock:
            try:
                while (hold := self._attempt(ticket, resolve, blocks=True)) is None:
                    self._condition.wait(self._wait_s(resolve, deadline, timeout))
                return hold
            finally:
                self._leave_queue(ticket)

    async def acquire_in_task(
        self, resolve: Callable[[], Sequence[Resident]], timeout: float | None
    ) -> Hold:
        """:meth:`acquire` for a task of an event loop, which goes on meanwhile."""
        deadline = _deadline(timeout)
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        ticket = _Ticket(lambda: loop.call_soon_threadsafe(woken.set))
        try:
            while True:
                with self.lock:
                    woken.clear()
                    hold = self._attempt(ticket, resolve, blocks=False)
                    if hold is not None:
                        return hold
                    wait_s = self._wait_s(resolve, deadline, timeout)
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(woken.wait(), wait_s)
        finally:
            self._leave_queue(ticket)

    def release(self, hold: Hold) -> None:
        """End what :meth:`acquire` began; once is enough."""
        with self.lock:
            for resident in hold.residents:
                resident.holds.discard(hold)
            hold.residents = ()
            self._sweep()
            self.wake()

    @contextlib.contextmanager
    def holding(
        self, resolve: Callable[[], Sequence[Resident]], timeout: float | None
    ) -> Iterator[Sequence[Resident]]:
        """:meth:`acquire`, until the block is left."""
        hold = self.acquire(resolve, timeout)
        try:
            yield hold.residents
        finally:
            self.release(hold)

    @contextlib.contextmanager
    def holding_again(self, residents: Sequence[Resident], slots: Sequence[int]) -> Iterator[None]:
        """The adapters of a batch that may have ended, in the slots that they had.

        Raises:
            RuntimeError: one has been evicted or replaced since.
        """
        with self.lock:
            for resident, slot in zip(residents, slots, strict=True):
                if resident.slot != slot:
                    raise RuntimeError(
                        f"adapter {resident.name!r} has left its slot since its batch ended: pin "
                        "the adapters of a batch that is computed again in the backward pass"
                    )
            hold = self._hold(residents)
        try:
            yield
        finally:
            self.release(hold)

    def wake(self) -> None:
        """Let those that wait look again."""
        with self.lock:
            self._condition.notify_all()
            for ticket in self._queue:
                if ticket.wake is not None:
                    # A loop that was closed waits for nothing.
                    with contextlib.suppress(RuntimeError):
                        ticket.wake()

    def _attempt(
        self, ticket: _Ticket, resolve: Callable[[], Sequence[Resident]], blocks: bool
    ) -> Hold | None:
        """The hold, or None: the ticket is in the queue. ``blocks``: the thread will wait, and
        nothing else happens in it meanwhile."""
        self._sweep()
        residents = list(dict.fromkeys(resolve()))
        around = {r for ref in _AROUND.get() if (hold := ref()) for r in hold.residents}
        before = [other for other in self._queue if other.number < ticket.number]
        # A thread that holds slots already skips the queue: behind those that wait for its slots it
        # would wait for itself.
        if (around or not before) and self._place(residents):
            return self._hold(residents)
        stuck: set[Resident] = set()
        if blocks:
            if any(other.thread == ticket.thread for other in before) and not around:
                raise RuntimeError(f"the slots go first to another task of {_IN_LOOP}")
            stuck = {
                resident
                for resident in self._slot_of
                if any(hold.thread == ticket.thread for hold in resident.holds)
            }
        self._check_that_waiting_helps(residents, around, stuck - around)
        self._queue.add(ticket)
        return None

    def _wait_s(
        self,
        resolve: Callable[[], Sequence[Resident]],
        deadline: float | None,
        timeout: float | None,
    ) -> float:
        left = _POLL_S if deadline is None else deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(
                f"no slots for {_names(resolve())} within {timeout:g} seconds: all {self.count} "
                "are pinned or in use by running batches"
            )
        return min(left, _POLL_S)

    def _leave_queue(self, ticket: _Ticket) -> None:
        with self.lock:
            if ticket in self._queue:
                self._queue.discard(ticket)
                self.wake()

    def _hold(self, residents: Sequence[Resident]) -> Hold:
        self._clock += 1
        hold = Hold(residents)
        for resident in residents:
            resident.last_used = self._clock
            resident.holds.add(hold)
        around = (ref for ref in _AROUND.get() if (other := ref()) and other.residents)
        _AROUND.set((*around, weakref.ref(hold)))
        return hold

    def _sweep(self) -> None:
        """Free the slots of adapters without a name and without a hold."""
        for resident in list(self._slot_of):
            if not (self.is_named(resident) or resident.holds or resident.versions):
                self._vacate(resident)

    def _is_pinned(self, resident: Resident) -> bool:
        return resident.pinned and self.is_named(resident)

    def _evictable(self, besides: Sequence[Resident]) -> list[Resident]:
        if self.held:
            return []
        return [r for r in self.residents() if not (r.holds or self._is_pinned(r) or r in besides)]

    def _place(self, residents: Sequence[Resident]) -> bool:
        """Give a slot to each that has none, if that is possible for all."""
        wanting = [resident for resident in residents if resident.slot is None]
        evictable = self._evictable(residents)
        if len(wanting) > self.free() + len(evictable):
            return False
        for resident in wanting:
            if not self.free():
                self._evict(evictable.pop(0))
            self._fill(resident, self._free_slot())
        return True

    def _free_slot(self) -> int:
        return min(set(range(self.count)) - set(self._slot_of.values()))

    def _check_that_waiting_helps(
        self, residents: Sequence[Resident], around: set[Resident], stuck: set[Resident]
    ) -> None:
        """``stuck``: those whose batches cannot end while this thread waits."""
        if len(residents) > self.count:
            raise RuntimeError(
                f"the batch uses {len(residents)} adapters, and the store has {self.count} slots"
            )
        others = [r for r in self._slot_of if r not in residents]
        others.sort(key=self._slot_of.__getitem__)
        pinned = [r for r in others if self._is_pinned(r)]
        nested = [r for r in others if r in around and r not in pinned]
        waiting = [r for r in others if r in stuck and r not in pinned]
        trained = [
            r
            for r in others
            if self.held and (self.is_named(r) or r.versions)
            if not (r in pinned or r in nested or r in waiting)
        ]
        wanting = sum(resident.slot is None for resident in residents)
        room = self.free() + len(others) - len(pinned + nested + waiting + trained)
        if wanting <= room:
            return
        reasons = [
            f"{_names(found)} {why}"
            for found, why in (
                (pinned, "pinned"),
                (nested, "in use by a batch around this one"),
                (waiting, f"in use by another task of {_IN_LOOP}"),
                (trained, "training: no adapter is evicted while they require grad"),
            )
            if found
        ]
        raise RuntimeError(
            f"the batch needs {wanting} more of the store's {self.count} slots, of which {room} "
            f"can become free: {'; '.join(reasons)}"
        )

    def _fill(self, resident: Resident, slot: int) -> None:
        self._copies.fill(resident, slot)
        resident.trained = self.held
        resident._slot_of = self._slot_of
        self._slot_of[resident] = slot

    def _vacate(self, resident: Resident) -> None:
        del self._slot_of[resident]

    def _evict(self, resident: Resident) -> None:
        if resident.trained:
            self._copies.write_back(resident)
        self._vacate(resident)

    def hold_all(self, held: bool) -> None:
        """``held``: from now on eviction is off, and slots may get newer values than the host."""
        with self.lock:
            self.held = held
            for resident in self.residents():
                resident.trained |= held

    def enter(self, resident: Resident) -> None:
        """Give ``resident`` its name, and a slot if one is free.

        If the name has a resident, its slot is the newcomer's, or while that is in use another one;
        on an error all is as it was, but that the predecessor may have left its slot.

        Raises:
            RuntimeError: eviction is off and no slot is free; or the predecessor is pinned and in
                use, and there is no slot for its successor.
        """
        old = self.named.get(resident.name)
        self._sweep()
        if old is not None and old.slot is not None:
            self._place_successor(old, resident, old.slot)
        elif old is None and self.free():
            self._fill(resident, self._free_slot())
        elif old is None and self.held:
            raise RuntimeError(
                f"no slot is free for {resident.name!r}, and no adapter is evicted while they "
                "require grad"
            )
        self.named[resident.name] = resident
        self._sweep()
        self.wake()

    def _place_successor(self, old: Resident, new: Resident, slot: int) -> None:
        if not (old.holds or self.held and old.versions):
            self._evict(old)
            self._fill(new, slot)
        elif old.pinned or self.held:
            if not self._place([new, old]):
                raise RuntimeError(
                    f"{old.name!r} is in use and its successor must have a slot, but none is free"
                )
        elif self.free():
            self._fill(new, self._free_slot())
        new.pinned, new.last_used = old.pinned, old.last_used

    def leave(self, resident: Resident) -> None:
        """Take the name from ``resident``.

        Raises:
            RuntimeError: it is pinned, in use or held.
        """
        name = repr(resident.name)
        if resident.pinned:
            raise RuntimeError(f"adapter {name} is pinned: unpin it first")
        if resident.users:
            raise RuntimeError(f"adapter {name} is in use by {resident.users} running batches")
        if resident.versions:
            raise RuntimeError(
                f"adapter {name} is held by {len(resident.versions)} callers or requests"
            )
        del self.named[resident.name]
        self._sweep()
        self.wake()


_IN_LOOP = (
    "this thread's event loop, which could not go on while this one waits: use "
    "`async with store.batch(...)`"
)


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _names(residents: Sequence[Resident]) -> str:
    return ", ".join(repr(resident.name) for resident in residents)
