"""The demo's second half: ten adapters trained in mixed batches, then served together.

What it takes and returns is plain data, as the stages of ``demo_stages`` do.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm.auto import tqdm

import lora_kernels as lk
from lora_kernels.testing import error_and_budget

from .demo_processes import PEFT, Settings
from .demo_stages import has_peft, load_model, load_tokenizer, rows_of, token_ids, with_peft_adapter

# Of the store that the stream of batches goes through, which has fewer slots than adapters; and of
# each batch of it.
STREAM_SLOTS = 6
STREAM_ADAPTERS, STREAM_BATCH = 5, 8
# Sequences of each package in a training step, a quarter of the fine-tuning's, and what of its
# learning rate suits them: after 12 steps at all of it the packages' held-out loss had risen from
# 2.5692 to 2.5714, at 0.3 of it it had fallen to 2.5672 (CPU, November 2026).
SEQUENCES, RATE = 2, 0.3
HELD_OUT_BLOCKS = 16
ROUNDS = 3

FEW, ALL, MERGED = "store with eviction", "store with a slot for each", "one merged model at a time"


@dataclass
class Text:
    """Blocks of a package's tokens, [blocks, context], and the beginning of its held-out text."""

    train: Tensor
    held_out: Tensor
    prompt: Tensor


@dataclass
class Request:
    adapter: str | None
    prompt: Tensor


def serve(settings: Settings) -> dict[str, Any]:
    """Train an adapter for each package, all in one batch; then serve them in mixed batches."""
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(settings.seed)
    tokenizer = load_tokenizer(settings)
    texts = package_texts(settings, tokenizer)
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
    runs = {FEW: store_run(settings, few, stream), ALL: store_run(settings, everybody, stream)}
    if has_peft():
        runs[PEFT] = peft_run(settings, base, list(texts), stream)
    result["seconds"] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            result["seconds"][name].append(run())
    result["seconds"] = {k: statistics.median(v) for k, v in result["seconds"].items()}
    result["seconds"][MERGED] = expected.seconds
    result["generated"] = sum(map(len, stream)) * settings.served_tokens
    return result


def package_texts(settings: Settings, tokenizer: Any) -> dict[str, Text]:
    texts = {}
    for name, (train_text, held_out) in settings.packages.items():
        blocks = [
            rows_of(token_ids(tokenizer, text), settings.context) for text in (train_text, held_out)
        ]
        prompt = token_ids(tokenizer, held_out)[: settings.context - settings.served_tokens]
        if len(blocks[0]) and len(blocks[1]):
            texts[name] = Text(blocks[0], blocks[1][:HELD_OUT_BLOCKS], prompt)
    return texts


def ranks(settings: Settings, texts: dict[str, Text]) -> dict[str, int]:
    """Every second adapter has twice the rank."""
    return {name: settings.rank * (1 + i % 2) for i, name in enumerate(texts)}


# Training.


def train(settings: Settings, base: Any, texts: dict[str, Text]) -> dict[str, Any]:
    """One adapter for each package; every step has sequences of each, and one backward."""
    model = copy.deepcopy(base)
    store = lk.AdapterStore(model, len(texts), 2 * settings.rank, dtype=torch.float32)
    for name, rank in ranks(settings, texts).items():
        store.create(name, rank, settings.alpha * rank / settings.rank)
    before = held_out_losses(store, texts)
    store.requires_grad_()
    model.train()
    draw, steps, began = random.Random(settings.seed), 0, time.perf_counter()
    rate = RATE * settings.learning_rate
    optimizer = torch.optim.AdamW(store.parameters(), rate, weight_decay=0.0)

    def share() -> float:
        passed = (time.perf_counter() - began) / settings.package_seconds
        return max(min(1.0, 1.0 - max(passed, steps / settings.package_steps)), 0.02)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: share() if steps else 0.2)
    answers: Counter[tuple[str, str, str]] = Counter()
    for _ in tqdm(range(settings.package_steps), desc="an adapter for each package"):
        ids = torch.stack(
            [text.train[i] for text in texts.values() for i in picks(draw, len(text.train))]
        )
        with lk.record_plans() as recorded:
            losses_of(store, list(texts), ids).sum().backward()
        answers = answers or Counter((a.op, a.backend, a.plan) for a in recorded)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
        schedule.step()
        if time.perf_counter() - began > settings.package_seconds:
            break
    seconds = time.perf_counter() - began
    store.requires_grad_(False)
    model.eval()
    after = held_out_losses(store, texts)
    names = list(texts)
    others = held_out_losses(store, texts, [*names[1:], names[0]])
    for name in texts:
        store.save(name, settings.adapters / name)
    return {
        "before": before,
        "after": after,
        "others": others,
        "steps": steps,
        "tokens_per_second": steps * ids.numel() / seconds,
        "answers": [[*which, count] for which, count in answers.items()],
    }


def picks(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(count) for _ in range(SEQUENCES)]


