"""``AdapterStore`` on whole models: every row with its own adapter, through generation, eviction,
replacement and refused calls."""

import contextlib
import copy
import threading

import models
import peft
import pytest
import torch
from stores import Zoo, answered_by, assert_state, state
from torch import nn

import lora_kernels as lk


@pytest.fixture(autouse=True)
def isolated():
    with models.isolated(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    found = {}

    def zoo(architecture, **changes):
        key = architecture, *changes.items()
        if key not in found:
            with models.isolated():
                directory = tmp_path_factory.mktemp(architecture.replace(" ", "_"))
                found[key] = Zoo(architecture, directory, **changes)
        return found[key]

    return zoo


@pytest.fixture
def zoo(zoos):
    return zoos("llama")


# Rows.


@pytest.mark.parametrize("architecture", [*models.FAMILIES, "llama tied", "opt", "clip", "t5"])
def test_every_row_has_its_own_adapter(zoos, architecture):
    zoo = zoos(architecture)
    store = zoo.store()
    batch = models.batch_for(store.model, rows=4)
    names = ["a", None, "c", "b"]
    with store.batch(names), answered_by("segmented_linear_fwd"):
        y = models.logits(store.model, batch)
    if architecture not in ("clip", "t5"):
        zoo.check(y, names, batch)
    else:
        # Logits per image are of all texts; an encoder and a decoder share the batch.
        base = models.logits(zoo.base(), batch)
        assert models.relative_difference(y, base) > 0.01
        with store.batch([None] * 4):
            assert models.relative_difference(models.logits(store.model, batch), base) < 1e-5
    assert torch.equal(models.logits(store.model, batch), models.logits(store.model, batch))


@pytest.mark.parametrize("architecture", models.FAMILIES)
def test_without_a_batch_the_model_is_the_base(zoos, architecture):
    zoo = zoos(architecture)
    store = zoo.store()
    batch = models.batch_for(store.model)
    base = models.logits(zoo.base(), batch)
    assert models.relative_difference(models.logits(store.model, batch), base) < 1e-6
    with store.batch(["a", "b"]):
        assert models.relative_difference(models.logits(store.model, batch), base) > 0.1
    alone = models.logits(store.model, batch)
    with store.batch([None, None]):
        assert torch.equal(models.logits(store.model, batch), alone)


def test_adapters_are_read_to_the_host_whatever_the_default_device_is(zoo):
    store = zoo.store()
    batch, names = models.batch_for(store.model, rows=4), ["a", None, "c", "b"]
    store.unload("a")
    with torch.device("meta"):
        store.load("a", zoo.directory / "a")
    with store.batch(names):
        zoo.check(models.logits(store.model, batch), names, batch)


def test_more_sequences_than_names_repeat_them(zoo):
    store = zoo.store()
    batch = models.batch_for(store.model, rows=6)
    with store.batch(["b", "a"]):
        zoo.check(models.logits(store.model, batch), ["b", "a"], batch)
    with store.batch(["c"]):
        zoo.check(models.logits(store.model, batch), ["c", "c"], batch)


@pytest.mark.parametrize("flat", [False, True])
def test_packed_sequences(zoo, flat):
    store = zoo.store()
    lengths, names = [3, 5, 1, 2], ["a", None, "b", "a"]
    ids = models.batch_for(store.model, rows=4)["input_ids"]
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
            assert models.relative_difference(y[first : first + n].double(), exact) < 1e-5
            first += n


def test_nested_batches_and_reused_contexts(zoo):
    store = zoo.store()
    batch = models.batch_for(store.model, rows=2)
    with store.batch(["a", "b"]):
        with store.batch([None, "c"]):
            zoo.check(models.logits(store.model, batch), [None, "c"], batch)
        zoo.check(models.logits(store.model, batch), ["a", "b"], batch)


def test_two_stores_on_two_models(zoos):
    llama, gpt = zoos("llama"), zoos("gpt2")
    one, other = llama.store(), gpt.store()
    batch = models.batch_for(one.model, rows=2)
    with one.batch(["a", "b"]), other.batch(["c", None]):
        llama.check(models.logits(one.model, batch), ["a", "b"], batch)
        gpt.check(models.logits(other.model, batch), ["c", None], batch)


# Generation.


def prompts(rows, padded):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, models.VOCABULARY, (rows, 6), generator=generator)
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
@pytest.mark.parametrize("architecture", models.GENERATING)
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
    batch = models.batch_for(store.model, rows=2)
    found = {}

    def run(key, function):
        with torch.no_grad():
            found[key] = function(store.model, batch)

    with store.batch(["a", "b"]):
        threads = [
            threading.Thread(target=run, args=("bound", store.bind(models.logits))),
            threading.Thread(target=run, args=("plain", models.logits)),
        ]
    for thread in threads:
        thread.start()
        thread.join()
    zoo.check(found["bound"], ["a", "b"], batch)
    zoo.check(found["plain"], [None, None], batch)
    # Bound to no batch it is the base, whatever is active.
    bound = store.bind(models.logits)
    with store.batch(["a", "b"]):
        zoo.check(bound(store.model, batch), [None, None], batch)


