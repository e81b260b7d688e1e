"""An interruption at any line of the store: what follows is served as if nothing had happened."""

import asyncio
import gc
import sys
from pathlib import Path

import pytest
import torch
from test_serving_holds import load, new_store, values

import lora_kernels as lk

FILES = {
    str(Path(lk.__file__).parent / file)
    for file in (
        "layers/batches.py",
        *(f"serving/{name}.py" for name in ("store", "running", "slots")),
        *(f"serving/{name}.py" for name in ("slotted_model", "transfers")),
    )
}
assert all(Path(file).is_file() for file in FILES)


class Interrupted(BaseException):
    """As KeyboardInterrupt: no Exception."""


class Interruption:
    """Raises before the ``count``-th line that runs in the store's files."""

    def __init__(self, count):
        self.left, self.at = count, None

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line" and self.at is None:
            self.left -= 1
            if self.left == 0:
                self.at = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                raise Interrupted
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


@pytest.fixture(autouse=True)
def quick_collections():
    gc.freeze()
    yield
    gc.unfreeze()


def batch(store):
    with store.batch(["a", "c", None]):
        assert values(store, 3) == [1, 3, 0]


def nested_batch(store):
    with store.batch(["a"]), store.batch(["b"]):
        assert values(store) == [2]


def async_batch(store):
    async def enter():
        async with store.batch(["c", "a"]):
            assert values(store, 2) == [3, 1]

    asyncio.run(enter())


def bound(store):
    with store.batch(["a"]):
        function = store.bind(values)
    assert function(store) == [1]


def replace(store):
    load(store, "a", 1)


def replace_in_use(store):
    with store.batch(["a"]):
        load(store, "a", 1)


def add(store):
    load(store, "d", 4)


def add_with_new_layers(store):
    tensors = {"word.lora_embedding_A": torch.ones(1, 6)}
    tensors["word.lora_embedding_B"] = torch.zeros(6, 1)
    store.load("e", tensors, config={"r": 1, "lora_alpha": 1, "target_modules": ["word"]})


def unload(store):
    store.unload("b")


def pin(store):
    store.pin("c")
    store.unpin("c")


def hold(store):
    with store.hold("a") as a, store.batch([a]):
        assert values(store) == [1]


def train(store):
    store.requires_grad_()
    store.requires_grad_(False)


def check(store, what):
    """The store is whole, whether or not what was interrupted came about."""
    slots = store._slots
    store.requires_grad_(False)
    assert values(store, 2) == [0, 0]
    assert not slots._queue and not any(r.users or r.versions for r in slots.residents())
    assert slots.free() + len(slots.residents()) == slots.count
    assert set(store.resident) <= set(store.names) and set(store.pinned) <= {"c"}
    for name in store.pinned:
        store.unpin(name)
    expected = {name: i + 1 for i, name in enumerate("abcd")} | {"e": 0}
    assert set(store.names) | {"b", "d", "e"} == set("abcde")
    for one in store.names:
        with store.batch([one, "a", None]):
            assert values(store, 3) == [expected[one], 1, 0], what
    load(store, "a", 7)
    with store.batch(["a"]):
        assert values(store) == [7]
    for name in store.names:
        store.unload(name)
    assert slots.free() == slots.count
    store.close()
    assert not any(hasattr(m, "lora_A") for m in store.model.modules())


@pytest.mark.parametrize(
    "act",
    [
        batch,
        nested_batch,
        async_batch,
        bound,
        replace,
        replace_in_use,
        add,
        add_with_new_layers,
        unload,
        pin,
        hold,
        train,
    ],
)
def test_an_interruption_at_any_line(act):
    with torch.no_grad():
        for count in range(1, 5000):
            store = fresh()
            interruption = Interruption(count)
            try:
                with interruption:
                    act(store)
            except Interrupted:
                pass
            if interruption.at is None:
                break
            if act is async_batch:
                # A task and the error that ends it hold each other.
                gc.collect()
            check(store, interruption.at)
    assert count > 5


def test_closing_can_be_interrupted_and_done_again():
    with torch.no_grad():
        for count in range(1, 5000):
            store = fresh()
            interruption = Interruption(count)
            try:
                with interruption:
                    store.close()
            except Interrupted:
                pass
            store.close()
            assert not any(isinstance(m, lk.MultiLoRALinear) for m in store.model.modules())
            assert store.model[0].weight.requires_grad
            if interruption.at is None:
                break
    assert count > 5


def fresh():
    """Two slots, three adapters."""
    return new_store(timeout=2.0)
