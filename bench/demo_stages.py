"""What the demo's processes do: one makes the base ready, then one per LoRA library adapts it.

What they take and return is plain data. The comparison is fair by its parts: the same base on disk,
the same untrained adapter, text, seed and schedule, and turns on the machine (``Turns``).
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

import lora_kernels as lk
from lora_kernels.device import facts

from .demo_processes import OURS, Settings, Turns
from .demo_text import UserError
from .demo_training import FineTuning, RecordingTrainer, evaluate, make_trainer, pretrain


def prepare(settings: Settings) -> dict[str, Any]:
    """Make the base model and the adapter that everybody starts from; measure the base."""
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.model is None:
        # For files that come from the hub or are large the bars say something; these are neither.
        transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(settings.seed)
    tokenizer = load_tokenizer(settings)
    train_rows, held_out_rows = finetuning_rows(settings, tokenizer)
    result: dict[str, Any] = {"pretraining": None}
    if settings.model is None:
        settings = with_size(settings)
        model = new_model(settings, tokenizer)
        rows = rows_of(token_ids(tokenizer, settings.pretraining_text), settings.context)
        result["pretraining"] = pretrain(settings, model, rows)
        model.save_pretrained(settings.base)
        tokenizer.save_pretrained(settings.base)
    else:
        model = load_model(settings)
    trainer = make_trainer(settings, model, train_rows)
    result["before"] = evaluate(trainer, held_out_rows, "held-out loss, base model")
    result["sample"] = generate(settings, model, tokenizer)
    device, dtype = trainer.args.device, str(model.dtype).removeprefix("torch.")
    try:
        lk.apply_lora(model, settings.rank, settings.alpha, lora_dropout=settings.dropout)
    except ValueError as error:
        raise UserError(str(error)) from error
    lk.save_adapter(model, settings.initial_adapter)
    report = lk.lora_report(model)
    machine = facts(device)
    units = "threads" if device.type == "cpu" else "processors"
    return result | {
        "device": device.type,
        "device_name": f"{machine.name} ({machine.arch}, {machine.processors} {units})",
        "dtype": dtype,
        "model_class": type(model).__name__,
        "adapted_layers": len(report.adapted),
        "trainable_parameters": report.trainable_parameters,
        "base_parameters": report.all_parameters - report.trainable_parameters,
        "held_out_tokens": held_out_rows.numel(),
        "train_tokens": train_rows.numel(),
    }


def adapt(library: str, party: int, settings: Settings, turns: Turns) -> dict[str, Any]:
    """Fine-tune the base through one library; with ours, then merge, save, load and generate."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = load_tokenizer(settings)
    train_rows, held_out_rows = finetuning_rows(settings, tokenizer)
    if library == OURS:
        model = lk.apply_lora(
            load_model(settings), settings.rank, settings.alpha, lora_dropout=settings.dropout
        )
        lk.load_adapter(model, settings.initial_adapter)
    else:
        model = with_peft_adapter(load_model(settings), settings.initial_adapter, trainable=True)
    record = FineTuning(party, settings, turns)
    trainer = make_trainer(settings, model, train_rows, steps=settings.steps, callbacks=[record])
    trainer.train()
    result = {
        "losses": [loss.item() for loss in trainer.losses],
        "step_seconds": record.step_seconds,
        "step_quartiles": record.step_quartiles(),
        "tokens_per_step": settings.batch * settings.context,
        "memory": record.memory.as_dict(),
        "answers": [[*which, count] for which, count in record.answers.items()],
    }
    with turns.alone():
        result["after"] = evaluate(trainer, held_out_rows, f"held-out loss, adapted by {library}")
        if library == OURS:
            result |= examine(settings, trainer, tokenizer, held_out_rows)
    return result


