"""The demo's first half: a base model, an adapter fine-tuned through each library in turns, and
what the adapter is worth merged, saved and loaded. What is returned is plain data."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import random
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

import lora_kernels as lk
from bench.training_memory import weight_bytes
from lora_kernels.integrations.compare_memory import SavedTensors, step_peak

from .settings import OURS, PEFT, Settings, UserError
from .text import Corpus

# The loss of a model on some rows: a number, or one for each row.
Loss = Callable[[Any, Tensor], Tensor]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Steps whose time is not counted: first calls allocate, tune and compile.
UNCOUNTED_STEPS = 3
# What learns most of the library in a minute: layers, width, sequences per step, learning rate. The
# CPU's from runs of about a minute's tokens each (two cores of an AMD EPYC, November 2026):
# held-out loss 2.07 after 2000 steps; 2.2 to 2.4 with 192 wide layers, or with twice the batch and
# half the steps. The GPU's are guesses.
_SIZES = {"cpu": (4, 128, 2, 4e-3), "cuda": (8, 512, 16, 1e-3)}


# Models and tokens.


def load_tokenizer(settings: Settings) -> Any:
    if settings.model is None:
        return ByT5Tokenizer(extra_ids=0)
    try:
        return AutoTokenizer.from_pretrained(str(Path(settings.model).expanduser()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a tokenizer from {settings.model!r}: {error}") from error


def load_model(settings: Settings) -> Any:
    """The user's model; bfloat16 on a GPU unless the settings say something else."""
    auto = "bfloat16" if DEVICE.type == "cuda" else "float32"
    dtype = getattr(torch, auto if settings.dtype == "auto" else settings.dtype)
    name = str(Path(str(settings.model)).expanduser())
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load a causal language model from {name!r}: {error}") from error
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and positions < settings.context:
        raise UserError(f"{name!r} has {positions} positions: --context is too large")
    return model


def new_model(settings: Settings, tokenizer: Any) -> Any:
    """A small GPT-2, its linear layers transformers' Conv1D, with random weights."""
    layers, width, *_ = _SIZES[DEVICE.type]
    width = settings.width or width
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=settings.context,
        n_embd=width,
        n_layer=settings.layers or layers,
        n_head=1 if width % 64 else width // 64,
        # Far less than one pass over the text fits into the time: there is nothing to regularise.
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


