"""Shared by the kernels: the tail's operands, the dropout bits, the order of tiles, and the
counters of split reductions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_hip, is_hip_cdna3

from ..spec.reference import dropout_threshold


@triton.constexpr_function
def tail_precision(dtype):
    """How products of the tail are computed for rows of ``dtype``. Those of float16 need float32's
    range and their own precision, which is TF32; of AMD's architectures one knows that, and the
    others multiply float32 on their matrix cores."""
    exact = dtype != tl.float16 or (is_hip() and not is_hip_cdna3())
    return "ieee" if exact else "tf32"


@triton.jit
def tail_tile(tile, dtype: tl.constexpr):
    """An operand of the tail for rows of ``dtype``: rounded once to that, for float16 to TF32's 11
    bits, held in float32."""
    if dtype != tl.float16:
        tile = tile.to(dtype)
    elif tile.dtype == tl.float16:
        tile = tile.to(tl.float32)
    else:
        # To nearest, where the tensor core would cut off. What is not finite stays as it is: of a
        # NaN the carry could make a zero.
        bits = tile.to(tl.float32).to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        bits = tl.where(finite, (bits + 0x1000) & 0xFFFFE000, bits)
        tile = bits.to(tl.float32, bitcast=True)
    return tile


@triton.jit
def dropout_keep(rng_ptr, row, col, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """The mask of a tile: bool [BLOCK_M, BLOCK_K], bit for bit ``reference.dropout_mask``.

    ``row`` and ``col`` are the tile's first row and column; ``col`` is a multiple of 8, and so is
    the logical col0 in ``rng``: one Philox block decides eight neighbouring columns.
    """
    rows = row + tl.arange(0, BLOCK_M)
    return dropout_keep_rows(rng_ptr, 0, rows, col, threshold, BLOCK_M, BLOCK_K)


@triton.jit
def dropout_keep_rows(
    rng_ptr, stream, rows, col, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """The same for ``rows`` [BLOCK_M] that need not be neighbours, with ``stream`` added to the
    offset in ``rng``."""
    seed = tl.load(rng_ptr)
    offset = tl.load(rng_ptr + 1) + stream
    rows = (tl.load(rng_ptr + 2) + rows).to(tl.uint32)
    col_blocks = ((tl.load(rng_ptr + 3) + col) // 8 + tl.arange(0, BLOCK_K // 8)).to(tl.uint32)
    c0 = tl.broadcast_to(rows[:, None], [BLOCK_M, BLOCK_K // 8])
    c1 = tl.broadcast_to(col_blocks[None, :], [BLOCK_M, BLOCK_K // 8])
    c2 = tl.zeros_like(c0) + offset.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (offset >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, c3)
    # join() puts its arguments innermost; the outer join picks word 0/1 of a pair, the inner 0/2.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [BLOCK_M, BLOCK_K]).to(tl.int32) >= threshold


@triton.jit
def _masked_kernel(
    x_ptr, rng_ptr,
    out_ptr,
    M, K,
    stride_xm, stride_xk,
    threshold,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, col = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    offs_m, offs_k = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_K)
    rows, cols = offs_m.to(tl.int64)[:, None], offs_k.to(tl.int64)[None, :]
    inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    x = tl.load(x_ptr + rows * stride_xm + cols * stride_xk, mask=inside, other=0.0)
    keep = dropout_keep(rng_ptr, row, col, threshold, BLOCK_M, BLOCK_K)
    tl.store(out_ptr + rows * K + cols, tl.where(keep, x, 0.0), mask=inside)


def masked(x: Tensor, rng: Tensor, dropout_p: float) -> Tensor:
    """``reference.masked`` in one launch, for the plans whose products the library computes."""
    m, k = x.shape
    out = torch.empty(m, k, dtype=x.dtype, device=x.device)
    if out.numel():
        # [16, 256]: rows of half a kilobyte, eight Philox blocks to a thread (a guess).
        _masked_kernel[(-(-m // 16), -(-k // 256))](
            x, rng, out, m, k, *x.stride(), dropout_threshold(dropout_p), BLOCK_M=16, BLOCK_K=256
        )
    return out


@triton.jit
def tile_order(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Tiles in groups of GROUP_M rows, so that neighbours in time share tiles of W in the cache."""
    per_group = GROUP_M * num_n
    first_m = (tile // per_group) * GROUP_M
    height = tl.minimum(num_m - first_m, GROUP_M)
    within = tile % per_group
    return first_m + within % height, within // height


@triton.jit
def last_to_arrive(counter_ptr, expected):
    """Whether this program is the last of ``expected`` to come here; the counter is then zero
    again.

    The last one sees what the others stored before they came: the barrier orders the stores of this
    program before its arrival, and the arrival acquires theirs.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = arrived == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


def partials(elements: int, split: int, device: torch.device) -> Tensor:
    """float32 scratch for the partial sums of a split reduction; empty where nothing is split."""
    return torch.empty(elements if split > 1 else 0, dtype=torch.float32, device=device)


_counters: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, needed: int) -> Tensor:
    """int32 zeros, one set per stream, which every kernel leaves as zeros again.

    Under graph capture they are made for the graph: memory that only a replay fills cannot be kept.
    """
    if device.type != "cuda":
        return torch.zeros(needed, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(needed, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    kept = _counters.get(key)
    if kept is None or kept.numel() < needed:
        kept = torch.zeros(max(needed, 4096), dtype=torch.int32, device=device)
        _counters[key] = kept
    return kept
