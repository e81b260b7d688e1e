"""``torch.func``, forward-mode derivatives, batches of gradients and repeated backward passes, over
the function and the layer."""

import pytest
import torch
import torch.nn.functional as F
from adapted_layers import adapted
from linear_calls import LEAVES, call, check_batches_of_gradients, require_grad
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import lora_kernels as lk
from lora_kernels.spec import reference
from lora_kernels.testing.linear import Case


def twin(layer):
    """The layer in plain torch, without dropout."""

    def forward(x, weight, lora_a, lora_b, bias):
        weight = weight.t() if layer.fan_in_fan_out else weight
        tail = F.linear(F.linear(x, lora_a), lora_b)
        return F.linear(x, weight, bias) + layer.scaling * tail

    return forward


TRANSFORMS = {
    "grad": lambda f, x, a: grad(lambda a: f(x, a).square().sum())(a),
    "vmap of grad": lambda f, x, a: vmap(
        grad(lambda a, x: f(x, a).square().sum()), in_dims=(None, 0)
    )(a, x),
    "vmap": lambda f, x, a: vmap(lambda x: f(x, a))(x),
    "vmap over adapters": lambda f, x, a: vmap(lambda a: f(x, a))(torch.stack([a, a * 2])),
    "jacrev": lambda f, x, a: jacrev(lambda a: f(x, a))(a),
    "jacfwd": lambda f, x, a: jacfwd(lambda a: f(x, a))(a),
    "jvp": lambda f, x, a: jvp(lambda x, a: f(x, a), (x, a), (x * 2, a * 3)),
    "vjp": lambda f, x, a: vjp(lambda x, a: f(x, a), x, a)[1](torch.ones(2, 3, 40)),
    "hessian": lambda f, x, a: hessian(lambda a: f(x, a).square().sum())(a),
    "hessian of x": lambda f, x, a: hessian(lambda x: f(x, a).square().sum())(x[0, 0]),
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transformations_of_the_layer(transform, kind, training, no_grad, merged):
    layer = adapted(kind).train(training)
    plain = twin(layer)
    weight, bias, lora_b = layer.weight, layer.bias, layer.lora_B.detach()
    x, a = torch.randn(2, 3, 24), layer.lora_A.detach()

    def ours(x, a):
        if merged:
            # A merged layer that knows of no adapter: only x is transformed.
            return layer(x) + 0 * a.sum()
        return functional_call(layer, {"lora_A": a}, (x,))

    def theirs(x, a):
        if merged:
            return plain(x, weight, layer.lora_A.detach(), lora_b, bias) + 0 * a.sum()
        return plain(x, weight, a, lora_b, bias)

    expected = transform(theirs, x, a)
    if merged:
        layer.merge()
    with torch.set_grad_enabled(not no_grad):
        y = transform(ours, x, a)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)


def test_per_sample_gradients_of_a_model():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    lk.apply_lora(model, r=2, init_lora_weights=False)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    x, classes = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    together = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, classes)
    for i in range(5):
        model.zero_grad()
        F.cross_entropy(model(x[i : i + 1]), classes[i : i + 1]).backward()
        for name, gradient in together.items():
            torch.testing.assert_close(gradient[i], model.get_parameter(name).grad)


