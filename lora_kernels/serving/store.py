"""``AdapterStore``: many adapters on one model, every sequence of a batch with its own."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..layers.batches import Batch, ModelHook, bind
from ..models import foreign
from ..models.apply import unwrap
from ..models.config import LoRAConfig
from ..models.on_disk import first_few
from .adapters import HostAdapter, Source, check_trainable, draw, match, peft_tensors, read, write
from .running import BatchContext, Key, checked_names, checked_rows
from .slots import HeldAdapter, Resident, Slots, UnknownAdapterError
from .slotted_model import SlottedModel
from .transfers import Transfers

P = ParamSpec("P")
R = TypeVar("R")
Names = Sequence[str | None]


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
    While the adapters train none is evicted. With dropout, ``examples=`` of :meth:`batch` says
    which mask a sequence gets.

    **Gradient checkpointing.** transformers' ``gradient_checkpointing_enable`` computes again with
    the batch of the forward, also when that has ended (its adapters must then still be in their
    slots: train them or pin them). ``torch.utils.checkpoint`` needs ``store.bind(function)``, and
    raises without it where it cannot tell.

    Layers tell sequences apart by the first dimension of their input, or by equal shares of its
    rows. Of experts the 3-D Parameters that transformers knows get slots when an adapter has them
    (to be served, not trained); linear layers, whose rows a router chooses, do not.

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
        self._transfers = Transfers(self._slotted)
        self._slots = Slots(max_adapters, self._transfers)
        self._adapters = self._slots.named
        self._owner.hold = weakref.WeakMethod(self.hold)
        self._checkpointing = foreign.checkpointing_modules(self.model)
        carry = functools.partial(foreign.carry_batches, self._checkpointing)
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
        """The adapters in a slot, the least recently used first."""
        return [r.name for r in self._slots.residents() if self._slots.is_named(r)]

    @property
    def pinned(self) -> list[str]:
        return [r.name for r in self._slots.residents() if r.pinned and self._slots.is_named(r)]

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

    def load(
        self,
        name: str,
        source: Source,
        config: Any = None,
        *,
        load_embedding_layers: bool = True,
    ) -> None:
        """Load an adapter in PEFT's format, or replace the one of that name.

        It goes into a free slot if there is one, a replacement into the slot of its predecessor;
        else it stays with the host until a batch names it. A pinned adapter's replacement is
        pinned.

        Args:
            source: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``, or a
                state dict with PEFT's keys (with or without ``base_model.model.``).
            config: of a state dict: a mapping of PEFT's fields, an ``lk.LoRAConfig`` or PEFT's own.
            load_embedding_layers: embeddings that were saved along (PEFT's
                ``save_embedding_layers``) must be the model's own, which all adapters share; False
                leaves them out.

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
        files = read(name, source, config, self.model)
        host = match(self._slotted.index(), files, self._slotted.limits(), load_embedding_layers)
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
        more = config.modules_to_save or config.experts or config.target_parameters
        if config.bias != "none" or config.use_dora or more:
            raise ValueError("new adapters of a store: no biases, modules_to_save, DoRA or experts")
        index = self._slotted.index()
        paths = self._slotted.linear if config.all_linear else index.named_by(config)
        host = draw(index, config, paths, self._slotted.limits())
        self._enter(name, host)

    def unload(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UnknownAdapterError: there is none of that name.
            RuntimeError: it is pinned or held, or a running batch uses it.
        """
        with self._slots.lock:
            self._slots.leave(self._find(name))

    def hold(self, name: str) -> HeldAdapter:
        """The adapter as it is now, to be the same one in several batches: for a request
        that is generated step by step, a cache of keys and values that is used again.

        Pass what is returned to :meth:`batch` instead of the name. After a :meth:`load` under that
        name it still means the version that it was made of, until its ``release()``, the end of its
        ``with`` block or its own end; until then :meth:`unload` is refused. It takes no slot.

        Raises:
            UnknownAdapterError: there is none of that name.

        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> store = AdapterStore(model, max_adapters=2, max_rank=8)
        >>> store.create("a", r=4)
        >>> with store.hold("a") as a, store.batch([a, None]):
        ...     tuple(model(torch.ones(2, 3, 4)).shape)
        (2, 3, 2)
        """
        with self._slots.lock:
            return HeldAdapter.of(self._find(name), self._slots)

    def pin(self, name: str) -> None:
        """Keep an adapter in a slot until :meth:`unpin`.

        Raises:
            UnknownAdapterError: there is none of that name.
            RuntimeError, TimeoutError: it has no slot and gets none, as :meth:`batch`.
        """
        with (
            self._slots.lock,
            self._slots.holding(lambda: [self._find(name)], self.timeout) as (resident,),
        ):
            resident.pinned = True

    def unpin(self, name: str) -> None:
        """Allow an adapter to be evicted again."""
        with self._slots.lock:
            self._find(name).pinned = False
            self._slots.wake()

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
    ) -> BatchContext:
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

        Inside, another batch may be entered, which then counts. ``async with`` waits for slots
        without stopping the event loop, and the tasks that are started inside have the batch. A
        thread has not: a generation that streams from a thread or an executor needs
        ``store.bind(model.generate)`` as its function. While batches run, a thread that never had
        one gets no answer from the model but an error, until it enters ``store.batch([None])``.

        >>> streamer = TextIteratorStreamer(tokenizer)  # doctest: +SKIP
        >>> with store.batch(["a"]):  # doctest: +SKIP
        ...     generate = store.bind(model.generate)
        ...     thread = Thread(target=generate, kwargs={**inputs, "streamer": streamer})
        ...     thread.start()
        ...     print(*streamer)
        ...     thread.join()

        A batch has the adapters as they were when it was entered. Where one answer takes several
        batches, :meth:`hold` keeps the version.

        Raises:
            UnknownAdapterError: there is no adapter of a name.
            TypeError, ValueError: lists that do not fit together. On entering:
            RuntimeError: the adapters are more than the slots, or than can become free while this
                thread waits.
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
            by_row = [self._key(name) for name in checked_names(rows, "rows")]
            keys = list(dict.fromkeys(by_row))
            place = {key: i for i, key in enumerate(keys)}
            entries: Any = [place[key] for key in by_row]
        else:
            keys = [self._key(name) for name in checked_names(names, "names")]
            entries = range(len(keys)) if rows is None else checked_rows(rows, len(keys))
        if lengths is not None:
            if rows is not None:
                raise TypeError("rows and lengths say the same: give one of them")
            if len(lengths) != len(keys) or any(length < 0 for length in lengths):
                raise ValueError(
                    f"lengths must be one number >= 0 for each of {len(keys)} names: {lengths}"
                )
            entries = torch.arange(len(keys)).repeat_interleave(torch.tensor(lengths))
        packed = rows is not None or lengths is not None
        if examples is not None:
            if packed:
                raise TypeError("examples number the sequences of a batch, not packed rows")
            if len(examples) != len(keys) or any(number < 0 for number in examples):
                raise ValueError(
                    f"examples must be one number >= 0 for each of {len(keys)} names: {examples}"
                )
        return BatchContext(
            self._owner,
            self._slots,
            self._transfers,
            self.timeout,
            lambda: {key: self._resident(key) for key in keys if key is not None},
            lambda chosen: self._new_batch(keys, chosen, entries, packed, examples),
        )

    def _new_batch(
        self,
        keys: Sequence[Key | None],
        chosen: Mapping[Key, Resident],
        entries: Any,
        by_row: bool,
        examples: Sequence[int] | None,
    ) -> Batch:
        foreign.carry_batches(self._checkpointing)
        slot_of = {key: resident.slot for key, resident in chosen.items()}
        residents = list(dict.fromkeys(chosen.values()))
        slots = [resident.slot for resident in residents if resident.slot is not None]
        where = torch.as_tensor(entries, dtype=torch.int64)
        # The last entry is for an index of -1.
        slot_of_key = torch.tensor([-1 if key is None else slot_of[key] for key in keys] + [-1])
        return Batch(
            [
                resident.host.in_slot(resident.name, slot)
                for resident, slot in zip(residents, slots, strict=True)
            ],
            self.max_adapters,
            self.max_rank,
            slot_of_key.to(where.device)[where],
            by_row=by_row,
            examples=examples,
            resume=functools.partial(self._slots.holding_again, residents, slots),
        )

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
        """Make the adapters trainable, or not any more. While they are, none is evicted."""
        with self._slots.lock:
            # No adapter is evicted as long as any of them trains.
            if requires_grad:
                check_trainable([resident.host for resident in self._adapters.values()])
                self._slots.hold_all(True)
            self._slotted.requires_grad_(requires_grad)
            self._slots.hold_all(requires_grad)
        return self

    def close(self) -> None:
        """Put the model's own layers back, trainable as they were; the store is then of no use.

        Raises:
            RuntimeError: batches are running.
        """
        with self._slots.lock:
            running = [r.name for r in self._slots.residents() if r.users]
            if running:
                raise RuntimeError(f"batches are running with {', '.join(map(repr, running))}")
            self._slotted.take_out(list(self._layers))
            self._hook.remove()
            foreign.carry_no_batches(self._checkpointing)
            self._adapters.clear()

    def _find(self, name: str) -> Resident:
        resident = self._adapters.get(name)
        if resident is None:
            known = first_few([repr(name) for name in self.names], 8) or "none"
            raise UnknownAdapterError(f"there is no adapter {name!r}; there are {known}")
        return resident

    def _key(self, name: str | None) -> Key | None:
        """What ``name`` means, checked: a name, or of a held adapter its version."""
        if name is None:
            return None
        if not isinstance(name, HeldAdapter):
            self._find(name)
            return name
        if name.slots is not self._slots:
            raise ValueError(f"the hold of {str(name)!r} is of another store")
        if name.resident is None:
            raise ValueError(f"the hold of {str(name)!r} was released")
        return name.resident

    def _resident(self, key: Key) -> Resident:
        return key if isinstance(key, Resident) else self._find(key)

    def _current(self, name: str) -> HostAdapter:
        """The adapter as it is now, copied from its slot if it may have been trained."""
        with self._slots.lock:
            resident = self._find(name)
            if not resident.trained or resident.slot is None:
                return resident.host
            self._transfers.begin([resident.slot])
            return self._slotted.read_slot(resident.slot, resident.host)

    def _enter(self, name: str, host: HostAdapter) -> None:
        with self._slots.lock:
            check_trainable([host] if self._slotted.trains else [])
            before = set(self._layers)
            resident = Resident(name, host)
            try:
                self._slotted.add(host.layers)
                self._slots.enter(resident)
            except BaseException:
                if not self._slots.is_named(resident):
                    self._slotted.take_out([path for path in self._layers if path not in before])
                raise
