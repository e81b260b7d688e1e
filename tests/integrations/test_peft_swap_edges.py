"""The swap at its edges: restoring, hooks of accelerate, layers and calls that stay PEFT's."""

import copy
import warnings

import peft
import pytest
import small
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from peft.tuners import lora
from peft_models import LAYERS, TARGETS, Trio, config, draw, layers_of, stock_model
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations.peft_layers import FusedLinear


@pytest.fixture(autouse=True)
def no_network_and_no_warnings():
    with small.isolated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(params=TARGETS)
def family(request):
    return request.param


def test_restore_leaves_nothing_behind(family):
    stock = stock_model(family)
    ours = copy.deepcopy(stock)
    before = small.Snapshot(ours)
    report = lk.accelerate_peft(ours)
    assert all(type(layer) is FusedLinear for layer in layers_of(ours))
    small.logits(ours)
    assert lk.restore_peft(ours) == list(report.fused)
    before.assert_unchanged()
    assert all(type(layer) is lora.Linear for layer in layers_of(ours))
    with lk.record_plans() as answers:
        assert torch.equal(small.logits(ours), small.logits(stock))
    assert not answers and lk.restore_peft(ours) == []


def test_a_second_call_is_idempotent_and_takes_what_came_since():
    base = small.build("llama")
    model = peft.get_peft_model(base, config("llama", target_modules=["q_proj"])).eval()
    first = lk.accelerate_peft(model)
    again = lk.accelerate_peft(model)
    assert again.fused == first.fused and again.calls is first.calls
    model.add_adapter("b", config("llama", target_modules=["q_proj", "up_proj"]))
    assert [type(layer) for layer in layers_of(model)].count(lora.Linear) == 2
    assert "call accelerate_peft again" in str(first)
    assert len(lk.accelerate_peft(model).fused) == 4
    model.set_adapter("b")
    with lk.record_plans() as answers:
        small.logits(model)
    assert len(answers) == 4 and first.calls.fused == 4


def test_transformers_own_adapters(tmp_path):
    small.need_peft_for_transformers()
    saved = stock_model("llama")
    saved.save_pretrained(tmp_path)
    expected = small.logits(saved)
    model = small.build("llama")
    model.load_adapter(str(tmp_path), "loaded")
    report = lk.accelerate_peft(model.eval())
    assert len(report.fused) == LAYERS["llama"]
    with lk.record_plans() as answers:
        torch.testing.assert_close(small.logits(model), expected, rtol=1e-4, atol=1e-4)
    assert [a.op for a in answers] == ["lora_linear_fwd"] * LAYERS["llama"]
    model.disable_adapters()
    assert torch.equal(small.logits(model), small.logits(small.build("llama")))
    model.enable_adapters()
    model.add_adapter(config("llama", target_modules=["gate_proj"]), "added")
    assert len(lk.accelerate_peft(model).fused) == LAYERS["llama"] + 2
    draw(model, "added", seed=8)
    model.set_adapter("added")
    stock = copy.deepcopy(model)
    assert len(lk.restore_peft(stock)) == LAYERS["llama"] + 2
    torch.testing.assert_close(small.logits(model), small.logits(stock), rtol=1e-4, atol=1e-4)


def test_accelerates_hooks():
    """A forward that accelerate captured is PEFT's: ours has to be in its place, and go again."""
    model = stock_model("llama")
    expected = small.logits(model)
    for layer in layers_of(model):
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        for module in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    report = lk.accelerate_peft(model)
    with lk.record_plans() as answers:
        torch.testing.assert_close(small.logits(model), expected, rtol=1e-4, atol=1e-4)
    assert len(answers) == LAYERS["llama"] and report.calls.share == 1.0
    lk.restore_peft(model)
    with lk.record_plans() as answers:
        assert torch.equal(small.logits(model), expected)
    assert not answers


@pytest.mark.parametrize("removed", ["before the swap", "after the swap"])
def test_hooks_that_accelerate_removes_leave_no_forward_behind(removed):
    """It leaves the forward that it found, bound, as the instance's own."""
    model = stock_model("llama")
    expected = small.logits(model)
    for layer in layers_of(model):
        for module in (layer, layer.base_layer, layer.lora_A["default"]):
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    if removed == "before the swap":
        remove_hook_from_submodules(model)
    report = lk.accelerate_peft(model)
    remove_hook_from_submodules(model)
    assert "forward" in vars(layers_of(model)[0])
    torch.testing.assert_close(small.logits(model), expected, rtol=1e-4, atol=1e-4)
    assert report.calls.fused == LAYERS["llama"] and report.calls.share == 1.0
    assert len(lk.restore_peft(model)) == LAYERS["llama"]
    with lk.record_plans() as answers:
        assert torch.equal(small.logits(model), expected)
    assert not answers
    assert len(lk.accelerate_peft(model).fused) == LAYERS["llama"]


