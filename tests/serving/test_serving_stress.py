"""The store under four threads, against a dict; and its bookkeeping of slots by itself."""

import gc
import random
import threading
import time
import weakref

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.serving.slots import Resident, Slots

THREADS, OPERATIONS, LIMIT_S = 4, 1000, 45
WIDTH, SLOTS = 24, 5
NAMES = [f"adapter {i}" for i in range(9)]


class Stress:
    """Operations drawn at random. ``model`` says what every name means at any time: a version of an
    adapter, whose weights are the version's own.

    Batches and replacements of one name overlap, so a batch may see the version that was settled
    before it entered, and any that was begun until it had entered.
    """

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).eval()
        self.weights = [(m.weight.double(), m.bias.double()) for m in (self.net[0], self.net[2])]
        self.store = lk.AdapterStore(self.net, max_adapters=SLOTS, max_rank=8, timeout=LIMIT_S)
        # name -> its versions (None: not loaded), the last of them current or being loaded; and
        # the place of the last one whose load has ended.
        self.versions = {name: [None] for name in NAMES}
        self.settled = dict.fromkeys(NAMES, 0)
        self.lock = threading.Lock()
        # Of a name's loads only one runs at a time, so that their order is known.
        self.writing = {name: threading.Lock() for name in NAMES}
        self.counted = dict.fromkeys(["batch", "load", "replace", "unload", "pin", "refused"], 0)
        self.errors = []
        self.hosts = []

    @staticmethod
    def adapter(version):
        generator = torch.Generator().manual_seed(version)
        rank = 1 + version % 8
        tensors = {}
        for path in ("0", "2"):
            if path == "2" and version % 3 == 0:
                continue
            tensors[f"{path}.lora_A.weight"] = torch.randn(rank, WIDTH, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(WIDTH, rank, generator=generator) / rank
        targets = ["0", "2"] if len(tensors) == 4 else ["0"]
        return tensors, {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets}

    def expected(self, x, version):
        tensors = {} if version is None else self.adapter(version)[0]
        for i, path in enumerate(("0", "2")):
            w, b = self.weights[i]
            y = x @ w.t() + b
            if f"{path}.lora_A.weight" in tensors:
                a, b = (tensors[f"{path}.lora_{c}.weight"].double() for c in "AB")
                y = y + 2 * (x @ a.t()) @ b.t()
            x = y.tanh() if i == 0 else y
        return x

    def count(self, what):
        with self.lock:
            self.counted[what] += 1

    def run(self, draw, operations):
        try:
            for _ in range(operations):
                draw.choices([self.batch, self.load, self.unload, self.pin], [6, 3, 1, 1])[0](draw)
        except BaseException as error:
            self.errors.append(error)

    def batch(self, draw):
        with self.lock:
            loaded = [name for name in NAMES if self.versions[name][-1] is not None]
        # At most what two pins leave room for.
        chosen = draw.sample(loaded, min(len(loaded), draw.randint(0, 3))) + [None]
        names = draw.choices(chosen, k=draw.randint(1, 6))
        before = {name: self.settled[name] for name in names if name is not None}
        x = torch.randn(2 * len(names), 3, WIDTH)
        try:
            with self.store.batch(names), torch.no_grad():
                after = {name: list(self.versions[name]) for name in before}
                for _ in range(draw.randint(1, 3)):
                    y = self.net(x)
                    if draw.random() < 0.3:
                        time.sleep(0.0005)
        except lk.UnknownAdapterError:
            # Somebody unloaded it meanwhile.
            return self.count("refused")
        for i, name in enumerate(names):
            possible = [None] if name is None else after[name][before[name] :]
            rows = x[2 * i : 2 * i + 2].double()
            found = [
                v
                for v in possible
                if (v is not None or name is None)
                and torch.allclose(y[2 * i : 2 * i + 2].double(), self.expected(rows, v), atol=1e-4)
            ]
            assert found, f"a wrong row: {name} as none of {possible}"
        self.count("batch")

    def settle(self, name, *version):
        with self.lock:
            self.versions[name] += version
            self.settled[name] = len(self.versions[name]) - 1

    def load(self, draw):
        name, version = draw.choice(NAMES), draw.randrange(10**6)
        tensors, config = self.adapter(version)
        with self.writing[name]:
            if draw.random() < 0.2:
                tensors["0.lora_A.weight"] = tensors["0.lora_A.weight"][:, :-1]
                with pytest.raises(ValueError, match="lora_A.weight is"):
                    self.store.load(name, tensors, config=config)
                return self.count("refused")
            with self.lock:
                known = self.versions[name][-1] is not None
                self.versions[name].append(version)
            try:
                self.store.load(name, tensors, config=config)
            except RuntimeError as error:
                # Pinned, in use, and all slots taken: the predecessor stays.
                assert "successor must have a slot" in str(error)
                self.settle(name, self.versions[name][-2])
                return self.count("refused")
            self.settle(name)
            self.hosts.append(weakref.ref(self.store._adapters[name].host))
        self.count("replace" if known else "load")

    def unload(self, draw):
        name = draw.choice(NAMES)
        with self.writing[name]:
            known = self.versions[name][-1] is not None
            try:
                self.store.unload(name)
            except lk.UnknownAdapterError:
                assert not known
                return self.count("refused")
            except RuntimeError as error:
                assert "in use" in str(error) or "pinned" in str(error)
                return self.count("refused")
            assert known
            self.settle(name, None)
        self.count("unload")

    def pin(self, draw):
        # Two names at most, so that a batch of three finds room among five slots.
        name = draw.choice(NAMES[:2])
        with self.writing[name]:
            known = self.versions[name][-1] is not None
            try:
                self.store.pin(name)
                if draw.random() < 0.7:
                    self.store.unpin(name)
            except lk.UnknownAdapterError:
                assert not known
                return self.count("refused")
        self.count("pin")


@pytest.fixture
def one_thread_each():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread_each")
@pytest.mark.parametrize("seed", range(2))
def test_random_operations_from_four_threads(seed):
    stress = Stress(seed)
    threads = [
        threading.Thread(
            target=stress.run,
            args=(random.Random(f"{seed} {i}"), OPERATIONS // THREADS),
            daemon=True,
        )
        for i in range(THREADS)
    ]
    end = time.monotonic() + LIMIT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if stress.errors:
        raise stress.errors[0]
    counted = stress.counted
    assert sum(counted.values()) == OPERATIONS
    assert counted["batch"] > 300 and counted["replace"] > 50 and counted["unload"] > 10, counted

    store, slots = stress.store, stress.store._slots
    current = {name: v[-1] for name, v in stress.versions.items() if v[-1] is not None}
    assert set(store.names) == set(current)
    # Nothing is left of the batches: no slot in use, nobody waiting, no old version in memory.
    assert not slots._queue
    assert all(r.users == 0 and slots.is_named(r) for r in slots.residents())
    assert set(store.resident) <= set(current)
    gc.collect()
    assert sum(host() is not None for host in stress.hosts) == len(current)
    for name in store.names:
        store.unpin(name)
        store.unload(name)
    gc.collect()
    assert not any(host() is not None for host in stress.hosts)
    assert slots.free() == SLOTS and not len(store)


# The bookkeeping.


class Recorded:
    def __init__(self):
        self.calls = []

    def fill(self, resident, slot):
        self.calls.append(("fill", resident.name, slot))

    def write_back(self, resident):
        self.calls.append(("back", resident.name, resident.slot))


def new_slots(count, names):
    copies = Recorded()
    slots = Slots(count, copies)
    residents = {name: Resident(name, None) for name in names}
    slots.named.update(residents)
    return slots, residents, copies.calls


def use(slots, *residents, timeout=5):
    return slots.holding(lambda: residents, timeout)


def test_least_recently_used_goes_first_and_a_batchs_own_never():
    slots, r, calls = new_slots(3, "abcde")
    for name in "abc":
        with use(slots, r[name]):
            pass
    with use(slots, r["a"]):
        pass
    with use(slots, r["d"], r["c"]):
        # b was the oldest: c, used before a, is of the batch itself.
        assert [r[n].slot for n in "abcd"] == [0, None, 2, 1]
    with use(slots, r["a"]), use(slots, r["e"], r["d"]):
        assert [r[n].slot for n in "acde"] == [0, None, 1, 2]
    assert calls == [("fill", *c) for c in (("a", 0), ("b", 1), ("c", 2), ("d", 1), ("e", 2))]


def test_all_or_nothing():
    slots, r, calls = new_slots(2, "abcd")
    with use(slots, r["a"]):
        says = "needs 2 more of the store's 2 slots, of which 1"
        with pytest.raises(RuntimeError, match=says), use(slots, r["c"], r["d"]):
            pass
        assert r["c"].slot is r["d"].slot is None
    assert calls == [("fill", "a", 0)]


def test_first_come_first_served():
    slots, r, _ = new_slots(2, "abcde")
    order, inside, leave = [], threading.Event(), threading.Event()

    def hold():
        with use(slots, r["a"]):
            inside.set()
            leave.wait(10)

    def want(*names):
        with use(slots, *(r[n] for n in names)):
            order.append(names)

    threads = [threading.Thread(target=hold)]
    threads[0].start()
    inside.wait(10)
    # The first needs both slots; the second one would fit now, and must not pass it for ever.
    for names in (("b", "c"), ("d",)):
        threads.append(threading.Thread(target=want, args=names))
        threads[-1].start()
        end = time.monotonic() + 10
        while len(slots._queue) < len(threads) - 1 and time.monotonic() < end:
            time.sleep(0.001)
    assert order == [] and len(slots._queue) == 2
    leave.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert order == [("b", "c"), ("d",)]


def test_a_nested_batch_does_not_wait_behind_one_that_waits_for_it():
    slots, r, _ = new_slots(2, "abc")
    waiting = threading.Thread(target=lambda: use(slots, r["b"], r["c"]).__enter__())
    with use(slots, r["a"]):
        waiting.start()
        end = time.monotonic() + 10
        while not slots._queue and time.monotonic() < end:
            time.sleep(0.001)
        with use(slots, r["b"], timeout=1):
            pass
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_replaced_adapters_slot_is_free_when_its_batches_have_ended():
    slots, r, calls = new_slots(2, "a")
    successor = Resident("a", None)
    with use(slots, r["a"]), slots.lock:
        slots.enter(successor)
        assert (r["a"].slot, successor.slot, slots.free()) == (0, 1, 0)
    assert (r["a"].slot, successor.slot, slots.free()) == (None, 1, 1)
    assert slots.residents() == [successor] and not successor.users


def test_trained_values_are_written_back_once():
    slots, r, calls = new_slots(1, "ab")
    with use(slots, r["a"]):
        pass
    slots.hold_all(True)
    with pytest.raises(RuntimeError, match="no adapter is evicted"), use(slots, r["b"]):
        pass
    slots.hold_all(False)
    with use(slots, r["b"]):
        pass
    with use(slots, r["a"]):
        pass
    assert [c[:2] for c in calls] == [
        ("fill", "a"),
        ("back", "a"),
        ("fill", "b"),
        ("fill", "a"),
    ]
