"""The shrink of several projections in Triton, and what a group launches."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

# Below the skip: nothing of Triton's is imported where it is missing.

from test_kernels import DEVICE, DTYPES, skinny
from test_kernels import pytestmark as pytestmark

from lora_kernels.backends import cuda, vendor
from lora_kernels.kernels import linears
from lora_kernels.spec import reference
from lora_kernels.testing.linear import Case, assert_within_budget, poisoned_memory
from lora_kernels.testing.linears import Projections, arguments, expected

# Two tiles of 16 x 32 and a remainder; ranks that end within a tile of 32.
GROUPS = {
    "q, k, v": ((69, 33, 33), (16,)),
    "one": ((20,), (41,)),
    "ranks that differ": ((40, 5), (3, 70)),
}

VARIANTS = {
    "plain": {},
    "masked": {"dropout_p": 0.3},
    "strided": {"layout": "strided"},
    "transposed": {"layout": "transposed", "dropout_p": 0.2},
    "float32 adapter": {"adapter_dtype": torch.float32},
    "one row": {"m": 1},
    "no rows": {"m": 0},
}


def drawn(group, **changes):
    widths, ranks = GROUPS[group]
    case = replace(Case(37, 0, 75, 0, device=DEVICE), **changes)
    return Projections(case, widths, ranks).draw()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("split", [1, 2])
def test_lora_shrinks(group, variant, dtype, split):
    inputs = drawn(group, dtype=dtype, **VARIANTS[variant])
    given, p = arguments(inputs, "lora_linears_fwd"), inputs[0].case.dropout_p
    with poisoned_memory():
        s = linears.lora_shrinks(
            [given["x"]], given["lora_a"], given["scales"], given["rng"], p, config=skinny(split)
        )
        dy, b = [t.dy for t in inputs], [t.lora_b.t() for t in inputs]
        d = linears.lora_shrinks(dy, b, given["scales"], None, p, config=skinny(split))
    assert s.dtype == d.dtype == reference.tail_dtype(dtype)
    # In the dtype whose errors the budget forgives.
    exact, eager = expected(inputs, torch.float64), expected(inputs, dtype)
    for name, result in (("s", s), ("d", d)):
        assert_within_budget(name, result, eager[name][0], exact[name][0])


class Launches(TorchDispatchMode):
    """What the library is asked for."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counted[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_launches_of_a_group(dropout_p, monkeypatch):
    """One shrink of ours, and no pass over dX besides the products."""
    inputs = drawn("q, k, v", dropout_p=dropout_p)
    kernel, launched = linears._lora_shrinks_kernel, []

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    monkeypatch.setattr(linears, "_lora_shrinks_kernel", Counted())
    options = {"masked": cuda.masked, "shrinks": cuda.shrinks_with(skinny())}
    counted = {}
    for op in ("lora_linears_fwd", "lora_linears_dx"):
        given = arguments(inputs, op)
        with Launches() as mode:
            results = getattr(vendor, op)(**given, **options)
        counted[op] = mode.counted
        for name, result in zip(("y", "s") if "fwd" in op else ("dx", "d"), results, strict=True):
            for j, each in enumerate(result if isinstance(result, list) else [result]):
                exact, eager = (expected(inputs, t)[name][j] for t in (torch.float64, each.dtype))
                assert_within_budget(f"{op} {name}", each, eager, exact)
    assert len(launched) == 2
    fwd, dx = counted["lora_linears_fwd"], counted["lora_linears_dx"]
    products = ("mm", "addmm", "addmm_", "linear")
    assert sum(fwd[op] for op in products) == 6
    assert not fwd["mul_"] and not fwd["mul"]
    if not dropout_p:
        # Three of the base and one of all tails.
        assert sum(dx[op] for op in products) == 4
        assert not dx["add_"] and not dx["add"] and not dx["mul_"]
