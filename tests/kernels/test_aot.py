"""Every shipped configuration compiles ahead of time, without spills, within the device's memory
and with the tensor-core instructions that its tiles should take. No GPU is needed.

``make aot`` compiles all of them and writes ``aot_report.md``. If that is of the sources and the
Triton that are here, it is read instead of compiling; else a sample is compiled.
"""

import dataclasses
import itertools
import os
import re

import pytest
import torch

from lora_kernels.backends import cuda
from lora_kernels.functional import ops
from lora_kernels.planning import config, validity
from lora_kernels.spec.problem import Problem

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip(
        "TRITON_INTERPRET is set, and what it interprets cannot be compiled",
        allow_module_level=True,
    )

# Below the skips: nothing of Triton's is imported where it is missing.
from tests.kernels import aot, aot_binaries, aot_code, aot_segmented
from tests.kernels.aot_calls import DTYPES, FACTS, calls, sample

if aot_code.disassembler() is None:
    pytest.skip("Triton came without nvdisasm and cuobjdump", allow_module_level=True)

ARCHS = list(FACTS)

SAME_SOURCES, SAME_TRITON = (
    line in aot.REPORT.read_text().splitlines() for line in (aot.sources_line(), aot.triton_line())
)

# Registers and instructions are those of one release of the compiler; that it compiles, with what
# memory and for which units, is every release's.
of_the_reports_triton = pytest.mark.skipif(
    not SAME_TRITON,
    reason=f"{aot.REPORT.name} was written with another Triton than {aot.triton_line()}",
)


@pytest.fixture(scope="module")
def rows():
    if SAME_SOURCES and SAME_TRITON:
        return aot.read_report()
    return aot.measure_all([call for arch in ARCHS for call in sample(arch)])


@pytest.fixture
def rows_of(rows):
    def select(arch, *kernels):
        chosen = [
            r for r in rows if r.arch == arch and (not kernels or r.kernel.split()[0] in kernels)
        ]
        assert chosen
        return chosen

    return select


def none_of(rows):
    """A failure that names the lines of the table that it is about."""
    assert not rows, "\n".join(["these should not be:", *(row.line() for row in rows)])


def test_the_report_is_of_these_sources():
    assert SAME_SOURCES, (
        f"the kernels, or what is valid, changed since {aot.REPORT.name} was written (a sample of "
        "them was compiled instead): make aot"
    )


def test_the_report_lists_what_is_shipped():
    """Line by line, and read as it was written."""
    listed = [(call.arch, *call.described) for arch in ARCHS for call in calls(arch)]
    found = aot.read_report()
    assert listed == [(row.arch, *row[2:6]) for row in found]
    tables = [text.split("## ", 1)[1] for text in (aot.report(found), aot.REPORT.read_text())]
    assert tables[0] == tables[1]


@of_the_reports_triton
@pytest.mark.skipif(not SAME_SOURCES, reason="the report is of other sources")
def test_what_the_report_has_is_not_compiled_again(monkeypatch):
    """And what differs from it, by a constant alone or by the way it is read, is."""
    monkeypatch.setattr(aot, "compiled", lambda *binary: aot.Found(0, 0, 0, 0, ()))
    aot_binaries.forget_lines()
    with aot_binaries.quiet():
        for call in sample("sm_80"):
            row = aot.measure(call)
            assert row.registers and row[6:11] == aot.reported()[row.key]
        warps = dataclasses.replace(call.config, num_warps=2 * call.config.num_warps)
        assert not aot.measure(call._replace(config=warps)).registers
        assert not aot.measure(call, afresh=True).registers
        monkeypatch.setattr(aot_binaries, "_READER", aot.REPORT)
        assert not aot.measure(call).registers


def test_the_sample_has_every_kernel_and_plan():
    for arch in ARCHS:
        chosen, every = sample(arch), calls(arch)
        kinds = [
            {(c.problem.op, c.config.plan, c.launch) for c in part} for part in (chosen, every)
        ]
        assert kinds[0] == kinds[1]
        assert {c.layout for c in chosen} == {"aligned", "odd"}
        assert len(chosen) < 70