# Embeddings and heads.


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "llama tied"])
def test_embeddings_and_heads(architecture, tmp_path):
    base = models.build(architecture)
    word = "wte" if architecture == "gpt2" else "embed_tokens"
    targets = ["c_fc", word] if architecture == "gpt2" else ["up_proj", word, "lm_head"]
    if architecture == "llama tied":
        targets.remove("lm_head")
    theirs = {}
    for i, name in enumerate("ab"):
        adapted = models.peft_model(
            models.build(architecture), r=4 + i, lora_alpha=9, target_modules=targets
        )
        generator = torch.Generator().manual_seed(i)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        # PEFT also writes the base embedding, which is the model's own.
        adapted.save_pretrained(tmp_path / name, save_embedding_layers=name == "a")
        theirs[name] = adapted.double()
    theirs[None] = models.build(architecture).double()
    before = set(dict(base.named_modules()))
    store = lk.AdapterStore(base, max_adapters=2, max_rank=8)
    for name in "ab":
        store.load(name, tmp_path / name)
    assert set(dict(base.named_modules())) == before
    kinds = {type(m) for m in base.modules()}
    assert lk.MultiLoRAEmbedding in kinds
    batch, names = models.batch_for(base, rows=3), ["b", None, "a"]
    with store.batch(names), answered_by("segmented_linear_fwd", "segmented_expand_"):
        y = models.logits(base, batch)
    for i, name in enumerate(names):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        for other in ("a", "b", None):
            exact = models.logits(theirs[other], one)[0]
            difference = models.relative_difference(y[i].double(), exact)
            assert (difference < 1e-5) == (other == name), (name, other, difference)
    store.save("a", tmp_path / "again")
    again = peft.PeftModel.from_pretrained(models.build(architecture), tmp_path / "again")
    one = {k: v[2:] for k, v in batch.items()}
    assert models.relative_difference(y[2].double(), models.logits(again.double(), one)[0]) < 1e-5


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


# Loading.


def test_a_state_dict_and_configs_of_every_kind(zoo):
    theirs = peft.PeftModel.from_pretrained(zoo.base(), zoo.directory / "a")
    tensors = peft.get_peft_model_state_dict(theirs)
    config = theirs.peft_config["default"]
    ours = lk.LoRAConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=sorted(config.target_modules),
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
    )
    store = lk.AdapterStore(zoo.base(), max_adapters=3, max_rank=16)
    batch = models.batch_for(store.model, rows=2)
    short = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    for source, form in ((tensors, config), (short, ours), (tensors, config.to_dict())):
        store.load("a", source, config=form)
        with store.batch(["a", None]):
            zoo.check(models.logits(store.model, batch), ["a", None], batch)
    with pytest.raises(TypeError, match="needs config="):
        store.load("b", tensors)
    with pytest.raises(TypeError, match="config= is for state dicts"):
        store.load("b", zoo.directory / "b", config=ours)
    assert store.names == ["a"]


def test_rslora_and_what_the_file_owns(zoo, tmp_path):
    adapted = models.adapt("llama", use_rslora=True, r=9)
    lk.save_adapter(adapted, tmp_path)
    store = lk.AdapterStore(zoo.base(), max_adapters=1, max_rank=9)
    store.load("rs", tmp_path)
    # The host's copies are its own: nothing of the directory is needed any more.
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    batch = models.batch_for(store.model)
    with store.batch(["rs"]):
        y = models.logits(store.model, batch)
    exact = models.logits(models.merged_by_hand(zoo.base(), adapted).double(), batch)
    assert models.relative_difference(y.double(), exact) < 1e-5


