"""Back to plain layers, export, and adapters that something took out of the model."""

import warnings

import pytest
import small
import torch
from small import adapt, build, logits
from torch import nn

import lora_kernels as lk
from lora_kernels.models.apply import lora_layers


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


def kinds(model):
    return {name: type(module) for name, module in model.named_modules()}


# ---- tied heads


@pytest.mark.parametrize(
    "again", [lambda m: m.tie_weights(), lambda m: m.resize_token_embeddings(m.config.vocab_size)]
)
def test_a_merged_tied_head_stays_merged(again):
    model = adapt("llama tied", target_modules=["lm_head", "q_proj"]).eval()
    wanted = logits(model)
    lk.merge_adapter(model)
    again(model)
    assert model.lm_head.merged
    assert small.relative_difference(logits(model), wanted) < 1e-5
    lk.unmerge_adapter(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(logits(model), wanted)


# ---- lost adapters


LOSSES = {
    "resized": lambda m: m.resize_token_embeddings(m.config.vocab_size + 3),
    "replaced": lambda m: m.set_output_embeddings(nn.Linear(48, 64, bias=False)),
    "removed": lambda m: delattr(m, "lm_head"),
}


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_lost_adapter_is_named(tmp_path, lose):
    model = adapt("llama", target_modules=["lm_head", "q_proj"]).eval()
    lk.save_adapter(model, tmp_path / "before")
    lose(model)
    report = lk.lora_report(model)
    assert "lm_head" not in report.adapted and "adapter lost" in report.skipped["lm_head"]
    calls = [
        lambda: lk.merge_adapter(model),
        lambda: lk.unmerge_adapter(model),
        lambda: lk.save_adapter(model, tmp_path / "after"),
    ]
    for call in calls:
        with pytest.warns(UserWarning, match=r"adapter of lm_head \(.*is lost: something replaced"):
            call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = lk.load_adapter(build("llama"), tmp_path / "after")
    assert set(lora_layers(loaded)) == set(lora_layers(model))


def test_the_only_adapter_lost(tmp_path):
    model = adapt("llama", target_modules=["lm_head"])
    model.resize_token_embeddings(90)
    for call in (lk.merge_adapter, lambda m: lk.save_adapter(m, tmp_path)):
        with (
            pytest.warns(UserWarning, match="adapter of lm_head"),
            pytest.raises(ValueError, match="no LoRA layers"),
        ):
            call(model)


def test_a_wrapped_layer_is_not_lost():
    model = adapt("llama", target_modules=["q_proj"])
    attention = model.model.layers[0].self_attn
    attention.q_proj = nn.Sequential(attention.q_proj)
    assert "model.layers.0.self_attn.q_proj" in lk.lora_report(model).adapted


# ---- export


def test_save_pretrained_of_a_merged_model_says_what_it_saves(tmp_path):
    model = adapt("llama", target_modules=["q_proj"]).eval()
    wanted = logits(model)
    lk.merge_adapter(model)
    with pytest.warns(UserWarning, match="not the merged weight"):
        model.save_pretrained(tmp_path / "base")
    lk.merge_adapter(model, keep_base=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "merged")
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    assert small.relative_difference(logits(again), wanted) < 1e-5


# ---- plain layers again


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "falcon"])
@pytest.mark.parametrize("way", ["keep_base=False", "unload", "unload merged", "merge=True"])
def test_plain_layers_come_back(name, way):
    plain = build(name).eval()
    model = build(name).eval()
    base = {n: model.get_submodule(n).weight for n, k in kinds(plain).items() if "inear" in str(k)}
    lk.apply_lora(model)
    small.draw_adapter(model)
    adapted = logits(model)
    wanted = logits(plain) if way == "unload" else adapted
    if way == "keep_base=False":
        lk.merge_adapter(model, keep_base=False)
    elif way == "unload merged":
        lk.merge_adapter(model)
        assert lk.unload(model) is model
    else:
        assert lk.unload(model, merge=way == "merge=True") is model
    assert kinds(model) == kinds(plain)
    assert small.relative_difference(logits(model), wanted) < 5e-6
    assert list(model.state_dict()) == list(plain.state_dict())
    assert repr(model) == repr(plain)
    if way == "unload":
        assert all(model.get_submodule(n).weight is weight for n, weight in base.items())
    for call in (lk.unmerge_adapter, lk.lora_report, lk.unload):
        with pytest.raises(RuntimeError, match="took the adapter off this"):
            call(model)
    lk.apply_lora(model)
    assert small.relative_difference(logits(model), wanted) < 5e-6


def test_hooks_mode_attributes_and_shared_places_come_along():
    linear, seen = nn.Linear(4, 4), []
    linear.mark = "kept"
    linear.eval()
    model = nn.ModuleDict({"a": linear, "b": linear, "c": nn.Linear(4, 4)})
    lk.apply_lora(model, r=2)
    handle = model["a"].register_forward_hook(lambda *_: seen.append(1))
    lk.unload(model)
    assert model["a"] is model["b"] and type(model["a"]) is nn.Linear
    assert model["a"].mark == "kept" and not model["a"].training and model["c"].training
    model["b"](torch.ones(1, 4))
    assert seen == [1]
    handle.remove()
    model["b"](torch.ones(1, 4))
    assert seen == [1]


