"""Wrong calls of the CPU extension's own operators: said with names and shapes, before anything is
computed."""

import pytest
import torch

from lora_kernels.spec import native
from lora_kernels.testing.linear import Case

pytestmark = pytest.mark.native
cpu_ops = torch.ops.lora_kernels_cpu


def wrong_calls():
    case = Case(5, 40, 64, 4, dropout_p=0.2, out_scale=True)
    inputs = case.draw()
    fwd, dx, dab, shrink = (
        inputs.arguments(f"lora_{name}")
        for name in ("linear_fwd", "linear_dx", "linear_dab", "shrink")
    )
    x, weight, a, b = inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b
    linear = [
        ({"weight": weight.t()}, ValueError, r"weight must be \[40, 64\], got \[64, 40\]"),
        ({"weight": weight, "fan_in_fan_out": True}, ValueError, r"weight must be \[64, 40\]"),
        ({"weight": weight.bfloat16()}, TypeError, "weight is BFloat16"),
        ({"lora_a": a[0]}, ValueError, "two dimensions"),
        ({"lora_b": b[:, :3]}, ValueError, r"\[40, 4\], got \[40, 3\]"),
        ({"packed": cpu_ops.pack(weight)[:-1]}, ValueError, "packed"),
        ({"packed": cpu_ops.pack(weight.bfloat16())}, ValueError, "packed"),
        ({"packed": cpu_ops.pack(weight).repeat(2)[::2]}, ValueError, "packed"),
        ({"out_scale": torch.ones(39)}, ValueError, r"out_scale must be \[40\], got \[39\]"),
        ({"out_scale": torch.ones(5, 1)}, ValueError, r"out_scale must be \[40\], got \[5, 1\]"),
        ({"out_scale": torch.ones(1)}, ValueError, r"out_scale must be \[40\], got \[1\]"),
    ]
    scaled = [
        ({"scale": torch.ones((), dtype=torch.float64)}, TypeError, "scale must be float32"),
        ({"scale": torch.ones(2)}, ValueError, r"one number, got \[2\]"),
    ]
    dropped = [
        ({"rng": torch.zeros(3).long()}, ValueError, "rng must be .*seed"),
        ({"rng": torch.zeros(4)}, TypeError, "rng must be int64"),
        ({"rng": torch.tensor([0, 0, 0, -1])}, ValueError, "col0"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1"),
        ({"dropout_p": -0.5}, ValueError, "dropout_p"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p"),
        ({"dropout_p": 1.0, "rng": None}, ValueError, "dropout_p"),
    ]
    rows = [
        ({"x": x[None]}, ValueError, "x"),
        ({"x": x[:, :63]}, ValueError, "63"),
        ({"x": x.int()}, TypeError, "Int"),
        ({"x": x.double()}, TypeError, "Double"),
    ]
    gradients = [
        ({"dy": inputs.dy[0]}, ValueError, r"dy must have two dimensions, got \[40\]"),
        ({"dy": inputs.dy.int()}, TypeError, "dy must be float32.*got Int"),
        ({"x": x[:4]}, ValueError, r"differ in rows: \[5, 40\], \[4, 64\]"),
        ({"d": dab["d"][:4]}, ValueError, "differ in rows"),
        ({"s": dab["s"][:4]}, ValueError, r"differ in rows: \[5, 40\], \[4, 4\]"),
        ({"x": None}, ValueError, "dA needs x and d"),
        ({"d": None}, ValueError, "dA needs x and d"),
        ({"s": None}, ValueError, "dB needs s"),
        ({"x": x.double()}, TypeError, "x must be float32.*got Double"),
        ({"s": dab["s"].int()}, TypeError, "s must be float32.*got Int"),
        ({"out_scale": torch.ones(39)}, ValueError, r"out_scale must be \[40\], got \[39\]"),
        ({"out_scale": torch.ones(5, 1)}, ValueError, r"out_scale must be \[40\], got \[5, 1\]"),
    ]
    forward = [
        ({"bias": torch.ones(39)}, ValueError, r"bias must be \[40\], got \[39\]"),
        ({"x": x.int(), "weight": weight.int()}, TypeError, "Int"),
        ({"lora_a": a[:, :63]}, ValueError, r"lora_a must be \[4, 64\], got \[4, 63\]"),
    ]
    backward = [
        ({"dy": inputs.dy[None]}, ValueError, "dy"),
        ({"dy": inputs.dy[:, :39]}, ValueError, "39"),
        ({"dy": inputs.dy.int()}, TypeError, "Int"),
    ]
    for op, arguments, changes in [
        ("lora_linear_fwd", fwd, [*linear, *scaled, *dropped, *rows, *forward]),
        ("lora_linear_dx", dx, [*linear, *scaled, *dropped, *backward]),
        ("lora_linear_dab", dab, [*dropped, *gradients]),
        ("lora_shrink", shrink, [*scaled, *dropped, *rows]),
    ]:
        for change, error, says in changes:
            yield pytest.param(op, arguments, change, error, says, id=f"{op}-{says}")


@pytest.mark.parametrize(
    ("op", "arguments", "change", "error", "says"), list(wrong_calls()) if native.load() else []
)
def test_wrong_calls(op, arguments, change, error, says):
    getattr(cpu_ops, op)(**arguments)
    with pytest.raises(error, match=says):
        getattr(cpu_ops, op)(**(arguments | change))


@pytest.mark.parametrize(
    ("b", "error", "says"),
    [
        (torch.zeros(2, 3).int(), TypeError, "b must be float32.*got Int"),
        (torch.zeros(2, 3).double(), TypeError, "got Double"),
        (torch.zeros(3), ValueError, r"two dimensions, got \[3\]"),
        (torch.zeros(1, 2, 3), ValueError, "two dimensions"),
    ],
)
def test_wrong_calls_of_pack(b, error, says):
    for call in (cpu_ops.pack, lambda b: cpu_ops.is_packed(b, torch.zeros(16))):
        with pytest.raises(error, match=says):
            call(b)