def test_a_state_dict_that_changes_later_is_no_matter(zoo):
    theirs = peft.PeftModel.from_pretrained(zoo.base(), zoo.directory / "a")
    tensors = peft.get_peft_model_state_dict(theirs)
    store = lk.AdapterStore(zoo.base(), max_adapters=1, max_rank=16)
    store.load("c", zoo.directory / "c")
    store.load("a", tensors, config=theirs.peft_config["default"])
    assert store.resident == ["c"]
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    batch = models.batch_for(store.model, rows=1)
    with store.batch(["a"]):
        y = models.logits(store.model, batch)
    zoo.check(torch.cat([y, y]), ["a"], {k: torch.cat([v, v]) for k, v in batch.items()})


def test_half_precision_base(zoo):
    model = zoo.base().to(torch.bfloat16)
    store = zoo.store(model)
    assert all(p.dtype == torch.bfloat16 for p in store.parameters())
    wide = zoo.store(zoo.base().to(torch.bfloat16), dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in wide.parameters())
    batch, names = models.batch_for(model, rows=2), ["a", "c"]
    for s in (store, wide):
        with s.batch(names):
            y = models.logits(s.model, batch).float()
        for i, name in enumerate(names):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            merged = models.logits(zoo.merged[name], one)[0].float()
            eager = models.logits(copy.deepcopy(zoo.merged[name]).to(torch.bfloat16), one)[0]
            lost = (eager.float() - merged).abs().max()
            assert (y[i] - merged).abs().max() <= 2 * lost + 0.01 * merged.abs().max()


def test_eviction_reloads_what_is_named(zoos, tmp_path):
    zoo = Zoo("gpt2", tmp_path, count=4)
    store = zoo.store(max_adapters=2)
    assert store.names == list("abcd") and store.resident == ["a", "b"]
    batch = models.batch_for(store.model, rows=2)
    for names in (["a", "d"], ["c", "d"], ["a", "b"], ["d", "c"], [None, "d"], ["a", "d"]):
        with store.batch(names):
            zoo.check(models.logits(store.model, batch), names, batch)
        assert set(store.resident) >= set(names) - {None}
    # Least recently used first: a came in for c, not for d, which was used after it.
    assert sorted(store.resident) == ["a", "d"]
    store.pin("a")
    with store.batch(["b"]):
        assert set(store.resident) == {"a", "b"}
    store.pin("b")
    with (
        pytest.raises(RuntimeError, match="of which 0 can become free: 'b', 'a' pinned"),
        store.batch(["c"]),
    ):
        pass
    too_many = store.batch(["a", "b", "c"])
    with pytest.raises(RuntimeError, match="uses 3 adapters, and the store has 2 slots"), too_many:
        pass
    store.unpin("b")
    with store.batch(["c", "a"]):
        zoo.check(models.logits(store.model, batch), ["c", "a"], batch)
    assert store.pinned == ["a"]


def test_replacing_in_place_and_while_a_batch_runs(zoo):
    store = zoo.store(max_adapters=3)
    batch = models.batch_for(store.model, rows=2)
    stacks = [p.data_ptr() for p in store.parameters()]
    store.load("a", zoo.directory / "c")
    assert store.resident == ["a", "b", "c"]
    with store.batch(["a", "b"]):
        zoo.check(models.logits(store.model, batch), ["c", "b"], batch)
    store.unload("c")
    with store.batch(["a", "b"]):
        # The batch keeps what it began with; the next one has the successor.
        store.load("a", zoo.directory / "b")
        zoo.check(models.logits(store.model, batch), ["c", "b"], batch)
        with store.batch(["a", "b"]):
            zoo.check(models.logits(store.model, batch), ["b", "b"], batch)
        # No slot is left for another successor, which waits with the host.
        store.load("a", zoo.directory / "a")
        zoo.check(models.logits(store.model, batch), ["c", "b"], batch)
    with store.batch(["a", "b"]):
        zoo.check(models.logits(store.model, batch), ["a", "b"], batch)
    assert [p.data_ptr() for p in store.parameters()] == stacks
    assert sorted(store.names) == ["a", "b"]


