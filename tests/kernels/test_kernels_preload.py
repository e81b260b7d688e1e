"""The preload plan: S and what the library's GEMM accumulates onto, against float64, compiled or
interpreted as in ``test_kernels.py``. Float16 rows are not its: the tail alone might not fit."""

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

# Below the skip: nothing of Triton's is imported where it is missing.
import segmented_kernels
from segmented_kernels import DEVICE, SHRINK
from test_kernels import SIZE, VARIANTS

from lora_kernels.backends import cuda
from lora_kernels.kernels import linear_preload, segmented
from lora_kernels.planning.config import MIXED_LINEAR_OPS, Config
from lora_kernels.planning.device import DeviceFacts, facts
from lora_kernels.planning.validity import is_valid
from lora_kernels.spec import reference
from lora_kernels.spec.problem import PROBLEM_OF
from lora_kernels.testing.linear import MUTATIONS, check, mutation_case
from lora_kernels.testing.segmented import check_segmented

pytestmark = segmented_kernels.SKIPS

# The interpreter multiplies bfloat16 by its raw bits.
DTYPES = [torch.float32] + [torch.bfloat16] * (DEVICE == "cuda")
OPS = FWD, DX = "lora_linear_fwd", "lora_linear_dx"
TILE = Config("preload", 16, 32, 16, 0, 1, 4, 2)


def launch(op, module=linear_preload):
    return functools.partial(getattr(module, op), config=TILE)


def mixed(op, module=linear_preload):
    return functools.partial(getattr(module, op), config=SHRINK)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("op", OPS)
def test_one_adapter(op, variant, dropout_p, dtype):
    case = replace(SIZE, dtype=dtype, dropout_p=dropout_p, **VARIANTS[variant])
    check(op, launch(op), case)


@pytest.mark.parametrize("bias", [False, True])
def test_out_scale(bias):
    check(FWD, launch(FWD), replace(SIZE, out_scale=True, bias=bias, dropout_p=0.3))


@pytest.mark.parametrize(("op", "r"), [(FWD, 8), (DX, 100), (FWD, 256)])
def test_ranks(op, r):
    check(op, launch(op), replace(SIZE, m=17, n=33, r=r, dropout_p=0.3))


OF_A_BATCH = {
    "plain": {},
    "Conv1D, bias, dropout": {"fan_in_fan_out": True, "bias": True, "dropout_p": 0.3},
    "packed, dropout": {"packed": True, "dropout_p": 0.3},
    "strided": {"layout": "strided"},
    "no rows": {"m": 0},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", OF_A_BATCH)
@pytest.mark.parametrize("op", MIXED_LINEAR_OPS)
def test_mixed_batches(op, variant, dtype):
    changes = {"m": 20, "dtype": dtype} | OF_A_BATCH[variant]
    case = replace(segmented_kernels.SIZE, **changes)
    check_segmented(op, mixed(op), case)


@pytest.mark.parametrize(("arch", "m"), [("sm_80", 5), ("sm_90", 40), ("gfx942", 20)])
def test_the_backend_launches_what_it_ships(arch, m):
    shared = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}[arch]
    known = DeviceFacts("cuda", arch, arch, processors=4, shared_memory=shared)
    if DEVICE == "cuda":
        known = facts("cuda")
    batch = replace(segmented_kernels.SIZE, m=m)
    for op in (*OPS, *MIXED_LINEAR_OPS):
        one = op in OPS
        case = replace(SIZE, m=m, r=20, dropout_p=0.2) if one else batch
        problem = PROBLEM_OF[op](**case.draw().arguments(op))._replace(aligned=False)
        config = Config("preload")
        assert is_valid(config, problem, known)
        run = functools.partial(cuda.run_kernel, op, config, problem, known)
        (check if one else check_segmented)(op, run, case)