def test_offloaded_layers_are_pefts():
    model = stock_model("llama")
    layer = layers_of(model)[0]
    add_hook_to_module(layer.base_layer, AlignDevicesHook(execution_device="cpu", offload=True))
    report = lk.accelerate_peft(model)
    assert len(report.skipped) == 1 and "offloaded" in next(iter(report.skipped.values()))


class Zoo(nn.Module):
    """One layer of every kind that PEFT's LoRA has a layer for."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 8)

    def forward(self, ids):
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        return self.tied(self.linear(self.attention(x, x, x)[0]))


def test_what_is_not_served_is_said_and_stays_pefts():
    names = ["embedding", "conv", "attention", "linear", "tied"]
    stock = peft.get_peft_model(
        Zoo(), peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    ).eval()
    ours = copy.deepcopy(stock)
    kinds = [type(m) for m in ours.modules()]
    report = lk.accelerate_peft(ours)
    assert len(report.fused) == 2 and len(report.skipped) == 4
    reasons = {name.removeprefix("base_model.model."): why for name, why in report.skipped.items()}
    assert "Embedding" in reasons["embedding"] and "Conv1d" in reasons["conv"]
    assert "MultiheadAttention" in reasons["attention"]
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.base_layer.out_proj"]
    assert all(f"{name}: {why}" in str(report) for name, why in report.skipped.items())
    assert "lora.Linear(\n" in repr(ours) and repr(ours).count("on lora_kernels") == 2
    changed = [a for a, b in zip(kinds, ours.modules(), strict=True) if a is not type(b)]
    assert changed == [lora.Linear] * 2
    ids = torch.arange(12).view(2, 6)
    with lk.record_plans() as answers:
        torch.testing.assert_close(ours(ids), stock(ids), rtol=1e-4, atol=1e-4)
    assert len(answers) == 2


def test_warmup_runs_the_swapped_layers_and_counts_no_call():
    model = stock_model("llama", lora_dropout=0.5)
    report = lk.accelerate_peft(model)
    generator = torch.random.get_rng_state()
    with lk.record_plans() as answers:
        lk.warmup(model, [3], training=True)
    swapped = len(report.fused)
    assert [a.op for a in answers] == [
        "lora_linear_fwd",
        "lora_linear_dx",
        "lora_linear_dab",
    ] * swapped
    assert report.calls.fused == 0
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("variant", ["velora", "bdlora"])
def test_variants_are_pefts(variant):
    changes = {
        "velora": {"velora_config": lora.config.VeloraConfig(num_groups=4)},
        "bdlora": {
            "use_bdlora": peft.BdLoraConfig(
                ["o_proj", "down_proj"], ["q_proj", "v_proj", "up_proj"], 2
            )
        }
        if hasattr(peft, "BdLoraConfig")
        else {},
    }[variant]
    if not changes:
        pytest.skip("this PEFT has no BdLoraConfig")
    model = peft.get_peft_model(small.build("llama"), config("llama", r=6, **changes)).eval()
    expected = small.logits(model)
    report = lk.accelerate_peft(model)
    assert len(report.skipped) >= 2 and "Variant" in str(report.skipped)
    with lk.record_plans() as answers:
        torch.testing.assert_close(small.logits(model), expected)
    assert len(answers) == len(report.fused)


def test_a_variant_beside_a_plain_adapter_falls_back_call_by_call():
    trio = Trio(stock_model("llama"))
    changes = {"velora_config": lora.config.VeloraConfig(num_groups=4)}
    trio.do(lambda m: m.add_adapter("velora", config("llama", **changes)))
    trio.check(LAYERS["llama"])
    trio.do(lambda m: m.set_adapter("velora"))
    trio.check(0)
    ((reason, count),) = trio.report.calls.fallen_back.items()
    assert "VeloraLinearVariant" in reason and count == LAYERS["llama"]
    trio.do(lambda m: m.set_adapter("default"))
    trio.check(LAYERS["llama"])


def test_models_without_lora_layers_are_refused():
    with pytest.raises(ValueError, match="no LoRA layers of PEFT"):
        lk.accelerate_peft(small.build("llama"))
    with pytest.raises(ValueError, match="pack_weight"):
        lk.accelerate_peft(stock_model("llama"), pack_weight="sometimes")
    assert lk.restore_peft(small.build("llama")) == []


def test_training_with_a_fused_optimizer_follows_peft():
    """Its steps leave Tensor._version unmoved: whatever was kept of an adapter would be stale."""
    trio = Trio(stock_model("llama"))
    trio.do(lambda m: m.train())
    optimizers = trio.do(
        lambda m: torch.optim.AdamW(
            [p for p in m.parameters() if p.requires_grad], lr=1e-3, fused=True
        )
    )
    losses = []
    for _ in range(4):
        losses.append([])
        for model, optimizer in zip((trio.stock, trio.ours, trio.exact), optimizers, strict=True):
            loss = small.loss(model, trio.batch_for(model))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    for stock, ours, exact in losses:
        assert abs(ours - exact) <= max(1e-3 * exact, 10 * abs(stock - exact))
    assert losses[-1][1] < losses[0][1]
    trio.do(lambda m: m.eval())
    assert trio.report.calls.share == 1.0