def test_the_loops_of_a_control_flow_graph():
    code = aot_code.Code(
        ["MOV", "HMMA.16816.F32", "LDS", "HMMA.16816.F32", "HMMA.16816.F32", "EXIT", "BRA", "BRA"],
        # 0 1 [2 [3] 4] 5; a wait behind the end is entered from 2 and comes back to 3
        [[1], [2], [3, 6], [4, 3], [5, 2], [], [7, 6], [3]],
    )
    # The detour makes 3 no loop's only entrance less: a path without it leads there as well.
    assert aot_code.mma_loops(code) == [{3}]
    code.successors[3] = [4]
    assert aot_code.mma_loops(code) == [{2, 3, 4, 6, 7}]
    code.successors[4] = [5]
    assert aot_code.mma_loops(code) == []


@pytest.mark.parametrize("arch", ARCHS)
def test_every_shipped_tile_is_compiled(arch):
    """The list is made from the shipped tiles, and nothing falls out of it on the way."""
    chosen = calls(arch)
    used = {(c.config.plan, c.problem.op) for c in chosen}
    for plan in ("in_loop", "tail"):
        assert {(plan, "lora_linear_fwd"), (plan, "lora_linear_dx")} <= used
    assert ("producer", "lora_linear_fwd") in used
    assert {("skinny", "lora_shrink"), ("skinny", "lora_linear_dab")} <= used
    assert {c.layout for c in chosen} == {"aligned", "odd", "strided"}
    # Tensor descriptors exist from sm_90 on.
    assert any(c.config.descriptors for c in chosen) == (arch in ("sm_90", "sm_100"))
    for op in ops.OPERATORS:
        for dtype in DTYPES:
            problem = Problem(op, 4096, 4096, 4096, 16, dtype, dtype)
            for aligned in (True, False):
                problem = problem._replace(aligned=aligned)
                for tile in config.tiled_configs(problem, FACTS[arch]):
                    if validity.invalid_reason(tile, problem, FACTS[arch]) is None:
                        assert any(
                            (c.config.plan, c.config.block_m, c.config.block_n, c.config.block_k)
                            == (tile.plan, tile.block_m, tile.block_n, tile.block_k)
                            and c.config.descriptors == tile.descriptors
                            for c in chosen
                        ), tile


@pytest.mark.parametrize("op", ["lora_linear_dab", "segmented_lora_dab"])
def test_gradients_of_two_dtypes_compile(op):
    """A in float32 and B in the rows' dtype: the interpreter has no types that could disagree."""
    call = next(c for c in calls("sm_80") if c.problem.op == op)
    args, kwargs = aot_binaries.arguments(call)
    kwargs |= {"da_dtype": torch.float32, "db_dtype": torch.bfloat16}
    with aot_binaries.launches() as caught:
        cuda.run_kernel(op, call.config, call.problem, FACTS["sm_80"], *args, **kwargs)
    with aot_binaries.quiet():
        compiled = aot_binaries.specialised("sm_80", caught[-1]).compile()
    assert compiled.asm["cubin"]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_of_a_mixed_batch_is_compiled(arch):
    chosen = [c for c in calls(arch) if c.problem.slots]
    assert {c.problem.op for c in chosen} == set(ops.SEGMENTED_OPERATORS)
    assert {c.config.plan for c in chosen} == {"grouped", "decode", "tail"}
    for op in ops.SEGMENTED_OPERATORS:
        for dtype, aligned in itertools.product(DTYPES, (True, False)):
            problem = Problem(op, 50, 3072, 4096, 256, dtype, dtype, aligned=aligned, slots=8)
            for tile in config.tiled_configs(problem._replace(slices=3), FACTS[arch]):
                if validity.invalid_reason(tile, problem, FACTS[arch]) is None:
                    # Others' launches: of its halves, or of the adapters alone.
                    halves = tile.plan == "grouped" and op in config.DECODE_OPS
                    halves |= tile.plan == "preload"
                    assert halves or any(
                        (c.config.plan, c.config.block_n, c.config.block_k, c.config.num_warps)
                        == (tile.plan, tile.block_n, tile.block_k, tile.num_warps)
                        and c.problem.op == op
                        for c in chosen
                    ), tile


@pytest.mark.parametrize("arch", ARCHS)
def test_every_tile_for_experts_is_compiled(arch):
    chosen = [c for c in calls(arch) if c.problem.experts]
    assert {c.problem.op for c in chosen} == set(ops.EXPERT_OPERATORS)
    for op, dtype, aligned in itertools.product(ops.EXPERT_OPERATORS, DTYPES, (True, False)):
        problem = Problem(op, 4096, 1536, 2048, 64, dtype, dtype, aligned=aligned, experts=8)
        for tile in config.tiled_configs(problem, FACTS[arch]):
            if validity.invalid_reason(tile, problem, FACTS[arch]) is None:
                found = [(c.config, c.problem.op, c.problem.dtype) for c in chosen]
                assert (tile, op, dtype) in found, tile


