"""The base linear under adapters that differ from row to row: Triton's kernels against float64, as
``test_kernels_segmented.py`` has the other segmented operators."""

import functools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

# Below the skip: nothing of Triton's is imported where it is missing.
import segmented_kernels
from segmented_kernels import (
    DEVICE,
    DTYPES,
    GROUPED,
    LINEAR_CONFIGS,
    RANKS,
    assert_red,
    combinations,
    launch,
)

import lora_kernels as lk
from lora_kernels.backends import cuda, vendor
from lora_kernels.functional import segmented
from lora_kernels.kernels import linear_fwd
from lora_kernels.planning import plan as planner
from lora_kernels.planning.config import MIXED_LINEAR_OPS, Config
from lora_kernels.planning.device import DeviceFacts, facts
from lora_kernels.planning.validity import is_valid
from lora_kernels.spec import reference
from lora_kernels.spec.problem import PROBLEM_OF
from lora_kernels.spec.segments import SegmentTable
from lora_kernels.testing.segmented import SegmentedCase, check_segmented

pytestmark = segmented_kernels.SKIPS

FWD, DX = MIXED_LINEAR_OPS
TAIL, SPLIT = LINEAR_CONFIGS["tail"], LINEAR_CONFIGS["tail, split"]
VENDORS = [name for name in LINEAR_CONFIGS if name.startswith("vendor")]

# Tiles of 32 rows hold several slots each and a remainder; the longest rank takes three steps.
SIZE = SegmentedCase(70, 43, (37, 50), (70, *RANKS[1:]), device=DEVICE)

VARIANTS = {
    "plain": {},
    "packed": {"packed": True},
    "Conv1D and bias": {"fan_in_fan_out": True, "bias": True},
    "no base": {"weight": 0.0},
    "one slice": {"widths": (70,), "bias": True},
    "three slices": {"widths": (16, 33, 5), "packed": True},
    "square": {"k": 70, "widths": (70,), "fan_in_fan_out": True},
    "strided": {"layout": "strided"},
    "transposed": {"layout": "transposed"},
    "sliced": {"layout": "sliced", "packed": True},
    "float32 adapters": {"adapter_dtype": torch.float32},
    "room beyond the live ranks": {"r_max": 90, "packed": True},
    "a table with room": {"spare": 40, "m": 33},
    "one slot": {"ranks": (20,)},
    "rank 256": {"m": 33, "ranks": (256, 4, 64, 256), "widths": (40, 24), "k": 40},
    "distinct": {"m": 33, "ranks": (8,) * 40},
    "two rows": {"m": 2},
    "one row": {"m": 1},
    "no rows": {"m": 0},
    "tiny": {"m": 5, "k": 3, "widths": (1, 2), "ranks": (1, 2, 1)},
}
FEW = ["plain", "packed", "Conv1D and bias", "strided", "one row"]


@pytest.mark.parametrize(
    ("op", "variant", "dtype"), [*combinations(MIXED_LINEAR_OPS, VARIANTS)], ids=str
)
def test_tail(op, variant, dtype):
    check_segmented(op, launch(op, TAIL), replace(SIZE, dtype=dtype, **VARIANTS[variant]))


@pytest.mark.parametrize(("op", "variant", "dtype"), [*combinations(MIXED_LINEAR_OPS, FEW)])
def test_tail_with_a_split(op, variant, dtype):
    case = replace(SIZE, **({"m": 40, "dtype": dtype} | VARIANTS[variant]))
    check_segmented(op, launch(op, SPLIT), case)


@pytest.mark.parametrize(("op", "variant", "dtype"), [*combinations(MIXED_LINEAR_OPS, FEW)])
@pytest.mark.parametrize("name", ["tail", "vendor, grouped"])
def test_dropout(name, op, variant, dtype):
    case = replace(SIZE, dtype=dtype, dropout_p=0.3, **VARIANTS[variant])
    check_segmented(op, launch(op, LINEAR_CONFIGS[name]), case)


@pytest.mark.parametrize(
    ("op", "variant", "dtype"), [*combinations(MIXED_LINEAR_OPS, [*FEW, "no rows"])]
)
@pytest.mark.parametrize("name", VENDORS)
def test_adapters_onto_the_librarys_result(name, op, variant, dtype):
    config = LINEAR_CONFIGS[name if op == FWD else VENDORS[0]]
    check_segmented(op, launch(op, config), replace(SIZE, dtype=dtype, **VARIANTS[variant]))


