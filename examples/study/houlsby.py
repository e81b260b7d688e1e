"""Bottleneck adapters: what LoRA is compared with, and neither library has."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

# What attention and the MLP end in: GPT-2's names, Llama's, OPT's and GPT-NeoX's.
ENDS = ("c_proj", "o_proj", "down_proj", "out_proj", "fc2", "dense", "dense_4h_to_h")


class Bottleneck(nn.Module):
    """A layer with an adapter behind it, ``y + up(gelu(down(y)))``, which at first is y.

    Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (arXiv:1902.00751).
    """

    def __init__(self, layer: nn.Module, width: int, size: int) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(width, size), nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        adapted = self.up(nn.functional.gelu(self.down(y.to(self.down.weight.dtype))))
        return y + adapted.to(y.dtype)


def add_bottlenecks(model: Any, size: int) -> Any:
    """Put a bottleneck behind the attention and the MLP of every block; returns the model."""
    for name, layer in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in ENDS:
            wrapped = Bottleneck(layer, model.config.hidden_size, size).to(model.device)
            setattr(model.get_submodule(parent), last, wrapped)
    return model
