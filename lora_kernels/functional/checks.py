"""What a user may pass: checks that raise with names and shapes, and the compute dtype."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..spec.four_bit import QuantState
from . import ops


def check(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    fan_in_fan_out: bool,
) -> torch.dtype:
    """Raise on a wrong call of ``lora_linear``, else return the compute dtype."""
    plain = ops.PLAIN
    # The usual case first: this is on the path of every call.
    if not (
        type(x) in plain
        and type(weight) in plain
        and type(lora_a) in plain
        and type(lora_b) in plain
        and (bias is None or type(bias) in plain)
        and x.device == weight.device == lora_a.device == lora_b.device
        and (bias is None or (bias.device == x.device and bias.is_floating_point()))
        and x.is_floating_point()
        and weight.is_floating_point()
        and lora_a.is_floating_point()
        and lora_b.is_floating_point()
    ):
        _check_operands(x, weight, lora_a, lora_b, bias)
    if x.dim() < 1 or weight.dim() != 2 or lora_a.dim() != 2 or lora_b.dim() != 2:
        raise ValueError(
            "lora_linear wants x [..., K] and 2-D weight, lora_a, lora_b: "
            + _shapes(x=x, weight=weight, lora_a=lora_a, lora_b=lora_b)
        )
    n, k = weight.shape[::-1] if fan_in_fan_out else weight.shape
    r = lora_a.shape[0]
    if x.shape[-1] != k or lora_a.shape[1] != k or lora_b.shape[0] != n or lora_b.shape[1] != r:
        layout = "[K, N]" if fan_in_fan_out else "[N, K]"
        raise ValueError(
            f"x [..., K], weight {layout}, lora_a [r, K] and lora_b [N, r] do not fit: "
            + _shapes(x=x, weight=weight, lora_a=lora_a, lora_b=lora_b)
        )
    if r == 0:
        raise ValueError("the rank is 0: " + _shapes(lora_a=lora_a, lora_b=lora_b))
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [N] = [{n}], not {list(bias.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")
    return compute_dtype(x, weight)


def _check_operands(x: Any, weight: Any, lora_a: Any, lora_b: Any, bias: Any) -> None:
    device = x.device if isinstance(x, Tensor) else None
    operands = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    for name, tensor in (operands if bias is None else operands | {"bias": bias}).items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
        check_local(name, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, not {tensor.dtype}")
        if tensor.device != device:
            empty = tensor.is_meta and name.startswith("lora")
            raise ValueError(
                f"{name} is on {tensor.device}, x on {device}"
                + ": it has no values; load them, or draw them by reset_lora_parameters()" * empty
            )


def _shapes(**tensors: Tensor) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())


def is_dtensor(tensor: Tensor) -> bool:
    """By name: the class lies in a package that takes a second to import."""
    return type(tensor).__name__ == "DTensor"


def is_foreign(tensor: Tensor) -> bool:
    """Whether a library gave this tensor another meaning (quantised weights): its class knows
    ``F.linear`` and none of our operators. Torch's own tracing and DTensor are no such library."""
    kind = type(tensor)
    return not (
        kind in ops.PLAIN
        or kind.__module__.startswith(
            ("torch._subclasses", "torch._functorch", "torch.distributed")
        )
    )


def check_local(name: str, tensor: Tensor) -> None:
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} is a DTensor, and LoRA is computed on local tensors: under fully_shard call "
            "the layer inside the sharded model's forward, which gathers its parameters; for "
            "tensor parallelism leave the adapted layers out of the plan, or pass each rank's own "
            "part (to_local())"
        )


def stand_in(x: Tensor, weight: Tensor, quant: QuantState) -> Tensor:
    """What :func:`check` sees of a four-bit weight: its shape, and a dtype that fits any x."""
    if weight.requires_grad:
        raise ValueError("a four-bit weight does not train: set requires_grad to False")
    if weight.device != x.device or quant.absmax.device != x.device:
        raise ValueError(
            f"the four-bit weight is on {weight.device}, its absmax on {quant.absmax.device}, "
            f"x on {x.device}"
        )
    return x.new_empty(()).expand(quant.shape)


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where autocast is on, else the one that x and weight must share."""
    if ops.autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"x is {x.dtype} and weight is {weight.dtype}: cast one of them, or use autocast"
        )
    return x.dtype


def check_rng(rng: Tensor, device: torch.device) -> Tensor:
    if rng.dtype != torch.int64 or rng.shape != (4,) or rng.device != device:
        raise ValueError(
            f"rng must be int64 [4] = (seed, offset, row0, col0) on {device}, "
            f"not {rng.dtype} {tuple(rng.shape)} on {rng.device}"
        )
    return rng.contiguous()


def scale_tensor(scale: float | Tensor, device: torch.device, compute: torch.dtype) -> Tensor:
    """A scale as the operators take it: 0-d, on ``device``, without a gradient."""
    dtype = torch.float64 if compute == torch.float64 else torch.float32
    if not isinstance(scale, Tensor):
        if device.type == "cpu" and not ops.is_observed():
            return _cpu_scale(float(scale), dtype)
        # full() is a fill on the device; tensor() would be a copy that waits for it.
        return torch.full((), scale, dtype=dtype, device=device)
    if scale.dim() != 0 or not scale.is_floating_point():
        raise ValueError(
            "scale must be a float or a 0-d floating tensor, "
            f"not {scale.dtype} {tuple(scale.shape)}"
        )
    if scale.requires_grad:
        raise ValueError(
            "scale requires grad, and lora_linear has no gradient for it: pass scale.detach()"
        )
    if scale.dtype == dtype and scale.device == device:
        return scale
    return scale.to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=256)
def _cpu_scale(value: float, dtype: torch.dtype) -> Tensor:
    """Cached: never write to it."""
    # One made in inference mode could not be saved for a backward later.
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device="cpu")
