"""``ops.x`` goes past the dispatcher where nothing observes the call, and nowhere else."""

import inspect

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels.functional import ops
from lora_kernels.spec.problem import PROBLEM_OF
from lora_kernels.testing.linear import Case
from lora_kernels.testing.segmented import SegmentedCase

EVERY = (*ops.OPERATORS, *ops.SEGMENTED_OPERATORS)


class Seen(TorchDispatchMode):
    """The names of the operators that come through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def drawn(op):
    """The arguments of a call, in the order of the schema."""
    case = Case(9, 30, 20, 4, dropout_p=0.3)
    if op in ops.SEGMENTED_OPERATORS:
        case = SegmentedCase(9, 30, (16, 8), (4, 0, 3), dropout_p=0.3 * (op[-1] != "_"))
    given = case.draw().arguments(op)
    bound = inspect.signature(PROBLEM_OF[op]).bind(**given)
    bound.apply_defaults()
    return bound.args


def results_of(op, call, arguments=None):
    """What ``call`` returns or writes, as one list."""
    arguments = arguments or drawn(op)
    found = call(*arguments)
    found = [arguments[0]] if found is None else found
    found = [found] if isinstance(found, torch.Tensor) else found
    return [t for part in found for t in (part if isinstance(part, list) else [part])]


def overload(op):
    return getattr(torch.ops.lora_kernels, op).default


@pytest.fixture
def calls(monkeypatch):
    """The operators that came through the dispatcher to this package."""
    found = []
    answer = ops.cpu.answer

    def noted(op, *args, **kwargs):
        found.append((op, any(f.filename.endswith("torch/_ops.py") for f in inspect.stack(0))))
        return answer(op, *args, **kwargs)

    monkeypatch.setattr(ops.cpu, "answer", noted)
    return found


@pytest.mark.parametrize("op", EVERY)
def test_the_bits_of_the_operator(op, calls):
    with torch.no_grad():
        direct = results_of(op, getattr(ops, op))
        assert calls == [(op, False)], "through the dispatcher"
    expected = results_of(op, overload(op))
    assert len(direct) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(direct, expected, strict=True))


@pytest.mark.parametrize("op", EVERY)
def test_no_graph_and_no_cast_reach_inside(op):
    expected, arguments = results_of(op, overload(op)), drawn(op)
    for t in arguments[op[-1] == "_" :]:
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dim():
            t.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = results_of(op, getattr(ops, op), arguments)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(t.requires_grad for t in found)


@pytest.mark.parametrize("op", EVERY)
def test_a_dispatch_mode_sees_the_operator(op):
    with Seen() as seen:
        results_of(op, getattr(ops, op))
    assert f"lora_kernels::{op}" in seen.names


def test_what_observes_a_call():
    assert not ops.is_observed()
    with forward_ad.dual_level():
        assert ops.is_observed()
    found = []
    torch.vmap(lambda x: found.append(ops.is_observed()) or x)(torch.ones(2))
    traced = lambda x: found.append(ops.is_observed()) or x + 1  # noqa: E731
    torch.jit.trace(traced, torch.ones(2), check_trace=False)
    assert found == [True, True]


def test_compiled_code_keeps_the_operator():
    x, a, scale = torch.randn(3, 8), torch.randn(2, 8), torch.ones(())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    s = torch.compile(ops.lora_shrink, backend=backend, fullgraph=True)(x, a, scale)
    assert torch.equal(s, ops.lora_shrink(x, a, scale))
    assert "lora_shrink" in graphs[0].code
