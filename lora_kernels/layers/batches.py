"""The active batch: which adapter each row of a model call uses, and how layers find it, in a
recomputation too."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..spec.segments import SegmentTable

# Of one batch and kind of layer: more numbers of rows than a generation without a cache has at a
# time are made again.
_MOST_TABLES = 64


def _nothing() -> None:
    return None


class Owner:
    """What a store and the layers that it inserted have in common.

    A deep copy or a pickle of the layers gets an owner of its own, and with it no batches.
    """

    def __init__(self) -> None:
        # Whether a batch was ever active: before that, what is recomputed is the base model.
        self.batched = False
        # A weak reference to the store's ``hold``, for what serves requests step by step.
        self.hold: Callable[[], Callable[[str], Any] | None] = _nothing
        # The blocks that have a batch now; and whether this thread ever had one.
        self._running: weakref.WeakSet[Any] = weakref.WeakSet()
        self._thread = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return Owner, ()

    def enter(self, block: object) -> None:
        self.batched = self._thread.entered = True
        self._running.add(block)

    def leave(self, block: object) -> None:
        self._running.discard(block)

    def check_thread(self) -> None:
        """Raise RuntimeError if this thread may have been meant to have another one's batch."""
        if self._running and not getattr(self._thread, "entered", False):
            raise RuntimeError(
                "this thread was given no batch, while batches run in other ones; a thread, or an "
                "executor, does not take along the batch in which it is started. Give it "
                "store.bind(function), or for the base model enter store.batch([None]) in it"
            )


class Adapter(NamedTuple):
    """What a batch knows of one of its adapters."""

    name: str
    slot: int
    # path of a layer -> (rank, scale)
    layers: Mapping[str, tuple[int, float]]
    dropout_p: float
    use_dora: bool = False


@dataclass(eq=False)
class _Kind:
    """The ranks and scales that some layers have in common, and their tables."""

    rank_of_slot: list[int]
    scale_of_slot: list[float]
    # For every slot, and at the end for rows of -1.
    is_dora: list[bool]
    masks: dict[torch.device, Tensor] = field(default_factory=dict)
    tables: dict[tuple[int, torch.device], SegmentTable] = field(default_factory=dict)


