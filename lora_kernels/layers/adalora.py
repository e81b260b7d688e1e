"""``AdaLoRALinear``: an adapter whose ranks each have a factor, by which they are left out and come
back."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .fused import FusedLoRALinear


class AdaLoRALinear(FusedLoRALinear):
    """``FusedLoRALinear`` with a trained factor for every rank: ``y = x W^T + scaling *
    ((dropout(x) A^T) * E) B^T + bias`` with ``lora_A`` [r, in], ``lora_E`` [r, 1] and ``lora_B``
    [out, r].

    A rank is left out by writing 0 to its E, under ``torch.no_grad()``, which recompiles nothing.
    Its E keeps a gradient, so that it may come back. ``scaling`` is ``lora_alpha / (init_r +
    1e-5)``, however many of the ``init_r`` ranks of training there are: an allocator may have taken
    some for good, also all (r = 0).

    The other arguments are :class:`FusedLoRALinear`'s. A new layer has A and B drawn with deviation
    0.02 and E zero.

    Source: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning"
    (arXiv:2303.10512); layouts and the scaling are PEFT's.

    >>> linear = nn.Linear(8, 4)
    >>> layer = AdaLoRALinear.from_linear(linear, r=3, lora_alpha=6)
    >>> {name: tuple(p.shape) for name, p in layer.named_parameters() if p.requires_grad}
    {'lora_A': (3, 8), 'lora_B': (4, 3), 'lora_E': (3, 1)}
    """

    init_r: int
    lora_E: nn.Parameter | None
    _least_rank = 0

    def _add_lora(self, r: int, *args: Any, init_r: int | None = None, **options: Any) -> None:
        self.init_r = r if init_r is None else init_r
        if self.init_r < max(r, 1):
            raise ValueError(f"init_r must be at least r={r} and 1, not {init_r}")
        if options.get("use_dora"):
            raise ValueError("an AdaLoRALinear has no DoRA")
        super()._add_lora(r, *args, **options)

    def _adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        return super()._adapter_shapes() | {"lora_E": (self.r, 1)}

    def _default_scaling(self) -> float:
        return self.lora_alpha / (self.init_r + 1e-5)

    def _draw_adapter(self) -> None:
        # A tensor without elements is drawn with a warning.
        if self.r > 0:
            for name, parameter in (("A", self.lora_A), ("B", self.lora_B), ("E", self.lora_E)):
                assert parameter is not None
                if name == "E" and self.init_lora_weights is not False:
                    nn.init.zeros_(parameter)
                else:
                    nn.init.normal_(parameter, std=1.0 if name == "E" else 0.02)

    def set_lora(  # type: ignore[override]
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        lora_e: Tensor,
        *,
        lora_alpha: float,
        use_rslora: bool = False,
    ) -> None:
        """As :meth:`FusedLoRALinear.set_lora`, with E [r, 1]; ``use_rslora`` changes nothing."""
        self._set_adapter([lora_a, lora_b, lora_e], lora_alpha, use_rslora)

    def _tensors(self) -> tuple[Any, Any, Any, Any]:
        weight, bias, a, b = super()._tensors()
        return weight, bias, a * self.lora_E, b

    def _adapted_forward(self, input: Tensor) -> Tensor:
        return super()._adapted_forward(input) if self.r > 0 else self._base_forward(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, init_r={self.init_r}"
