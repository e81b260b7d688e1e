"""The GEMM with a low-rank tail (forward, dX: linear_fwd.py) as one loop over all tiles and steps,
for bfloat16.

    out[m, n] = sum_k [x, s][m, k] [w; b][k, n]  (+ bias[n])

A program for each multiprocessor walks its tiles, and the steps of all of them are one loop
(``flatten``): while a tile is stored, the first operands of the next one are on their way. The tail
is the last step of a tile, read from s and b by descriptors of the same block as x's and w's, which
fill up with zeros what lies beyond the rank: it has no loop, no registers and no wait of its own. A
result leaves by descriptors too, one half of the columns after the other, so that what waits to be
stored takes half of the shared memory and leaves room for a fourth stage.

Ideas: Triton's tutorial of persistent products (the flat loop, the halves); a product over [x, s]
and [w; b] is what a library can do where both lie side by side in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..planning.config import Config
from ..spec.problem import suits_descriptor
from .common import tile_order
from .linear_fwd import base_operands, lora_shrink
from .tiles import load_weight


@triton.jit
def _lora_linear_persistent_kernel(
    x, w, s, b, bias_ptr,
    y,
    M, N, K, R,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr, WEIGHT_NK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    base_steps = tl.cdiv(K, BLOCK_K)
    steps = base_steps + tl.cdiv(R, BLOCK_K)
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_order(tile, num_m, num_n, GROUP_M)
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for step in tl.range(steps):
            left, right, k = x, w, step * BLOCK_K
            if step >= base_steps:
                left, right, k = s, b, (step - base_steps) * BLOCK_K
            x_tile = left.load([row, k])
            w_tile = load_weight(right, k, col, K, N, 0, 0, BLOCK_K, BLOCK_N, WEIGHT_NK, True)
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
        if HAS_BIAS:
            offs_n = col + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        halves = tl.permute(tl.reshape(acc, [BLOCK_M, 2, HALF]), [0, 2, 1])
        first, second = tl.split(halves)
        y.store([row, col], first.to(y.dtype))
        y.store([row, col + HALF], second.to(y.dtype))


def lora_linear_fwd(
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
    packed: Tensor | None = None,
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
    *,
    config: Config,
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    assert out_scale is None, "config.invalid_reason leaves out_scale to the other plans"
    s = lora_shrink(x, lora_a, scale, rng, dropout_p, config=shrink)
    return _launch(x, weight.t() if fan_in_fan_out else weight, s, lora_b, bias, config), s


def lora_linear_dx(
    dy: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: Tensor,
    rng: Tensor | None = None,
    dropout_p: float = 0.0,
    fan_in_fan_out: bool = False,
    out_scale: Tensor | None = None,
    packed: Tensor | None = None,
    quant: Sequence[Tensor] | None = None,
    quant_block: int = 0,
    *,
    config: Config,
    shrink: Config,
) -> tuple[Tensor, Tensor]:
    assert rng is None and out_scale is None, "config.invalid_reason leaves both to other plans"
    d = lora_shrink(dy, lora_b.t(), scale, None, dropout_p, config=shrink)
    w = weight if fan_in_fan_out else weight.t()
    return _launch(dy, w, d, lora_a.t(), None, config), d


def _beside(b: Tensor, dtype: torch.dtype) -> Tensor:
    """``b`` as a descriptor reads it: a copy where its own dtype or strides do not allow that."""
    if b.dtype == dtype and suits_descriptor(b, transposed=False):
        return b
    return b.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _launch(
    x: Tensor, w: Tensor, s: Tensor, b: Tensor, bias: Tensor | None, config: Config
) -> Tensor:
    """x [M, K], w [N, K], s [M, R], b [N, R]."""
    (m, k), (n, r) = x.shape, b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0:
        return y
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    x_arg, w_arg, _, weight_nk = base_operands(x, w, config)
    # Blocks along the rank are as wide as those along K, so that either is loaded by one line.
    s_arg = TensorDescriptor.from_tensor(s, [block_m, block_k])
    b_arg = TensorDescriptor.from_tensor(
        _beside(b if weight_nk else b.t(), x.dtype),
        [block_n, block_k] if weight_nk else [block_k, block_n],
    )
    y_arg = TensorDescriptor.from_tensor(y, [block_m, block_n // 2])
    tiles = -(-m // block_m) * -(-n // block_n)
    _lora_linear_persistent_kernel[(min(tiles, config.programs or tiles),)](
        x_arg, w_arg, s_arg, b_arg, x if bias is None else bias.contiguous(),
        y_arg,
        m, n, k, r,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        GROUP_M=config.group_m, WEIGHT_NK=weight_nk, HAS_BIAS=bias is not None,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y
