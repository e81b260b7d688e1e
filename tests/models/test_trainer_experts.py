"""Training the adapters of experts with transformers' Trainer, as with PEFT."""

import mixtures
import peft
import pytest
import small
import torch
from training import HOWS, STOCK, Run, assert_close, checkpointing

import lora_kernels as lk
from lora_kernels.spec import native

# Deprecations inside transformers are not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

LORA = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": mixtures.PARAMETERS}


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


def trainable(model):
    """Parameters by PEFT's names."""
    ours = not isinstance(model, peft.PeftModel)
    return {
        mixtures.peft_name(name) if ours else name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def tiny(how, family):
    """The same weights and the same adapter for every library."""
    model = mixtures.build(family, use_cache=False)
    if how == "apply_lora":
        model = lk.apply_lora(model, **LORA)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    if how == "accelerate_peft":
        lk.accelerate_peft(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(trainable(model).items()):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def assert_answered(answers, forwards, backwards, entered):
    """Both Parameters of both layers; a gradient goes on from the first layer's experts where the
    embedding's output ``entered`` the graph."""
    plan = "native" if native.load() else "vendor"
    assert {(answer.backend, answer.plan) for answer in answers} == {("cpu", plan)}
    expected = {
        "expert_linear_fwd": 4 * forwards,
        "expert_linear_dx": (3 + entered) * backwards,
        "expert_shrink": (1 - entered) * backwards,
        "expert_linear_dab": 4 * backwards,
    }
    counts = {op: sum(answer.op == op for answer in answers) for op in expected}
    assert counts == expected and len(answers) == sum(expected.values())


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_trainer_trains_experts_as_with_peft(how, family, use_reentrant, tmp_path):
    steps, micro = 4, 2
    arguments = {"max_steps": steps, "gradient_accumulation_steps": micro, "max_grad_norm": 0.0}
    arguments |= checkpointing(use_reentrant)
    models = tiny(how, family), tiny(STOCK, family), mixtures.in_float64(tiny(STOCK, family))
    ours, eager, exact = (Run(model, tmp_path, of=gradients, **arguments) for model in models)
    assert not eager.answers
    assert_answered(
        ours.answers,
        forwards=steps * micro * (1 if use_reentrant is None else 2),
        backwards=steps * micro,
        entered=use_reentrant is not None,
    )
    assert ours.gradients.keys() == exact.gradients.keys() and len(ours.gradients) == 8
    for name, gradient in ours.gradients.items():
        assert_close(name, gradient, eager.gradients[name], exact.gradients[name])
    assert exact.losses.shape == (steps, micro)
    assert_close("losses", ours.losses, eager.losses, exact.losses)
    before = trainable(tiny(how, family))
    assert all((p != before[name]).any() for name, p in trainable(ours.model).items())
