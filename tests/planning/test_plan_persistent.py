"""The persistent plan and the widest tiles: where they are valid, and what they should take."""

import dataclasses
import itertools

import pytest
from test_plan import AMPERE, HOPPER, problem

import lora_kernels as lk
from lora_kernels.planning import plan
from lora_kernels.planning.config import Config
from lora_kernels.planning.validity import candidates, invalid_reason

TILE = Config("persistent", 128, 256, 64, 8, 1, 8, 4, 132, True)
WIDE = dataclasses.replace(TILE, block_m=256, block_n=128)
BLACKWELL = dataclasses.replace(HOPPER, name="NVIDIA B200", arch="sm_100", processors=148)
CONSUMER = dataclasses.replace(HOPPER, arch="sm_120", shared_memory=101376)
OPS = FWD, DX = "lora_linear_fwd", "lora_linear_dx"


@pytest.mark.parametrize("chosen", [Config("persistent"), TILE])
@pytest.mark.parametrize(
    ("changes", "facts", "reason"),
    [
        ({"dtype": "float32"}, HOPPER, "in bfloat16 alone"),
        ({"dtype": "float16"}, HOPPER, "in bfloat16 alone"),
        ({"op": DX, "dropout": True}, HOPPER, "no accumulator of its own"),
        ({"out_scale": True}, HOPPER, "no out_scale"),
        ({"aligned": False}, HOPPER, "16-byte strides"),
        # The result's rows, which no operand of the caller's has.
        ({"n": 4100}, HOPPER, "16-byte strides"),
        ({}, AMPERE, "need sm_90"),
        ({"r": 12}, HOPPER, "a multiple of 8"),
        ({"r": 0}, HOPPER, "a multiple of 8"),
        ({"op": "segmented_linear_fwd", "slots": 2}, HOPPER, "comes from a shrink"),
        ({"op": "lora_shrink"}, HOPPER, "no tail to place"),
    ],
)
def test_where_it_is_not_valid(chosen, changes, facts, reason):
    assert reason in invalid_reason(chosen, problem(**changes), facts)


def test_tiles_that_are_not_valid():
    for chosen, facts, reason in (
        (dataclasses.replace(TILE, descriptors=False), HOPPER, "by tensor descriptors"),
        (dataclasses.replace(TILE, num_stages=5), HOPPER, "bytes of shared memory"),
        (TILE, CONSUMER, "bytes of shared memory"),
        (dataclasses.replace(WIDE, plan="in_loop"), HOPPER, "registers"),
        (dataclasses.replace(WIDE, plan="tail", descriptors=False), HOPPER, "registers"),
    ):
        assert reason in invalid_reason(chosen, problem(), facts)
    assert "registers" in invalid_reason(
        dataclasses.replace(WIDE, plan="tail"), problem(op=DX, dropout=True), HOPPER
    )
    assert invalid_reason(Config("persistent"), problem(), CONSUMER) is not None


@pytest.mark.parametrize("facts", [HOPPER, BLACKWELL], ids=lambda f: f.name)
@pytest.mark.parametrize("op", OPS)
def test_it_is_for_tuners_and_users(op, facts):
    """Never chosen unmeasured, and still a candidate, with a shorter estimate than the tail plan of
    the same tile: the rank's step costs less than what the flat loop saves."""
    for m, r in itertools.product((16, 300, 8192), (8, 16, 256)):
        asked = problem(op=op, m=m, n=4096, k=4096, r=r)
        found = [c for c in candidates(asked, facts) if c.plan == "persistent"]
        assert found and plan.heuristic(asked, facts).plan != "persistent"
    asked = problem(op=op, m=8192, n=4096, k=4096)
    for tile in found:
        tail = dataclasses.replace(tile, plan="tail")
        persistent_us, tail_us = (plan.estimate_us(c, asked, facts) for c in (tile, tail))
        assert 0.9 * tail_us < persistent_us < tail_us
    with lk.force_plan("persistent"):
        assert plan.plan(asked, facts) == Config("persistent")


def test_what_counts_of_a_rank_is_its_steps():
    def us(r, **changes):
        asked = problem(m=8192, n=4096, k=4096, r=r, **changes)
        return plan.estimate_us(TILE, asked, HOPPER) - plan.estimate_us(
            Config("skinny", 64, 0, 64, 0, 1, 4, 3, block_r=64),
            asked._replace(op="lora_shrink", n=r),
            HOPPER,
        )

    assert us(8) == pytest.approx(us(64), abs=0.5) and us(65) > us(64) + 1
    # A copy of the adapter in the rows' dtype.
    assert us(16) > us(16, adapter_dtype="bfloat16") + 1
