"""Use ``lora_linear`` in a layer of your own: here one whose adapter has a learned scale.

python examples/lora_linear_in_your_layer.py
"""

import torch
from torch import nn

import lora_kernels as lk


class GatedLoRALinear(nn.Module):
    """``y = x W^T + bias + tanh(gate) (x A^T) B^T`` with W and bias frozen."""

    def __init__(self, linear, r):
        super().__init__()
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        self.lora_A = nn.Parameter(torch.randn(r, linear.in_features) / linear.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, r))
        self.gate = nn.Parameter(torch.ones(r))

    def forward(self, x):
        # The gate goes into A, where it is differentiable; A stays small.
        a = self.gate.tanh()[:, None] * self.lora_A
        return lk.lora_linear(x, self.weight, a, self.lora_B, scale=1.0, bias=self.bias)


def main(steps=200):
    torch.manual_seed(0)
    target = torch.randn(32, 4) @ torch.randn(4, 64)  # a change of rank 4
    layer = GatedLoRALinear(nn.Linear(32, 64), r=4)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.03)
    for _ in range(steps):
        x = torch.randn(256, 32)
        wanted = nn.functional.linear(x, layer.weight, layer.bias) + x @ target
        loss = (layer(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"mean square error after {steps} steps: {loss.item():.4f}")
    return loss.item()


if __name__ == "__main__":
    main()
