"""Whole models with PEFT's layers on our kernels: everything of PEFT's goes on as it did.

What is done to a model is done to three: PEFT's own, the swapped one, and PEFT's in float64. After
each step the swapped one has to be within the error budget, and to have answered by itself.
"""

import copy
import io
import json
import pickle
import warnings

import peft
import pytest
import small
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations.peft_layers import FusedLinear
from lora_kernels.testing.linear import assert_within_budget

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
}
LAYERS = {"gpt2": 8, "llama": 10, "vit": 8}


@pytest.fixture(autouse=True)
def no_network_and_no_warnings():
    with small.isolated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(params=TARGETS)
def family(request):
    return request.param


def config(family, r=5, **changes):
    changes = {"target_modules": TARGETS[family], "lora_alpha": 11} | changes
    return peft.LoraConfig(r=r, **changes)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, lora.LoraLayer)]


@torch.no_grad()
def draw(model, name="default", seed=3):
    """An adapter as large as the weights, the same for the same names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model):
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a.copy_(torch.randn(a.shape, generator=generator))
            b.copy_(torch.randn(b.shape, generator=generator))
            size = (layer.scaling[name] * b @ a).norm()
            b.mul_(layer.base_layer.weight.norm() / size)
            if layer.lora_B[name].bias is not None:
                bias = layer.lora_B[name].bias
                bias.copy_(torch.randn(bias.shape, generator=generator) * 0.1)


def stock_model(family, base=None, **changes):
    base = small.build(family) if base is None else base
    model = peft.get_peft_model(base, config(family, **changes)).eval()
    draw(model)
    return model


class Trio:
    """PEFT's model, the same on our kernels, and PEFT's in float64."""

    def __init__(self, stock):
        self.stock, self.ours = stock, copy.deepcopy(stock)
        self.exact = copy.deepcopy(stock).double()
        self.report = lk.accelerate_peft(self.ours)
        self.batch = small.batch_for(stock.get_base_model(), rows=4)
        self.answers = []

    def do(self, action):
        """The same to all three; the results."""
        results = []
        for model in (self.stock, self.ours, self.exact):
            torch.manual_seed(7)
            results.append(action(model))
        return results

    def check(self, calls, op="lora_linear_fwd", **arguments):
        """Compare the logits; ``calls`` operators of ours must have answered in the forward."""
        logits = {}
        for name in ("stock", "ours", "exact"):
            model = getattr(self, name)
            batch = {
                k: v.double() if name == "exact" and v.is_floating_point() else v
                for k, v in self.batch.items()
            }
            with torch.no_grad(), lk.record_plans() as answers:
                logits[name] = model(**batch, **arguments).logits
            if name == "ours":
                assert [a.op for a in answers] == [op] * calls
                assert all(a.backend == "cpu" for a in answers)
            else:
                assert not answers
        assert_within_budget("logits", logits["ours"], logits["stock"], logits["exact"])
        return logits["ours"]

    def check_gradients(self):
        losses = self.do(lambda m: small.loss(m, self.batch_for(m)))
        for loss in losses:
            loss.backward()
        gradients = [
            {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
            for m in (self.stock, self.ours, self.exact)
        ]
        stock, ours, exact = gradients
        assert stock.keys() == ours.keys() == exact.keys()
        sizes = {name: g.square().mean().sqrt() for name, g in exact.items()}
        # All as one, each by its own size: what PEFT's rounding happens to lose on a single bias
        # is no measure.
        together = [torch.cat([(g[n] / sizes[n]).flatten() for n in sizes]) for g in gradients]
        assert_within_budget("gradients", together[1], together[0].float(), together[2])
        self.do(lambda m: m.zero_grad())
        return len(sizes)

    def batch_for(self, model):
        double = model is self.exact
        return {
            k: v.double() if double and v.is_floating_point() else v for k, v in self.batch.items()
        }


def test_outputs_and_gradients(family):
    trio = Trio(stock_model(family))
    assert len(trio.report.fused) == LAYERS[family] and not trio.report.skipped
    trio.check(LAYERS[family])
    assert trio.report.calls.fused == LAYERS[family] and trio.report.calls.share == 1.0
    with lk.record_plans() as answers:
        assert trio.check_gradients() == 2 * LAYERS[family]
    # The first layer's input needs no gradient unless something before it trains.
    assert sum(a.op == "lora_linear_dab" for a in answers) == LAYERS[family]


def test_names_and_files_are_pefts(family, tmp_path):
    stock = stock_model(family, modules_to_save=["score" if family != "vit" else "classifier"])
    ours = copy.deepcopy(stock)
    lk.accelerate_peft(ours)
    small.logits(ours)
    before, after = stock.state_dict(), ours.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [n for n, _ in stock.named_parameters()] == [n for n, _ in ours.named_parameters()]
    assert [n for n, _ in stock.named_buffers()] == [n for n, _ in ours.named_buffers()]
    assert [n for n, _ in stock.named_modules()] == [n for n, _ in ours.named_modules()]
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    names = sorted(p.name for p in (tmp_path / "stock").iterdir())
    assert "adapter_model.safetensors" in names
    assert names == sorted(p.name for p in (tmp_path / "ours").iterdir())
    for name in names:
        one, other = ((tmp_path / whose / name).read_bytes() for whose in ("stock", "ours"))
        if name.endswith(".json"):
            # PEFT keeps target_modules as a set, whose order a deep copy may change.
            one, other = (json.loads(text) for text in (one, other))
            for config in (one, other):
                config["target_modules"] = sorted(config["target_modules"])
        assert one == other
    loaded = peft.PeftModel.from_pretrained(small.build(family), tmp_path / "ours").eval()
    lk.accelerate_peft(loaded)
    assert torch.equal(small.logits(loaded), small.logits(ours))
    ours.load_adapter(tmp_path / "stock", "again")
    assert len(lk.accelerate_peft(ours).fused) == LAYERS[family]
    ours.set_adapter("again")
    assert torch.equal(small.logits(loaded), small.logits(ours))


def test_adapters_come_and_go(family, tmp_path):
    """One long life: every method of PEFT's that changes what a layer computes."""
    n = LAYERS[family]
    trio = Trio(stock_model(family))
    start = trio.check(n)
    other = config(family, r=3, use_rslora=True, rank_pattern={".*0.*": 7})

    def add(model):
        model.add_adapter("b", other)
        draw(model, "b", seed=4)

    trio.do(add)
    assert torch.equal(trio.check(n), start)
    trio.do(lambda m: m.set_adapter("b"))
    second = trio.check(n)
    assert small.relative_difference(second, start) > 0.01
    assert trio.check_gradients() == 2 * n
    trio.do(lambda m: m.base_model.set_adapter(["default", "b"]))
    both = trio.check(n)
    assert small.relative_difference(both, second) > 0.01
    assert trio.check_gradients() == 4 * n

    contexts = trio.do(lambda m: m.disable_adapter())
    for context in contexts:
        context.__enter__()
    plain = small.logits(small.build(family), trio.batch)
    assert torch.equal(trio.check(0), plain)
    for context in contexts:
        context.__exit__(None, None, None)
    assert torch.equal(trio.check(n), both)

    trio.do(lambda m: m.merge_adapter())
    merged = trio.check(0)
    assert torch.equal(merged, small.logits(trio.stock, trio.batch))
    trio.do(lambda m: m.unmerge_adapter())
    trio.check(n)
    trio.do(lambda m: m.merge_adapter(["b"], safe_merge=True))
    trio.check(0)
    trio.do(lambda m: m.unmerge_adapter())

    for kind in ("linear", "cat", "svd"):
        trio.do(
            lambda m, kind=kind: (
                m.add_weighted_adapter(["default", "b"], [0.7, -0.4], kind, combination_type=kind)
                if kind != "linear"
                else m.add_weighted_adapter(["default"], [0.7], kind, combination_type=kind)
            )
        )
        trio.do(lambda m, kind=kind: m.set_adapter(kind))
        trio.check(n)

    trio.do(lambda m: m.delete_adapter("b"))
    trio.do(lambda m: m.set_adapter("default"))
    trio.check(n)
    trio.do(lambda m: [layer.scale_layer(0.5) for layer in layers_of(m)])
    assert small.relative_difference(trio.check(n), start) > 0.01
    trio.do(lambda m: [layer.unscale_layer() for layer in layers_of(m)])
    trio.check(n)
    assert not trio.report.calls.fallen_back

    bare = trio.do(lambda m: m.merge_and_unload())
    assert not layers_of(bare[1])
    assert torch.equal(small.logits(bare[0], trio.batch), small.logits(bare[1], trio.batch))


