"""The demo's first half: one process makes the base ready, then one per library adapts it.

The comparison is fair by its parts: the same base on disk, the same untrained adapter, text, seed
and schedule, and turns on the machine (``bench.turns``). What stages take and return is plain data.
"""

from __future__ import annotations

import importlib.util
import itertools
import statistics
import time
import warnings
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import lora_kernels as lk
from bench.turns import Turns, UserError
from lora_kernels.integrations.compare_memory import SavedTensors
from lora_kernels.planning.device import facts

from .settings import OURS, Settings

# Steps whose time is not counted: first calls allocate, tune and compile.
UNCOUNTED_STEPS = 3

# What learns most of the library in a minute. The CPU's from runs of about a minute's tokens each
# (two cores of an AMD EPYC, November 2026): held-out loss 2.07 after 2000 steps; 2.2 to 2.4 with
# 192 wide layers, or with twice the batch and half the steps. The GPU's are guesses.
_SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"layers": 4, "width": 128, "pretrain_batch": 2, "pretrain_learning_rate": 4e-3},
    "cuda": {"layers": 8, "width": 512, "pretrain_batch": 16, "pretrain_learning_rate": 1e-3},
}


def prepare(settings: Settings) -> dict[str, Any]:
    """Make the base model and the adapter that everybody starts from; measure the base."""
    if settings.model is None:
        # For files that come from the hub or are large the bars say something; these are neither.
        transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(settings.seed)
    tokenizer = load_tokenizer(settings)
    _, held_out_rows = finetuning_rows(settings, tokenizer)
    result: dict[str, Any] = {"pretraining": None}
    if settings.model is None:
        size = _SIZES[_device().type]
        missing = {key: value for key, value in size.items() if getattr(settings, key) is None}
        settings = replace(settings, **missing)
        model = new_model(settings, tokenizer)
        rows = rows_of(token_ids(tokenizer, settings.pretraining_text), settings.context)
        result["pretraining"] = pretrain(settings, model, rows)
        model.save_pretrained(settings.base)
        tokenizer.save_pretrained(settings.base)
    else:
        model = load_model(settings)
    device, dtype = _device(), str(model.dtype).removeprefix("torch.")
    model.to(device)
    result["before"] = evaluate(settings, model, held_out_rows, "held-out loss, base model")
    try:
        lk.apply_lora(model, settings.rank, settings.alpha, lora_dropout=settings.dropout)
    except ValueError as error:
        raise UserError(str(error)) from error
    lk.save_adapter(model, settings.initial_adapter)
    report = lk.lora_report(model)
    machine = facts(device)
    units = "threads" if device.type == "cpu" else "processors"
    return result | {
        "device_name": f"{machine.name} ({machine.arch}, {machine.processors} {units})",
        "dtype": dtype,
        "model_class": type(model).__name__,
        "adapted_layers": len(report.adapted),
        "trainable_parameters": report.trainable_parameters,
        "base_parameters": report.all_parameters - report.trainable_parameters,
    }


