"""``FusedLoRAExperts``: a mixture's experts, whose weights are 3-D Parameters, with adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..spec.four_bit import dequantize, quant_state_of
from .four_bit_experts import give_back, take_over
from .fused import check_lora_arguments, default_scaling
from .merging import write_obstacle
from .replacing import become, put_back
from .routed import (
    Factors,
    experts_forward,
    sizes,
    stored_factors,
    unsupported_reason,
    warmup_inputs,
    weight_dtype,
    weight_of,
)


class ExpertAdapter(nn.Module):
    """A and B of one 3-D Parameter, as PEFT stores them: ``lora_A`` [r*E, in], ``lora_B``
    [out, r*E]; ``scaling`` is the factor of their product."""

    def __init__(
        self,
        module: nn.Module,
        name: str,
        *,
        r: int,
        lora_alpha: float,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        check_lora_arguments(r, lora_alpha, 0.0, init_lora_weights)
        super().__init__()
        self.experts, self.in_features, self.out_features = sizes(module, name)
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.init_lora_weights = init_lora_weights
        self.scaling = default_scaling(lora_alpha, r, use_rslora)
        dtype, device = weight_dtype(module, name), weight_of(module, name).device
        if autocast_adapter_dtype and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        columns = r * self.experts
        a, b = (columns, self.in_features), (self.out_features, columns)
        self.lora_A = nn.Parameter(torch.empty(a, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(b, device=device, dtype=dtype))
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Draw A and B anew, as ``init_lora_weights`` says."""
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    def factors(self) -> Factors:
        return Factors(*stored_factors(self.lora_A, self.lora_B, self.experts), self.scaling)

    @torch.no_grad()
    def added_to(self, weight: Tensor, dtype: torch.dtype, is_transposed: bool) -> Tensor:
        """``weight + scaling * B_e A_e``, one expert after the other, in float32 or wider and
        rounded once to ``dtype``; a four-bit weight is decoded."""
        (a, b, _), quant = self.factors(), quant_state_of(weight)
        shape = weight.shape if quant is None else quant.shape
        merged = torch.empty(shape, dtype=dtype, device=weight.device)
        acc = torch.promote_types(dtype, torch.float32)
        for e in range(self.experts):
            delta = (b[e].to(acc) @ a[e].to(acc)).mul_(self.scaling)
            plain = weight[e].to(acc) if quant is None else dequantize(weight.data, quant, acc, e)
            merged[e] = plain + (delta.t() if is_transposed else delta)
        return merged

    def extra_repr(self) -> str:
        shape = f"experts={self.experts}, in={self.in_features}, out={self.out_features}"
        return f"{shape}, r={self.r}, scaling={self.scaling:g}"


