"""A frozen weight in the layout of the CPU's kernels: packed once, dropped when it has changed; the
one policy of the layers that keep such copies, and the linear layer that computes with one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import cpu
from ..functional.linear import NOT_PACKED, Packed, four_bit_linear, packed_linear
from ..functional.ops import PLAIN, autocast_enabled, is_observed
from ..spec.four_bit import quant_state_of
from .four_bit_parameter import FourBitParameter, load_quant_state, save_quant_state

_Layer = TypeVar("_Layer", bound="Packing")

_FSDP = "_is_fsdp_managed_module"

PACK_WEIGHT = ("eval", "always", "never")


class _Copy(NamedTuple):
    weight: weakref.ref[Tensor]
    data_ptr: int
    version: int
    fan_in_fan_out: bool
    # The weight with its inner axis first, as it was packed: a view, made once.
    operand: Tensor
    panels: Tensor


class PackedWeight:
    """The packed copies of one module's frozen weight, each as large as the weight: one for
    ``x W^T`` and one for ``dY W``.

    The module drops them when it does something to the weight. They are checked on every use as
    well, against the weight's identity, address and version, and, since a write through
    ``Tensor.data`` leaves no trace in these, against some 64 of its values. A copy or a pickle of
    the module starts without them.
    """

    def __init__(self) -> None:
        self._copies: dict[bool, _Copy] = {}
        # Whether a call of the layer has asked for copies, and whether a compiler has traced one.
        self.called = self.traced = False

    def get(self, weight: Tensor, fan_in_fan_out: bool, *, for_dx: bool = False) -> Tensor | None:
        """The packed weight, made now if there is none that holds; None where it cannot be packed:
        not on a CPU with native kernels, not float32 or bfloat16, not frozen, or no plain tensor
        (fake, sharded, being traced)."""
        held = self._copies.get(for_dx)
        if (
            held is not None
            and held.weight() is weight
            and held.data_ptr == weight.data_ptr()
            and held.version == weight._version
            and held.fan_in_fan_out == fan_in_fan_out
            and not weight.requires_grad
            and torch.ops.lora_kernels_cpu.is_packed(held.operand, held.panels)
        ):
            return held.panels
        if not _is_plain(weight) or weight.requires_grad or not cpu.packs(weight):
            # Copies of what it was before would never be read.
            self.drop()
            return None
        # Gone before its successor comes, not after.
        held = None
        self._copies.pop(for_dx, None)
        # The inner axis first: [K, N] for the forward, [N, K] for dX.
        operand = weight.detach() if fan_in_fan_out != for_dx else weight.detach().t()
        panels = torch.ops.lora_kernels_cpu.pack(operand)
        self._copies[for_dx] = _Copy(
            weakref.ref(weight),
            weight.data_ptr(),
            weight._version,
            fan_in_fan_out,
            operand,
            panels,
        )
        return panels

    def drop(self) -> None:
        """Forget the copies: the weight has changed, or will not be used for a while."""
        self._copies.clear()

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def nbytes(self) -> int:
        """The memory of the copies."""
        return sum(held.panels.nbytes for held in self._copies.values())

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return PackedWeight()

    def __reduce__(self) -> tuple[Any, ...]:
        return PackedWeight, ()


def gathered_by_fsdp(module: nn.Module) -> bool:
    """Whether the parameters of ``module`` are whole for one call at a time: a packed copy would
    hold what sharding frees, and be made anew by every call.

    FSDP1 and FSDP2 leave this mark on every module they manage.
    """
    return _FSDP in module.__dict__


def _is_plain(weight: Tensor) -> bool:
    # An inference tensor has no version to compare.
    return type(weight) in PLAIN and not weight.is_inference()


def check_pack_weight(value: str) -> None:
    if value not in PACK_WEIGHT:
        raise ValueError(f"pack_weight must be one of {', '.join(PACK_WEIGHT)}, not {value!r}")


class Packing(nn.Module):
    """A layer that keeps packed copies of its frozen weight while ``pack_weight`` allows: when they
    are made and dropped.

    A subclass calls :meth:`_init_packing`, and :meth:`drop_packed` where it changes the weight.
    """

    _packed: PackedWeight
    _pack_weight: str

    def _init_packing(self) -> None:
        self._pack_weight = "eval"
        self._packed = PackedWeight()

    @property
    def pack_weight(self) -> str:
        """When the weight is packed for the CPU's kernels: "eval", "always" or "never"."""
        return self._pack_weight

    @pack_weight.setter
    def pack_weight(self, value: str) -> None:
        check_pack_weight(value)
        self._pack_weight = value
        self.drop_packed()

    def drop_packed(self) -> None:
        """Forget the packed copies of the weight, DoRA's norms and a store's packed slots; the next
        call that wants them makes them anew.

        For code that writes to ``weight`` in a way that leaves no trace, such as through
        ``weight.data`` at a few places, or to the slots through ``lora_A.data``.
        """
        for name in ("_packed", "_norms", "_slot_panels"):
            if name in self.__dict__:
                self.__dict__[name].drop()

    def _packed_copies(self, weight: Tensor, fan_in_fan_out: bool, dtype: torch.dtype) -> Packed:
        """The packed copies of ``weight`` for the forward and dX of a call that computes in
        ``dtype``."""
        observed = is_observed()
        if observed and torch.compiler.is_compiling():
            self._note_trace()
        else:
            self._packed.called = True
        policy, training = self._pack_weight, self.training
        if policy == "never" or (training and policy == "eval"):
            return NOT_PACKED
        if _FSDP in self.__dict__:
            self._packed.drop()
            return NOT_PACKED
        # A traced call would make its copy a constant of the graph.
        if observed or dtype != weight.dtype:
            return NOT_PACKED
        packed = self._packed.get(weight, fan_in_fan_out)
        if training and torch.is_grad_enabled():
            return packed, self._packed.get(weight, fan_in_fan_out, for_dx=True)
        return packed, None

    def _note_trace(self) -> None:
        self._packed.traced = True

    # Dynamo runs it while it traces and puts nothing of it into the graph.
    _note_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def train(self: _Layer, mode: bool = True) -> _Layer:
        if mode and self._pack_weight == "eval":
            self.drop_packed()
        super().train(mode)
        return self

    def _apply(self: _Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Layer:
        # They would hold the memory of the weight that is moved or cast.
        self.drop_packed()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # As in _apply; and a Parameter to which a weak reference exists cannot be swapped
        # (torch.__future__.set_swap_module_params_on_conversion).
        self.drop_packed()
        super()._load_from_state_dict(*args, **kwargs)


class PackedLinear(Packing, nn.Linear):
    """A linear layer with a frozen weight and packed copies of it.

    A subclass sets ``fan_in_fan_out`` (the weight is stored as [in, out]).
    """

    fan_in_fan_out: bool
    # What a four-bit layer computes in, whatever x is; None: x's own dtype.
    compute_dtype: torch.dtype | None = None

    def _casts(self, x: Tensor) -> bool:
        """Whether x is not in ``compute_dtype``, and autocast leaves it so."""
        return x.dtype != self.compute_dtype and not autocast_enabled(x.device.type)

    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weight, or the one that a four-bit weight is decoded to."""
        quant = quant_state_of(self.weight)
        if quant is None:
            return self.weight.dtype
        return self.compute_dtype or quant.dtype

    def _tensors(self) -> tuple[Any, Any, Any, Any]:
        """weight, bias, ``lora_A`` and ``lora_B``."""
        held = self._parameters
        try:
            # Past nn.Module.__getattr__, which costs more than the lookup.
            return held["weight"], held["bias"], held["lora_A"], held["lora_B"]
        except KeyError:
            # One is no Parameter: parametrised, pruned, or gathered by FSDP.
            layer: Any = self
            return layer.weight, layer.bias, layer.lora_A, layer.lora_B

    def reached(self) -> tuple[bool, bool]:
        """Whether a call computed with this layer, and whether a compiler traced one: its code may
        also serve equal layers that it did not trace."""
        return self._packed.called, self._packed.traced

    def _base_forward(self, input: Tensor) -> Tensor:
        """``x W^T + bias`` with the weight as it is."""
        return self._linear_of(self.weight, input)

    def _linear_of(self, weight: Tensor, input: Tensor) -> Tensor:
        kn = self.fan_in_fan_out
        quant = None if type(weight) in PLAIN else quant_state_of(weight)
        if quant is not None:
            return four_bit_linear(input, weight, quant, self.bias, kn)
        differentiable = torch.is_grad_enabled() and (
            input.requires_grad or (self.bias is not None and self.bias.requires_grad)
        )
        # A wrong call is left to F.linear and its message.
        fits = input.dim() > 0 and input.shape[-1] == self.in_features
        if fits and not differentiable and input.device == weight.device:
            kind = input.device.type
            dtype = torch.get_autocast_dtype(kind) if autocast_enabled(kind) else input.dtype
            packed, _ = self._packed_copies(weight, kn, dtype)
            if packed is not None and type(input) in PLAIN:
                return packed_linear(input, weight, self.bias, kn, packed)
        return F.linear(input, weight.t() if kn else weight, self.bias)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        save_quant_state(self.weight, destination, prefix + "weight")

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        weight = self._parameters.get("weight")
        if getattr(weight, "quant_state", None) is not None:
            state["_four_bit"] = quant_state_of(weight)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        quant = state.pop("_four_bit", None)
        super().__setstate__(state)
        weight: Any = self._parameters.get("weight")
        if quant is not None and type(weight) in PLAIN:
            # A pickle of bitsandbytes' parameter comes back as one.
            self._parameters["weight"] = FourBitParameter(weight.data, quant)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        quant, found = quant_state_of(self.weight), list[str]()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, found, error_msgs
        )
        mine = f"{prefix}weight."
        unexpected_keys += [k for k in found if quant is None or not k.startswith(mine)]
        if quant is not None:
            assign = local_metadata.get("assign_to_params_buffers", False)
            load_quant_state(self, "weight", quant, state_dict, prefix, assign, error_msgs)
