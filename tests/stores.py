"""Adapters on disk for the models of ``small.py``, with their merged models; and who answered."""

import contextlib

import small
import torch

import lora_kernels as lk
from lora_kernels.planning import config
from lora_kernels.planning.device import facts

NATIVE = facts("cpu").native not in ("", "baseline")


def plan_of(op):
    """Who must answer a float32 call of ``op`` on this machine."""
    return "native" if NATIVE and op not in getattr(config, "_NOT_NATIVE", ()) else "reference"


@contextlib.contextmanager
def answered_by(*ops):
    """Inside, each of the operators is called, and each by the kernel that there is for it."""
    with lk.record_plans() as answers:
        yield
    found = {(answer.op, answer.plan) for answer in answers}
    assert {op for op, _ in found} >= set(ops), found
    if NATIVE:
        assert {(op, plan) for op, plan in found if plan != plan_of(op)} == set()


class Zoo:
    """Adapters called a, b, c, ... of one architecture, of different ranks, scales and layers."""

    def __init__(self, architecture, directory, count=3, **changes):
        self.architecture, self.directory, self.changes = architecture, directory, changes
        self.merged = {None: self.base()}
        for i in range(count):
            name = "abcdefghijkl"[i]
            targets = self.some_layers() if i % 3 == 1 else None
            adapted = small.adapt(architecture, seed=10 + i, r=3 + 4 * i, target_modules=targets)
            lk.save_adapter(adapted, directory / name)
            self.merged[name] = small.merged_by_hand(self.base(), adapted).double()

    def base(self):
        return small.build(self.architecture, **self.changes)

    def some_layers(self):
        """Every second linear layer."""
        return list(lk.lora_report(lk.apply_lora(self.base())).adapted)[::2]

    def store(self, model=None, **options):
        store = lk.AdapterStore(
            self.base() if model is None else model,
            **({"max_adapters": 3, "max_rank": 16} | options),
        )
        for name in self.merged:
            if name is not None:
                store.load(name, self.directory / name)
        return store

    def check(self, y, names, batch):
        """Every row of the logits ``y`` is that of its own merged model, and not of the others."""
        each = len(y) // len(names)
        for i, row in enumerate(y):
            name = names[i // each]
            for other in {name, names[(i // each + 1) % len(names)]}:
                inputs = {k: double(v[i : i + 1]) for k, v in batch.items()}
                exact = small.logits(self.merged[other], inputs)[0].detach()
                difference = small.relative_difference(row.double(), exact)
                assert (difference < 1e-5) == (other == name), (i, name, other, difference)


def double(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def state(store):
    """All that a refused call must leave alone."""
    slots = [p.detach().clone() for p in store.parameters()]
    return store.names, store.resident, store.pinned, slots, small.Snapshot(store.model)


def assert_state(store, before):
    names, resident, pinned, slots, snapshot = before
    assert (store.names, store.resident, store.pinned) == (names, resident, pinned)
    for found, expected in zip(store.parameters(), slots, strict=True):
        assert torch.equal(found, expected)
    snapshot.assert_unchanged()
