"""The base linear of a batch that mixes adapters: its operators on this machine against float64,
and their gradients."""

import sys
from dataclasses import replace

import pytest
import torch

import lora_kernels as lk
from lora_kernels.functional import ops
from lora_kernels.planning.device import facts
from lora_kernels.testing.segmented import SegmentedCase, check_segmented, naive

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPERATORS = ("segmented_linear_fwd", "segmented_linear_dx")

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
@pytest.mark.parametrize("op", OPERATORS)
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
    overload = getattr(torch.ops.lora_kernels, op).default
    torch.library.opcheck(overload, (), inputs.arguments(op))


def test_compiled():
    inputs = SegmentedCase(9, 30, (25, 8), (4, 0, 3), bias=True).draw()
    torch.compiler.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def step(x, weight, a, b, bias):
        return lk.segmented_linear(x, weight, a, b, inputs.seg, bias)

    arguments = (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)
    expected = lk.segmented_linear(*arguments, inputs.seg, inputs.bias)
    assert torch.equal(step(*arguments, inputs.bias), expected)


def test_wrong_calls():
    inputs = SegmentedCase(9, 30, (25,), (4, 3)).draw()
    x, w, a, b, seg = inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, inputs.seg
    with pytest.raises(ValueError, match="weight must be"):
        lk.segmented_linear(x, w.t(), a, b, seg)
    with pytest.raises(ValueError, match="bias must be"):
        lk.segmented_linear(x, w, a, b, seg, torch.ones(24))
    with pytest.raises(TypeError, match="cast one of them"):
        lk.segmented_linear(x, w.half(), a, b, seg)
    with pytest.raises(ValueError, match="room for 9"):
        lk.segmented_linear(torch.ones(10, 30), w, a, b, seg)


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
