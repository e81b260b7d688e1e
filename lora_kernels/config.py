"""A plan with its tile sizes as frozen data, and the one statement of what makes it valid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .device import DeviceFacts

# How S reaches the accumulator (module docstring of plan.py). The order is the order in which a
# tuner tries them.
PLANS = ("in_loop", "tail", "producer", "vendor", "reference")

# Plans whose work is done by Triton kernels with tiles; the others take no numbers.
TILED_PLANS = ("in_loop", "tail", "producer")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Problem(NamedTuple):
    """One call, as numbers and names: all that a plan may depend on."""

    op: str
    m: int
    n: int
    k: int
    r: int
    dtype: str
    adapter_dtype: str
    dropout: bool = False
    fan_in_fan_out: bool = False

    def bucketed(self) -> Problem:
        """The key of the tables: N and K exact, M rounded up to a power of two, r to a multiple of
        16."""
        return Problem(
            self.op,
            1 << max(self.m - 1, 0).bit_length(),
            self.n,
            self.k,
            -(-self.r // 16) * 16,
            self.dtype,
            self.adapter_dtype,
            self.dropout,
            self.fan_in_fan_out,
        )

    def key(self) -> str:
        format_ = "KN" if self.fan_in_fan_out else "NK"
        dropout = "dropout" if self.dropout else "plain"
        sizes = f"{self.m}/{self.n}/{self.k}/{self.r}"
        return f"{self.op}/{sizes}/{self.dtype}/{self.adapter_dtype}/{format_}/{dropout}"


# One builder per operator, with the operator's own arguments.


def _linear(
    op: str, rows: Tensor, n: int, k: int, adapter: Tensor | None, r: int, dropout: bool, kn: bool
) -> Problem:
    dtype = dtype_name(rows.dtype)
    adapter_dtype = dtype if adapter is None else dtype_name(adapter.dtype)
    return Problem(op, rows.shape[0], n, k, r, dtype, adapter_dtype, dropout, kn)


def _lora_shrink(
    x: Tensor, lora_a: Tensor, scale: Tensor, rng: Tensor | None = None, dropout_p: float = 0.0
) -> Problem:
    r, k = lora_a.shape
    return _linear("lora_shrink", x, r, k, lora_a, r, rng is not None, False)


def _lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    out_scale: Tensor | None = None,
) -> Problem:
    n, r = lora_b.shape
    return _linear(
        "lora_linear_fwd", x, n, lora_a.shape[1], lora_a, r, rng is not None, fan_in_fan_out
    )


def _lora_linear_dx(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    out_scale: Tensor | None = None,
) -> Problem:
    r, k = lora_a.shape
    return _linear("lora_linear_dx", dy, dy.shape[1], k, lora_a, r, rng is not None, fan_in_fan_out)


def _lora_linear_dab(
    dy: Tensor,
    x: Tensor | None,
    s: Tensor | None,
    d: Tensor | None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    da_dtype: torch.dtype | None = None,
    db_dtype: torch.dtype | None = None,
    dbias_dtype: torch.dtype | None = None,
    out_scale: Tensor | None = None,
) -> Problem:
    r = max((tail.shape[1] for tail in (s, d) if tail is not None), default=0)
    k = 0 if x is None else x.shape[1]
    return _linear("lora_linear_dab", dy, dy.shape[1], k, None, r, rng is not None, False)


PROBLEM_OF: dict[str, Callable[..., Problem]] = {
    "lora_shrink": _lora_shrink,
    "lora_linear_fwd": _lora_linear_fwd,
    "lora_linear_dx": _lora_linear_dx,
    "lora_linear_dab": _lora_linear_dab,
}


@dataclass(frozen=True, slots=True)
class Config:
    """A plan and, for the tiled plans, its compile-time numbers. Zero means: not used by this
    plan."""

    plan: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    group_m: int = 0
    split_k: int = 0
    num_warps: int = 0
    num_stages: int = 0


def invalid_reason(config: Config, problem: Problem, facts: DeviceFacts) -> str | None:
    """Why ``config`` cannot compute ``problem`` on such a device, or None if it can: the only
    statement of the constraints."""
    if config.plan not in PLANS:
        return f"no plan is called {config.plan!r}; there are {', '.join(PLANS)}"
    if config.plan in TILED_PLANS:
        return "this version has no tiled kernel"
    if config.plan == "vendor":
        if problem.dtype == "float64":
            return "float64 is computed by the reference"
        if facts.kind not in ("cpu", "cuda"):
            return f"there is no backend for {facts.kind} devices"
    return None


def is_valid(config: Config, problem: Problem, facts: DeviceFacts) -> bool:
    return invalid_reason(config, problem, facts) is None


def candidates(problem: Problem, facts: DeviceFacts) -> Iterator[Config]:
    """The configurations worth measuring for ``problem``; all of them valid."""
    for plan in PLANS:
        config = Config(plan)
        if is_valid(config, problem, facts):
            yield config
