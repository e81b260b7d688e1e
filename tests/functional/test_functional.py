"""``lora_linear``: autograd over the operators, shapes, dtypes, autocast, checkpointing, compile,
and wrong calls."""

import itertools
import subprocess
import sys
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from linear_calls import LEAVES, call, require_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lora_kernels as lk
from lora_kernels.testing.linear import Case, assert_within_budget, naive, poisoned_memory

GRADIENTS = {"x": "dx", "lora_a": "da", "lora_b": "db", "bias": "dbias"}


CASES = [
    Case(33, 65, 40, 3),
    Case(130, 200, 264, 24, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.1),
    Case(130, 200, 264, 24, torch.float16, dropout_p=0.5, fan_in_fan_out=True),
    Case(33, 65, 40, 3, torch.float64, dropout_p=0.3),
    Case(33, 48, 48, 100, torch.bfloat16, bias=False, zero_weight=True, fan_in_fan_out=True),
    Case(40, 33, 65, 8, layout="strided"),
    Case(40, 33, 65, 8, torch.bfloat16, layout="transposed", dropout_p=0.2),
    Case(1, 64, 64, 8),
    Case(0, 6, 5, 2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients_keep_the_budget(case):
    inputs = case.draw()
    require_grad(inputs)
    exact, eager = naive(inputs, torch.float64), naive(inputs, case.dtype)
    with poisoned_memory(), lk.record_plans() as answers:
        y = call(inputs)
        y.backward(inputs.dy)
    assert y.dtype == case.dtype
    assert_within_budget("y", y, eager["y"], exact["y"])
    for leaf, gradient in GRADIENTS.items():
        tensor = getattr(inputs, leaf)
        if tensor is not None:
            assert tensor.grad.dtype == tensor.dtype
            assert_within_budget(gradient, tensor.grad, eager[gradient], exact[gradient])
    backend = "reference" if case.dtype == torch.float64 else "cpu"
    assert [a.op for a in answers] == ["lora_linear_fwd", "lora_linear_dx", "lora_linear_dab"]
    assert {a.backend for a in answers} == {backend}


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_gradcheck(dropout_p, fan_in_fan_out):
    case = Case(4, 5, 5, 2, torch.float64, dropout_p=dropout_p, fan_in_fan_out=fan_in_fan_out)
    inputs = case.draw()
    leaves = (*LEAVES, "weight")
    require_grad(inputs, leaves)
    assert torch.autograd.gradcheck(
        lambda *tensors: call(inputs, **dict(zip(leaves, tensors, strict=True))),
        [getattr(inputs, name) for name in leaves],
    )


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 3, 4), (2, 0, 3)])
def test_any_leading_dimensions(lead):
    inputs = Case(1, 6, 5, 2).draw()
    x = torch.randn(*lead, 5, requires_grad=True)
    y = call(inputs, x=x)
    assert y.shape == (*lead, 6)
    y.sum().backward()
    flat = x.detach().reshape(-1, 5).requires_grad_()
    expected = call(inputs, x=flat)
    expected.sum().backward()
    assert torch.equal(y.reshape(-1, 6), expected)
    assert torch.equal(x.grad.reshape(-1, 5), flat.grad)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x.permute(1, 0, 2).contiguous().permute(1, 0, 2),
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x.flip(0),
    ],
)
def test_any_strides_of_x_and_of_its_gradient(view):
    inputs = Case(1, 6, 8, 2).draw()
    base = torch.randn(4, 6, 8, requires_grad=True)
    y = call(inputs, x=view(base))
    # A gradient of stride 0, as sum() makes it.
    y.sum().backward()
    copy = base.detach().clone().requires_grad_()
    call(inputs, x=view(copy).contiguous()).backward(torch.ones_like(y))
    torch.testing.assert_close(base.grad, copy.grad)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4)), ids=str)
