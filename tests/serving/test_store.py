"""``AdapterStore`` on whole models: every row with its own adapter, through generation, embeddings
and heads; what remains of the model around it."""

import contextlib
import copy
import threading

import peft
import pytest
import small
import torch
from stores import Zoo, answered_by
from torch import nn

import lora_kernels as lk


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated(), torch.no_grad():
        yield


# Rows.


@pytest.mark.parametrize("architecture", [*small.FAMILIES, "llama tied", "opt", "clip", "t5"])
def test_every_row_has_its_own_adapter(zoos, architecture):
    zoo = zoos(architecture)
    store = zoo.store()
    batch = small.batch_for(store.model, rows=4)
    names = ["a", None, "c", "b"]
    with store.batch(names), answered_by("segmented_linear_fwd"):
        y = small.logits(store.model, batch)
    if architecture not in ("clip", "t5"):
        zoo.check(y, names, batch)
    else:
        # Logits per image are of all texts; an encoder and a decoder share the batch.
        base = small.logits(zoo.base(), batch)
        assert small.relative_difference(y, base) > 0.01
        with store.batch([None] * 4):
            assert small.relative_difference(small.logits(store.model, batch), base) < 1e-5
    assert torch.equal(small.logits(store.model, batch), small.logits(store.model, batch))


@pytest.mark.parametrize("architecture", small.FAMILIES)
def test_without_a_batch_the_model_is_the_base(zoos, architecture):
    zoo = zoos(architecture)
    store = zoo.store()
    batch = small.batch_for(store.model)
    base = small.logits(zoo.base(), batch)
    assert small.relative_difference(small.logits(store.model, batch), base) < 1e-6
    with store.batch(["a", "b"]):
        assert small.relative_difference(small.logits(store.model, batch), base) > 0.1
    alone = small.logits(store.model, batch)
    with store.batch([None, None]):
        assert torch.equal(small.logits(store.model, batch), alone)


def test_adapters_are_read_to_the_host_whatever_the_default_device_is(zoo):
    store = zoo.store()
    batch, names = small.batch_for(store.model, rows=4), ["a", None, "c", "b"]
    store.unload("a")
    with torch.device("meta"):
        store.load("a", zoo.directory / "a")
    with store.batch(names):
        zoo.check(small.logits(store.model, batch), names, batch)


def test_more_sequences_than_names_repeat_them(zoo):
    store = zoo.store()
    batch = small.batch_for(store.model, rows=6)
    with store.batch(["b", "a"]):
        zoo.check(small.logits(store.model, batch), ["b", "a"], batch)
    with store.batch(["c"]):
        zoo.check(small.logits(store.model, batch), ["c", "c"], batch)