def test_a_tied_head_is_tied_again():
    model = adapt("llama tied", target_modules=["lm_head"])
    lk.unload(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_one_layer_gives_a_plain_one():
    layer = lk.FusedLoRALinear(4, 3, r=2, init_lora_weights=False)
    x = torch.randn(2, 4)
    y = layer(x)
    plain = lk.unload(layer, merge=True)
    assert type(plain) is nn.Linear and (plain.in_features, plain.out_features) == (4, 3)
    torch.testing.assert_close(plain(x), y)


def test_a_wrapped_model_is_returned_as_it_came():
    wrapped = nn.DataParallel(nn.Sequential(nn.Linear(4, 4)))
    assert lk.unload(lk.apply_lora(wrapped)) is wrapped
    assert type(wrapped.module[0]) is nn.Linear


def test_dispatched_layers_keep_their_hook():
    hooks = pytest.importorskip("accelerate.hooks")
    model, moved = build("llama"), []
    hook = hooks.AlignDevicesHook(execution_device="cpu")
    hook.pre_forward = lambda module, *args, **kwargs: moved.append(type(module)) or (args, kwargs)
    hooks.add_hook_to_module(model.model.layers[0].mlp.up_proj, hook)
    lk.unload(lk.apply_lora(model))
    logits(model)
    assert moved == [nn.Linear]


# ---- offloaded after apply_lora


def offload(model, where, directory):
    accelerate = pytest.importorskip("accelerate")
    device = torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=device)
    else:
        accelerate.disk_offload(model, str(directory), execution_device=device)


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request, tmp_path):
    model = small.draw_adapter(lk.apply_lora(build("llama"), bias="all")).eval()
    wanted = logits(model)
    offload(model, request.param, tmp_path / "offload")
    return model, wanted


@pytest.mark.filterwarnings("ignore:the state_dict of a merged")
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_a_merged_model_that_is_offloaded_keeps_its_adapter(tmp_path, where):
    from accelerate.hooks import remove_hook_from_module

    model = adapt("llama", target_modules=["q_proj", "down_proj"]).eval()
    wanted = logits(model)
    lk.merge_adapter(model)
    offload(model, where, tmp_path)
    assert small.relative_difference(logits(model), wanted) < 1e-5
    with pytest.raises(RuntimeError, match="accelerate offloads"):
        lk.unmerge_adapter(model)
    remove_hook_from_module(model, recurse=True)
    assert small.relative_difference(logits(model), wanted) < 1e-5
    lk.unmerge_adapter(model)
    assert small.relative_difference(logits(model), wanted) < 1e-5


def test_a_base_put_on_the_meta_device_by_accelerate():
    modeling = pytest.importorskip("accelerate.utils.modeling")
    plain = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model = lk.apply_lora(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).to("meta"))
    for name, value in plain.state_dict().items():
        modeling.set_module_tensor_to_device(model, name, "cpu", value=value)
    x = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"lora_a is on meta.*reset_lora_parameters"):
        model(x)
    for layer in lora_layers(model).values():
        layer.reset_lora_parameters()
    torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()


def test_an_offloaded_model_says_how_to_merge(offloaded):
    from accelerate.hooks import remove_hook_from_module

    model, wanted = offloaded
    for call in (lk.merge_adapter, lk.unload):
        with pytest.raises(
            RuntimeError, match=r"q_proj: accelerate offloads .*remove_hook_from_mod"
        ):
            call(model)
    with pytest.raises(RuntimeError, match="cannot draw an adapter of this layer: accelerate"):
        model.model.layers[0].self_attn.q_proj.reset_lora_parameters()
    assert small.relative_difference(logits(model), wanted) < 1e-6
    remove_hook_from_module(model, recurse=True)
    lk.merge_adapter(model)
    assert small.relative_difference(logits(model), wanted) < 5e-6


def test_an_offloaded_adapter_is_saved_and_loading_is_refused(tmp_path, offloaded):
    model, wanted = offloaded
    lk.save_adapter(model, tmp_path / "adapter")
    loaded = lk.load_adapter(build("llama"), tmp_path / "adapter").eval()
    assert small.relative_difference(logits(loaded), wanted) < 1e-6
    with pytest.raises(ValueError, match="loaded into .*q_proj: accelerate offloads"):
        lk.load_adapter(model, tmp_path / "adapter")


def test_an_adapter_without_values_is_not_saved(tmp_path):
    model = lk.apply_lora(nn.Sequential(nn.Linear(4, 4, device="meta")))
    with pytest.raises(
        RuntimeError, match=r"0\.lora_A\.weight.*on the meta device, without values"
    ):
        lk.save_adapter(model, tmp_path)
