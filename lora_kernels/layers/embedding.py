"""``LoRAEmbedding``: an embedding with one adapter, as PEFT's and loralib's have it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import check_lora_arguments
from .multi import unsupported_embedding_reason
from .replacing import share_hooks


class LoRAEmbedding(nn.Embedding):
    """``y = W[id] + scaling * A^T[id] B^T`` with ``weight`` W [V, D] frozen and ``lora_A`` [r, V],
    ``lora_B`` [D, r] trainable.

    :meth:`merge` and :meth:`unmerge` as :class:`lora_kernels.FusedLoRALinear`'s: the pristine
    weight is kept aside and comes back, the same object.
    """

    r: int
    lora_alpha: float
    scaling: float
    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    # The pristine weight while merged, in a tuple so that nn.Module registers none.
    _base: tuple[nn.Parameter, ...]

    @classmethod
    def from_embedding(
        cls, module: nn.Embedding, r: int = 8, lora_alpha: float = 16
    ) -> LoRAEmbedding:
        """Wrap an ``nn.Embedding``, whose Parameter is shared and frozen.

        Raises:
            TypeError: ``module`` has a forward of its own, or renormalises its weight.
            ValueError: a rank below 1.
        """
        reason = unsupported_embedding_reason(module)
        if reason is not None:
            raise TypeError(f"LoRAEmbedding.from_embedding: the module {reason}")
        check_lora_arguments(r, lora_alpha, 0.0, True)
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        for name in nn.Embedding.__constants__:
            setattr(self, name, getattr(module, name))
        self.weight = module.weight.requires_grad_(False)
        share_hooks(self, module)
        self.r, self.lora_alpha, self.scaling = r, lora_alpha, lora_alpha / r
        self._base = ()
        new = self.weight.new_zeros
        # What is looked up is zero, so that B trains second: PEFT's and loralib's choice.
        self.lora_A = nn.Parameter(new(r, self.num_embeddings))
        self.lora_B = nn.Parameter(torch.randn_like(new(self.embedding_dim, r)))
        self.train(module.training)
        return self

    @property
    def merged(self) -> bool:
        return bool(self._base)

    def forward(self, input: Tensor) -> Tensor:
        """int [...] -> [..., embedding_dim]."""
        y = super().forward(input)
        if self.merged or self.lora_A is None or self.lora_B is None:
            return y
        rows = F.embedding(input, self.lora_A.t(), self.padding_idx)
        return y + ((rows @ self.lora_B.t()) * self.scaling).to(y.dtype)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``scaling * (B A)^T`` [V, D], in float32 or wider."""
        if self.lora_A is None or self.lora_B is None:
            raise RuntimeError("merge(keep_base=False) removed the adapter of this layer")
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.lora_A.to(dtype).t() @ self.lora_B.to(dtype).t()).mul_(self.scaling)

    def merge(self, keep_base: bool = True) -> None:
        if not self.merged and self.lora_A is not None:
            base: Any = self.weight
            delta = self.delta_weight()
            merged = (base.to(delta.dtype) + delta).to(base.dtype)
            self.weight = nn.Parameter(merged, requires_grad=False)
            self._base = (base,)
        if not keep_base:
            self._base = ()
            self.lora_A = self.lora_B = None

    def unmerge(self) -> None:
        if self.merged:
            self.weight, self._base = self._base[0], ()

    def train(self, mode: bool = True) -> LoRAEmbedding:
        if mode and self._base:
            self.unmerge()
        super().train(mode)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            base = self._base[0]
            destination[prefix + "weight"] = base if keep_vars else base.detach()
