"""Adapters that train in mixed batches: each as if it trained alone, with checkpointing, dropout
and real optimizers; and what is saved of them."""

import contextlib
import functools

import peft
import pytest
import small
import torch
import torch.nn.functional as F
from stores import answered_by, plan_of
from torch import nn

import lora_kernels as lk
from lora_kernels.testing.linear import error_and_budget

NAMES = ["a", "b", None, "a", "c", "b"]
OPERATORS = ("segmented_linear_fwd", "segmented_linear_dx", "segmented_lora_dab")


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Drawn adapters of "a", "b" and "c", by architecture."""

    @functools.cache
    def directory(architecture):
        root = tmp_path_factory.mktemp("adapters")
        for i, name in enumerate("abc"):
            lk.save_adapter(
                small.adapt(architecture, seed=20 + i, r=3 + 4 * i, rank_pattern={}),
                root / name,
            )
        return root

    return directory


# The models' own, which draws by the batch.
UNDROPPED = dict.fromkeys(
    [
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    ],
    0.0,
)


def build(architecture):
    return small.build(architecture, **UNDROPPED)


def new_store(directory, architecture="llama", names="abc", dropout=0.0, double=False):
    """A store whose model is in training mode, as its adapters are."""
    model = build(architecture)
    if double:
        model.double()
    store = lk.AdapterStore(model, max_adapters=4, max_rank=12)
    for name in names:
        store.load(name, directory / name)
        store._adapters[name].host.config.lora_dropout = dropout
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return store.requires_grad_()


def losses(store, names, batch, examples=None, logits=small.logits):
    """The mean cross entropy of each sequence."""
    with store.batch(names, examples=examples):
        y = logits(store.model, batch)
    y = y.view(len(names), -1, y.shape[-1])
    generator = torch.Generator().manual_seed(3)
    classes = torch.randint(y.shape[-1], (6, y.shape[1]), generator=generator)
    rows = range(len(names)) if examples is None else examples
    each = [F.cross_entropy(y[i], classes[row]) for i, row in enumerate(rows)]
    return torch.stack(each)


def gradients_of(store, name):
    """path -> the gradients of A and B of one adapter; everything else must be zero there."""
    found = {}
    resident = store._adapters[name]
    for path, layer in store._layers.items():
        rank = resident.host.layers[path].rank
        da, db = layer.lora_A.grad[resident.slot], layer.lora_B.grad[resident.slot]
        found[path] = da[:rank].clone(), db[:, :rank].clone()
        assert not da[rank:].any() and not db[:, rank:].any()
    return found


def zero_grad(store):
    for parameter in store.parameters():
        parameter.grad = None


def rows_of(name):
    return [i for i, other in enumerate(NAMES) if other == name]


def of_rows(batch, rows):
    return {k: v[rows] for k, v in batch.items()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("architecture", small.FAMILIES)
def test_gradients_are_those_of_training_alone(adapters, architecture, dropout):
    """Alone: the same layers with one adapter, on its rows only, and with the masks that these
    examples have in the mixed batch."""
    directory = adapters(architecture)
    stores = [new_store(directory, architecture, dropout=dropout, double=d) for d in (False, True)]
    batch = small.batch_for(stores[0].model, rows=6)
    mixed = {}
    for store in stores:
        inputs = batch if store is stores[0] else {k: double(v) for k, v in batch.items()}
        torch.manual_seed(7)
        with contextlib.nullcontext() if store is stores[1] else answered_by(*OPERATORS):
            losses(store, NAMES, inputs, examples=range(6)).sum().backward()
        mixed[store] = {name: gradients_of(store, name) for name in "abc"}
        assert all(p.grad is None for n, p in store.model.named_parameters() if "lora" not in n)
    ours, exact = stores
    for name in "abc":
        zero_grad(ours)
        rows = rows_of(name)
        torch.manual_seed(7)
        losses(ours, [name] * len(rows), of_rows(batch, rows), rows).sum().backward()
        alone = gradients_of(ours, name)
        for other in set("abc") - {name}:
            for da, db in gradients_of(ours, other).values():
                assert not da.any() and not db.any()
        for path, pair in mixed[ours][name].items():
            for found, eager, reference in zip(
                pair, alone[path], mixed[exact][name][path], strict=True
            ):
                assert reference.abs().max() > 0
                errors = error_and_budget(found, eager, reference)
                assert all(error <= 4 * budget for error, budget in errors.values()), path
                assert small.relative_difference(eager.double(), reference) < 1e-4


def double(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_layers_gradients_are_alones_bit_for_bit(dropout):
    """Of one layer: x and dY are then the same, and each adapter's sums are over its own rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(72, 56)).train()
    store = lk.AdapterStore(model, max_adapters=4, max_rank=12)
    for i, name in enumerate("abc"):
        store.create(name, r=3 + 4 * i, init_lora_weights=False, lora_dropout=dropout)
    store.requires_grad_()
    x, dy = torch.randn(6, 40, 72), torch.randn(6, 40, 56)

    def step(names, rows):
        zero_grad(store)
        torch.manual_seed(5)
        leaf = x[rows].requires_grad_()
        with store.batch(names, examples=rows), answered_by(*OPERATORS):
            model(leaf).backward(dy[rows])
        return leaf.grad

    step(NAMES, list(range(6)))
    mixed = {name: gradients_of(store, name) for name in "abc"}
    for name in "abc":
        rows = rows_of(name)
        step([name] * len(rows), rows)
        for path, pair in gradients_of(store, name).items():
            for alone, found in zip(pair, mixed[name][path], strict=True):
                if plan_of("segmented_lora_dab") == plan_of("segmented_linear_dx") == "native":
                    assert torch.equal(alone, found)
                assert small.relative_difference(found, alone) < 1e-6
    if dropout:
        # The masks are the examples': with other numbers there are others.
        torch.manual_seed(5)
        zero_grad(store)
        with store.batch(["a", "a"], examples=[1, 2]):
            model(x[[0, 3]]).backward(dy[[0, 3]])
        assert not torch.equal(gradients_of(store, "a")["0"][0], mixed["a"]["0"][0])


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
        functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
        functools.partial(torch.optim.Adagrad, lr=0.01),
    ],
    ids=["SGD", "AdamW", "fused AdamW", "Adagrad"],
)
def test_optimizers_move_each_adapter_as_if_alone(adapters, tmp_path, optimizer):
    directory = adapters("gpt2")

    def train(names, rows, loaded):
        store = new_store(directory, "gpt2", loaded)
        batch = of_rows(small.batch_for(store.model, rows=6), rows)
        steps = optimizer(store.parameters())
        first = None
        for _ in range(4):
            steps.zero_grad()
            # Of each adapter the mean of its own sequences, whoever trains beside it.
            each = losses(store, names, batch, rows)
            total = sum(
                torch.stack([each[i] for i, n in enumerate(names) if n == name]).mean()
                for name in loaded
            )
            total.backward()
            first = first or total.item()
            steps.step()
        assert total.item() < first
        return store

    rows = [i for i, name in enumerate(NAMES) if name is not None]
    together = train([NAMES[i] for i in rows], rows, "abc")
    for name in "abc":
        alone = train([name] * len(rows_of(name)), rows_of(name), name)
        expected, found = alone.state_dict(name), together.state_dict(name)
        start = lk.AdapterStore(small.build("gpt2"), max_adapters=1, max_rank=12)
        start.load(name, directory / name)
        before = start.state_dict(name)
        assert expected.keys() == found.keys() == before.keys()
        for key, tensor in found.items():
            moved = (expected[key] - before[key]).abs().max()
            assert moved > 1e-3
            # Adam divides by the root of small gradients, and rounding with it.
            assert (tensor - expected[key]).abs().max() < 2e-3 * moved, key
    # What was trained is what is saved, and PEFT computes with it what the store does.
    batch = small.batch_for(together.model, rows=1)
    together.model.eval()
    for name in "abc":
        together.save(name, tmp_path / name)
        with torch.no_grad(), together.batch([name]):
            y = small.logits(together.model, batch)
        theirs = peft.PeftModel.from_pretrained(small.build("gpt2"), tmp_path / name)
        with torch.no_grad():
            assert small.relative_difference(y, small.logits(theirs, batch)) < 1e-5
        ours = lk.load_adapter(small.build("gpt2"), tmp_path / name)
        with torch.no_grad():
            assert small.relative_difference(y, small.logits(ours, batch)) < 1e-5


