"""``FusedLoRALinear`` merged: what it computes, its state, and who may replace its weight."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from adapted_layers import FORMATS, adapted, base_layer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import lora_kernels as lk


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(kind, dtype):
    layer = adapted(kind, dtype)
    weight, version, values = layer.weight, layer.weight._version, layer.weight.clone()
    x = torch.randn(64, layer.in_features, dtype=dtype)
    y = layer(x)
    layer.merge()
    assert layer.merged
    assert layer.weight is not weight
    assert not layer.weight.requires_grad
    merged = layer(x)
    bound = 1e-6 if dtype == torch.float32 else 2e-2
    assert (merged - y).abs().max() / y.abs().max() < bound
    delta = layer.delta_weight()
    assert delta.shape == weight.shape
    torch.testing.assert_close(
        layer.weight.double(), values.double() + delta.double(), rtol=1e-2, atol=1e-6
    )
    first = layer.weight
    layer.merge()
    assert layer.weight is first, "merging twice merges once"
    layer.unmerge()
    assert layer.weight is weight
    assert weight._version == version
    assert torch.equal(weight, values)
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert layer.weight is weight


@pytest.mark.parametrize("kind", FORMATS)
def test_training_mode_unmerges(kind):
    layer = adapted(kind)
    weight = layer.weight
    layer.merge()
    layer.eval()
    assert layer.merged
    nn.Sequential(layer).train()
    assert not layer.merged and layer.weight is weight


def test_merging_writes_no_tied_weight():
    embedding = nn.Embedding(40, 24)
    module = nn.Linear(24, 40, bias=False)
    module.weight = embedding.weight
    values = embedding.weight.clone()
    layer = lk.FusedLoRALinear.from_linear(module, init_lora_weights=False)
    layer.merge()
    assert torch.equal(embedding.weight, values)
    layer.unmerge()
    assert layer.weight is embedding.weight


def test_merge_without_keeping_the_base_is_a_plain_linear():
    layer = adapted()
    x = torch.randn(3, 24)
    y = layer(x)
    layer.merge(keep_base=False)
    assert layer.lora_A is None
    assert layer.lora_B is None
    plain = nn.Linear(24, 40)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain(x), y)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))
    for call in (layer.unmerge, layer.delta_weight, layer.reset_lora_parameters):
        with pytest.raises(RuntimeError, match="keep_base=False"):
            call()
    kept = adapted()
    kept.merge()
    kept.merge(keep_base=False)
    assert kept.lora_A is None
    assert kept.merged


@pytest.mark.parametrize("merged", [False, True])
def test_state_dict_holds_base_and_adapter_merged_or_not(merged):
    layer = adapted()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(before) == {"weight", "bias", "lora_A", "lora_B"}
    if merged:
        layer.merge()
    after = layer.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    kept = layer.state_dict(keep_vars=True)["weight"]
    assert isinstance(kept, nn.Parameter)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_load_state_dict(merged, assign):
    source, layer = adapted("conv1d"), adapted("conv1d")
    if merged:
        layer.merge()
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert layer.merged == merged
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), source(x), rtol=1e-5, atol=1e-5)
    layer.unmerge()
    assert torch.equal(layer.weight, source.weight)
    assert torch.equal(layer(x), source(x))


def test_a_tied_weight_assigned_again_stays_merged():
    layer = adapted().eval()
    base, x = layer.weight, torch.randn(5, 24)
    y = layer(x)
    layer.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.weight = base
    assert layer.merged and layer.weight is not base
    torch.testing.assert_close(layer(x), y)
    layer.unmerge()
    assert layer.weight is base and torch.equal(layer(x), y)


def test_another_weight_assigned_while_merged_is_pristine_and_told():
    layer = adapted().eval()
    layer.merge()
    other = nn.Parameter(torch.randn(40, 24))
    with pytest.warns(UserWarning, match=r"merged FusedLoRALinear was replaced.*pristine"):
        layer.weight = other
    x = torch.randn(5, 24)
    merged = layer(x)
    layer.unmerge()
    assert layer.weight is other
    torch.testing.assert_close(layer(x), merged, rtol=1e-4, atol=1e-5)


def test_a_weight_of_another_shape_is_refused_while_merged():
    layer = adapted()
    layer.merge()
    merged = layer.weight
    with pytest.raises(RuntimeError, match=r"\[50, 24\] cannot replace .*\[40, 24\]: unmerge"):
        layer.weight = nn.Parameter(torch.randn(50, 24))
    assert layer.merged and layer.weight is merged


@pytest.mark.parametrize("kind", FORMATS)
def test_functional_call_of_a_merged_layer_takes_either_weight(kind):
    layer = adapted(kind).eval()
    x = torch.randn(5, layer.in_features)
    y = layer(x)
    layer.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pristine = layer.state_dict()
    merged = {name: p.detach() for name, p in layer.named_parameters()}
    for state in (pristine, merged):
        y_state = torch.func.functional_call(layer, state, (x,))
        torch.testing.assert_close(y_state, y, rtol=1e-4, atol=1e-5)

    def loss(state):
        return torch.func.functional_call(layer, state, (x,)).square().sum()

    assert torch.func.grad(loss)(pristine)["lora_B"].abs().max() > 0


def test_a_merged_layer_compiles():
    torch._dynamo.reset()
    layer = adapted().eval()
    layer.merge()
    x = torch.randn(5, 24)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def pruned(layer, name):
    prune.l1_unstructured(layer, name, 0.5)
    return lambda: prune.remove(layer, name)


def weight_normed(layer, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer, name)
    return lambda: nn.utils.remove_weight_norm(layer, name)


def spectral_normed(layer, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.spectral_norm(layer, name)
    return lambda: nn.utils.remove_spectral_norm(layer, name)


def parametrised(layer, name):
    parametrizations.weight_norm(layer, name)
    return lambda: parametrize.remove_parametrizations(layer, name)


@pytest.mark.parametrize("name", ["weight", "lora_A"])
@pytest.mark.parametrize(
    ("derive", "cause"),
    [
        (pruned, r"pruned: call torch.nn.utils.prune.remove\(layer, "),
        (weight_normed, r"weight-normed: call torch.nn.utils.remove_weight_norm\(layer, "),
        (spectral_normed, r"spectral-normed: call torch.nn.utils.remove_spectral_norm\(layer, "),
        (parametrised, r"parametrised: call torch.nn.utils.parametrize.remove_parametrizations\("),
    ],
)
def test_a_derived_parameter_is_named_with_the_remedy(derive, cause, name):
    model = nn.Sequential(adapted().eval())
    undo = derive(model[0], name)
    x = torch.randn(5, 24)
    y = model(x)
    for call in (model[0].merge, model[0].to_linear):
        with pytest.raises(RuntimeError, match=f"its {name} is {cause}"):
            call()
    for function in (lk.merge_adapter, lk.unload):
        with pytest.raises(RuntimeError, match=f"0: its {name} is {cause}"):
            function(model)
    assert torch.equal(model(x), y)
    undo()
    lk.merge_adapter(model)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def test_a_merged_layer_that_is_parametrised_is_unmerged_after_the_remedy():
    model = nn.Sequential(adapted().eval())
    x = torch.randn(5, 24)
    y = model(x)
    lk.merge_adapter(model)
    undo = parametrised(model[0], "weight")
    with pytest.raises(RuntimeError, match="its weight is parametrised"):
        lk.unmerge_adapter(model)
    undo()
    lk.unmerge_adapter(model)
    assert torch.equal(model(x), y)


def test_an_adapter_is_not_set_into_what_is_derived():
    layer = adapted()
    pruned(layer, "lora_B")
    with pytest.raises(RuntimeError, match="cannot set an adapter of this layer: its lora_B is pr"):
        layer.set_lora(torch.randn(4, 24), torch.randn(40, 4), lora_alpha=2)


def test_the_state_of_a_merged_model_tells_once_that_it_is_pristine():
    model = nn.Sequential(adapted(), nn.ReLU(), base_layer("linear"), adapted()).eval()
    lk.merge_adapter(model)
    with pytest.warns(
        UserWarning, match=r"pristine weight.*merge_adapter\(model, keep_base=F"
    ) as w:
        model.state_dict()
    assert len(w) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(model)
        lk.unmerge_adapter(model)
        model.state_dict()


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapters(merged):
    model = nn.Sequential(adapted(), nn.ReLU(), adapted("conv1d"))[:1].eval()
    x = torch.randn(5, 24)
    plain = F.linear(x, model[0].weight, model[0].bias)
    y = model(x)
    if merged:
        lk.merge_adapter(model)
        y = model(x)
    with lk.disable_adapter(model):
        torch.testing.assert_close(model(x), plain)
        with lk.disable_adapter(model):
            pass
        torch.testing.assert_close(model(x), plain)
        assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(model(x), y)
    with pytest.raises(ZeroDivisionError), lk.disable_adapter(model):
        1 / 0  # noqa: B018
    assert torch.equal(model(x), y)


def test_disabled_adapters_pass_gradients_to_the_input():
    layer = adapted()
    x = torch.randn(5, 24, requires_grad=True)
    with lk.disable_adapter(layer):
        layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, 24))
    assert layer.lora_A.grad is None


def test_disabling_what_is_no_more_or_never_was():
    layer = adapted()
    layer.merge(keep_base=False)
    with pytest.raises(RuntimeError, match="keep_base=False"), lk.disable_adapter(layer):
        pass
    with pytest.raises(ValueError, match="no LoRA layers"), lk.disable_adapter(nn.Linear(2, 2)):
        pass
    model = lk.apply_lora(nn.Sequential(nn.Linear(4, 4)), bias="all")
    with pytest.warns(UserWarning, match="trained biases"), lk.disable_adapter(model):
        pass


def materialised(layer, how):
    if how == "to_empty":
        layer.to_empty(device="cpu")
        with torch.no_grad():
            layer.weight.normal_()
            layer.bias.normal_()
    else:
        layer.load_state_dict(nn.Linear(24, 40).state_dict(), strict=False, assign=True)
    return layer


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_an_adapter_from_the_meta_device_begins_as_its_base(how, merged):
    layer = lk.FusedLoRALinear(24, 40, r=4, device="meta").eval()
    if merged:
        layer.merge()
    a = materialised(layer, how).lora_A
    assert layer.lora_A.device.type == "cpu" and layer.lora_A.requires_grad
    assert not layer.lora_B.any() and 0 < a.abs().max() <= 1 / 24**0.5
    layer.unmerge()
    with torch.no_grad():
        # The weight that was kept aside: to_empty leaves it as memory was, NaN now and then.
        layer.weight.normal_()
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_an_adapter_that_comes_with_its_base_is_not_drawn():
    source = adapted()
    layer = lk.FusedLoRALinear(24, 40, r=4, lora_alpha=6, device="meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer.lora_A, source.lora_A) and torch.equal(layer.lora_B, source.lora_B)
