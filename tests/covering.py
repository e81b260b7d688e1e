"""Covering sets instead of full products.

A test with three or more parameters that were multiplied out runs for a subset of the product in
which every pair of values still occurs. ``pytest --whole`` (``make test-all``) runs the product. A
case that is a dataclass counts with its fields. Published lists and what is no product lose nothing
by it, or are marked ``whole``.
"""

import dataclasses
import itertools
import random

# Fewer than this are not worth a choice.
_FEW = 8


def values_of(item):
    """name -> value, as text, of a test's parameters."""
    values = {}
    for name, value in item.callspec.params.items():
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                values[f"{name}.{field.name}"] = repr(getattr(value, field.name))
        else:
            values[name] = repr(value)
    return values


def covering(rows, seed):
    """Indices of some of ``rows`` (name -> value each) that have every pair of values that occurs
    in one of them; which ones is drawn."""
    bits = {}
    masks = [
        sum(
            1 << bits.setdefault(pair, len(bits))
            for pair in itertools.combinations(sorted(row.items()), 2)
        )
        for row in rows
    ]
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    chosen, missing = [], (1 << len(bits)) - 1
    while missing:
        best = max(order, key=lambda i: (masks[i] & missing).bit_count())
        chosen.append(best)
        missing &= ~masks[best]
    return chosen


def is_product(rows):
    names = {name for row in rows for name in row}
    return len(rows) > _FEW and sum(len({row.get(n) for row in rows}) > 1 for n in names) > 2


def left_out(items, seed):
    """Those of ``items`` that their test does not need to see every pair of values."""
    tests = {}
    for item in items:
        if hasattr(item, "callspec") and "whole" not in item.keywords:
            tests.setdefault((item.parent.nodeid, item.originalname), []).append(item)
    dropped = set()
    for same in tests.values():
        rows = [values_of(item) for item in same]
        if is_product(rows):
            chosen = set(covering(rows, seed))
            dropped.update(item for i, item in enumerate(same) if i not in chosen)
    return dropped
