"""The demo's second half: adapters for several texts, trained in mixed batches and served together.

What it takes and returns is plain data.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm.auto import tqdm

import lora_kernels as lk
from lora_kernels.testing.linear import error_and_budget

from .settings import PEFT, Settings
from .training import has_peft, load_model, load_tokenizer, rows_of, token_ids, with_peft_adapter

# Of the store that the stream of batches goes through, which has fewer slots than adapters; and of
# each batch of it.
STREAM_SLOTS = 6
STREAM_ADAPTERS, STREAM_BATCH = 5, 8
# Sequences of each text in a training step, a quarter of the fine-tuning's, and what of its
# learning rate suits them: after 12 steps at all of it the packages' held-out loss had risen from
# 2.5692 to 2.5714, at 0.3 of it it had fallen to 2.5672 (CPU, November 2026).
SEQUENCES, RATE = 2, 0.3
HELD_OUT_BLOCKS = 16
ROUNDS = 3

FEW, ALL, MERGED = "store with eviction", "store with a slot for each", "one merged model at a time"


class Text(NamedTuple):
    """Blocks of a text's tokens, [blocks, context], and the beginning of what is held out."""

    train: Tensor
    held_out: Tensor
    prompt: Tensor


class Request:
    """A prompt to be continued by an adapter, or by the base."""

    def __init__(self, adapter: str | None, prompt: Tensor) -> None:
        self.adapter, self.prompt = adapter, prompt


def serve(settings: Settings) -> dict[str, Any] | None:
    """Train an adapter for each text, all in one batch; then serve them in mixed batches. None
    where no text fills a block of tokens."""
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(settings.seed)
    texts = tokenized(settings)
    if not texts:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base: Any = load_model(settings).to(device).eval().requires_grad_(False)
    result = {"ranks": ranks(settings, texts)} | train(settings, base, texts)

    draw = random.Random(settings.seed)
    names: list[str | None] = [*texts, None, None]
    draw.shuffle(names)
    whole = [request(name, texts, draw) for name in names]
    stream = [stream_batch(i, texts, draw) for i in range(settings.stream_batches)]
    expected = Merged(settings, base, whole, stream)

    everybody = new_store(settings, base, list(texts), len(texts))
    result["together"] = together(settings, everybody, whole, expected)
    few = new_store(settings, base, list(texts), min(STREAM_SLOTS, len(texts)))
    result["stream"] = through(settings, few, stream, expected)
    runs = {ALL: store_run(settings, everybody, stream)}
    if few.max_adapters < len(texts):
        runs[FEW] = store_run(settings, few, stream)
    if settings.peft and has_peft():
        runs[PEFT] = peft_run(settings, base, list(texts), stream)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(ROUNDS), desc="serving, in turns"):
        for name, run in runs.items():
            seconds[name].append(run())
    tokens = sum(map(len, stream)) * settings.served_tokens
    speeds = {name: tokens / statistics.median(found) for name, found in seconds.items()}
    return result | {"tokens_per_second": speeds | {MERGED: tokens / expected.seconds}}


def tokenized(settings: Settings) -> dict[str, Text]:
    tokenizer = load_tokenizer(settings)
    texts = {}
    for name, both in (settings.texts or {}).items():
        ids = [token_ids(tokenizer, text) for text in both]
        train, held_out = (rows_of(each, settings.context) for each in ids)
        prompt = ids[1][: settings.context - settings.served_tokens]
        if len(train) and len(held_out):
            texts[name] = Text(train, held_out[:HELD_OUT_BLOCKS], prompt)
    return texts


def ranks(settings: Settings, texts: dict[str, Text]) -> dict[str, int]:
    """Every second adapter has twice the rank."""
    return {name: settings.rank * (1 + i % 2) for i, name in enumerate(texts)}


