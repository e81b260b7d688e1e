"""Calls whose results fit float16 and whose S, D, A or B do not: the cases and the check that the
tests of every backend share.

The budget is that of an eager computation without any error: twice float16's eps. Results that do
not fit are not looked at.
"""

from dataclasses import dataclass, replace

import torch

from lora_kernels.planning.answers import record_plans
from lora_kernels.testing.linear import RESULTS, Case, _dab_of_given, naive, poisoned_memory
from lora_kernels.testing.segmented import SegmentedCase
from lora_kernels.testing.segmented import naive as naive_segmented

FLOAT16 = torch.float16
# Nearer to the end a result within the budget may be beyond it.
LARGEST = 0.99 * torch.finfo(FLOAT16).max


@dataclass(frozen=True)
class Sizes:
    """What drawn operands, which make results of about 1, are multiplied by."""

    x: float = 1.0
    a: float = 1.0
    b: float = 1.0
    dy: float = 1.0
    scale: float = 0.75
    adapter_dtype: torch.dtype = torch.float32


# name -> sizes. A is drawn as 1/sqrt(K) and B as 1/(scale sqrt(r)), so that S is about
# x * a * scale, the tail of Y x * a * b, D dy * b and the tail of dX dy * a * b.
SIZES = {
    "S above float16": Sizes(x=100, a=100, b=1e-4, scale=16.0),
    "float16 adapters": Sizes(x=300, a=100, b=1e-2, scale=64.0, adapter_dtype=FLOAT16),
    "a scale of 10000": Sizes(x=30, a=1, scale=1e4),
    "a scale of 10000, tiny A": Sizes(a=1e-8, b=1e8, scale=1e4),
    "A of 1e5, B of 1e-9": Sizes(a=1e6, b=5e-9, dy=1e3),
    "A of 1e-9, B of 1e5": Sizes(a=1e-8, b=5e5),
    "S below float16": Sizes(x=1e-3, a=1e-4, b=1e6, dy=1e-3),
    "a scaled loss, large B": Sizes(a=1e-4, b=100, dy=2e4),
    "a scaled loss, small B": Sizes(b=1e-3, dy=2e4),
}


def scaled(tensor, factor):
    """In the dtype it has; of float16 nothing leaves the range."""
    return (tensor.double() * factor).clamp(-6e4, 6e4).to(tensor.dtype)


@dataclass(frozen=True)
class RangeCase(Case):
    sizes: Sizes = Sizes()

    def draw(self):
        sizes = self.sizes
        own = replace(self, scale=sizes.scale, adapter_dtype=torch.float32)
        inputs = Case.draw(own)
        return replace(
            inputs,
            x=scaled(inputs.x, sizes.x),
            dy=scaled(inputs.dy, sizes.dy),
            lora_a=(inputs.lora_a * sizes.a).to(sizes.adapter_dtype),
            lora_b=(inputs.lora_b * sizes.b).to(sizes.adapter_dtype),
        )


@dataclass(frozen=True)
class SegmentedRangeCase(SegmentedCase):
    sizes: Sizes = Sizes()

    def draw(self):
        sizes = self.sizes
        inputs = SegmentedCase.draw(replace(self, adapter_dtype=torch.float32))
        scales = inputs.seg.scale_of_slot.mul_(sizes.scale)
        assert scales.dtype == torch.float32
        return replace(
            inputs,
            x=scaled(inputs.x, sizes.x),
            dy=scaled(inputs.dy, sizes.dy),
            lora_a=[(t * sizes.a).to(sizes.adapter_dtype) for t in inputs.lora_a],
            lora_b=[(t * (sizes.b / sizes.scale)).to(sizes.adapter_dtype) for t in inputs.lora_b],
        )


def assert_fits(name, ours, exact, terms=None):
    """``ours`` is finite and right wherever the exact result fits float16 (or is of a wider
    dtype). Where it fits only because larger terms cancel, what counts is their size, ``terms``:
    the result of operands without signs."""
    assert ours.shape == exact.shape, f"{name}: {ours.shape}, expected {exact.shape}"
    seen = exact.abs() <= LARGEST if ours.dtype == FLOAT16 else torch.ones_like(exact).bool()
    error = torch.where(seen, ours.double() - exact, 0)
    size = torch.where(seen, exact, 0).abs().max() if exact.numel() else 0.0
    unit = 2 * torch.finfo(FLOAT16).eps
    budget = torch.full_like(exact, unit * size)
    if terms is not None:
        budget = torch.where(terms > LARGEST, unit * terms, budget)
    # Written so that a NaN fails.
    over = ~(error.abs() <= budget)
    assert not over.any(), f"{name}: error {error[over][0]:.3e} over {budget[over][0]:.3e}"


def check_range(op, run, case, *, backend=None):
    """``testing.check`` for these cases."""
    inputs = case.draw()
    arguments = inputs.arguments(op)
    exact = naive(inputs, torch.float64)
    if op == "lora_linear_dab":
        exact |= _dab_of_given(arguments, torch.float64)
    results = _run(op, run, arguments, backend)
    for name, result in zip(RESULTS[op], results, strict=True):
        if name in exact:
            assert_fits(f"{op} {name}", result, exact[name])


def check_segmented_range(op, run, case, *, backend=None):
    """``testing_segmented.check_segmented`` for these cases."""
    inputs = case.draw()
    arguments = inputs.arguments(op)
    exact = naive_segmented(inputs, op, torch.float64)
    terms = naive_segmented(_without_signs(inputs), op, torch.float64)
    results = _run(op, run, arguments, backend)
    flat = []
    for result in results:
        flat += [result] if isinstance(result, torch.Tensor) else list(result)
    for number, (ours, *others) in enumerate(zip(flat, exact, terms, strict=True)):
        assert_fits(f"{op} result {number}", ours, *others)


def _without_signs(inputs):
    stacks = {name: [t.abs() for t in getattr(inputs, name)] for name in ("lora_a", "lora_b")}
    tensors = {name: getattr(inputs, name) for name in ("x", "dy", "y", "weight", "bias")}
    return replace(inputs, **stacks, **{n: t.abs() for n, t in tensors.items() if t is not None})


def _run(op, run, arguments, backend):
    with poisoned_memory(), record_plans() as answers:
        results = run(**arguments)
    if backend is not None:
        assert [(a.op, a.backend) for a in answers] == [(op, backend)], f"answered by {answers}"
    if results is None:
        return (arguments["y"],)
    return results if isinstance(results, (tuple, list)) else (results,)
