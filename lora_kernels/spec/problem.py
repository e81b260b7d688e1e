"""One operator call as numbers and names: all that a plan may depend on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operators import EXPERT_OPERATORS, LINEARS_OPERATORS, OPERATORS, SCHEMAS, of_operator

_DX = ("lora_linear_dx", "lora_linears_dx", "segmented_linear_dx", "expert_linear_dx")

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@functools.cache
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
    out_scale: bool = False
    # whether the big operands suit tensor descriptors: 16-byte bases and row strides, unit columns
    aligned: bool = True
    # of a batch that mixes adapters; 0 slots: one adapter
    slots: int = 0
    slices: int = 1
    # of a mixture; 0: one weight
    experts: int = 0
    # whether the base weight is four-bit bytes
    four_bit: bool = False

    @property
    def columns(self) -> int:
        """The width of the result of a product with the base: N, and K for dX."""
        return self.k if self.op in _DX else self.n

    @property
    def inner(self) -> int:
        """The axis that this product sums over: K, and N for dX."""
        return self.n if self.op in _DX else self.k

    def adapters(self) -> Problem:
        """The problem of the adapters alone, added in place, of a base linear whose rows have
        different adapters."""
        op = "segmented_lora_dx" if self.op in _DX else "segmented_lora_"
        return self._replace(op=op, fan_in_fan_out=False, four_bit=False)

    def bucketed(self) -> Problem:
        """The key of the tables: N and K exact, M rounded up to a power of two, r to a multiple of
        16."""
        return self._replace(m=1 << max(self.m - 1, 0).bit_length(), r=-(-self.r // 16) * 16)

    def key(self) -> str:
        format_ = "KN" if self.fan_in_fan_out else "NK"
        flags = ["dropout"] * self.dropout + ["out_scale"] * self.out_scale
        flags += ["unaligned"] * (not self.aligned) + ["four_bit"] * self.four_bit
        if self.slots:
            flags += [f"{self.slots} slots", f"{self.slices} slices"]
        flags += [f"{self.experts} experts"] * (self.experts > 0)
        sizes = f"{self.m}/{self.n}/{self.k}/{self.r}"
        formats = f"{self.dtype}/{self.adapter_dtype}/{format_}"
        return f"{self.op}/{sizes}/{formats}/{'+'.join(flags) or 'plain'}"


def rows_of(given: dict[str, Any]) -> Tensor:
    """The rows that an operator reads: dy, x, or a finished S."""
    rows: Tensor = given["dy"] if "dy" in given else given["x"] if "x" in given else given["s"]
    return rows


def sizes(rows: Tensor, given: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """M, N, K, r (of segmented operators r_max) and the slices of a call, by its arguments."""
    m = rows.shape[0]
    a, b = given.get("lora_a"), given.get("lora_b")
    if "table" not in given:
        if a is not None:
            r, k = a.shape
            return m, r if b is None else b.shape[0], k, r, 1
        tail = given["d"] if given["s"] is None else given["s"]
        return m, given["dy"].shape[1], _width(given["x"]), _width(tail), 1
    if b is not None:
        slices, r = len(b), b[0].shape[2]
        k = slices * r if a is None else a[0].shape[2]
        return m, sum([t.shape[1] for t in b]), k, r, slices
    if a is not None:
        packed = given["packed_slices"]
        slices, r = packed or len(a), a[0].shape[1] // max(packed, 1)
        return m, slices * r, a[0].shape[2], r, slices
    return m, given["dy"].shape[1], _width(given["x"]), given["r_max"], len(given["widths"])


def _width(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.shape[1]


def _linear(op: str, given: dict[str, Any]) -> Problem:
    rows = rows_of(given)
    m, n, k, r, _ = sizes(rows, given)
    return Problem(
        op,
        m,
        n,
        k,
        r,
        dtype_name(rows.dtype),
        dtype_name(given.get("lora_a", rows).dtype),
        given["rng"] is not None,
        given.get("fan_in_fan_out", False),
        given.get("out_scale") is not None,
        # Asked on GPUs only, where it matters.
        not rows.is_cuda or is_aligned(given),
        four_bit=given.get("quant") is not None,
    )


def suits_descriptor(t: Tensor, transposed: bool) -> bool:
    """Whether a tensor descriptor can read ``t`` [rows, cols] (or its transpose, where that is as
    good): a 16-byte base, 16-byte steps from row to row, and neighbours within a row."""
    row, col = t.stride()
    if transposed and row == 1:
        row, col = col, row
    return col == 1 and row > 0 and row * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0


def _segmented(op: str, given: dict[str, Any]) -> Problem:
    rows, a, b = rows_of(given), given.get("lora_a"), given.get("lora_b")
    m, n, k, r, slices = sizes(rows, given)
    stacks = b or a
    adapter = stacks[0].dtype if stacks else given["da_dtype"] or given["db_dtype"] or rows.dtype
    return Problem(
        op,
        m,
        n,
        k,
        r,
        # S of float16 rows is float32.
        dtype_name(given["y"].dtype if op == "segmented_expand_" else rows.dtype),
        dtype_name(adapter),
        given.get("rng") is not None,
        given.get("fan_in_fan_out", False),
        aligned=not rows.is_cuda or is_aligned(given),
        slots=given["table"][1].shape[0],
        slices=slices,
        four_bit=given.get("quant") is not None,
    )


def sizes_of_experts(given: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """M, N, K, r and E of a call for experts."""
    rows, weight = rows_of(given), given.get("weight")
    a, b = given.get("lora_a"), given.get("lora_b")
    if weight is not None and given["quant"] is not None:
        assert a is not None and b is not None
        (_, r, k), n = a.shape, b.shape[1]
    elif weight is not None:
        n, k = weight.shape[:0:-1] if given["fan_in_fan_out"] else weight.shape[1:]
        r = 0 if b is None else b.shape[2]
    elif a is not None:
        n, k, r = a.shape[1], a.shape[2], a.shape[1]
    else:
        n, k = rows.shape[1], _width(given["x"])
        r = _width(given["d"] if given["s"] is None else given["s"])
    return rows.shape[0], n, k, r, given["offs"].shape[0]


def _expert(op: str, given: dict[str, Any]) -> Problem:
    rows, a = rows_of(given), given.get("lora_a")
    m, n, k, r, experts = sizes_of_experts(given)
    adapter = given.get("da_dtype") or given.get("db_dtype") or rows.dtype
    return Problem(
        op,
        m,
        n,
        k,
        r,
        dtype_name(rows.dtype),
        dtype_name(adapter if a is None else a.dtype),
        fan_in_fan_out=given.get("fan_in_fan_out", False),
        aligned=not rows.is_cuda or is_aligned(given),
        experts=experts,
        four_bit=given.get("quant") is not None,
    )


def is_aligned(given: dict[str, Any]) -> bool:
    """Whether a call's big operands suit tensor descriptors; of a batch that mixes adapters,
    whether 16 bytes at a time can be read along the last axis of every operand."""
    if given.get("quant") is not None:
        return _decoded_is_aligned(given)
    if "table" not in given:
        weight = given.get("weight")
        if "offs" in given and weight is not None:
            return suits_descriptor(rows_of(given), False) and _stack_suits(weight, rows_of(given))
        return suits_descriptor(rows_of(given), transposed=False) and (
            weight is None or suits_descriptor(weight, transposed=True)
        )
    read = [rows_of(given), given.get("x"), given.get("weight")]
    read += [*(given.get("lora_a") or ()), *(given.get("lora_b") or ())]
    if not all(_whole_vectors(t) for t in read if t is not None):
        return False
    # The columns of a slice begin behind those of the one before it.
    vector = 16 // rows_of(given).element_size()
    return "weight" not in given or not any(b.shape[1] % vector for b in given["lora_b"])


def _decoded_is_aligned(given: dict[str, Any]) -> bool:
    """The same with the weight that the bytes of ``given`` are decoded to."""
    rows = rows_of(given)
    # No memory of it is looked at, nor made.
    plain = torch.empty(decoded_shape(given), dtype=rows.dtype, device="meta")
    return is_aligned(given | {"weight": plain, "quant": None})


def decoded_shape(given: dict[str, Any]) -> tuple[int, ...]:
    """Of the four-bit weight of a call: [N, K] or [K, N], of experts [E, N, K] or [E, K, N]."""
    experts: tuple[int, ...] = ()
    if "offs" in given:
        _, n, k, _, count = sizes_of_experts(given)
        experts = (count,)
    else:
        _, n, k, *_ = sizes(rows_of(given), given)
    return (*experts, k, n) if given["fan_in_fan_out"] else (*experts, n, k)


def _stack_suits(stack: Tensor, rows: Tensor) -> bool:
    """:func:`suits_descriptor` of the matrices of ``stack``, once they are in the rows' dtype."""
    outer, row, col = stack.stride()
    if col != 1:
        row, col = col, row
    vector = 16 // rows.element_size()
    whole = col == 1 and row > 0 and not (outer % vector or row % vector)
    return whole and stack.data_ptr() % 16 == 0


