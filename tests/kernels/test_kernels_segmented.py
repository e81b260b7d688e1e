"""The segmented operators' Triton kernels against float64, as ``test_kernels.py`` has those of one
adapter: compiled on a GPU, in Triton's interpreter (a process of its own) elsewhere."""

import functools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

# Below the skip: nothing of Triton's is imported where it is missing.
import segmented_kernels
from segmented_kernels import (
    CONFIGS,
    DEVICE,
    DTYPES,
    GROUPED,
    SIZE,
    assert_red,
    combinations,
    launch,
)

import lora_kernels as lk
from lora_kernels.backends import cuda
from lora_kernels.functional import ops, segmented
from lora_kernels.kernels import segmented as forward
from lora_kernels.kernels import segmented_decode
from lora_kernels.planning.config import DECODE_OPS, MIXED_LINEAR_OPS, Config
from lora_kernels.planning.device import DeviceFacts, facts
from lora_kernels.planning.validity import is_valid
from lora_kernels.spec import reference
from lora_kernels.spec.problem import PROBLEM_OF
from lora_kernels.spec.segments import SegmentTable
from lora_kernels.testing.segmented import check_segmented

pytestmark = segmented_kernels.SKIPS

OPERATORS = [op for op in ops.SEGMENTED_OPERATORS if op not in MIXED_LINEAR_OPS]
DECODES = [name for name in CONFIGS if name.startswith("decode")]

VARIANTS = {
    "plain": {},
    "packed": {"packed": True},
    "one slice": {"widths": (70,)},
    "three slices": {"widths": (37, 70, 16)},
    "strided": {"layout": "strided"},
    "transposed": {"layout": "transposed"},
    "sliced": {"layout": "sliced", "packed": True},
    "float32 adapters": {"adapter_dtype": torch.float32},
    "room beyond the live ranks": {"r_max": 50, "packed": True},
    "whole vectors": {"k": 48, "widths": (64, 32), "ranks": (16, 8, 32, 3, 32)},
    "a table with room": {"spare": 40, "m": 33},
    # Several blocks of its rows, the last of them short.
    "one slot": {"ranks": (20,), "m": 100},
    "rank 256": {"m": 33, "ranks": (256, 4, 64, 256), "widths": (40, 24), "k": 40},
    "two rows": {"m": 2},
    "one row": {"m": 1},
    "no rows": {"m": 0},
    "tiny": {"m": 5, "k": 3, "widths": (1, 2), "ranks": (1, 2, 1)},
}


@pytest.mark.parametrize(("op", "variant", "dtype"), [*combinations(OPERATORS, VARIANTS)], ids=str)
def test_grouped(op, variant, dtype):
    case = replace(SIZE, dtype=dtype, **VARIANTS[variant])
    check_segmented(op, launch(op, CONFIGS["grouped"]), case)


@pytest.mark.parametrize("op", OPERATORS)
def test_grouped_without_a_split(op):
    case = replace(SIZE, dtype=torch.float16)
    check_segmented(op, launch(op, CONFIGS["grouped, whole"]), case)


@pytest.mark.parametrize(("op", "variant", "dtype"), [*combinations(DECODE_OPS, VARIANTS)], ids=str)
def test_decode(op, variant, dtype):
    case = replace(SIZE, **({"m": 33, "dtype": dtype} | VARIANTS[variant]))
    for name in DECODES:
        check_segmented(op, launch(op, CONFIGS[name]), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "packed", "strided", "one row"])
@pytest.mark.parametrize(
    "op", ["segmented_shrink", "segmented_lora", "segmented_lora_dx", "segmented_lora_dab"]
)
def test_dropout(op, variant, dtype):
    case = replace(SIZE, dtype=dtype, dropout_p=0.3, **VARIANTS[variant])
    check_segmented(op, launch(op, CONFIGS["grouped"]), case)


def test_dropout_masks_are_the_references_bit_for_bit():
    m, k, p = 70, 41, 0.4
    rng = torch.tensor([-7, 2**32 - 1, 5, 16], device=DEVICE)
    rows = torch.randperm(m)
    seg = SegmentTable.from_rows([0] * m, [k], [1.0], logical_row=rows, device=DEVICE)
    ones, eye = torch.ones(m, k, device=DEVICE), torch.eye(k, device=DEVICE)[None]
    dropout = {"rng": rng, "dropout_p": p}
    run = launch("segmented_shrink", GROUPED)
    s = run(ones, [eye] * 2, seg.tensors(), **dropout)
    zero = torch.zeros_like(eye)
    for j in range(2):
        shifted = rng + torch.tensor([0, j, 0, 0], device=DEVICE)
        mask = reference.dropout_mask(shifted, m, k, p, rows.to(DEVICE))
        assert torch.equal(s[:, j] != 0, mask)
        # Of the slices one has an adapter, whose product is one everywhere.
        b = [eye if i == j else zero for i in range(2)]
        dy = torch.ones(m, 2 * k, device=DEVICE)
        dx, _ = launch("segmented_lora_dx", GROUPED)(dy, [eye] * 2, b, seg.tensors(), **dropout)
        assert torch.equal(dx != 0, mask)
        # Column i of D is row i of the batch alone.
        d = torch.eye(m, device=DEVICE)[:, None].expand(m, 2, m)
        wide = SegmentTable.from_rows([0] * m, [m], [1.0], logical_row=rows, device=DEVICE)
        da, _ = launch("segmented_lora_dab", GROUPED)(
            dy, ones, None, d, wide.tensors(), [k] * 2, m, da_dtype=torch.float32, **dropout
        )
        assert torch.equal(da[j][0] != 0, mask)


