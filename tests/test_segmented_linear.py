"""The base linear of a batch that mixes adapters, and adapters by address: the operators on this
machine against float64, and their gradients."""

import sys
from dataclasses import replace

import pytest
import torch

import lora_kernels as lk
from lora_kernels import ops
from lora_kernels.device import facts
from lora_kernels.testing_segmented import SegmentedCase, check_segmented, naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPERATORS = ("segmented_linear_fwd", "segmented_linear_dx", "segmented_lora_pointers_")

# Two panels and a remainder of columns, two parts and a remainder of the inner axis, rows for two
# blocks of one slot, and live ranks of every kind.
RANKS = (33, 0, 1, 8, 80, 16)
SIZE = SegmentedCase(230, 300, (70, 129, 16), RANKS)

VARIANTS = {
    "plain": {},
    "packed": {"packed": True},
    "Conv1D and bias": {"fan_in_fan_out": True, "bias": True},
    "no base": {"weight": 0.0},
    "one slice": {"widths": (150,), "bias": True},
    "square": {"k": 150, "widths": (150,), "fan_in_fan_out": True},
    "strided": {"layout": "strided"},
    "transposed": {"layout": "transposed"},
    "sliced": {"layout": "sliced", "packed": True},
    "float32 adapters": {"adapter_dtype": torch.float32},
    "room beyond the live ranks": {"r_max": 90, "packed": True},
    "a table with room": {"spare": 40, "m": 33},
    "one slot": {"ranks": (20,)},
    "rank 256": {"m": 40, "ranks": (256, 4, 64, 256), "widths": (40, 24), "k": 40},
    "distinct": {"m": 33, "ranks": (8,) * 40},
    "two rows": {"m": 2},
    "one row": {"m": 1},
    "no rows": {"m": 0},
    "tiny": {"m": 5, "k": 3, "widths": (1, 2), "ranks": (1, 2, 1)},
}


@pytest.fixture(params=["native", "reference"])
def backend(request):
    """Calls inside are answered by this plan; its backend's name."""
    if request.param == "native" and facts("cpu").native in ("", "baseline"):
        pytest.skip("the planner prefers no native kernels in this process")
    with lk.force_plan(request.param):
        yield "cpu" if request.param == "native" else "reference"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("op", OPERATORS)
def test_operator(op, variant, dtype, backend):
    case = replace(SIZE, dtype=dtype, **VARIANTS[variant])
    check_segmented(op, getattr(ops, op), case, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "packed", "Conv1D and bias", "no base", "one row"])
@pytest.mark.parametrize("op", OPERATORS[:2])
def test_dropout(op, variant, dtype, backend):
    case = replace(SIZE, dtype=dtype, dropout_p=0.3, **VARIANTS[variant])
    check_segmented(op, getattr(ops, op), case, backend=backend)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_autograd(packed, dropout_p, backend):
    case = replace(SIZE, packed=packed, dropout_p=dropout_p, bias=True)
    inputs = case.draw()
    options = {"rng": inputs.rng, "dropout_p": dropout_p, "training": True}
    lora_b = inputs.lora_b
    if packed:
        lora_b = [torch.cat(lora_b, dim=1)]
        options["output_slices"] = case.widths
    tensors = [inputs.x, inputs.weight, inputs.bias, *inputs.lora_a, *lora_b]
    leaves = [t.requires_grad_() for t in tensors]
    a, b = (leaves[3], leaves[4]) if packed else (leaves[3:6], leaves[6:])
    x = inputs.x.view(10, 23, case.k)
    y = lk.segmented_linear(x, inputs.weight, a, b, inputs.seg, inputs.bias, **options)
    assert y.shape == (10, 23, sum(case.widths))
    dx, dw, dbias, *stacks = torch.autograd.grad(y, leaves, inputs.dy.view(y.shape))

    inputs = case.draw()
    expected, _ = naive(inputs, "segmented_linear_fwd", torch.float64)
    torch.testing.assert_close(y.flatten(0, 1).double(), expected, rtol=1e-4, atol=1e-4)
    expected, _ = naive(inputs, "segmented_linear_dx", torch.float64)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dw, inputs.dy.t() @ inputs.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dbias, inputs.dy.sum(0), rtol=1e-4, atol=1e-4)
    found = naive(inputs, "segmented_lora_dab", torch.float64)
    if packed:
        found = [found[0], torch.cat(found[1:], dim=1)]
    for gradient, expected in zip(stacks, found, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-3)


