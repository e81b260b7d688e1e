"""The base linear of a mixed batch with every row's own adapter: ``linear_fwd.py``'s GEMM, whose
tail is chosen row by row, behind the shrink of ``segmented.py``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..planning.config import Config
from .linear_fwd import gemm_with_tail
from .rows import stacks_of
from .segmented import dx_shrink, segmented_shrink


def segmented_linear_fwd(
    x: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    bias: Tensor | None = None,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    packed: Tensor | None = None,
    *,
    config: Config,
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    w = weight.t() if fan_in_fan_out else weight
    s = segmented_shrink(x, lora_a, table, packed_slices, rng, dropout_p, config=shrink)
    b, widths = stacks_of(lora_b, x.dtype), [t.shape[1] for t in lora_b]
    # The scale is in S.
    scale = table[2]
    return gemm_with_tail(x, w, x, b, s, scale, bias, None, None, 0.0, config, table, widths)


def segmented_linear_dx(
    dy: Tensor,
    weight: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    table: Sequence[Tensor],
    packed_slices: int = 0,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    packed: Tensor | None = None,
    *,
    config: Config,
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    w = weight if fan_in_fan_out else weight.t()
    d = dx_shrink(dy, lora_b, table, dropout_p, config=shrink)
    a = stacks_of(lora_a, dy.dtype, packed_slices)
    return gemm_with_tail(dy, w, dy, a, d, table[2], None, None, rng, dropout_p, config, table)