def test_an_ensemble_of_layers():
    layers = [adapted().eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(5, 24)
    together = vmap(lambda p, b: functional_call(layers[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(together, torch.stack([layer(x) for layer in layers]))


def test_the_mask_under_a_transformation_is_the_kernels():
    inputs = Case(9, 12, 10, 3, dropout_p=0.4).draw()
    y = call(inputs)
    torch.testing.assert_close(jvp(lambda x: call(inputs, x=x), (inputs.x,), (inputs.x,))[0], y)
    require_grad(inputs)
    call(inputs).backward(inputs.dy)
    (gradient,) = vjp(lambda a: call(inputs, lora_a=a), inputs.lora_a.detach())[1](inputs.dy)
    torch.testing.assert_close(gradient, inputs.lora_a.grad)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_in_a_batch_of_calls(randomness):
    layer = adapted(lora_dropout=0.5).train()
    x = torch.ones(64, 24).expand(4, 64, 24)
    y = vmap(layer, randomness=randomness)(x)
    assert torch.equal(y[0], y[1]) == (randomness == "same")
    assert torch.isfinite(y).all()
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(layer)(x)


@pytest.mark.parametrize("grads", [False, True])
def test_forward_mode(grads):
    layer = adapted()
    x, dx = torch.randn(2, 5, 24)
    with torch.set_grad_enabled(grads), forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, dx))
        tangent = forward_ad.unpack_dual(y).tangent
    expected = F.linear(dx, layer.weight + layer.delta_weight())
    torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast(dtype):
    layer = adapted("linear", dtype)
    x = torch.randn(5, 24, dtype=dtype)
    y, _ = jvp(layer, (x,), (x,))
    exact, _ = reference.lora_linear_fwd(
        x, layer.weight, layer.lora_A, layer.lora_B, layer._scale, layer.bias
    )
    assert y.dtype == dtype and torch.equal(y, exact)
    wide = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = jvp(wide, (x.float(),), (x.float(),))
        assert cast.dtype == torch.bfloat16
        torch.testing.assert_close(cast, wide(x.float()), rtol=2e-2, atol=2e-2)


def test_compiled_transformations():
    torch._dynamo.reset()
    layer = adapted()
    x = torch.randn(5, 24)

    def gradient(x):
        return grad(lambda x: layer(x).square().sum())(x)

    compiled = torch.compile(gradient, backend="aot_eager")
    torch.testing.assert_close(compiled(x), gradient(x), rtol=1e-4, atol=1e-4)


def test_batches_of_gradients_where_the_base_trains():
    inputs = Case(6, 5, 7, 2).draw()
    leaves = [inputs.x.view(2, 3, 7), inputs.weight, inputs.lora_a, inputs.lora_b]
    x, *others = [leaf.requires_grad_() for leaf in leaves]
    check_batches_of_gradients(lk.lora_linear(x, *others, inputs.scale), leaves)


def test_second_derivatives_of_a_recorded_graph_are_refused():
    inputs = Case(3, 4, 5, 2).draw()
    require_grad(inputs, LEAVES)
    (dx,) = torch.autograd.grad(call(inputs).square().sum(), inputs.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("retain", [True, False])
def test_backward_twice(retain):
    inputs = Case(9, 12, 10, 3, dropout_p=0.2).draw()
    require_grad(inputs)
    y = call(inputs)
    y.backward(inputs.dy, retain_graph=True)
    first = {name: getattr(inputs, name).grad.clone() for name in LEAVES}
    y.backward(inputs.dy, retain_graph=retain)
    for name, gradient in first.items():
        assert torch.equal(getattr(inputs, name).grad, 2 * gradient)
    if not retain:
        with pytest.raises(RuntimeError, match="second time"):
            y.backward(inputs.dy)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_under_autocast_every_gradient_has_its_inputs_dtype(mixed, compiled):
    """dX leaves the operator in the compute dtype, and autograd casts it; with a weight that trains
    the node is the one in Python."""
    leaves = [torch.randn(s, requires_grad=True) for s in ((4, 8), (6, 8), (2, 8), (6, 2))]
    seg = lk.SegmentTable.from_rows([0, -1, 0, 0], [2], [1.0])

    def call(x, weight, a, b):
        if mixed:
            return lk.segmented_linear(x, weight, a[None], b[None], seg)
        return lk.lora_linear(x, weight, a, b)

    if compiled:
        torch.compiler.reset()
        call = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(*leaves)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), leaves)
    assert {t.dtype for t in gradients} == {torch.float32}
