"""The persistent plan: one flat loop over tiles and steps, of which the tail is the last of each
tile, against float64, compiled or interpreted as in ``test_kernels.py``."""

import functools
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

# Below the skip: nothing of Triton's is imported where it is missing.
import segmented_kernels
from segmented_kernels import DEVICE
from test_kernels import skinny

from lora_kernels.backends import cuda
from lora_kernels.kernels import linear_persistent
from lora_kernels.planning.config import Config
from lora_kernels.planning.device import DeviceFacts, facts
from lora_kernels.planning.validity import is_valid
from lora_kernels.spec.problem import PROBLEM_OF, is_aligned
from lora_kernels.testing.linear import MUTATIONS, Case, check, mutation_case

pytestmark = [
    *segmented_kernels.SKIPS,
    pytest.mark.skipif(
        DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0),
        reason="tensor descriptors need sm_90",
    ),
]

# The plan is bfloat16's, which the interpreter multiplies by its raw bits.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
OPS = FWD, DX = "lora_linear_fwd", "lora_linear_dx"
TILE = Config("persistent", 16, 32, 16, 2, 1, 4, 2, 3, True)
# Rows of whole 16 bytes, in every axis and in the rank two blocks and a remainder; of tiles more
# than a program's turn.
SIZE = Case(37, 72, 40, 40, DTYPE, device=DEVICE)


def launch(op, module=linear_persistent, config=TILE):
    return functools.partial(getattr(module, op), config=config, shrink=skinny(2))


VARIANTS = {
    "plain": {},
    "no base": {"zero_weight": True, "bias": False},
    "transposed base": {"fan_in_fan_out": True},
    "another dtype's adapter": {"adapter_dtype": torch.float16},
    "rank 8": {"r": 8},
    "one row": {"m": 1},
    "no rows": {"m": 0},
    "many rows": {"m": 70},
    "one tile": {"m": 3, "n": 8, "k": 8, "r": 8},
    "dropout": {"dropout_p": 0.3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("op", OPS)
def test_one_adapter(op, variant):
    if (op, variant) == (DX, "dropout"):
        pytest.skip("not its: the mask multiplies the tail alone")
    check(op, launch(op), replace(SIZE, **VARIANTS[variant]))


def test_bits_do_not_depend_on_the_grid():
    arguments = SIZE.draw().arguments(FWD)
    results = [
        launch(FWD, config=replace(TILE, programs=programs))(**arguments)
        for programs in (1, 3, 0, 3)
    ]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_operands_that_no_descriptor_reads_are_copied():
    """An adapter that begins within 16 bytes, columns of a wider one, and a bias with strides."""
    arguments = SIZE.draw().arguments(FWD)
    expected = launch(FWD)(**arguments)
    n, r = arguments["lora_b"].shape
    within = torch.empty(n * r + 1, dtype=DTYPE, device=DEVICE)[1:].view(n, r)
    wider = torch.empty(n, r + 1, dtype=DTYPE, device=DEVICE)[:, :-1]
    bias = torch.empty(2 * n, dtype=arguments["bias"].dtype, device=DEVICE)[::2]
    bias.copy_(arguments["bias"])
    for b in (within, wider):
        result = launch(FWD)(**arguments | {"lora_b": b.copy_(arguments["lora_b"]), "bias": bias})
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("op", OPS)
def test_the_backend_launches_what_it_ships(op, arch):
    known = DeviceFacts("cuda", arch, arch, processors=4, shared_memory=232448)
    if DEVICE == "cuda":
        known = facts("cuda")
    case = replace(SIZE, r=16)
    arguments = case.draw().arguments(op)
    problem = PROBLEM_OF[op](**arguments)._replace(dtype="bfloat16", aligned=is_aligned(arguments))
    config = Config("persistent")
    assert is_valid(config, problem, known)
    check(op, functools.partial(cuda.run_kernel, op, config, problem, known), case)


# Of dX the plan has no dropout.
OF_MASKS = ("no mask", "no 1/(1-p)", "another offset", "the forward's mask position")
MUTANTS = [(op, name) for op in OPS for name in MUTATIONS[op] if op == FWD or name not in OF_MASKS]


@pytest.mark.parametrize(("op", "mutation"), MUTANTS)
def test_a_broken_call_turns_the_check_red(op, mutation):
    case = mutation_case(DTYPE, DEVICE)
    dropout_p = case.dropout_p * (op == FWD)
    case = replace(case, n=72, k=40, r=24, dropout_p=dropout_p, out_scale=False)

    def run(**arguments):
        return MUTATIONS[op][mutation](launch(op), arguments)

    with pytest.raises(AssertionError, match="over the budget"):
        check(op, run, case)


# (operator, what the source says, what it would say)
MISTAKES = {
    "no tail": (FWD, "base_steps + tl.cdiv(R, BLOCK_K)", "base_steps"),
    "a tail of one block": (FWD, "tl.cdiv(R, BLOCK_K)", "1"),
    "the base in the tail's place": (DX, "left, right, k = s, b, ", "left, right, k = x, w, "),
    "the tail's first block again": (FWD, "(step - base_steps) * BLOCK_K", "0"),
    "the last step of the base": (FWD, "base_steps = tl.cdiv(K, BLOCK_K)", "base_steps = K // 16"),
    "no new sum": (FWD, "acc = tl.zeros([BLOCK_M, BLOCK_N]", "acc = tl.full([BLOCK_M, BLOCK_N], 1"),
    "no bias": (FWD, "acc += tl.load(bias_ptr", "acc += 0 * tl.load(bias_ptr"),
    "the first half twice": (DX, "second.to(y.dtype)", "first.to(y.dtype)"),
    "halves that take turns": (FWD, "2, HALF]), [0, 2, 1]", "HALF, 2]), [0, 1, 2]"),
    "the last program's tiles": (FWD, "0), num_m * num_n, tl", "0), num_m * num_n - 1, tl"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_source_turns_the_check_red(mistake, tmp_path):
    op, sound, broken = MISTAKES[mistake]
    source = Path(linear_persistent.__file__).read_text()
    assert source.count(sound) == 1, "the kernel has changed: say the mistake anew"
    path = tmp_path / "broken_persistent.py"
    path.write_text(source.replace(sound, broken))
    spec = importlib.util.spec_from_file_location("lora_kernels.kernels.broken_persistent", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError, match="over the budget"):
        check(op, launch(op, module), SIZE)