def test_masks_are_the_references_bit_for_bit():
    """With the identity for A and B, S is the mask of x, and dX without a base that of the tail."""
    m, k, p = 37, 43, 0.4
    rng = torch.tensor([-7, 2**32 - 1, 5, 16], device=DEVICE)
    mask = reference.dropout_mask(rng, m, k, p)
    rows, eye = torch.ones(m, k, device=DEVICE), torch.eye(k, device=DEVICE)
    arguments = (rows, torch.zeros_like(eye), eye, eye, torch.ones((), device=DEVICE))
    y, s = launch(FWD)(*arguments, rng=rng, dropout_p=p)
    dx, d = launch(DX)(*arguments, rng=rng, dropout_p=p)
    for dropped in (y, s, dx):
        assert torch.equal(dropped != 0, mask)
    assert d.all()


@pytest.mark.parametrize(("op", "mutation"), [(op, name) for op in OPS for name in MUTATIONS[op]])
def test_a_broken_call_turns_the_check_red(op, mutation):
    case = mutation_case(torch.float32, DEVICE)
    with pytest.raises(AssertionError, match="over the budget"):
        check(op, lambda **given: MUTATIONS[op][mutation](launch(op), given), case)


# (operator, dropout, what the source says, what it would say)
MISTAKES = {
    "no tail": (FWD, 0, "acc = tl.dot(s, tail_tile(b_t,", "acc = tl.dot(s, tail_tile(b_t * 0,"),
    "no scale": (FWD, 0, "s_acc * (tl.load(scale_ptr)", "s_acc * (0 * tl.load(scale_ptr) + 1"),
    "strides of b swapped": (FWD, 0, "stride_br, stride_bn, BL", "stride_bn, stride_br, BL"),
    "the last step of K": (FWD, 0, "range(0, K, ", "range(0, K - BLOCK_K, "),
    "the last columns": (FWD, 0, "range(0, N, ", "range(0, N - BLOCK_N, "),
    "the last row": (FWD, 0, "offs_m < M", "offs_m < M - 1"),
    "no bias": (FWD, 0, "HAS_BIAS=bias is not None", "HAS_BIAS=False"),
    "no base": (FWD, 0, "y.addmm_(x, weight", "y.addmm_(0 * x, weight"),
    "no mask": (FWD, 0.3, "if MASK_X:", "if False:"),
    "the first columns' mask": (FWD, 0.3, "rng_ptr, row, k, thr", "rng_ptr, row, 0, thr"),
    "no mask in dX": (DX, 0.3, "if MASK_TAIL:", "if False:"),
    "the mask of dX on dY": (DX, 0.3, "scale, None, None, rng", "scale, None, rng, None"),
    "no 1/(1-p)": (DX, 0.3, "1.0 / (1.0 - dropout_p)", "1.0"),
    "the bias of a batch": ("segmented_linear_fwd", 0, "bias=bias, config", "bias=None, config"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_source_turns_the_check_red(mistake, tmp_path):
    op, dropout_p, sound, broken = MISTAKES[mistake]
    source = Path(linear_preload.__file__).read_text()
    assert sound in source, "the kernel has changed: say the mistake anew"
    path = tmp_path / "broken_preload.py"
    path.write_text(source.replace(sound, broken))
    spec = importlib.util.spec_from_file_location("lora_kernels.kernels.broken_preload", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError, match="over the budget"):
        if op in OPS:
            # N of more than a tile, and a rank as large, so that no stride leaves the tensors.
            check(op, launch(op, module), replace(SIZE, n=72, r=72, dropout_p=dropout_p))
        else:
            case = replace(segmented_kernels.SIZE, m=20, bias=True)
            check_segmented(op, mixed(op, module), case)


def test_the_bias_of_a_batch_reaches_rows_without_an_adapter():
    case = replace(segmented_kernels.SIZE, m=20, bias=True, weight=0.0)
    inputs = case.draw()
    y, _ = mixed("segmented_linear_fwd")(**inputs.arguments("segmented_linear_fwd"))
    bare = inputs.bare()
    assert bare.any() and torch.equal(y[bare], inputs.bias.expand_as(y[bare]))
    given = inputs.arguments("segmented_lora")
    alone, _ = segmented.segmented_lora(**given, config=SHRINK)
    assert not alone[bare].any()