def test_only_the_needed_gradients_are_computed_and_saved(needed):
    inputs = Case(9, 12, 10, 3, dropout_p=0.2).draw()
    wanted = [name for name, need in zip(LEAVES, needed, strict=True) if need]
    exact = naive(inputs, torch.float64)
    require_grad(inputs, wanted)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = call(inputs)
    assert y.requires_grad == bool(wanted)
    shapes = [
        tuple(t.shape) for t in saved if t.dim() == 2 and not any(t is p for p in (inputs.weight,))
    ]
    assert ((9, 10) in shapes) == needed[1], "x is saved for dA alone"
    assert ((9, 3) in shapes) == needed[2], "S is saved for dB alone"
    if not wanted:
        return
    with lk.record_plans() as answers:
        y.backward(inputs.dy)
    ran = {answer.op for answer in answers}
    assert ("lora_linear_dx" in ran) == needed[0]
    assert ("lora_shrink" in ran) == (needed[1] and not needed[0])
    assert ("lora_linear_dab" in ran) == any(needed[1:])
    for name in wanted:
        torch.testing.assert_close(
            getattr(inputs, name).grad.double(), exact[GRADIENTS[name]], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_saved_but_x_and_s(dtype):
    inputs = Case(64, 96, 80, 8, dtype, adapter_dtype=torch.float32, dropout_p=0.1).draw()
    require_grad(inputs)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(inputs)
    parameters = {inputs.weight.data_ptr(), inputs.lora_a.data_ptr(), inputs.lora_b.data_ptr()}
    others = [t for t in saved if t.data_ptr() not in parameters and t.numel() > 4]
    assert sorted(tuple(t.shape) for t in others) == [(64, 8), (64, 80)]
    assert any(t.data_ptr() == inputs.x.data_ptr() for t in others), "x itself, not a copy"


def test_a_layer_that_is_a_view_of_three_leading_dimensions_saves_x_itself():
    inputs = Case(1, 6, 8, 2).draw()
    require_grad(inputs)
    x = torch.randn(4, 3, 8).transpose(0, 1).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(inputs, x=x)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_trained_base_weight_gets_its_gradient():
    inputs = Case(9, 12, 10, 3, fan_in_fan_out=True).draw()
    inputs.weight.requires_grad_()
    call(inputs).backward(inputs.dy)
    torch.testing.assert_close(inputs.weight.grad, inputs.x.t() @ inputs.dy)


def test_changing_a_saved_tensor_in_place_is_an_error():
    inputs = Case(3, 4, 5, 2).draw()
    require_grad(inputs, ("lora_a",))
    y = call(inputs)
    inputs.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(use_reentrant):
    inputs = Case(33, 40, 48, 8, dropout_p=0.5).draw()
    require_grad(inputs)
    gradients = []
    for run in (lambda x: call(inputs, x=x, rng=None), None):
        torch.manual_seed(5)
        if run is None:
            y = checkpoint(
                lambda x: call(inputs, x=x, rng=None), inputs.x, use_reentrant=use_reentrant
            )
        else:
            y = run(inputs.x)
        y.backward(inputs.dy)
        gradients.append([getattr(inputs, name).grad.clone() for name in LEAVES])
        for name in LEAVES:
            getattr(inputs, name).grad = None
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_follows_torchs_generator():
    inputs = Case(33, 40, 48, 8, dropout_p=0.5).draw()
    torch.manual_seed(7)
    first, second = call(inputs, rng=None), call(inputs, rng=None)
    torch.manual_seed(7)
    assert torch.equal(call(inputs, rng=None), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("arguments", [{"training": False}, {"dropout_p": 0.0}])
def test_no_dropout_outside_training(arguments):
    inputs = Case(33, 40, 48, 8, dropout_p=0.5).draw()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    y = call(inputs, **arguments)
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = F.linear(inputs.x, inputs.weight + 0.75 * inputs.lora_b @ inputs.lora_a, inputs.bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_dropout_does_not_touch_the_base():
    inputs = Case(33, 40, 48, 8, dropout_p=0.5).draw()
    y = call(inputs, lora_b=torch.zeros_like(inputs.lora_b))
    assert torch.equal(y, F.linear(inputs.x, inputs.weight, inputs.bias))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(x_dtype, weight_dtype):
    case = Case(33, 65, 40, 8, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.1)
    inputs = case.draw()
    exact, eager = naive(inputs, torch.float64), naive(inputs, torch.bfloat16)
    x = inputs.x.to(x_dtype).requires_grad_()
    require_grad(inputs, ("lora_a", "lora_b"))
    saved = []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = call(inputs, x=x, weight=inputs.weight.to(weight_dtype))
    assert y.dtype == torch.bfloat16
    assert any(t.data_ptr() == x.data_ptr() for t in saved), (
        "x is saved as it was given, not as a cast copy"
    )
    y.backward(inputs.dy)
    assert (x.grad.dtype, inputs.lora_a.grad.dtype, inputs.lora_b.grad.dtype) == (
        x_dtype,
        *[torch.float32] * 2,
    )
    for name, ours in {
        "y": y,
        "dx": x.grad,
        "da": inputs.lora_a.grad,
        "db": inputs.lora_b.grad,
    }.items():
        assert_within_budget(name, ours, eager[name], exact[name])


def test_autocast_leaves_float64_alone():
    inputs = Case(3, 4, 5, 2, torch.float64).draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(inputs)
    assert y.dtype == torch.float64
    assert torch.equal(y, call(inputs))


def test_scale_is_a_float_or_a_tensor():
    inputs = Case(3, 4, 5, 2).draw()
    expected = call(inputs, scale=0.3)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(call(inputs, scale=torch.tensor(0.3, dtype=dtype)), expected)


COMPILED = [
    {"dropout_p": 0.0},
    {"dropout_p": 0.3},
    {"fan_in_fan_out": True, "dtype": torch.bfloat16, "adapter_dtype": torch.float32},
]


@pytest.mark.slow
@pytest.mark.parametrize("variant", COMPILED, ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_dynamic(variant, backend):
    torch._dynamo.reset()
    compiled = torch.compile(lk.lora_linear, fullgraph=True, dynamic=True, backend=backend)
    for m in (4, 7, 33):
        inputs = Case(m, 12, 10, 3, **variant).draw()
        require_grad(inputs)
        results = []
        for function in (lk.lora_linear, compiled):
            arguments = {
                "scale": inputs.scale,
                "bias": inputs.bias,
                "dropout_p": inputs.case.dropout_p,
                "training": True,
                "fan_in_fan_out": inputs.case.fan_in_fan_out,
                "rng": inputs.rng,
            }
            y = function(inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, **arguments)
            y.backward(inputs.dy)
            results.append([y.detach()] + [getattr(inputs, name).grad for name in LEAVES])
            for name in LEAVES:
                getattr(inputs, name).grad = None
        for eager, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)


def test_compiled_scale_and_batch_sizes_do_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lk.lora_linear, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    # No two sizes alike: under dynamic=True torch takes equal sizes for the same symbol.
    for m, scale in itertools.product((2, 5, 8, 17), (0.5, 1.0, 2.0)):
        inputs = Case(m, 12, 10, 3).draw()
        y = compiled(
            inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, torch.tensor(scale), inputs.bias
        )
        torch.testing.assert_close(y, call(inputs, scale=scale))
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_compiled_dropout_drops():
    torch._dynamo.reset()
    compiled = torch.compile(lk.lora_linear, fullgraph=True, backend="aot_eager")
    eye = torch.eye(64)
    y = compiled(torch.ones(128, 64), torch.zeros(64, 64), eye, eye, dropout_p=0.25, training=True)
    assert abs((y == 0).double().mean().item() - 0.25) < 0.03
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3]))