@pytest.mark.parametrize("kept", [(1, 0), (0, 1), (0, 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_dab_computes_only_what_is_asked(kept, packed):
    arguments = replace(SIZE, packed=packed).draw().arguments("segmented_lora_dab")
    run = launch("segmented_lora_dab", GROUPED)
    whole = run(**arguments)
    part = dict(arguments)
    if not kept[0]:
        part |= {"da_dtype": None, "x": None, "d": None}
    if not kept[1]:
        part |= {"db_dtype": None, "s": None}
    for keep, ours, expected in zip(kept, run(**part), whole, strict=True):
        assert len(ours) == (len(expected) if keep else 0)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=False))


@pytest.mark.parametrize("name", CONFIGS)
def test_bitwise_repeatable_and_counters_left_as_zeros(name, monkeypatch):
    made = []
    sound = forward.counters

    def counters(device, needed):
        made.append(sound(device, needed))
        return made[-1]

    for module in (forward, segmented_decode):
        monkeypatch.setattr(module, "counters", counters)
    arguments = SIZE.draw().arguments("segmented_lora")
    run = launch("segmented_lora", CONFIGS[name])
    first, second = run(**arguments), run(**arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert made and not any(c.any() for c in made)


@pytest.fixture
def rows_apart(monkeypatch):
    segmented_kernels.rows_apart(monkeypatch)


@pytest.mark.usefixtures("rows_apart")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_has_the_same_bits_in_every_batch(name, dtype):
    """Alone, among others of its slot, and in another place of another batch."""
    inputs = replace(SIZE, dtype=dtype).draw()
    run = launch("segmented_lora", CONFIGS[name])

    def delta(rows):
        table = inputs.seg
        seg = SegmentTable.from_rows(
            table.slot_of_row[rows], table.rank_of_slot, table.scale_of_slot
        )
        return run(inputs.x[rows], inputs.lora_a, inputs.lora_b, seg.tensors())

    whole = delta(torch.arange(70, device=DEVICE))
    assert whole[0].any()
    for rows in ([69], [3, 57], list(range(69, -1, -2)), [64, *range(20, 60)]):
        rows = torch.tensor(rows, device=DEVICE)
        for ours, expected in zip(delta(rows), whole, strict=True):
            assert torch.equal(ours, expected[rows])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("plan", ["grouped", "decode"])
@pytest.mark.parametrize("m", [5, 70])
def test_the_backend_launches_what_it_ships(arch, plan, m):
    shared = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}[arch]
    known = DeviceFacts("cuda", arch, arch, processors=4, shared_memory=shared)
    if DEVICE == "cuda":
        known = facts("cuda")
    for op in OPERATORS:
        for packed, dtype in ((False, torch.float16), (True, torch.float32)):
            case = replace(SIZE, m=m, packed=packed, dtype=dtype)
            problem = PROBLEM_OF[op](**case.draw().arguments(op))
            if is_valid(Config(plan), problem, known):
                run = functools.partial(cuda.run_kernel, op, Config(plan), problem, known)
                check_segmented(op, run, case)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU test_gpu.py shows it with the real backend")
def test_the_functional_layer_trains_through_the_kernels(monkeypatch):
    inputs = replace(SIZE, m=40, dropout_p=0.2).draw()
    stacks = [t.nan_to_num() for t in (*inputs.lora_a, *inputs.lora_b)]
    leaves = [t.requires_grad_() for t in (inputs.x.clone(), *stacks)]

    def step():
        x, *rest = leaves
        y = lk.segmented_lora(
            x, rest[:2], rest[2:], inputs.seg, dropout_p=0.2, training=True, rng=inputs.rng
        )
        return y, *torch.autograd.grad(y, leaves, inputs.dy)

    expected = step()
    launched = []

    def launcher(op):
        def run(*args, **kwargs):
            launched.append(op)
            return launch(op, GROUPED)(*args, **kwargs)

        return run

    for op in ("segmented_lora", "segmented_lora_dx", "segmented_lora_dab"):
        monkeypatch.setattr(segmented.ops, op, no_grad(launcher(op)))
    for ours, theirs in zip(step(), expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert launched == ["segmented_lora", "segmented_lora_dx", "segmented_lora_dab"]


# Mistakes in the source: (operator, configuration, changes of the case, what it says, what it
# would say).
SHRINK, EXPAND, LORA, DX, DAB = (
    f"segmented_{name}" for name in ("shrink", "expand_", "lora", "lora_dx", "lora_dab")
)
IN_PLACE = "segmented_lora_"
MISTAKES = {
    "the first slot's scale": (
        LORA,
        "grouped",
        {},
        "scale_of_slot + slot",
        "scale_of_slot + 0 * slot",
    ),
    "no scale": (LORA, "grouped", {}, "acc * scale.to(tl.float32),", "acc,"),
    "the first slot's A": (
        LORA,
        "grouped",
        {},
        "slot.to(tl.int64) * pick(strides, j",
        "0 * pick(strides, j",
    ),
    "packed by the largest rank": (
        SHRINK,
        "grouped",
        {"packed": True, "r_max": 50},
        "a_ptr += (j * rank)",
        "a_ptr += (j * R)",
    ),
    "a split forgotten": (SHRINK, "grouped", {}, "range(SPLIT_K):", "range(SPLIT_K - 1):"),
    "rows not gathered": (
        SHRINK,
        "grouped",
        {},
        "tl.load(table.order + offs, mask=offs < stop, other=M)",
        "tl.where(offs < stop, offs, M)",
    ),
    "rows of the next slot": (
        IN_PLACE,
        "grouped",
        {},
        "offs = tl.where(live, first, bare)",
        "stop += 1\n    offs = tl.where(live, first, bare)",
    ),
    "what lies beyond the live rank": (
        EXPAND,
        "grouped",
        {},
        "tl.where((offs_r < rank)[None, :], tile, 0.0)",
        "tile",
    ),
    "one block of the rank": (
        EXPAND,
        "grouped",
        {},
        "tl.range(0, rank, BLOCK_R, num",
        "tl.range(0, 1, BLOCK_R, num",
    ),
    "the last columns of a slice": (
        EXPAND,
        "grouped",
        {},
        "passed += tl.cdiv(widths[j], BLOCK)",
        "passed += widths[j] // BLOCK",
    ),
    "no zeros for bare rows": (
        LORA,
        "grouped",
        {},
        "if (slot < 0) & (block < blocks):",
        "if slot < 0:",
    ),
    "stored, not added": (IN_PLACE, "grouped", {}, "    if ADD:", "    if False:"),
    "no mask": (SHRINK, "grouped", {"dropout_p": 0.3}, "x = tl.where(keep, x, 0.0)", "x += 0.0"),
    "one mask for all slices": (
        DX,
        "grouped",
        {"dropout_p": 0.3},
        "dropout_keep_rows(rng_ptr, j,",
        "dropout_keep_rows(rng_ptr, 0,",
    ),
    "a mask by place": (
        SHRINK,
        "grouped",
        {"dropout_p": 0.3},
        "tl.load(table.logical_row + rows, mask=inside, other=0)",
        "rows",
    ),
    "one slice of dX": (DX, "grouped", {}, "acc += tail", "acc = tail"),
    "dY of the first slice": (DX, "grouped", {}, "pick(columns, j, SLICES)", "0"),
    "no mask in dA": (
        DAB,
        "grouped",
        {"dropout_p": 0.3},
        "HAS_MASK=rng is not None",
        "HAS_MASK=False",
    ),
    "the last row of a slot": (
        DAB,
        "grouped",
        {},
        "inside = offs < stop",
        "inside = offs < stop - 1",
    ),
    "dead rows of a packed dA": (
        DAB,
        "grouped",
        {"packed": True},
        "rank + offs_r, dead)",
        "rank + offs_r, j * rank + offs_r)",
    ),
    "S of the first slice": (DAB, "grouped", {}, "s_ptr + j * stride_sj", "s_ptr"),
    "a share of K forgotten": (LORA, "decode", {}, "range(SPLIT_K):", "range(SPLIT_K - 1):"),
    "the whole rank but one block": (IN_PLACE, "decode", {}, "if PARTS > 1:", "if PARTS > 9:"),
    "one tile of a chunk": (
        LORA,
        "decode",
        {"m": 70},
        "stop = tl.minimum((within + 1) * CHUNK, width)",
        "stop = within * CHUNK + 1",
    ),
    "no scale in the decode": (LORA, "decode", {}, "acc * scale, 0.0", "acc, 0.0"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_kernel_turns_the_check_red(mistake, tmp_path, monkeypatch):
    op, name, changes, sound, broken = MISTAKES[mistake]
    case = replace(SIZE, dtype=torch.float16, **changes)
    config = replace(CONFIGS[name], chunk=64)
    assert_red((op, sound, broken), config, case, tmp_path, monkeypatch)


def no_grad(function):
    return torch.no_grad()(function)