def train(settings: Settings, base: Any, texts: dict[str, Text]) -> dict[str, Any]:
    """One adapter for each text; every step has sequences of each, and one backward."""
    model = copy.deepcopy(base)
    store = lk.AdapterStore(model, len(texts), 2 * settings.rank, dtype=torch.float32)
    for name, rank in ranks(settings, texts).items():
        store.create(name, rank, settings.alpha * rank / settings.rank)
    names = list(texts)
    before = held_out_losses(store, texts, names)
    store.requires_grad_()
    model.train()
    draw, steps, began = random.Random(settings.seed), 0, time.perf_counter()
    optimizer = torch.optim.AdamW(store.parameters(), RATE * settings.rate, weight_decay=0.0)

    def share() -> float:
        """How much of the time and of the steps has passed."""
        passed = (time.perf_counter() - began) / settings.adapter_seconds
        return max(passed, steps / settings.adapter_steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: max(min(1.0, 1.0 - share()), 0.02) if steps else 0.2
    )
    answers: Counter[tuple[str, str, str]] = Counter()
    with tqdm(desc="an adapter for each text", total=settings.adapter_steps) as bar:
        while share() < 1:
            rows = [t.train[i] for t in texts.values() for i in picks(draw, len(t.train))]
            with lk.record_plans() as recorded:
                losses_of(store, names, torch.stack(rows)).sum().backward()
            answers = answers or Counter((a.op, a.backend, a.plan) for a in recorded)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            schedule.step()
            bar.update()
    seconds = time.perf_counter() - began
    store.requires_grad_(False)
    model.eval()
    for name in names:
        store.save(name, settings.adapters / name)
    return {
        "before": before,
        "after": held_out_losses(store, texts, names),
        "others": held_out_losses(store, texts, [*names[1:], names[0]]),
        "steps": steps,
        "trained_tokens_per_second": steps * len(rows) * settings.context / seconds,
        "answers": [[*which, count] for which, count in answers.items()],
    }


def picks(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(count) for _ in range(SEQUENCES)]


def losses_of(store: lk.AdapterStore, names: Sequence[str], ids: Tensor) -> Tensor:
    """The mean loss of each adapter's sequences, so that none depends on the others."""
    ids = ids.to(store.model.device)
    with store.batch(names):
        y = store.model(input_ids=ids).logits[:, :-1]
    losses = F.cross_entropy(y.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(names), -1).mean(1)


@torch.no_grad()
def held_out_losses(
    store: lk.AdapterStore, texts: dict[str, Text], adapters: Sequence[str]
) -> dict[str, float]:
    """Of each text, by the adapters in that order."""
    blocks = min(len(text.held_out) for text in texts.values())
    losses = [
        losses_of(store, adapters, torch.stack([t.held_out[i] for t in texts.values()]))
        for i in range(blocks)
    ]
    return dict(zip(texts, torch.stack(losses).mean(0).tolist(), strict=True))


# Requests, and what a merged model makes of each.


def request(name: str | None, texts: dict[str, Text], draw: random.Random) -> Request:
    """A piece of the held-out text to be continued; all are equally long."""
    text = texts[name or draw.choice(list(texts))].prompt
    length = min(24, *(len(t.prompt) for t in texts.values()))
    first = draw.randrange(len(text) - length + 1)
    return Request(name, text[first : first + length])


def stream_batch(number: int, texts: dict[str, Text], draw: random.Random) -> list[Request]:
    """Five adapters, of which the batch before had two, and the base."""
    known = list(texts)
    chosen = {known[(3 * number + i) % len(known)]: None for i in range(STREAM_ADAPTERS)}
    names: list[str | None] = [*chosen, None]
    names += draw.choices(names, k=STREAM_BATCH - len(names))
    draw.shuffle(names)
    return [request(name, texts, draw) for name in names]


def generate(settings: Settings, model: Any, requests: Sequence[Request], **options: Any) -> Tensor:
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