def test_inference_mode_and_meta():
    inputs = Case(3, 4, 5, 2).draw()
    with torch.inference_mode():
        assert torch.equal(call(inputs), call(inputs))
    meta = [t.to("meta") for t in (inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b)]
    assert lk.lora_linear(*meta).shape == (3, 4)


WRONG = {
    "x too narrow": ({"x": torch.ones(2, 4)}, ValueError, r"x \[2, 4\], weight \[4, 5\]"),
    "x is a scalar": ({"x": torch.ones(())}, ValueError, r"x \[\]"),
    "weight transposed": (
        {"weight": torch.ones(5, 4)},
        ValueError,
        r"weight \[N, K\].*weight \[5, 4\]",
    ),
    "fan_in_fan_out of the wrong weight": (
        {"fan_in_fan_out": True},
        ValueError,
        r"weight \[K, N\]",
    ),
    "lora_a transposed": ({"lora_a": torch.ones(5, 2)}, ValueError, r"lora_a \[5, 2\]"),
    "ranks differ": ({"lora_b": torch.ones(4, 3)}, ValueError, r"lora_b \[4, 3\]"),
    "3-D lora_b": ({"lora_b": torch.ones(1, 4, 2)}, ValueError, r"lora_b \[1, 4, 2\]"),
    "rank 0": ({"lora_a": torch.ones(0, 5), "lora_b": torch.ones(4, 0)}, ValueError, "rank is 0"),
    "bias too long": ({"bias": torch.ones(5)}, ValueError, r"\[N\] = \[4\], not \[5\]"),
    "bias 2-D": ({"bias": torch.ones(1, 4)}, ValueError, r"not \[1, 4\]"),
    "p of 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), not 1.0"),
    "p negative": ({"dropout_p": -0.1}, ValueError, "dropout_p"),
    "p NaN": ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
    "x is an array": ({"x": [[1.0] * 5]}, TypeError, "x must be a tensor, not list"),
    "x of integers": (
        {"x": torch.ones(3, 5, dtype=torch.int64)},
        TypeError,
        "x must be a floating tensor",
    ),
    "weight of integers": (
        {"weight": torch.ones(4, 5, dtype=torch.int8)},
        TypeError,
        "weight must be a floating",
    ),
    "complex lora_a": (
        {"lora_a": torch.ones(2, 5, dtype=torch.complex64)},
        TypeError,
        "lora_a must be a floating",
    ),
    "x and weight differ": (
        {"x": torch.ones(3, 5).half()},
        TypeError,
        "x is torch.float16 and weight is torch.float32",
    ),
    "other device": (
        {"lora_b": torch.ones(4, 2, device="meta")},
        ValueError,
        "lora_b is on meta, x on cpu",
    ),
    "scale of a shape": (
        {"scale": torch.ones(1)},
        ValueError,
        r"0-d floating tensor, not torch.float32 \(1,\)",
    ),
    "scale of integers": ({"scale": torch.tensor(2)}, ValueError, "0-d floating tensor"),
    "scale that trains": (
        {"scale": torch.tensor(2.0, requires_grad=True)},
        ValueError,
        "scale requires grad",
    ),
    "rng of a shape": (
        {"rng": torch.zeros(3, dtype=torch.int64), "dropout_p": 0.5},
        ValueError,
        r"rng must be int64 \[4\]",
    ),
    "rng of floats": ({"rng": torch.zeros(4), "dropout_p": 0.5}, ValueError, "rng must be int64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_call_names_what_is_wrong(name):
    changes, error, message = WRONG[name]
    inputs = Case(3, 4, 5, 2).draw()
    with pytest.raises(error, match=message):
        call(inputs, **({"training": True} | changes))


def test_no_warning_in_a_training_step():
    inputs = Case(3, 4, 5, 2, dropout_p=0.1).draw()
    require_grad(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(inputs, rng=None).sum().backward()


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_a_mode_sees_the_operators(dropout_p):
    """Eager calls take a shorter way to the same backend; a dispatch mode sees the operators."""

    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(function.name())
            return function(*args, **(kwargs or {}))

    inputs = Case(5, 6, 7, 2, dropout_p=dropout_p).draw()
    inputs.lora_a.requires_grad_()
    with lk.record_plans() as direct:
        y = call(inputs)
        y.backward(inputs.dy)
    gradient, inputs.lora_a.grad = inputs.lora_a.grad, None
    with lk.record_plans() as observed, Seen() as seen:
        again = call(inputs)
        again.backward(inputs.dy)
    expected = ["lora_linear_fwd", "lora_shrink", "lora_linear_dab"]
    assert [name for name in seen.names if name.startswith("lora_kernels::")] == [
        f"lora_kernels::{name}" for name in expected
    ]
    assert [answer.op for answer in direct] == expected and direct == observed
    assert torch.equal(y, again) and torch.equal(gradient, inputs.lora_a.grad)


def test_gradients_enabled_in_inference_mode_are_of_no_effect():
    inputs = Case(5, 6, 7, 2).draw()
    arguments = (inputs.x, inputs.weight, inputs.lora_a.requires_grad_(), inputs.lora_b)
    with torch.inference_mode():
        expected = lk.lora_linear(*arguments)
        with torch.enable_grad():
            y = lk.lora_linear(*arguments)
    assert torch.equal(y, expected) and not y.requires_grad
    assert lk.last_plan().op == "lora_linear_fwd"


def test_the_default_device_is_not_that_of_the_operands():
    """Nor is anything kept from such a call that another one would stumble over."""
    inputs = Case(5, 6, 7, 2).draw()
    arguments = (inputs.x, inputs.weight, inputs.lora_a.requires_grad_(), inputs.lora_b)
    merged = lk.FusedLoRALinear(7, 6, r=2).eval()
    merged.merge()
    with torch.device("meta"):
        y = lk.lora_linear(*arguments, 0.321)
        y.backward(inputs.dy)
        with torch.no_grad():
            assert lk.lora_linear(*arguments, 0.321).device.type == "cpu"
            assert merged(inputs.x).device.type == "cpu"
    assert torch.equal(lk.lora_linear(*arguments, 0.321), y)
    assert inputs.lora_a.grad.abs().max() > 0


@pytest.mark.slow
def test_imported_under_another_default_device():
    # In a process of its own: what this module shares with the C++ is made once.
    code = (
        "import torch; torch.set_default_device('meta'); import lora_kernels as lk; "
        "layer = lk.FusedLoRALinear(8, 4, r=2, device='cpu'); "
        "layer(torch.ones(3, 8, device='cpu')).sum().backward(); "
        "assert layer.lora_B.grad.abs().max() > 0"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_scale_of_inference_mode_trains_later():
    inputs = Case(5, 6, 7, 2).draw()
    arguments = (inputs.x, inputs.weight, inputs.lora_a.requires_grad_(), inputs.lora_b)
    with torch.inference_mode():
        lk.lora_linear(*arguments, 0.123)
    lk.lora_linear(*arguments, 0.123).backward(inputs.dy)
    assert inputs.lora_a.grad.abs().max() > 0
