"""A tiny model in training as people run it: adapted by us or by PEFT, alike in everything else."""

import warnings

import peft
import small
import tokenizers
import torch
import transformers
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

import lora_kernels as lk
from lora_kernels.spec import native
from lora_kernels.testing.linear import assert_within_budget

# Ways to have a model's linear layers computed by this package.
HOWS = ["apply_lora", "accelerate_peft"]

# Per architecture: a size, the layers that are adapted, how many they are in a block, and how many
# of the first have the embedding for input, which no gradient reaches. GPT-2's own dropout is off.
FAMILIES = {
    "llama": (
        {"hidden_size": 32, "intermediate_size": 48, "use_cache": False},
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        7,
        3,
    ),
    "gpt2": (
        {"n_embd": 32, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        ["c_attn", "c_proj", "c_fc"],
        4,
        1,
    ),
    "vit": ({"hidden_size": 32, "intermediate_size": 48}, ["q_proj", "v_proj", "fc1", "fc2"], 4, 2),
}
FAMILIES["llama tied"] = FAMILIES["llama"]
# A rank and an alpha that are no powers of two.
LORA = {"r": 5, "lora_alpha": 12}
STOCK = "peft"


def tiny(how, dtype=None, name="llama", *, weights=torch.float32, num_hidden_layers=2, **config):
    """The same weights and the same adapter for every library: "peft" is PEFT as it comes. With
    weights of half precision the adapter is float32, unless a dtype is given for all."""
    size, targets, *_ = FAMILIES[name]
    model = small.build(name, num_hidden_layers=num_hidden_layers, **size).to(weights)
    model = adapted(model, how, target_modules=targets, **(LORA | config))
    return small.draw_adapter(model if dtype is None else model.to(dtype))


def adapted(model, how, **config):
    if how == "apply_lora":
        return lk.apply_lora(model, **config)
    with warnings.catch_warnings():
        # That fan_in_fan_out is set to what a Conv1D needs.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(model, peft.LoraConfig(**config))
    if how == "accelerate_peft":
        lk.accelerate_peft(model)
    return model


def trainable(model):
    """name -> Parameter, by the same names for ours and PEFT's models."""
    return {
        f"{name} {which}": parameter
        for name, (a, b, *_) in small.adapters(model).items()
        for which, parameter in (("A", a), ("B", b))
    }


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def assert_answered(answers, *, forwards, backwards, entered=False, name="llama", blocks=2):
    """Every call was answered by our kernels, as often as layers times passes; ``entered`` where a
    gradient goes on to the embedding's output."""
    plans = {(answer.backend, answer.plan) for answer in answers}
    assert plans == {("cpu", "native" if native.load() else "vendor")}, f"answered by {plans}"
    layers, first = blocks * FAMILIES[name][2], FAMILIES[name][3]
    into = layers if entered else layers - first
    counts = {op: sum(answer.op == op for answer in answers) for op in {a.op for a in answers}}
    expected = {
        "lora_linear_fwd": layers * forwards,
        "lora_linear_dx": into * backwards,
        "lora_shrink": (layers - into) * backwards,
        "lora_linear_dab": layers * backwards,
    }
    expected = {op: count for op, count in expected.items() if count}
    assert counts == expected, f"{counts}, expected {expected}"


def assert_close(name, ours, eager, exact):
    """Two budgets of one operator: a model is a chain of them, and transformers computes norms,
    softmax and loss in float32 in the float64 model too."""
    assert_within_budget(name, ours, eager, exact, budgets=2)


def rows(count, length=12, seed=7):
    """Token ids [count, length] that can be learned: every row counts upwards from its start."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(3, small.VOCABULARY, (count, 1), generator=generator)
    step = torch.randint(1, 4, (count, 1), generator=generator)
    return 3 + (start + step * torch.arange(length)) % (small.VOCABULARY - 3)


class Recorder(TrainerCallback):
    """The gradients that the first optimizer step finds."""

    def __init__(self, of):
        self.gradients, self.of = None, of

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = self.of(model)


class Run:
    """One training: ``losses`` [steps, micro-batches], the ``gradients`` before the first step, and
    who answered. ``of`` names a model's gradients."""

    def __init__(self, model, directory, *, sft=False, resume=None, of=gradients, **arguments):
        self.model, recorder, losses = model, Recorder(of), {}
        trainer, config_of, data, extra = _for_trl() if sft else _for_transformers()

        class Recording(trainer):
            def training_step(self, *args, **kwargs):
                loss = super().training_step(*args, **kwargs).detach()
                losses.setdefault(self.state.global_step, []).append(loss)
                return loss

        config = {
            "output_dir": str(directory),
            "per_device_train_batch_size": 2,
            "max_steps": 1,
            "learning_rate": 5e-3,
            "lr_scheduler_type": "constant",
            "seed": 11,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
        } | arguments
        self.trainer = Recording(
            model=model,
            args=config_of(**config),
            train_dataset=data,
            callbacks=[recorder],
            **extra,
        )
        self.trainer.remove_callback(transformers.PrinterCallback)
        with lk.record_plans() as self.answers:
            self.trainer.train(resume_from_checkpoint=resume)
        self.gradients = recorder.gradients
        self.losses = torch.tensor([losses[step] for step in sorted(losses)])


def _for_transformers():
    data = [{"input_ids": row, "labels": row} for row in rows(64)]
    return Trainer, TrainingArguments, data, {}


def _for_trl():
    import datasets
    import trl

    # One token for each word, for form's sake: what is trained on is given as tokens already.
    words = {f"w{i}": i for i in range(small.VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w3")),
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
        unk_token="w3",
    )
    data = datasets.Dataset.from_dict({"input_ids": rows(64).tolist()})
    return trl.SFTTrainer, trl.SFTConfig, data, {"processing_class": tokenizer}


def checkpointing(use_reentrant):
    """Trainer's arguments; None: no checkpointing."""
    if use_reentrant is None:
        return {}
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant},
    }