def test_a_pinned_adapters_successor_is_pinned(zoo):
    store = zoo.store(max_adapters=3)
    store.pin("a")
    with store.batch(["a", "b", "c"]):
        before = state(store)
        with pytest.raises(RuntimeError, match="successor must have a slot"):
            store.load("a", zoo.directory / "c")
        assert_state(store, before)
    store.unload("c")
    with store.batch(["a", "b"]):
        store.load("a", zoo.directory / "c")
    assert store.pinned == ["a"] and sorted(store.resident) == ["a", "b"]


def test_a_batch_waits_for_slots(zoo):
    store = zoo.store(max_adapters=2, timeout=20)
    batch = models.batch_for(store.model, rows=2)
    inside, leave, found = threading.Event(), threading.Event(), []

    def hold():
        with store.batch(["a", "b"]):
            inside.set()
            assert leave.wait(20)

    def wait():
        with torch.no_grad(), store.batch(["c", None]):
            found.append(models.logits(store.model, batch))

    holder, waiter = threading.Thread(target=hold), threading.Thread(target=wait)
    holder.start()
    assert inside.wait(20)
    waiter.start()
    waiter.join(0.2)
    assert waiter.is_alive() and not found
    leave.set()
    for thread in (holder, waiter):
        thread.join(20)
        assert not thread.is_alive()
    zoo.check(found[0], ["c", None], batch)
    # With its own slots around it nobody can help.
    with (
        store.batch(["a", "b"]),
        pytest.raises(RuntimeError, match="in use by a batch around this one"),
        store.batch(["c"]),
    ):
        pass
    store.timeout = 0.1
    leave.clear()
    inside.clear()
    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(20)
    says = "no slots for 'c' within 0.1 seconds"
    with pytest.raises(TimeoutError, match=says), store.batch(["c"]):
        pass
    leave.set()
    holder.join(20)
    with store.batch(["c", "b"]):
        zoo.check(models.logits(store.model, batch), ["c", "b"], batch)


# Refused calls: a clear error, nothing changed, the next batch right.


def truncated(zoo, tmp_path):
    lk.save_adapter(models.adapt("llama", r=5), tmp_path / "bad")
    path = tmp_path / "bad" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return tmp_path / "bad"


def of_width(zoo, tmp_path):
    config = models.transformers.LlamaConfig(**(models.DECODER | {"hidden_size": 56}))
    other = models.transformers.LlamaForCausalLM(config)
    lk.save_adapter(lk.apply_lora(other, r=2, target_modules=["q_proj"]), tmp_path / "wide")
    return tmp_path / "wide"


def of_rank(zoo, tmp_path):
    lk.save_adapter(models.adapt("llama", r=17), tmp_path / "rank")
    return tmp_path / "rank"


def of_more_layers(zoo, tmp_path):
    config = models.DECODER | {"num_hidden_layers": 3}
    other = models.transformers.LlamaForCausalLM(models.transformers.LlamaConfig(**config))
    lk.save_adapter(lk.apply_lora(other, r=2, target_modules=["q_proj"]), tmp_path / "more")
    return tmp_path / "more"


def of_fewer_layers(zoo, tmp_path):
    tensors = peft.get_peft_model_state_dict(
        peft.PeftModel.from_pretrained(zoo.base(), zoo.directory / "a")
    )
    folder = tmp_path / "fewer"
    lk.save_adapter(models.adapt("llama", r=5), folder)
    from safetensors.torch import save_file

    kept = {k: v.contiguous() for k, v in tensors.items() if ".layers.1." not in k}
    save_file(kept, folder / "adapter_model.safetensors")
    return folder


def with_a_head(zoo, tmp_path):
    adapted = lk.apply_lora(zoo.base(), r=2, modules_to_save=["lm_head"])
    adapted.lm_head.weight.add_(1)
    lk.save_adapter(adapted, tmp_path / "head")
    return tmp_path / "head"


def nothing(zoo, tmp_path):
    return tmp_path / "nothing"


