"""Modules that do more than the forward of nn.Linear are left alone, with the reason."""

import copy
import functools
import re
import types

import peft
import pytest
import small
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import lora_kernels as lk
from lora_kernels.layers.replacing import unsupported_reason

E = 8


def clamped(self, x):
    return F.linear(x.clamp(-0.1, 0.1), self.weight, self.bias)


def with_forward():
    layer = nn.Linear(E, E)
    layer.forward = types.MethodType(clamped, layer)
    return layer


def with_wrapped_forward():
    """compressed-tensors' manner."""
    layer = nn.Linear(E, E)
    inner = layer.forward

    @functools.wraps(inner)
    def forward(x):
        return inner(x.round())

    layer.forward = forward
    return layer


def with_forward_under_a_hook():
    return add_hook_to_module(with_forward(), AlignDevicesHook(execution_device="cpu"))


def with_forward_over_a_hook():
    layer = add_hook_to_module(nn.Linear(E, E), AlignDevicesHook(execution_device="cpu"))
    layer.forward = types.MethodType(clamped, layer)
    return layer


def with_state_dict():
    layer = nn.Linear(E, E)
    layer.state_dict = lambda *args, **kwargs: {}
    return layer


class Doubles(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) * 2


class Gained(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(1))


class Observed(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("largest", torch.zeros(()))


class Nested(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.norm = nn.LayerNorm(E)


class LoadsItsOwnWay(nn.Linear):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[prefix + "weight"] = state_dict.pop(prefix + "kernel").t()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Mixin:
    def train(self, mode=True):
        return super().train(False)


class Frozen(Mixin, nn.Linear):
    pass


class Scaled(torch.Tensor):
    """A weight that means something else than its values, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                x, weight, *bias = args
                return F.linear(x, weight.as_subclass(torch.Tensor) * 3, *bias)
            result = func(*args, **(kwargs or {}))
            return result.as_subclass(cls) if func is torch.Tensor.detach else result


def with_weight(weight):
    layer = nn.Linear(E, E)
    layer._parameters["weight"] = weight
    return layer


def foreign():
    torch.manual_seed(2)
    return nn.Parameter(torch.randn(E, E).as_subclass(Scaled), requires_grad=False)


def with_load_hook():
    layer = nn.Linear(E, E)
    layer.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: None)
    return layer


REFUSED = {
    "forward on the object": (with_forward, "forward was set on the module object"),
    "wrapped forward": (with_wrapped_forward, "forward was set on the module object"),
    "forward under accelerate's": (with_forward_under_a_hook, "forward was set"),
    "forward over accelerate's": (with_forward_over_a_hook, "forward was set"),
    "state_dict on the object": (with_state_dict, "state_dict was set on the module object"),
    "__call__": (lambda: Doubles(E, E), "is a Doubles, which overrides __call__"),
    "loading": (lambda: LoadsItsOwnWay(E, E), "which overrides _load_from_state_dict"),
    "a mixin's method": (lambda: Frozen(E, E), "is a Frozen, which overrides train"),
    "parameter": (lambda: Gained(E, E), "holds more than weight and bias: gain"),
    "buffer": (lambda: Observed(E, E), "holds more than weight and bias: largest"),
    "child": (lambda: Nested(E, E), "holds more than weight and bias: norm"),
    "load hook": (with_load_hook, "has a load_state_dict pre-hook of its own"),
    "weight_norm": (lambda: weight_norm(nn.Linear(E, E)), "its weight is no 2-D Parameter"),
    "spectral_norm": (lambda: spectral_norm(nn.Linear(E, E)), "its weight is no 2-D Parameter"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(E, E)), "no 2-D Parameter"),
    "parametrised bias": (
        lambda: parametrize.register_parametrization(nn.Linear(E, E), "bias", nn.Tanh()),
        "its bias is no Parameter",
    ),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(E, E), "weight", 0.5), "no 2-D Parameter"),
    "pruned bias": (
        lambda: prune.l1_unstructured(nn.Linear(E, E), "bias", 0.5),
        "its bias is no Parameter",
    ),
    "tensor subclass": (
        lambda: with_weight(foreign()),
        "has a weight of Scaled, no plain Parameter",
    ),
    "sparse": (
        lambda: with_weight(nn.Parameter(torch.eye(E).to_sparse())),
        "its weight is sparse or nested",
    ),
    "float8": (
        lambda: with_weight(nn.Parameter(torch.zeros(E, E).to(torch.float8_e4m3fn), False)),
        "its weight is torch.float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_layers_that_do_more_are_left_alone(case):
    make, reason = case
    with pytest.raises(TypeError, match=re.escape(reason)):
        lk.FusedLoRALinear.from_linear(make())
    model = nn.Sequential(make(), nn.Linear(E, E))
    kept = model[0]
    with pytest.raises(ValueError, match=re.escape(reason)):
        lk.apply_lora(model, target_modules=["0"])
    assert model[0] is kept
    assert reason in lk.lora_report(lk.apply_lora(model)).skipped["0"]
    assert model[0] is kept
    model = nn.Sequential(make(), nn.Linear(E, E))
    store = lk.AdapterStore(model, max_adapters=1, max_rank=2)
    assert type(model[1]).__name__ == "MultiLoRALinear" != type(model[0]).__name__
    assert reason in store.skipped["0"]
    pair = {"0.lora_A.weight": torch.ones(1, E), "0.lora_B.weight": torch.ones(E, 1)}
    with pytest.raises(ValueError, match=re.escape(reason)):
        store.load("a", pair, config={"r": 1, "target_modules": ["0"]})


@pytest.mark.parametrize(
    "make", [with_forward, with_wrapped_forward, lambda: Doubles(E, E), with_forward_over_a_hook]
)
@pytest.mark.parametrize("place", ["base_layer", "lora_A"])
def test_the_swaps_report_lists_no_layer_of_which_every_call_falls_back(make, place):
    model = nn.Sequential(make() if place == "base_layer" else nn.Linear(E, E), nn.Linear(E, E))
    model = peft.get_peft_model(model, peft.LoraConfig(r=E, target_modules=["0", "1"]))
    layer = model.base_model.model[0]
    if place == "lora_A":
        layer.lora_A["default"] = make()
    report = lk.accelerate_peft(model)
    assert list(report.fused) == ["base_model.model.1"] and len(report.skipped) == 1
    model(torch.randn(3, E))
    assert report.calls.share == 1.0
    lk.restore_peft(model)


def test_harmless_subclasses_and_objects_are_adapted():
    class Tagged(nn.Linear):
        tag = "x"

        def reset_parameters(self):
            pass

        def extra_repr(self):
            return "tagged"

    own = nn.Linear(E, E)
    own.forward = types.MethodType(nn.Linear.forward, own)
    own.extra_repr = lambda: "own"
    compiled = nn.Linear(E, E)
    compiled.compile(backend="eager")
    for module in (Tagged(E, E), own, compiled):
        assert unsupported_reason(module) is None


def test_a_base_class_that_was_given_another_forward_is_refused(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", clamped)
    assert "a forward of its own" in unsupported_reason(nn.Linear(E, E))


class Rounds(ModelHook):
    def pre_forward(self, module, x):
        return (x.round(),), {}


@pytest.mark.parametrize("hook", [AlignDevicesHook(execution_device="cpu"), Rounds()])
def test_accelerates_hook_comes_along(hook):
    def module():
        torch.manual_seed(0)
        return add_hook_to_module(nn.Linear(E, E), hook)

    x = torch.randn(3, E) * 4
    expected = module()(x)
    layer = lk.FusedLoRALinear.from_linear(module())
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(lk.apply_lora(nn.Sequential(module()))(x), expected)
    served = nn.Sequential(module())
    lk.AdapterStore(served, max_adapters=1, max_rank=2)
    torch.testing.assert_close(served(x), expected)
    assert served[0]._hf_hook is hook


def test_hooks_on_the_state_come_along():
    module = nn.Linear(E, E)
    module.register_state_dict_post_hook(lambda m, state, prefix, _: state.__delitem__("bias"))
    seen = []
    module.register_load_state_dict_post_hook(lambda m, keys: seen.append(type(m).__name__))
    layer = lk.FusedLoRALinear.from_linear(module)
    assert layer.state_dict().keys() == {"weight", "lora_A", "lora_B"}
    layer.load_state_dict(layer.state_dict(), strict=False)
    assert seen == ["FusedLoRALinear"]


class OwnEmbedding(nn.Embedding):
    def __call__(self, ids):
        return super().__call__(ids) * 2


def test_embeddings_that_do_more_get_no_slots():
    with_forward = nn.Embedding(5, E)
    with_forward.forward = lambda ids: torch.zeros(*ids.shape, E)
    for embedding in (OwnEmbedding(5, E), with_forward):
        model = nn.Sequential(embedding, nn.Linear(E, E))
        with pytest.raises(ValueError, match="overrides __call__|was set on the module object"):
            lk.AdapterStore(model, max_adapters=1, max_rank=2, target_modules=["0"])


# ---- a weight that becomes another library's after the layer was adapted


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_an_adapted_layer_computes_with_a_foreign_weight(dropout, autocast):
    layer = lk.FusedLoRALinear(E, E, r=3, lora_dropout=dropout, init_lora_weights=False)
    plain = copy.deepcopy(layer)
    layer.weight = foreign()
    plain.weight = nn.Parameter(foreign().as_subclass(torch.Tensor) * 3, requires_grad=False)
    x = torch.randn(2, 5, E)
    results = []
    for each in (layer, plain):
        torch.manual_seed(1)
        with torch.autocast("cpu", enabled=autocast):
            y = each(x)
        y.float().square().sum().backward()
        results.append((y, each.lora_A.grad, each.lora_B.grad))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        assert small.relative_difference(ours, expected) < (2e-2 if autocast else 1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_store_serves_a_foreign_weight():
    x = torch.randn(3, 4, E)
    results = []
    for weight in (foreign(), nn.Parameter(foreign().as_subclass(torch.Tensor) * 3, False)):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(E, E))
        store = lk.AdapterStore(model, max_adapters=1, max_rank=2)
        store.create("a", r=2, init_lora_weights=False)
        model[0].weight = weight
        with torch.no_grad(), store.batch(["a", None, "a"]):
            results.append(model(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_real_model_is_refused_before_anything_changes():
    model = small.build("llama")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().as_subclass(Scaled), False)
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match="has a weight of Scaled, no plain Parameter"):
        lk.apply_lora(model)
    before.assert_unchanged()