def test_absent_adapters_have_zero_gradients_and_decay(adapters):
    store = new_store(adapters("gpt2"), "gpt2")
    before = {name: store.state_dict(name) for name in "abc"}
    steps = torch.optim.AdamW(store.parameters(), lr=0.01, weight_decay=0.1)
    batch = small.batch_for(store.model, rows=2)
    losses(store, ["a", None], batch).sum().backward()
    for da, db in gradients_of(store, "b").values():
        assert not da.any() and not db.any()
    steps.step()
    for name, same in (("a", False), ("b", False), ("c", False)):
        after = store.state_dict(name)
        assert all(torch.equal(after[k], t) for k, t in before[name].items()) == same
    # Of b nothing but the decay, as the documentation says.
    for key, tensor in store.state_dict("b").items():
        assert torch.allclose(tensor, before["b"][key] * (1 - 0.01 * 0.1), rtol=1e-6, atol=0)


def test_nobody_is_evicted_while_training_and_what_was_trained_survives_eviction(adapters):
    directory = adapters("gpt2")
    store = new_store(directory, "gpt2", "ab")
    store.create("c", r=2)
    store.create("d", r=2)
    with pytest.raises(RuntimeError, match="no slot is free for 'e'"):
        store.create("e", r=2)
    with pytest.raises(RuntimeError, match="no slot is free for 'e'"):
        store.load("e", directory / "c")
    snapshot = small.Snapshot(store.model)
    with pytest.raises(RuntimeError, match="no slot is free for 'e'"):
        # It would be the first with this layer, which is then left as it was.
        store.create("e", r=2, target_modules=["lm_head"])
    snapshot.assert_unchanged()
    assert store.names == list("abcd") == sorted(store.resident)
    steps = torch.optim.SGD(store.parameters(), lr=0.1)
    batch = small.batch_for(store.model, rows=4)
    losses(store, list("abcd"), batch).sum().backward()
    steps.step()
    store.requires_grad_(False)
    assert not any(p.requires_grad for p in store.parameters())
    trained = {name: store.state_dict(name) for name in "abcd"}
    store.load("e", directory / "c")
    for name in "eabcde":
        with store.batch([name]):
            pass
    assert "d" in store.resident
    for name in "eabcd":
        with store.batch([name]):
            pass
    for name, tensors in trained.items():
        found = store.state_dict(name)
        assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())


