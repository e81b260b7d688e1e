"""``AdapterStore``'s adapters: loading and replacing them, slots and eviction, refused calls."""

import copy
import threading

import peft
import pytest
import small
import torch
from stores import Zoo, assert_state, state

import lora_kernels as lk


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated(), torch.no_grad():
        yield


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
    batch = small.batch_for(store.model, rows=2)
    short = {key.removeprefix("base_model.model."): t for key, t in tensors.items()}
    for source, form in ((tensors, config), (short, ours), (tensors, config.to_dict())):
        store.load("a", source, config=form)
        with store.batch(["a", None]):
            zoo.check(small.logits(store.model, batch), ["a", None], batch)
    with pytest.raises(TypeError, match="needs config="):
        store.load("b", tensors)
    with pytest.raises(TypeError, match="config= is for state dicts"):
        store.load("b", zoo.directory / "b", config=ours)
    assert store.names == ["a"]


def test_rslora_and_what_the_file_owns(zoo, tmp_path):
    adapted = small.adapt("llama", use_rslora=True, r=9)
    lk.save_adapter(adapted, tmp_path)
    store = lk.AdapterStore(zoo.base(), max_adapters=1, max_rank=9)
    store.load("rs", tmp_path)
    # The host's copies are its own: nothing of the directory is needed any more.
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    batch = small.batch_for(store.model)
    with store.batch(["rs"]):
        y = small.logits(store.model, batch)
    exact = small.logits(small.merged_by_hand(zoo.base(), adapted).double(), batch)
    assert small.relative_difference(y.double(), exact) < 1e-5


def test_a_state_dict_that_changes_later_is_no_matter(zoo):
    theirs = peft.PeftModel.from_pretrained(zoo.base(), zoo.directory / "a")
    tensors = peft.get_peft_model_state_dict(theirs)
    store = lk.AdapterStore(zoo.base(), max_adapters=1, max_rank=16)
    store.load("c", zoo.directory / "c")
    store.load("a", tensors, config=theirs.peft_config["default"])
    assert store.resident == ["c"]
    for tensor in tensors.values():
        tensor.fill_(float("nan"))
    batch = small.batch_for(store.model, rows=1)
    with store.batch(["a"]):
        y = small.logits(store.model, batch)
    zoo.check(torch.cat([y, y]), ["a"], {k: torch.cat([v, v]) for k, v in batch.items()})


def test_half_precision_base(zoo):
    model = zoo.base().to(torch.bfloat16)
    store = zoo.store(model)
    assert all(p.dtype == torch.bfloat16 for p in store.parameters())
    wide = zoo.store(zoo.base().to(torch.bfloat16), dtype=torch.float32)
    assert all(p.dtype == torch.float32 for p in wide.parameters())
    batch, names = small.batch_for(model, rows=2), ["a", "c"]
    for s in (store, wide):
        with s.batch(names):
            y = small.logits(s.model, batch).float()
        for i, name in enumerate(names):
            one = {k: v[i : i + 1] for k, v in batch.items()}
            merged = small.logits(zoo.merged[name], one)[0].float()
            eager = small.logits(copy.deepcopy(zoo.merged[name]).to(torch.bfloat16), one)[0]
            lost = (eager.float() - merged).abs().max()
            assert (y[i] - merged).abs().max() <= 2 * lost + 0.01 * merged.abs().max()


def test_eviction_reloads_what_is_named(zoos, tmp_path):
    zoo = Zoo("gpt2", tmp_path, count=4)
    store = zoo.store(max_adapters=2)
    assert store.names == list("abcd") and store.resident == ["a", "b"]
    batch = small.batch_for(store.model, rows=2)
    for names in (["a", "d"], ["c", "d"], ["a", "b"], ["d", "c"], [None, "d"], ["a", "d"]):
        with store.batch(names):
            zoo.check(small.logits(store.model, batch), names, batch)
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
        zoo.check(small.logits(store.model, batch), ["c", "a"], batch)
    assert store.pinned == ["a"]


def test_replacing_in_place_and_while_a_batch_runs(zoo):
    store = zoo.store(max_adapters=3)
    batch = small.batch_for(store.model, rows=2)
    stacks = [p.data_ptr() for p in store.parameters()]
    store.load("a", zoo.directory / "c")
    assert store.resident == ["a", "b", "c"]
    with store.batch(["a", "b"]):
        zoo.check(small.logits(store.model, batch), ["c", "b"], batch)
    store.unload("c")
    with store.batch(["a", "b"]):
        # The batch keeps what it began with; the next one has the successor.
        store.load("a", zoo.directory / "b")
        zoo.check(small.logits(store.model, batch), ["c", "b"], batch)
        with store.batch(["a", "b"]):
            zoo.check(small.logits(store.model, batch), ["b", "b"], batch)
        # No slot is left for another successor, which waits with the host.
        store.load("a", zoo.directory / "a")
        zoo.check(small.logits(store.model, batch), ["c", "b"], batch)
    with store.batch(["a", "b"]):
        zoo.check(small.logits(store.model, batch), ["a", "b"], batch)
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
    batch = small.batch_for(store.model, rows=2)
    inside, leave, found = threading.Event(), threading.Event(), []

    def hold():
        with store.batch(["a", "b"]):
            inside.set()
            assert leave.wait(20)

    def wait():
        with torch.no_grad(), store.batch(["c", None]):
            found.append(small.logits(store.model, batch))

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
        zoo.check(small.logits(store.model, batch), ["c", "b"], batch)