def token_ids(tokenizer: Any, text: str) -> Tensor:
    """int64 [tokens]."""
    if isinstance(tokenizer, ByT5Tokenizer):
        # Its ids are the bytes, some special tokens further on; asked itself, it takes a second
        # per megabyte and makes one token of a "</s>" in the text.
        return (
            torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() + tokenizer.offset
        )
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def rows_of(tokenizer: Any, text: str, context: int) -> Tensor:
    """[blocks, context]; what does not fill a block is left out."""
    ids = token_ids(tokenizer, text)
    return ids[: len(ids) // context * context].view(-1, context)


def finetuning_rows(settings: Settings, tokenizer: Any, corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Blocks of tokens to train on, and held out."""
    both = (corpus.train, corpus.held_out)
    train, held_out = (rows_of(tokenizer, text, settings.context) for text in both)
    if len(train) < settings.batch or not len(held_out):
        raise UserError(
            f"the text is too short: it fills {len(train)} blocks of {settings.context} tokens to "
            f"train on (one batch is {settings.batch}) and {len(held_out)} to evaluate on"
        )
    some = min(len(held_out), settings.evaluation_blocks)
    return train, held_out[torch.linspace(0, len(held_out) - 1, some).long()]


def with_shared_weights(base: nn.Module) -> Any:
    """A copy of ``base``, whose parameters are the base's own."""
    return copy.deepcopy(base, {id(p): p for p in base.parameters()})


def peft_model(base: Any, directory: Path, **options: Any) -> Any:
    """PEFT's model with the adapter in ``directory``, over the base's own weights."""
    from peft import PeftModel

    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return PeftModel.from_pretrained(with_shared_weights(base), str(directory), **options)


def has_peft() -> bool:
    return importlib.util.find_spec("peft") is not None


# Training.


def loss_of(model: Any, rows: Tensor) -> Tensor:
    """The mean loss of each of the rows."""
    rows = rows.to(DEVICE)
    y = model(input_ids=rows).logits[:, :-1].float()
    losses = nn.functional.cross_entropy(y.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return losses.view(len(rows), -1).mean(1)


@torch.no_grad()
def evaluate(settings: Settings, model: Any, rows: Tensor, title: str) -> float:
    """The mean loss over ``rows``."""
    batches = tqdm(rows.split(settings.batch), desc=f"held-out loss, {title}", unit="batch")
    return torch.cat([loss_of(model.eval(), batch) for batch in batches]).mean().item()


def pretrain(settings: Settings, model: Any, rows: Tensor) -> dict[str, Any]:
    """Train all of ``model`` on ``rows``, for as long as the settings allow."""
    *_, batch, rate = _SIZES[DEVICE.type]
    limit = settings.pretrain_seconds
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    # Four passes at most: a fast machine would learn its text by heart.
    passes = (torch.randperm(len(rows)).split(batch) for _ in range(4))
    shown = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s"
    began, passed = time.perf_counter(), 0.0
    model.train()
    with tqdm(desc="pre-training", total=limit, bar_format=shown) as bar:
        for chosen in itertools.chain.from_iterable(passes):
            # The rate follows the clock: how many steps the time allows is not known before.
            share = passed / limit
            optimizer.param_groups[0]["lr"] = rate * max(min(20 * share, 1 - share), 0.02)
            losses.append(optimized(model, optimizer, rows[chosen]))
            passed = time.perf_counter() - began
            bar.update(min(passed, limit) - bar.n)
            if passed >= limit:
                break
    last = statistics.mean(losses[-50:])
    return {"first": losses[0], "last": last, "seconds": passed, "steps": len(losses)}


def rate_share(step: int, steps: int) -> float:
    """The share of the learning rate in a step: a short warm-up, then a line down."""
    warmup = max(steps // 20, 1)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def optimized(model: Any, optimizer: Any, rows: Tensor, loss_of: Loss = loss_of) -> float:
    """The loss of a step; the optimizer has made it."""
    loss = loss_of(model, rows).mean()
    loss.backward()
    nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def quantised(base: Any) -> Any:
    """A copy of ``base`` with its linear layers in four bits, computed in the base's own dtype."""
    return lk.quantize_base(with_shared_weights(base), "nf4", double_quant=True)


def adapted_weights(model: Any) -> tuple[int, int]:
    """Of the weights below our adapters: how many bytes, and how many numbers."""
    layers = [m for m in model.modules() if isinstance(m, lk.FusedLoRALinear)]
    stored = sum(weight_bytes(layer.weight) for layer in layers)
    return stored, sum(layer.in_features * layer.out_features for layer in layers)


def adapted(library: str, settings: Settings, base: Any, dropout: float) -> Any:
    """The base with the untrained adapter that every model starts from."""
    start = settings.out / "initial-adapter"
    if library == PEFT:
        from peft import PeftConfig

        config: Any = PeftConfig.from_pretrained(str(start))
        config.lora_dropout = dropout
        return peft_model(base, start, config=config, is_trainable=True).train()
    # Ours gets weights of its own, for the merged adapter to go into.
    model = copy.deepcopy(base)
    lk.apply_lora(model, settings.rank, settings.alpha, lora_dropout=dropout)
    if start.exists():
        lk.load_adapter(model, start)
    else:
        lk.save_adapter(model, start)
    return model.train()


def finetune(settings: Settings, models: dict[str, Any], rows: Tensor) -> dict[str, dict[str, Any]]:
    """Train all models by the same batches; their steps take turns."""
    optimizers, losses, seconds = {}, {}, {}
    for library, model in models.items():
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizers[library] = torch.optim.AdamW(trainable, weight_decay=0.0)
        losses[library], seconds[library] = [], []
    draw = random.Random(settings.seed)
    turns = list(models)
    began = time.perf_counter()
    for step in tqdm(range(settings.steps), desc="fine-tuning, in turns", unit="step"):
        batch = rows[draw.sample(range(len(rows)), settings.batch)]
        rate = settings.rate * rate_share(step, settings.steps)
        for library in turns:
            optimizers[library].param_groups[0]["lr"] = rate
            first = step == 0 and library == OURS
            start = time.perf_counter()
            with lk.record_plans() if first else nullcontext() as recorded:
                loss = optimized(models[library], optimizers[library], batch)
            seconds[library].append(time.perf_counter() - start)
            losses[library].append(loss)
            if first:
                answers = Counter((a.op, a.backend, a.plan) for a in recorded)
        turns.reverse()
        if time.perf_counter() - began > settings.finetune_seconds:
            break
    results: dict[str, dict[str, Any]] = {}
    for library, times in seconds.items():
        median = statistics.median(times[UNCOUNTED_STEPS:] or times)
        speed = settings.batch * settings.context / median
        results[library] = {"losses": losses[library], "tokens_per_second": speed}
    results[OURS]["answers"] = [[*which, count] for which, count in answers.items()]
    return results


def memory(library: str, settings: Settings, base: Any, rows: Tensor) -> dict[str, int]:
    """Of a forward and backward, in bytes: the most that autograd holds, without parameters and
    buffers, and the most that is allocated."""
    model = adapted(library, settings, base, settings.usual_dropout)

    def step() -> None:
        loss_of(model, rows).mean().backward()
        model.zero_grad()

    with SavedTensors([*model.parameters(), *model.buffers()]) as saved:
        step()
    return {"saved_bytes": saved.peak, "peak_bytes": step_peak(step, DEVICE.type)}


def examine(settings: Settings, base: Any, model: Any, probe: Tensor) -> dict[str, Any]:
    """What the trained adapter does merged, unmerged, saved, and loaded into a fresh model."""
    parameters = dict(model.named_parameters())
    expected = logits(model, probe)
    lk.merge_adapter(model)
    result: dict[str, Any] = {"merged_difference": difference(logits(model, probe), expected)}
    lk.unmerge_adapter(model)
    again = dict(model.named_parameters())
    result["objects_restored"] = again.keys() == parameters.keys() and all(
        again[name] is parameter for name, parameter in parameters.items()
    )
    state = model.state_dict()
    result["weights_restored"] = all(
        torch.equal(state[name], tensor) for name, tensor in base.state_dict().items()
    )
    result["unmerged_difference"] = difference(logits(model, probe), expected)
    lk.save_adapter(model, settings.out / "adapter")
    loaded: Any = lk.load_adapter(with_shared_weights(base), settings.out / "adapter")
    result["loaded_difference"] = difference(logits(loaded, probe), expected)
    if has_peft():
        loaded = peft_model(base, settings.out / "adapter")
        result["loaded_by_peft_difference"] = difference(logits(loaded, probe), expected)
    if settings.model is None:
        exact = logits(copy.deepcopy(base).double(), probe)
        result["rounding"] = difference(logits(base, probe), exact)
    return result


def clock() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids.to(DEVICE)).logits


def difference(y: Tensor, reference: Tensor) -> float:
    """max |y - reference| / max |reference|."""
    reference = reference.double()
    return ((y.double() - reference).abs().max() / reference.abs().max()).item()
