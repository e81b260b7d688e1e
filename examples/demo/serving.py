"""The demo's second half: adapters for several texts, trained in mixed batches and served together.
What is returned is plain data."""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

import lora_kernels as lk

from .settings import PEFT, Settings
from .text import Corpus
from .training import (
    clock,
    difference,
    has_peft,
    logits,
    loss_of,
    peft_model,
    rows_of,
    with_shared_weights,
)

# Of the store with fewer slots than adapters; and of each batch of the stream.
STREAM_SLOTS = 6
STREAM_ADAPTERS, STREAM_BATCH = 5, 8
# Sequences of each text in a training step, a quarter of the fine-tuning's, and what of its
# learning rate suits them: after 12 steps at all of it the packages' held-out loss had risen from
# 2.5692 to 2.5714, at 0.3 of it it had fallen to 2.5672 (CPU, November 2026).
SEQUENCES, RATE = 2, 0.3
HELD_OUT_BLOCKS, PROMPT_TOKENS, ROUNDS = 16, 24, 3

FEW, ALL, MERGED = "store with eviction", "store with a slot for each", "one merged model at a time"


class Text(NamedTuple):
    """Blocks of a text's tokens, [blocks, context]."""

    train: Tensor
    held_out: Tensor


@dataclass(eq=False)
class Request:
    """A prompt to be continued by an adapter, or by the base; ``expected``: prompt and continuation
    by a model of its own, the adapter merged into it, and ``logits`` its of them."""

    adapter: str | None
    prompt: Tensor
    expected: Any = None
    logits: Any = None


Batch = Sequence[Request]


def serve(
    settings: Settings, base: Any, tokenizer: Any, corpora: Iterable[Corpus]
) -> dict[str, Any] | None:
    """Train an adapter for each text, all in one batch; then serve them in mixed batches. None
    where no text fills a block of tokens."""
    texts = {}
    for corpus in corpora:
        both = (corpus.train, corpus.held_out)
        text = Text(*(rows_of(tokenizer, each, settings.context) for each in both))
        if len(text.train) and len(text.held_out):
            texts[corpus.name] = text
    if not texts:
        return None
    # Every second adapter has twice the rank.
    ranks = {name: settings.rank * (1 + i % 2) for i, name in enumerate(texts)}
    result = {"ranks": ranks} | train(settings, base, texts, ranks)

    draw = random.Random(settings.seed)
    whole = batch_of(settings, [*texts, None, None], texts, draw)
    stream = []
    for number in range(settings.stream_batches):
        # Five adapters, of which the batch before had two, and the base.
        chosen = {[*texts][(3 * number + i) % len(texts)]: None for i in range(STREAM_ADAPTERS)}
        names = [*chosen, None]
        names += draw.choices(names, k=STREAM_BATCH - len(names))
        stream.append(batch_of(settings, names, texts, draw))
    merged_seconds = answer_merged(settings, base, whole, stream)

    def store(slots: int) -> lk.AdapterStore:
        found = lk.AdapterStore(with_shared_weights(base), slots, 2 * settings.rank)
        for name in texts:
            found.load(name, settings.out / "adapters" / name)
        return found

    everybody, few = store(len(texts)), store(min(STREAM_SLOTS, len(texts)))
    result["together"] = together(settings, everybody, base, whole)
    result["stream"] = through(settings, few, stream)
    runs = {ALL: lambda: through(settings, everybody, stream)}
    if few.max_adapters < len(texts):
        runs[FEW] = lambda: through(settings, few, stream)
    if settings.peft and has_peft():
        runs[PEFT] = peft_run(settings, base, [*texts], stream)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(ROUNDS), desc="serving, in turns"):
        for name, run in runs.items():
            began = clock()
            run()
            seconds[name].append(clock() - began)
    times = {name: statistics.median(found) for name, found in seconds.items()}
    tokens = sum(map(len, stream)) * settings.served_tokens
    speeds = {name: tokens / s for name, s in (times | {MERGED: merged_seconds}).items()}
    return result | {"tokens_per_second": speeds}


# Training.


def train(
    settings: Settings, base: Any, texts: dict[str, Text], ranks: dict[str, int]
) -> dict[str, Any]:
    """One adapter for each text; every step has sequences of each, and one backward."""
    model, names = with_shared_weights(base), list(texts)
    store = lk.AdapterStore(model, len(texts), 2 * settings.rank, dtype=torch.float32)
    for name, rank in ranks.items():
        store.create(name, rank, settings.alpha * rank / settings.rank)
    before = held_out_losses(store, texts, names)
    store.requires_grad_()
    model.train()
    optimizer = torch.optim.AdamW(store.parameters(), weight_decay=0.0)
    draw, began, steps = random.Random(settings.seed), time.perf_counter(), 0
    answers: Counter[tuple[str, str, str]] = Counter()
    for steps in tqdm(range(1, settings.adapter_steps + 1), desc="an adapter for each text"):
        # The rate follows the clock or the steps, whichever ends first.
        share = (time.perf_counter() - began) / settings.adapter_seconds
        share = max(share, (steps - 1) / settings.adapter_steps)
        rate = max(1 - share, 0.02) if steps > 1 else 0.2
        optimizer.param_groups[0]["lr"] = RATE * settings.rate * rate
        rows = [draw.choice(t.train) for t in texts.values() for _ in range(SEQUENCES)]
        with lk.record_plans() as recorded:
            losses_of(store, names, torch.stack(rows)).sum().backward()
        answers = answers or Counter((a.op, a.backend, a.plan) for a in recorded)
        optimizer.step()
        optimizer.zero_grad()
        if share >= 1:
            break
    seconds = time.perf_counter() - began
    store.requires_grad_(False)
    model.eval()
    for name in names:
        store.save(name, settings.out / "adapters" / name)
    return {
        "before": before,
        "after": held_out_losses(store, texts, names),
        "others": held_out_losses(store, texts, [*names[1:], names[0]]),
        "steps": steps,
        "trained_tokens_per_second": steps * len(rows) * settings.context / seconds,
        "answers": [[*which, count] for which, count in answers.items()],
    }