def test_unload_gives_the_base_back(family):
    ours = stock_model(family)
    lk.accelerate_peft(ours)
    bare = ours.unload()
    assert torch.equal(small.logits(bare), small.logits(small.build(family)))


@pytest.mark.native
def test_mixed_batches(family):
    n = LAYERS[family]
    stock = stock_model(family)
    stock.add_adapter("b", config(family, r=9, target_modules=TARGETS[family][:2]))
    draw(stock, "b", seed=4)
    trio = Trio(stock.eval())
    with_b = sum("b" in layer.lora_A for layer in layers_of(stock))
    assert 0 < with_b < n
    names = ["b", "__base__", "default", "b"]
    mixed = trio.check(n, op="segmented_linear_fwd", adapter_names=names)
    assert small.relative_difference(mixed[0], mixed[3]) > 0.01
    trio.check(with_b, op="segmented_linear_fwd", adapter_names=["b", "b", "__base__", "__base__"])
    trio.check(0, adapter_names=["__base__"] * 4)
    assert not trio.report.calls.fallen_back
    # Each sequence is what it is by itself.
    for row, name in enumerate(names):
        alone = {k: v[row : row + 1] for k, v in trio.batch.items()}
        with torch.no_grad():
            y = trio.ours(**alone, adapter_names=[name]).logits
        torch.testing.assert_close(y[0], mixed[row], rtol=1e-4, atol=1e-4)


