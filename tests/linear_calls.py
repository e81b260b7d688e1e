"""``lora_linear`` of drawn inputs, and what is asked of its gradients."""

import torch

import lora_kernels as lk

LEAVES = ("x", "lora_a", "lora_b", "bias")


def call(inputs, **changes):
    case = inputs.case
    arguments = {
        "x": inputs.x,
        "weight": inputs.weight,
        "lora_a": inputs.lora_a,
        "lora_b": inputs.lora_b,
        "scale": case.scale,
        "bias": inputs.bias,
        "dropout_p": case.dropout_p,
        "training": case.dropout_p > 0,
        "fan_in_fan_out": case.fan_in_fan_out,
        "rng": inputs.rng,
    } | changes
    return lk.lora_linear(**arguments)


def require_grad(inputs, names=LEAVES):
    for name in names:
        if getattr(inputs, name) is not None:
            getattr(inputs, name).requires_grad_()


def check_batches_of_gradients(y, leaves):
    """is_grads_batched=True, as jacobian(vectorize=True) does."""
    dy = torch.randn(4, *y.shape)
    batched = torch.autograd.grad(y, leaves, dy, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, leaves, each, retain_graph=True) for each in dy]
    for together, *each in zip(batched, *single, strict=True):
        torch.testing.assert_close(together, torch.stack(each), rtol=1e-5, atol=1e-5)