def _whole_vectors(t: Tensor) -> bool:
    *steps, last = t.stride()
    vector = 16 // t.element_size()
    return last == 1 and not any(step % vector for step in steps) and t.data_ptr() % 16 == 0


def sizes_of_linears(given: dict[str, Any]) -> tuple[Tensor, int, int, list[int], list[int]]:
    """The rows of a call for projections that share an input, M, K, N_j and r_j."""
    if "lora_a" in given:
        a, b = given["lora_a"], given["lora_b"]
        rows = given["dy"][0] if "dy" in given else given["x"]
        return rows, rows.shape[0], a[0].shape[1], [t.shape[0] for t in b], [len(t) for t in a]
    rows = given["dy"][0]
    widths = [t.shape[1] for t in given["dy"]]
    return rows, rows.shape[0], _width(given["x"]), widths, list(given["ranks"])


def _linears(op: str, given: dict[str, Any]) -> Problem:
    """The problem of one projection with the widths and ranks of all together."""
    rows, m, k, widths, ranks = sizes_of_linears(given)
    read = [rows, *given.get("dy", ())]
    aligned = not rows.is_cuda or (
        all(suits_descriptor(t, transposed=False) for t in read)
        and all(suits_descriptor(t, transposed=True) for t in given.get("weights", ()))
    )
    return Problem(
        op,
        m,
        sum(widths),
        k,
        sum(ranks),
        dtype_name(rows.dtype),
        dtype_name(given["lora_a"][0].dtype if "lora_a" in given else rows.dtype),
        given["rng"] is not None,
        given.get("fan_in_fan_out", False),
        aligned=aligned,
        slices=len(widths),
    )


# The problem of a call, by the operator and with the operator's own arguments.
_BUILDER = (
    dict.fromkeys(SCHEMAS, _segmented)
    | dict.fromkeys(OPERATORS, _linear)
    | dict.fromkeys(LINEARS_OPERATORS, _linears)
    | dict.fromkeys(EXPERT_OPERATORS, _expert)
)
PROBLEM_OF: dict[str, Callable[..., Problem]] = {
    op: of_operator(op, _BUILDER[op]) for op in SCHEMAS
}
