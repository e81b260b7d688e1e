"""The CPU extension's kernels of the LoRA linear layer, with the instruction set of this process.

`test_every_instruction_set` in test_native.py runs the drawn cases again for the others.
"""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from bits import assert_same_bits, check_native, draw_cases, tensors

from lora_kernels.functional import ops
from lora_kernels.spec import reference
from lora_kernels.testing.linear import LAYOUTS, Case, check, poisoned_memory

pytestmark = pytest.mark.native
cpu_ops = torch.ops.lora_kernels_cpu

FLOAT32, BFLOAT16, FLOAT16 = DTYPES = torch.float32, torch.bfloat16, torch.float16

# Around a tile's rows (6 and 12), the few rows that share K (32), the row blocks (48, 192).
ROWS = [0, 1, 2, 5, 6, 7, 12, 13, 31, 32, 33, 49, 193, 400]
# Around a vector, a panel (64) and a part of a sum (512).
WIDTHS = [1, 2, 3, 7, 15, 16, 17, 33, 48, 63, 64, 65, 100, 129, 511, 512, 513, 1025]
RANKS = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 128, 129, 200, 256]

STRIDES = LAYOUTS | {
    "one column": lambda t: t[:, :1].expand_as(t),
    "overlapping rows": lambda t: t.flatten().as_strided(t.shape, (1, 1)),
    "no unit stride": lambda t: LAYOUTS["strided"](t.t()).t(),
}

OPERANDS = {
    "lora_shrink": ("x", "lora_a"),
    "lora_linear_fwd": ("x", "weight", "lora_a", "lora_b"),
    "lora_linear_dx": ("dy", "weight", "lora_a", "lora_b"),
    "lora_linear_dab": ("dy", "x", "s", "d"),
}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        draw_cases(
            metafunc,
            Case,
            count=36,
            m=ROWS,
            n=WIDTHS,
            k=WIDTHS,
            r=RANKS,
            dtype=DTYPES,
            adapter_dtype=[None, None, FLOAT32, FLOAT16, BFLOAT16, torch.float64],
            bias=[True, False],
            dropout_p=[0.0, 0.1, 0.5],
            fan_in_fan_out=[False, True],
            out_scale=[False, False, True],
            zero_weight=[False, False, True],
            # Not "expanded": of rows that are all the same there are too few errors to judge by.
            layout=["contiguous", "transposed", "sliced", "strided"],
        )


@pytest.mark.parametrize("op", ops.OPERATORS)
def test_sizes(op, case):
    if op == "lora_linear_dab":
        # The budget knows the compute dtype only; test_gradients_are_rounded_once has the others.
        case = replace(case, adapter_dtype=None)
    check_native(check, op, case)