class FusedLoRAExperts(nn.Module):
    """Experts of transformers with adapters on their 3-D Parameters, computed in one grouped
    operator a Parameter; the delta of a weight never exists.

    Made in place by :meth:`adapt`: the module keeps its Parameters, attributes and hooks and gets a
    subclass of its own class, with ``lora`` [name of the Parameter] beside the weights. While
    merged, the Parameters are new ones; the pristine ones are kept aside and come back, the same
    objects, on :meth:`unmerge`. What ``state_dict``, ``load_state_dict``, ``.to`` and ``train()``
    do while merged is as for :class:`FusedLoRALinear`. Disabled or merged, the model's own code
    computes, over weights in four bits :class:`QuantizedExperts`.
    """

    _kind: type[nn.Module]
    lora: nn.ModuleDict
    merged: bool
    _base: dict[str, tuple[nn.Parameter, nn.Parameter]]
    # By lora_kernels.disable_adapter.
    _disabled = False
    _was_merged = False

    @staticmethod
    def adapt(module: nn.Module, arguments: Mapping[str, Mapping[str, Any]]) -> FusedLoRAExperts:
        """Give ``module`` an adapter on each Parameter of ``arguments``, which has those of
        :class:`ExpertAdapter`; its own Parameters are frozen.

        Raises:
            TypeError: ``module`` is not what this serves; the message says why.
            ValueError: a wrong rank or alpha.
        """
        reason = unsupported_reason(module)
        if reason is not None:
            raise TypeError(f"the module {reason}")
        lora = nn.ModuleDict(
            {name: ExpertAdapter(module, name, **own) for name, own in arguments.items()}
        )
        take_over(module)
        module.requires_grad_(False)
        become(module, FusedLoRAExperts)
        self = cast(FusedLoRAExperts, module)
        self.merged, self._base = False, {}
        self.lora = lora.train(module.training)
        self.register_load_state_dict_post_hook(_merge_again)
        return self

    def restore(self) -> nn.Module:
        """Give the module the class back that it had, with the Parameters that it has now."""
        for name in ("merged", "_base", "_disabled", "_was_merged"):
            self.__dict__.pop(name, None)
        for handle, hook in list(self._load_state_dict_post_hooks.items()):
            if hook is _merge_again:
                del self._load_state_dict_post_hooks[handle]
        self._modules.pop("lora", None)
        module = put_back(self)
        give_back(module)
        return module

    @property
    def is_exported(self) -> bool:
        """Whether ``merge(keep_base=False)`` removed the adapters."""
        return self.merged and not self._base

    def adapters(self) -> dict[str, ExpertAdapter]:
        return {name: cast(ExpertAdapter, adapter) for name, adapter in self.lora.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the class's own: hidden_states [T, H], top_k_index and top_k_weights [T, k]."""
        plain: Callable[..., Tensor] = super().forward
        if self._disabled or self.merged:
            with self._with_pristine() if self._disabled else _nothing():
                return plain(*args, **kwargs)
        factors = {name: adapter.factors() for name, adapter in self.adapters().items()}
        return experts_forward(self, factors, *args, **kwargs)

    def warmup_call(
        self, rows: int, dtype: torch.dtype | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """For :func:`lora_kernels.warmup`; merged or disabled they have nothing to compile."""
        x, *routing = warmup_inputs(self, rows, dtype)
        if self.merged or self._disabled:
            return x, Tensor.detach
        factors = {name: adapter.factors() for name, adapter in self.adapters().items()}
        return x, lambda x: experts_forward(self, factors, x, *routing)

    @contextmanager
    def _with_pristine(self) -> Iterator[None]:
        """The pristine Parameters in place of the merged ones."""
        for name, (base, _) in self._base.items():
            self._parameters[name] = base
        try:
            yield
        finally:
            for name, (_, merged) in self._base.items():
                self._parameters[name] = merged

    def set_lora(
        self, name: str, lora_a: Tensor, lora_b: Tensor, *, lora_alpha: float, use_rslora: bool
    ) -> None:
        """Copy another adapter of the same rank onto the Parameter ``name``, ``scaling`` included;
        merged experts merge it. ValueError for other shapes."""
        own = self.adapters()[name]
        if lora_a.shape != own.lora_A.shape or lora_b.shape != own.lora_B.shape:
            raise ValueError(
                f"lora_a {list(lora_a.shape)} and lora_b {list(lora_b.shape)} do not fit "
                f"{list(own.lora_A.shape)} and {list(own.lora_B.shape)} of {name}"
            )
        with self._unmerged(), torch.no_grad():
            own.lora_A.copy_(lora_a)
            own.lora_B.copy_(lora_b)
            own.lora_alpha, own.use_rslora = lora_alpha, use_rslora
            own.scaling = default_scaling(lora_alpha, own.r, use_rslora)

    def merge_obstacle(self) -> str | None:
        """As :meth:`FusedLoRALinear.merge_obstacle`."""
        return write_obstacle(self, self.lora) or next(
            (o for a in self.lora.values() if (o := write_obstacle(a, ("lora_A", "lora_B")))), None
        )

    def merge(self, keep_base: bool = True) -> None:
        """As :meth:`FusedLoRALinear.merge`, for every adapted Parameter."""
        if not self.merged:
            obstacle = self.merge_obstacle()
            if obstacle is not None:
                raise RuntimeError(f"cannot merge the adapters of these experts: {obstacle}")
            for name, adapter in self.adapters().items():
                base = cast(nn.Parameter, self._parameters[name])
                dtype, kn = weight_dtype(self, name), cast(bool, self.is_transposed)
                values = adapter.added_to(base, dtype, kn)
                self._base[name] = base, nn.Parameter(values, requires_grad=False)
                self._parameters[name] = self._base[name][1]
            self.merged = True
        if not keep_base:
            self._base = {}
            self.lora = nn.ModuleDict()

    def unmerge(self) -> None:
        """As :meth:`FusedLoRALinear.unmerge`."""
        if not self.merged:
            return
        if not self._base:
            raise RuntimeError(
                "these experts were merged with keep_base=False: their pristine weights are gone"
            )
        for name, (base, _) in self._base.items():
            self._parameters[name] = base
        self.merged, self._base = False, {}

    @contextmanager
    def _unmerged(self) -> Iterator[None]:
        """Unmerged inside, merged again behind it if they were."""
        merged = bool(self._base)
        if merged:
            self.unmerge()
        try:
            yield
        finally:
            if merged:
                self.merge()

    def train(self, mode: bool = True) -> FusedLoRAExperts:
        if mode and self._base:
            self.unmerge()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLoRAExperts:
        with self._unmerged():
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Merged again by the hook, when A and B of the children are loaded too.
        if self._base:
            self.unmerge()
            self._was_merged = True
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with self._with_pristine():
            super()._save_to_state_dict(*args, **kwargs)


def _merge_again(module: FusedLoRAExperts, _: Any) -> None:
    if module._was_merged:
        module._was_merged = False
        module.merge()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