def adapt(library: str, party: int, settings: Settings, turns: Turns) -> dict[str, Any]:
    """Fine-tune the base through one library; with ours, then merge, save and load."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(settings)
    train_rows, held_out_rows = finetuning_rows(settings, tokenizer)
    model = adapted(library, settings, settings.dropout)
    record = FineTuning(party, settings, turns)
    trainer = make_trainer(settings, model, train_rows, record)
    trainer.train()
    counted = record.step_seconds[UNCOUNTED_STEPS:] or record.step_seconds
    result = {
        "losses": [loss.item() for loss in trainer.losses],
        "step_s": statistics.median(counted),
        "tokens_per_second": settings.batch * settings.context / statistics.median(counted),
        "answers": [[*which, count] for which, count in record.answers.items()],
    }
    with turns.alone():
        result["saved_bytes"] = saved_bytes(library, settings, train_rows[: settings.batch])
        title = f"held-out loss, adapted by {library}"
        result["after"] = evaluate(settings, model, held_out_rows, title)
        if library == OURS:
            result |= examine(settings, model, held_out_rows)
    return result


def adapted(library: str, settings: Settings, dropout: float) -> Any:
    """The base with the untrained adapter."""
    model = load_model(settings)
    if library == OURS:
        lk.apply_lora(model, settings.rank, settings.alpha, lora_dropout=dropout)
        return lk.load_adapter(model, settings.initial_adapter)
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(settings.initial_adapter))
    config.lora_dropout = dropout
    return with_peft_adapter(model, settings.initial_adapter, config=config, is_trainable=True)


def saved_bytes(library: str, settings: Settings, rows: Tensor) -> int:
    """What autograd holds at most in a training step, without parameters and buffers."""
    model = adapted(library, settings, settings.usual_dropout).to(_device()).train()
    rows = rows.to(model.device)
    with SavedTensors([*model.parameters(), *model.buffers()]) as saved:
        model(input_ids=rows, labels=rows).loss.backward()
    return saved.peak


def examine(settings: Settings, model: Any, held_out_rows: Tensor) -> dict[str, Any]:
    """What the trained adapter does merged, unmerged, saved, and loaded into a fresh model."""
    device = model.device
    probe = held_out_rows[:4].to(device)
    parameters = dict(model.named_parameters())
    adapted = logits(model, probe)

    lk.merge_adapter(model)
    result: dict[str, Any] = {"merged_difference": difference(logits(model, probe), adapted)}
    lk.unmerge_adapter(model)
    again = dict(model.named_parameters())
    result["objects_restored"] = again.keys() == parameters.keys() and all(
        again[name] is parameter for name, parameter in parameters.items()
    )
    result["unmerged_difference"] = difference(logits(model, probe), adapted)
    lk.save_adapter(model, settings.adapter)

    # The base on disk is what the weights were before training, so no second copy was kept.
    fresh = load_model(settings)
    state = model.state_dict()
    result["weights_restored"] = all(
        torch.equal(state[name].cpu(), tensor) for name, tensor in fresh.state_dict().items()
    )
    loaded: Any = lk.load_adapter(fresh, settings.adapter)
    result["loaded_difference"] = difference(logits(loaded.to(device), probe), adapted)
    if has_peft():
        loaded = with_peft_adapter(load_model(settings), settings.adapter).to(device)
        result["loaded_by_peft_difference"] = difference(logits(loaded, probe), adapted)
    return result


# transformers' Trainer, by time or in turns, and what is measured meanwhile.


class Blocks(Dataset):
    """Rows of tokens, each its own label."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class RecordingTrainer(Trainer):
    """A Trainer that keeps the loss of every step, unrounded and on its device."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[Tensor] = []

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs).detach()
        self.losses.append(loss)
        return loss


def make_trainer(
    settings: Settings, model: Any, rows: Tensor, callback: TrainerCallback
) -> RecordingTrainer:
    arguments = TrainingArguments(
        output_dir=str(settings.out),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.rate,
        lr_scheduler_type="linear",
        warmup_steps=max(settings.steps // 20, 1),
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        # The bars are ours: they know of time limits and of turns.
        disable_tqdm=True,
    )
    trainer = RecordingTrainer(model, arguments, train_dataset=Blocks(rows), callbacks=[callback])
    trainer.remove_callback(PrinterCallback)
    return trainer


@torch.no_grad()
def evaluate(settings: Settings, model: Any, rows: Tensor, title: str) -> float:
    """The mean loss over ``rows``."""
    model.eval()
    losses = [
        model(input_ids=each, labels=each).loss * len(each)
        for each in tqdm(rows.to(model.device).split(settings.batch), desc=title, unit="batch")
    ]
    return torch.stack(losses).sum().item() / len(rows)


def pretrain(settings: Settings, model: Any, rows: Tensor) -> dict[str, Any]:
    """Train all of ``model`` on ``rows``, for as long as the settings allow."""
    rate, limit = settings.pretrain_learning_rate, settings.pretrain_seconds
    assert settings.pretrain_batch is not None and rate is not None
    model.to(_device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    # Four passes at most: a fast machine would learn its text by heart.
    passes = (torch.randperm(len(rows)).split(settings.pretrain_batch) for _ in range(4))
    batches = itertools.chain.from_iterable(passes)
    shown = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"
    began, passed = time.perf_counter(), 0.0
    with tqdm(desc="pre-training", total=limit, bar_format=shown) as bar:
        for chosen in batches:
            # The rate follows the clock: how many steps the time allows is not known before.
            share = passed / limit
            optimizer.param_groups[0]["lr"] = rate * max(min(20 * share, 1 - share), 0.02)
            ids = rows[chosen].to(model.device)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            passed = time.perf_counter() - began
            bar.update(min(passed, limit) - bar.n)
            if passed >= limit:
                break
    last = losses[-50:]
    return {
        "first_loss": losses[0],
        "last_loss": sum(last) / len(last),
        "seconds": passed,
        "steps": len(losses),
    }


class FineTuning(TrainerCallback):
    """Takes turns, and measures: the seconds of each step, and which plans answered."""

    def __init__(self, party: int, settings: Settings, turns: Turns) -> None:
        self.party, self.turns = party, turns
        self.step_seconds: list[float] = []
        self.answers: Counter[tuple[str, str, str]] = Counter()
        self._steps = settings.steps
        self._recording = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.turns.begin(self.party)
        title = "fine-tuning, in turns"
        self._bar = tqdm(desc=title, total=self._steps, unit="step", disable=self.party != 0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._answers = self._recording.enter_context(lk.record_plans())
        self._began = _now(args.device)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_seconds.append(_now(args.device) - self._began)
        if state.global_step == 1:
            self._recording.close()
            self.answers.update((a.op, a.backend, a.plan) for a in self._answers)
        self._bar.update()
        if self.turns.step_done(self.party, state.global_step):
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.close()
        self.turns.end(self.party)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# Models and text.


def new_model(settings: Settings, tokenizer: Any) -> Any:
    """A small GPT-2, its linear layers transformers' Conv1D, with random weights."""
    assert settings.layers is not None and settings.width is not None
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=1 if settings.width % 64 else settings.width // 64,
        # Far less than one pass over the text fits into the time: there is nothing to regularise.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _with_loss(GPT2LMHeadModel(config))