# Refused calls: a clear error, nothing changed, the next batch right.


def truncated(zoo, tmp_path):
    lk.save_adapter(small.adapt("llama", r=5), tmp_path / "bad")
    path = tmp_path / "bad" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return tmp_path / "bad"


def of_width(zoo, tmp_path):
    config = small.transformers.LlamaConfig(**(small.DECODER | {"hidden_size": 56}))
    other = small.transformers.LlamaForCausalLM(config)
    lk.save_adapter(lk.apply_lora(other, r=2, target_modules=["q_proj"]), tmp_path / "wide")
    return tmp_path / "wide"


def of_rank(zoo, tmp_path):
    lk.save_adapter(small.adapt("llama", r=17), tmp_path / "rank")
    return tmp_path / "rank"


def of_more_layers(zoo, tmp_path):
    config = small.DECODER | {"num_hidden_layers": 3}
    other = small.transformers.LlamaForCausalLM(small.transformers.LlamaConfig(**config))
    lk.save_adapter(lk.apply_lora(other, r=2, target_modules=["q_proj"]), tmp_path / "more")
    return tmp_path / "more"


def of_fewer_layers(zoo, tmp_path):
    tensors = peft.get_peft_model_state_dict(
        peft.PeftModel.from_pretrained(zoo.base(), zoo.directory / "a")
    )
    folder = tmp_path / "fewer"
    lk.save_adapter(small.adapt("llama", r=5), folder)
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
        (of_width, ValueError, r"lora_A.weight is \[2, 56\], the model's layer wants \[2, 48\]"),
        (of_rank, ValueError, "the rank 17 of .* is above the store's max_rank=16"),
        (of_more_layers, ValueError, r"the model has no layer 'model.layers.2.self_attn.q_proj'"),
        (of_fewer_layers, ValueError, "has no model.layers.1.*lora_A.weight"),
        (with_a_head, ValueError, "holds what the model has no place for, or with other values"),
        (nothing, FileNotFoundError, "there is no adapter directory"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_failed_load_changes_nothing(zoo, tmp_path, make, error, says, name):
    store = zoo.store(max_adapters=4)
    source = make(zoo, tmp_path)
    batch = small.batch_for(store.model, rows=3)
    with store.batch(["a", "b", None]):
        before = state(store)
        with pytest.raises(error, match=says):
            store.load(name, source)
        assert_state(store, before)
        zoo.check(small.logits(store.model, batch), ["a", "b", None], batch)
    with store.batch(["a", None, "c"]):
        zoo.check(small.logits(store.model, batch), ["a", None, "c"], batch)


def test_a_copy_that_fails_leaves_the_predecessor(zoo, monkeypatch):
    store = zoo.store(max_adapters=3)
    names, batch = ["a", "b"], small.batch_for(store.model, rows=2)
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
        zoo.check(small.logits(store.model, batch), names, batch)


def test_wrong_batches(zoo):
    store = zoo.store()
    batch = small.batch_for(store.model, rows=4)

    def wrong(error, says, *args, called_with=4, **kwargs):
        before = state(store)
        inputs = {k: v[:called_with] for k, v in batch.items()}
        with pytest.raises(error, match=says), store.batch(*args, **kwargs):
            small.logits(store.model, inputs)
        assert_state_but_for_order(store, before)
        with store.batch(["a", "b", None, "c"]):
            zoo.check(small.logits(store.model, batch), ["a", "b", None, "c"], batch)

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
    batch = small.batch_for(store.model, rows=6)
    with pytest.raises(ValueError, match="no multiple of the 11"), store.batch(["a"] * 11):
        small.logits(store.model, batch)


def test_unloading_pinned_running_and_unknown_adapters(zoo):
    store = zoo.store()
    batch = small.batch_for(store.model, rows=2)
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
        zoo.check(small.logits(store.model, batch), ["a", None], batch)
    store.unpin("b")
    store.unload("b")
    store.unload("a")
    assert store.names == store.resident == ["c"]
    with store.batch(["c", None]):
        zoo.check(small.logits(store.model, batch), ["c", None], batch)
    for call in (store.pin, store.unpin, store.unload):
        with pytest.raises(lk.UnknownAdapterError):
            call("a")


def test_a_batch_that_raises_lets_go(zoo):
    store = zoo.store()
    with pytest.raises(ZeroDivisionError), store.batch(["a", "b"]):
        raise ZeroDivisionError
    store.unload("a")
    assert not store._slots._queue
