"""``MultiLoRALinear`` and ``MultiLoRAEmbedding`` by themselves: the formula, in every orientation
and dtype; the state; who answered."""

import copy
import pickle

import pytest
import torch
from stores import NATIVE, answered_by
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.layers.batches import Adapter, Batch, Owner, activate
from lora_kernels.testing.linear import assert_within_budget

SLOTS, MAX_RANK, WIDTH = 4, 20, 150
# Slot 2 is unused, and slot 3 without this layer.
LIVE = {0: (5, 0.75), 1: (17, -1.5), 3: (0, 1.0)}
ROWS = [1, -1, 0, 3, 0, -1, 1]
TOKENS = 9


def linear(kind, dtype=torch.float32):
    torch.manual_seed(0)
    module = {
        "linear": lambda: nn.Linear(WIDTH, 70),
        "no bias": lambda: nn.Linear(WIDTH, 70, bias=False),
        "Conv1D": lambda: Conv1D(70, WIDTH),
        "square Conv1D": lambda: Conv1D(WIDTH, WIDTH),
    }[kind]()
    nn.init.normal_(module.weight, std=WIDTH**-0.5)
    return module.to(dtype)


def multi(module, **options):
    """The layer with drawn adapters, NaN wherever nothing may be read."""
    owner = Owner()
    layer = lk.MultiLoRALinear.from_linear(
        module, SLOTS, MAX_RANK, path="proj", owner=owner, **options
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for stack in (layer.lora_A, layer.lora_B):
            stack.copy_(torch.randn(stack.shape, generator=generator) / stack.shape[2] ** 0.5)
        for slot in range(SLOTS):
            rank = LIVE.get(slot, (0, 0.0))[0]
            layer.lora_A[slot, rank:] = float("nan")
            layer.lora_B[slot, :, rank:] = float("nan")
    return layer, owner


def batch_of(rows, path="proj", **options):
    adapters = [Adapter(str(slot), slot, {path: live}, 0.0) for slot, live in LIVE.items()]
    return Batch(adapters, SLOTS, MAX_RANK, rows, **options)


def formula(layer, x, dtype):
    """y by the definition, sequence after sequence; operands rounded to x's dtype first."""
    w, bias = layer.weight.to(dtype), layer.bias
    x64 = x.to(dtype)
    y = x64 @ (w if layer.fan_in_fan_out else w.t())
    y = y if bias is None else y + bias.to(dtype)
    each = len(x) // len(ROWS)
    for i, slot in enumerate(s for s in ROWS for _ in range(each)):
        rank, scale = LIVE.get(slot, (0, 0.0))
        if slot >= 0 and rank:
            a, b = layer.lora_A[slot, :rank], layer.lora_B[slot, :, :rank]
            a, b = (t.to(x.dtype).to(dtype) for t in (a, b))
            y[i] = y[i] + (scale * (x64[i] @ a.t())) @ b.t()
    return y


@pytest.mark.parametrize("pack", ["eval", "never"])
@pytest.mark.parametrize("adapter", [None, torch.float32], ids=["", "float32 adapters"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "no bias", "Conv1D", "square Conv1D"])
def test_formula(kind, dtype, adapter, pack):
    layer, owner = multi(linear(kind, dtype), dtype=adapter)
    layer.pack_weight = pack
    x = torch.randn(2 * len(ROWS), TOKENS, WIDTH).to(dtype)
    with torch.no_grad(), activate(owner, batch_of(ROWS)), answered_by("segmented_linear_fwd"):
        y = layer(x)
    exact, eager = formula(layer, x, torch.float64), formula(layer, x, dtype)
    assert_within_budget(kind, y, eager, exact)
    base = layer(x)
    assert (y - base).abs().max() > 0.3 * base.abs().max(), "the adapters cannot be seen"
    kept = len(layer._packed)
    assert kept == (NATIVE and pack == "eval" and dtype != torch.float16)


def test_without_a_batch_it_is_the_layer_it_replaced():
    for kind in ("linear", "no bias", "Conv1D", "square Conv1D"):
        module = linear(kind)
        layer, owner = multi(module)
        assert layer.weight is module.weight and layer.bias is getattr(module, "bias", None)
        x = torch.randn(5, 3, WIDTH)
        torch.testing.assert_close(layer(x), module(x))
        with activate(Owner(), batch_of([0])):
            torch.testing.assert_close(layer(x), module(x))
        with activate(owner, batch_of([-1])):
            torch.testing.assert_close(layer(x), module(x))
        with activate(owner, batch_of([0], path="another layer")):
            torch.testing.assert_close(layer(x), module(x))


def test_tables_are_made_once_for_layers_that_agree():
    batch = batch_of(ROWS)
    first = batch.table("proj", (7, 9), torch.device("cpu"))
    assert batch.table("proj", (7, 9), torch.device("cpu")) is first
    assert batch.table("proj", (7,), torch.device("cpu")) is not first
    layers = {"q": (4, 1.0), "k": (4, 1.0), "v": (4, 2.0)}
    batch = Batch([Adapter("a", 0, layers, 0.0)], 2, 8, [0, -1])
    q, k, v = (batch.table(path, (2, 3), torch.device("cpu")) for path in "qkv")
    assert q is k and v is not k
    assert q.slot_of_row.tolist() == [0, 0, 0, -1, -1, -1]
    assert q.logical_row.tolist() == list(range(6))
    assert batch.table("absent", (2, 3), torch.device("cpu")) is None
    numbered = Batch([Adapter("a", 0, layers, 0.0)], 2, 8, [0, -1], examples=[5, 2])
    table = numbered.table("q", (2, 3), torch.device("cpu"))
    assert table.logical_row.tolist() == [15, 16, 17, 6, 7, 8]


def test_a_table_made_under_inference_mode_serves_training():
    layer, owner = multi(linear("linear"))
    batch, x = batch_of([0]), torch.randn(2, WIDTH)
    with activate(owner, batch):
        with torch.inference_mode():
            layer(x)
        layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None
    with torch.inference_mode():
        layer, owner = multi(linear("linear"))
    assert not layer.lora_A.is_inference()


def test_hooks_and_modes_come_along():
    module = linear("linear")
    calls = []
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    layer, _ = multi(module.train())
    layer(torch.randn(2, WIDTH))
    handle.remove()
    layer(torch.randn(2, WIDTH))
    assert calls == [1]
    assert lk.MultiLoRALinear.from_linear(linear("linear").train(), 2, 4).training


def test_the_state_is_the_bases():
    layer, owner = multi(linear("linear"))
    other = linear("linear")
    nn.init.normal_(other.weight)
    assert layer.state_dict().keys() == other.state_dict().keys()
    stacks = layer.lora_A.clone(), layer.lora_B.clone()
    x = torch.randn(len(ROWS), WIDTH)
    with torch.no_grad():
        layer(x)
    layer.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(layer(x), other(x))
        other.load_state_dict(layer.state_dict())
    for stack, before in zip((layer.lora_A, layer.lora_B), stacks, strict=True):
        assert torch.equal(stack.nan_to_num(), before.nan_to_num())
    with pytest.raises(RuntimeError, match='Missing key.*"bias"'):
        layer.load_state_dict({"weight": other.weight})
    twin = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    with activate(owner, batch_of(ROWS)):
        torch.testing.assert_close(twin(x), other(x))
    layer.to(torch.bfloat16)
    assert layer.lora_A.dtype == layer.weight.dtype == torch.bfloat16
    assert {n for n, _ in layer.named_parameters()} == {"weight", "bias", "lora_A", "lora_B"}
    assert not any(p.requires_grad for p in layer.parameters())


def test_wrong_rows():
    layer, owner = multi(linear("linear"))
    with activate(owner, batch_of(ROWS)):
        for shape in ((8, WIDTH), (1, 7, WIDTH), (WIDTH,)):
            with pytest.raises(ValueError, match="which is no multiple of the 7 entries"):
                layer(torch.randn(shape))
    with activate(owner, batch_of(ROWS, by_row=True)):
        assert layer(torch.randn(1, 7, WIDTH)).shape == (1, 7, 70)
        with pytest.raises(ValueError, match="proj: the input has 14 rows, and .* was given 7"):
            layer(torch.randn(14, WIDTH))
    with pytest.raises(TypeError, match="neither nn.Linear nor"):
        lk.MultiLoRALinear.from_linear(nn.Conv1d(2, 2, 1), 2, 4)
    with pytest.raises(TypeError, match="max_norm"):
        lk.MultiLoRAEmbedding.from_embedding(nn.Embedding(5, 3, max_norm=1.0), 2, 4)


def embedding(dtype=torch.float32):
    torch.manual_seed(0)
    owner = Owner()
    layer = lk.MultiLoRAEmbedding.from_embedding(
        nn.Embedding(40, 24, padding_idx=3).to(dtype), SLOTS, MAX_RANK, path="proj", owner=owner
    )
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
        for slot in range(SLOTS):
            rank = LIVE.get(slot, (0, 0.0))[0]
            layer.lora_A[slot, :, rank:] = float("nan")
            layer.lora_B[slot, :, rank:] = float("nan")
    return layer, owner


def looked_up(layer, ids, a, b, dtype):
    y = layer.weight.to(dtype)[ids]
    for i, slot in enumerate(ROWS):
        rank, scale = LIVE.get(slot, (0, 0.0))
        if slot >= 0 and rank:
            part = scale * a[slot, ids[i], :rank].to(dtype)
            y[i] = y[i] + part @ b[slot, :, :rank].to(dtype).t()
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_embedding(dtype):
    layer, owner = embedding(dtype)
    ids = torch.randint(40, (len(ROWS), TOKENS))
    plain = nn.functional.embedding(ids, layer.weight)
    assert torch.equal(layer(ids), plain)
    with torch.no_grad(), activate(owner, batch_of(ROWS)), answered_by("segmented_expand_"):
        y = layer(ids)
    exact, eager = (
        looked_up(layer, ids, layer.lora_A, layer.lora_B, d).detach()
        for d in (torch.float64, dtype)
    )
    assert_within_budget("embedding", y, eager, exact)
    for i, slot in enumerate(ROWS):
        assert torch.equal(y[i], plain[i]) == (slot in (-1, 3))


def test_gradients_of_an_embedding():
    layer, owner = embedding()
    layer.lora_A.requires_grad_()
    layer.lora_B.requires_grad_()
    ids = torch.randint(40, (len(ROWS), TOKENS))
    dy = torch.randn(len(ROWS), TOKENS, 24)
    with activate(owner, batch_of(ROWS)), answered_by("segmented_lora", "segmented_lora_dab"):
        layer(ids).backward(dy)
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    looked_up(layer, ids, a, b, torch.float64).backward(dy.double())
    for found, expected in ((layer.lora_A.grad, a.grad), (layer.lora_B.grad, b.grad)):
        assert not found.isnan().any() and expected.abs().max() > 1
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
