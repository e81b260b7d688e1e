"""Users' own checkpoints around a store's layers, and slots that change before the backward."""

import pytest
import small
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


class Blocks(nn.Module):
    """A model that checkpoints its blocks itself."""

    def __init__(self, how):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.how = how

    def forward(self, x):
        for block in self.blocks:
            x = self.how(block, x).tanh()
        return x


def blocks_store(how):
    torch.manual_seed(0)
    model = Blocks(how).train()
    store = lk.AdapterStore(model, max_adapters=3, max_rank=4)
    for name in "ab":
        store.create(name, r=3, init_lora_weights=False)
    store.requires_grad_()
    x = torch.randn(4, 5, 24, requires_grad=True)
    with store.batch(["a", "b"]):
        y = model(x)
    return store, x, y


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_of_ones_own(use_reentrant):
    store, x, y = blocks_store(lambda block, x: block(x))
    y.sum().backward()
    expected = [p.grad.clone() for p in store.parameters()]

    def own(block, x):
        return checkpoint(block, x, use_reentrant=use_reentrant)

    store, x, y = blocks_store(own)
    says = "blocks.2 is computed again in a backward pass, .* checkpoint\\(store.bind"
    with pytest.raises(RuntimeError, match=says):
        y.sum().backward()
    assert all(p.grad is None for p in store.parameters())
    # Another batch is no better.
    store, x, y = blocks_store(own)
    with pytest.raises(RuntimeError, match=says), store.batch(["b", "a"]):
        y.sum().backward()
    store, x, y = blocks_store(
        lambda block, x: checkpoint(lk.layers.batches.bind(block), x, use_reentrant=use_reentrant)
    )
    with store.batch(["b"]):
        y.sum().backward()
    for parameter, gradient in zip(store.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)
    # Before there was any batch the model is the base, also when it is computed again.
    fresh = lk.AdapterStore(Blocks(own).train(), max_adapters=1, max_rank=2)
    fresh.model(x).sum().backward()


def test_a_recomputation_without_its_adapters_is_an_error():
    store, _, y = blocks_store(
        lambda block, x: checkpoint(lk.layers.batches.bind(block), x, use_reentrant=False)
    )
    store.load("a", store.state_dict("b"), config={"r": 3, "target_modules": r"blocks\.\d"})
    with pytest.raises(RuntimeError, match="adapter 'a' has left its slot"):
        y.sum().backward()


def test_a_slot_that_is_written_between_forward_and_backward_is_an_error():
    store, _, y = blocks_store(lambda block, x: block(x))
    store.load("a", store.state_dict("b"), config={"r": 3, "target_modules": r"blocks\.\d"})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
