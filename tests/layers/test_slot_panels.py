"""A store's slots in the layout of the CPU's kernels: packed when an adapter comes, and never an
adapter that has gone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels.planning.device import facts

pytestmark = pytest.mark.skipif(
    facts("cpu").native in ("", "baseline"), reason="weights are not packed on this CPU"
)
K, N = 70, 90


def adapter(seed, rank, dtype):
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"base_model.model.0.lora_{name}.weight": torch.randn(shape, generator=generator).to(dtype)
        for name, shape in (("A", (rank, K)), ("B", (N, rank)))
    }
    return state, {"peft_type": "LORA", "r": rank, "target_modules": ["0"]}


def made(dtype=torch.float32, linear=None):
    """A model of one layer, and a store of three slots with five adapters for it."""
    torch.manual_seed(0)
    model = nn.Sequential(linear or nn.Linear(K, N)).to(dtype).eval()
    store = lk.AdapterStore(model, max_adapters=3, max_rank=16)
    for i, rank in enumerate((4, 7, 16, 7, 3)):
        store.load("abcde"[i], *adapter(i, rank, dtype))
    return model, store


def rows(dtype=torch.float32):
    return torch.randn(2, 3, K, generator=torch.Generator().manual_seed(9)).to(dtype)


@torch.no_grad()
def assert_same_bits(model, store, names, x):
    """What packed slots give; the call that packs for itself must give the same bits."""
    layer = model[0]
    with store.batch(names), lk.record_plans() as answers:
        packed = model(x)
    (answer,) = answers
    assert (answer.op, answer.backend, answer.plan) == ("segmented_linear_fwd", "cpu", "native")
    assert len(layer._slot_panels._panels) == 3
    layer.pack_weight = "never"
    with store.batch(names):
        assert torch.equal(model(x), packed)
    layer.pack_weight = "eval"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_adapters_come_and_go(dtype, kind):
    model, store = made(dtype, Conv1D(N, K) if kind == "Conv1D" else None)
    x, found = rows(dtype)[:1].repeat(2, 1, 1), {}
    with torch.no_grad():
        # Five adapters through three slots, of equal and of other ranks, in other orders.
        for names in (["a", "b"], ["c", None], ["d", "b"], ["e", "a"], ["b", "a"], ["d", "e"]):
            with store.batch(names):
                y = model(x)
                again = model(x)
            assert torch.equal(y, again)
            for name, row in zip(names, y, strict=True):
                assert torch.equal(found.setdefault(name, row), row), name
    assert len({tuple(row.flatten()[:4].tolist()) for row in found.values()}) == 6
    for names in (["a", "b"], ["d", "c"]):
        assert_same_bits(model, store, names, x)


@torch.no_grad()
def test_panels_are_what_is_read():
    model, store = made()
    x, layer = rows(), model[0]
    with store.batch(["a", "b"]):
        y = model(x)
        # Leaves no trace, so the panels still hold what was there.
        layer.lora_A.data[:] *= 2
        assert torch.equal(model(x), y)
        layer.drop_packed()
        other = model(x)
        assert not torch.equal(other, y)
        layer.lora_A.mul_(0.5)
        assert torch.equal(model(x), y)
        layer.lora_B.mul_(2)
        assert torch.equal(model(x), other)


@torch.no_grad()
def test_what_happens_to_the_layer():
    model, store = made()
    x, layer = rows(), model[0]
    with store.batch(["a", "b"]):
        y = model(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer._slot_panels))):
            panels = getattr(twin, "_slot_panels", twin)
            assert not panels._panels
        layer.lora_A = nn.Parameter(layer.lora_A * 2, requires_grad=False)
        other = model(x)
        assert not torch.equal(other, y)
        # Neither is the memory of the stacks that were there kept.
        layer.train()
        assert not layer._slot_panels._panels and layer._slot_panels._stacks == (None, None)
        layer.eval()
        torch.testing.assert_close(model(x), other)
    model.bfloat16()
    with store.batch(["a", "b"]):
        torch.testing.assert_close(model(x.bfloat16()).float(), other, rtol=0.1, atol=0.5)
    model.float()
    with torch.inference_mode(), store.batch(["a", "b"]):
        model(x)
    with store.batch(["c", "b"]):
        assert model(x).isfinite().all()


def test_gradients_need_the_stacks_themselves():
    model, store = made()
    x = rows().requires_grad_()
    with store.batch(["a", "b"]):
        model(x).sum().backward()
    assert x.grad.abs().sum() > 0 and not model[0]._slot_panels._panels