@pytest.mark.parametrize("op", ops.OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("width", ["K", "N"])
def test_no_columns(op, dtype, m, width):
    sizes = {"n": 70, "k": 40} | {width.lower(): 0}
    arguments = Case(m, **sizes, r=5, dtype=dtype).draw().arguments(op)
    # Memory that the kernels are likely to be handed next.
    torch.full((5 * m, 64), float("nan"))
    with poisoned_memory():
        results = tensors(getattr(cpu_ops, op)(**arguments))
    expected = tensors(getattr(reference, op)(**arguments))
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# Where the operands lie


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k", "r"), [(35, 81, 523, 18), (9, 517, 38, 67)])
@pytest.mark.parametrize(
    ("op", "operand"), [(op, name) for op, names in OPERANDS.items() for name in names]
)
def test_strides(op, operand, m, n, k, r, dtype, how):
    """Strides change where values are read, and nothing else: the same bits as of a plain copy."""
    arguments = Case(m, n, k, r, dtype, dropout_p=0.2).draw().arguments(op)
    laid = STRIDES[how](arguments[operand])
    expected = getattr(cpu_ops, op)(**(arguments | {operand: laid.contiguous()}))
    with poisoned_memory():
        results = getattr(cpu_ops, op)(**(arguments | {operand: laid}))
    assert_same_bits(results, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_dx"])
@pytest.mark.parametrize("how", ["contiguous", "transposed", "sliced"])
def test_square_weight_of_either_orientation(op, dtype, how):
    check_native(check, op, Case(21, 70, 70, 9, dtype, fan_in_fan_out=True, layout=how))


# What the operands are


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("op", ["lora_shrink", "lora_linear_fwd", "lora_linear_dx"])
def test_adapter_dtypes(op, dtype, adapter_dtype):
    check_native(check, op, Case(40, 77, 90, 35, dtype, adapter_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail_dtype", DTYPES)
def test_tails_of_another_dtype(dtype, tail_dtype):
    """S and D of any dtype are rounded to what rows are multiplied in."""
    arguments = Case(40, 77, 90, 35, dtype).draw().arguments("lora_linear_dab")
    given = {name: arguments[name].to(tail_dtype) for name in ("s", "d")}
    rounded = {name: given[name].to(BFLOAT16 if dtype == BFLOAT16 else FLOAT32) for name in given}
    results = cpu_ops.lora_linear_dab(**(arguments | given))
    assert_same_bits(results, cpu_ops.lora_linear_dab(**(arguments | rounded)))


@dataclass(frozen=True)
class VectorCase(Case):
    """Bias and out_scale of another dtype than the rows', and strided."""

    vector_dtype: torch.dtype = FLOAT32
    strided: bool = False

    def draw(self):
        def laid(vector):
            vector = (vector * 1.01).to(self.vector_dtype)
            return vector.repeat_interleave(2)[::2] if self.strided else vector

        inputs = super().draw()
        return replace(inputs, bias=laid(inputs.bias), out_scale=laid(inputs.out_scale))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vector_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_bias_and_out_scale_of_any_dtype(dtype, vector_dtype, strided):
    case = VectorCase(20, 77, 40, 5, dtype, out_scale=True)
    case = replace(case, vector_dtype=vector_dtype, strided=strided)
    check_native(check, "lora_linear_fwd", case)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16])
@pytest.mark.parametrize("m", [7, 40])
def test_the_tail_is_made_of_the_rounded_s(m, dtype):
    """Of the S that is returned, which is the one that dB will be made of."""
    inputs = Case(m, 77, 90, 33, dtype, zero_weight=True).draw()
    y, s = cpu_ops.lora_linear_fwd(**inputs.arguments("lora_linear_fwd"))
    zeros, eye = torch.zeros(77, 33, dtype=s.dtype), torch.eye(33, dtype=s.dtype)
    one = torch.tensor(1.0)
    again, same = cpu_ops.lora_linear_fwd(s, zeros, eye, inputs.lora_b, one, inputs.bias)
    assert_same_bits((again.to(dtype), same), (y, s))


@pytest.mark.parametrize("length", [128, 256, 512, 1024, 8192])
def test_float32_sums(length):
    """A sum at one stretch loses more than the library's, which are several side by side."""
    for seed in range(2 if length == 8192 else 12):
        check_native(check, "lora_shrink", Case(64, 8, length, 48, dropout_p=0.1, seed=seed))
        check_native(check, "lora_linear_fwd", Case(64, 130, length, 48, seed=seed))
        check_native(check, "lora_linear_dx", Case(64, length, 130, 48, seed=seed))
        check_native(check, "lora_linear_dab", Case(length, 130, 130, 48, seed=seed))


# The mask


ORIGINS = [(3, 24), (5, 13), (2**32 - 2, 8 * 2**32 - 9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (2, 7), (32, 65), (33, 600), (200, 1031)])
def test_masks_bit_by_bit(m, k, origin, dtype):
    p, rng = 0.4, torch.tensor([-(2**61), 2**33 + 5, *origin])
    mask = reference.dropout_mask(rng, m, k, p)
    # The one that c = 1 / (1 - p) gives: every kept element is then 1.
    scale = torch.tensor(1 - p)

    def ones(*shape):
        return torch.ones(shape, dtype=dtype)

    # A reads single columns, so that S shows the mask there; from both sides of every part's end.
    columns = torch.tensor(sorted({j % k for j in (*range(40), *range(490, 530), *range(-30, 0))}))
    picked = torch.zeros(len(columns), k, dtype=dtype)
    picked[torch.arange(len(columns)), columns] = 1
    with poisoned_memory():
        s = cpu_ops.lora_shrink(ones(m, k), picked, scale, rng, p)
        dx, d = cpu_ops.lora_linear_dx(
            ones(m, 1), torch.zeros(1, k, dtype=dtype), ones(1, k), ones(1, 1), scale, rng, p
        )
        one_row_each = torch.eye(m, dtype=dtype)
        da, *_ = cpu_ops.lora_linear_dab(
            ones(m, 1), ones(m, k), None, one_row_each, rng, p, da_dtype=dtype
        )
    assert torch.equal(s, mask[:, columns].to(dtype))
    assert torch.equal(d, ones(m, 1))
    assert torch.equal(dx, mask.to(dtype))
    assert torch.equal(da, mask.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("m", [7, 60])
def test_dropped_elements_do_not_leak(m, value, dtype):
    inputs = Case(m, 50, 75, 9, dtype, dropout_p=0.3).draw()
    mask = inputs.mask()
    dirty = replace(inputs, x=inputs.x.where(mask, value))
    for op in ("lora_shrink", "lora_linear_dab"):
        arguments = inputs.arguments(op)
        clean = getattr(cpu_ops, op)(**arguments)
        assert_same_bits(getattr(cpu_ops, op)(**(arguments | {"x": dirty.x})), clean)
    arguments = inputs.arguments("lora_linear_dx")
    clean, _ = cpu_ops.lora_linear_dx(**arguments)
    lora_a = inputs.lora_a.clone()
    lora_a[:, 40] = value
    dx, _ = cpu_ops.lora_linear_dx(**(arguments | {"lora_a": lora_a}))
    touched = mask.clone()
    touched[:, :40] = touched[:, 41:] = False
    assert not dx[touched].isfinite().any()
    assert_same_bits(dx[~touched], clean[~touched])


# The same bits, whatever is around


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_a_row_does_not_depend_on_the_others(dtype, dropout_p):
    inputs = Case(500, 150, 1100, 20, dtype, dropout_p=dropout_p).draw()

    def rows(op, begin, end):
        arguments = inputs.arguments(op)
        if inputs.rng is not None:
            arguments["rng"] = inputs.rng + torch.tensor([0, 0, begin, 0])
        operand = "dy" if op == "lora_linear_dx" else "x"
        arguments[operand] = arguments[operand][begin:end]
        return getattr(cpu_ops, op)(**arguments)

    for op, counts in (
        ("lora_linear_fwd", [*range(2, 101), 192, 193, 500]),
        ("lora_linear_dx", [2, 7, 13, 24, 25, 33, 49, 100, 192, 500]),
    ):
        alone = [
            torch.cat(part) for part in zip(*(rows(op, i, i + 1) for i in range(100)), strict=True)
        ]
        for count in counts:
            y, s = rows(op, 0, count)
            assert_same_bits((y[:100], s[:100]), (alone[0][:count], alone[1][:count]))
        assert_same_bits([part[10:60] for part in alone], rows(op, 10, 60))


@pytest.mark.parametrize("op", ops.OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k", "r"), [(1, 200, 1500, 70), (33, 70, 600, 9), (400, 65, 130, 20)]
)
def test_threads_do_not_show(op, dtype, m, n, k, r):
    arguments = Case(m, n, k, r, dtype, dropout_p=0.2).draw().arguments(op)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(getattr(cpu_ops, op)(**arguments))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("op", ops.OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_stays_of_an_earlier_call(op, dtype):
    """Threads keep their scratch memory: what a call leaves there must not reach the next."""
    arguments = Case(37, 77, 91, 19, dtype, dropout_p=0.2).draw().arguments(op)
    clean = getattr(cpu_ops, op)(**arguments)
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    larger = Case(300, 600, 600, 90, dtype, dropout_p=0.2).draw().arguments(op)
    for name in larger.keys() & {"x", "dy", "weight", "lora_a", "lora_b", "s", "d"}:
        larger[name].fill_(float("nan"))
    getattr(cpu_ops, op)(**larger)
    with poisoned_memory():
        results = getattr(cpu_ops, op)(**arguments)
    assert_same_bits(results, clean)
    assert all(result.is_contiguous() for result in tensors(results))
    assert all(torch.equal(arguments[name], value) for name, value in before.items())


# Gradients


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_scale", [False, True])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_each_gradient_alone(wanted, out_scale, dtype):
    arguments = Case(70, 81, 67, 17, dtype, out_scale=out_scale).draw().arguments("lora_linear_dab")
    whole = cpu_ops.lora_linear_dab(**arguments)
    da, db, dbias = wanted
    part = arguments | {
        "x": arguments["x"] if da else None,
        "d": arguments["d"] if da else None,
        "s": arguments["s"] if db else None,
        "da_dtype": dtype if da else None,
        "db_dtype": dtype if db else None,
        "dbias_dtype": dtype if dbias else None,
    }
    results = cpu_ops.lora_linear_dab(**part)
    expected = [
        result if asked else result.new_empty(0)
        for result, asked in zip(whole, wanted, strict=True)
    ]
    assert_same_bits(results, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient_dtype", [BFLOAT16, FLOAT16, torch.float64])
def test_gradients_are_rounded_once(dtype, gradient_dtype):
    arguments = Case(70, 81, 67, 17, dtype).draw().arguments("lora_linear_dab")
    names = ("da_dtype", "db_dtype", "dbias_dtype")
    exact = cpu_ops.lora_linear_dab(**(arguments | dict.fromkeys(names, FLOAT32)))
    results = cpu_ops.lora_linear_dab(**(arguments | dict.fromkeys(names, gradient_dtype)))
    assert_same_bits(results, [result.to(gradient_dtype) for result in exact])


# A packed weight


def inner_first(weight, op, fan_in_fan_out):
    return weight.t() if (op == "lora_linear_fwd") != fan_in_fan_out else weight


@pytest.mark.parametrize("op", ["lora_linear_fwd", "lora_linear_dx"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (3, 130, 65), (50, 1037, 81), (200, 63, 1037), (9, 512, 512)]
)
def test_packed_weight(op, m, n, k, fan_in_fan_out, dtype):
    inputs = Case(m, n, k, 6, dtype, fan_in_fan_out=fan_in_fan_out, dropout_p=0.2).draw()
    arguments, run = inputs.arguments(op), getattr(cpu_ops, op)
    weight = inner_first(inputs.weight, op, fan_in_fan_out)
    with poisoned_memory():
        packed = cpu_ops.pack(weight)
    assert packed.isfinite().all() and packed.is_contiguous()
    assert_same_bits(run(**arguments, packed=packed), run(**arguments))
    assert cpu_ops.is_packed(weight, packed)
    # The packed weight is what is read, not the other.
    zeros = torch.zeros_like(inputs.weight)
    assert_same_bits(run(**(arguments | {"weight": zeros}), packed=packed), run(**arguments))
    for layout in ("transposed", "sliced", "strided"):
        assert_same_bits(cpu_ops.pack(LAYOUTS[layout](weight)), packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (65, 130), (513, 70), (64, 1024), (1037, 81)])
def test_is_packed(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    packed = cpu_ops.pack(weight)
    assert cpu_ops.is_packed(weight, packed)
    assert cpu_ops.is_packed(LAYOUTS["transposed"](weight), packed)
    assert not cpu_ops.is_packed(weight + 1, packed)
    assert not cpu_ops.is_packed(weight.flip(0) + weight.flip(1), packed)
    other = next(d for d in DTYPES if d != dtype and (dtype == BFLOAT16) != (d == BFLOAT16))
    assert not cpu_ops.is_packed(weight.to(other), packed)
    assert not cpu_ops.is_packed(weight, packed[:-1])
    assert not cpu_ops.is_packed(weight, packed.repeat(2)[::2])
    assert not cpu_ops.is_packed(weight[:0], packed) and not cpu_ops.is_packed(
        weight[:, :0], packed
    )


# K and N that are read where they lie, and some that are packed for a remainder.
@pytest.mark.parametrize(("k", "n"), [(64, 64), (1056, 176), (544, 16), (96, 80), (63, 65)])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_few_rows_have_the_bits_of_many(k, n, fan_in_fan_out, dtype):
    """Few rows read the weight where it lies, more of them pack it on the way, or it was packed
    before: one order of summation."""
    case = Case(14, n, k, 5, dtype, adapter_dtype=FLOAT32, fan_in_fan_out=fan_in_fan_out)
    inputs = case.draw()
    weight = inputs.weight
    operand = weight if fan_in_fan_out else weight.t()
    for op, packed in (("lora_linear_fwd", operand), ("lora_linear_dx", operand.t())):
        arguments = inputs.arguments(op)
        rows = "x" if op == "lora_linear_fwd" else "dy"
        run = getattr(cpu_ops, op)
        whole = run(**(arguments | {"packed": cpu_ops.pack(packed)}))
        assert_same_bits(run(**arguments), whole)
        for m in range(1, 10):
            few = run(**(arguments | {rows: arguments[rows][:m]}))
            assert_same_bits(few, [result[:m] for result in whole])