def test_created_adapters_change_nothing_until_they_train(adapters):
    store = lk.AdapterStore(small.build("llama"), max_adapters=3, max_rank=8)
    store.create("a", r=4, target_modules=["q_proj", "lm_head", "embed_tokens"])
    store.create("b", r=8, use_rslora=True, init_lora_weights="gaussian")
    assert sorted({k.split(".")[-3] for k in store.state_dict("a") if "lora_A" in k}) == [
        "lm_head",
        "q_proj",
    ] or any("lora_embedding_A" in k for k in store.state_dict("a"))
    batch = small.batch_for(store.model)
    with torch.no_grad():
        base = small.logits(store.model, batch)
        with store.batch(["a", "b"]):
            y = small.logits(store.model, batch)
    assert small.relative_difference(y, base) < 1e-5
    with pytest.raises(ValueError, match="there is an adapter 'a' already"):
        store.create("a")
    with pytest.raises(ValueError, match="the rank 9 of"):
        store.create("c", r=9)
    with pytest.raises(ValueError, match="no biases"):
        store.create("c", bias="all")


def test_embeddings_and_heads_train(tmp_path):
    store = lk.AdapterStore(small.build("llama"), max_adapters=2, max_rank=8)
    targets = ["up_proj", "embed_tokens", "lm_head"]
    for i, name in enumerate("ab"):
        store.create(name, r=3 + i, target_modules=targets, init_lora_weights=False)
        store.save(name, tmp_path / name)
    store.requires_grad_()
    store.model.requires_grad_(False)
    for parameter in store.parameters():
        parameter.requires_grad_(True)
    store.model.train()
    batch = small.batch_for(store.model, rows=3)
    losses(store, ["a", None, "b"], batch).sum().backward()
    for i, name in ((0, "a"), (2, "b")):
        theirs = peft.PeftModel.from_pretrained(
            small.build("llama"), tmp_path / name, is_trainable=True
        ).train()
        y = small.logits(theirs, of_rows(batch, [i]))[0]
        generator = torch.Generator().manual_seed(3)
        classes = torch.randint(y.shape[-1], (6, y.shape[0]), generator=generator)
        F.cross_entropy(y, classes[i]).backward()
        slot = store._adapters[name].slot
        for path, layer in store._layers.items():
            if path not in store._adapters[name].host.layers:
                continue
            other = theirs.base_model.model.get_submodule(path)
            rank = store._adapters[name].host.layers[path].rank
            if isinstance(layer, lk.MultiLoRAEmbedding):
                a = other.lora_embedding_A["default"].grad.t()
                b = other.lora_embedding_B["default"].grad
                found = layer.lora_A.grad[slot, :, :rank]
            else:
                a, b = other.lora_A["default"].weight.grad, other.lora_B["default"].weight.grad
                found = layer.lora_A.grad[slot, :rank]
            assert a.abs().max() > 0 and b.abs().max() > 0
            assert small.relative_difference(found, a) < 1e-4, path
            assert small.relative_difference(layer.lora_B.grad[slot, :, :rank], b) < 1e-4, path


