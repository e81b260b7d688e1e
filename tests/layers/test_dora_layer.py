"""``use_dora=True``: the layer, its files and its merge against PEFT's own DoRA."""

import copy

import peft
import pytest
import small
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.models.apply import lora_layers

CONFIG = {"r": 4, "lora_alpha": 8, "use_dora": True}


def layer(dtype=torch.float32, **options):
    torch.manual_seed(1)
    linear = nn.Linear(40, 24, dtype=dtype)
    made = lk.FusedLoRALinear.from_linear(linear, **CONFIG, init_lora_weights=False, **options)
    with torch.no_grad():
        made.lora_magnitude_vector.mul_(1 + torch.rand(24))
    return linear, made


def theirs_of(linear, ours, dropout=0.0):
    model = nn.Sequential(copy.deepcopy(linear))
    config = peft.LoraConfig(target_modules=["0"], lora_dropout=dropout, **CONFIG)
    stock = peft.get_peft_model(model, config)
    place = stock.base_model.model[0]
    with torch.no_grad():
        place.lora_A["default"].weight.copy_(ours.lora_A)
        place.lora_B["default"].weight.copy_(ours.lora_B)
        place.lora_magnitude_vector["default"].weight.copy_(ours.lora_magnitude_vector)
    return stock, place


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_pefts(training):
    linear, ours = layer()
    stock, place = theirs_of(linear, ours)
    ours.train(training), stock.train(training)
    x = torch.randn(2, 7, 40, requires_grad=True)
    results = []
    for module in ours, stock:
        y = module(x)
        results.append([y, *torch.autograd.grad((y * y).sum(), [x, *parameters(module, place)])])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def parameters(module, place):
    if isinstance(module, lk.FusedLoRALinear):
        return [module.lora_A, module.lora_B, module.lora_magnitude_vector]
    a, b = place.lora_A["default"].weight, place.lora_B["default"].weight
    return [a, b, place.lora_magnitude_vector["default"].weight]


def test_a_new_layer_computes_as_its_base():
    linear = nn.Linear(40, 24)
    ours = lk.FusedLoRALinear.from_linear(linear, **CONFIG)
    x = torch.randn(5, 40)
    torch.testing.assert_close(ours(x), linear(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    linear, ours = layer(dtype)
    weight, before = ours.weight, ours.weight.clone()
    x = torch.randn(9, 40, dtype=dtype)
    ours.eval()
    y = ours(x)
    ours.merge()
    difference = (ours(x) - y).abs().max() / y.abs().max()
    assert difference < (1e-6 if dtype == torch.float32 else 2e-2)
    assert (linear(x) - y).abs().max() / y.abs().max() > 0.1
    ours.unmerge()
    assert ours.weight is weight and torch.equal(weight, before)


@pytest.mark.parametrize("change", ["adapter", "scaling", "weight", "magnitude", "load", "data"])
def test_evaluation_forgets_the_norm_of_what_has_changed(change):
    _, ours = layer()
    ours.eval()
    x = torch.randn(9, 40)
    ours(x)
    state = {k: v * 1.5 for k, v in ours.state_dict().items()}
    with torch.no_grad():
        if change == "adapter":
            ours.lora_B.mul_(2)
        elif change == "scaling":
            ours.scaling *= 2
        elif change == "weight":
            ours.weight.mul_(0.5)
        elif change == "magnitude":
            ours.lora_magnitude_vector.mul_(2)
        elif change == "load":
            ours.load_state_dict(state)
        else:
            ours.lora_B.data.mul_(2)
            ours.drop_packed()
    fresh = copy.deepcopy(ours)
    assert torch.equal(ours(x), fresh(x))


@pytest.mark.native
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_used(dtype, training, monkeypatch):
    _, ours = layer(dtype)
    ours.train(training)
    x, dy = torch.randn(9, 40, dtype=dtype, requires_grad=True), torch.randn(9, 24, dtype=dtype)
    results = []
    for policy in ("never", "always"):
        ours.pack_weight = policy
        results.append([ours(x), *torch.autograd.grad(ours(x), [x, ours.lora_B], dy)])
    assert len(ours._packed) == (2 if training else 1)
    for plain, packed in zip(*results, strict=True):
        torch.testing.assert_close(plain, packed)
    # What is packed is what is computed with.
    copies = [
        None if t is None else torch.zeros_like(t)
        for t in ours._packed_copies(ours.weight, False, dtype)
    ]
    monkeypatch.setattr(ours, "_packed_copies", lambda *_: copies)
    y = ours(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert not torch.allclose(y, results[0][0], atol=1e-2)
    assert torch.allclose(dx, results[0][1], atol=1e-2) != training


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_files_both_ways(family, tmp_path):
    theirs = small.peft_model(small.build(family), use_dora=True)
    small.draw_adapter(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lk.load_adapter(small.build(family), tmp_path / "theirs")
    assert all(layer.use_dora for layer in lora_layers(ours).values())
    assert small.relative_difference(small.logits(ours), small.logits(theirs)) < 1e-5
    lk.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(small.build(family), tmp_path / "ours")
    assert small.relative_difference(small.logits(again), small.logits(theirs)) < 1e-5
    plain = lk.apply_lora(small.build(family))
    with pytest.raises(ValueError, match="use_dora"):
        lk.load_adapter(plain, tmp_path / "ours")


def test_losses_of_a_training_are_pefts():
    targets = {"use_dora": True, "r": 4, "target_modules": ["q_proj", "up_proj"]}
    ours = lk.apply_lora(small.build("llama"), **targets)
    theirs = small.peft_model(small.build("llama"), lora_alpha=16, **targets)
    stock = dict(theirs.base_model.model.named_modules())
    with torch.no_grad():
        for name, mine in lora_layers(ours).items():
            mine.lora_A.copy_(stock[name].lora_A["default"].weight)
            torch.testing.assert_close(
                mine.lora_magnitude_vector, stock[name].lora_magnitude_vector["default"].weight
            )
    losses = []
    for model in ours, theirs:
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        losses.append([])
        for _ in range(6):
            loss = small.loss(model, small.batch_for(ours))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < 0.95 * losses[0][0]
