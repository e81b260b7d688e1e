"""Tiny models of PEFT whose adapters show, and three of them that go through the same."""

import copy

import peft
import small
import torch
from peft.tuners import lora
from training import assert_close

import lora_kernels as lk

TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "vit": ["q_proj", "v_proj", "fc1", "fc2"],
}
LAYERS = {"gpt2": 8, "llama": 10, "vit": 8}


def config(family, r=5, **changes):
    changes = {"target_modules": TARGETS[family], "lora_alpha": 11} | changes
    return peft.LoraConfig(r=r, **changes)


def layers_of(model):
    return [m for m in model.modules() if isinstance(m, lora.LoraLayer)]


@torch.no_grad()
def draw(model, name="default", seed=3):
    """An adapter as large as the weights, the same for the same names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model):
        if name in layer.lora_A:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a.copy_(torch.randn(a.shape, generator=generator))
            b.copy_(torch.randn(b.shape, generator=generator))
            size = (layer.scaling[name] * b @ a).norm()
            b.mul_(layer.base_layer.weight.norm() / size)
            if layer.lora_B[name].bias is not None:
                bias = layer.lora_B[name].bias
                bias.copy_(torch.randn(bias.shape, generator=generator) * 0.1)


def stock_model(family, base=None, **changes):
    base = small.build(family) if base is None else base
    model = peft.get_peft_model(base, config(family, **changes)).eval()
    draw(model)
    return model


class Trio:
    """PEFT's model, the same on our kernels, and PEFT's in float64."""

    def __init__(self, stock):
        self.stock, self.ours = stock, copy.deepcopy(stock)
        self.exact = copy.deepcopy(stock).double()
        self.report = lk.accelerate_peft(self.ours)
        self.batch = small.batch_for(stock.get_base_model(), rows=4)
        self.answers = []

    def do(self, action):
        """The same to all three; the results."""
        results = []
        for model in (self.stock, self.ours, self.exact):
            torch.manual_seed(7)
            results.append(action(model))
        return results

    def check(self, calls, op="lora_linear_fwd", **arguments):
        """Compare the logits; ``calls`` operators of ours must have answered in the forward."""
        logits = {}
        for name in ("stock", "ours", "exact"):
            model = getattr(self, name)
            batch = {
                k: v.double() if name == "exact" and v.is_floating_point() else v
                for k, v in self.batch.items()
            }
            with torch.no_grad(), lk.record_plans() as answers:
                logits[name] = model(**batch, **arguments).logits
            if name == "ours":
                assert [a.op for a in answers] == [op] * calls
                assert all(a.backend == "cpu" for a in answers)
            else:
                assert not answers
        assert_close("logits", logits["ours"], logits["stock"], logits["exact"])
        return logits["ours"]

    def check_gradients(self):
        losses = self.do(lambda m: small.loss(m, self.batch_for(m)))
        for loss in losses:
            loss.backward()
        gradients = [
            {n: p.grad for n, p in m.named_parameters() if p.grad is not None}
            for m in (self.stock, self.ours, self.exact)
        ]
        stock, ours, exact = gradients
        assert stock.keys() == ours.keys() == exact.keys()
        sizes = {name: g.square().mean().sqrt() for name, g in exact.items()}
        # All as one, each by its own size: what PEFT's rounding happens to lose on a single bias
        # is no measure.
        together = [torch.cat([(g[n] / sizes[n]).flatten() for n in sizes]) for g in gradients]
        assert_close("gradients", together[1], together[0].float(), together[2])
        self.do(lambda m: m.zero_grad())
        return len(sizes)

    def batch_for(self, model):
        double = model is self.exact
        return {
            k: v.double() if double and v.is_floating_point() else v for k, v in self.batch.items()
        }
