"""``FusedLoRALinear``: construction, scaling, and every way a user moves or copies a module."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from adapted_layers import FORMATS, adapted, base_layer, explicit
from torch import nn

import lora_kernels as lk
from lora_kernels.testing.linear import Case, assert_within_budget, naive


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_is_the_formula(kind, dtype):
    layer = adapted(kind, dtype)
    x = torch.randn(3, 5, layer.in_features, dtype=dtype)
    expected = explicit(layer, x)
    assert (expected - F.linear(x, *base_of(layer)).double()).norm() > expected.norm() / 4
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


def base_of(layer):
    return (layer.weight.t() if layer.fan_in_fan_out else layer.weight), layer.bias


def test_is_a_linear_and_starts_as_its_base():
    layer = lk.FusedLoRALinear(24, 40, r=4)
    x = torch.randn(5, 24)
    assert isinstance(layer, nn.Linear)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert layer.lora_A.shape == (4, 24)
    assert layer.lora_B.shape == (40, 4)


def test_constructor_draws_the_base_as_linear_does():
    torch.manual_seed(3)
    plain = nn.Linear(24, 40)
    torch.manual_seed(3)
    layer = lk.FusedLoRALinear(24, 40)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize("kind", FORMATS)
def test_from_linear_shares_the_base(kind):
    module = base_layer(kind).eval()
    layer = lk.FusedLoRALinear.from_linear(module, r=3)
    assert layer.weight is module.weight
    assert layer.bias is module.bias
    assert layer.fan_in_fan_out == ("conv1d" in kind)
    assert not layer.training
    assert not any(
        p.requires_grad for p in (layer.weight, *([] if layer.bias is None else [layer.bias]))
    )
    x = torch.randn(7, layer.in_features)
    torch.testing.assert_close(layer(x), module(x))


def test_from_linear_keeps_hooks():
    module, calls = nn.Linear(4, 4), []
    handle = module.register_forward_hook(lambda m, args, out: calls.append("forward"))
    module.register_forward_pre_hook(lambda m, args, kwargs: calls.append("pre"), with_kwargs=True)
    layer = lk.FusedLoRALinear.from_linear(module)
    layer(torch.ones(1, 4))
    assert calls == ["pre", "forward"]
    handle.remove()
    layer(torch.ones(1, 4))
    assert calls == ["pre", "forward", "pre"]


class _OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Embedding(3, 4), "is a Embedding"),
        (nn.Conv1d(3, 4, 1), "is a Conv1d"),
        (_OwnForward(3, 4), "forward of its own"),
        (nn.MultiheadAttention(4, 2).out_proj, "never called"),
        (lk.FusedLoRALinear(3, 4), "already"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "parametrised"),
        (nn.LazyLinear(4), "LazyLinear|lazy"),
    ],
)
def test_from_linear_refuses(module, message):
    with pytest.raises(TypeError, match=message):
        lk.FusedLoRALinear.from_linear(module)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 0}, "rank r must be an integer >= 1, not 0"),
        ({"r": -1}, "not -1"),
        ({"r": 2.5}, "not 2.5"),
        ({"r": True}, "not True"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"lora_dropout": -0.1}, "lora_dropout"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        lk.FusedLoRALinear(3, 4, **arguments)
    module = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=message):
        lk.FusedLoRALinear.from_linear(module, **arguments)
    assert module.weight.requires_grad


def test_a_typo_is_an_error():
    with pytest.raises(TypeError, match="lora_aplha"):
        lk.FusedLoRALinear(3, 4, lora_aplha=3)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling(use_rslora):
    layer = adapted(r=4, lora_alpha=6, use_rslora=use_rslora)
    assert layer.scaling == (6 / math.sqrt(4) if use_rslora else 6 / 4)
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x).double(), explicit(layer, x), rtol=1e-5, atol=1e-5)
    address = layer._scale.data_ptr()
    layer.scaling = 0.25
    assert layer.scaling == 0.25
    assert layer._scale.data_ptr() == address, "a captured graph reads the scale at its address"
    torch.testing.assert_close(layer(x).double(), explicit(layer, x), rtol=1e-5, atol=1e-5)
    layer.merge()
    layer.scaling = 3.0
    layer.unmerge()
    layer.merge()
    merged = layer(x)
    layer.unmerge()
    torch.testing.assert_close(merged.double(), explicit(layer, x), rtol=1e-5, atol=1e-5)


def test_initialisations():
    torch.manual_seed(0)
    kaiming = lk.FusedLoRALinear(4096, 16, r=64)
    bound = 1 / math.sqrt(4096)
    assert kaiming.lora_A.abs().max() <= bound
    assert kaiming.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not kaiming.lora_B.any()
    gaussian = lk.FusedLoRALinear(4096, 16, r=64, init_lora_weights="gaussian")
    assert gaussian.lora_A.std().item() == pytest.approx(1 / 64, rel=0.02)
    assert not gaussian.lora_B.any()
    random = lk.FusedLoRALinear(4096, 16, r=64, init_lora_weights=False)
    assert random.lora_B.std().item() == pytest.approx(1 / math.sqrt(3 * 64), rel=0.1)
    old = random.lora_A.clone()
    random.reset_lora_parameters()
    assert not torch.equal(random.lora_A, old)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_bases(dtype, autocast_adapter_dtype):
    layer = adapted("conv1d", dtype, autocast_adapter_dtype=autocast_adapter_dtype)
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert (layer.weight.dtype, layer.lora_A.dtype, layer.lora_B.dtype) == (
        dtype,
        expected,
        expected,
    )
    x = torch.randn(33, 24, dtype=dtype)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert layer.lora_A.grad.dtype == expected
    # The budget's eager baseline, on this layer's own tensors.
    case = Case(
        33, 40, 24, 4, dtype, adapter_dtype=expected, fan_in_fan_out=True, scale=layer.scaling
    )
    inputs = copy.copy(case.draw())
    for name, value in {
        "x": x,
        "weight": layer.weight,
        "lora_a": layer.lora_A,
        "lora_b": layer.lora_B,
    }.items():
        object.__setattr__(inputs, name, value)
    object.__setattr__(inputs, "bias", layer.bias)
    assert_within_budget("y", y, naive(inputs, dtype)["y"], naive(inputs, torch.float64)["y"])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: saved_and_loaded(m)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies(copied, merged):
    layer = adapted("conv1d", lora_dropout=0.1).eval()
    if merged:
        layer.merge()
    other = copied(layer)
    x = torch.randn(5, 24)
    assert torch.equal(other(x), layer(x))
    assert other.merged == merged
    assert other.scaling == layer.scaling
    layer.unmerge()
    other.unmerge()
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.weight.zero_()
        other.lora_A.zero_()
    other.scaling = 9.0
    assert layer.weight.any()
    assert layer.lora_A.any()
    assert layer._scale.item() == layer.scaling


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype(dtype, merged):
    layer = adapted()
    base = layer.weight.detach().clone()
    if merged:
        layer.merge()
    assert layer.to(dtype) is layer
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.merged == merged
    # The scale keeps its precision, whatever the module is cast to.
    assert layer._scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert layer._scale.item() == layer.scaling
    x = torch.randn(5, 24, dtype=dtype)
    torch.testing.assert_close(layer(x).double(), explicit_unmerged(layer, x), rtol=5e-2, atol=5e-2)
    assert torch.equal(layer.weight, base.to(dtype))


def explicit_unmerged(layer, x):
    layer.unmerge()
    return explicit(layer, x)


def test_to_empty_and_reset_after_meta():
    layer = lk.FusedLoRALinear(24, 40, r=4, lora_alpha=6, device="meta")
    assert layer._scale.is_meta
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer._scale.item() == 1.5
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_assigned_a_state_on_the_meta_device(dtype):
    """As large models are loaded: built without memory, then given their weights."""
    source = adapted(lora_alpha=6, use_rslora=True).to(dtype)
    layer = lk.FusedLoRALinear(24, 40, r=source.r, lora_alpha=6, use_rslora=True, device="meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    assert layer._scale.dtype == dtype and layer._scale.item() == source._scale.item()
    x = torch.randn(3, 24, dtype=dtype)
    assert torch.equal(layer(x), source(x))
    layer(x).sum().backward()


def test_unmoved_layer_keeps_its_scale_in_place():
    layer = adapted()
    address = layer._scale.data_ptr()
    layer.cpu().float()
    assert layer._scale.data_ptr() == address


def test_train_and_eval_while_merged():
    layer = adapted(lora_dropout=0.5).eval()
    layer.merge()
    assert layer.eval().merged
    layer.train()
    assert not layer.merged
    layer(torch.randn(3, 24)).sum().backward()
    assert layer.lora_A.grad is not None


def test_dropout_only_in_training():
    layer = adapted(lora_dropout=0.5)
    x = torch.randn(64, 24)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    torch.testing.assert_close(layer(x).double(), explicit(layer, x), rtol=1e-5, atol=1e-5)


def test_requires_grad_of_the_bias_is_honoured():
    layer = adapted()
    layer.bias.requires_grad_(True)
    layer(torch.randn(3, 24)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((40,), 3.0))
    assert layer.weight.grad is None


def test_set_lora():
    layer = adapted(r=4)
    layer.merge()
    lora_a, lora_b = torch.randn(4, 24), torch.randn(40, 4)
    layer.set_lora(lora_a, lora_b, lora_alpha=2)
    assert layer.merged
    x = torch.randn(3, 24)
    merged = layer(x)
    layer.unmerge()
    assert layer.scaling == 0.5
    torch.testing.assert_close(merged.double(), explicit(layer, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"lora_a \[3, 24\]"):
        layer.set_lora(lora_a[:3], lora_b[:, :3], lora_alpha=2)


def test_repr_tells_the_adapter():
    layer = adapted("conv1d", lora_dropout=0.25)
    layer.merge()
    text = repr(layer)
    for part in (
        "in_features=24",
        "r=4",
        "lora_alpha=6",
        "scaling=1.5",
        "lora_dropout=0.25",
        "fan_in_fan_out",
        "merged",
    ):
        assert part in text


def test_compiled_module_does_not_recompile_for_scales_and_batches():
    torch._dynamo.reset()
    layer = adapted(lora_dropout=0.1).eval()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, scaling in ((5, 1.0), (6, 2.0), (13, 0.5)):
            layer.scaling = scaling
            x = torch.randn(rows, 24)
            torch.testing.assert_close(compiled(x), layer(x))


def test_functional_call_and_grads():
    layer = adapted()
    x = torch.randn(3, 24)
    changed = {name: p.detach() * 2 for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, changed, (x,))
    expected = F.linear(x, changed["weight"], changed["bias"])
    expected = expected + layer.scaling * (x @ changed["lora_A"].t() @ changed["lora_B"].t())
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("training", [None, False, True])
def test_warmup_runs_every_layer_and_leaves_no_trace(training, merged):
    model = nn.Sequential(adapted(lora_dropout=0.5), nn.ReLU(), base_layer("linear"), nn.Tanh())
    if merged:
        model.eval()
        lk.merge_adapter(model)
    generator = torch.random.get_rng_state()
    with lk.record_plans() as answers:
        lk.warmup(model, [1, 33], training=training)
    backward = model.training if training is None else training
    ops = ["lora_linear_fwd"] + ["lora_linear_dx", "lora_linear_dab"] * backward
    # A merged layer has no adapter to compute, at most its packed weight to read (rank 0).
    adapted_calls = [a for a in answers if a.problem.r]
    assert [a.op for a in adapted_calls] == ([] if merged else ops * 2)
    assert [a.problem.m for a in adapted_calls[:1]] == ([] if merged else [1])
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert all(p.grad is None for p in model.parameters())


def test_warmup_of_the_layers_of_a_store():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6))
    lk.AdapterStore(model, max_adapters=2, max_rank=4, target_modules=["0", "1"])
    stacks = [p.clone() for p in model.parameters()]
    with lk.record_plans() as answers:
        lk.warmup(model.eval(), [1, 33])
    mixed = [a.problem for a in answers if a.op == "segmented_linear_fwd"]
    assert [(p.m, p.slots, p.r) for p in mixed] == [(1, 2, 4), (33, 2, 4)]
    assert sum(a.op == "segmented_expand_" for a in answers) == 2
    assert all(map(torch.equal, stacks, model.parameters()))


def test_warmup_of_a_store_that_trains():
    model = nn.Sequential(nn.Linear(8, 6))
    store = lk.AdapterStore(model, max_adapters=2, max_rank=4)
    store.requires_grad_()
    with lk.record_plans() as answers:
        lk.warmup(model.train(), [5])
    assert [a.op for a in answers] == [
        "segmented_linear_fwd",
        "segmented_linear_dx",
        "segmented_lora_dab",
    ]
    assert all(p.grad is None for p in model.parameters())


def test_warmup_of_nothing_or_of_nonsense():
    with pytest.raises(ValueError, match="no LoRA layers of lora_kernels: call apply_lora or"):
        lk.warmup(nn.Linear(3, 4), [1])
    with pytest.raises(ValueError, match="rows must be"):
        lk.warmup(adapted(), [-1])