@of_the_reports_triton
def test_the_order_of_what_a_producer_publishes():
    """On sm_90: S is stored, a barrier and a fence come, then the flag; the others poll it, with
    the base's products behind them, in a loop without any, and drop their cache after each look;
    S is loaded past that cache, and multiplied then."""
    call = next(c for c in calls("sm_90") if c.config.plan == "producer")
    with aot_binaries.quiet():
        compiled = aot_binaries.specialised("sm_90", aot_binaries.launch(call)).compile()
    code = aot_code.read("sm_90", compiled)[-1]

    def places(pattern):
        return [i for i, text in enumerate(code.text) if re.search(pattern, text)]

    def after(start, avoiding=()):
        """The instructions that may come after one, on ways around others."""
        found, queue = set(), list(code.successors[start])
        while queue:
            i = queue.pop()
            if i not in found and i not in avoiding:
                found.add(i)
                queue += code.successors[i]
        return found

    products = places("HGMMA")
    (flag,) = places("ATOMG.E.EXCH.STRONG.GPU")
    stored = max(i for i in places(r"\bSTG\b") if i < flag)
    (fence,) = (i for i in places("MEMBAR.*GPU") if stored < i < flag)
    assert any(stored < i < fence for i in places("BAR.SYNC"))
    assert not any(stored < i < flag for i in products)

    (poll,) = (i for i in places(r"LDG.E.STRONG.GPU") if i in after(i, avoiding=products))
    dropped = places("CCTL.IVALL")
    assert poll not in after(poll, avoiding=dropped)
    (loaded,) = places(r"LDG.E.\d+.STRONG.GPU")
    assert loaded in after(poll, avoiding=products)
    assert loaded not in after(poll, avoiding=dropped)
    (tail,) = (i for i in products if i in after(loaded, avoiding={*products} - {i}))
    # Between either and the tail there are no products of the base: they lie behind.
    for handed_over in (poll, flag):
        assert {tail} == after(handed_over, avoiding={*code.successors[tail]}) & {*products}


@of_the_reports_triton
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills(rows_of, arch):
    none_of([row for row in rows_of(arch) if row.spills])


@pytest.mark.parametrize("arch", ARCHS)
def test_shared_memory_is_within_the_limit(rows_of, arch):
    none_of([row for row in rows_of(arch) if row.shared > FACTS[arch].shared_memory])


@of_the_reports_triton
@pytest.mark.parametrize("arch", ARCHS)
def test_main_loops_hold_the_predicted_instructions_at_most(rows_of, arch):
    """Loop by loop: as many loops with tensor-core instructions as there are products in loops, and
    in each no more than its tile and rank should take.

    Not asserted on gfx942 beyond the half types of the GEMM: Triton's placement of waves repeats
    tiles of small products there, up to twice (see the table). Where slices are summed, its
    compiler may write the tail's loop out once for each of them.
    """
    wrong = []
    for row in rows_of(arch):
        amd = arch.startswith("gfx")
        small = row.kernel.split()[0] != "lora_linear" or row.dtypes.startswith("fp32")
        if amd and small:
            continue
        counted, most = row.counted, [*row.most]
        if row.kernel.endswith("producer"):
            # Which of its two loops comes first is the compiler's choice.
            counted.sort()
        unrolled = most[:1] * len(aot_segmented.WIDTHS) + most[1:]
        if amd and row.operands.startswith("linear_dx") and len(counted) == len(unrolled):
            most = unrolled
        if len(counted) != len(most) or any(n > m for n, m in zip(counted, most, strict=True)):
            wrong.append(row)
    none_of(wrong)


@pytest.mark.parametrize(
    "arch, instruction",
    [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTC"), ("gfx942", "v_")],
)
def test_half_types_use_the_tensor_cores(rows_of, arch, instruction):
    """Those of the architecture, from 64 rows on; below, sm_90 and sm_100 have only sm_80's."""
    wrong = []
    for row in rows_of(
        arch, "lora_linear", "lora_linear_producer", "lora_linear_persistent", "expert_linear"
    ):
        if not row.dtypes.startswith("fp32"):
            name = instruction if row.rows >= 64 or "gfx" in arch else "HMMA"
            names = [part.split()[1] for loop in row.loops for part in loop.split(" + ")]
            if not names or not all(found.startswith(name) for found in names):
                wrong.append(row)
    none_of(wrong)
