"""AdaLoRA without PEFT's classes: the layer, its files both ways, and a store that serves them."""

import copy
import json
import warnings

import peft
import pytest
import small
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.layers.adalora import AdaLoRALinear
from lora_kernels.models.apply import lora_layers
from lora_kernels.testing.linear import assert_within_budget

R = 6
KEPT = [True, False, True, True, False, True]
TARGETS = {"llama": ["q_proj", "up_proj"], "gpt2": ["c_attn", "c_fc"]}
SCHEDULE = {"init_r": R, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 14}


def theirs_of(family, patterned=True):
    """A model of PEFT; with a pattern one of its layers has no rank left, others four."""
    config = peft.AdaLoraConfig(target_modules=TARGETS[family], lora_alpha=9, **SCHEDULE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(small.build(family), config).eval()
    generator = torch.Generator().manual_seed(3)
    pattern = {}
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, peft.tuners.adalora.layer.SVDLinear):
                kept = [False] * R if not pattern else KEPT
                pattern[f"{name}.lora_E.default"] = kept
                parts = [getattr(layer, part)["default"] for part in ("lora_A", "lora_E", "lora_B")]
                for part in parts:
                    part.copy_(torch.randn(part.shape, generator=generator))
                parts[2].mul_(
                    layer.base_layer.weight.norm() / layer.get_delta_weight("default").norm()
                )
                if patterned:
                    parts[1].masked_fill_(~torch.tensor(kept)[:, None], 0.0)
    if patterned:
        model.peft_config["default"].rank_pattern = pattern
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def files(request, tmp_path_factory):
    theirs = theirs_of(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    expected = small.logits(theirs)
    theirs.save_pretrained(folder)
    return request.param, folder, expected


def test_files_both_ways(files, tmp_path):
    family, folder, expected = files
    ours = lk.load_adapter(small.build(family), folder)
    layers = lora_layers(ours)
    assert {type(layer) for layer in layers.values()} == {AdaLoRALinear}
    assert sorted({layer.r for layer in layers.values()}) == [0, 4]
    assert small.relative_difference(small.logits(ours), expected) < 1e-5
    with torch.no_grad(), lk.record_plans() as answers:
        small.logits(ours)
    assert [a.op for a in answers].count("lora_linear_fwd") >= len(layers) - 1
    with torch.no_grad():
        for layer in layers.values():
            # One alpha for the file: what differs goes into E.
            layer.scaling *= 2
            layer.lora_B.mul_(0.5)
    lk.save_adapter(ours, tmp_path)
    again = peft.PeftModel.from_pretrained(small.build(family), tmp_path)
    assert small.relative_difference(small.logits(again.eval()), expected) < 1e-5
    lk.load_adapter(ours, folder)
    lk.merge_adapter(ours)
    assert small.relative_difference(small.logits(ours), expected) < 1e-5
    written, read = (
        json.loads((f / "adapter_config.json").read_text()) for f in (tmp_path, folder)
    )
    for field in ("rank_pattern", "init_r", "lora_alpha", "total_step", "peft_type"):
        assert written[field] == read[field]
    plain = lk.apply_lora(small.build(family), r=R, target_modules=TARGETS[family])
    with pytest.raises(ValueError, match="AdaLoRA with init_r=6, the model was adapted by LoRA"):
        lk.load_adapter(plain, folder)


def test_a_store_serves_it_as_lora(files, tmp_path):
    family, folder, expected = files
    model = small.build(family)
    store = lk.AdapterStore(model, max_adapters=2, max_rank=8)
    store.load("a", folder)
    base = small.logits(model)
    with store.batch(["a", None]), torch.no_grad():
        found = small.logits(model)
    assert small.relative_difference(found[:1], expected[:1]) < 1e-5
    assert small.relative_difference(found[1:], base[1:]) < 1e-5
    assert small.relative_difference(base[:1], expected[:1]) > 0.1
    store.save("a", tmp_path)
    again = peft.PeftModel.from_pretrained(small.build(family), tmp_path)
    assert again.peft_config["default"].peft_type == "LORA"
    assert small.relative_difference(small.logits(again.eval()), expected) < 1e-5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", {"model.layers.0.self_attn.q_proj.lora_E": [True]}),
        ("rank_pattern", {"model.layers.0.self_attn.q_proj.lora_E": 4}),
        ("rank_pattern", ["x"]),
        ("init_r", "x"),
        ("lora_alpha", 0),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(files, tmp_path, field, value):
    _, folder, _ = files
    content = json.loads((folder / "adapter_config.json").read_text()) | {field: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(ValueError, match=r"adapter_config.json"):
        lk.load_adapter(small.build("llama"), tmp_path)


def test_a_config_of_peft_is_applied():
    config = peft.AdaLoraConfig(target_modules=["q_proj"], lora_alpha=9, **SCHEDULE)
    model = lk.apply_lora(small.build("llama"), config)
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.r, layer.scaling) == (R, 9 / (R + 1e-5))
    assert {name.rpartition(".")[2] for name in small.trainable(model)} == {
        "lora_A", "lora_B", "lora_E",
    }  # fmt: skip
    assert layer.lora_E.count_nonzero() == 0 and 0.015 < layer.lora_A.std() < 0.025
    fresh = small.logits(small.build("llama"))
    assert small.relative_difference(small.logits(model), fresh) < 1e-6


def layer_of(dtype):
    torch.manual_seed(1)
    layer = AdaLoRALinear.from_linear(nn.Linear(70, 90, dtype=dtype), R, 9, init_lora_weights=False)
    with torch.no_grad():
        layer.lora_B.mul_(layer.weight.norm() / layer.delta_weight().norm())
        layer.lora_E.masked_fill_(~torch.tensor(KEPT)[:, None], 0.0)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_layer_against_float64(dtype):
    layer = layer_of(dtype)
    x, dy = torch.randn(33, 70).to(dtype), torch.randn(33, 90).to(dtype)
    results = []
    for kind in torch.float64, dtype:
        leaves = (x, layer.lora_A, layer.lora_E, layer.lora_B)
        x_, a, e, b = (t.detach().to(kind).requires_grad_() for t in leaves)
        y = x_ @ layer.weight.to(kind).t() + layer.bias.to(kind)
        y = y + 9 / (R + 1e-5) * (x_ @ a.t() * e.t()) @ b.t()
        results.append([y.detach(), *torch.autograd.grad(y, [x_, a, e, b], dy.to(kind))])
    x.requires_grad_()
    y = layer(x)
    leaves = [x, layer.lora_A, layer.lora_E, layer.lora_B]
    found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    exact, eager = results
    for name, mine, low, high in zip(
        ("y", "dx", "da", "de", "db"), found, eager, exact, strict=True
    ):
        assert_within_budget(name, mine, low, high)
    left_out = ~torch.tensor(KEPT)
    assert found[3][left_out].abs().min() > 0 and found[2][left_out].count_nonzero() == 0


def test_a_rank_comes_back_and_merging_sees_the_factors():
    layer = layer_of(torch.float32)
    x = torch.randn(9, 70)
    optimizer = torch.optim.SGD([layer.lora_E], lr=0.1)
    (layer(x) ** 2).mean().backward()
    optimizer.step()
    assert layer.lora_E.count_nonzero() == R
    y = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    again = copy.deepcopy(layer)
    layer.unmerge()
    layer.set_lora(layer.lora_A * 2, layer.lora_B, layer.lora_E * 0.5, lora_alpha=9)
    torch.testing.assert_close(layer(x), again(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"lora_E \[6, 1\]"):
        layer.set_lora(layer.lora_A, layer.lora_B, layer.lora_E[:3], lora_alpha=9)


def test_masks_recompile_nothing():
    layer = layer_of(torch.float32)
    # What other tests compiled of the same code would count.
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = torch.randn(9, 70)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shift in range(3):
            with torch.no_grad():
                layer.lora_E.copy_(torch.tensor(KEPT).roll(shift).float()[:, None])
            torch.testing.assert_close(compiled(x), layer(x))
