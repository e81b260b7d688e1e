"""A mixture's experts that hold four-bit weights."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..spec.four_bit import DTYPES, OUTER_BLOCK, code_of, quant_state_of, quantize
from .foreign import expert_matrices, four_bit_original
from .four_bit_parameter import FourBitParameter, load_quant_state, save_quant_state
from .replacing import become, put_back
from .routed import experts_forward, matrices_of, unsupported_reason, weight_of


class QuantizedExperts(nn.Module):
    """Experts of transformers with frozen four-bit weights, computed in one grouped operator a
    Parameter that reads the bytes of the experts that have rows.

    Made in place by :meth:`quantize`: the module keeps its attributes, biases and hooks, and gets a
    subclass of its own class. ``state_dict`` holds the bytes of a Parameter and, beside them, the
    keys of bitsandbytes' ``replace_parameter_4bit``.
    """

    _kind: type[nn.Module]
    compute_dtype: torch.dtype | None
    # Whether bitsandbytes held the weights before, by its parametrisation.
    _was_parametrised: bool

    @staticmethod
    def quantize(
        module: nn.Module,
        quant_type: str = "nf4",
        *,
        double_quant: bool = True,
        block: int = 64,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantizedExperts:
        """Quantise the 3-D Parameters of ``module``; the arguments are those of
        :meth:`QuantizedLinear.from_linear`.

        Raises:
            TypeError: ``module`` is not what this serves; the message says why.
            ValueError: an unknown type or block.
        """
        reason = unsupported_reason(module) or _obstacle(module)
        if reason is not None:
            raise TypeError(f"QuantizedExperts.quantize: the module {reason}")
        held = module._parameters
        made = {}
        for name in matrices_of(module):
            weight: Any = held[name]
            found = quantize(weight.detach(), quant_type, block=block, double_quant=double_quant)
            made[name] = FourBitParameter(*found)
        held.update(made)
        return _become(module, compute_dtype, False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the class's own: hidden_states [T, H], top_k_index and top_k_weights [T, k]."""
        return experts_forward(self, {}, *args, **kwargs)

    # By which :func:`expert_matrices` knows that nothing but this computes them.
    _four_bit_forward = forward

    def _in_four_bits(self) -> dict[str, FourBitParameter]:
        held = self._parameters.items()
        return {name: p for name, p in held if isinstance(p, FourBitParameter)}

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, weight in self._in_four_bits().items():
            save_quant_state(weight, destination, prefix + name)

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
        quants = {name: p.quant_state for name, p in self._in_four_bits().items()}
        found = list[str]()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, found, error_msgs
        )
        known = tuple(f"{prefix}{name}." for name in quants)
        unexpected_keys += [key for key in found if not key.startswith(known)]
        assign = local_metadata.get("assign_to_params_buffers", False)
        for name, quant in quants.items():
            load_quant_state(self, name, quant, state_dict, prefix, assign, error_msgs)

    def extra_repr(self) -> str:
        weights = self._in_four_bits().items()
        return ", ".join(
            f"{name}={p.quant_state.quant_type} {list(p.quant_state.shape)}" for name, p in weights
        )


def _obstacle(module: nn.Module) -> str | None:
    for name in matrices_of(module):
        weight = weight_of(module, name)
        if getattr(weight, "quant_state", None) is not None:
            return f"has its {name} in four bits already"
        if weight.dtype not in DTYPES:
            return f"has its {name} in {weight.dtype}"
    return None


def _become(
    module: Any, compute_dtype: torch.dtype | None, was_parametrised: bool
) -> QuantizedExperts:
    become(module, QuantizedExperts)
    module.compute_dtype, module._was_parametrised = compute_dtype, was_parametrised
    made: QuantizedExperts = module
    return made


def take_over(module: nn.Module) -> None:
    """Make experts whose weights bitsandbytes holds by its parametrisation
    (``replace_parameter_4bit``) :class:`QuantizedExperts` with the same bytes. Others stay as they
    are."""
    names = expert_matrices(module)
    found = {name: four_bit_original(module, name) for name in names}
    weights = {name: weight for name, weight in found.items() if weight is not None}
    if not weights:
        return
    for name in weights:
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    held = module._parameters
    for name in names:
        # In their order, behind the others.
        weight = weights.get(name, held.pop(name, None))
        if isinstance(weight, FourBitParameter):
            quant = quant_state_of(weight)
            assert quant is not None
            weight.quant_state = quant
        held[name] = weight
    _become(module, None, True)


def give_back(module: Any) -> None:
    """Undo :func:`take_over`; experts of which nothing is in four bits any more (they were merged)
    are of their own class again."""
    if not isinstance(module, QuantizedExperts):
        return
    weights = module._in_four_bits()
    if weights and not module._was_parametrised:
        return
    del module.compute_dtype, module._was_parametrised
    put_back(module)
    for name, weight in weights.items():
        _parametrise(module, name, weight)


def _parametrise(module: nn.Module, name: str, weight: FourBitParameter) -> None:
    """As ``replace_parameter_4bit`` does, whose hooks ``module`` still has."""
    bnb: Any = sys.modules["bitsandbytes"]
    quant = weight.quant_state
    nested, outer, offset = quant.nested, None, None
    if nested is not None:
        offset = nested.offset
        outer = bnb.functional.QuantState(
            absmax=nested.absmax, code=nested.code, blocksize=OUTER_BLOCK, dtype=torch.float32
        )
    state = bnb.functional.QuantState(
        absmax=quant.absmax,
        shape=torch.Size(quant.shape),
        code=code_of(quant.quant_type, weight.device),
        blocksize=quant.block,
        quant_type=quant.quant_type,
        dtype=quant.dtype,
        offset=offset,
        state2=outer,
    )
    module._parameters[name] = nn.Parameter(weight.data, requires_grad=False)
    made = sys.modules["bitsandbytes.nn.parametrize"].Bnb4bitParametrization(state)
    parametrize.register_parametrization(module, name, made, unsafe=True)
