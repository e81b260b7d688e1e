"""The way from ``layer(x)`` to the kernel, counted without a clock: the Python functions that one
call enters ('call' events of ``sys.setprofile``, generators and comprehensions among them, C
functions not). ``nn.Linear`` enters 5 before its kernel, PEFT's own layer 39."""

import sys

import pytest
import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.planning.device import facts

pytestmark = pytest.mark.skipif(not facts("cpu").native, reason="the kernels are not native")


def calls(layer, x):
    """The Python functions that a call of ``layer`` enters, once caches are warm."""
    entered = []

    def note(frame, event, argument):
        if event == "call":
            entered.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    for _ in range(3):
        layer(x)
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        layer(x)
    finally:
        sys.setprofile(before)
    return entered


def within(limit, entered):
    assert len(entered) <= limit, "\n".join([f"{len(entered)} calls:", *entered])
    # The whole way was counted.
    assert any(name.endswith("planning/answers.py:record") for name in entered)


@torch.no_grad()
@pytest.mark.parametrize("pack_weight", ["eval", "never"])
def test_a_fused_layer_in_evaluation(pack_weight):
    layer = lk.FusedLoRALinear(64, 48, r=8, pack_weight=pack_weight).eval()
    within(35, calls(layer, torch.randn(2, 8, 64)))


def test_a_fused_layer_in_training():
    within(30, calls(lk.FusedLoRALinear(64, 48, r=8), torch.randn(2, 8, 64)))


@pytest.fixture
def stored():
    """A layer of a store, inside a batch."""
    model = nn.Sequential(nn.Linear(64, 48)).eval()
    store = lk.AdapterStore(model, max_adapters=4, max_rank=8)
    state = {
        f"base_model.model.0.lora_{name}.weight": torch.randn(shape)
        for name, shape in (("A", (8, 64)), ("B", (48, 8)))
    }
    store.load("a", state, {"peft_type": "LORA", "r": 8, "target_modules": ["0"]})
    with store.batch(["a", None]):
        yield model[0]


@torch.no_grad()
def test_a_layer_of_a_store_in_a_cached_batch(stored):
    within(45, calls(stored, torch.randn(2, 8, 64)))


def changed(layer, name, axis):
    """``layer`` with a Parameter of another shape, one shorter along ``axis``."""
    held = getattr(layer, name)
    shorter = held.detach().narrow(axis, 0, held.shape[axis] - 1).clone()
    setattr(layer, name, nn.Parameter(shorter, requires_grad=False))
    return layer


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "axis"),
    [("weight", 0), ("weight", 1), ("bias", 0), *((f"lora_{x}", i) for x in "AB" for i in (0, 1))],
)
def test_a_parameter_of_another_shape_is_refused(name, axis, stored):
    layer, x = lk.FusedLoRALinear(64, 48, r=8).eval(), torch.randn(2, 8, 64)
    layer(x)
    with pytest.raises(ValueError, match="do not fit|must be"):
        changed(layer, name, axis)(x)
    stored(x)
    with pytest.raises(ValueError, match="must be|lora_A holds|lora_a|lora_b"):
        changed(stored, name, axis + name.startswith("lora"))(x)


WRONG = {"narrow": torch.ones(2, 63), "integers": torch.ones(2, 64).long(), "0-d": torch.ones(())}


@torch.no_grad()
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_x_is_refused(wrong, stored):
    for layer in (lk.FusedLoRALinear(64, 48, r=8).eval(), stored):
        with pytest.raises((ValueError, TypeError)):
            layer(WRONG[wrong])