def test_a_frozen_x_and_frozen_stacks():
    inputs = replace(SIZE, m=20).draw()
    for need_x, need_a, need_b in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        a, b = ([t.detach().clone() for t in ts] for ts in (inputs.lora_a, inputs.lora_b))
        x = inputs.x.detach().clone().requires_grad_(bool(need_x))
        for t in a:
            t.requires_grad_(bool(need_a))
        for t in b:
            t.requires_grad_(bool(need_b))
        with lk.record_plans() as answers:
            lk.segmented_linear(x, inputs.weight, a, b, inputs.seg).backward(inputs.dy)
        asked = [answer.op for answer in answers]
        assert ("segmented_linear_dx" in asked) == bool(need_x)
        assert ("segmented_lora_dx" in asked) == (bool(need_a) and not need_x)
        assert ("segmented_lora_dab" in asked) == bool(need_a or need_b)
        assert (x.grad is not None) == bool(need_x)
        assert all((t.grad is not None) == bool(need_a) for t in a)
        assert all((t.grad is not None) == bool(need_b) for t in b)


def test_autocast_computes_in_its_dtype_and_gradients_keep_theirs():
    inputs = replace(SIZE, m=40, bias=True).draw()
    x, a = inputs.x.requires_grad_(), [t.requires_grad_() for t in inputs.lora_a]
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.segmented_linear(x, inputs.weight, a, inputs.lora_b, inputs.seg, inputs.bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and a[0].grad.dtype == torch.float32


@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op):
    inputs = SegmentedCase(9, 30, (25, 8), (4, 0, 3), bias=True).draw()
    torch.library.opcheck(getattr(ops, op), (), inputs.arguments(op))


