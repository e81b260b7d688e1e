"""Whole models whose attention and MLP modules compute projections of one input together."""

import copy

import pytest
import small
import torch
import training
from small import adapt

import lora_kernels as lk
from lora_kernels.models.apply import lora_layers

# What shares in each block, of a model with adapters on all linear layers.
BLOCKS = {
    "llama": ["self_attn", "mlp"],
    "qwen3": ["self_attn", "mlp"],
    "mistral": ["self_attn", "mlp"],
    "gemma3": ["self_attn", "mlp"],
    "bert": ["attention.self"],
    "roberta": ["attention.self"],
    "vit": ["attention"],
    # gate and up of its MLPs; its attention has a second input.
    "t5 gated": ["DenseReluDense"],
}
RATE = 0.05


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


def quiet(model):
    """Training without dropout."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model.train()


def step(model, exact=False):
    """Who answered; the loss, every gradient, and every weight after one step."""
    batch = small.batch_for(model, rows=3)
    if exact:
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=RATE)
    with lk.record_plans() as answers:
        loss = small.loss(model, batch)
        loss.backward()
    found = {f"gradient of {n}": p.grad.clone() for n, p in trained.items()}
    optimizer.step()
    found |= {n: p.detach().clone() for n, p in trained.items()}
    return [a.op for a in answers], found | {"loss": loss.detach()}


def assert_close(ours, apart, exact):
    assert ours.keys() == apart.keys() == exact.keys()
    for name, reference in exact.items():
        if name.startswith("gradient"):
            assert reference.abs().max() > 0, name
        training.assert_close(name, ours[name], apart[name], reference)


@pytest.mark.parametrize("family", BLOCKS)
def test_a_step_is_that_of_separate_layers(family):
    apart = quiet(adapt(family))
    shared, exact = copy.deepcopy(apart), copy.deepcopy(apart).double()
    names = lk.share_inputs(shared)
    assert names and all(name.endswith(tuple(BLOCKS[family])) for name in names)
    (answered, ours), (separate, theirs) = step(shared), step(apart)
    _, reference = step(exact, exact=True)
    assert_close(ours, theirs, reference)
    # The forward has the same bits, and each group's projections became one call.
    assert torch.equal(ours["loss"], theirs["loss"])
    layers = [n for n in lora_layers(shared) if n.rpartition(".")[0] in names]
    together = sum(shared.get_submodule(n)._shares_input for n in layers)
    assert answered.count("lora_linears_fwd") == len(names)
    assert separate.count("lora_linear_fwd") - answered.count("lora_linear_fwd") == together
    assert together == sum(3 if "att" in n else 2 for n in names)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gradient_checkpointing(family, use_reentrant):
    """The recomputation finds what the forward saved, dropout included."""

    def run(checkpointing):
        model = adapt(family, lora_dropout=0.2).train()
        names = lk.share_inputs(model)
        model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        answered, found = step(model)
        return names, answered, found

    names, answered, plain = run(False)
    _, again, checkpointed = run(True)
    assert answered.count("lora_linears_fwd") == len(names)
    # The reentrant one's first forward makes no graph, and its layers compute by themselves.
    assert again.count("lora_linears_fwd") == len(names) * (1 if use_reentrant else 2)
    if use_reentrant:
        # Separate layers draw other masks in the forward: what is differentiated is consistent.
        assert all(t.isfinite().all() for t in checkpointed.values())
        return
    assert all(torch.equal(checkpointed[n], t) for n, t in plain.items())


def test_evaluation_and_generation_are_as_before():
    model = adapt("llama")
    batch = small.batch_for(model)
    expected = small.logits(model), model.generate(**batch, max_new_tokens=4, do_sample=False)
    lk.share_inputs(model)
    with lk.record_plans() as answers, torch.no_grad():
        assert torch.equal(small.logits(model), expected[0])
    found = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, expected[1])
    assert "lora_linears_fwd" not in {a.op for a in answers}


def test_autocast_and_half_precision():
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        apart = quiet(small.draw_adapter(lk.apply_lora(small.build("llama").to(dtype), r=4)))
        shared = copy.deepcopy(apart)
        names = lk.share_inputs(shared)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            (answered, ours), (_, theirs) = step(shared), step(apart)
        assert answered.count("lora_linears_fwd") == len(names)
        assert torch.equal(ours["loss"], theirs["loss"])


def test_files_merging_and_unloading(tmp_path):
    apart, shared = adapt("llama"), adapt("llama")
    names = lk.share_inputs(shared)
    assert shared.state_dict().keys() == apart.state_dict().keys()
    lk.save_adapter(shared, tmp_path)
    assert lk.share_inputs(lk.load_adapter(small.build("llama"), tmp_path)) == names
    lk.merge_adapter(shared)
    lk.unmerge_adapter(shared)
    with torch.no_grad():
        assert torch.equal(small.logits(shared), small.logits(apart))
    lk.unload(shared)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in shared.modules())
