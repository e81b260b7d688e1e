"""transformers' continuous batching with an adapter per request.

Each step packs the rows of several requests, prefill and decode together, into one row of tokens.
Which request a row belongs to is known to ``ContinuousBatchProcessor`` alone, in its own thread, so
the choice of adapters hangs on its ``_generation_step`` and its scheduler. Written against
transformers 5.23.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from ..layers.multi import SlottedLayer

AdapterOf = Callable[[str], "str | None"]
BatchOf = Callable[["list[str | None]"], AbstractContextManager[Any]]


def adapt_requests(manager: Any, adapter_of: AdapterOf, batch_of: BatchOf) -> None:
    """Run every step of a ``ContinuousBatchingManager`` with the adapters of its requests.

    On a model with an :class:`lora_kernels.AdapterStore` a request keeps the version of its adapter
    that it began with (:meth:`AdapterStore.hold`), whatever is loaded meanwhile, and ``unload`` is
    refused until its requests have ended. The store needs a slot for every version that is in
    flight.

    Args:
        manager: from ``model.init_continuous_batching(...)``, not started yet; with
            ``allow_block_sharing=False`` in its configuration.
        adapter_of: the adapter's name by request id, or None for the base model. Called once for
            each request, in the manager's thread, when it takes the request up; an exception there,
            or a name that the store does not know, ends that request alone. What a request is
            forked into (``num_return_sequences``) has its adapter.
        batch_of: gets the name for every row of a step, in order, padding included (None), and
            returns the context in which the step runs: ``lambda names: store.batch(rows=names)``.
            An exception there ends all requests. On a GPU its work is put on the stream that the
            model will use. With captured graphs it has to refill tensors in place.

    The rows are those of the layers before the head, which sees the last row of each request.

    Raises:
        ValueError: blocks of the cache would be shared between requests whose prompts begin alike:
            what one adapter computed would be read under another.
        RuntimeError: the manager is running.
    """
    if manager.continuous_batching_config.allow_block_sharing:
        raise ValueError(
            "requests with different adapters must not share the cache of a common prompt: set "
            "allow_block_sharing=False in the ContinuousBatchingConfig"
        )
    if manager.is_running():
        raise RuntimeError("adapters are chosen before the manager is started")
    create = manager._create_batch_processor

    @functools.wraps(create)
    def _create_batch_processor() -> Any:
        processor = create()
        if "_generation_step" not in vars(processor):
            _Requests(processor, _chooser(manager.model, adapter_of), batch_of)
        return processor

    manager._create_batch_processor = _create_batch_processor


def _chooser(model: nn.Module, adapter_of: AdapterOf) -> AdapterOf:
    """``adapter_of``, on a model with a store for a version of the adapter."""
    owners = (m._owner for m in model.modules() if isinstance(m, SlottedLayer))
    hold = next((owner.hold() for owner in owners), None)

    def choose(request_id: str) -> str | None:
        name = adapter_of(request_id)
        return name if name is None or hold is None else hold(name)

    return choose


class _Requests:
    """The adapters of a processor's requests, from when it takes one up until it has ended."""

    def __init__(self, processor: Any, choose: AdapterOf, batch_of: BatchOf) -> None:
        self._processor, self._choose, self._batch_of = processor, choose, batch_of
        self._names: dict[str, str | None] = {}
        scheduler, router = processor.scheduler, processor.output_router
        # What it raises ends one request, and not those that run.
        _before(scheduler, "add_waiting_request", self._take_up)
        # A result comes only when its adapter may be unloaded; cancelled requests have none.
        _before(router, "deliver_batch", self._forget_ended)
        _before(processor, "prepare_next_batch", self._forget_ended)
        _after(processor, "fail_all_requests", self._forget_ended)
        processor._generation_step = functools.partial(self._step, processor._generation_step)

    def _take_up(self, state: Any) -> None:
        root = _root(state)
        if root not in self._names:
            self._names[root] = self._choose(root)

    def _forget_ended(self, *_: Any) -> None:
        scheduler = self._processor.scheduler
        alive = {
            _root(state)
            for states in (
                scheduler.active_requests.values(),
                scheduler.waiting_requests.values(),
                scheduler._requests_to_fork,
            )
            for state in states
        }
        for root in self._names.keys() - alive:
            del self._names[root]

    def _step(self, step: Callable[[Any], None], model: Any) -> None:
        ios = self._processor.inputs_and_outputs
        stream = getattr(ios, "compute_stream", None)
        on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
        with on_stream:
            batch = self._batch_of(self._names_of_rows())
            batch.__enter__()
        with contextlib.ExitStack() as stack:
            stack.push(batch)
            step(model)

    def _names_of_rows(self) -> list[str | None]:
        ios = self._processor.inputs_and_outputs
        if hasattr(ios, "io_pairs"):  # the next batch is packed while one runs
            ios = ios.io_pairs[ios.current_pair].host_io
        names: list[str | None] = []
        for request in ios.requests_in_batch:
            names += [self._names[_root(request.state)]] * request.query_length
        if self._processor.model_runner.pad_inputs:
            names += [None] * (ios.num_q_tokens - len(names))
        return names


def _root(state: Any) -> str:
    """The id of the request that was added, also of what it was forked into."""
    return state.request_id.partition("__child#")[0]


def _before(owner: Any, name: str, first: Callable[..., None]) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        first(*args, **kwargs)
        return method(*args, **kwargs)

    setattr(owner, name, call)


def _after(owner: Any, name: str, then: Callable[[], None]) -> None:
    method = getattr(owner, name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        finally:
            then()

    setattr(owner, name, call)