@pytest.mark.parametrize("flat", [False, True])
def test_packed_sequences(zoo, flat):
    store = zoo.store()
    lengths, names = [3, 5, 1, 2], ["a", None, "b", "a"]
    ids = small.batch_for(store.model, rows=4)["input_ids"]
    packed = torch.cat([row[:n] for row, n in zip(ids, lengths, strict=True)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    by_row = [name for name, n in zip(names, lengths, strict=True) for _ in range(n)]
    distinct = [None, "b", "a"]
    contexts = [
        store.batch(names, lengths=lengths),
        store.batch(rows=by_row),
        store.batch(distinct, rows=[distinct.index(name) for name in by_row]),
        store.batch(distinct, rows=torch.tensor([distinct.index(n) if n else -1 for n in by_row])),
    ]
    # Attention over the packed row is block-diagonal where positions begin anew.
    mask = torch.full((11, 11), float("-inf"))
    first = 0
    for n in lengths:
        mask[first : first + n, first : first + n] = torch.full((n, n), float("-inf")).triu(1)
        first += n
    for context in contexts:
        with context:
            y = store.model(
                input_ids=packed, position_ids=positions, attention_mask=mask[None, None]
            ).logits[0]
        first = 0
        for i, (name, n) in enumerate(zip(names, lengths, strict=True)):
            exact = zoo.merged[name](input_ids=ids[i : i + 1, :n]).logits[0]
            assert small.relative_difference(y[first : first + n].double(), exact) < 1e-5
            first += n


def test_nested_batches_and_reused_contexts(zoo):
    store = zoo.store()
    batch = small.batch_for(store.model, rows=2)
    with store.batch(["a", "b"]):
        with store.batch([None, "c"]):
            zoo.check(small.logits(store.model, batch), [None, "c"], batch)
        zoo.check(small.logits(store.model, batch), ["a", "b"], batch)


def test_two_stores_on_two_models(zoos):
    llama, gpt = zoos("llama"), zoos("gpt2")
    one, other = llama.store(), gpt.store()
    batch = small.batch_for(one.model, rows=2)
    with one.batch(["a", "b"]), other.batch(["c", None]):
        llama.check(small.logits(one.model, batch), ["a", "b"], batch)
        gpt.check(small.logits(other.model, batch), ["c", None], batch)


# Generation.


def prompts(rows, padded):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, small.VOCABULARY, (rows, 6), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for i in range(rows):
            ids[i, : i % 3], mask[i, : i % 3] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", small.GENERATING)
def test_generate(zoos, architecture, padded, how):
    zoo = zoos(architecture)
    store = zoo.store()
    names, batch = ["a", None, "b", "a", "c"], prompts(5, padded)
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0} | how
    with store.batch(names), answered_by("segmented_linear_fwd"):
        ids = store.model.generate(**batch, **options)
    each = len(ids) // len(names)
    base = zoo.base()
    different = 0
    for i, name in enumerate(names):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        expected = zoo.merged[name].generate(**one, **options)
        found = ids[i * each : (i + 1) * each]
        assert trimmed(found) == trimmed(expected), name
        plain = base.generate(**one, **options)
        different += trimmed(plain) != trimmed(expected)
    assert different >= 3, "the adapters cannot be seen"


def trimmed(ids):
    """Each row until its end, behind which there is padding of one kind or another."""
    rows = []
    for row in ids.tolist():
        end = row.index(2, 6) + 1 if 2 in row[6:] else len(row)
        rows.append(row[:end])
    return rows


def test_a_generation_in_a_thread_takes_the_batch_along(zoo):
    store = zoo.store()
    batch = small.batch_for(store.model, rows=2)
    found = {}

    def run(key, function):
        with torch.no_grad():
            found[key] = function(store.model, batch)

    with store.batch(["a", "b"]):
        threads = [
            threading.Thread(target=run, args=("bound", store.bind(small.logits))),
            threading.Thread(target=run, args=("plain", small.logits)),
        ]
    for thread in threads:
        thread.start()
        thread.join()
    zoo.check(found["bound"], ["a", "b"], batch)
    zoo.check(found["plain"], [None, None], batch)
    # Bound to no batch it is the base, whatever is active.
    bound = store.bind(small.logits)
    with store.batch(["a", "b"]):
        zoo.check(bound(store.model, batch), [None, None], batch)


# Embeddings and heads.


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "llama tied"])
def test_embeddings_and_heads(architecture, tmp_path):
    base = small.build(architecture)
    word = "wte" if architecture == "gpt2" else "embed_tokens"
    targets = ["c_fc", word] if architecture == "gpt2" else ["up_proj", word, "lm_head"]
    if architecture == "llama tied":
        targets.remove("lm_head")
    theirs = {}
    for i, name in enumerate("ab"):
        adapted = small.peft_model(
            small.build(architecture), r=4 + i, lora_alpha=9, target_modules=targets
        )
        generator = torch.Generator().manual_seed(i)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        # PEFT also writes the base embedding, which is the model's own.
        adapted.save_pretrained(tmp_path / name, save_embedding_layers=name == "a")
        theirs[name] = adapted.double()
    theirs[None] = small.build(architecture).double()
    before = set(dict(base.named_modules()))
    store = lk.AdapterStore(base, max_adapters=2, max_rank=8)
    for name in "ab":
        store.load(name, tmp_path / name)
    assert set(dict(base.named_modules())) == before
    kinds = {type(m) for m in base.modules()}
    assert lk.MultiLoRAEmbedding in kinds
    batch, names = small.batch_for(base, rows=3), ["b", None, "a"]
    with store.batch(names), answered_by("segmented_linear_fwd", "segmented_expand_"):
        y = small.logits(base, batch)
    for i, name in enumerate(names):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        for other in ("a", "b", None):
            exact = small.logits(theirs[other], one)[0]
            difference = small.relative_difference(y[i].double(), exact)
            assert (difference < 1e-5) == (other == name), (name, other, difference)
    store.save("a", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(small.build(architecture), tmp_path / "again")
    one = {k: v[2:] for k, v in batch.items()}
    assert small.relative_difference(y[2].double(), small.logits(again.double(), one)[0]) < 1e-5


def test_explicit_target_modules_close_the_store(zoo, tmp_path):
    store = lk.AdapterStore(zoo.base(), target_modules=["q_proj", "embed_tokens"], max_rank=16)
    kinds = {n: type(m) for n, m in store.model.named_modules() if "lora" in repr(type(m)).lower()}
    assert {n.split(".")[-1] for n in kinds} == {"q_proj", "embed_tokens"}
    with pytest.raises(ValueError, match="is not among the store's target_modules"):
        store.load("a", zoo.directory / "a")
    with pytest.raises(ValueError, match="names no layer"):
        store.create("a", target_modules=["lm_head"])
    assert not len(store)
    alone = lk.AdapterStore(zoo.base(), target_modules=["embed_tokens"])
    assert [type(m) for m in alone.model.modules()].count(lk.MultiLoRALinear) == 0


# The model around it.


@pytest.mark.parametrize("architecture", small.FAMILIES)
def test_closing_puts_everything_back(zoos, architecture):
    zoo = zoos(architecture)
    model = zoo.base()
    model.requires_grad_(True)
    before = small.Snapshot(model)
    batch = small.batch_for(model)
    y = small.logits(model, batch)
    store = zoo.store(model)
    assert not any(m.weight.requires_grad for m in model.modules() if type(m) is lk.MultiLoRALinear)
    with store.batch(["a"]):
        small.logits(model, batch)
    store.close()
    before.assert_unchanged()
    assert torch.equal(small.logits(model, batch), y)
    zoo.store(model)


@pytest.mark.parametrize("architecture", small.FAMILIES)
def test_the_state_dict_is_the_bases(zoos, architecture):
    zoo = zoos(architecture)
    base = zoo.base()
    store = zoo.store()
    found = store.model.state_dict()
    assert found.keys() == base.state_dict().keys()
    other = small.build(architecture, seed=9)
    store.model.load_state_dict(other.state_dict())
    batch = small.batch_for(base)
    difference = small.relative_difference(
        small.logits(store.model, batch), small.logits(other, batch)
    )
    assert difference < 1e-5
    base.load_state_dict(found)


def test_copies_of_the_model_are_base_models(zoo):
    store = zoo.store()
    batch = small.batch_for(store.model, rows=2)
    twin = copy.deepcopy(store.model)
    with store.batch(["a", "b"]):
        assert torch.equal(small.logits(twin, batch), small.logits(twin, batch))
        zoo.check(small.logits(twin, batch), [None, None], batch)
        zoo.check(small.logits(store.model, batch), ["a", "b"], batch)


def test_stores_refuse_what_has_adapters_and_the_other_way_round(zoo):
    store = zoo.store()
    for call in (lk.AdapterStore, lk.apply_lora):
        with pytest.raises(ValueError, match="has an AdapterStore already"):
            call(store.model)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        lk.AdapterStore(small.adapt("llama"))
    with pytest.raises(ValueError, match="max_rank must be"):
        lk.AdapterStore(zoo.base(), max_rank=0)
    with pytest.raises(ValueError, match="max_adapters must be"):
        lk.AdapterStore(zoo.base(), max_adapters=True)
    with pytest.raises(ValueError, match="leaves no layer to adapt"):
        lk.AdapterStore(zoo.base(), target_modules=["no_such"])


def test_experts_have_no_slots():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            return self.experts[0](self.proj(x))

    store = lk.AdapterStore(Experts())
    assert [type(m) for m in store.model.modules()].count(lk.MultiLoRALinear) == 1
    tensors = {
        "experts.0.lora_A.weight": torch.ones(1, 8),
        "experts.0.lora_B.weight": torch.ones(8, 1),
    }
    with pytest.raises(ValueError, match="chosen by a router"):
        store.load("a", tensors, config={"r": 1, "target_modules": ["experts.0"]})
    with pytest.raises(ValueError, match="chosen by a router"):
        lk.AdapterStore(Experts(), target_modules=["experts.0"])


def test_compiled_models_ask_for_the_batch_at_every_call(zoo):
    store = zoo.store()
    torch.compiler.reset()
    compiled = torch.compile(store.model, backend="eager")
    batch = small.batch_for(store.model, rows=2)
    for names in (["a", "b"], ["b", None], ["c", "a"], [None, None]):
        with contextlib.nullcontext() if names == [None, None] else store.batch(names):
            zoo.check(small.logits(compiled, batch), names, batch)


@pytest.mark.gpu
def test_on_a_gpu_copies_wait_for_batches_and_batches_for_copies(tmp_path):
    zoo = Zoo("gpt2", tmp_path, count=6)
    store = zoo.store(zoo.base().cuda(), max_adapters=2)
    batch = small.batch_for(store.model, rows=2)
    on_gpu = {k: v.cuda() for k, v in batch.items()}
    found = []
    order = [("a", "b"), ("c", "d"), ("e", "f"), ("a", "f"), ("b", "c"), (None, "e")] * 5
    for names in order:
        with store.batch(list(names)):
            found.append(small.logits(store.model, on_gpu))
    for names, y in zip(order, found, strict=True):
        zoo.check(y.cpu(), list(names), batch)
