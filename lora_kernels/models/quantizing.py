"""``quantize_base``: the linear layers of a model, and its experts, in four bits."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from ..layers import routed
from ..layers.experts import FusedLoRAExperts
from ..layers.four_bit import QuantizedLinear
from ..layers.four_bit_experts import QuantizedExperts
from ..layers.fused import FusedLoRALinear
from ..layers.replacing import replace_modules, unsupported_reason
from ..spec.four_bit import DTYPES, check_format
from . import foreign

ModelT = TypeVar("ModelT", bound=nn.Module)


def quantize_base(
    model: ModelT,
    quant_type: str = "nf4",
    *,
    double_quant: bool = True,
    block: int = 64,
    compute_dtype: torch.dtype | None = None,
    experts: bool = False,
) -> ModelT:
    """Quantise the linear layers of ``model`` to four bits, in place, and return the model: QLoRA's
    base (Dettmers et al., arXiv:2305.14314), ready for :func:`lora_kernels.apply_lora`.

    Every ``nn.Linear`` and Conv1D becomes a :class:`lora_kernels.QuantizedLinear`, except the
    output head, classifier heads, layers whose weight something else shares, and those that
    ``apply_lora`` could not adapt. The bytes, and ``state_dict``, are those of bitsandbytes, which
    need not be installed.

    Args:
        quant_type, double_quant, block, compute_dtype: as for
            :meth:`lora_kernels.QuantizedLinear.from_linear`.
        experts: quantise every experts module of a mixture too (transformers >= 5): its 3-D
            Parameters keep their place and become bytes, as bitsandbytes'
            ``replace_parameter_4bit`` makes them of a whole Parameter.

    Raises:
        ValueError: an unknown type or block; nothing to quantise; a model with LoRA layers: the
            base is quantised first.

    >>> import lora_kernels as lk
    >>> model = lk.quantize_base(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)))
    >>> model[0]
    QuantizedLinear(in_features=64, out_features=64, bias=True, nf4)
    >>> model = lk.apply_lora(model, r=4)
    >>> model[0].weight
    FourBitParameter(nf4, [64, 64], device=cpu)
    """
    check_format(quant_type, block)
    owners: dict[nn.Parameter, set[nn.Module]] = {}
    for module in model.modules():
        if isinstance(module, (FusedLoRALinear, FusedLoRAExperts)):
            raise ValueError("the model has LoRA layers: quantise its base first, then apply_lora")
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    outputs = foreign.output_heads(model)
    paths: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(name)
    by_name = {name: module for module, names in paths.items() for name in names}
    chosen = {}
    for module, names in paths.items():
        if (
            "" not in names
            and unsupported_reason(module) is None
            and not isinstance(module, QuantizedLinear)
            and getattr(module.weight, "quant_state", None) is None
            and module.weight.dtype in DTYPES
            and len(owners[module._parameters["weight"]]) == 1  # type: ignore[index]
            and foreign.head_reason(model, names[0], module, outputs) is None
            and foreign.bypass_reason(by_name, names) is None
            and foreign.offload_reason(module) is None
        ):
            chosen[module] = QuantizedLinear.from_linear(
                module,
                quant_type,
                double_quant=double_quant,
                block=block,
                compute_dtype=compute_dtype,
            )
    mixtures = [m for m in paths if experts and _is_quantisable_mixture(m, owners)]
    if not chosen and not mixtures:
        what = "neither a linear layer nor experts" if experts else "no linear layer"
        raise ValueError(f"{type(model).__name__} has {what} to quantise")
    replace_modules(model, chosen)
    for module in mixtures:
        QuantizedExperts.quantize(
            module,
            quant_type,
            double_quant=double_quant,
            block=block,
            compute_dtype=compute_dtype,
        )
    return model


def _is_quantisable_mixture(module: nn.Module, owners: dict[nn.Parameter, set[nn.Module]]) -> bool:
    if routed.unsupported_reason(module) is not None:
        return False
    weights: list[Any] = [routed.weight_of(module, name) for name in routed.matrices_of(module)]
    return all(
        getattr(weight, "quant_state", None) is None
        and weight.dtype in DTYPES
        and len(owners[weight]) == 1
        for weight in weights
    )
