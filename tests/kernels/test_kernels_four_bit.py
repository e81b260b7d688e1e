"""Four-bit weights in Triton's kernels, against float64 of the decoded weight: in the interpreter,
or on a GPU, as ``test_kernels.py`` has the plain ones."""

import functools
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

# Below the skip: nothing of Triton's is imported where it is missing.
import segmented_kernels
from segmented_kernels import DEVICE, DTYPES, INTERPRETED, SHRINK

import lora_kernels as lk
from lora_kernels.backends import cuda, vendor
from lora_kernels.kernels import four_bit as kernels
from lora_kernels.kernels import linear_fwd
from lora_kernels.planning.config import Config
from lora_kernels.planning.device import DeviceFacts, facts
from lora_kernels.planning.validity import candidates, is_valid
from lora_kernels.spec import four_bit
from lora_kernels.spec.problem import PROBLEM_OF, is_aligned
from lora_kernels.testing.linear import Case, check
from lora_kernels.testing.segmented import SegmentedCase, check_segmented

pytestmark = segmented_kernels.SKIPS

FWD, DX = "lora_linear_fwd", "lora_linear_dx"
MIXED = ("segmented_linear_fwd", "segmented_linear_dx")

FORMATS = [
    ("nf4", 64, True),
    ("fp4", 32, False),
    ("nf4", 128, False),
    ("fp4", 4096, True),
    ("nf4", 256, True),
    ("fp4", 512, False),
    ("nf4", 1024, False),
    ("fp4", 2048, True),
]


def tile(plan, split_k=1, block_m=16):
    return Config(plan, block_m, 32, 32, 2, split_k, 4, 2, 3, decodes=True)


GEMMS = {
    "in loop": tile("in_loop"),
    "in loop, split": tile("in_loop", 2),
    "tail": tile("tail"),
    "tail, split": tile("tail", 2),
}
SHRUNK = Config("skinny", 16, 16, 32, 0, 2, 4, 2, block_r=32)

# Two tiles and a remainder; rows of whole units of 32 weights, three of them: of blocks of 64 every
# other begins in the middle of a row.
SIZE = Case(37, 69, 96, 20, device=DEVICE)
CONV1D = replace(SIZE, n=96, k=43, fan_in_fan_out=True)


def launch(op, config):
    return functools.partial(getattr(linear_fwd, op), config=config, shrink=SHRUNK)


@pytest.mark.parametrize("case", [SIZE, CONV1D], ids=["NK", "KN"])
@pytest.mark.parametrize("op", [FWD, DX])
@pytest.mark.parametrize("number", range(len(FORMATS)))
def test_a_gemm_decodes_every_format(number, op, case):
    gemm = [*GEMMS.values()][number % len(GEMMS)]
    for dtype in DTYPES:
        check(op, launch(op, gemm), replace(case, dtype=dtype, quant=FORMATS[number]))


