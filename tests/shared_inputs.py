"""A module whose projections of one input are computed together, and one that computes each by
itself."""

import copy

import torch
from torch import nn

import lora_kernels as lk
from lora_kernels.layers import shared_input

TOGETHER = ["lora_linears_fwd", "lora_linears_dx", "lora_linears_dab"]
NAMES = ("q_proj", "k_proj", "v_proj")


def straight(self, x):
    return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]


class Attention(nn.Module):
    """``called`` says how the projections are called."""

    def __init__(self, called=straight, kind=lk.FusedLoRALinear, dtype=None, **options):
        super().__init__()
        self.called = called
        for name, width, rank in zip(NAMES, (40, 16, 16), (5, 3, 4), strict=True):
            layer = kind(24, width, r=rank, init_lora_weights=False, dtype=dtype, **options)
            nn.init.kaiming_uniform_(layer.lora_B)
            self.add_module(name, layer)

    def forward(self, x):
        return torch.cat(self.called(self, x), dim=-1).sin()

    @property
    def layers(self):
        return [getattr(self, name) for name in NAMES]


def pair(*args, **options):
    """A module whose projections share, and one that computes each by itself."""
    apart = Attention(*args, **options).train()
    shared = copy.deepcopy(apart)
    assert lk.share_inputs(shared) == [""]
    return shared, apart


def draw(dtype=torch.float32):
    return torch.randn(3, 7, 24, dtype=dtype)


def run(model, x, backward=True):
    """Who answered; y, and every gradient."""
    x = x.clone().requires_grad_(backward)
    with lk.record_plans() as answers:
        y = model(x)
        if backward:
            y.square().sum().backward()
    found = {n: p.grad for n, p in model.named_parameters()} | {"x": x.grad, "y": y.detach()}
    assert not shared_input._local.calls
    return [a.op for a in answers], found


def assert_equal(ours, theirs, exactly=True):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if gradient is None or exactly:
            same = ours[name] is None if gradient is None else torch.equal(ours[name], gradient)
            assert same, name
        else:
            torch.testing.assert_close(ours[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


def plain():
    model = Attention()
    for name in NAMES:
        model.add_module(name, nn.Linear(64, 64))
    return model