def test_mixed_batches_generate():
    stock = stock_model("llama")
    stock.add_adapter("b", config("llama", r=9))
    draw(stock, "b", seed=4)
    trio = Trio(stock.eval())
    names = ["b", "__base__", "default", "b"]
    arguments = trio.batch | {"adapter_names": names, "max_new_tokens": 5, "do_sample": False}
    for beams in (1, 2):
        stock, ours, _ = trio.do(lambda m, beams=beams: m.generate(**arguments, num_beams=beams))
        assert torch.equal(stock, ours)
    assert trio.report.calls.fused > 0 and not trio.report.calls.fallen_back


@pytest.mark.parametrize("padded", [None, 16])
def test_hotswap(family, padded, tmp_path):
    other = peft.get_peft_model(small.build(family), config(family, r=9, lora_alpha=4))
    draw(other, seed=6)
    other.save_pretrained(tmp_path)
    trio = Trio(stock_model(family, r=9 if padded is None else 5))
    before = trio.check(LAYERS[family])
    if padded:
        trio.do(lambda m: prepare_model_for_compiled_hotswap(m, target_rank=padded))
        layer = layers_of(trio.ours)[0]
        assert layer.lora_A["default"].weight.shape[0] == padded
        assert isinstance(layer.scaling["default"], torch.Tensor)
        torch.testing.assert_close(trio.check(LAYERS[family]), before, rtol=1e-4, atol=1e-4)
    trio.do(lambda m: hotswap_adapter(m, tmp_path, adapter_name="default", torch_device="cpu"))
    after = trio.check(LAYERS[family])
    assert small.relative_difference(after, before) > 0.01
    with torch.no_grad():
        expected = small.logits(other.eval(), trio.batch)
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-3)


def test_lora_bias_and_modules_to_save():
    head = {"modules_to_save": ["classifier"], "lora_bias": True, "bias": "lora_only"}
    trio = Trio(stock_model("vit", **head))
    trio.check(LAYERS["vit"])
    # A, B, B's bias and the base's for each layer, and the head's two.
    assert trio.check_gradients() == 4 * LAYERS["vit"] + 2
    trio.do(lambda m: m.merge_adapter())
    trio.check(0)
    trio.do(lambda m: m.unmerge_adapter())
    trio.check(LAYERS["vit"])


