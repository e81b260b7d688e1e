"""Float16 rows: whatever fits float16 at the end is right, whatever S, D, A and B are on the way.

The Triton kernels' part is ``test_kernels_range.py``.
"""

import copy

import pytest
import torch
from float16_range import (
    FLOAT16,
    SIZES,
    RangeCase,
    SegmentedRangeCase,
    assert_fits,
    check_range,
    check_segmented_range,
)
from linear_calls import LEAVES, call, require_grad
from torch import nn

import lora_kernels as lk
from lora_kernels.functional import ops
from lora_kernels.layers.batches import Adapter, Batch, Owner, activate
from lora_kernels.spec import native
from lora_kernels.spec.reference import tail_dtype
from lora_kernels.testing.linear import naive

peft = pytest.importorskip("peft")

PLANS = ["reference", "vendor"] + ["native"] * (native.load() is not None)
SHAPES = {
    "plain": {},
    "dropout": {"dropout_p": 0.3},
    "no base": {"zero_weight": True, "bias": False},
    "transposed": {"fan_in_fan_out": True, "layout": "transposed"},
    "few rows, odd rank": {"m": 3, "r": 5, "dropout_p": 0.5},
}


def case_of(sizes, shape="plain", **changes):
    kept = {"m": 70, "n": 90, "k": 130, "r": 20} | SHAPES[shape] | changes
    return RangeCase(dtype=FLOAT16, sizes=SIZES[sizes], **kept)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("op", ops.OPERATORS)
def test_operators(op, sizes, shape, plan):
    with lk.force_plan(plan):
        backend = "reference" if plan == "reference" else "cpu"
        check_range(op, getattr(ops, op), case_of(sizes, shape), backend=backend)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_dx", "lora_linear_dab"])
def test_out_scale(op, plan):
    """Not even out_scale * dY has to fit."""
    with lk.force_plan(plan):
        for sizes in ("S above float16", "a scaled loss, small B"):
            case = case_of(sizes, out_scale=True, zero_weight=op == "lora_linear_dx")
            check_range(op, getattr(ops, op), case)


@pytest.mark.parametrize("plan", ["reference"] + ["native"] * ("native" in PLANS))
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("op", ops.SEGMENTED_OPERATORS)
def test_segmented_operators(op, sizes, plan):
    with lk.force_plan(plan):
        backend = "cpu" if plan == "native" else "reference"
        for changes in (
            {"dropout_p": 0.3 * ("_lora_" not in op)},
            {"packed": "expand" not in op, "weight": 0.0, "widths": (64, 30, 64)},
        ):
            kept = {"m": 40, "k": 70, "widths": (33, 7), "ranks": (5, 0, 33, 16, 3)} | changes
            case = SegmentedRangeCase(dtype=FLOAT16, sizes=SIZES[sizes], **kept)
            check_segmented_range(op, getattr(ops, op), case, backend=backend)


@pytest.mark.parametrize("plan", [None, *PLANS])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", SIZES)
def test_lora_linear_and_its_gradients(sizes, dropout_p, plan):
    inputs = case_of(sizes, dropout_p=dropout_p).draw()
    exact = naive(inputs, torch.float64)
    require_grad(inputs)
    with lk.force_plan(plan) if plan else torch.enable_grad():
        y = call(inputs)
        gradients = torch.autograd.grad(y, [getattr(inputs, name) for name in LEAVES], inputs.dy)
    assert_fits("y", y.detach(), exact["y"])
    for name, ours in zip(("dx", "da", "db", "dbias"), gradients, strict=True):
        assert_fits(name, ours, exact[name])


@pytest.mark.parametrize("sizes", SIZES)
def test_autocast_to_float16(sizes):
    inputs = case_of(sizes).draw()
    exact = naive(inputs, torch.float64)
    x, weight = (t.float().requires_grad_(t is inputs.x) for t in (inputs.x, inputs.weight))
    require_grad(inputs, ("lora_a", "lora_b"))
    with torch.autocast("cpu", FLOAT16):
        y = call(inputs, x=x, weight=weight)
    assert y.dtype == FLOAT16
    assert_fits("y", y.detach(), exact["y"])
    gradients = torch.autograd.grad(y, (x, inputs.lora_a, inputs.lora_b), inputs.dy)
    for name, ours in zip(("dx", "da", "db"), gradients, strict=True):
        # dX is computed in float16 before it is cast.
        assert_fits(name, ours.to(FLOAT16) if name == "dx" else ours, exact[name])


@pytest.mark.parametrize("sizes", SIZES)
def test_segmented_linear_and_its_gradients(sizes):
    case = SegmentedRangeCase(40, 70, (33, 7), (5, 0, 33, 16, 3), FLOAT16, sizes=SIZES[sizes])
    inputs = case.draw()
    leaves = [inputs.x, *inputs.lora_a, *inputs.lora_b]
    results = {}
    for dtype in (FLOAT16, torch.float64):
        x, *stacks = (
            t.detach().to(dtype if t is inputs.x or dtype == torch.float64 else t.dtype)
            for t in leaves
        )
        for t in (x, *stacks):
            t.requires_grad_()
        weight = inputs.weight.to(dtype)
        y = lk.segmented_linear(x, weight, stacks[:2], stacks[2:], inputs.seg)
        grads = torch.autograd.grad(y, (x, *stacks), inputs.dy.to(dtype))
        results[dtype] = [y.detach(), *grads]
    for number, (ours, exact) in enumerate(zip(*results.values(), strict=True)):
        assert_fits(f"result {number}", ours, exact)