def test_masks_of_dx_are_the_references_bit_for_bit():
    m, k, p = 70, 40, 0.4
    rng = torch.tensor([-7, 2**32 - 1, 5, 16], device=DEVICE)
    rows = torch.randperm(m)
    slots = [0, 1] * (m // 2)
    seg = SegmentTable.from_rows(slots, [k, k], [1.0] * 2, logical_row=rows, device=DEVICE)
    eye = torch.eye(k, device=DEVICE).expand(2, k, k)
    weight, dy = torch.zeros(3 * k, k, device=DEVICE), torch.ones(m, 3 * k, device=DEVICE)
    for j in range(3):
        mask = reference.dropout_mask(
            rng + torch.tensor([0, j, 0, 0], device=DEVICE), m, k, p, rows.to(DEVICE)
        )
        # Of the slices one has an adapter, whose product is one everywhere.
        b = [eye if i == j else torch.zeros_like(eye) for i in range(3)]
        dx, _ = launch(DX, TAIL)(dy, weight, [eye] * 3, b, seg.tensors(), rng=rng, dropout_p=p)
        assert torch.equal(dx != 0, mask)


@pytest.mark.parametrize("op", MIXED_LINEAR_OPS)
def test_bitwise_repeatable_and_counters_left_as_zeros(op, monkeypatch):
    made, sound = [], linear_fwd.counters

    def counters(device, needed):
        made.append(sound(device, needed))
        return made[-1]

    monkeypatch.setattr(linear_fwd, "counters", counters)
    arguments = replace(SIZE, m=20).draw().arguments(op)
    run = launch(op, SPLIT)
    first, second = run(**arguments), run(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert made and not any(c.any() for c in made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", MIXED_LINEAR_OPS)
def test_a_row_has_the_same_bits_in_every_batch(op, dtype, monkeypatch):
    """Base and adapter: alone, among others of its slot, and in another place."""
    segmented_kernels.rows_apart(monkeypatch)
    inputs = replace(SIZE, dtype=dtype).draw()
    given = inputs.arguments(op)
    name = "x" if op == FWD else "dy"

    def result(rows):
        table = inputs.seg
        seg = SegmentTable.from_rows(
            table.slot_of_row[rows], table.rank_of_slot, table.scale_of_slot
        )
        return launch(op, TAIL)(**given | {name: given[name][rows], "table": seg.tensors()})

    whole = result(torch.arange(70, device=DEVICE))
    for rows in ([69], [3, 57], list(range(69, -1, -2)), [64, *range(20, 60)]):
        rows = torch.tensor(rows, device=DEVICE)
        for ours, expected in zip(result(rows), whole, strict=True):
            assert torch.equal(ours, expected[rows])


@pytest.mark.parametrize("op", MIXED_LINEAR_OPS)
def test_an_infinite_adapter_is_its_own_rows_alone(op):
    inputs = SIZE.draw()
    given = inputs.arguments(op)
    expected, _ = launch(op, TAIL)(**given)
    for stacks in (inputs.lora_a, inputs.lora_b):
        for t in stacks:
            t[2][~t[2].isnan()] = float("inf")
    ours, _ = launch(op, TAIL)(**given)
    hit = inputs.seg.slot_of_row == 2
    assert hit.any() and not ours[hit].isfinite().any(dim=1).all()
    assert torch.equal(ours[~hit], expected[~hit])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("plan", ["tail", "vendor"])
@pytest.mark.parametrize("m", [5, 70])
def test_the_backend_launches_what_it_ships(arch, plan, m):
    shared = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}[arch]
    known = DeviceFacts("cuda", arch, arch, processors=4, shared_memory=shared)
    if DEVICE == "cuda":
        known = facts("cuda")
    for op, packed, dtype in ((FWD, False, torch.float16), (DX, True, torch.float32)):
        case = replace(SIZE, m=m, packed=packed, dtype=dtype)
        problem = PROBLEM_OF[op](**case.draw().arguments(op))._replace(aligned=False)
        assert is_valid(Config(plan), problem, known)
        run = functools.partial(cuda.run_kernel, op, Config(plan), problem, known)
        if plan == "vendor":
            onto = cuda.adapters_onto(problem.adapters(), known)
            run = functools.partial(getattr(vendor, op), onto=onto)
        if plan == "tail" and dtype == torch.float32 and known.arch == "sm_80":
            # Such tiles spill there, so that none is shipped and the library's GEMM answers.
            assert planner.plan(problem, known).plan == "vendor"
            with pytest.raises(ValueError, match="no tile of plan 'tail' can compute"):
                check_segmented(op, run, case)
            continue
        check_segmented(op, run, case)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU test_gpu.py shows it with the real backend")
def test_the_functional_layer_trains_through_the_kernels(monkeypatch):
    inputs = replace(SIZE, m=40, dropout_p=0.2, bias=True).draw()
    stacks = [t.nan_to_num() for t in (*inputs.lora_a, *inputs.lora_b)]
    leaves = [t.requires_grad_() for t in (inputs.x.clone(), *stacks)]

    def step():
        x, *rest = leaves
        y = lk.segmented_linear(
            x,
            inputs.weight,
            rest[:2],
            rest[2:],
            inputs.seg,
            inputs.bias,
            dropout_p=0.2,
            training=True,
            rng=inputs.rng,
        )
        return y, *torch.autograd.grad(y, leaves, inputs.dy)

    expected = step()
    launched = []
    for op in (FWD, DX, "segmented_lora_dab"):
        kernel = torch.no_grad()(launch(op, GROUPED if op not in MIXED_LINEAR_OPS else TAIL))

        def run(*args, op=op, kernel=kernel):
            launched.append(op)
            return kernel(*args)

        monkeypatch.setattr(segmented.ops, op, run)
    for ours, theirs in zip(step(), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert launched == [FWD, DX, "segmented_lora_dab"]


# Mistakes in the source: (operator, configuration, changes of the case, what it says, what it
# would say).
MISTAKES = {
    "no tail": (FWD, TAIL, {}, "acc += tl.where(own, tail, 0.0)", "acc += tl.where(own, 0.0, 0.0)"),
    "the first slot of a tile": (FWD, TAIL, {}, "place = following", "place = stop"),
    "the first slot's B": (
        FWD,
        TAIL,
        {},
        "matrix_of_slot(b_ptrs, strides_bt, slot, j,",
        "matrix_of_slot(b_ptrs, strides_bt, slot * 0, j,",
    ),
    "the first slice's B": (
        FWD,
        TAIL,
        {},
        "matrix_of_slot(b_ptrs, strides_bt, slot, j,",
        "matrix_of_slot(b_ptrs, strides_bt, slot, 0,",
    ),
    "every slot's B for every row": (
        FWD,
        TAIL,
        {},
        "tl.where(own, tail, 0.0)",
        "tail",
    ),
    "a slot's last row": (FWD, TAIL, {}, "offs_m < following", "offs_m < following - 1"),
    "rows not gathered": (
        FWD,
        TAIL,
        {},
        "rows = tl.load(table.order + offs_m, mask=inside, other=0).to(tl.int64)",
        "rows = offs_m.to(tl.int64)",
    ),
    "the last row": (
        FWD,
        TAIL,
        {},
        "rows, inside = offs_m.to(tl.int64), offs_m < M",
        "rows, inside = offs_m.to(tl.int64), offs_m < M - 1",
    ),
    "columns of the first slice": (FWD, TAIL, {}, "col, end = first + within", "col, end = within"),
    "no bias": (FWD, TAIL, {"bias": True}, "HAS_BIAS=bias is not None", "HAS_BIAS=False"),
    "no scale": (FWD, TAIL, {}, "acc * scale.to(tl.float32),", "acc,"),
    "no mask in the forward": (
        FWD,
        TAIL,
        {"dropout_p": 0.3},
        "x = tl.where(keep, x, 0.0)",
        "x += 0.0",
    ),
    "a tail from every split": (
        FWD,
        SPLIT,
        {"m": 40},
        "tl.where(split == 0, row + BLOCK_M, row)",
        "row + BLOCK_M",
    ),
    "strides swapped": (
        FWD,
        TAIL,
        {"widths": (70,)},
        "(b.row, b.last) if widths",
        "(b.last, b.row) if widths",
    ),
    "one slice of dX": (DX, TAIL, {}, "tl.range(0, SLICES, num", "tl.range(0, 1, num"),
    "no mask in dX": (DX, TAIL, {"dropout_p": 0.3}, "MASK_TAIL=tail_rng is", "MASK_TAIL=None is"),
    "one mask for all slices": (
        DX,
        TAIL,
        {"dropout_p": 0.3},
        "dropout_keep_rows(rng_ptr, i,",
        "dropout_keep_rows(rng_ptr, 0,",
    ),
    "a mask by place": (
        DX,
        TAIL,
        {"dropout_p": 0.3},
        "logical = tl.load(table.logical_row + rows, mask=inside, other=0)\n    place",
        "logical = offs_m\n    place",
    ),
    "the forward's mask position in dX": (
        DX,
        TAIL,
        {"dropout_p": 0.3, "widths": (43,)},
        "d = dx_shrink(dy, lora_b, table, dropout_p, config=shrink)",
        "d = segmented_shrink(dy, [t.transpose(1, 2) for t in lora_b], table, 0, rng, dropout_p, "
        "config=shrink)\n    rng = None",
    ),
    "packed by the largest rank": (
        DX,
        TAIL,
        {"packed": True, "r_max": 90},
        "b_ptr += (i * rank)",
        "b_ptr += (i * R)",
    ),
    "dX stored, not added to the library's": (
        DX,
        GROUPED,
        {},
        "*shared, add=True",
        "*shared, add=False",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_kernel_turns_the_check_red(mistake, tmp_path, monkeypatch):
    op, config, changes, sound, broken = MISTAKES[mistake]
    case = replace(SIZE, **{"dtype": torch.float16} | changes)
    assert_red((op, sound, broken), config, case, tmp_path, monkeypatch)
