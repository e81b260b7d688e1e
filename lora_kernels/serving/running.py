"""A batch from its entering to its end: its adapters held in their slots, copies ordered around it,
the layers told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers.batches import Batch, Owner, activate
from .slots import Hold, Resident, Slots
from .transfers import Transfers

# What says which adapter is meant: a name, or one version of it.
Key = str | Resident


class BatchContext:
    """For ``with``, which waits for slots, or ``async with``, in which the event loop goes on
    meanwhile; one at a time.

    Args:
        choose: what each key means now; called under the lock.
        make: the batch of what was chosen, whose adapters are in their slots.
    """

    def __init__(
        self,
        owner: Owner,
        slots: Slots,
        transfers: Transfers,
        timeout: float | None,
        choose: Callable[[], Mapping[Key, Resident]],
        make: Callable[[Mapping[Key, Resident]], Batch],
    ) -> None:
        self._owner, self._slots, self._transfers, self._timeout = owner, slots, transfers, timeout
        self._choose, self._make = choose, make
        self._chosen: Mapping[Key, Resident] = {}
        self._hold: Hold | None = None
        self._active: activate | None = None

    def _resolve(self) -> Sequence[Resident]:
        self._chosen = self._choose()
        return list(self._chosen.values())

    def __enter__(self) -> Batch:
        self._check_free()
        try:
            self._hold = self._slots.acquire(self._resolve, self._timeout)
            return self._begin()
        except BaseException:
            self._end()
            raise

    async def __aenter__(self) -> Batch:
        self._check_free()
        try:
            self._hold = await self._slots.acquire_in_task(self._resolve, self._timeout)
            return self._begin()
        except BaseException:
            self._end()
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._end()
        finally:
            self._end()

    async def __aexit__(self, *error: object) -> None:
        self.__exit__()

    def _check_free(self) -> None:
        if self._hold is not None:
            raise RuntimeError("this batch runs already: make another one with store.batch")

    def _begin(self) -> Batch:
        batch = self._make(self._chosen)
        with self._slots.lock:
            self._transfers.begin(self._places())
        self._active = activate(self._owner, batch)
        self._active.__enter__()
        return batch

    def _end(self) -> None:
        """Once is enough, and twice ends what an interruption of the first time left."""
        try:
            if self._active is not None:
                self._active.__exit__()
                self._active = None
            if self._hold is not None:
                with self._slots.lock:
                    self._transfers.end(self._places())
        finally:
            if self._hold is not None:
                self._slots.release(self._hold)
                self._hold = None

    def _places(self) -> list[int]:
        return [r.slot for r in self._chosen.values() if r.slot is not None]


def checked_names(names: Any, what: str) -> list[str | None]:
    if isinstance(names, str) or not all(n is None or isinstance(n, str) for n in names):
        raise TypeError(f"{what} must be a list of names and None, not {names!r}")
    return list(names)


def checked_rows(rows: Any, names: int) -> Tensor:
    where = torch.as_tensor(rows)
    if where.numel() == 0:
        where = where.to(torch.int64)
    if where.dim() != 1 or where.is_floating_point() or where.dtype == torch.bool:
        raise TypeError("rows with names must be one list of indices into these, -1 for none")
    if where.device.type == "cpu" and len(where):
        low, high = (int(value) for value in torch.aminmax(where))
        if low < -1 or high >= names:
            raise ValueError(f"rows has {low if low < -1 else high}, and there are {names} names")
    return where.to(torch.int64)
