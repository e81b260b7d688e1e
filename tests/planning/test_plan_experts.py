"""Plans for the operators of experts, on any machine."""

import itertools

import pytest
import torch
from test_plan import AMPERE, CPU, DTYPES, GPUS, HOPPER, INSTINCT, TOMORROW, UNKNOWN, assert_valid

from lora_kernels.functional.ops import EXPERT_OPERATORS
from lora_kernels.planning import plan
from lora_kernels.planning.config import SKINNY_OPS, Config
from lora_kernels.planning.validity import candidates, invalid_reason
from lora_kernels.spec.problem import PROBLEM_OF, Problem, is_aligned
from lora_kernels.testing.experts import ExpertCase


def problem(op="expert_linear_fwd", m=4096, dtype="bfloat16", **changes):
    usual = {"n": 1536, "k": 2048, "r": 16, "adapter_dtype": dtype, "experts": 128}
    return Problem(op=op, m=m, dtype=dtype, **(usual | changes))


def test_the_heuristic_is_always_valid():
    every = itertools.product(
        EXPERT_OPERATORS, (0, 1, 40000), (1, 8, 512), (0, 1, 64, 300), DTYPES, (True, False)
    )
    for op, m, experts, r, dtype, aligned in every:
        for facts in (CPU, *GPUS, UNKNOWN):
            asked = problem(op, m, dtype, experts=experts, r=r, aligned=aligned)
            assert_valid(asked, facts)


@pytest.mark.parametrize("facts", [HOPPER, AMPERE, INSTINCT, TOMORROW], ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("aligned", [True, False])
def test_every_gpu_has_kernels_for_every_operator(facts, dtype, aligned):
    for op, m, r in itertools.product(EXPERT_OPERATORS, (1, 4096), (8, 100)):
        plans = {c.plan for c in candidates(problem(op, m, dtype, r=r, aligned=aligned), facts)}
        assert plans == {"vendor", "reference", "skinny" if op in SKINNY_OPS else "tail"}


def test_the_heuristic_on_a_gpu():
    for m in (16, 128, 1024):
        for op in EXPERT_OPERATORS:
            # One launch for all experts, and none to fill up what the library leaves.
            assert plan.heuristic(problem(op, m), HOPPER).plan in ("tail", "skinny")
            assert plan.heuristic(problem(op, m), AMPERE).plan in ("tail", "skinny")
    few, many = (plan.heuristic(problem(m=m), HOPPER) for m in (128, 131072))
    assert few.block_m < many.block_m, "few rows an expert, small tiles"
    assert plan.heuristic(problem(m=128, experts=1), HOPPER).split_k == 1


def test_four_bit_weights_are_decoded_to_memory():
    for op, m in itertools.product(("expert_linear_fwd", "expert_linear_dx"), (1, 64, 4096)):
        for facts in (HOPPER, AMPERE, INSTINCT, CPU):
            chosen = plan.plan(problem(op, m, four_bit=True), facts)
            assert chosen == plan.plan(problem(op, m), facts) and not chosen.decodes
    with plan.force_plan(Config("tail", decodes=True)), pytest.raises(ValueError, match="forced"):
        plan.plan(problem(four_bit=True), HOPPER)


def test_what_is_not_valid_says_why():
    for name in ("in_loop", "producer", "preload"):
        assert "comes from a shrink" in invalid_reason(Config(name), problem(), HOPPER)
    assert invalid_reason(Config("vendor"), problem(dtype="float64"), HOPPER)
    assert "tail to place" in invalid_reason(Config("tail"), problem("expert_shrink"), HOPPER)


@pytest.mark.parametrize(
    ("changes", "aligned"),
    [
        ({}, True),
        ({"fan_in_fan_out": True}, True),
        ({"weight_dtype": torch.float32}, True),
        # In the rows' dtype their steps are not whole.
        ({"weight_dtype": torch.float32, "k": 60}, False),
        ({"fan_in_fan_out": True, "n": 36}, False),
        ({"layout": "strided"}, False),
        ({"n": 1}, True),
    ],
    ids=str,
)
def test_which_operands_suit_descriptors(changes, aligned):
    given = {"n": 32, "k": 64, "dtype": torch.bfloat16} | changes
    arguments = ExpertCase((3, 4), r=2, **given).draw().arguments("expert_linear_fwd")
    assert is_aligned(arguments) == aligned
    assert PROBLEM_OF["expert_linear_fwd"](**arguments).experts == 2