def test_compiled():
    inputs = SegmentedCase(9, 30, (25, 8), (4, 0, 3), bias=True).draw()
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(x, weight, a, b, bias):
        return lk.segmented_linear(x, weight, a, b, inputs.seg, bias)

    arguments = (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    expected = lk.segmented_linear(*arguments, inputs.seg, inputs.bias)
    assert torch.equal(step(*arguments, inputs.bias), expected)


def test_pointers_take_tensors_where_they_are_and_copy_what_they_cannot_read():
    pointers = lk.AdapterPointers(2, 16, [8], 8, dtype=torch.float32)
    a, b = torch.randn(8, 16), torch.randn(8, 8)
    pointers.set_(0, a, b)
    assert pointers.table[0, 0].tolist() == [a.data_ptr(), 16, b.data_ptr(), 8, 8]
    pointers.set_(0, a.t().contiguous().t(), torch.randn(8, 8)[:, ::1])
    assert pointers.table[0, 0, 0] != a.data_ptr()
    # Rows of three floats do not begin on 16 bytes.
    pointers.set_(1, torch.randn(3, 16), torch.randn(8, 3))
    assert pointers.table[1, 0, 3:].tolist() == [4, 3]


def test_a_hot_swap_keeps_the_tables_address_and_empty_slots_are_no_adapter():
    pointers = lk.AdapterPointers(2, 16, [8], 8)
    seg = lk.SegmentTable.from_rows([0, 1, 0], [4, 8], [1.0, 2.0], max_rank=8)
    x, y = torch.randn(3, 16), torch.full((3, 8), -0.0)
    lk.segmented_lora(x, pointers, None, seg, out=y)
    assert torch.equal(y.view(torch.int32), torch.full((3, 8), -0.0).view(torch.int32))
    address = pointers.table.data_ptr()
    for seed in range(2):
        torch.manual_seed(seed)
        a, b = torch.randn(4, 16), torch.randn(8, 4)
        pointers.set_(0, a, b)
        y = torch.zeros(3, 8)
        lk.segmented_lora(x, pointers, None, seg, out=y)
        expected = x @ a.t() @ b.t()
        expected[1] = 0
        torch.testing.assert_close(y, expected)
    assert pointers.table.data_ptr() == address
    # A table's rank beyond what the slot points to is cut to it.
    seg.update_(rank_of_slot=[8, 8])
    again = torch.zeros(3, 8)
    lk.segmented_lora(x, pointers, None, seg, out=again)
    assert torch.equal(again, y)


def wrong_pointers(**change):
    arguments = {"slots": 2, "in_features": 16, "widths": [8], "max_rank": 8} | change
    return lk.AdapterPointers(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: wrong_pointers(slots=0), ValueError, "at least 1"),
        (lambda: wrong_pointers(widths=[]), ValueError, "at least 1"),
        (lambda: wrong_pointers(dtype=torch.int32), TypeError, "floating dtype"),
        (
            lambda: wrong_pointers().set_(2, torch.ones(1, 16), torch.ones(8, 1)),
            IndexError,
            "slot 2 is out of range",
        ),
        (
            lambda: wrong_pointers().set_(0, torch.ones(9, 16), torch.ones(8, 9)),
            ValueError,
            "must be in",
        ),
        (
            lambda: wrong_pointers().set_(0, torch.ones(2, 15), torch.ones(8, 2)),
            ValueError,
            "lora_a must be",
        ),
    ],
)
def test_wrong_pointers(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_wrong_calls():
    inputs = SegmentedCase(9, 30, (25,), (4, 3)).draw()
    x, w, a, b, seg = inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.seg
    y = torch.zeros(9, 25)
    pointers = inputs.pointers
    with pytest.raises(ValueError, match="weight must be"):
        lk.segmented_linear(x, w.t(), a, b, seg)
    with pytest.raises(ValueError, match="bias must be"):
        lk.segmented_linear(x, w, a, b, seg, torch.ones(24))
    with pytest.raises(TypeError, match="cast one of them"):
        lk.segmented_linear(x, w.half(), a, b, seg)
    with pytest.raises(ValueError, match="room for 9"):
        lk.segmented_linear(torch.ones(10, 30), w, a, b, seg)
    with pytest.raises(ValueError, match="lora_b=None, out="):
        lk.segmented_lora(x, pointers, None, seg)
    with pytest.raises(ValueError, match="lora_b=None, out="):
        lk.segmented_lora(x, pointers, b, seg, out=y)
    with pytest.raises(ValueError, match="the pointers are for"):
        lk.segmented_lora(x[:, :29], pointers, None, seg, out=y)
    with pytest.raises(ValueError, match="records no gradient"):
        lk.segmented_lora(x.clone().requires_grad_(), pointers, None, seg, out=y)
    with pytest.raises(TypeError, match="AdapterPointers only"):
        lk.segmented_lora(x, a, None, seg, out=y)
    assert not y.any()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its memory is but reserved there")
def test_stacks_of_more_than_2_31_elements():
    r, k = 16, 2048
    slots = 2**31 // (r * k) + 9
    a, b = (torch.empty(slots, *shape, dtype=torch.bfloat16) for shape in ((r, k), (k, r)))
    # Of all that memory only the last slot is ever touched.
    a[-1], b[-1] = torch.randn(r, k) / k**0.5, torch.randn(k, r)
    seg = lk.SegmentTable.from_rows([slots - 1, -1], [r] * slots, [1.0] * slots)
    x, weight = torch.randn(2, k).bfloat16(), torch.randn(k, k).bfloat16() / k**0.5
    y = lk.segmented_linear(x, weight, a, b, seg).double()
    exact = x.double() @ weight.double().t()
    exact[0] += x[0].double() @ a[-1].double().t() @ b[-1].double().t()
    assert (y - exact).abs().max() <= 0.01 * exact.abs().max()
