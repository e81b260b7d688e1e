"""How the demo trains: transformers' Trainer, by time or in turns; what is measured meanwhile."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import lora_kernels as lk

from .demo_processes import Settings, Turns

# Steps whose time is not counted: first calls allocate, tune and compile.
UNCOUNTED_STEPS = 3


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
    settings: Settings,
    model: Any,
    rows: Tensor,
    steps: int = 1,
    batch: int | None = None,
    callbacks: list[TrainerCallback] | None = None,
    optimizers: tuple[Any, Any] = (None, None),
) -> RecordingTrainer:
    arguments = TrainingArguments(
        output_dir=str(settings.out),
        max_steps=steps,
        per_device_train_batch_size=batch or settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=max(steps // 20, 1),
        seed=settings.seed,
        data_seed=settings.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        # The bars are ours: they know of time limits and of turns.
        disable_tqdm=True,
    )
    trainer = RecordingTrainer(
        model=model,
        args=arguments,
        train_dataset=Blocks(rows),
        callbacks=callbacks,
        optimizers=optimizers,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def evaluate(trainer: RecordingTrainer, rows: Tensor, title: str | None) -> float:
    """The mean loss over ``rows``; a progress bar where there is a title for it."""
    with ExitStack() as stack:
        if title is not None:
            bar = EvaluationBar(title, len(rows), trainer.args.per_device_eval_batch_size)
            trainer.add_callback(bar)
            stack.callback(trainer.remove_callback, bar)
            stack.callback(bar.close)
        return trainer.evaluate(Blocks(rows))["eval_loss"]


class EvaluationBar(TrainerCallback):
    def __init__(self, title: str, rows: int, batch: int) -> None:
        self.bar = tqdm(desc=title, total=-(-rows // batch), unit="batch")
        self.close = self.bar.close

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self.bar.update()


def pretrain(settings: Settings, model: Any, rows: Tensor) -> dict[str, Any]:
    """Train all of ``model`` on ``rows``, for as long as the settings allow."""
    batch, rate = settings.pretrain_batch, settings.pretrain_learning_rate
    assert batch is not None and rate is not None
    limit = TimeLimit(settings.pretrain_seconds)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
    # The rate follows the clock: how many steps the time allows is not known beforehand.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: max(min(limit.share() / 0.05, (1 - limit.share()) / 0.95), 0.02)
    )
    trainer = make_trainer(
        settings,
        model,
        rows,
        # A bound for machines so fast that the model would learn its text by heart.
        steps=4 * -(-len(rows) // batch),
        batch=batch,
        callbacks=[limit],
        optimizers=(optimizer, schedule),
    )
    limit.losses = trainer.losses
    trainer.train()
    return {
        "losses": torch.stack(trainer.losses).tolist(),
        "seconds": limit.share() * settings.pretrain_seconds,
        "tokens": len(trainer.losses) * batch * rows.shape[1],
    }


class TimeLimit(TrainerCallback):
    """Stops training when its seconds are over, and shows them passing."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.losses: list[Tensor] = []
        self._began: float | None = None

    def share(self) -> float:
        """How much of the time has passed; 1 is all of it."""
        return 0.0 if self._began is None else (time.perf_counter() - self._began) / self.seconds

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            desc="pre-training",
            total=round(self.seconds),
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}",
        )
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The loss is read before the clock: reading waits for the device to have come this far.
        if state.global_step % 10 == 0:
            loss = self.losses[-1].item()
            self._bar.set_postfix_str(f" step {state.global_step}, loss {loss:.3f}", refresh=False)
        if self.share() >= 1.0:
            control.should_training_stop = True
        self._bar.update(min(self.share(), 1.0) * self.seconds - self._bar.n)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._bar.close()


class FineTuning(TrainerCallback):
    """Takes turns, and measures: the seconds of each step, memory, and which plans answered."""

    def __init__(self, party: int, settings: Settings, turns: Turns) -> None:
        self.party = party
        self.turns = turns
        self.step_seconds: list[float] = []
        self.answers: Counter[tuple[str, str, str]] = Counter()
        self._bar: tqdm | None = None
        self._steps = settings.steps
        self._recording = ExitStack()

    def step_quartiles(self) -> list[float]:
        """Seconds: lower quartile, median, upper quartile; without the first steps, if possible."""
        counted = self.step_seconds[UNCOUNTED_STEPS:] or self.step_seconds
        if len(counted) == 1:
            return 3 * counted
        return statistics.quantiles(counted, n=4, method="inclusive")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._device = args.device
        self.turns.begin(self.party)
        if self.party == 0:
            self._bar = tqdm(desc="fine-tuning, in turns", total=self._steps, unit="step")
        self.memory = Memory(self._device)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._answers = self._recording.enter_context(lk.record_plans())
        self._synchronize()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._synchronize()
        self.step_seconds.append(time.perf_counter() - self._began)
        if state.global_step == 1:
            self._recording.close()
            self.answers.update((a.op, a.backend, a.plan) for a in self._answers)
        if self._bar is not None:
            self._bar.update()
        if self.turns.step_done(self.party, state.global_step):
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory.stop()
        if self._bar is not None:
            self._bar.close()
        self.turns.end(self.party)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Memory:
    """The most memory in use from the construction to ``stop``, and how much it was before.

    On a GPU torch's allocations, elsewhere the resident set of this process. ``peak`` is None where
    the system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before: int | None = torch.cuda.memory_allocated(device)
            return
        # Linux: the high-water mark starts again from here; where that is not allowed it stays.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _resident_set("VmRSS")

    def stop(self) -> None:
        if self._device.type == "cuda":
            self.peak: int | None = torch.cuda.max_memory_allocated(self._device)
        else:
            self.peak = _resident_set("VmHWM")

    def as_dict(self) -> dict[str, int | None]:
        return {"before": self.before, "peak": self.peak}


def _resident_set(field: str) -> int | None:
    """Bytes: "VmRSS", the resident set, or "VmHWM", the most it was."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    # Only the maximum is told, in bytes on macOS and in KiB elsewhere.
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024