class Batch:
    """The adapters of a model call's rows; made by a store, read by every layer.

    Args:
        adapters: those that it uses, each in its slot.
        slots, max_rank: of the store.
        slot_of_entry: the slot of each sequence (-1: none), or of each row if ``by_row``.
        by_row: entries are rows, as many as every layer sees.
        examples: for each sequence the number by which dropout knows it, or None: its place.
        resume: a context in which the adapters are in their slots; it raises if they are not.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter],
        slots: int,
        max_rank: int,
        slot_of_entry: Sequence[int] | Tensor,
        *,
        by_row: bool = False,
        examples: Sequence[int] | None = None,
        resume: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._adapters = adapters
        self._slots, self._max_rank = slots, max_rank
        self._entries = torch.as_tensor(slot_of_entry, dtype=torch.int64)
        self._count = self._entries.shape[0]
        self._by_row = by_row
        self._examples = None if examples is None else torch.tensor(examples)
        self._kinds: dict[Any, _Kind] = {}
        self._kind_of_layer: dict[str, _Kind | None] = {}
        self.resume = resume

    def check_sequences(self, count: int) -> None:
        """Raise ValueError if a call of ``count`` sequences does not fit."""
        entries = self._count
        if not self._by_row and count != 0 and (entries == 0 or count % entries):
            raise ValueError(
                f"the model was called with a batch of {count}, which is no multiple of the "
                f"{entries} entries of store.batch; packed sequences need lengths= or rows="
            )

    def has_run(self, path: str) -> bool:
        return path in self._kind_of_layer

    def table(self, path: str, shape: Sequence[int], device: torch.device) -> SegmentTable | None:
        """The table for the layer at ``path`` and an input whose leading dimensions are ``shape``;
        None if no adapter of the batch has that layer.

        Raises:
            ValueError: the rows are not those of the batch.
        """
        rows = math.prod(shape)
        if not self._by_row:
            self.check_sequences(shape[0] if shape else 1)
        elif rows != self._count:
            raise ValueError(
                f"{path}: the input has {rows} rows, and store.batch was given {self._count}"
            )
        if path not in self._kind_of_layer:
            self._kind_of_layer[path] = self._kind(path)
        kind = self._kind_of_layer[path]
        if kind is None:
            return None
        key = rows, device
        table = kind.tables.get(key)
        if table is None:
            if len(kind.tables) >= _MOST_TABLES:
                kind.tables.clear()
            table = kind.tables[key] = self._new_table(kind, *key)
        return table

    def dora_slots(self, path: str, device: torch.device) -> Tensor | None:
        """bool [S + 1], after :meth:`table` for the same layer: which slots hold DoRA adapters;
        None if none does."""
        kind = self._kind_of_layer[path]
        if kind is None or not any(kind.is_dora):
            return None
        if device not in kind.masks:
            with torch.inference_mode(False):
                kind.masks[device] = torch.tensor(kind.is_dora, device=device)
        return kind.masks[device]

    def dropout_p(self, path: str) -> float:
        """The adapters' common dropout at the layer ``path``.

        Raises:
            ValueError: they differ: one call draws one mask.
        """
        found = {a.dropout_p: a.name for a in self._adapters if path in a.layers}
        if len(found) > 1:
            (p, one), (q, other), *_ = found.items()
            raise ValueError(
                f"adapters that train in one batch need the same lora_dropout: {one!r} has {p}, "
                f"{other!r} has {q}"
            )
        return next(iter(found), 0.0)

    def _kind(self, path: str) -> _Kind | None:
        ranks, scales = [0] * self._slots, [0.0] * self._slots
        is_dora = [False] * (self._slots + 1)
        for adapter in self._adapters:
            ranks[adapter.slot], scales[adapter.slot] = adapter.layers.get(path, (0, 0.0))
            is_dora[adapter.slot] = adapter.use_dora and path in adapter.layers
        if not any(ranks):
            return None
        key = tuple(ranks), tuple(scales), tuple(is_dora)
        return self._kinds.setdefault(key, _Kind(ranks, scales, is_dora))

    def _new_table(self, kind: _Kind, rows: int, device: torch.device) -> SegmentTable:
        # A layer keeps it for its backward: it must be no inference tensor, whatever ran first.
        with torch.inference_mode(False):
            entries, logical = self._entries, None
            if not self._by_row and self._count:
                each = rows // self._count
                entries = entries.repeat_interleave(each)
                if self._examples is not None:
                    logical = (self._examples[:, None] * each + torch.arange(each)).flatten()
            return SegmentTable.from_rows(
                entries,
                kind.rank_of_slot,
                kind.scale_of_slot,
                logical_row=logical,
                max_rank=self._max_rank,
                device=device,
                # Checked when the batch was made.
                validate=False,
            )


class _Entry:
    """An active batch of ``owner``, until its block ends it (``batch`` is then None) or is gone;
    without an owner the mark of a bound call, which does not see what is around it."""

    def __init__(self, owner: Owner | None, batch: Batch | None, block: object) -> None:
        self.owner, self.batch, self._block = owner, batch, weakref.ref(block)

    def counts(self) -> bool:
        """No: it is left over from an interruption."""
        ended = self.owner is not None and self.batch is None
        return ended or self._block() is not None


# The innermost last. Tasks begin with a copy, threads with nothing.
_ACTIVE: ContextVar[tuple[_Entry, ...]] = ContextVar("lora_kernels_active", default=())


def _push(entry: _Entry) -> None:
    _ACTIVE.set((*filter(_Entry.counts, _ACTIVE.get()), entry))


def _remove(entry: _Entry) -> None:
    _ACTIVE.set(tuple(other for other in _ACTIVE.get() if other is not entry))


class activate(AbstractContextManager[None]):
    """A context in which the layers of ``owner`` use ``batch``.

    It may be left in another context than the one in which it was entered. Should an interruption
    come in between, it ends with this object.
    """

    def __init__(self, owner: Owner, batch: Batch) -> None:
        self._owner = owner
        self._entry = _Entry(owner, batch, self)

    def __enter__(self) -> None:
        self._owner.enter(self)
        _push(self._entry)

    def __exit__(self, *error: object) -> None:
        _remove(self._entry)
        # In copies of the context the entry stays, and says that it has ended.
        self._entry.batch = None
        self._owner.leave(self)


def _seen() -> tuple[list[_Entry], bool]:
    """The entries that count, the innermost first, and whether a bound call hides the others."""
    found: list[_Entry] = []
    for entry in reversed(_ACTIVE.get()):
        if entry.counts():
            if entry.owner is None:
                return found, True
            found.append(entry)
    return found, False


def _batch_of(owner: Owner, entries: list[_Entry]) -> Batch | None:
    for entry in entries:
        if entry.owner is owner:
            if entry.batch is None:
                raise RuntimeError(
                    "the batch in which this task was started has ended: enter store.batch(...) in "
                    "the task itself, store.batch([None]) for the base model"
                )
            return entry.batch
    return None


class bind:
    """``function`` with the batches that are active now, or with none, whenever and in whichever
    thread it is called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        entries, _ = _seen()
        found = {e.owner: _batch_of(e.owner, entries) for e in entries if e.owner is not None}
        self._batches = {owner: batch for owner, batch in found.items() if batch is not None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, (entries, _) = _ACTIVE.get(), _seen()
        ended = [b for b in self._batches.values() if not any(e.batch is b for e in entries)]
        contexts: list[AbstractContextManager[Any]] = [batch.resume() for batch in ended]
        contexts += [activate(owner, batch) for owner, batch in self._batches.items()]
        call = functools.partial(self._function, *args, **kwargs)
        try:
            _push(_Entry(None, None, call))
            return _within(contexts, call)
        finally:
            # Also what an interruption left.
            _ACTIVE.set(before)


def _within(contexts: Sequence[AbstractContextManager[Any]], call: Callable[[], Any]) -> Any:
    """``call()`` in all of them. An ExitStack would keep them alive with an interruption."""
    if not contexts:
        return call()
    with contexts[0]:
        return _within(contexts[1:], call)


def active_batch(owner: Owner, path: str) -> Batch | None:
    """The batch that the layer at ``path`` computes with, or None for the base model.

    Raises:
        RuntimeError: which one is not known: this is a recomputation in a backward pass, the batch
            of this task has ended, or this thread was given none while others have theirs.
    """
    entries, bound = _seen()
    batch = _batch_of(owner, entries)
    if bound:
        return batch
    if torch._C._current_graph_task_id() == -1:
        if batch is None:
            owner.check_thread()
        return batch
    if (batch is None and owner.batched) or (batch is not None and not batch.has_run(path)):
        raise RuntimeError(
            f"{path} is computed again in a backward pass, and which adapters its forward used is "
            "not known here. Give torch.utils.checkpoint the bound function: "
            "checkpoint(store.bind(function), ...), or use gradient_checkpointing_enable()"
        )
    return batch


class CarryingCheckpoint:
    """A model's checkpointing function, whose recomputation uses the batches of its forward."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self.checkpoint(bind(function), *args, **kwargs)


# Of a model's arguments, those that have one entry per sequence; what images are cut into has not.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")


class ModelHook:
    """A forward pre-hook of the model: its batch must be a multiple of the active one's.
    ``prepare`` is called first."""

    def __init__(self, owner: Owner, prepare: Callable[[], None]) -> None:
        self._owner, self._prepare = owner, prepare

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._prepare()
        batch = _batch_of(self._owner, _seen()[0])
        if batch is not None:
            given = (*args[:1], *(kwargs.get(name) for name in _INPUTS))
            first = next((t for t in given if isinstance(t, Tensor)), None)
            if first is not None and first.dim() > 1:
                batch.check_sequences(first.shape[0])