def losses_of(store: lk.AdapterStore, names: Sequence[str], ids: Tensor) -> Tensor:
    """The mean loss of each adapter's sequences, so that none depends on the others."""
    ids = ids.to(store.model.device)
    with store.batch(names):
        y = store.model(input_ids=ids).logits
    losses = F.cross_entropy(
        y[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return losses.view(len(names), -1).mean(1)


@torch.no_grad()
def held_out_losses(
    store: lk.AdapterStore, texts: dict[str, Text], adapters: Sequence[str] | None = None
) -> dict[str, float]:
    """Of each package, by its own adapter or by those in ``adapters``."""
    blocks = min(len(text.held_out) for text in texts.values())
    total = sum(
        losses_of(
            store, adapters or list(texts), torch.stack([t.held_out[i] for t in texts.values()])
        )
        for i in range(blocks)
    )
    assert isinstance(total, Tensor)
    return dict(zip(texts, (total / blocks).tolist(), strict=True))


# Requests, and what a merged model makes of each.


def request(name: str | None, texts: dict[str, Text], draw: random.Random) -> Request:
    """A piece of the package's held-out text to be continued; all are equally long."""
    text = texts[name or draw.choice(list(texts))].prompt
    length = min(24, *(len(t.prompt) for t in texts.values()))
    first = draw.randrange(len(text) - length + 1)
    return Request(name, text[first : first + length])


def stream_batch(number: int, texts: dict[str, Text], draw: random.Random) -> list[Request]:
    """Five adapters, of which the batch before had two, and the base."""
    packages = list(texts)
    chosen = {packages[(3 * number + i) % len(packages)]: None for i in range(STREAM_ADAPTERS)}
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
        self.tokens: dict[int, Tensor] = {}
        # Of the requests in ``whole``: the logits of prompt and continuation, and in float64.
        self.eager: dict[int, Tensor] = {}
        self.exact: dict[int, Tensor] = {}
        # For the stream's; merging is not counted.
        self.seconds = 0.0
        in_stream = [r for batch in stream for r in batch]
        names = list(dict.fromkeys(r.adapter for r in (*whole, *in_stream)))
        for name in tqdm(names, desc="each adapter merged"):
            model = self._merged(settings, base, name)
            exact = self._merged(settings, base, name, torch.float64)
            for r in whole:
                if r.adapter == name:
                    ids = generate(settings, model, [r])
                    self.tokens[id(r)] = ids[0]
                    self.eager[id(r)] = logits(model, ids)[0]
                    self.exact[id(r)] = logits(exact, ids)[0]
            own = [r for r in in_stream if r.adapter == name]
            groups = [own[i : i + STREAM_BATCH] for i in range(0, len(own), STREAM_BATCH)]
            if groups:
                generate(settings, model, groups[0])
            began = clock(model)
            answered = [generate(settings, model, group) for group in groups]
            self.seconds += clock(model) - began
            for group, ids in zip(groups, answered, strict=True):
                self.tokens |= {id(r): row for r, row in zip(group, ids, strict=True)}

    @staticmethod
    def _merged(
        settings: Settings, base: Any, name: str | None, dtype: torch.dtype | None = None
    ) -> Any:
        model = copy.deepcopy(base)
        if dtype is not None:
            model.to(dtype)
        if name is not None:
            lk.load_adapter(model, settings.adapters / name)
            lk.merge_adapter(model, keep_base=False)
        return model.eval()

    def same_tokens(self, requests: Sequence[Request], ids: Tensor) -> int:
        """How many of the rows are what the merged models generate."""
        return sum(
            torch.equal(self.tokens[id(r)], row) for r, row in zip(requests, ids, strict=True)
        )


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
    with store.batch([r.adapter for r in requests]), lk.record_plans() as answers:
        ids = generate(settings, store.model, requests)
    references = torch.stack([expected.tokens[id(r)] for r in requests])
    with store.batch([r.adapter for r in requests]):
        found = logits(store.model, references)
    plain = logits(store.model, references)
    errors, seen = [], []
    for r, y, base in zip(requests, found, plain, strict=True):
        errors.append(over_budget(y, expected, r))
        if r.adapter is not None:
            seen.append(over_budget(base, expected, r))
    return {
        "rows": len(requests),
        "adapters": len({r.adapter for r in requests} - {None}),
        "same_tokens": expected.same_tokens(requests, ids),
        "error_over_budget": max(errors),
        "base_over_budget": min(seen),
        "answers": [
            [*which, count]
            for which, count in Counter((a.op, a.backend, a.plan) for a in answers).items()
        ],
    }


def over_budget(y: Tensor, expected: Merged, request: Request) -> float:
    """The error of a request's logits against float64, over what torch's own errors allow."""
    eager, exact = expected.eager[id(request)], expected.exact[id(request)]
    # As in the tests, a model's budget is that of one operator doubled.
    return max(error / (2 * b) for error, b in error_and_budget(y, eager, exact).values())


def through(
    settings: Settings,
    store: lk.AdapterStore,
    stream: Sequence[Sequence[Request]],
    expected: Merged,
) -> dict[str, Any]:
    """A stream of batches through a store with fewer slots than adapters."""
    same = brought_in = back_again = 0
    were_in = set(store.resident)
    for requests in stream:
        used = {r.adapter for r in requests if r.adapter is not None}
        missing = used - set(store.resident)
        brought_in += len(missing)
        back_again += len(missing & were_in)
        were_in |= missing
        with store.batch([r.adapter for r in requests]):
            same += expected.same_tokens(requests, generate(settings, store.model, requests))
    return {
        "batches": len(stream),
        "rows": sum(map(len, stream)),
        "same_tokens": same,
        "brought_in": brought_in,
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
    model = with_peft_adapter(copy.deepcopy(base), settings.adapters / names[0], name=names[0])
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
