"""DoRA adapters of PEFT on our kernels, against PEFT's own layers."""

import copy

import pytest
import small
import torch

import lora_kernels as lk

BATCH = {"input_ids": torch.arange(24).view(2, 12) % 50}


def pair(family="llama", **config):
    config = {"r": 4, "lora_alpha": 8, "use_dora": True} | config
    theirs = small.peft_model(small.build(family), **config)
    small.draw_adapter(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
    ours = copy.deepcopy(theirs)
    return theirs, ours, lk.accelerate_peft(ours)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_pefts(family, training):
    theirs, ours, report = pair(family)
    assert report.fused and not report.skipped
    losses = []
    for model in theirs, ours:
        model.train(training)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        small.loss(model, small.batch_for(theirs)).backward()
        losses.append(small.logits(model).detach())
    assert small.relative_difference(*losses) < 1e-4
    others = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0
            assert small.relative_difference(parameter.grad, others[name].grad) < 1e-3, name
    assert report.calls.fused and not report.calls.fallen_back


def test_the_adapter_shows():
    theirs, ours, _ = pair()
    with ours.disable_adapter():
        base = small.logits(ours)
    assert small.relative_difference(base, small.logits(ours)) > 0.1


def test_dropout_drops_what_peft_drops():
    """The base product is of all x: with a weight of zero the mask alone is left."""
    _, ours, report = pair(lora_dropout=0.5, target_modules=["q_proj"])
    ours.train()
    first, second = small.logits(ours), small.logits(ours)
    assert not torch.equal(first, second)
    assert not report.calls.fallen_back


def test_merging_is_pefts():
    theirs, ours, _ = pair()
    before = small.logits(ours)
    for model in theirs, ours:
        model.merge_adapter()
    assert small.relative_difference(small.logits(ours), small.logits(theirs)) < 1e-5
    ours.unmerge_adapter()
    assert small.relative_difference(small.logits(ours), before) < 1e-4


def test_several_active_adapters_are_left_to_peft():
    theirs, ours, report = pair()
    for model in theirs, ours:
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        model.base_model.set_adapter(["default", "second"])
    assert small.relative_difference(small.logits(ours), small.logits(theirs)) < 1e-5
    assert any("DoRA" in reason for reason in report.calls.fallen_back)


def test_compiled():
    theirs, ours, _ = pair()
    compiled = torch.compile(ours.eval(), fullgraph=True, backend="eager")
    found = compiled(**small.batch_for(theirs)).logits
    assert small.relative_difference(found, small.logits(theirs)) < 1e-4


def test_restored():
    theirs, ours, report = pair()
    small.logits(ours)
    assert set(lk.restore_peft(ours)) == set(report.fused)
    assert torch.equal(small.logits(ours), small.logits(theirs))
