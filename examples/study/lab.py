"""What all questions share: a base model, text to train on, and one way to train and to measure."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import random
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from bench.tables import count
from lora_kernels.integrations.compare_memory import SavedTensors, step_peak

from ..demo import training
from ..demo.settings import Settings
from ..demo.text import finetuning_corpus, pretraining_text
from ..demo.training import Loss, clock, loss_of, optimized, rate_share
from .settings import Budget

T = TypeVar("T")


class Unanswered(Exception):
    """A question cannot be asked of this model or here; the message is shown in its place."""


class Run(NamedTuple):
    """What a fine-tuning brought."""

    # Of every step.
    losses: list[float]
    # The mean loss over the held-out rows afterwards.
    held_out: float
    # The median second of a step.
    step_s: float
    # How many numbers were trained.
    parameters: int
    # Where memory was asked for: what autograd saves in a step, and the most that is allocated.
    saved_bytes: int | None = None
    peak_bytes: int | None = None


class Tuned(NamedTuple):
    """The runs of all seeds at one learning rate, the best for the first seed."""

    rate: float
    runs: list[Run]
    # The first seed's at every rate.
    tried: dict[float, Run]


class Lab:
    """A frozen base model in evaluation mode, rows of tokens, and the budget.

    Attributes:
        steps, seeds, rounds, seconds, quick: see ``Budget``.
        rate: a learning rate for adapters that suits the base.
        device, tokenizer: the base's.
        base: the model itself, never to be written to; ``fresh()`` copies it.
        rows, held_out: int64 [blocks, context], to train on and to evaluate on, of the ``corpus``.
        out: the study's folder, for files.
    """

    def __init__(self, settings: Settings, budget: Budget) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.set_seed(settings.seed)
        self.settings, self.budget = settings, budget
        self.steps, self.seeds, self.rounds = budget.steps, budget.seeds, budget.rounds
        self.seconds, self.quick = budget.seconds, budget.quick
        self.rate, self.out = settings.rate, settings.out
        self.device = training.DEVICE
        self.tokenizer = training.load_tokenizer(settings)
        self.corpus = corpus = finetuning_corpus(settings.data)
        self.rows, self.held_out = training.finetuning_rows(settings, self.tokenizer, corpus)
        self.base = training.load_model(settings) if settings.model else self._own_base()
        self.base.to(self.device).eval().requires_grad_(False)
        self.before = self.evaluate(self.base)
        size = count(sum(parameter.numel() for parameter in self.base.parameters()))
        kind = f"{type(self.base).__name__}, {size} parameters, {self.base.dtype}"
        self.told = (
            f"Base: {settings.model or 'the demo model'} ({kind.replace('torch.', '')}), held-out "
            f"loss {self.before:.4f}. Text: {corpus}. A run takes {self.steps} steps of "
            f"{settings.batch} x {settings.context} tokens at a learning rate of {self.rate:g} "
            f"where nothing else is said, and {len(self.seeds)} seeds."
        )
        self.digest = _digest([*self.base.parameters(), self.rows, self.held_out])

    def _own_base(self) -> Any:
        """The small GPT-2, pre-trained on text that is not the corpus; once, then from a file."""
        folder = self.out / "base"
        mark = folder / "made_from.json"
        made_from = {
            "budget": {k: v for k, v in asdict(self.budget).items() if k not in _OF_QUESTIONS},
            # The text is this Python's library, without the corpus.
            "python": sys.version,
            "without": sorted(map(str, self.corpus.files)),
            "sources": sources(Path(training.__file__)),
            "device": self.device.type,
        }
        made_from = json.loads(json.dumps(made_from))
        if not mark.exists() or json.loads(mark.read_text()) != made_from:
            model = self.pretrain(training.new_model(self.settings, self.tokenizer))
            model.save_pretrained(folder)
            mark.write_text(json.dumps(made_from))
        # From the file the first time too: what follows starts from the same bits.
        return transformers.AutoModelForCausalLM.from_pretrained(folder)

    def pretrain(self, model: Any, share: float = 1.0) -> Any:
        """Train all of a new model on text that is not the corpus, for a share of the base's time;
        returns it in evaluation mode, frozen."""
        seconds = share * self.settings.pretrain_seconds
        settings = replace(self.settings, pretrain_seconds=seconds)
        text = pretraining_text(without=self.corpus.files)
        rows = training.rows_of(self.tokenizer, text, settings.context)
        training.pretrain(settings, model.to(self.device), rows)
        return model.eval().requires_grad_(False)

    def fresh(self, seed: int = 0) -> Any:
        """A copy of the base, all of it frozen; what is drawn next (an adapter) is the seed's."""
        model = copy.deepcopy(self.base)
        torch.manual_seed(seed)
        return model

    def finetune(
        self,
        model: Any,
        *,
        seed: int = 0,
        rate: float | None = None,
        steps: int | None = None,
        batch: int | None = None,
        parameters: Iterable[Any] | None = None,
        loss: Loss = loss_of,
        rows: Tensor | None = None,
        held_out: Tensor | None = None,
        after_step: Callable[[int], Any] | None = None,
        memory: bool = False,
    ) -> Run:
        """Train with AdamW, a short warm-up and a rate that falls to 0; then evaluate.

        Args:
            seed: of the batches and of dropout.
            parameters: what to train, parameters or groups of them as an optimizer takes them;
                default: what ``model`` has with ``requires_grad``.
            loss: of a model on some rows; also of the held-out ones, in evaluation mode.
            rows, held_out: instead of the lab's; what ``loss`` is given is ``rows[indices]``.
            after_step: called with the step's number, from 0, while gradients are still there.
            memory: measure that of a step, too (the step changes nothing).
        """
        rows = self.rows if rows is None else rows
        steps, batch = steps or self.steps, batch or self.settings.batch
        if parameters is None:
            parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, rate or self.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: rate_share(n, steps))
        if after_step is not None:
            optimizer.register_step_post_hook(lambda *_: after_step(len(losses)))
        draw = random.Random(seed)
        torch.manual_seed(seed)
        losses: list[float] = []
        seconds = []
        model.train()
        for _ in range(steps):
            chosen = rows[draw.sample(range(len(rows)), batch)]
            start = clock()
            losses.append(optimized(model, optimizer, chosen, loss))
            seconds.append(clock() - start)
            schedule.step()
        trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        found = Run(
            list(losses),
            self.evaluate(model, held_out, loss),
            statistics.median(seconds[training.UNCOUNTED_STEPS :] or seconds),
            trained,
        )
        if not memory:
            return found
        # The rate is 0 now, so the optimizer changes nothing.
        model.train()
        with SavedTensors([*model.parameters(), *model.buffers()]) as saved:
            loss(model, chosen).mean().backward()
        optimizer.zero_grad()
        peak = step_peak(lambda: optimized(model, optimizer, chosen, loss), self.device.type)
        return found._replace(saved_bytes=saved.peak, peak_bytes=peak)

    @torch.no_grad()
    def evaluate(self, model: Any, rows: Tensor | None = None, loss: Loss = loss_of) -> float:
        """The mean loss over ``rows``; default: the held-out ones."""
        model.eval()
        batches = (self.held_out if rows is None else rows).split(16)
        return torch.cat([loss(model, batch).reshape(-1) for batch in batches]).mean().item()

    def in_turns(
        self, calls: dict[str, Callable[[], Any]], rounds: int | None = None
    ) -> dict[str, float]:
        """The median seconds of each call; the calls take turns, and their first does not count."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        turns = list(calls)
        for _ in range((rounds or self.rounds) + 1):
            for name in turns:
                start = clock()
                calls[name]()
                seconds[name].append(clock() - start)
            turns.reverse()
        return {name: statistics.median(times[1:]) for name, times in seconds.items()}

    def sweep(
        self,
        title: str,
        names: Iterable[str],
        rates: Sequence[float],
        run: Callable[[str, float, int], Run],
    ) -> dict[str, dict[float, list[Run]]]:
        """What ``run(name, rate, seed)`` returns for all seeds, by name and learning rate."""
        found: dict[str, dict[float, list[Run]]] = {n: {r: [] for r in rates} for n in names}
        # The seeds outermost: what the machine does meanwhile falls on all alike.
        for seed, name, rate in self.each(title, itertools.product(self.seeds, found, rates)):
            found[name][rate].append(run(name, rate, seed))
        return found

    def tuned(
        self,
        title: str,
        names: Iterable[str],
        rates: Sequence[float],
        run: Callable[[str, float, int], Run],
    ) -> dict[str, Tuned]:
        """As ``sweep``, in fewer runs: what is best for the first seed is for the others."""
        first, *others = self.seeds
        tried: dict[str, dict[float, Run]] = {name: {} for name in names}
        for rate, name in self.each(f"{title}, rates", itertools.product(rates, tried)):
            tried[name][rate] = run(name, rate, first)
        best = {
            name: min(runs, key=lambda rate: runs[rate].held_out) for name, runs in tried.items()
        }
        chosen = {name: [tried[name][rate]] for name, rate in best.items()}
        for seed, (name, rate) in self.each(
            f"{title}, seeds", itertools.product(others, best.items())
        ):
            chosen[name].append(run(name, rate, seed))
        return {name: Tuned(best[name], chosen[name], tried[name]) for name in tried}

    @staticmethod
    def each(title: str, items: Iterable[T], unit: str = "run") -> Iterable[T]:
        """``items``, behind a progress bar."""
        return tqdm(list(items), desc=title, unit=unit)


def peft_model(model: Any, config: Any) -> Any:
    """PEFT's model of a configuration."""
    import peft

    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed. And it says that it sets
        # fan_in_fan_out, which GPT-2's layers need.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`|fan_in_fan_out is set")
        return peft.get_peft_model(model, config)


# Of a budget: what does not change the base.
_OF_QUESTIONS = {"seconds", "steps", "seeds", "rounds", "quick", "batch", "evaluation_blocks"}


def _digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def sources(*paths: Path) -> str:
    """A hash of some files, or folders of them."""
    found = hashlib.sha256()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.update(file.read_bytes())
    return found.hexdigest()[:16]
