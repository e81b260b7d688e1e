"""Layers and models over four-bit weights: ours and bitsandbytes' ``Linear4bit``."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lora_kernels as lk
from lora_kernels.spec import four_bit
from lora_kernels.spec.four_bit import dequantize, quant_state_of, quantize


def linear4bit(n, k, dtype=torch.float32, kind="nf4", double=True, bias=True):
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(
        k, n, bias, compute_dtype=dtype, compress_statistics=double, quant_type=kind
    )
    torch.manual_seed(5)
    weight = torch.randn(n, k) / k**0.5
    made.load_state_dict({"weight": weight} | ({"bias": torch.randn(n)} if bias else {}))
    return made.to("cpu")


def quantized(n, k, dtype=None, kind="nf4", double=True, bias=True):
    torch.manual_seed(5)
    plain = nn.Linear(k, n, bias)
    return lk.QuantizedLinear.from_linear(plain, kind, double_quant=double, compute_dtype=dtype)


MAKERS = [linear4bit, quantized]


def adapted(base, **options):
    torch.manual_seed(6)
    return lk.FusedLoRALinear.from_linear(
        base, r=4, lora_alpha=8, init_lora_weights=False, **options
    )


def expected(layer, x):
    """In float64, by the decoded weight."""
    base = layer._pristine()
    w = dequantize(base.data, quant_state_of(base), torch.float64)
    y = x.double() @ w.t() + (0 if layer.bias is None else layer.bias.double())
    return y + layer.scaling * (x.double() @ layer.lora_A.double().t()) @ layer.lora_B.double().t()


def close(one, other, dtype=torch.float32):
    eps = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    return (one.double() - other.double()).abs().max() <= eps * other.abs().max()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_a_layer_computes_with_the_bytes(make, kind, double):
    base = make(70, 128, kind=kind, double=double)
    layer = adapted(base)
    assert layer.weight is base.weight and layer.lora_A.dtype == torch.float32
    x = torch.randn(3, 5, 128, requires_grad=True)
    with lk.record_plans() as answers:
        y = layer(x)
        y.sum().backward()
    assert [a.op for a in answers if a.problem.four_bit] == ["lora_linear_fwd", "lora_linear_dx"]
    assert {a.backend for a in answers} == {"cpu"}
    assert close(y, expected(layer, x))
    w = dequantize(base.weight.data, quant_state_of(base.weight), torch.float64)
    dx = w.sum(0) + layer.scaling * layer.lora_B.double().sum(0) @ layer.lora_A.double()
    assert close(x.grad, dx.expand_as(x))
    assert layer.lora_A.grad is not None and layer.weight.grad is None


@pytest.mark.parametrize("make", MAKERS)
def test_merging_is_exact_both_ways(make):
    layer = adapted(make(70, 128)).eval()
    x = torch.randn(6, 128)
    y, bytes_, held = layer(x), layer.weight.data.clone(), layer.weight
    layer.merge()
    assert layer.weight.shape == (70, 128) and layer.weight.dtype == torch.float32
    assert close(layer(x), y)
    assert layer.state_dict()["weight"].dtype == torch.uint8
    layer.unmerge()
    assert layer.weight is held and torch.equal(layer.weight.data, bytes_)
    assert torch.equal(layer(x), y)
    plain = adapted(make(70, 128))
    plain.merge(keep_base=False)
    plain = plain.to_linear()
    assert type(plain) is nn.Linear and close(plain(x), y)
    back = layer.to_linear()
    assert back.weight is held and type(back) is type(make(70, 128))


@pytest.mark.parametrize("make", MAKERS)
def test_compute_dtype_is_what_x_is_cast_to(make):
    layer = adapted(make(64, 128, torch.bfloat16))
    x = torch.randn(4, 128)
    with lk.record_plans() as answers:
        y = layer(x)
    assert answers[0].problem.dtype == "bfloat16" and y.dtype == torch.float32
    assert close(y, expected(layer, x), torch.bfloat16)
    layer.eval().merge()
    assert layer.weight.dtype == torch.bfloat16 and layer(x).dtype == torch.float32


@pytest.mark.parametrize("make", MAKERS)
def test_copies_pickles_and_casts_keep_the_bytes(make):
    layer = adapted(make(64, 128)).eval()
    x, bytes_ = torch.randn(2, 128), layer.weight.data.clone()
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    cast = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(cast.weight.data, bytes_) and quant_state_of(cast.weight) is not None
    assert cast.lora_A.dtype == torch.bfloat16
    absmax = quant_state_of(cast.weight).nested.absmax
    assert absmax.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_state_dict_passes_both_ways(make, assign):
    layer = adapted(make(64, 128)).eval()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert "weight.quant_state.bitsandbytes__nf4" in state and "weight.nested_absmax" in state
    torch.manual_seed(9)
    other = adapted(lk.QuantizedLinear.from_linear(nn.Linear(128, 64))).eval()
    x = torch.randn(2, 128)
    assert not torch.equal(other(x), layer(x))
    if assign:  # Into a layer without values, too.
        other.to("meta")
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(x), layer(x))
    wrong = adapted(lk.QuantizedLinear.from_linear(nn.Linear(128, 64), "fp4"))
    with pytest.raises(RuntimeError, match="'fp4'"):
        wrong.load_state_dict(state)
    del state["weight.absmax"]
    with pytest.raises(RuntimeError, match="no state of a four-bit weight"):
        other.load_state_dict(state)


def test_the_parameter_moves_with_its_state_and_never_trains():
    layer = quantized(32, 64)
    assert layer.to("meta").weight.quant_state.absmax.is_meta
    with pytest.raises(RuntimeError, match="does not train"):
        quantized(32, 64).weight.requires_grad_(True)
    with pytest.raises(ValueError, match="use_dora"):
        adapted(quantized(32, 64), use_dora=True)
    x = torch.randn(2, 64, requires_grad=True)
    layer = quantized(32, 64)
    layer(x).sum().backward()
    assert close(x.grad, layer.weight.dequantize(torch.float64).sum(0).expand_as(x))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        self.head = nn.Linear(64, 10)

    def get_output_embeddings(self):
        return self.head

    def forward(self, x):
        return self.head(x + self.down(torch.relu(self.up(x))))


def test_a_model_is_quantised_adapted_and_served():
    torch.manual_seed(0)
    model = lk.quantize_base(Small().eval())
    assert type(model.up) is lk.QuantizedLinear and type(model.head) is nn.Linear
    base = copy.deepcopy(model)
    x = torch.randn(5, 64)
    lk.apply_lora(model, r=4, init_lora_weights=False)
    with lk.record_plans() as answers:
        y = model.eval()(x)
    assert [a.problem.four_bit for a in answers if a.op == "lora_linear_fwd"] == [True, True]
    with lk.disable_adapter(model):
        assert torch.equal(model(x), base(x))
    lk.merge_adapter(model)
    assert close(model(x), y)
    lk.unmerge_adapter(model)
    assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="quantise its base first"):
        lk.quantize_base(model)
    with pytest.raises(ValueError, match="not 'int4'"):
        lk.quantize_base(Small(), "int4")


def test_a_store_over_a_four_bit_model(tmp_path):
    torch.manual_seed(0)
    model = lk.quantize_base(Small().eval())
    alone = lk.apply_lora(copy.deepcopy(model), r=4, init_lora_weights=False).eval()
    lk.save_adapter(alone, tmp_path)
    store = lk.AdapterStore(model, max_adapters=2, max_rank=4)
    store.load("a", tmp_path)
    x = torch.randn(3, 7, 64)
    plain = model(x)
    with store.batch(["a", None, "a"]), lk.record_plans() as answers:
        y = model(x)
    assert all(a.problem.four_bit and a.backend == "cpu" for a in answers) and answers
    assert close(y[[0, 2]], alone(x)[[0, 2]]) and close(y[1], plain[1])


def test_quantising_keeps_the_bytes_of_the_quantiser():
    plain = nn.Linear(96, 33)
    layer = lk.QuantizedLinear.from_linear(plain, "fp4", block=128, double_quant=False)
    data, state = quantize(plain.weight, "fp4", block=128, double_quant=False)
    assert torch.equal(layer.weight.data, data)
    assert torch.equal(layer.weight.quant_state.absmax, state.absmax)
    assert layer.bias is plain.bias


@pytest.mark.parametrize("known", [False, True])
def test_a_compiled_layer_holds_its_code(known, monkeypatch, recwarn):
    """Dynamo warns of a functools.cache that it looks through."""
    torch.compiler.reset()
    base = lk.QuantizedLinear.from_linear(nn.Linear(64, 72))
    layer = lk.FusedLoRALinear.from_linear(base, r=4, init_lora_weights=False)
    if not known:
        monkeypatch.setattr(four_bit, "_codes", {})
    x = torch.randn(5, 64)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    with torch.inference_mode():
        assert torch.equal(compiled(x[:3]), layer(x[:3]))
    assert {type(code) for code in four_bit._codes.values()} == {torch.Tensor}
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]


def test_a_code_of_a_fake_mode_is_not_kept(monkeypatch):
    monkeypatch.setattr(four_bit, "_codes", {})
    with FakeTensorMode():
        assert type(four_bit.code_of("fp4", "cpu")) is not torch.Tensor
    assert type(four_bit.code_of("fp4", "cpu")) is torch.Tensor
