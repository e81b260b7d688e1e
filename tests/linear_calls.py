"""``lora_linear`` of drawn inputs."""

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
