"""The Triton kernels against float64: compiled on a GPU, in Triton's interpreter elsewhere.

An interpreted function cannot be compiled, so the interpreter has a process of its own
(``TRITON_INTERPRET=1 pytest tests/kernels``, the second command of ``make test``). There
the tiles are small, since it runs one tile at a time; every size is two tiles and a remainder.
"""

import functools
import importlib.metadata
import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

triton = pytest.importorskip("triton")

# Below the skip: nothing of Triton's is imported where it is missing.
import lora_kernels as lk  # noqa: E402
from lora_kernels.backends import cuda, vendor  # noqa: E402
from lora_kernels.functional.ops import OPERATORS  # noqa: E402
from lora_kernels.kernels import common, linear_bwd, linear_fwd, linear_producer  # noqa: E402
from lora_kernels.planning.config import SKINNY_OPS, Config  # noqa: E402
from lora_kernels.planning.device import DeviceFacts, facts  # noqa: E402
from lora_kernels.planning.validity import is_valid  # noqa: E402
from lora_kernels.spec.problem import PROBLEM_OF  # noqa: E402
from lora_kernels.testing.linear import LAYOUTS, MUTATIONS, Case, check, mutation_case  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


pytestmark = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and TRITON_INTERPRET=1 is not set"
    ),
]

# The interpreter multiplies bfloat16 by its raw bits.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def tile(plan, split_k=1, descriptors=False, programs=3):
    return Config(plan, 16, 32, 16, 2, split_k, 4, 2, programs, descriptors)


def skinny(split_k=1):
    return Config("skinny", 16, 16, 32, 0, split_k, 4, 2, block_r=32)


GEMMS = {
    "in loop": tile("in_loop"),
    "in loop, split": tile("in_loop", split_k=3),
    "tail": tile("tail"),
    "tail, split": tile("tail", split_k=2),
    "producer": tile("producer"),
}

# Two tiles of 16 x 32 x 16 and a remainder, and two 16-blocks of the rank and a remainder.
SIZE = Case(37, 69, 43, 41, device=DEVICE)


def launch(op, config, module=None, split_shrink=2):
    fwd, bwd = (linear_fwd, linear_bwd) if module is None else (module, module)
    if config.plan == "producer":
        return functools.partial(getattr(module or linear_producer, op), config=config)
    if op == "lora_shrink":
        return functools.partial(fwd.lora_shrink, config=config)
    if op == "lora_linear_dab":
        return functools.partial(bwd.lora_linear_dab, config=config)
    return functools.partial(getattr(fwd, op), config=config, shrink=skinny(split_shrink))


