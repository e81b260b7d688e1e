"""Single layers with an adapter that cannot be overlooked."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk

FORMATS = ["linear", "no bias", "conv1d", "square conv1d"]


def base_layer(kind, dtype=torch.float32):
    if kind == "linear":
        return nn.Linear(24, 40, dtype=dtype)
    if kind == "no bias":
        return nn.Linear(24, 40, bias=False, dtype=dtype)
    in_features, out_features = (24, 40) if kind == "conv1d" else (32, 32)
    layer = Conv1D(out_features, in_features)
    nn.init.normal_(layer.weight, std=in_features**-0.5)
    nn.init.normal_(layer.bias)
    return layer.to(dtype)


def adapted(kind="linear", dtype=torch.float32, **arguments):
    """A layer whose adapter is as large as its base."""
    layer = lk.FusedLoRALinear.from_linear(
        base_layer(kind, dtype), **({"r": 4, "lora_alpha": 6} | arguments)
    )
    with torch.no_grad():
        nn.init.normal_(layer.lora_A, std=layer.in_features**-0.5)
        nn.init.normal_(layer.lora_B, std=1 / (layer.scaling * layer.r**0.5))
    return layer


def explicit(layer, x):
    """The formula in float64, orientation by the names of the axes."""
    x, weight = x.double(), layer.weight.double()
    base = torch.einsum("...i,io->...o" if layer.fan_in_fan_out else "...i,oi->...o", x, weight)
    tail = torch.einsum("...i,ri,or->...o", x, layer.lora_A.double(), layer.lora_B.double())
    return base + layer.scaling * tail + (0 if layer.bias is None else layer.bias.double())