class Merged:
    """Every request answered by a model of its own: the base, or the base with one adapter merged
    into it, one after the other."""

    def __init__(
        self,
        settings: Settings,
        base: Any,
        whole: Sequence[Request],
        stream: Sequence[Sequence[Request]],
    ) -> None:
        self.tokens: dict[Request, Tensor] = {}
        # Of the requests in ``whole``: the logits of prompt and continuation, and in float64.
        self.eager: dict[Request, Tensor] = {}
        self.exact: dict[Request, Tensor] = {}
        # For the stream's; merging is not counted.
        self.seconds = 0.0
        in_stream = [r for batch in stream for r in batch]
        for name in tqdm(dict.fromkeys(r.adapter for r in whole), desc="each adapter merged"):
            model, exact = copy.deepcopy(base), copy.deepcopy(base).double()
            for each in (model, exact) if name is not None else ():
                lk.load_adapter(each, settings.adapters / name)
                lk.merge_adapter(each, keep_base=False)
            model, exact = model.eval(), exact.eval()
            for r in whole:
                if r.adapter == name:
                    ids = generate(settings, model, [r])
                    self.tokens[r] = ids[0]
                    self.eager[r], self.exact[r] = logits(model, ids)[0], logits(exact, ids)[0]
            own = [r for r in in_stream if r.adapter == name]
            groups = [own[i : i + STREAM_BATCH] for i in range(0, len(own), STREAM_BATCH)]
            if groups:
                generate(settings, model, groups[0])
            for group in groups:
                began = clock(model)
                ids = generate(settings, model, group)
                self.seconds += clock(model) - began
                self.tokens |= dict(zip(group, ids, strict=True))

    def same_tokens(self, requests: Sequence[Request], ids: Tensor) -> int:
        """How many of the rows are what the merged models generate."""
        return sum(torch.equal(self.tokens[r], row) for r, row in zip(requests, ids, strict=True))

    def over_budget(self, y: Tensor, r: Request) -> float:
        """The error of a request's logits against float64, over what torch's own errors allow."""
        # As in the tests, a model's budget is that of one operator doubled.
        found = error_and_budget(y, self.eager[r], self.exact[r]).values()
        return max(error / (2 * budget) for error, budget in found)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def clock(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


# Serving.


def new_store(settings: Settings, base: Any, names: Sequence[str], slots: int) -> lk.AdapterStore:
    """A store of the saved adapters, on a copy of the base."""
    store = lk.AdapterStore(copy.deepcopy(base), slots, 2 * settings.rank)
    for name in names:
        store.load(name, settings.adapters / name)
    return store


def together(
    settings: Settings, store: lk.AdapterStore, requests: Sequence[Request], expected: Merged
) -> dict[str, Any]:
    """One batch with every adapter and two plain rows."""
    adapters = [r.adapter for r in requests]
    with store.batch(adapters), lk.record_plans() as answers:
        ids = generate(settings, store.model, requests)
    references = torch.stack([expected.tokens[r] for r in requests])
    with store.batch(adapters):
        found = logits(store.model, references)
    plain = logits(store.model, references)
    adapted = [i for i, name in enumerate(adapters) if name is not None]
    return {
        "rows": len(requests),
        "adapters": len(adapted),
        "same_tokens": expected.same_tokens(requests, ids),
        "error_over_budget": max(map(expected.over_budget, found, requests)),
        "base_over_budget": min(expected.over_budget(plain[i], requests[i]) for i in adapted),
        "fused_calls": sum(a.op == "segmented_linear_fwd" for a in answers),
    }


def through(
    settings: Settings,
    store: lk.AdapterStore,
    stream: Sequence[Sequence[Request]],
    expected: Merged,
) -> dict[str, Any]:
    """A stream of batches through a store with fewer slots than adapters."""
    same = evicted = back_again = 0
    were_in = set(store.resident)
    for requests in stream:
        missing = {r.adapter for r in requests if r.adapter is not None} - set(store.resident)
        evicted += len(missing)
        back_again += len(missing & were_in)
        were_in |= missing
        with store.batch([r.adapter for r in requests]):
            same += expected.same_tokens(requests, generate(settings, store.model, requests))
    return {
        "batches": len(stream),
        "rows": sum(map(len, stream)),
        "same_tokens": same,
        "evicted": evicted,
        "back_again": back_again,
        "slots": store.max_adapters,
    }


def store_run(
    settings: Settings, store: lk.AdapterStore, stream: Sequence[Sequence[Request]]
) -> Callable[[], float]:
    def run() -> float:
        began = clock(store.model)
        for requests in stream:
            with store.batch([r.adapter for r in requests]):
                generate(settings, store.model, requests)
        return clock(store.model) - began

    return run


def peft_run(
    settings: Settings, base: Any, names: Sequence[str], stream: Sequence[Sequence[Request]]
) -> Callable[[], float]:
    """PEFT's own mixed batch, with all adapters loaded."""
    first = settings.adapters / names[0]
    model = with_peft_adapter(copy.deepcopy(base), first, adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(settings.adapters / name), adapter_name=name)
    model.eval()

    def run() -> float:
        began = clock(model)
        for requests in stream:
            names = [r.adapter or "__base__" for r in requests]
            generate(settings, model, requests, adapter_names=names)
        return clock(model) - began

    run()
    return run