def load_model(settings: Settings) -> Any:
    """The base model, from disk; float32, but bfloat16 for a model of the user's on a GPU.

    Raises:
        UserError: there is no such model, or it is no causal language model.
    """
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if settings.model and torch.cuda.is_available() else "float32"
    base = str(Path(settings.base).expanduser())
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a causal language model from {base!r}: {error}") from error
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < settings.context:
        raise UserError(f"{base!r} has {positions} positions: --context is too large")
    return _with_loss(model)


def _with_loss(model: Any) -> Any:
    # What transformers falls back to, with a warning, where a class's name does not tell the loss.
    if model.loss_type is None:
        model.loss_type = "ForCausalLM"
    return model


def load_tokenizer(settings: Settings) -> Any:
    if settings.model is None:
        return ByT5Tokenizer(extra_ids=0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(settings.model).expanduser()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a tokenizer from {settings.model!r}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def with_peft_adapter(model: Any, directory: Path, **options: Any) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed; nobody here can help it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(model, str(directory), **options)


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """int64 [tokens]."""
    if isinstance(tokenizer, ByT5Tokenizer):
        # Its ids are the bytes, some special tokens further on; asked itself, it takes a second
        # per megabyte and makes one token of a "</s>" in the text.
        read = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return read.long() + tokenizer.offset
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def finetuning_rows(settings: Settings, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Blocks of tokens, [blocks, context] each: to train on, and held out.

    Raises:
        UserError: the text is shorter than one batch.
    """
    train = rows_of(token_ids(tokenizer, settings.train_text), settings.context)
    held_out = rows_of(token_ids(tokenizer, settings.held_out_text), settings.context)
    if len(train) < settings.batch or not len(held_out):
        raise UserError(
            f"the text is too short: it fills {len(train)} blocks of {settings.context} tokens to "
            f"train on (one batch is {settings.batch}) and {len(held_out)} to evaluate on"
        )
    if len(held_out) > settings.evaluation_blocks:
        chosen = torch.linspace(0, len(held_out) - 1, settings.evaluation_blocks).long()
        held_out = held_out[chosen]
    # Whole batches only: every step then counts the same tokens.
    return train[: len(train) // settings.batch * settings.batch], held_out


def rows_of(ids: Tensor, context: int) -> Tensor:
    """[tokens] -> [blocks, context]; what does not fill a block is left out."""
    return ids[: len(ids) // context * context].view(-1, context)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def difference(y: Tensor, reference: Tensor) -> float:
    """max |y - reference| / max |reference|."""
    reference = reference.double()
    return ((y.double() - reference).abs().max() / reference.abs().max()).item()