def test_float32_adapters_on_a_bfloat16_base(family):
    """PEFT computes them in float32, we in bfloat16: judged by what bfloat16 itself loses."""
    stock = stock_model(family, base=small.build(family).to(torch.bfloat16))
    assert layers_of(stock)[0].lora_A["default"].weight.dtype == torch.float32
    in_half = copy.deepcopy(stock).to(torch.bfloat16)
    exact, ours = copy.deepcopy(stock).double(), copy.deepcopy(stock)
    lk.accelerate_peft(ours)
    batch = small.batch_for(stock.get_base_model())

    def logits(model, dtype):
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        return model(**given).logits

    with torch.no_grad(), lk.record_plans() as answers:
        y = logits(ours, torch.bfloat16)
    assert [a.op for a in answers] == ["lora_linear_fwd"] * LAYERS[family]
    assert {a.problem.dtype for a in answers} == {"bfloat16"}
    with torch.no_grad():
        eager, truth = logits(in_half, torch.bfloat16), logits(exact, torch.float64)
    assert y.dtype == torch.bfloat16
    assert_within_budget("logits", y, eager, truth)
    logits(ours, torch.bfloat16).float().square().mean().backward()
    grads = [p.grad for p in ours.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 for g in grads)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradient_checkpointing(family, use_reentrant, dropout):
    gradients = []
    for checkpointing in (False, True):
        model = stock_model(family, lora_dropout=dropout)
        report = lk.accelerate_peft(model)
        for name, module in model.named_modules():
            # GPT-2's own dropout rounds differently when computed again, PEFT's model too.
            if isinstance(module, nn.Dropout) and "lora" not in name:
                module.p = 0.0
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if family != "vit":
            model.enable_input_require_grads()
        else:
            hook = model.get_submodule("base_model.model.vit.embeddings")
            hook.register_forward_hook(lambda m, a, y: y.requires_grad_())
        torch.manual_seed(9)
        small.loss(model).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert not report.calls.fallen_back
        calls, layers = report.calls.fused, LAYERS[family]
        # What is computed again stops where nothing more is needed.
        assert calls > 1.5 * layers if checkpointing else calls == layers
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert torch.equal(gradient, gradients[1][name]), name


def test_copies_and_pickles(family):
    ours = stock_model(family)
    report = lk.accelerate_peft(ours)
    expected = small.logits(ours)
    copied = copy.deepcopy(ours)
    pickled = pickle.loads(pickle.dumps(layers_of(ours)[0]))
    assert type(pickled) is FusedLinear and isinstance(pickled, lora.Linear)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for model in (copied, torch.load(file, weights_only=False)):
        with lk.record_plans() as answers:
            assert torch.equal(small.logits(model), expected)
        assert len(answers) == LAYERS[family]
        # They count by themselves.
        assert lk.accelerate_peft(model).calls.fused == LAYERS[family]
        with torch.no_grad():
            layers_of(model)[0].lora_B["default"].weight.zero_()
        assert not torch.equal(small.logits(model), expected)
    assert torch.equal(small.logits(ours), expected)
    assert report.calls.fused == 2 * LAYERS[family]
    lk.restore_peft(copied)
    assert type(layers_of(ours)[0]) is FusedLinear


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


@pytest.mark.parametrize("variant", ["use_dora", "alora", "bdlora"])
def test_variants_are_pefts(variant):
    changes = {
        "use_dora": {"use_dora": True},
        "alora": {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
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
    trio.do(lambda m: m.add_adapter("dora", config("llama", use_dora=True)))
    trio.check(LAYERS["llama"])
    trio.do(lambda m: m.set_adapter("dora"))
    trio.check(0)
    ((reason, count),) = trio.report.calls.fallen_back.items()
    assert "DoraLinearVariant" in reason and count == LAYERS["llama"]
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
