"""A linear layer into whose weight an adapter is merged and taken out again; why that cannot be
done, and what the plain layer was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..functional.ops import PLAIN
from ..spec.four_bit import dequantize, quant_state_of
from .four_bit_parameter import save_quant_state
from .packed import PackedLinear, gathered_by_fsdp

# What is nn.Module's own, what a plain layer takes over otherwise, and accelerate's hook, which is
# put on the new layer by the code that builds it.
_NOT_CARRIED = {
    *vars(nn.Module()),
    *("in_features", "out_features", "forward", "_hf_hook", "_old_forward"),
}


class Plain(NamedTuple):
    """What :class:`FusedLoRALinear` replaced, without its parameters."""

    kind: type[nn.Module]
    # Attributes of the instance besides nn.Module's own, such as Conv1D's nx and nf.
    attributes: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> Plain:
        kept = {name: v for name, v in vars(module).items() if name not in _NOT_CARRIED}
        return cls(type(module), kept)


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the weights of ``module`` elsewhere between two calls."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook]))


def write_obstacle(layer: nn.Module, names: Iterable[str]) -> str | None:
    """Why the parameters ``names`` of ``layer`` cannot be read and replaced, with the remedy; or
    None if they can."""
    if is_offloaded(layer):
        return (
            "accelerate offloads its weights between calls (device_map, cpu_offload, disk_offload):"
            " do this before offloading, or bring them back with "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    for name in names:
        # Removing a parametrisation leaves a tensor that does not train as a buffer.
        kept = name in layer._parameters or name in layer._buffers
        if not kept or parametrize.is_parametrized(layer, name):
            cause, remedy = _derivation(layer, name)
            return f"its {name} is {cause}: {remedy}"
    return None


def _derivation(layer: nn.Module, name: str) -> tuple[str, str]:
    utils, held = "torch.nn.utils", layer._parameters
    if parametrize.is_parametrized(layer, name):
        remedy = f"{utils}.parametrize.remove_parametrizations(layer, {name!r})"
        return "parametrised", f"call {remedy} first"
    if f"{name}_mask" in layer._buffers:
        return "pruned", f"call {utils}.prune.remove(layer, {name!r}) first"
    if f"{name}_g" in held:
        return "weight-normed", f"call {utils}.remove_weight_norm(layer, {name!r}) first"
    if f"{name}_orig" in held:
        return "spectral-normed", f"call {utils}.remove_spectral_norm(layer, {name!r}) first"
    return "no Parameter of the layer", "make it one first"


class MergeableLinear(PackedLinear):
    """A frozen weight, and beside it a merged one while the adapter is merged.

    A subclass has ``lora_A`` and ``lora_B``, its ``delta_weight``, and the forward that adds it.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    merged: bool
    # The pristine and the merged weight while merged, in a tuple so that nn.Module registers none.
    _base: tuple[nn.Parameter, ...]
    # By lora_kernels.disable_adapter.
    _disabled = False

    @property
    def is_exported(self) -> bool:
        """Whether ``merge(keep_base=False)`` removed the adapter."""
        return self.merged and not self._base

    def delta_weight(self) -> Tensor:
        raise NotImplementedError

    def _adapter_names(self) -> list[str]:
        return ["lora_A", "lora_B"]

    def _adapted_forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError

    def merge_obstacle(self) -> str | None:
        """Why :meth:`merge`, :meth:`unmerge` and :meth:`to_linear` cannot be done now (offloaded,
        pruned, parametrised), with the remedy; or None if they can."""
        return write_obstacle(self, ("weight", *self._adapter_names()))

    def _check_writable(self, action: str, *names: str) -> None:
        obstacle = write_obstacle(self, names)
        if obstacle is not None:
            raise RuntimeError(f"cannot {action} of this layer: {obstacle}")

    @torch.no_grad()
    def merge(self, keep_base: bool = True) -> None:
        """Fold the adapter into a new weight Parameter; merging a merged layer changes nothing.

        The pristine weight is never written, so tied and shared weights stay as they are, and
        :meth:`unmerge` puts the same object back. With ``keep_base=False`` neither it nor the
        adapter is kept, for a final export.

        Raises:
            RuntimeError: the weight or the adapter cannot be read or replaced: offloaded by
                accelerate, pruned, parametrised. The message says what to do.
        """
        if not self.merged or (not keep_base and self._base):
            self._check_writable("merge the adapter", "weight", *self._adapter_names())
        if not self.merged:
            delta = self.delta_weight()
            base = self._own_weight()
            quant = quant_state_of(base)
            plain = base if quant is None else dequantize(base.data, quant, delta.dtype)
            merged = (plain.to(delta.dtype) + delta).to(self.weight_dtype())
            self.weight = merged = nn.Parameter(merged, requires_grad=False)
            self._base = (base, merged)
            self.merged = True
            self.drop_packed()
        if not keep_base and self._base:
            self._base = ()
            for name in self._adapter_names():
                setattr(self, name, None)

    def _own_weight(self) -> nn.Parameter:
        weight = self.weight
        if isinstance(weight, nn.Parameter):
            return weight
        return nn.Parameter(weight, requires_grad=False)

    def unmerge(self) -> None:
        """Put the pristine weight back; on a layer that is not merged nothing changes.

        Raises:
            RuntimeError: the layer was merged with ``keep_base=False``, or as for :meth:`merge`.
        """
        if not self.merged:
            return
        if not self._base:
            raise RuntimeError(
                "this layer was merged with keep_base=False: its pristine weight is gone"
            )
        self._check_writable("unmerge the adapter", "weight")
        (base, _), self._base = self._base, ()
        self.weight = base
        self.merged = False
        self.drop_packed()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As ``nn.Module``'s, which also serves assignments; see the class for a merged weight."""
        if name != "weight" or param is None or not self.__dict__.get("_base"):
            super().register_parameter(name, param)
            return
        base = self._base[0]
        if type(param) not in PLAIN or param.shape != base.shape:
            raise RuntimeError(
                f"this layer is merged, and a {type(param).__name__} {list(param.shape)} cannot "
                f"replace its pristine weight {list(base.shape)}: unmerge it first, or merge it "
                "for good (merge_adapter(model, keep_base=False))"
            )
        if param is not base:
            warnings.warn(
                "the weight of a merged FusedLoRALinear was replaced: the new one counts as the "
                "pristine weight, and the adapter is merged into it. If it was made from the "
                "merged weight, unmerge before, or merge for good "
                "(merge_adapter(model, keep_base=False))",
                stacklevel=3,
            )
        self._base, self.merged = (), False
        super().register_parameter(name, param)
        self.merge()

    def _with_pristine_weight(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on the unmerged layer and merge again if it was merged."""
        if not self._base:
            return action()
        self.unmerge()
        try:
            return action()
        finally:
            self.merge()

    def train(self, mode: bool = True) -> MergeableLinear:
        """As ``nn.Module.train``; entering training mode unmerges (a layer exported by
        ``keep_base=False`` stays)."""
        if mode and self._base:
            self.unmerge()
        super().train(mode)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base:
            base = self._base[0]
            destination[prefix + "weight"] = base if keep_vars else base.detach()
            save_quant_state(base, destination, prefix + "weight")
            if not keep_vars:
                _warn_of_merged(destination)

    def _forward_beside_merged(self, input: Tensor) -> Tensor:
        """A merged layer's call with another weight than the merged one: its adapter is disabled,
        or ``functional_call`` or accelerate put a weight there without an assignment."""
        base = self._base[0]
        if self._disabled:
            return self._linear_of(base, input)
        # state_dict() holds the pristine weight, and is what accelerate offloads;
        # named_parameters() holds the merged one, which is what FSDP gathers.
        if is_offloaded(self) or (not gathered_by_fsdp(self) and _is_same(self.weight, base)):
            return self._adapted_forward(input)
        return self._base_forward(input)


def _is_same(weight: Tensor, base: Tensor) -> bool:
    """Whether ``weight``, be it wrapped by ``torch.func``, has the values of ``base``."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(weight):
        weight = functorch.get_unwrapped(weight)
    if type(weight) not in PLAIN or weight.shape != base.shape or weight.dtype != base.dtype:
        return False
    if weight.is_meta or base.is_meta:
        return False
    return weight.data_ptr() == base.data_ptr() or torch.equal(weight.to(base.device), base)


def _warn_of_merged(destination: dict[str, Any]) -> None:
    """Once for the state of a whole model."""
    marks = getattr(destination, "__dict__", {})
    if "_lora_kernels_merged" not in marks:
        marks["_lora_kernels_merged"] = True
        warnings.warn(
            "the state_dict of a merged FusedLoRALinear holds its pristine weight and the adapter, "
            "not the merged weight: to save merged weights (save_pretrained), call "
            "merge_adapter(model, keep_base=False) first; to save the adapter, save_adapter",
            stacklevel=4,
        )
