"""transformers' continuous batching with an adapter per request.

Each step packs the rows of several requests, prefill and decode together, into one row of tokens.
Which request a row belongs to is known to ``ContinuousBatchProcessor`` alone, in its own thread, so
the choice of adapters hangs on its ``_generation_step``. Written against transformers 5.23.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

AdapterOf = Callable[[str], "str | None"]
BatchOf = Callable[["list[str | None]"], AbstractContextManager[Any]]


def adapt_requests(manager: Any, adapter_of: AdapterOf, batch_of: BatchOf) -> None:
    """Run every step of a ``ContinuousBatchingManager`` with the adapters of its requests.

    Args:
        manager: from ``model.init_continuous_batching(...)``, not started yet; with
            ``allow_block_sharing=False`` in its configuration.
        adapter_of: the adapter's name by request id, or None for the base model. A request that was
            forked (``num_return_sequences``) has the adapter of the one that was added. Called in
            the manager's thread at every step; an exception there ends all requests.
        batch_of: gets the name for every row of a step, in order, padding included (None), and
            returns the context in which the step runs. On a GPU its work is put on the stream that
            the model will use. With captured graphs it has to refill tensors in place.

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
            step = processor._generation_step
            processor._generation_step = functools.partial(_adapted_step, processor, step)
        return processor

    def _adapted_step(processor: Any, step: Callable[[Any], None], model: Any) -> None:
        ios = processor.inputs_and_outputs
        stream = getattr(ios, "compute_stream", None)
        on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
        with on_stream:
            batch = batch_of(_names(processor, adapter_of))
            batch.__enter__()
        with contextlib.ExitStack() as stack:
            stack.push(batch)
            step(model)

    manager._create_batch_processor = _create_batch_processor


def _names(processor: Any, adapter_of: AdapterOf) -> list[str | None]:
    ios = processor.inputs_and_outputs
    if hasattr(ios, "io_pairs"):  # the next batch is packed while one runs
        ios = ios.io_pairs[ios.current_pair].host_io
    names: list[str | None] = []
    for request in ios.requests_in_batch:
        request_id = request.state.request_id.partition("__child#")[0]
        names += [adapter_of(request_id)] * request.query_length
    if processor.model_runner.pad_inputs:
        names += [None] * (ios.num_q_tokens - len(names))
    return names
