"""``segmented_lora``, its halves, and ``segmented_linear`` with the base linear under it: adapters
of a mixed batch, every row with its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.four_bit import quant_state_of
from ..spec.reference import tail_dtype
from ..spec.segments import SegmentTable
from . import ops
from .checks import check_local, check_rng, compute_dtype, is_foreign, stand_in
from .linear import NOT_PACKED, Packed, draw_rng, rows_of
from .segmented_autograd import Call, SegmentedLinear, SegmentedLoRA, linear_forward

Stack = Tensor | Sequence[Tensor]


def segmented_lora(
    x: Tensor,
    lora_a: Stack,
    lora_b: Stack,
    seg: SegmentTable,
    out: Tensor | None = None,
    *,
    output_slices: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    rng: Tensor | None = None,
) -> Tensor:
    """``scale * (x A^T) B^T`` for every row with the adapter of its own slot in ``seg``, in one
    launch for all adapters and all slices.

    Idea: punica's SGMV and BGMV (Chen et al., arXiv:2310.18547), S-LoRA's mixed ranks (Sheng et
    al., arXiv:2311.03285).

    Args:
        x: [..., K], any strides; float32, float16, bfloat16 (float64 by the reference). Its rows
            are those of ``seg``: as many as its last batch had, or up to its capacity.
        lora_a: [S, r_max, K], A of every slot, or a sequence of such tensors, one for each slice
            (query, key and value of one input). Any floating dtype; rounded to x's on
            use, for float16 to float32.
        lora_b: [S, N, r_max], or a sequence, one for each slice; widths N may differ.
        seg: the slot of each row, and the live rank and the scale of each slot. Compute and memory
            traffic follow live ranks; what lies beyond them, or in unused slots, is never read.
        out: None: a new tensor, in which rows without an adapter are zero. A tensor [..., sum of
            N]: ``out += result`` with one rounding of the sum, rows without an adapter untouched
            bit for bit, and ``out`` is returned. For serving: nothing of it is recorded.
        output_slices: the widths of n slices that ``lora_a`` [S, n*r_max, K] and ``lora_b``
            [S, sum of N, r_max] hold together; slice j of a slot of live rank r is then rows j*r to
            (j+1)*r of its A (SGLang's layout).
        dropout_p, training, rng: as in :func:`lora_kernels.lora_linear`; the row of a mask is
            ``seg.logical_row``, and slice j draws its mask with offset + j.

    Returns:
        [..., sum of N] in x's dtype, or ``out``.

    x, ``lora_a`` and ``lora_b`` receive gradients: each adapter's from its own rows alone, zero for
    slots that no row uses and beyond the live rank. Saved for backward are x and S [M, n, r_max].
    Results are deterministic, and on a CPU a row's bits depend on no other row.

    Raises:
        ValueError: shapes that do not fit, a table for another number of rows, ranks that the table
            allows and the stacks do not hold, tensors on different devices, ``out`` together with
            dropout or with a gradient to record, or sharing memory with itself or with x.
        TypeError: something is not a floating tensor.

    >>> import torch
    >>> seg = SegmentTable.from_rows([1, -1, 0], rank_of_slot=[1, 1], scale_of_slot=[1.0, 10.0])
    >>> lora_a, lora_b = torch.ones(2, 1, 4), torch.ones(2, 3, 1)
    >>> segmented_lora(torch.ones(3, 4), lora_a, lora_b, seg)
    tensor([[40., 40., 40.],
            [ 0.,  0.,  0.],
            [ 4.,  4.,  4.]])
    """
    a, b, packed = _stacks(lora_a, lora_b, output_slices)
    _check(x, seg, a, b, packed, dropout_p)
    rows = rows_of(x, x.dtype)
    rng, dropout_p = _dropout(rng, dropout_p if training else 0.0, x.device)
    differentiable = ops.records_gradients() and any(t.requires_grad for t in (x, *a, *b))
    if out is not None:
        _check_out(out, x, [t.shape[1] for t in b], differentiable, rng)
        ops.segmented_lora_(_rows_of_out(out), rows, a, b, seg.tensors(), packed)
        return out
    if differentiable:
        call = Call(seg.tensors(), packed, dropout_p, False, x.dtype, NOT_PACKED)
        y = SegmentedLoRA.apply(rows, rng, call, len(b), *a, *b)
    else:
        y, _ = ops.segmented_lora(rows, a, b, seg.tensors(), packed, rng, dropout_p)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def segmented_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Stack,
    lora_b: Stack,
    seg: SegmentTable,
    bias: Tensor | None = None,
    *,
    output_slices: Sequence[int] | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    fan_in_fan_out: bool = False,
    rng: Tensor | None = None,
    packed: Packed = NOT_PACKED,
) -> Tensor:
    """``x W^T + bias`` and, for every row with an adapter, ``scale * (x A^T) B^T`` of its own, in
    one pass with one rounding: a linear layer of a batch that mixes adapters.

    Args:
        x: [..., K] as for :func:`segmented_lora`; under autocast it is cast as by ``F.linear``.
        weight: [sum of N, K] in x's dtype, the slices one below the other; or [K, sum of N] with
            ``fan_in_fan_out``; or a four-bit one, as for :func:`lora_kernels.lora_linear`.
        bias: [sum of N] or None, any floating dtype.
        packed: see :func:`lora_kernels.lora_linear`.

    The other arguments, the gradients and what is raised are :func:`segmented_lora`'s; ``weight``
    and ``bias`` get a gradient if they require one. Rows without an adapter are the base linear's.

    Returns:
        [..., sum of N] in the compute dtype.

    >>> import torch
    >>> seg = SegmentTable.from_rows([0, -1], rank_of_slot=[1], scale_of_slot=[10.0])
    >>> weight, lora_a, lora_b = torch.ones(3, 4), torch.ones(1, 1, 4), torch.ones(1, 3, 1)
    >>> segmented_linear(torch.ones(2, 4), weight, lora_a, lora_b, seg)
    tensor([[44., 44., 44.],
            [ 4.,  4.,  4.]])
    """
    quant = None if type(weight) in ops.PLAIN else quant_state_of(weight)
    if quant is None and type(weight) not in ops.PLAIN and is_foreign(weight):
        y = F.linear(x, weight.t() if fan_in_fan_out else weight, bias)
        options: Any = {"output_slices": output_slices, "training": training, "rng": rng}
        delta = segmented_lora(x, lora_a, lora_b, seg, dropout_p=dropout_p, **options)
        return y + delta.to(y.dtype)
    a, b, packed_slices = _stacks(lora_a, lora_b, output_slices)
    _check(x, seg, a, b, packed_slices, dropout_p)
    shape = weight if quant is None else stand_in(x, weight, quant)
    _check_base(x, shape, bias, sum(t.shape[1] for t in b), fan_in_fan_out)
    dtype = compute_dtype(x, shape)
    if quant is not None:
        weight = weight.data
    if weight.dtype != dtype:
        packed = NOT_PACKED
    rng, dropout_p = _dropout(rng, dropout_p if training else 0.0, x.device)
    call = Call(seg.tensors(), packed_slices, dropout_p, fan_in_fan_out, dtype, packed, quant)
    return checked_segmented_linear(x, weight, bias, rng, call, a, b)


def checked_segmented_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    call: Call,
    a: list[Tensor],
    b: list[Tensor],
) -> Tensor:
    """:func:`segmented_linear` of checked operands; with dropout and without ``rng`` it draws
    one."""
    if rng is None and call.dropout_p > 0.0:
        rng = draw_rng(x.device)
    if ops.records_gradients() and (
        x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or any(t.requires_grad for t in (*a, *b))
    ):
        return SegmentedLinear.apply(x, weight, bias, rng, call, len(b), *a, *b)
    y, _ = linear_forward(x, weight, bias, rng, call, a, b)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1])


def segmented_shrink(
    x: Tensor, lora_a: Stack, seg: SegmentTable, *, packed_slices: int = 0
) -> Tensor:
    """``S = scale * x A^T`` of every row's own adapter: x [..., K] -> [M, n, r_max] in x's dtype
    (float32 for float16, whose range S may leave), zero beyond the live rank and in rows without an
    adapter. Not differentiable; the arguments are
    :func:`segmented_lora`'s, and ``packed_slices`` is the n of its ``output_slices``."""
    a = _list(lora_a)
    _check(x, seg, a, None, packed_slices, 0.0)
    with torch.no_grad():
        return ops.segmented_shrink(rows_of(x, x.dtype), a, seg.tensors(), packed_slices)


def segmented_expand(
    s: Tensor, lora_b: Stack, seg: SegmentTable, out: Tensor | None = None
) -> Tensor:
    """``S B^T`` of every row's own adapter: s [M, n, r_max] of :func:`segmented_shrink` ->
    [M, sum of N] in s's dtype, or added to ``out`` in place, as :func:`segmented_lora` does;
    ``out`` may be float16 where s is float32. Not differentiable."""
    b = _list(lora_b)
    if s.dim() != 3 or s.shape[1] != len(b):
        raise ValueError(f"s must be [M, {len(b)}, r_max], not {list(s.shape)}")
    _check_table(s, seg)
    _check_b(s, b, seg, s.shape[2])
    with torch.no_grad():
        if out is None:
            return ops.segmented_expand(s, b, seg.tensors())
        dtype = out.dtype if s.dtype == tail_dtype(out.dtype) else s.dtype
        _check_out(out, s[:, 0], [t.shape[1] for t in b], False, None, dtype)
        ops.segmented_expand_(out, s, b, seg.tensors())
        return out


def _dropout(
    rng: Tensor | None, dropout_p: float, device: torch.device
) -> tuple[Tensor | None, float]:
    """The operators' rng and probability; a mask is drawn where there is dropout, and none is
    given."""
    if dropout_p == 0.0:
        return None, 0.0
    return draw_rng(device) if rng is None else check_rng(rng, device), dropout_p


def _rows_of_out(out: Tensor) -> Tensor:
    return out.view(-1, out.shape[-1]) if out.dim() != 2 else out


def _list(stack: Stack) -> list[Tensor]:
    return [stack] if isinstance(stack, Tensor) else list(stack)


def _stacks(
    lora_a: Stack, lora_b: Stack, output_slices: Sequence[int] | None
) -> tuple[list[Tensor], list[Tensor], int]:
    """A and B one tensor a slice, and the number of slices that A packs by live rank (or 0)."""
    a, b = _list(lora_a), _list(lora_b)
    if output_slices is None:
        if len(a) != len(b) or not a:
            raise ValueError(f"lora_a has {len(a)} slices and lora_b {len(b)}")
        return a, b, 0
    widths = [int(width) for width in output_slices]
    if len(a) != 1 or len(b) != 1 or b[0].dim() != 3 or sum(widths) != b[0].shape[1]:
        raise ValueError(
            f"output_slices {widths} take one lora_a and one lora_b [S, {sum(widths)}, r_max]"
        )
    return a, list(b[0].split(widths, dim=1)), len(widths)


def _check(
    x: Tensor,
    seg: SegmentTable,
    a: list[Tensor],
    b: list[Tensor] | None,
    packed_slices: int,
    dropout_p: float,
) -> None:
    for name, tensor in (("x", x), *(("lora_a", t) for t in a)):
        _check_tensor(name, tensor, x.device)
    if x.dim() < 1:
        raise ValueError(f"x must be [..., K], not {list(x.shape)}")
    _check_table(x, seg, x.numel() // max(x.shape[-1], 1))
    n = max(packed_slices, 1)
    for t in a:
        if t.dim() != 3 or t.shape[0] != seg.slots or t.shape[2] != x.shape[-1]:
            raise ValueError(
                f"lora_a must be [S, r_max, K] = [{seg.slots}, r_max, {x.shape[-1]}], not "
                f"{list(t.shape)}"
            )
        if t.shape[1] % n or t.shape != a[0].shape:
            raise ValueError(f"the slices of lora_a differ: {[list(t.shape) for t in a]}")
        _check_rank("lora_a", t.shape[1] // n, seg)
    if b is not None:
        _check_b(x, b, seg, a[0].shape[1] // n)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), not {dropout_p}")


def _check_b(x: Tensor, b: list[Tensor], seg: SegmentTable, r_max: int) -> None:
    for t in b:
        _check_tensor("lora_b", t, x.device)
        if t.dim() != 3 or t.shape[0] != seg.slots or t.shape[2] != r_max:
            raise ValueError(
                f"lora_b must be [S, N, r_max] = [{seg.slots}, N, {r_max}], not {list(t.shape)}"
            )
        _check_rank("lora_b", r_max, seg)


def _check_base(
    x: Tensor, weight: Tensor, bias: Tensor | None, n: int, fan_in_fan_out: bool
) -> None:
    _check_tensor("weight", weight, x.device)
    shape = (x.shape[-1], n) if fan_in_fan_out else (n, x.shape[-1])
    if weight.shape != shape:
        raise ValueError(
            f"weight must be {list(shape)}, as x {list(x.shape)} and lora_b say, not "
            f"{list(weight.shape)}"
        )
    if bias is not None:
        _check_tensor("bias", bias, x.device)
        if bias.shape != (n,):
            raise ValueError(f"bias must be [{n}], not {list(bias.shape)}")


def _check_tensor(name: str, tensor: Any, device: torch.device) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating tensor, not {kind}")
    check_local(name, tensor)
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, x on {device}")


def _check_rank(name: str, r_max: int, seg: SegmentTable) -> None:
    if r_max < seg.max_rank:
        raise ValueError(f"{name} holds ranks up to {r_max}, the table has up to {seg.max_rank}")


def _check_table(x: Tensor, seg: SegmentTable, rows: int | None = None) -> None:
    rows = x.shape[0] if rows is None else rows
    if not isinstance(seg, SegmentTable):
        raise TypeError(f"seg must be a SegmentTable, not {type(seg).__name__}")
    if seg.device != x.device:
        raise ValueError(f"seg is on {seg.device}, x on {x.device}")
    if not seg.count <= rows <= seg.rows:
        raise ValueError(
            f"the table was filled for {seg.count} rows and has room for {seg.rows}, x has {rows}"
        )


def _check_out(
    out: Tensor,
    x: Tensor,
    widths: list[int],
    differentiable: bool,
    rng: Tensor | None,
    dtype: torch.dtype | None = None,
) -> None:
    width = sum(widths)
    if out.shape != (*x.shape[:-1], width):
        raise ValueError(f"out must be {[*x.shape[:-1], width]}, as x says, not {list(out.shape)}")
    if out.dtype != (dtype or x.dtype) or out.device != x.device:
        raise ValueError(f"out is {out.dtype} on {out.device}, x {x.dtype} on {x.device}")
    if differentiable or (ops.records_gradients() and out.requires_grad):
        raise ValueError("out= records no gradient: use torch.no_grad(), or out=None")
    if rng is not None:
        raise ValueError("out= is for serving and has no dropout")
    if torch.compiler.is_compiling():
        # Addresses are no part of a trace.
        return
    if _overlaps_itself(out):
        raise ValueError("out= has elements that share memory, as those of expand() do: clone it")
    if _overlap(out, x):
        raise ValueError("out= shares memory with the input, which is read meanwhile: clone one")


def _overlaps_itself(tensor: Tensor) -> bool:
    end = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < end:
                return tensor.numel() > 0
            end += stride * (size - 1)
    return False


def _overlap(out: Tensor, x: Tensor) -> bool:
    """Whether they share memory of one storage; columns side by side do not."""
    if out.untyped_storage()._cdata != x.untyped_storage()._cdata or not (
        out.numel() and x.numel()
    ):
        return False
    starts = out.storage_offset(), x.storage_offset()
    ends = [
        start + sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))
        for start, t in zip(starts, (out, x), strict=True)
    ]
    if ends[0] < starts[1] or ends[1] < starts[0]:
        return False
    row = min(
        (s for s, size in zip(out.stride(), out.shape[:-1], strict=False) if size > 1), default=0
    )
    if out.stride()[:-1] != x.stride()[:-1] or out.stride(-1) != 1 or x.stride(-1) != 1 or not row:
        return True
    column = (starts[1] - starts[0]) % row
    return column < out.shape[-1] or column + x.shape[-1] > row