@pytest.mark.parametrize("name", ["a", "d"])
@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (truncated, ValueError, "is not a readable safetensors file"),
        (of_width, ValueError, r"lora_A.weight is \[2, 56\], the model's layer .* want \[2, 48\]"),
        (of_rank, ValueError, "the rank 17 of .* is above the store's max_rank=16"),
        (of_more_layers, ValueError, r"the model has no layer 'model.layers.2.self_attn.q_proj'"),
        (of_fewer_layers, ValueError, "has no lora_A and lora_B for model.layers.1"),
        (with_a_head, ValueError, "holds what the model has no place for, or with other values"),
        (nothing, FileNotFoundError, "there is no adapter directory"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_failed_load_changes_nothing(zoo, tmp_path, make, error, says, name):
    store = zoo.store(max_adapters=4)
    source = make(zoo, tmp_path)
    batch = models.batch_for(store.model, rows=3)
    with store.batch(["a", "b", None]):
        before = state(store)
        with pytest.raises(error, match=says):
            store.load(name, source)
        assert_state(store, before)
        zoo.check(models.logits(store.model, batch), ["a", "b", None], batch)
    with store.batch(["a", None, "c"]):
        zoo.check(models.logits(store.model, batch), ["a", None, "c"], batch)


def test_a_copy_that_fails_leaves_the_predecessor(zoo, monkeypatch):
    store = zoo.store(max_adapters=3)
    names, batch = ["a", "b"], models.batch_for(store.model, rows=2)
    fill = type(store._transfers).fill
    calls = []

    def failing(self, resident, slot):
        calls.append(slot)
        if len(calls) == 1:
            self._model.layers["model.layers.0.mlp.up_proj"].lora_A.fill_(7.0)
            raise MemoryError("no memory")
        fill(self, resident, slot)

    monkeypatch.setattr(type(store._transfers), "fill", failing)
    with pytest.raises(MemoryError):
        store.load("a", zoo.directory / "c")
    assert store.names == ["a", "b", "c"] and "a" not in store.resident
    # What was half written is written again when it is named; b's own slot is damaged by the test.
    store.load("b", zoo.directory / "b")
    with store.batch(names):
        zoo.check(models.logits(store.model, batch), names, batch)


def test_wrong_batches(zoo):
    store = zoo.store()
    batch = models.batch_for(store.model, rows=4)

    def wrong(error, says, *args, called_with=4, **kwargs):
        before = state(store)
        inputs = {k: v[:called_with] for k, v in batch.items()}
        with pytest.raises(error, match=says), store.batch(*args, **kwargs):
            models.logits(store.model, inputs)
        assert_state_but_for_order(store, before)
        with store.batch(["a", "b", None, "c"]):
            zoo.check(models.logits(store.model, batch), ["a", "b", None, "c"], batch)

    wrong(lk.UnknownAdapterError, "there is no adapter 'x'; there are 'a', 'b', 'c'", ["a", "x"])
    wrong(KeyError, "there is no adapter", ["a", "x"])
    wrong(ValueError, "there is no adapter", ["a", "x"])
    wrong(ValueError, "a batch of 4, which is no multiple of the 3 entries", ["a", "b", None])
    wrong(ValueError, "a batch of 4, which is no multiple of the 8 entries", ["a"] * 8)
    wrong(ValueError, "a batch of 3, which is no multiple of the 2", ["a", "b"], called_with=3)
    wrong(ValueError, "a batch of 4, which is no multiple of the 0", [])
    wrong(TypeError, "must be a list of names", "abc")
    wrong(TypeError, "must be a list of names", ["a", 1])
    wrong(TypeError, "needs names")
    wrong(ValueError, "lengths must be", ["a", "b"], lengths=[3])
    wrong(ValueError, "lengths must be", ["a", "b"], lengths=[3, -1])
    wrong(ValueError, "the input has 44 rows, and store.batch was given 43", ["a"], lengths=[43])
    wrong(ValueError, "rows has 2, and there are 2 names", ["a", "b"], rows=[2] * 44)
    wrong(TypeError, "indices", ["a", "b"], rows=[0.5] * 44)
    wrong(TypeError, "give one of them", ["a"], rows=[0], lengths=[1])
    wrong(ValueError, "examples must be", ["a", "b"], examples=[1])
    wrong(TypeError, "not packed rows", ["a"], lengths=[44], examples=[1])


def assert_state_but_for_order(store, before):
    names, resident, pinned, slots, snapshot = before
    assert_state(store, (names, store.resident, pinned, slots, snapshot))
    assert sorted(store.resident) == sorted(resident)


def test_a_wrong_length_is_told_where_tokens_are_flattened(zoos):
    # OPT's inner layers see rows [B * T, K], of which 6 * 11 would be a multiple of 33.
    store = zoos("opt").store()
    batch = models.batch_for(store.model, rows=6)
    with pytest.raises(ValueError, match="no multiple of the 11"), store.batch(["a"] * 11):
        models.logits(store.model, batch)


def test_unloading_pinned_running_and_unknown_adapters(zoo):
    store = zoo.store()
    batch = models.batch_for(store.model, rows=2)
    store.pin("b")
    with store.batch(["a", None]):
        before = state(store)
        for name, error, says in (
            ("a", RuntimeError, "in use by 1 running batches"),
            ("b", RuntimeError, "'b' is pinned"),
            ("x", lk.UnknownAdapterError, "no adapter 'x'"),
        ):
            with pytest.raises(error, match=says):
                store.unload(name)
        with pytest.raises(RuntimeError, match="batches are running with 'a'"):
            store.close()
        assert_state(store, before)
        zoo.check(models.logits(store.model, batch), ["a", None], batch)
    store.unpin("b")
    store.unload("b")
    store.unload("a")
    assert store.names == store.resident == ["c"]
    with store.batch(["c", None]):
        zoo.check(models.logits(store.model, batch), ["c", None], batch)
    for call in (store.pin, store.unpin, store.unload):
        with pytest.raises(lk.UnknownAdapterError):
            call("a")


def test_a_batch_that_raises_lets_go(zoo):
    store = zoo.store()
    with pytest.raises(ZeroDivisionError), store.batch(["a", "b"]):
        raise ZeroDivisionError
    store.unload("a")
    assert not store._slots._queue


# The model around it.


@pytest.mark.parametrize("architecture", models.FAMILIES)
def test_closing_puts_everything_back(zoos, architecture):
    zoo = zoos(architecture)
    model = zoo.base()
    model.requires_grad_(True)
    before = models.Snapshot(model)
    batch = models.batch_for(model)
    y = models.logits(model, batch)
    store = zoo.store(model)
    assert not any(m.weight.requires_grad for m in model.modules() if type(m) is lk.MultiLoRALinear)
    with store.batch(["a"]):
        models.logits(model, batch)
    store.close()
    before.assert_unchanged()
    assert torch.equal(models.logits(model, batch), y)
    zoo.store(model)


@pytest.mark.parametrize("architecture", models.FAMILIES)
def test_the_state_dict_is_the_bases(zoos, architecture):
    zoo = zoos(architecture)
    base = zoo.base()
    store = zoo.store()
    found = store.model.state_dict()
    assert found.keys() == base.state_dict().keys()
    other = models.build(architecture, seed=9)
    store.model.load_state_dict(other.state_dict())
    batch = models.batch_for(base)
    difference = models.relative_difference(
        models.logits(store.model, batch), models.logits(other, batch)
    )
    assert difference < 1e-5
    base.load_state_dict(found)


def test_copies_of_the_model_are_base_models(zoo):
    store = zoo.store()
    batch = models.batch_for(store.model, rows=2)
    twin = copy.deepcopy(store.model)
    with store.batch(["a", "b"]):
        assert torch.equal(models.logits(twin, batch), models.logits(twin, batch))
        zoo.check(models.logits(twin, batch), [None, None], batch)
        zoo.check(models.logits(store.model, batch), ["a", "b"], batch)


def test_stores_refuse_what_has_adapters_and_the_other_way_round(zoo):
    store = zoo.store()
    for call in (lk.AdapterStore, lk.apply_lora):
        with pytest.raises(ValueError, match="has an AdapterStore already"):
            call(store.model)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        lk.AdapterStore(models.adapt("llama"))
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
    batch = models.batch_for(store.model, rows=2)
    for names in (["a", "b"], ["b", None], ["c", "a"], [None, None]):
        with contextlib.nullcontext() if names == [None, None] else store.batch(names):
            zoo.check(models.logits(compiled, batch), names, batch)


@pytest.mark.gpu
def test_on_a_gpu_copies_wait_for_batches_and_batches_for_copies(tmp_path):
    zoo = Zoo("gpt2", tmp_path, count=6)
    store = zoo.store(zoo.base().cuda(), max_adapters=2)
    batch = models.batch_for(store.model, rows=2)
    on_gpu = {k: v.cuda() for k, v in batch.items()}
    found = []
    order = [("a", "b"), ("c", "d"), ("e", "f"), ("a", "f"), ("b", "c"), (None, "e")] * 5
    for names in order:
        with store.batch(list(names)):
            found.append(models.logits(store.model, on_gpu))
    for names, y in zip(order, found, strict=True):
        zoo.check(y.cpu(), list(names), batch)
