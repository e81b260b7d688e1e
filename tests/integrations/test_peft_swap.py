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
from peft.tuners import lora
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_models import LAYERS, TARGETS, Trio, config, draw, layers_of, stock_model
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations.peft_layers import FusedLinear
from lora_kernels.testing.linear import assert_within_budget


@pytest.fixture(autouse=True)
def no_network_and_no_warnings():
    with small.isolated(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(params=TARGETS)
def family(request):
    return request.param


def test_outputs_and_gradients(family):
    trio = Trio(stock_model(family))
    assert len(trio.report.fused) == LAYERS[family] and not trio.report.skipped
    trio.check(LAYERS[family])
    assert trio.report.calls.fused == LAYERS[family] and trio.report.calls.share == 1.0
    trio.report.calls.reset()
    assert str(trio.report).splitlines()[0].endswith("; no call yet")
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