def examine(
    settings: Settings, trainer: RecordingTrainer, tokenizer: Any, held_out_rows: Tensor
) -> dict[str, Any]:
    """What the trained adapter does merged, unmerged, saved, and loaded into a fresh model."""
    model: Any = trainer.model
    device = trainer.args.device
    probe = held_out_rows[:4].to(device)
    parameters = dict(model.named_parameters())
    adapted = logits(model, probe)

    lk.merge_adapter(model)
    result: dict[str, Any] = {"merged_difference": difference(logits(model, probe), adapted)}
    result["merged"] = evaluate(trainer, held_out_rows, "held-out loss, merged")

    lk.unmerge_adapter(model)
    again = dict(model.named_parameters())
    result["objects_restored"] = again.keys() == parameters.keys() and all(
        again[name] is parameter for name, parameter in parameters.items()
    )
    result["unmerged"] = evaluate(trainer, held_out_rows, "held-out loss, unmerged again")
    result["unmerged_difference"] = difference(logits(model, probe), adapted)
    result["sample"] = generate(settings, model, tokenizer)
    lk.save_adapter(model, settings.adapter)

    # The base on disk is what the weights were before training, so no second copy was kept.
    fresh = load_model(settings)
    state = model.state_dict()
    result["weights_restored"] = all(
        torch.equal(state[name].cpu(), tensor) for name, tensor in fresh.state_dict().items()
    )
    loaded: Any = lk.load_adapter(fresh, settings.adapter)
    loaded.to(device)
    result["loaded_difference"] = difference(logits(loaded, probe), adapted)
    if has_peft():
        loaded = with_peft_adapter(load_model(settings), settings.adapter).to(device)
        result["loaded_by_peft_difference"] = difference(logits(loaded, probe), adapted)
    return result


# Models, text, and what is asked of them.

# What learns most of the library in a minute. The CPU's from runs of about a minute's tokens each
# (two cores of an AMD EPYC, November 2026): held-out loss 2.07 after 2000 steps; 2.2 to 2.4 with
# 192 wide layers, or with twice the batch and half the steps. The GPU's are guesses.
_SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"layers": 4, "width": 128, "pretrain_batch": 2, "pretrain_learning_rate": 4e-3},
    "cuda": {"layers": 8, "width": 512, "pretrain_batch": 16, "pretrain_learning_rate": 1e-3},
}


def with_size(settings: Settings) -> Settings:
    """``settings`` with this device's numbers where the user gave none."""
    size = _SIZES["cuda" if torch.cuda.is_available() else "cpu"]
    return replace(settings, **{k: v for k, v in size.items() if getattr(settings, k) is None})


def new_model(settings: Settings, tokenizer: Any) -> PreTrainedModel:
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


def load_model(settings: Settings) -> PreTrainedModel:
    """The base model, from disk; float32, but bfloat16 for a model of the user's on a GPU.

    Raises:
        UserError: there is no such model, or it is no causal language model.
    """
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if settings.model and torch.cuda.is_available() else "float32"
    try:
        model = AutoModelForCausalLM.from_pretrained(settings.base, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot load a causal language model from {settings.base!r}: {error}"
        ) from error
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < settings.context:
        raise UserError(f"{settings.base!r} has {positions} positions: --context is too large")
    return _with_loss(model)


def _with_loss(model: Any) -> PreTrainedModel:
    # What transformers falls back to, with a warning, where a class's name does not tell the loss.
    if model.loss_type is None:
        model.loss_type = "ForCausalLM"
    return model


def load_tokenizer(settings: Settings) -> Any:
    if settings.model is None:
        return ByT5Tokenizer(extra_ids=0)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a tokenizer from {settings.model!r}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


def with_peft_adapter(
    model: Any, directory: Path, trainable: bool = False, name: str = "default"
) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed; nobody here can help it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(
            model, str(directory), adapter_name=name, is_trainable=trainable
        )


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """int64 [tokens]."""
    if isinstance(tokenizer, ByT5Tokenizer):
        # Its ids are the bytes, some special tokens further on; asked itself, it takes a second
        # per megabyte and makes one token of a "</s>" in the text.
        return (
            torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() + tokenizer.offset
        )
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


def generate(settings: Settings, model: Any, tokenizer: Any) -> str:
    """A seeded continuation of the prompt."""
    inputs = tokenizer(settings.prompt, add_special_tokens=False, return_tensors="pt")
    # Its end, where it and its continuation are more than a sequence.
    prompt = inputs["input_ids"][:, settings.generated_tokens - settings.context :].to(model.device)
    torch.manual_seed(settings.seed)
    ids = model.eval().generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        temperature=0.7,
        top_k=40,
        max_new_tokens=settings.generated_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
