"""Who holds an adapter, and for how long: versions, threads, tasks of an event loop."""

import asyncio
import concurrent.futures
import contextvars
import gc
import pickle
import threading
import time

import pytest
import torch
from torch import nn

import lora_kernels as lk

WIDTH = 6
X = torch.eye(WIDTH)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def load(store, name, value):
    """An adapter that adds ``value`` to every output of a row of the identity."""
    tensors = {
        "0.lora_A.weight": torch.ones(1, WIDTH),
        "0.lora_B.weight": torch.full((WIDTH, 1), float(value)),
    }
    store.load(name, tensors, config={"r": 1, "lora_alpha": 1, "target_modules": ["0"]})


class Net(nn.Sequential):
    """A linear layer, which gets slots, on an embedding, which gets them when an adapter has it."""

    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH, bias=False))
        self.word = nn.Embedding.from_pretrained(torch.eye(WIDTH))

    def forward(self, x):
        return self[0](self.word(x.argmax(-1)))


def new_store(slots=2, names="abc", timeout=5.0):
    """A base that gives zeros, and adapters that give 1, 2, 3, ..."""
    model = Net()
    model[0].weight.data.zero_()
    store = lk.AdapterStore(model.eval(), max_adapters=slots, max_rank=2, timeout=timeout)
    for i, name in enumerate(names):
        load(store, name, i + 1)
    return store


def values(store, rows=1):
    """What each row got."""
    return [int(y) for y in store.model(X[:rows, None])[:, 0, 0]]


def in_thread(function, *args):
    found = []

    def run():
        with torch.no_grad():
            try:
                found.append(function(*args))
            except Exception as error:
                found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    return found[0]


# Versions.


def test_a_held_adapter_is_the_version_that_it_was():
    store = new_store()
    with store.hold("a") as old:
        assert old == "a" and isinstance(old, str)
        load(store, "a", 10)
        with store.batch([old, "a", None]):
            assert values(store, 3) == [1, 10, 0]
        # The slot of the old one may be taken: it comes back from the host.
        with store.batch(["b", "c"]):
            assert values(store, 2) == [2, 3]
        with store.hold("a") as middle:
            load(store, "a", 20)
            for names, expected in (
                ([old, middle], [1, 10]),
                ([middle, "a"], [10, 20]),
                (["a", old], [20, 1]),
            ):
                with store.batch(names):
                    assert values(store, 2) == expected
                by_row = store.batch(rows=[n for n in names for _ in range(2)])
                with by_row:
                    assert values(store, 4) == [v for v in expected for _ in range(2)]
    assert store.names == ["a", "b", "c"] and set(store.resident) <= set(store.names)
    with store.batch(["a"]):
        assert values(store) == [20]
    with pytest.raises(ValueError, match="the hold of 'a' was released"):
        store.batch([old])
    with pytest.raises(ValueError, match="of another store"), new_store().hold("a") as other:
        store.batch([other])
    with pytest.raises(TypeError, match="no copies"):
        pickle.dumps(old)


def test_an_adapter_that_is_held_is_not_unloaded():
    store = new_store()
    held = [store.hold("a"), store.hold("a")]
    with pytest.raises(RuntimeError, match="'a' is held by 2 callers or requests"):
        store.unload("a")
    held[0].release()
    held[0].release()
    # Whoever forgets to let go holds it no longer than the object lives.
    held.clear()
    gc.collect()
    store.unload("a")
    with pytest.raises(lk.UnknownAdapterError, match="no adapter 'a'"):
        store.hold("a")


def test_the_slot_of_an_old_version_is_free_when_nobody_holds_it():
    store = new_store(slots=3, names="a")
    old = store.hold("a")
    with store.batch(["a"]):
        load(store, "a", 10)
    assert store._slots.free() == 1
    old.release()
    load(store, "b", 2)
    assert store._slots.free() == 1


def test_held_versions_of_adapters_that_train():
    store = new_store(slots=2, names="a")
    store.requires_grad_()
    with store.hold("a") as old:
        load(store, "a", 10)
        with store.batch([old, "a"]):
            assert values(store, 2) == [1, 10]
        with pytest.raises(RuntimeError, match="no slot is free"):
            load(store, "b", 2)
    load(store, "b", 2)


# Threads.


@pytest.mark.parametrize("executor", [False, True])
def test_a_thread_without_a_batch_is_told_so(executor):
    store = new_store()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()

        def elsewhere(function, *args):
            if executor:
                return pool.submit(in_no_grad, function, *args).exception() or pool.submit(
                    in_no_grad, function, *args
                ).result(20)
            return in_thread(function, *args)

        assert elsewhere(values, store) == [0]
        with store.batch(["a"]):
            error = elsewhere(values, store)
            assert isinstance(error, RuntimeError) and "store.bind(function)" in str(error)
            assert elsewhere(store.bind(values), store) == [1]
            assert values(store) == [1]

            def base():
                with store.batch([None]):
                    return values(store)

            assert elsewhere(base) == [0]
        assert elsewhere(values, store) == [0]