VARIANTS = {
    "float32 adapter": {"adapter_dtype": torch.float32},
    "rank 1, no bias": {"r": 1, "bias": False},
    "one row": {"m": 1},
    "no rows": {"m": 0},
    "many rows": {"m": 70},
    "strided": {"layout": "strided"},
    "sliced": {"layout": "sliced"},
    "one unit": {"n": 3, "k": 32, "m": 3, "r": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("op", [FWD, DX])
def test_a_gemm_that_decodes(op, gemm, variant):
    """The dtypes alternate: the interpreter takes its time."""
    turn = list(VARIANTS).index(variant) + list(GEMMS).index(gemm)
    for dtype in [DTYPES[turn % len(DTYPES)]] if INTERPRETED else DTYPES:
        case = replace(SIZE, dtype=dtype, quant=("nf4", 64, True), **VARIANTS[variant])
        check(op, launch(op, GEMMS[gemm]), case)


@pytest.mark.parametrize("case", [SIZE, CONV1D], ids=["NK", "KN"])
@pytest.mark.parametrize("op", [FWD, DX])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gemm_that_decodes_with_dropout(dtype, op, case):
    case = replace(case, dtype=dtype, dropout_p=0.3, quant=("fp4", 64, False))
    check(op, launch(op, GEMMS["tail"]), case)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("split_k", [1, 2])
@pytest.mark.parametrize("op", MIXED)
def test_a_mixed_batch_that_decodes(op, split_k, fan_in_fan_out):
    case = SegmentedCase(70, 96, (37, 59), (33, 0, 1, 8, 20, 16), device=DEVICE, bias=True)
    case = replace(case, fan_in_fan_out=fan_in_fan_out, quant=("nf4", 64, True))
    run = functools.partial(
        getattr(linear_fwd, op), config=tile("tail", split_k, 32), shrink=SHRINK
    )
    if fan_in_fan_out and op == "segmented_linear_fwd":
        # The second slice begins within a unit.
        case = replace(case, widths=(96,))
    for dtype in DTYPES[:1] if INTERPRETED else DTYPES:
        check_segmented(op, run, replace(case, dtype=dtype))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", four_bit.BLOCKS)
@pytest.mark.parametrize("kind", four_bit.QUANT_TYPES)
def test_a_weight_is_decoded_to_memory_bit_for_bit(kind, block, double):
    """Sizes of whole units and not, of less than a block, and of an odd number of weights."""
    for shape in ((64, 160), (37, 129), (5, 7), (1, 1), (70, 4096)):
        weight = torch.randn(shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
        data, state = four_bit.quantize(weight, kind, block=block, double_quant=double)
        for dtype in DTYPES:
            # One beyond the end stays as it was.
            room = torch.full((math.prod(shape) + 1,), 7.0, dtype=dtype, device=DEVICE)
            found = kernels.lora_decode(
                data, state.tensors(), block, shape, dtype, out=room[:-1].view(shape)
            )
            assert torch.equal(found, four_bit.dequantize(data, state, dtype)), (shape, dtype)
            assert room[-1] == 7.0


ARCHS = {"sm_80": 166912, "sm_90": 232448, "gfx942": 65536}


def known_of(arch):
    if DEVICE == "cuda":
        return facts("cuda")
    return DeviceFacts("cuda", arch, arch, processors=4, shared_memory=ARCHS[arch])


# A rank of 0 is a layer without an adapter; rows of odd lengths have no whole bytes.
BACKEND_CASES = [
    (Case(5, 70, 128, 16, torch.float16, quant=("nf4", 64, True), device=DEVICE), True),
    (Case(70, 72, 96, 8, torch.float32, quant=("fp4", 128, False), device=DEVICE), True),
    (Case(6, 71, 41, 8, torch.float16, quant=("nf4", 64, True), device=DEVICE), False),
    (Case(6, 71, 40, 8, quant=("nf4", 32, False), fan_in_fan_out=True, device=DEVICE), False),
]


@pytest.mark.parametrize("arch", ["sm_90"] if DEVICE == "cuda" else ARCHS)
@pytest.mark.parametrize("number", range(len(BACKEND_CASES)))
@pytest.mark.parametrize("op", [FWD, DX])
def test_the_backend_runs_every_plan(op, number, arch, monkeypatch):
    """With a device's facts: what the planner ships does launch, and a plan either decodes in its
    loop or has the weight decoded once."""
    case, whole_bytes = BACKEND_CASES[number]
    known, arguments = known_of(arch), case.draw().arguments(op)
    decoded, sound = [], kernels.lora_decode
    monkeypatch.setattr(kernels, "lora_decode", lambda *args: decoded.append(args) or sound(*args))
    problem = PROBLEM_OF[op](**arguments)._replace(aligned=is_aligned(arguments))
    assert problem.four_bit
    shipped = {(c.plan, c.decodes): c for c in candidates(problem, known)}
    shipped = {k: c for k, c in shipped.items() if c.plan not in ("reference", "native")}
    loops = {plan for plan, decodes in shipped if decodes}
    in_loops = {"tail"} if arch == "gfx942" or case.dtype == torch.float32 else {"tail", "in_loop"}
    assert loops == (in_loops if whole_bytes else set())
    assert {"vendor", "tail"} <= {plan for plan, decodes in shipped if not decodes}
    for (_, decodes), config in shipped.items():
        decoded.clear()
        check(op, functools.partial(cuda.run, op, config, problem, known), case)
        assert len(decoded) == (0 if decodes else 1), config


@pytest.mark.parametrize("plan", ["tail", "preload", "vendor"])
@pytest.mark.parametrize("op", MIXED)
def test_a_mixed_batch_on_a_decoded_weight(op, plan, monkeypatch):
    decoded, sound = [], kernels.lora_decode
    monkeypatch.setattr(kernels, "lora_decode", lambda *args: decoded.append(args) or sound(*args))
    case = SegmentedCase(40, 43, (37, 22), (33, 0, 8, 16), device=DEVICE, quant=("nf4", 64, True))
    known, arguments = known_of("sm_90"), case.draw().arguments(op)
    problem = PROBLEM_OF[op](**arguments)._replace(aligned=is_aligned(arguments))
    assert not is_valid(Config(plan, decodes=True), problem, known)
    assert is_valid(Config(plan), problem, known)
    check_segmented(op, functools.partial(cuda.run, op, Config(plan), problem, known), case)
    assert len(decoded) == 1


@pytest.mark.parametrize("plan", ["in_loop", "tail", "vendor"])
def test_a_layer_without_an_adapter(plan):
    """Rank 0, as ``four_bit_linear`` calls it."""
    case = replace(SIZE, m=5, quant=("nf4", 64, True))
    inputs, known = case.draw(), known_of("sm_90")
    arguments = inputs.arguments(FWD)
    arguments |= {"lora_a": arguments["lora_a"][:0], "lora_b": arguments["lora_b"][:, :0]}
    problem = PROBLEM_OF[FWD](**arguments)
    config = Config(plan) if plan == "vendor" else tile(plan)
    y, s = cuda.run(FWD, config, problem, known, **arguments)
    exact = inputs.x.double() @ inputs.weight.t() + inputs.bias
    assert s.shape == (5, 0) and (y - exact).abs().max() < 1e-5 * exact.abs().max()


def test_without_triton_the_library_decodes(monkeypatch):
    monkeypatch.setattr(kernels, "lora_decode", None)
    case = replace(SIZE, quant=("nf4", 64, True), dropout_p=0.0)
    arguments = case.draw().arguments(FWD)
    known = replace(known_of("sm_90"), triton=False)
    problem = PROBLEM_OF[FWD](**arguments)
    assert {c.plan for c in candidates(problem, known)} == {"vendor", "reference"}
    run = functools.partial(cuda.run, FWD, Config("vendor"), problem, known)
    check(FWD, run, case)
    assert vendor.base_weight is four_bit.base_weight


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU test_gpu.py shows it with the real backend")
@pytest.mark.parametrize(
    "config", [Config("tail", decodes=True), Config("tail"), Config("preload")], ids=str
)
def test_a_layer_trains_through_the_kernels(config, monkeypatch):
    """As the test of that name in ``test_kernels.py``: what is above the backend knows no kernel,
    and hands it the bytes and what they mean."""
    known = known_of("sm_90")
    torch.manual_seed(0)
    base = lk.QuantizedLinear.from_linear(torch.nn.Linear(64, 72))
    layer = lk.FusedLoRALinear.from_linear(base, r=6, init_lora_weights=False, lora_dropout=0.3)
    x = torch.randn(3, 11, 64, requires_grad=True)

    def step():
        torch.manual_seed(1)
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), y.detach())]

    with lk.force_plan("vendor"):
        expected = step()
    launched = []

    def through_the_kernel(op, *args, masked, **kwargs):
        problem = PROBLEM_OF[op](*args, **kwargs)
        launched.append((op, problem.four_bit))
        chosen = config if problem.four_bit else Config("skinny")
        return cuda.run(op, chosen, problem, known, *args, **kwargs)

    for op in (FWD, DX, "lora_linear_dab"):
        monkeypatch.setattr(vendor, op, functools.partial(through_the_kernel, op))
    with lk.force_plan("vendor"):
        results = step()
    for ours, theirs in zip(results, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert launched == [(FWD, True), (DX, True), ("lora_linear_dab", False)]
