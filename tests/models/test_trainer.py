"""Training with transformers' Trainer and TRL's: accumulation, autocast, checkpointing, resuming.

"Equal" is judged against PEFT in float64, with PEFT's own loss of precision as the budget; a re-run
is judged by its bits.
"""

import pytest
import small
import torch
from training import (
    HOWS,
    STOCK,
    Run,
    assert_answered,
    assert_close,
    checkpointing,
    tiny,
    trainable,
)

# Deprecations inside transformers are not what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

PRECISIONS = {"float32": {}, "bfloat16": {"bf16": True}}


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("use_reentrant", [None, False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_trainer_trains_as_with_peft(how, precision, use_reentrant, tmp_path):
    steps, micro = 6, 3
    arguments = {"max_steps": steps, "gradient_accumulation_steps": micro, "max_grad_norm": 0.0}
    arguments |= checkpointing(use_reentrant)
    ours, eager, exact = (
        Run(tiny(who, dtype), tmp_path, **arguments, **mixed)
        for who, dtype, mixed in (
            (how, torch.float32, PRECISIONS[precision]),
            (STOCK, torch.float32, PRECISIONS[precision]),
            (STOCK, torch.float64, {}),
        )
    )
    assert not eager.answers
    assert_answered(
        ours.answers,
        forwards=steps * micro * (1 if use_reentrant is None else 2),
        backwards=steps * micro,
        entered=use_reentrant is not None,
    )
    assert ours.gradients.keys() == exact.gradients.keys()
    for name, gradient in ours.gradients.items():
        assert gradient.dtype == torch.float32
        assert_close(name, gradient, eager.gradients[name], exact.gradients[name])
    assert exact.losses.shape == (steps, micro)
    assert_close("first step's loss", ours.losses[0], eager.losses[0], exact.losses[0])
    assert_close("losses", ours.losses, eager.losses, exact.losses)


@pytest.mark.parametrize("how", HOWS)
def test_float32_adapters_on_bfloat16_weights(how, tmp_path):
    """As PEFT makes them, without autocast. PEFT computes such adapters in float32, we in the
    weights' dtype: the eager model of the budget has all of its operands in that."""
    steps, micro, half = 4, 3, torch.bfloat16
    arguments = {"max_steps": steps, "gradient_accumulation_steps": micro, "max_grad_norm": 0.0}
    ours, eager, exact = (
        Run(tiny(who, dtype, weights=half), tmp_path, **arguments)
        for who, dtype in ((how, None), (STOCK, half), (STOCK, torch.float64))
    )
    assert_answered(ours.answers, forwards=steps * micro, backwards=steps * micro)
    for name, gradient in ours.gradients.items():
        assert gradient.dtype == trainable(ours.model)[name].dtype == torch.float32
        assert_close(name, gradient, eager.gradients[name], exact.gradients[name])
    assert_close("first step's loss", ours.losses[0], eager.losses[0], exact.losses[0])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_again_has_the_same_bits(how, precision, tmp_path):
    """With dropout, too; and a checkpointed one replays the masks of one that is not."""
    arguments = {"max_steps": 4, "gradient_accumulation_steps": 2} | PRECISIONS[precision]

    def run(use_reentrant=None, dropout=0.3, **changes):
        model = tiny(how, lora_dropout=dropout)
        return Run(model, tmp_path, **(arguments | checkpointing(use_reentrant) | changes))

    first = run()
    for again in (run(), run(use_reentrant=False), run(use_reentrant=True)):
        assert torch.equal(again.losses, first.losses)
        for name, parameter in trainable(again.model).items():
            assert torch.equal(parameter, trainable(first.model)[name]), name
    for other in (run(dropout=0.0), run(seed=12, data_seed=11)):
        assert not torch.equal(other.losses[0], first.losses[0])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("use_reentrant", [None, True])
def test_sft_trainer(how, use_reentrant, tmp_path):
    pytest.importorskip("trl")
    steps, micro = 3, 2
    arguments = {"sft": True, "max_steps": steps, "gradient_accumulation_steps": micro}
    arguments |= {"max_grad_norm": 0.0} | checkpointing(use_reentrant)
    ours, eager, exact = (
        Run(tiny(who, dtype), tmp_path, bf16=mixed, **arguments)
        for who, dtype, mixed in (
            (how, torch.float32, True),
            (STOCK, torch.float32, True),
            (STOCK, torch.float64, False),
        )
    )
    assert_answered(
        ours.answers,
        forwards=steps * micro * (1 if use_reentrant is None else 2),
        backwards=steps * micro,
        entered=use_reentrant is not None,
    )
    for name, gradient in ours.gradients.items():
        assert_close(name, gradient, eager.gradients[name], exact.gradients[name])
    assert_close("losses", ours.losses, eager.losses, exact.losses)
    dropped = [Run(tiny(how, lora_dropout=0.3), tmp_path, bf16=True, **arguments) for _ in range(2)]
    assert torch.equal(dropped[0].losses, dropped[1].losses)
    assert not torch.equal(dropped[0].losses, ours.losses)
    for name, parameter in trainable(dropped[0].model).items():
        assert torch.equal(parameter, trainable(dropped[1].model)[name]), name


@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_trainer_resumes_from_its_checkpoint(name, tmp_path):
    """Model, optimizer, generators: the rest of a training has the bits of one that never
    stopped."""
    arguments = {"gradient_accumulation_steps": 2, "bf16": True, "optim": "adamw_torch_fused"}
    arguments |= {"save_strategy": "steps", "save_steps": 3}
    whole = Run(
        tiny("apply_lora", name=name, lora_dropout=0.3),
        tmp_path / "whole",
        max_steps=6,
        **arguments,
    )
    half = Run(
        tiny("apply_lora", name=name, lora_dropout=0.3), tmp_path / "half", max_steps=3, **arguments
    )
    fresh = tiny("apply_lora", name=name, lora_dropout=0.3)
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.normal_()
    resumed = Run(
        fresh,
        tmp_path / "half",
        max_steps=6,
        resume=str(tmp_path / "half/checkpoint-3"),
        **arguments,
    )
    assert torch.equal(torch.cat([half.losses, resumed.losses]), whole.losses)
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], tensor), key
    if name == "llama tied":
        assert resumed.model.lm_head.weight is resumed.model.get_input_embeddings().weight
