"""``warmup``: what compiles on first use is compiled before it is waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from .apply import unwrap


class _Layer(Protocol):
    """A layer of this package that computes with adapters."""

    training: bool

    def warmup_call(
        self, rows: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """An input of so many rows, and what our kernels compute of it in a call of the layer:
        past the hooks, which may count calls or cost something."""

    def parameters(self) -> Any: ...


def warmup(
    model: nn.Module,
    rows: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    training: bool | None = None,
) -> None:
    """Run every adapted layer once for each number of rows, so that what compiles on first use is
    compiled before a graph is captured or a clock is started.

    The layers are those of :func:`apply_lora`, of an :class:`AdapterStore` (all rows as if they had
    adapters of the largest rank, without dropout) and of PEFT after :func:`accelerate_peft` (with
    their active adapters; where PEFT's own forward answers, there is nothing to compile).

    Args:
        rows: numbers of tokens, as the layers will see them.
        dtype: of the layers' input; default: each weight's own.
        training: also run the backward; default: where the layer is in training mode. Gradients,
            generators and parameters stay as they are.

    Raises:
        ValueError: the model has no such layer, or a number of rows is negative.

    >>> import lora_kernels as lk
    >>> lk.warmup(lk.FusedLoRALinear(8, 4, r=2), [1, 16])
    """
    if any(count < 0 for count in rows):
        raise ValueError(f"rows must be numbers of tokens, not {list(rows)}")
    modules = unwrap(model).modules()
    layers = [cast(_Layer, m) for m in modules if getattr(type(m), "warmup_call", None)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no LoRA layers of lora_kernels: call apply_lora or "
            "accelerate_peft first, or make an AdapterStore for it"
        )
    devices = {p.device for layer in layers for p in layer.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=devices):
        for layer in layers:
            backward = layer.training if training is None else training
            for count in rows:
                _run_once(layer, *layer.warmup_call(count, dtype), backward)


def _run_once(layer: _Layer, x: Tensor, call: Callable[[Tensor], Tensor], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        if backward and x.is_floating_point():
            x.requires_grad_()
        y = call(x)
        wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
        if y.requires_grad:
            torch.autograd.grad(y, wanted, y, allow_unused=True)