VARIANTS = {
    "plain": {},
    "no base": {"zero_weight": True, "bias": False},
    "transposed base": {"fan_in_fan_out": True},
    "strided": {"layout": "strided"},
    "transposed": {"layout": "transposed"},
    "sliced": {"layout": "sliced", "fan_in_fan_out": True},
    "expanded": {"layout": "expanded"},
    "float32 adapter": {"adapter_dtype": torch.float32},
    "rank 1": {"r": 1},
    "one row": {"m": 1},
    "no rows": {"m": 0},
    # Two groups of tiles and a remainder.
    "many rows": {"m": 70},
    "tiny": {"m": 3, "n": 5, "k": 7, "r": 2},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_dx"])
def test_gemm_with_a_tail(op, gemm, variant, dtype):
    check(op, launch(op, GEMMS[gemm]), replace(SIZE, dtype=dtype, **VARIANTS[variant]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "no base", "strided", "transposed base", "one row"])
@pytest.mark.parametrize("gemm", ["tail", "tail, split", "producer"])
@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_dx"])
def test_gemm_with_a_dropped_tail(op, gemm, variant, dtype):
    case = replace(SIZE, dtype=dtype, dropout_p=0.3, **VARIANTS[variant])
    check(op, launch(op, GEMMS[gemm]), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gemm", ["in loop", "tail", "producer"])
def test_out_scale(gemm, dtype):
    case = replace(SIZE, dtype=dtype, out_scale=True)
    check("lora_linear_fwd", launch("lora_linear_fwd", GEMMS[gemm]), case)


@pytest.mark.parametrize("gemm", ["tail", "producer"])
@pytest.mark.parametrize("r", [8, 24, 64, 100, 256])
def test_ranks_of_the_tail(r, gemm):
    case = replace(SIZE, m=17, n=33, r=r)
    check("lora_linear_fwd", launch("lora_linear_fwd", GEMMS[gemm]), case)
    check("lora_linear_dx", launch("lora_linear_dx", GEMMS[gemm]), replace(case, dropout_p=0.3))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("gemm", ["in_loop", "tail", "producer"])
@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_dx"])
def test_tensor_descriptors(op, gemm, fan_in_fan_out):
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor descriptors need sm_90")
    # Rows of whole 16 bytes, and still a remainder in every axis.
    case = replace(SIZE, n=72, k=40, dtype=torch.float16, fan_in_fan_out=fan_in_fan_out)
    check(op, launch(op, tile(gemm, descriptors=True)), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("split_k", [1, 3])
@pytest.mark.parametrize("op", ["lora_shrink", "lora_linear_dab"])
def test_skinny_kernels(op, split_k, layout, dropout_p, dtype):
    case = replace(SIZE, dtype=dtype, dropout_p=dropout_p, layout=layout)
    check(op, launch(op, skinny(split_k)), case)


@pytest.mark.parametrize("r", [1, 24, 100, 256])
@pytest.mark.parametrize("op", ["lora_shrink", "lora_linear_dab"])
def test_ranks_of_the_skinny_kernels(op, r):
    check(op, launch(op, skinny(2)), replace(SIZE, m=33, n=17, r=r, adapter_dtype=torch.float32))


@pytest.mark.parametrize("kept", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (0, 0, 0)])
@pytest.mark.parametrize("split_k", [1, 2])
def test_dab_computes_only_what_is_asked(kept, split_k):
    arguments = SIZE.draw().arguments("lora_linear_dab")
    run = launch("lora_linear_dab", skinny(split_k))
    whole = run(**arguments)
    names = ("da_dtype", "db_dtype", "dbias_dtype")
    part = arguments | {
        n: arguments[n] if keep else None for n, keep in zip(names, kept, strict=True)
    }
    if not kept[0]:
        part |= {"x": None, "d": None}
    if not kept[1]:
        part["s"] = None
    for keep, result, expected in zip(kept, run(**part), whole, strict=True):
        assert torch.equal(result, expected if keep else expected.new_empty(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_masks_are_the_references_bit_for_bit(dtype):
    case = replace(SIZE, dtype=dtype, dropout_p=0.4)
    inputs = case.draw()
    mask, k = inputs.mask(), case.k
    one = torch.ones((), device=DEVICE)
    eye = torch.eye(k, dtype=dtype, device=DEVICE)
    rows = torch.ones(case.m, k, dtype=dtype, device=DEVICE)
    dropout = {"rng": inputs.rng, "dropout_p": case.dropout_p}
    s = launch("lora_shrink", skinny(2))(rows, eye, one, **dropout)
    zeros = torch.zeros(k, k, dtype=dtype, device=DEVICE)
    made, linear = [s], (zeros, eye, eye, one)
    for plan in ("tail", "producer"):
        dx, _ = launch("lora_linear_dx", tile(plan))(rows, *linear, **dropout)
        y, s = launch("lora_linear_fwd", tile(plan))(rows, *linear, **dropout)
        made += [dx, y, s]
    identity = torch.eye(case.m, dtype=dtype, device=DEVICE)
    da, *_ = launch("lora_linear_dab", skinny(2))(
        rows, rows, None, identity, da_dtype=dtype, **dropout
    )
    for dropped in (*made, da):
        assert torch.equal(dropped != 0, mask)
    poisoned = rows.masked_fill(~mask, float("nan"))
    assert torch.equal(common.masked(poisoned, **dropout), rows * mask)
    assert torch.equal(common.masked(rows.t().contiguous().t(), **dropout), rows * mask)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("plan", ["in_loop", "tail", "producer", "skinny"])
@pytest.mark.parametrize("m", [5, 70])
def test_the_backend_launches_what_it_ships(arch, plan, m, dtype=torch.float16):
    """``cuda.run_kernel`` with a device's facts: the numbers the planner fills in do launch."""
    shared = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}[arch]
    known = DeviceFacts("cuda", arch, arch, processors=4, shared_memory=shared)
    if DEVICE == "cuda":
        known = facts("cuda")
    for op in OPERATORS:
        for dropout_p in [0.0] * (plan != "tail") + [0.2] * (plan in ("tail", "producer")):
            case = Case(m, 72, 136, 16, dtype, dropout_p=dropout_p, device=DEVICE)
            problem = PROBLEM_OF[op](**case.draw().arguments(op))
            if is_valid(Config(plan), problem, known):
                run = functools.partial(cuda.run_kernel, op, Config(plan), problem, known)
                if op in ("lora_linear_fwd", "lora_linear_dx"):
                    # For the CPU's kernels; Triton's ignore it.
                    run = functools.partial(run, packed=torch.zeros(4, device=DEVICE))
                check(op, run, case)


@pytest.mark.parametrize("gemm", GEMMS)
def test_bitwise_repeatable_whatever_the_grid(gemm):
    arguments = SIZE.draw().arguments("lora_linear_fwd")
    results = [
        launch("lora_linear_fwd", replace(GEMMS[gemm], programs=programs))(**arguments)
        for programs in (1, 3, 0, 3)
    ]
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_counters_are_left_as_zeros(monkeypatch):
    made = []
    sound = common.counters

    def counters(device, needed):
        made.append(sound(device, needed))
        return made[-1]

    for module in (linear_fwd, linear_producer, linear_bwd):
        monkeypatch.setattr(module, "counters", counters)
    inputs = SIZE.draw()
    for op, config in (
        ("lora_linear_fwd", GEMMS["in loop, split"]),
        ("lora_linear_fwd", GEMMS["producer"]),
        ("lora_shrink", skinny(3)),
        ("lora_linear_dab", skinny(3)),
    ):
        launch(op, config)(**inputs.arguments(op))
    assert sum(c.numel() > 0 for c in made) == 4
    assert not any(c.any() for c in made)


@triton.jit
def _tiles_in_order(out_ptr, num_m, num_n, GROUP_M: triton.language.constexpr):
    for ticket in range(num_m * num_n):
        pid_m, pid_n = linear_producer.owners_first(ticket, num_m, num_n, GROUP_M)
        triton.language.store(out_ptr + 2 * ticket, pid_m)
        triton.language.store(out_ptr + 2 * ticket + 1, pid_n)


@pytest.mark.parametrize(
    "num_m, num_n", [(1, 1), (1, 6), (5, 1), (2, 2), (3, 4), (4, 3), (7, 2), (11, 5)]
)
def test_every_tile_comes_once_and_its_owner_before_it(num_m, num_n, group_m=2):
    out = torch.empty(num_m * num_n, 2, dtype=torch.int32, device=DEVICE)
    _tiles_in_order[(1,)](out, num_m, num_n, group_m)
    order = [tuple(tile) for tile in out.tolist()]
    assert sorted(order) == [(m, n) for m in range(num_m) for n in range(num_n)]
    lead = [order.index((m, n)) - order.index((m, 0)) for m, n in order if n]
    assert all(ahead >= min(group_m, num_m) for ahead in lead)


@pytest.mark.parametrize(
    ("op", "mutation", "plan"),
    [
        (op, name, plan)
        for op in MUTATIONS
        for name in MUTATIONS[op]
        for plan in (("skinny",) if op in SKINNY_OPS else ("tail", "producer"))
    ],
)
def test_a_broken_call_turns_the_check_red(op, mutation, plan):
    case = mutation_case(torch.float16, DEVICE)
    run = launch(op, skinny(2) if plan == "skinny" else tile(plan))
    with pytest.raises(AssertionError, match="over the budget"):
        check(op, lambda **arguments: MUTATIONS[op][mutation](run, arguments), case)


# Mistakes in the source: (operator, configuration, dropout, what it says, what it would say). Where
# one program runs after another, S that is published before it is stored, or not waited for, is no
# mistake that shows: test_aot.py looks for the order in the instructions.
FWD, DX, DAB = "lora_linear_fwd", "lora_linear_dx", "lora_linear_dab"
MISTAKES = {
    "no tail": (
        FWD,
        "tail",
        0,
        "acc = tl.dot(s, tail_tile(b_t, dtype), acc",
        "acc = tl.dot(s, tail_tile(b_t * 0, dtype), acc",
    ),
    "no scale": (FWD, "in loop", 0, "s_acc * scale, dtype", "s_acc, dtype"),
    "strides of b swapped": (
        FWD,
        "in loop",
        0,
        "stride_br, stride_bn, BL",
        "stride_bn, stride_br, BL",
    ),
    "a split forgotten": (FWD, "in loop, split", 0, "range(SPLIT_K):", "range(SPLIT_K - 1):"),
    "the last step of K": (FWD, "in loop", 0, "range(split, num_k, ", "range(split, num_k - 1, "),
    "a tail per split": (FWD, "tail, split", 0, "tl.where(split == 0, R, 0)", "R"),
    "a tail of one block": (FWD, "tail", 0, "tl.where(split == 0, R, 0)", "1"),
    "the last row": (
        FWD,
        "tail",
        0,
        "bias_ptr, rows, inside, offs_n",
        "bias_ptr, rows, offs_m < M - 1, offs_n",
    ),
    "no bias": (FWD, "tail", 0, "acc += tl.load(bias_ptr", "acc += 0 * tl.load(bias_ptr"),
    "no mask": (FWD, "tail", 0.3, "if HAS_MASK:", "if False:"),
    "the first columns' mask": (FWD, "tail", 0.3, "rng_ptr, row, k, thr", "rng_ptr, row, 0, thr"),
    "no mask in dX": (DX, "tail", 0.3, "if MASK_TAIL:", "if False:"),
    "the first columns' mask in dX": (
        DX,
        "tail",
        0.3,
        "rng_ptr, row, col, thr",
        "rng_ptr, row, 0, thr",
    ),
    "the forward's mask in dX": (
        DX,
        "tail",
        0.3,
        "lora_shrink(dy, a, scale, None",
        "lora_shrink(dy, a, scale, rng",
    ),
    "no 1/(1-p)": (DX, "tail", 0.3, "1.0 / (1.0 - dropout_p)", "1.0"),
    "no tail of a producer": (
        FWD,
        "producer",
        0,
        "acc = tl.dot(s, b_t, acc",
        "acc = tl.dot(s, b_t * 0, acc",
    ),
    "a tail for owners alone": (
        FWD,
        "producer",
        0,
        "acc = tl.dot(s, b_t, acc",
        "acc = tl.dot(s, b_t * (pid_n == 0).to(dtype), acc",
    ),
    "no scale of a producer": (FWD, "producer", 0, "s_acc * scale, dtype", "s_acc, dtype"),
    "the last row of a producer": (
        FWD,
        "producer",
        0,
        "bias_ptr, rows, inside, offs_n",
        "bias_ptr, rows, offs_m < M - 1, offs_n",
    ),
    "the last row of S": (FWD, "producer", 0, "(offs_m < M)[:, None]", "(offs_m < M - 1)[:, None]"),
    "the last step of a producer's K": (
        FWD,
        "producer",
        0,
        "in tl.range(0, K, BLOCK_K)",
        "in tl.range(0, K - BLOCK_K, BLOCK_K)",
    ),
    "the last column of tiles": (FWD, "producer", 0, "0, pid_n + 1)", "0, pid_n)"),
    "no mask of a producer": (FWD, "producer", 0.3, "if MASK_X:", "if False:"),
    "the first columns' mask of a producer": (
        FWD,
        "producer",
        0.3,
        "rng_ptr, row, k, thr",
        "rng_ptr, row, 0, thr",
    ),
    "no mask in a producer's dX": (DX, "producer", 0.3, "if MASK_TAIL:", "if False:"),
    "the first columns' mask in a producer's dX": (
        DX,
        "producer",
        0.3,
        "rng_ptr, row, col, thr",
        "rng_ptr, row, 0, thr",
    ),
    "the forward's mask in a producer's dX": (
        DX,
        "producer",
        0.3,
        "None, None, None, rng, dropout_p",
        "None, None, rng, None, dropout_p",
    ),
    "no product": (
        "lora_shrink",
        "split",
        0,
        "tail_tile(x.to(dtype), dtype), tail_tile(a, dtype)",
        "tail_tile(x.to(dtype), dtype), tail_tile(0 * a, dtype)",
    ),
    "no mask in dA": (DAB, "split", 0.3, "if HAS_MASK:", "if False:"),
    "the last row of dA": (
        DAB,
        "split",
        0,
        "tl.range(first, M, STEP)",
        "tl.range(first, M - 5, STEP)",
    ),
    "a split of dA": (DAB, "split", 0, "range(SPLIT_M):", "range(SPLIT_M - 1):"),
    "strides of dA": (DAB, "split", 0, "[None, :] * K + offs_c", "[None, :] * (K - 1) + offs_c"),
    "one step of dbias": (DAB, "one", 0, "total += tl.sum(z", "total = tl.sum(z"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_kernel_turns_the_check_red(mistake, tmp_path):
    op, name, dropout_p, sound, broken = MISTAKES[mistake]
    config = (GEMMS | {"split": skinny(3), "one": skinny(1)})[name]
    # A rank of one step of the tail and a remainder, and N as large, so that no mistake in the
    # strides leaves the tensors.
    case = replace(SIZE, n=72, r=72, dtype=torch.float16, dropout_p=dropout_p)
    file = "linear_bwd" if op == DAB else "linear_fwd"
    file = "linear_producer" if name == "producer" else file
    source = Path(linear_fwd.__file__).with_name(f"{file}.py").read_text()
    assert sound in source, "the kernel has changed: say the mistake anew"
    path = tmp_path / f"broken_{file}.py"
    path.write_text(source.replace(sound, broken))
    spec = importlib.util.spec_from_file_location("lora_kernels.kernels.broken", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError, match="over the budget"):
        check(op, launch(op, config, module), case)


def test_vectors_and_tails_of_any_strides():
    inputs = replace(SIZE, r=24).draw()
    arguments = inputs.arguments("lora_linear_dab")
    run = launch("lora_linear_dab", skinny(2))
    strided = {name: LAYOUTS["strided"](arguments[name]) for name in ("s", "d")}
    for ours, expected in zip(run(**(arguments | strided)), run(**arguments), strict=True):
        assert torch.equal(ours, expected)
    arguments = inputs.arguments("lora_linear_fwd")
    run = launch("lora_linear_fwd", tile("tail"))
    every_other = torch.full((2 * SIZE.n,), float("nan"), device=DEVICE)[::2].copy_(inputs.bias)
    y, _ = run(**(arguments | {"bias": every_other, "out_scale": every_other}))
    expected, _ = run(**(arguments | {"out_scale": inputs.bias}))
    assert torch.equal(y, expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU test_gpu.py shows it with the real backend")
@pytest.mark.parametrize("gemm", ["in_loop", "tail", "producer", "preload"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_layer_trains_through_the_kernels(gemm, checkpointed, monkeypatch):
    """Nothing above the backend knows the kernels: with the library's functions replaced by their
    launches, layer, autograd and checkpointing compute the same step."""
    known = DeviceFacts("cuda", "sm_90", "sm_90", processors=4, shared_memory=232448)
    dropout_p = 0.3 * (gemm != "in_loop")
    layer = lk.FusedLoRALinear(40, 72, r=6, lora_dropout=dropout_p, init_lora_weights=False)
    x = torch.randn(3, 11, 40, requires_grad=True)

    def step():
        torch.manual_seed(1)
        y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), y.detach())]

    expected = step()
    launched = []

    def through_the_kernel(op, *args, masked, **kwargs):
        launched.append(op)
        problem = PROBLEM_OF[op](*args, **kwargs)
        plan = "skinny" if op in SKINNY_OPS else gemm
        return cuda.run_kernel(op, Config(plan), problem, known, *args, **kwargs)

    for op in OPERATORS:
        monkeypatch.setattr(vendor, op, functools.partial(through_the_kernel, op))
    with lk.force_plan("vendor"):
        results = step()
    for ours, theirs in zip(results, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    forward = ["lora_linear_fwd"] * (1 + checkpointed)
    assert launched == [*forward, "lora_linear_dx", "lora_linear_dab"]
