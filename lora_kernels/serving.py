"""``AdapterStore``: many adapters on one model, every sequence of a batch with its own."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .adapters import HostAdapter, Room, Source, Weights, draw, match, peft_tensors, read, write
from .batches import Adapter, Batch, ModelHook, activate, bind
from .integrations import transformers as _transformers
from .integrations.lora_config import LoRAConfig
from .models import unwrap
from .slots import Resident, Slots
from .slotted_model import SlottedModel
from .transfers import Transfers

P = ParamSpec("P")
R = TypeVar("R")
Names = Sequence[str | None]


class UnknownAdapterError(KeyError, ValueError):
    """There is no adapter of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class AdapterStore:
    """Adapters in slots of one model, for batches in which every sequence has its own.

    The store replaces linear layers of ``model`` by :class:`lora_kernels.MultiLoRALinear`, in
    place; without a batch, and in sequences without an adapter, the model computes what it did
    before. Adapters that do not fit the slots are kept in the host's memory; a batch that names one
    brings it into a slot, from which the one that was used least recently is evicted. On a GPU
    they are copied asynchronously, and batches go on meanwhile.

    All methods may be called from any thread while batches run. An adapter that a batch uses stays
    in its slot, as it is, until the batch ends: a replacement loaded meanwhile is for batches that
    begin later. A batch whose adapters do not fit waits for running ones to end.

    **Training.** ``requires_grad_()`` makes the adapters trainable, and ``parameters()`` are for
    an optimizer. Each adapter's gradients are those of its own rows, as if it trained alone (the
    loss of each must not be scaled by the rows of the others: add up means, do not take the mean
    over the batch). An adapter that a batch does not name has zero gradients, and is moved by
    whatever an optimizer does with these: weight decay, momentum, Adam's moments. To train as if
    alone, name every adapter in every step, and do not clip the norm of all gradients together.
    While the adapters train nobody is evicted. With dropout, ``examples=`` of :meth:`batch` says
    which mask a sequence gets.

    **Gradient checkpointing.** transformers' ``gradient_checkpointing_enable`` computes again with
    the batch of the forward, also when that has ended (its adapters must then still be in their
    slots: train them or pin them). ``torch.utils.checkpoint`` needs ``store.bind(function)``, and
    raises without it where it cannot tell.

    Layers tell sequences apart by the first dimension of their input, or by equal shares of its
    rows; experts, whose rows a router chooses, have no slots.

    Args:
        model: with layers of ``nn.Linear`` or transformers' Conv1D; their weights are frozen.
        max_adapters: slots, so the adapters that can be used at the same time.
        max_rank: of an adapter; memory is taken for it in every slot.
        target_modules: the layers that get slots, as for :func:`lora_kernels.apply_lora`, and
            embeddings by name. None: all linear layers but heads; embeddings and heads get theirs
            when an adapter has them.
        device, dtype: of the slots; default: those of each layer's weight. For training a
            half-precision base, float32 is usual.
        timeout: seconds that a batch waits for slots, None: without end.

    Raises:
        ValueError: the model has LoRA layers already, or no layer matches.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 2, bias=False))
    >>> store = AdapterStore(model, max_adapters=2, max_rank=8)
    >>> config = {"r": 1, "lora_alpha": 1, "target_modules": ["0"]}
    >>> tensors = {"0.lora_A.weight": torch.ones(1, 4), "0.lora_B.weight": torch.ones(2, 1)}
    >>> store.load("ones", tensors, config=config)
    >>> store.load("tens", tensors, config=config | {"lora_alpha": 10})
    >>> store.names
    ['ones', 'tens']
    >>> x = torch.ones(3, 4)
    >>> base = model(x)
    >>> with store.batch(["tens", None, "ones"]):
    ...     (model(x) - base).round().tolist()
    [[40.0, 40.0], [0.0, 0.0], [4.0, 4.0]]
    """

    def __init__(
        self,
        model: nn.Module,
        max_adapters: int = 16,
        max_rank: int = 64,
        target_modules: Sequence[str] | str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        timeout: float | None = 60.0,
    ) -> None:
        for name, value in (("max_adapters", max_adapters), ("max_rank", max_rank)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, not {value!r}")
        self.model = unwrap(model)
        self.max_adapters, self.max_rank, self.timeout = max_adapters, max_rank, timeout
        self._slotted = SlottedModel(
            self.model, max_adapters, max_rank, target_modules, device, dtype
        )
        self._layers, self._owner = self._slotted.layers, self._slotted.owner
        self._adapters: dict[str, Resident] = {}
        self._transfers = Transfers(self._slotted)
        self._slots = Slots(max_adapters, self._transfers)
        self._checkpointing = _transformers.checkpointing_modules(self.model)
        carry = functools.partial(_transformers.carry_batches, self._checkpointing)
        self._hook = self.model.register_forward_pre_hook(
            ModelHook(self._owner, carry), with_kwargs=True
        )

    @property
    def skipped(self) -> dict[str, str]:
        """The linear layers without slots, by path with the reason; heads get theirs when an
        adapter has them."""
        skipped, layers = self._slotted.skipped, self._layers
        return {path: reason for path, reason in skipped.items() if path not in layers}

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they were first loaded."""
        return list(self._adapters)

    @property
    def resident(self) -> list[str]:
        """Those in a slot, the least recently used first."""
        return [r.name for r in self._slots.residents() if not r.withdrawn]

    @property
    def pinned(self) -> list[str]:
        return [r.name for r in self._slots.residents() if r.pinned]

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        return (
            f"AdapterStore({type(self.model).__name__}, {len(self)} adapters, "
            f"{self.max_adapters - self._slots.free()} of {self.max_adapters} slots in use, "
            f"max_rank={self.max_rank}, {len(self._layers)} layers)"
        )

    # Adapters.

    def load(self, name: str, source: Source, config: Any = None) -> None:
        """Load an adapter in PEFT's format, or replace the one of that name.

        It goes into a free slot if there is one, a replacement into the slot of its predecessor;
        else it stays with the host until a batch names it. A pinned adapter's replacement is
        pinned.

        Args:
            source: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or a
                state dict with PEFT's keys (with or without ``base_model.model.``).
            config: of a state dict: a mapping of PEFT's fields, an ``lk.LoRAConfig`` or PEFT's own.

        Raises:
            FileNotFoundError: the directory or one of its two files is missing.
            ValueError: a file is corrupt, uses what the layers do not compute, has a rank above
                ``max_rank``, or tensors that are missing, left over or of the wrong shape.
            RuntimeError: the adapters train and no slot is free, or a pinned one that is in use has
                nowhere to go.

            Store and model are then as they were.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"an adapter's name must be a string, not {name!r}")
        found, tensors, label = read(name, source, config)
        host = match(self._slotted.places(), found, tensors, self._room(), label)
        self._enter(name, host)

    def create(
        self,
        name: str,
        r: int = 8,
        lora_alpha: float = 16,
        target_modules: Sequence[str] | str | None = None,
        **options: Any,
    ) -> None:
        """An untrained adapter, which changes nothing until it is trained.

        Args:
            target_modules: of the store's layers; None: all its linear ones.
            options: other fields of ``lk.LoRAConfig``: ``lora_dropout``, ``use_rslora``,
                ``init_lora_weights``, ``rank_pattern``, ``alpha_pattern``, ...

        Raises:
            ValueError: there is an adapter of that name, a wrong value, or no layer matches.
            RuntimeError: as :meth:`load`.
        """
        if name in self._adapters:
            raise ValueError(f"there is an adapter {name!r} already")
        if not (target_modules is None or isinstance(target_modules, str)):
            target_modules = list(target_modules)
        config = LoRAConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules, **options)
        config.check()
        if config.bias != "none" or config.modules_to_save:
            raise ValueError("a store's adapters have no biases and no modules_to_save")
        places = self._slotted.places()
        paths = self._slotted.linear if config.all_linear else places.named_by(config)
        host = draw(places, config, paths, self._room())
        self._enter(name, host)

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UnknownAdapterError: there is none of that name.
            RuntimeError: it is pinned, or a running batch uses it.
        """
        with self._slots.condition:
            self._slots.leave(self._find(name))
            del self._adapters[name]

    def pin(self, name: str) -> None:
        """Keep an adapter in a slot until :meth:`unpin`.

        Raises:
            UnknownAdapterError: there is none of that name.
            RuntimeError, TimeoutError: it has no slot and gets none, as :meth:`batch`.
        """
        with (
            self._slots.condition,
            self._slots.holding(lambda: [self._find(name)], self.timeout) as (resident,),
        ):
            resident.pinned = True

    def unpin(self, name: str) -> None:
        """Allow an adapter to be evicted again."""
        with self._slots.condition:
            self._find(name).pinned = False
            self._slots.condition.notify_all()

    def state_dict(self, name: str) -> dict[str, Tensor]:
        """Copies of the adapter's tensors, by PEFT's keys without ``base_model.model.``."""
        return peft_tensors(self._current(name), self._layers)

    def save(self, name: str, directory: str | os.PathLike[str]) -> None:
        """Write an adapter as PEFT does, so that ``PeftModel.from_pretrained``,
        :func:`lora_kernels.load_adapter` and :meth:`load` read it.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        write(self.model, self._current(name), self._layers, Path(directory))

    # Batches.

    def batch(
        self,
        names: Names | None = None,
        *,
        rows: Names | Sequence[int] | Tensor | None = None,
        lengths: Sequence[int] | None = None,
        examples: Sequence[int] | None = None,
    ) -> AbstractContextManager[Batch]:
        """A context in which calls of the model, ``generate`` included, use these adapters.

        Args:
            names: for each sequence an adapter or None, the base model. A call with twice as many
                sequences, say, gives each entry two that follow one another, as beam search
                expands them; any number that is no multiple is an error.
            lengths: of sequences that are packed into one, one after the other; the names are
                theirs.
            rows: for each row (token) of packed sequences its adapter or None; or, with ``names``,
                an index into these (-1: none), as a list or an integer tensor. One on a GPU is not
                checked.
            examples: for each sequence a number >= 0, by which its dropout mask is drawn: rows
                ``number * tokens`` and on of the mask. Default: its place.

        The batch holds for the thread that enters it; ``store.bind(function)`` carries it into
        another one. Inside, another batch may be entered, which then counts.

        Raises:
            UnknownAdapterError: there is no adapter of a name.
            TypeError, ValueError: lists that do not fit together. On entering:
            RuntimeError: the adapters are more than the slots, or than can become free.
            TimeoutError: slots did not become free in time.

        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> store = AdapterStore(model, max_adapters=2, max_rank=8)
        >>> store.create("a", r=4)
        >>> with store.batch(["a", None]):
        ...     tuple(model(torch.ones(4, 3, 4)).shape)
        (4, 3, 2)
        >>> with store.batch(["a", None], lengths=[5, 2]):
        ...     tuple(model(torch.ones(1, 7, 4)).shape)
        (1, 7, 2)
        >>> with store.batch(["a"]):
        ...     model(torch.ones(0, 3, 4)).shape[0]
        0
        """
        if names is None:
            if rows is None or isinstance(rows, Tensor):
                raise TypeError("batch needs names, one for each sequence, or rows by name")
            distinct = list(dict.fromkeys(self._checked_names(rows, "rows")))
            entries: Any = [distinct.index(name) for name in rows]  # type: ignore[arg-type]
            names = distinct
        else:
            self._checked_names(names, "names")
            entries = range(len(names))
            if rows is not None:
                entries = _checked_rows(rows, len(names))
        if lengths is not None:
            if rows is not None:
                raise TypeError("rows and lengths say the same: give one of them")
            if len(lengths) != len(names) or any(length < 0 for length in lengths):
                raise ValueError(
                    f"lengths must be one number >= 0 for each of {len(names)} names: {lengths}"
                )
            entries = torch.arange(len(names)).repeat_interleave(torch.tensor(lengths))
        by_row = rows is not None or lengths is not None
        if examples is not None:
            if by_row:
                raise TypeError("examples number the sequences of a batch, not packed rows")
            if len(examples) != len(names) or any(number < 0 for number in examples):
                raise ValueError(
                    f"examples must be one number >= 0 for each of {len(names)} names: {examples}"
                )
        for name in names:
            if name is not None:
                self._find(name)
        return self._running(list(names), entries, by_row, examples)

    @contextlib.contextmanager
    def _running(
        self, names: Names, entries: Any, by_row: bool, examples: Sequence[int] | None
    ) -> Iterator[Batch]:
        used = [name for name in names if name is not None]
        with self._slots.holding(lambda: [self._find(n) for n in used], self.timeout) as residents:
            # Those of residents, as they are now: another thread may load a successor.
            slots = [resident.slot for resident in residents if resident.slot is not None]
            slot_of = dict(zip((r.name for r in residents), slots, strict=True))
            slot_of_name = torch.tensor([slot_of.get(n or "", -1) for n in names] + [-1])
            where = torch.as_tensor(entries, dtype=torch.int64)
            batch = Batch(
                [
                    Adapter(r.name, slot, r.host.ranks_and_scales, r.host.config.lora_dropout)
                    for r, slot in zip(residents, slots, strict=True)
                ],
                self.max_adapters,
                self.max_rank,
                slot_of_name.to(where.device)[where],
                by_row=by_row,
                examples=examples,
                resume=functools.partial(self._slots.holding_again, residents, slots),
            )
            with self._slots.condition:
                self._transfers.begin(slots)
            _transformers.carry_batches(self._checkpointing)
            try:
                with activate(self._owner, batch):
                    yield batch
            finally:
                with self._slots.condition:
                    self._transfers.end(slots)

    def bind(self, function: Callable[P, R]) -> Callable[P, R]:
        """``function`` with the batch that is active now (or none), whenever and in whichever
        thread it is called: for ``torch.utils.checkpoint``, and for threads.

        Raises:
            RuntimeError: when it is called after the batch has ended, and an adapter has left its
                slot.
        """
        return bind(function)

    # Training.

    def parameters(self) -> list[nn.Parameter]:
        """The slots of all layers: A [S, r_max, in] and B [S, out, r_max] of each."""
        return [p for layer in self._layers.values() for p in (layer.lora_A, layer.lora_B)]

    def requires_grad_(self, requires_grad: bool = True) -> AdapterStore:
        """Make the adapters trainable, or not any more. While they are, nobody is evicted."""
        with self._slots.condition:
            self._slotted.trains = requires_grad
            self._slots.hold_all(requires_grad)
            for parameter in self.parameters():
                parameter.requires_grad_(requires_grad)
        return self

    def close(self) -> None:
        """Put the model's own layers back, trainable as they were; the store is then of no use.

        Raises:
            RuntimeError: batches are running.
        """
        with self._slots.condition:
            running = [r.name for r in self._slots.residents() if r.users]
            if running:
                raise RuntimeError(f"batches are running with {', '.join(map(repr, running))}")
            self._slotted.take_out(list(self._layers))
            self._hook.remove()
            _transformers.carry_no_batches(self._checkpointing)
            self._adapters.clear()

    def _find(self, name: str) -> Resident:
        resident = self._adapters.get(name)
        if resident is None:
            known = ", ".join(map(repr, self.names[:8])) or "none"
            raise UnknownAdapterError(f"there is no adapter {name!r}; there are {known}")
        return resident

    def _checked_names(self, names: Any, what: str) -> list[str | None]:
        if isinstance(names, str) or not all(n is None or isinstance(n, str) for n in names):
            raise TypeError(f"{what} must be a list of names and None, not {names!r}")
        return list(names)

    def _current(self, name: str) -> HostAdapter:
        """The adapter as it is now, copied from its slot if it may have been trained."""
        with self._slots.condition:
            resident = self._find(name)
            if not resident.trained or resident.slot is None:
                return resident.host
            layers = {}
            self._transfers.begin([resident.slot])
            for path, weights in resident.host.layers.items():
                a, b = self._layers[path].slot(resident.slot, weights.rank)
                layers[path] = Weights(a.cpu().clone(), b.cpu().clone(), weights.scale)
            return replace(resident.host, layers=layers)

    def _room(self) -> Room:
        """What the slots hold, and whether a GPU copies into them."""
        pinned = any(device.type == "cuda" for device in self._slotted.devices())
        return Room(self.max_rank, self._slotted.dtypes(), pinned)

    def _enter(self, name: str, host: HostAdapter) -> None:
        with self._slots.condition:
            new = self._slotted.add(host.layers)
            resident, old = Resident(name, host), self._adapters.get(name)
            try:
                if old is None:
                    self._slots.enter(resident)
                else:
                    self._slots.replace(old, resident)
            except BaseException:
                self._slotted.take_out(new)
                raise
            self._adapters[name] = resident


def _checked_rows(rows: Any, names: int) -> Tensor:
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
