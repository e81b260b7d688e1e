"""DoRA against its formula in float64, and against PEFT's layer."""

import pytest
import torch
import torch.nn.functional as F

from lora_kernels.functional.dora import dora_linear, dora_norm
from lora_kernels.spec import reference
from lora_kernels.testing.linear import Case, assert_within_budget

NAMES = ("x", "lora_a", "lora_b", "magnitude", "bias")


def formula(operands, dtype, mask):
    """y, and by autograd its gradients, in plain torch: the sum ``W + s B A`` exists here."""
    x, weight, a, b, m, scale, bias, dy = (
        None if t is None else t.detach().to(dtype) for t in operands
    )
    leaves = [t.requires_grad_() for t in (x, a, b, m, bias) if t is not None]
    whole = weight + scale * (b @ a)
    norm = whole.norm(dim=1).detach()
    masked = x if mask is None else x * mask.to(dtype)
    y = F.linear(x - masked, weight) + (m / norm) * F.linear(masked, whole)
    y = y if bias is None else y + bias
    return [y, *torch.autograd.grad(y, leaves, dy)]


def draw(case):
    inputs = case.draw()
    generator = torch.Generator().manual_seed(case.seed)
    length = dora_norm(
        inputs.weight, inputs.lora_a, inputs.lora_b, inputs.scale, case.fan_in_fan_out
    )
    m = length * (0.5 + torch.rand(case.n, generator=generator, dtype=length.dtype))
    return inputs, m.to(case.adapter_dtype or case.dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k", "r"), [(33, 70, 70, 5), (1, 40, 24, 16), (300, 65, 130, 3)]
)
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [
        (torch.float32, None),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, None),
        (torch.float16, torch.float32),
    ],
)
def test_formula(dtype, adapter_dtype, m, n, k, r, transposed, bias, dropout_p):
    case = Case(
        m, n, k, r, dtype, adapter_dtype, bias=bias, dropout_p=dropout_p, fan_in_fan_out=transposed
    )
    inputs, magnitude = draw(case)
    x, a, b, m, bias = (
        None if t is None else t.clone().requires_grad_()
        for t in (inputs.x, inputs.lora_a, inputs.lora_b, magnitude, inputs.bias)
    )
    y = dora_linear(
        x, inputs.weight, a, b, m, inputs.scale, bias,
        dropout_p=dropout_p, training=True, fan_in_fan_out=transposed, rng=inputs.rng,
    )  # fmt: skip
    y.backward(inputs.dy)
    leaves = [t for t in (x, a, b, m, bias) if t is not None]
    names = [
        "y",
        *(f"d{name}" for name, t in zip(NAMES, (x, a, b, m, bias), strict=True) if t is not None),
    ]
    weight = inputs.weight.t() if transposed else inputs.weight
    mask = inputs.mask()
    mask = None if mask is None else mask / (1 - dropout_p)
    operands = (inputs.x, weight, a, b, m, inputs.scale, bias, inputs.dy)
    exact, eager = formula(operands, torch.float64, mask), formula(operands, dtype, mask)
    for name, ours, low, high in zip(
        names, [y, *(t.grad for t in leaves)], eager, exact, strict=True
    ):
        assert_within_budget(f"{case} {name}", ours.detach(), low.detach(), high.detach())


def test_derivatives_in_float64():
    inputs, magnitude = draw(Case(3, 5, 4, 2, torch.float64))
    norm = dora_norm(inputs.weight, inputs.lora_a, inputs.lora_b, inputs.scale)
    leaves = [inputs.x, inputs.lora_a, inputs.lora_b, magnitude, inputs.bias]
    rng = torch.tensor([3, 4, 0, 0])

    def y(x, a, b, m, bias):
        # The norm is a constant of the gradients.
        return dora_linear(
            x, inputs.weight, a, b, m, inputs.scale, bias,
            dropout_p=0.3, training=True, rng=rng, norm=norm,
        )  # fmt: skip

    assert torch.autograd.gradcheck(y, [t.clone().requires_grad_() for t in leaves])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("transposed", [False, True])
def test_transformations_compute_the_same(transposed, dropout_p):
    inputs, magnitude = draw(
        Case(9, 8, 12, 2, torch.float64, dropout_p=dropout_p, fan_in_fan_out=transposed)
    )
    leaves = (inputs.x, inputs.lora_a, inputs.lora_b, magnitude, inputs.bias)

    def loss(x, a, b, m, bias):
        y = dora_linear(
            x, inputs.weight, a, b, m, inputs.scale, bias,
            dropout_p=dropout_p, training=True, fan_in_fan_out=transposed, rng=inputs.rng,
        )  # fmt: skip
        return (y * inputs.dy).sum()

    required = [t.clone().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(loss(*required), required)
    found = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4))(*leaves)
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other)


def test_frozen_inputs_have_the_same_gradients():
    """Where x needs no gradient, D is made without dX."""
    inputs, magnitude = draw(Case(33, 70, 70, 5))
    gradients = []
    for needs in (True, False):
        x = inputs.x.clone().requires_grad_(needs)
        a = inputs.lora_a.clone().requires_grad_()
        y = dora_linear(x, inputs.weight, a, inputs.lora_b, magnitude, inputs.scale)
        gradients.append(torch.autograd.grad(y, a, inputs.dy)[0])
    torch.testing.assert_close(*gradients)


def test_a_magnitude_of_zero_has_a_gradient():
    inputs, magnitude = draw(Case(9, 8, 12, 2))
    m = torch.zeros_like(magnitude).requires_grad_()
    y = dora_linear(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, m, 0.5, inputs.bias)
    assert torch.equal(y, inputs.bias.expand_as(y))
    y.backward(inputs.dy)
    assert m.grad.abs().min() > 0


def test_the_norm_of_a_row_that_the_adapter_cancels_is_not_nan():
    weight = torch.randn(6, 4)
    norm = dora_norm(weight, torch.eye(4), -weight, torch.tensor(1.0))
    assert not norm.isnan().any() and norm.max() < 1e-2
    assert reference.accumulate_dtype(torch.float32) == norm.dtype


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_is_computed_in_float32(dtype, transposed, autocast):
    """Of more rows than are converted at once, whatever autocast says."""
    n, k, r = 1100, 70, 5
    weight, a, b = torch.randn(n, k).to(dtype), torch.randn(r, k), torch.randn(n, r)
    scale = torch.tensor(0.75)
    exact = (weight.double() + 0.75 * b.double() @ a.double()).norm(dim=1)
    weight = weight.t().contiguous() if transposed else weight
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        norm = dora_norm(weight, a, b, scale, transposed)
    assert norm.dtype == torch.float32
    torch.testing.assert_close(norm.double(), exact, rtol=2e-6, atol=0)
