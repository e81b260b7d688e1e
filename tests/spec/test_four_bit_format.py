"""Four-bit weights: the bytes are bitsandbytes', and mean what it decodes them to."""

import itertools

import pytest
import torch

from lora_kernels.spec import four_bit, native
from lora_kernels.spec.four_bit import BLOCKS, DTYPES, QUANT_TYPES, QuantState, quantize

SHAPES = [(64, 64), (37, 129), (5, 7), (1, 1), (33, 4096)]

FORMATS = list(itertools.product(QUANT_TYPES, BLOCKS, SHAPES, DTYPES, [False, True]))


def weights(shape, dtype):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    # Zeros, a block of them, and a value that all blocks but its own dwarf.
    w.view(-1)[: max(1, w.numel() // 3)] = 0
    w.view(-1)[-1] = 1e-6
    return w


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize(("kind", "block", "shape", "dtype", "double"), FORMATS)
def test_bytes_are_those_of_bitsandbytes(kind, block, shape, dtype, double, bnb):
    w = weights(shape, dtype)
    data, state = quantize(w, kind, block=block, double_quant=double)
    theirs, held = bnb.quantize_4bit(
        w, blocksize=block, compress_statistics=double, quant_type=kind
    )
    assert torch.equal(data, theirs) and torch.equal(state.absmax, held.absmax)
    if double:
        assert torch.equal(state.nested.absmax, held.state2.absmax)
        assert torch.equal(state.nested.code, held.state2.code)
        assert torch.equal(state.nested.offset, held.offset)
    theirs.quant_state = held
    read = four_bit.quant_state_of(theirs)
    assert read[:4] == state[:4] and len(read.tensors()) == len(state.tensors())
    if shape[1] % block == 0 and block < 2048:
        # Elsewhere its kernel takes the absmax of another block, or it compiles (0.50.2).
        for out in DTYPES:
            held.dtype = out
            assert torch.equal(
                four_bit.dequantize(data, state, out), bnb.dequantize_4bit(theirs, held)
            )


@pytest.mark.skipif(native.load() is None, reason="no native kernels")
@pytest.mark.parametrize(("kind", "block", "shape", "dtype", "double"), FORMATS)
def test_native_decode_is_bit_for_bit_the_reference(kind, block, shape, dtype, double):
    data, state = quantize(weights(shape, torch.float32), kind, block=block, double_quant=double)
    ours = torch.ops.lora_kernels_cpu.dequantize(data, state.tensors(), block, *shape, dtype)
    assert torch.equal(ours, four_bit.dequantize(data, state, dtype))


def test_the_reference_is_exact():
    data, state = quantize(weights((9, 40), torch.float32), "nf4", block=32, double_quant=False)
    code = four_bit.code_of("nf4", "cpu").double()
    for i in range(9 * 40):
        byte = data[i // 2].item()
        q = byte & 15 if i % 2 else byte >> 4
        expected = code[q] * state.absmax[i // 32].double()
        assert four_bit.dequantize(data, state, torch.float64).view(-1)[i] == expected


def test_a_checkpoint_of_bitsandbytes_passes_both_ways(bnb):
    for kind, double in itertools.product(QUANT_TYPES, [False, True]):
        w = weights((20, 64), torch.bfloat16)
        data, state = quantize(w, kind, double_quant=double)
        theirs, held = bnb.quantize_4bit(w, compress_statistics=double, quant_type=kind)
        theirs.quant_state = held
        read = four_bit.from_state_dict(held.as_dict(packed=True), "cpu")
        ours = {f"weight.{k}": v for k, v in four_bit.to_state_dict(state).items()}
        back = bnb.QuantState.from_dict(ours, "cpu")
        assert back == held
        for one in (read, state):
            assert torch.equal(four_bit.dequantize(data, one), bnb.dequantize_4bit(theirs, held))


def good():
    data, state = quantize(weights((16, 32), torch.float32))
    return data, state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, s: (d[:-1], s), "256 bytes in a row"),
        (lambda d, s: (d, s._replace(shape=(16, 31))), "248 bytes in a row"),
        (lambda d, s: (d, s._replace(block=32)), r"uint8 \[16\]"),
        (lambda d, s: (d, s._replace(nested=None)), r"float32 \[8\]"),
        (lambda d, s: (d, s._replace(absmax=s.absmax.float())), r"uint8 \[8\]"),
        (
            lambda d, s: (d, s._replace(nested=s.nested._replace(code=s.nested.code[:16]))),
            "code float32",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    data, state = change(*good())
    weight = torch.nn.Parameter(data, requires_grad=False)
    weight.quant_state = state
    with pytest.raises(ValueError, match=message):
        four_bit.quant_state_of(weight)


def test_unknown_formats_are_refused():
    w = torch.randn(4, 8)
    with pytest.raises(ValueError, match="one of nf4, fp4, not 'int4'"):
        quantize(w, "int4")
    with pytest.raises(ValueError, match="not 48"):
        quantize(w, "nf4", block=48)
    with pytest.raises(TypeError, match="float64"):
        quantize(w.double())
    with pytest.raises(ValueError, match=r"not \[4\]"):
        quantize(w[:, 0])
    assert four_bit.quant_state_of(torch.nn.Parameter(w)) is None
    assert isinstance(quantize(w)[1], QuantState)