def losses_of(store: lk.AdapterStore, names: Sequence[str], ids: Tensor) -> Tensor:
    """The mean loss of each adapter's sequences, so that none depends on the others."""
    with store.batch(names):
        return loss_of(store.model, ids).view(len(names), -1).mean(1)


@torch.no_grad()
def held_out_losses(
    store: lk.AdapterStore, texts: dict[str, Text], adapters: Sequence[str]
) -> dict[str, float]:
    """Of each text, by the adapters in that order."""
    blocks = min(HELD_OUT_BLOCKS, *(len(text.held_out) for text in texts.values()))
    held_out = (torch.stack([t.held_out[i] for t in texts.values()]) for i in range(blocks))
    losses = torch.stack([losses_of(store, adapters, rows) for rows in held_out])
    return dict(zip(texts, losses.mean(0).tolist(), strict=True))


# Serving.


def batch_of(
    settings: Settings, names: list[str | None], texts: dict[str, Text], draw: random.Random
) -> Batch:
    """Pieces of held-out text to be continued, equally long and in a drawn order."""
    room = settings.context - settings.served_tokens
    length, requests = min(PROMPT_TOKENS, room), []
    for name in draw.sample(names, len(names)):
        block, first = (
            texts[name or draw.choice([*texts])].held_out[0],
            draw.randint(0, room - length),
        )
        requests.append(Request(name, block[first : first + length]))
    return requests


def generate(settings: Settings, model: Any, requests: Batch, **options: Any) -> Tensor:
    """Greedy continuations, [requests, tokens] with their prompts."""
    ids = torch.stack([r.prompt for r in requests]).to(model.device)
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=settings.served_tokens,
        max_new_tokens=settings.served_tokens,
        pad_token_id=model.config.pad_token_id or 0,
        **options,
    )


def answer_merged(settings: Settings, base: Any, whole: Batch, stream: Sequence[Batch]) -> float:
    """Let every request be answered by its merged model, one model after the other; returns the
    seconds of the stream's, without merging."""
    seconds = 0.0
    streamed = [r for batch in stream for r in batch]
    for name in tqdm(dict.fromkeys(r.adapter for r in whole), desc="each adapter merged"):
        model = copy.deepcopy(base)
        if name is not None:
            lk.load_adapter(model, settings.out / "adapters" / name)
            lk.merge_adapter(model, keep_base=False)
        for requests in (whole, streamed):
            own = [r for r in requests if r.adapter == name]
            for group in (own[i : i + STREAM_BATCH] for i in range(0, len(own), STREAM_BATCH)):
                began = clock()
                ids = generate(settings, model.eval(), group)
                seconds += (clock() - began) * (requests is streamed)
                for r, row in zip(group, ids, strict=True):
                    r.expected = row
                    if requests is whole:
                        r.logits = logits(model, row[None])[0]
    return seconds


def same_tokens(requests: Batch, ids: Tensor) -> int:
    """How many of the rows are what the merged models generate."""
    return sum(torch.equal(r.expected, row) for r, row in zip(requests, ids, strict=True))


def together(settings: Settings, store: lk.AdapterStore, base: Any, whole: Batch) -> dict[str, Any]:
    """One batch with every adapter and two plain rows: how far its logits are from those of the
    merged models, and at least how far the base's are."""
    adapters = [r.adapter for r in whole]
    with store.batch(adapters), lk.record_plans() as answers:
        ids = generate(settings, store.model, whole)
    references = torch.stack([r.expected for r in whole])
    with store.batch(adapters):
        found = logits(store.model, references)
    plain = logits(base, references)
    adapted = [i for i, name in enumerate(adapters) if name is not None]
    return {
        "rows": len(whole),
        "adapters": len(adapted),
        "same_tokens": same_tokens(whole, ids),
        "difference": max(difference(y, r.logits) for y, r in zip(found, whole, strict=True)),
        "base_difference": min(difference(plain[i], whole[i].logits) for i in adapted),
        "fused_calls": sum(a.op == "segmented_linear_fwd" for a in answers),
    }


def through(settings: Settings, store: lk.AdapterStore, stream: Sequence[Batch]) -> dict[str, int]:
    """A stream of batches through a store that may have fewer slots than adapters."""
    same = evicted = back_again = 0
    were_in = set(store.resident)
    for requests in stream:
        missing = {r.adapter for r in requests if r.adapter is not None} - set(store.resident)
        evicted += len(missing)
        back_again += len(missing & were_in)
        were_in |= missing
        with store.batch([r.adapter for r in requests]):
            same += same_tokens(requests, generate(settings, store.model, requests))
    return {
        "batches": len(stream),
        "rows": sum(map(len, stream)),
        "same_tokens": same,
        "evicted": evicted,
        "back_again": back_again,
        "slots": store.max_adapters,
    }


def peft_run(
    settings: Settings, base: Any, names: Sequence[str], stream: Sequence[Batch]
) -> Callable[[], Any]:
    """PEFT's own mixed batch, with all adapters loaded."""
    folders = {name: settings.out / "adapters" / name for name in names}
    model = peft_model(base, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(folders[name]), adapter_name=name)
    model.eval()

    def run() -> None:
        for requests in stream:
            chosen = [r.adapter or "__base__" for r in requests]
            generate(settings, model, requests, adapter_names=chosen)

    run()
    return run