def in_no_grad(function, *args):
    with torch.no_grad():
        return function(*args)


def test_a_thread_that_has_had_a_batch_calls_the_base_as_it_likes():
    store = new_store()

    def both():
        with store.batch(["b"]):
            first = values(store)
        return first, values(store)

    with store.batch(["a"]):
        assert in_thread(both) == ([2], [0])


# Tasks.


def test_tasks_wait_for_slots_while_their_loop_goes_on():
    store = new_store(slots=1)
    order = []

    async def task(i, name):
        async with store.batch([name]):
            order.append(i)
            for _ in range(3):
                await asyncio.sleep(0.002)
                assert values(store) == ["abc".index(name) + 1]

    async def all_of_them():
        await asyncio.gather(*(task(i, "abc"[i % 3]) for i in range(9)))
        assert values(store) == [0]

    asyncio.run(all_of_them())
    assert order == list(range(9))


def test_a_task_that_would_stop_its_loop_is_told_so():
    store = new_store(slots=1)

    async def hold():
        with store.batch(["a"]):
            await asyncio.sleep(0.05)
            assert values(store) == [1]

    async def want():
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="by another task of this thread's event loop") as e:
            store.batch(["b"]).__enter__()
        assert "async with" in str(e.value) and "around this one" not in str(e.value)
        with store.batch(["a"]):
            assert values(store) == [1]

    async def both():
        await asyncio.gather(hold(), want())
        with store.batch(["a"]), pytest.raises(RuntimeError, match="by a batch around this one"):
            store.batch(["b"]).__enter__()
        async with store.batch(["a"]):
            with pytest.raises(RuntimeError, match="by a batch around this one"):
                await store.batch(["b"]).__aenter__()

    asyncio.run(both())


def test_a_task_waits_for_a_thread_and_a_thread_for_a_task():
    store = new_store(slots=1)
    inside, leave = threading.Event(), threading.Event()

    def hold():
        with store.batch(["a"]):
            inside.set()
            assert leave.wait(10)
        with store.batch(["c"]):
            return values(store)

    async def want(pool):
        thread = asyncio.get_running_loop().run_in_executor(pool, in_no_grad, hold)
        while not inside.is_set():
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(enter("b"))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        leave.set()
        assert await waiting == [2]
        assert await thread == [3]

    async def enter(name):
        async with store.batch([name]):
            await asyncio.sleep(0.02)
            return values(store)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asyncio.run(want(pool))


def test_a_task_that_gives_up_leaves_the_queue():
    store = new_store(slots=1, timeout=0.05)

    async def enter(name):
        async with store.batch([name]):
            return values(store)

    async def main():
        async with store.batch(["a"]):
            with pytest.raises(TimeoutError, match="no slots for 'b' within 0.05 seconds"):
                await contextvars.Context().run(asyncio.create_task, enter("b"))
            store.timeout = None
            cancelled = contextvars.Context().run(asyncio.create_task, enter("b"))
            await asyncio.sleep(0.01)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled
        assert not store._slots._queue
        assert await enter("c") == [3]

    asyncio.run(main())
    assert not any(r.users for r in store._slots.residents())


def test_a_task_has_the_batch_in_which_it_was_started_while_that_runs():
    store = new_store()

    async def call(delay=0.0):
        await asyncio.sleep(delay)
        return values(store)

    async def main():
        async with store.batch(["a"]):
            assert await asyncio.create_task(call()) == [1]
            assert await asyncio.to_thread(in_no_grad, values, store) == [1]
            late = asyncio.create_task(call(0.02))
        load(store, "a", 10)
        # Its slot has other values by now.
        with pytest.raises(RuntimeError, match="in which this task was started has ended"):
            await late
        assert values(store) == [0]

    asyncio.run(main())


def test_a_batch_that_is_left_in_another_context():
    # As what a server's dependency yields from: it enters in one context, and leaves in another.
    store = new_store()
    batch = store.batch(["a"])
    contextvars.copy_context().run(batch.__enter__)
    assert store._slots.residents()[-1].users == 1
    batch.__exit__(None, None, None)
    assert not any(r.users for r in store._slots.residents())
    assert values(store) == [0]
    with batch:
        assert values(store) == [1]
        with pytest.raises(RuntimeError, match="runs already"):
            batch.__enter__()
    store.unload("a")


def test_a_batch_that_nobody_has_any_more_frees_its_slots():
    store = new_store(slots=1)
    batch = store.batch(["a"])
    contextvars.copy_context().run(batch.__enter__)
    end = time.monotonic() + 10
    found = []
    waiting = threading.Thread(target=lambda: found.append(in_thread(enter, store, "b")))
    waiting.start()
    del batch
    gc.collect()
    waiting.join(10)
    assert found == [[2]] and time.monotonic() < end


def enter(store, name):
    with store.batch([name]):
        return values(store)


def test_all_names_or_how_many_more():
    store = new_store(names="abcdefghij")
    with pytest.raises(lk.UnknownAdapterError, match="'g', 'h' and 2 more$"):
        store.batch(["x"])
