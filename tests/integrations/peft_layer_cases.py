"""One LoRA layer of PEFT, its formula, and what holds a call to float64."""

import warnings

import peft
import torch
from small import Square
from torch import nn

import lora_kernels as lk
from lora_kernels.testing.linear import assert_within_budget, poisoned_memory

IN, OUT, RANKS = 136, 200, {"a": 5, "b": 19, "c": 12}
SHAPE = (3, 45, IN)


class One(nn.Module):
    """A linear layer by itself."""

    def __init__(self, bias=True):
        super().__init__()
        self.proj = nn.Linear(IN, OUT, bias=bias)

    def forward(self, x):
        return self.proj(x)


def model_with(
    names=("a",), kind="linear", dtype=torch.float32, cast=True, zero_weight=False, **config
):
    """Adapters as large as the base, or as 1 where the base is zero."""
    torch.manual_seed(0)
    base = Square(IN) if kind == "conv1d" else One(bias=kind != "no bias")
    base = base.to(dtype)
    if zero_weight:
        nn.init.zeros_(base.proj.weight)
    model = None
    for name in names:
        adapter = peft.LoraConfig(r=RANKS[name], target_modules=["proj"], **config)
        adapter.lora_alpha = {"a": 7, "b": 30, "c": 12}[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if model is None:
                model = peft.get_peft_model(base, adapter, name, autocast_adapter_dtype=cast)
            else:
                model.add_adapter(name, adapter, autocast_adapter_dtype=cast)
    layer = layer_of(model)
    with torch.no_grad():
        for name in names:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a.normal_(std=IN**-0.5)
            b.normal_(std=1 / (layer.scaling[name] * a.shape[0] ** 0.5))
            if layer.lora_B[name].bias is not None:
                layer.lora_B[name].bias.normal_()
    return model


def layer_of(model):
    return model.base_model.model.proj


def activate(model, names):
    model.base_model.set_adapter(list(names))
    return model


def leaves_of(layer, names):
    found = {}
    for name in names:
        found[f"dA {name}"] = layer.lora_A[name].weight
        found[f"dB {name}"] = layer.lora_B[name].weight
        if layer.lora_B[name].bias is not None:
            found[f"dbias {name}"] = layer.lora_B[name].bias
    return found


def by_formula(layer, x, dy, names, dtype, masks=None, rows=None, chosen=None):
    """y and the gradients, all operands cast to ``dtype``; ``masks``: name -> kept elements over
    1 - p; ``rows``: the name for each sequence; ``chosen``: the tokens that have an adapter."""
    base = layer.base_layer
    weight = base.weight.detach().to(dtype)
    weight = weight if isinstance(base, nn.Linear) else weight.t()
    x = x.detach().to(dtype).requires_grad_()
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves_of(layer, names).items()}
    y = x @ weight.t()
    if base.bias is not None:
        y = y + base.bias.detach().to(dtype)
    for name in names:
        dropped = x if not masks else x * masks[name].to(dtype).view_as(x)
        delta = float(layer.scaling[name]) * (dropped @ leaves[f"dA {name}"].t())
        delta = delta @ leaves[f"dB {name}"].t()
        if f"dbias {name}" in leaves:
            delta = delta + float(layer.scaling[name]) * leaves[f"dbias {name}"]
        if rows is not None:
            chosen = torch.tensor([n == name for n in rows]).view(-1, 1, 1)
        if chosen is not None:
            delta = delta.where(chosen, 0)
        y = y + delta
    gradients = torch.autograd.grad(y, [x, *leaves.values()], dy.to(dtype))
    return dict(zip(["y", "dx", *leaves], [y.detach(), *gradients], strict=True))


def run(model, x, dy, names, *, autocast=False, **arguments):
    """y, the gradients, and who answered."""
    x = x.clone().requires_grad_()
    leaves = leaves_of(layer_of(model), names)
    with poisoned_memory(), lk.record_plans() as answers:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x, **arguments)
        gradients = torch.autograd.grad(y, [x, *leaves.values()], dy.to(y.dtype))
    results = dict(zip(["y", "dx", *leaves], [y.detach(), *gradients], strict=True))
    for name, leaf in leaves.items():
        assert results[name].dtype == leaf.dtype
    return results, answers


def assert_budget(ours, layer, x, dy, names, dtype, **options):
    exact = by_formula(layer, x, dy, names, torch.float64, **options)
    eager = by_formula(layer, x, dy, names, dtype, **options)
    assert ours.keys() == exact.keys()
    for name in exact:
        assert_within_budget(name, ours[name], eager[name], exact[name])


def operands(dtype, out=OUT):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=generator).to(dtype)
    return x, torch.randn(*SHAPE[:-1], out, generator=generator).to(dtype)


def assert_one_fused_call(answers, dab=1):
    """One forward, one dX and one call for the adapter's gradients, by a backend of ours."""
    ops = [a.op for a in answers]
    assert ops == ["lora_linear_fwd", "lora_linear_dx", *["lora_linear_dab"] * dab]
    assert {a.backend for a in answers} == {"cpu"}