@pytest.mark.parametrize("sizes", SIZES)
def test_shrink_hands_over_to_expand(sizes):
    case = SegmentedRangeCase(40, 70, (33, 7), (5, 0, 33, 16, 3), FLOAT16, sizes=SIZES[sizes])
    inputs = case.draw()
    s = lk.segmented_shrink(inputs.x, inputs.lora_a, inputs.seg)
    assert s.dtype == torch.float32
    delta = lk.segmented_expand(s, inputs.lora_b, inputs.seg)
    out = torch.zeros(40, 40, dtype=FLOAT16)
    assert lk.segmented_expand(s, inputs.lora_b, inputs.seg, out=out) is out
    torch.testing.assert_close(out, delta.half(), rtol=0, atol=0)
    assert out.isfinite().all() and out.any()
    with pytest.raises(ValueError, match="out is torch.bfloat16"):
        lk.segmented_expand(s, inputs.lora_b, inputs.seg, out=out.bfloat16())
    whole = lk.segmented_lora(inputs.x, inputs.lora_a, inputs.lora_b, inputs.seg)
    torch.testing.assert_close(whole, out, rtol=0, atol=0)


def test_the_other_dtypes_have_tails_of_their_own():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert tail_dtype(dtype) == dtype


def layers(scaling):
    """A float16 layer of PEFT's with float32 adapters, the same with our layer in its place, and
    one of ours."""
    base = nn.Sequential(nn.Linear(1024, 64, bias=False)).half()
    config = peft.LoraConfig(r=4, lora_alpha=4 * scaling, target_modules=["0"])
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    adapter = theirs.base_model.model[0]
    accelerated = copy.deepcopy(theirs)
    lk.accelerate_peft(accelerated)
    ours = lk.apply_lora(base, r=4, lora_alpha=4 * scaling, target_modules=["0"])
    for part in (adapter, accelerated.base_model.model[0]):
        yield part, part.lora_A["default"].weight, part.lora_B["default"].weight
    yield ours[0], ours[0].lora_A, ours[0].lora_B


@pytest.mark.parametrize(
    ("x_size", "scaling", "a_size", "b_size"),
    [(10, 16, 0.5, 1e-5), (1, 1e4, 1e-4, 1e-2), (1, 1, 1e5, 1e-9), (1, 1, 1e-9, 1e5)],
)
def test_layers_against_peft(x_size, scaling, a_size, b_size):
    x = (x_size * torch.rand(5, 1024)).half()
    a, b = a_size * torch.rand(4, 1024), b_size * torch.rand(64, 4)
    found = []
    for layer, lora_a, lora_b in layers(scaling):
        with torch.no_grad():
            lora_a.copy_(a)
            lora_b.copy_(b)
        rows = x.clone().requires_grad_()
        y = layer(rows)
        gradients = torch.autograd.grad(y, (rows, lora_a, lora_b), 100 * torch.ones_like(y))
        assert all(t.isfinite().all() for t in (y, *gradients))
        layer.merge()
        with torch.no_grad():
            found.append((y.detach(), *gradients, layer(x)))
    for ours in found[1:]:
        for one, other in zip(ours, found[0], strict=True):
            assert_fits("a layer", one, other.double())


@pytest.mark.parametrize(("a_size", "b_size"), [(1e5, 1e-6), (1e-8, 1e6)])
def test_an_embedding_of_a_mixed_batch(a_size, b_size):
    """Its A looked up, its B multiplied, in place and with gradients."""
    owner = Owner()
    layer = lk.MultiLoRAEmbedding.from_embedding(
        nn.Embedding(20, 24).half(), 2, 4, dtype=torch.float32, path="proj", owner=owner
    )
    with torch.no_grad():
        layer.lora_A.normal_().mul_(a_size)
        layer.lora_B.normal_().mul_(b_size)
    ids = torch.arange(12).view(3, 4)
    adapters = [Adapter("0", 0, {"proj": (4, 2.0)}, 0.0), Adapter("1", 1, {"proj": (3, 0.5)}, 0.0)]
    batch = Batch(adapters, 2, 4, [0, -1, 1])
    exact = layer.weight.double()[ids]
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    exact[0] += 2.0 * a[0, ids[0]] @ b[0].t()
    exact[2] += 0.5 * a[1, ids[2], :3] @ b[1, :, :3].t()
    for trains in (False, True):
        for stack in (layer.lora_A, layer.lora_B):
            stack.requires_grad_(trains)
        with activate(owner, batch):
            y = layer(ids)
        assert y.dtype == FLOAT16
        assert_fits("embedding", y.detach(), exact)
    y.sum().backward()
    assert layer.lora_A.grad.isfinite().all() and layer.lora_B.grad.isfinite().all()