def test_one_dropout_for_adapters_that_train_together(adapters):
    store = new_store(adapters("gpt2"), "gpt2", dropout=0.1)
    store._adapters["b"].host.config.lora_dropout = 0.2
    batch = small.batch_for(store.model, rows=2)
    with pytest.raises(ValueError, match="need the same lora_dropout: 'a' has 0.1, 'b' has 0.2"):
        losses(store, ["a", "b"], batch)
    losses(store, ["a", None], batch)
    store.model.eval()
    losses(store, ["a", "b"], batch)


# Checkpointing: computed again with the batch of the forward.


def reference_gradients(directory, architecture, batch, dropout=0.0):
    store = new_store(directory, architecture, dropout=dropout)
    torch.manual_seed(11)
    losses(store, NAMES, batch).sum().backward()
    return {name: gradients_of(store, name) for name in "abc"}


def assert_gradients(store, expected):
    for name in "abc":
        for path, pair in gradients_of(store, name).items():
            for found, reference in zip(pair, expected[name][path], strict=True):
                # Gradients of q, k and v are added in another order where layers are recomputed.
                assert small.relative_difference(found, reference) < 1e-6, (name, path)


@pytest.mark.parametrize("when", ["before the store", "after the store", "inside the batch"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "vit"])
def test_gradient_checkpointing(adapters, architecture, use_reentrant, when):
    directory = adapters(architecture)
    batch = small.batch_for(small.build(architecture), rows=6)
    expected = reference_gradients(directory, architecture, batch, dropout=0.2)

    def enable(model):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    model = build(architecture)
    if when == "before the store":
        enable(model)
    store = lk.AdapterStore(model, max_adapters=4, max_rank=12)
    for name in "abc":
        store.load(name, directory / name)
        store._adapters[name].host.config.lora_dropout = 0.2
    if when == "after the store":
        enable(model)
    model.train().requires_grad_(False)
    store.requires_grad_()
    if use_reentrant and architecture != "vit":
        model.enable_input_require_grads()
    elif use_reentrant:
        # An image's input needs none; its first layer's output does.
        model.vit.embeddings.register_forward_hook(lambda m, a, y: y.requires_grad_())
    recomputed = []
    layer = store._layers[next(p for p in store._layers if "1" in p)]
    layer.register_forward_hook(
        lambda *_: recomputed.append(torch._C._current_graph_task_id() != -1)
    )

    def logits(model, batch):
        if when == "inside the batch":
            enable(model)
        return small.logits(model, batch)

    torch.manual_seed(11)
    total = losses(store, NAMES, batch, logits=logits).sum()
    # The batch has ended; another one runs around the backward, in vain.
    with store.batch(["c"]):
        total.backward()
    assert recomputed == [False, True]
    assert_gradients(store, expected)
    # And the base, checkpointed, stays the base.
    zero_grad(store)
    y = small.logits(model, batch)
    if y.requires_grad:
        y.sum().backward()
    assert all(p.grad is None for p in store.parameters())
