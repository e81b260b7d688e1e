"""For tests of the CPU extension: cases that are drawn, and results compared bit by bit."""

import itertools
import random

import torch

import lora_kernels as lk
from lora_kernels.functional import ops


def tensors(results):
    """Every tensor of the results of a call."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [t for result in results for t in tensors(result)]


def assert_same_bits(first, second):
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def check_native(check, op, case):
    """``check`` is ``lora_kernels.testing``'s of one adapter or of mixed batches."""
    with lk.force_plan("native"), lk.record_plans() as answers:
        check(op, getattr(ops, op), case, backend="cpu")
    assert [answer.plan for answer in answers] == ["native"]


def draw_cases(metafunc, cls, count, **axes):
    """Parametrizes a test with cases in which every value of every axis occurs, each with ever
    other ones of the rest; twice as many with --whole."""
    count *= 1 + metafunc.config.getoption("--whole")
    choice = random.Random(0)

    def column(values):
        repeated = list(itertools.islice(itertools.cycle(values), count))
        choice.shuffle(repeated)
        return repeated

    rows = zip(*map(column, axes.values()), strict=True)
    cases = [cls(**dict(zip(axes, row, strict=True)), seed=i) for i, row in enumerate(rows)]
    metafunc.parametrize("case", cases, ids=str)
