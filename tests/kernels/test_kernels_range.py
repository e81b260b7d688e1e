"""The Triton kernels on float16 rows whose S, D, A or B leave float16's range, compiled or
interpreted as in ``test_kernels.py``."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

# Below the skip: nothing of Triton's is imported where it is missing.
import segmented_kernels
from float16_range import (
    FLOAT16,
    SIZES,
    RangeCase,
    SegmentedRangeCase,
    check_range,
    check_segmented_range,
)
from segmented_kernels import CONFIGS, DEVICE, INTERPRETED, LINEAR_CONFIGS
from test_kernels import GEMMS, launch, skinny

from lora_kernels.backends import vendor
from lora_kernels.functional.ops import SEGMENTED_OPERATORS
from lora_kernels.kernels import common
from lora_kernels.planning.config import DECODE_OPS, MIXED_LINEAR_OPS
from lora_kernels.testing.linear import Case

pytestmark = segmented_kernels.SKIPS


def combinations(*axes):
    """Their product; of the sizes the interpreter, which takes seconds for one, has every third,
    others for each neighbour."""
    for i, first in enumerate(axes[0]):
        for j, second in enumerate(axes[1]):
            for k, sizes in enumerate(SIZES):
                if not INTERPRETED or (i + j + k) % 3 == 0:
                    yield first, second, sizes


def linear(sizes, **changes):
    return RangeCase(33, 69, 43, 41, FLOAT16, sizes=SIZES[sizes], device=DEVICE, **changes)


@pytest.mark.parametrize(
    ("op", "gemm", "sizes"), [*combinations(("lora_linear_fwd", "lora_linear_dx"), GEMMS)]
)
def test_gemm_with_a_tail(op, gemm, sizes):
    dropout_p = 0.0 if gemm.startswith("in loop") else 0.3
    case = linear(sizes, dropout_p=dropout_p, zero_weight=gemm == "tail")
    check_range(op, launch(op, GEMMS[gemm]), case)


@pytest.mark.parametrize(
    ("op", "split", "sizes"), [*combinations(("lora_shrink", "lora_linear_dab"), (1, 2))]
)
def test_skinny(op, split, sizes):
    check_range(op, launch(op, skinny(split)), linear(sizes, dropout_p=0.3))


def test_a_nan_of_any_bits_stays_one():
    """Rounding the largest of them to TF32 would carry into its sign."""
    case = Case(9, 24, 20, 3, FLOAT16, adapter_dtype=torch.float32, device=DEVICE)
    arguments = case.draw().arguments("lora_linear_fwd")
    arguments["lora_b"].view(torch.int32)[4] = 0x7FFFFFFF
    y, _ = launch("lora_linear_fwd", GEMMS["tail"])(**arguments)
    assert y.isnan().nonzero()[:, 1].unique().tolist() == [4] and y[:, 4].isnan().all()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(
    "op", ["lora_shrink", "lora_linear_fwd", "lora_linear_dx", "lora_linear_dab"]
)
def test_library(op, sizes):
    def run(**arguments):
        return getattr(vendor, op)(**arguments, masked=common.masked)

    check_range(op, run, linear(sizes, dropout_p=0.3))


SIZE = SegmentedRangeCase(40, 43, (37, 20), (33, 0, 1, 8, 5, 16), FLOAT16, device=DEVICE)
GROUPED = [op for op in SEGMENTED_OPERATORS if op not in MIXED_LINEAR_OPS]


@pytest.mark.parametrize(("op", "config", "sizes"), [*combinations(GROUPED, ["grouped"])])
def test_grouped(op, config, sizes):
    dropout_p = 0.0 if "expand" in op or op == "segmented_lora_" else 0.3
    case = replace(SIZE, sizes=SIZES[sizes], dropout_p=dropout_p)
    check_segmented_range(op, segmented_kernels.launch(op, CONFIGS[config]), case)


@pytest.mark.parametrize(
    ("op", "config", "sizes"), [*combinations(DECODE_OPS, ["decode", "decode, whole"])]
)
def test_decode(op, config, sizes):
    case = replace(SIZE, sizes=SIZES[sizes], packed=True)
    check_segmented_range(op, segmented_kernels.launch(op, CONFIGS[config]), case)


@pytest.mark.parametrize(
    ("op", "config", "sizes"), [*combinations(MIXED_LINEAR_OPS, LINEAR_CONFIGS)]
)
def test_mixed_linear(op, config, sizes):
    if (op, config) == ("segmented_linear_dx", "vendor, decode"):
        pytest.skip("the decode plan has no dX")
    dropout_p = 0.0 if config == "vendor, decode" else 0.3
    case = replace(SIZE, sizes=SIZES[sizes], dropout_p=dropout_p)
    check_segmented_range(op, segmented_kernels.launch(op, LINEAR_CONFIGS[config]), case)
