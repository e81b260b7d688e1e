"""PEFT's models whose projections of one input are computed together."""

import copy

import peft_models
import pytest
import small
import torch
from training import assert_close

import lora_kernels as lk

ATTENTION = ["q_proj", "k_proj", "v_proj"]
TARGETS = {
    "llama": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
    "qwen3": [*ATTENTION, "o_proj", "gate_proj", "up_proj"],
    "mistral": ["q_proj", "v_proj"],
    "vit": ["q_proj", "k_proj", "v_proj"],
    "bert": ["query", "key", "value"],
}


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


def stock(family, **changes):
    base = small.build(family, **({"hidden_dropout_prob": 0.0} if family == "bert" else {}))
    changes = {"target_modules": TARGETS[family], "r": 4, "lora_alpha": 11} | changes
    model = small.peft_model(base, **changes)
    peft_models.draw(model)
    if family == "bert":
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and not changes.get("lora_dropout"):
                module.p = 0.0
    return model.train()


def step(model):
    batch = small.batch_for(model.get_base_model(), rows=3)
    dtype = next(model.parameters()).dtype
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    with lk.record_plans() as answers:
        loss = small.loss(model, batch)
        loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None} | {
        "loss": loss.detach()
    }
    torch.optim.SGD(trained.values(), lr=0.05).step()
    found |= {f"{n} after": p.detach().clone() for n, p in trained.items()}
    return [a.op for a in answers], found


@pytest.mark.parametrize("family", TARGETS)
def test_a_step_is_that_of_pefts_model(family):
    theirs = stock(family)
    shared, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    report = lk.accelerate_peft(shared)
    names = lk.share_inputs(shared)
    per_block = 2 if "up_proj" in TARGETS[family] else 1
    assert len(names) == 2 * per_block
    (answered, ours), (_, eager), (_, reference) = step(shared), step(theirs), step(exact)
    for name, found in reference.items():
        assert_close(name, ours[name], eager[name], found)
    assert answered.count("lora_linears_fwd") == len(names)
    assert not report.calls.fallen_back and report.calls.fused == len(report.fused)


def change_hook(model, layer):
    layer.lora_A["default"].register_forward_hook(lambda module, args, y: None)


def change_adapters(model, layer):
    model.add_adapter("second", peft_models.config("llama", r=3, target_modules=ATTENTION))
    peft_models.draw(model, "second", seed=8)
    model.base_model.set_adapter(["default", "second"])


def change_base(model, layer):
    layer.base_layer.register_forward_hook(lambda module, args, y: None)


def change_dropout(model, layer):
    layer.lora_dropout["default"] = torch.nn.Dropout(0.3)


def change_bias(model, layer):
    layer.lora_B["default"].bias = torch.nn.Parameter(torch.ones(layer.out_features))


def change_merged(model, layer):
    layer.merge()


def change_disabled(model, layer):
    layer.enable_adapters(False)


SPECIAL = {
    f.__name__.removeprefix("change_"): f
    for f in (
        change_hook,
        change_adapters,
        change_base,
        change_dropout,
        change_bias,
        change_merged,
        change_disabled,
    )
}


@pytest.mark.parametrize("special", SPECIAL)
def test_apart_where_one_is_special(special):
    apart = stock("llama", target_modules=ATTENTION)
    lk.accelerate_peft(apart)
    shared = copy.deepcopy(apart)
    assert len(lk.share_inputs(shared)) == 2
    for model in shared, apart:
        base = model.get_base_model().model
        for block in base.layers:
            SPECIAL[special](model, block.self_attn.k_proj)
            if special == "adapters":
                break
    torch.manual_seed(3)
    answered, ours = step(shared)
    torch.manual_seed(3)
    expected, theirs = step(apart)
    assert answered == expected and "lora_linears_fwd" not in answered
    assert all(torch.equal(ours[n], t) for n, t in theirs.items())


def test_dora_is_apart_and_dropout_is_not():
    for options, together in (({"use_dora": True}, 0), ({"lora_dropout": 0.2}, 2)):
        model = stock("llama", target_modules=ATTENTION, **options)
        lk.accelerate_peft(model)
        lk.share_inputs(model)
        assert step(model)[0].count("lora_linears_fwd") == together


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    model = stock("llama", lora_dropout=0.2)
    lk.accelerate_peft(model)
    lk.share_inputs(model)
    plain = copy.deepcopy(model)
    model.config.use_cache = plain.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    answered, found = step(model)
    torch.manual_seed(5)
    _, expected = step(plain)
    assert answered.count("lora_linears_fwd") == (4 if use_reentrant else 8)
    if not use_reentrant:
        assert all(torch.equal(found[n], t) for n, t in expected.items())


def test_restored():
    model = stock("llama")
    before = small.Snapshot(model)
    lk.accelerate_peft(model)
    lk.share_inputs(model)
    lk.restore_peft(model)
    before.assert_unchanged()
