"""The Triton kernels of experts against float64."""

import functools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

# Below the skip: nothing of Triton's is imported where it is missing.

from test_kernels import DEVICE, DTYPES, skinny, tile
from test_kernels import pytestmark as pytestmark

from lora_kernels.backends import cuda
from lora_kernels.functional.ops import EXPERT_OPERATORS
from lora_kernels.kernels import experts, four_bit
from lora_kernels.planning.config import Config
from lora_kernels.planning.device import DeviceFacts
from lora_kernels.spec.problem import PROBLEM_OF, is_aligned
from lora_kernels.testing.experts import MUTATIONS, ExpertCase, check_experts

# Two tiles of 16 x 32 x 16 and a remainder, and a rank of two tiles and a remainder.
SIZE = ExpertCase((3, 37, 0, 16), 69, 43, 41, bias=True, device=DEVICE)

COUNTS = {
    "several": {},
    "one has all rows": {"counts": (0, 0, 45, 0)},
    "rows without an expert": {"counts": (3, 0, 17), "spare": 21},
    "one expert": {"counts": (37,)},
    "one row": {"counts": (0, 1)},
    "no rows": {"counts": (0, 0, 0)},
    "no row has an expert": {"counts": (0, 0), "spare": 3},
    "many experts": {"counts": tuple(i * 7 % 5 for i in range(40))},
    # as many experts as the next power of two has room for, besides those of no expert
    "seven": {"counts": (1, 2, 3, 4, 5, 6, 17), "spare": 1},
}

VARIANTS = {
    "plain": {},
    "no base, neighbours": {"zero_weight": True, "peft_layout": False, "bias": False},
    "transposed base": {"fan_in_fan_out": True},
    "strided": {"layout": "strided"},
    "transposed": {"layout": "transposed", "fan_in_fan_out": True},
    "float32 adapter": {"adapter_dtype": torch.float32},
    "float32 base": {"weight_dtype": torch.float32},
    "rank 1": {"r": 1},
    "tiny": {"n": 5, "k": 7, "r": 2},
}


def launch(op):
    if op in ("expert_shrink", "expert_linear_dab"):
        return functools.partial(getattr(experts, op), config=skinny())
    return functools.partial(getattr(experts, op), config=tile("tail"), shrink=skinny())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("op", EXPERT_OPERATORS)
def test_kernels_of_experts(op, counts, variant, dtype):
    check_experts(op, launch(op), replace(SIZE, dtype=dtype, **COUNTS[counts], **VARIANTS[variant]))


@pytest.mark.parametrize("op", ["expert_linear_fwd", "expert_linear_dx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_an_adapter(op, dtype):
    check_experts(op, launch(op), replace(SIZE, r=0, spare=2, dtype=dtype))


@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("r", [0, 6])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("op", ["expert_linear_fwd", "expert_linear_dx"])
def test_four_bit_weights_are_decoded_once(op, fan_in_fan_out, r, triton, monkeypatch):
    """All experts together; without Triton by the library."""
    decoded, sound = [], four_bit.lora_decode
    monkeypatch.setattr(four_bit, "lora_decode", lambda *args: decoded.append(args) or sound(*args))
    sizes = {"r": r, "spare": 2, "fan_in_fan_out": fan_in_fan_out, "quant": ("nf4", 64, True)}
    case, known = replace(SIZE, **sizes), DeviceFacts("cuda", "sm_90", "sm_90", processors=4)
    known = replace(known, shared_memory=232448, triton=triton)
    arguments = case.draw().arguments(op)
    problem = PROBLEM_OF[op](**arguments)._replace(aligned=is_aligned(arguments))
    config = tile("tail") if triton else Config("vendor")
    assert problem.four_bit and (problem.n, problem.k, problem.experts) == (69, 43, 4)
    check_experts(op, functools.partial(cuda.run, op, config, problem, known), case)
    assert len(decoded) == triton


@pytest.mark.parametrize("op", EXPERT_OPERATORS)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_call_turns_the_check_red(op, mutation):
    if op == "expert_linear_dab" and mutation != "a row too few for the first":
        pytest.skip("it has neither a scale nor an adapter")
    run = launch(op)
    with pytest.raises(AssertionError, match="over the budget"):
        check_experts(op, lambda **given: MUTATIONS[mutation](run, given), SIZE)
