"""The operators' schemas: names, order and defaults of their arguments, stated once.

All operators take 2-D rows of any strides:

    x, dy      [M, K], [M, N]  the rows; their dtype (float16, bfloat16, float32, float64) is the
                               compute dtype
    weight     [N, K]          in the compute dtype; [K, N] with ``fan_in_fan_out``
    lora_a     [r, K]          r >= 1; any floating dtype, rounded on use to the dtype of s and d
    lora_b     [N, r]          likewise
    s, d       [M, r]          in ``reference.tail_dtype`` of the compute dtype
    scale      []              float32 (float64 for float64 rows) on the rows' device
    bias       [N]             any floating dtype
    rng        int64 [4]       (seed, offset, row0, col0) on the rows' device; None: no mask. The
                               GPU's kernels draw eight columns at once: col0 a multiple of 8
    out_scale  [N]             multiplies x W^T + S B^T before the bias (DoRA)
    packed                     the weight in the layout of the CPU's kernels, which read it instead
                               of weight; the other kernels ignore it
    quant, quant_block         of a four-bit weight, whose bytes are ``weight``: ``QuantState``'s
                               ``tensors()`` and ``block``

The segmented operators take, one tensor for each of n slices,

    lora_a     [S, r_max, K]   A of every slot; or, with ``packed_slices`` = n, one [S, n*r_max, K]
                               packed by live rank
    lora_b     [S, N_j, r_max]
    table                      ``SegmentTable.tensors()``
    y, dy      [M, sum N_j]    the slices side by side
    s, d       [M, n, r_max]   zero beyond the live rank
    weight     [sum N_j, K]    the slices one below the other

The operators of n projections of one input take lists of n: weights, adapters, scales and biases
as above, of N_j columns and rank r_j each;

    y, dy      n x [M, N_j]
    s, d       [M, sum r_j]    side by side
    rng                        as above; projection j draws with its offset + j
    packed                     none, or one for each weight

The operators of experts take rows that are sorted by expert,

    offs       int32 [E]       the rows of expert e end before offs[e], where those of e + 1 begin
                               (as in ``torch.nn.functional.grouped_mm``); rows from offs[E-1] on
                               belong to none, and their results are zero
    weight     [E, N, K]       any floating dtype, rounded on use; [E, K, N] with ``fan_in_fan_out``
    lora_a     [E, r, K]       or, with lora_b, None: no adapter, and s and d are [M, 0]. With a
                               four-bit weight, whose bytes have no shape, both of rank 0 instead
    lora_b     [E, N, r]
    bias       [E, N]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_DROPOUT = "Tensor? rng=None, float dropout_p=0.0"
_ADAPTED = "Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scale"
_QUANT = "Tensor[]? quant=None, int quant_block=0"
_BASE = f"bool fan_in_fan_out=False, Tensor? out_scale=None, Tensor? packed=None, {_QUANT}"
_GRADIENTS = "ScalarType? da_dtype=None, ScalarType? db_dtype=None, ScalarType? dbias_dtype=None"

_PROJECTIONS = "Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] scales"
_PACKED = "bool fan_in_fan_out=False, Tensor[]? packed=None"

_TABLE = "Tensor[] table, int packed_slices=0"
_SEGMENTED = f"Tensor[] lora_a, Tensor[] lora_b, {_TABLE}"
_SEGMENTED_BASE = f"bool fan_in_fan_out=False, Tensor? packed=None, {_QUANT}"
_EXPERTS = "Tensor weight, Tensor? lora_a, Tensor? lora_b, Tensor scale, Tensor offs"

SCHEMAS = {
    "lora_shrink": f"(Tensor x, Tensor lora_a, Tensor scale, {_DROPOUT}) -> Tensor s",
    "lora_linear_fwd": (
        f"(Tensor x, {_ADAPTED}, Tensor? bias=None, {_DROPOUT}, {_BASE}) -> (Tensor y, Tensor s)"
    ),
    "lora_linear_dx": f"(Tensor dy, {_ADAPTED}, {_DROPOUT}, {_BASE}) -> (Tensor dx, Tensor d)",
    "lora_linear_dab": (
        f"(Tensor dy, Tensor? x, Tensor? s, Tensor? d, {_DROPOUT}, {_GRADIENTS}, "
        "Tensor? out_scale=None) -> (Tensor da, Tensor db, Tensor dbias)"
    ),
    "lora_linears_fwd": (
        f"(Tensor x, {_PROJECTIONS}, Tensor?[] biases, {_DROPOUT}, {_PACKED}) "
        "-> (Tensor[] y, Tensor s)"
    ),
    "lora_linears_dx": (
        f"(Tensor[] dy, {_PROJECTIONS}, {_DROPOUT}, {_PACKED}) -> (Tensor dx, Tensor d)"
    ),
    "lora_linears_dab": (
        f"(Tensor[] dy, Tensor? x, Tensor? s, Tensor? d, int[] ranks, {_DROPOUT}, {_GRADIENTS}) "
        "-> (Tensor[] da, Tensor[] db, Tensor[] dbias)"
    ),
    "segmented_shrink": f"(Tensor x, Tensor[] lora_a, {_TABLE}, {_DROPOUT}) -> Tensor s",
    "segmented_expand_": "(Tensor(a!) y, Tensor s, Tensor[] lora_b, Tensor[] table) -> ()",
    "segmented_lora": f"(Tensor x, {_SEGMENTED}, {_DROPOUT}) -> (Tensor delta, Tensor s)",
    "segmented_lora_": f"(Tensor(a!) y, Tensor x, {_SEGMENTED}) -> ()",
    "segmented_lora_dx": f"(Tensor dy, {_SEGMENTED}, {_DROPOUT}) -> (Tensor dx, Tensor d)",
    "segmented_linear_fwd": (
        f"(Tensor x, Tensor weight, {_SEGMENTED}, Tensor? bias=None, {_DROPOUT}, {_SEGMENTED_BASE})"
        " -> (Tensor y, Tensor s)"
    ),
    "segmented_linear_dx": (
        f"(Tensor dy, Tensor weight, {_SEGMENTED}, {_DROPOUT}, {_SEGMENTED_BASE}) "
        "-> (Tensor dx, Tensor d)"
    ),
    "segmented_lora_dab": (
        "(Tensor dy, Tensor? x, Tensor? s, Tensor? d, Tensor[] table, int[] widths, int r_max, "
        f"int packed_slices=0, {_DROPOUT}, ScalarType? da_dtype=None, ScalarType? db_dtype=None) "
        "-> (Tensor[] da, Tensor[] db)"
    ),
    "expert_shrink": "(Tensor x, Tensor lora_a, Tensor scale, Tensor offs) -> Tensor s",
    "expert_linear_fwd": (
        f"(Tensor x, {_EXPERTS}, Tensor? bias=None, bool fan_in_fan_out=False, {_QUANT}) "
        "-> (Tensor y, Tensor s)"
    ),
    "expert_linear_dx": (
        f"(Tensor dy, {_EXPERTS}, bool fan_in_fan_out=False, {_QUANT}) -> (Tensor dx, Tensor d)"
    ),
    "expert_linear_dab": (
        "(Tensor dy, Tensor? x, Tensor? s, Tensor? d, Tensor offs, ScalarType? da_dtype=None, "
        "ScalarType? db_dtype=None) -> (Tensor da, Tensor db)"
    ),
}

# Of projections that share an input.
LINEARS_OPERATORS = tuple(op for op in SCHEMAS if op.startswith("lora_linears"))
SEGMENTED_OPERATORS = tuple(op for op in SCHEMAS if op.startswith("segmented"))
EXPERT_OPERATORS = tuple(op for op in SCHEMAS if op.startswith("expert"))
# Of one linear layer.
OPERATORS = tuple(
    op for op in SCHEMAS if op not in LINEARS_OPERATORS + SEGMENTED_OPERATORS + EXPERT_OPERATORS
)


def of_operator(op: str, function: Callable[[str, dict[str, Any]], Any]) -> Callable[..., Any]:
    """``function(op, arguments)``, with ``arguments`` by name and complete, as a function with the
    signature of the operator ``op``."""
    arguments = torch._C.parse_schema(op + SCHEMAS[op]).arguments
    names = [a.name for a in arguments]
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(op, defaults | dict(zip(names, args, strict=False)) | kwargs)

    kind, required = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(name, kind, default=defaults.get(name, required)) for name in names
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call
