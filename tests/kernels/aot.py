"""The Triton kernels, compiled ahead of time for devices that need not be here, and looked into.

Not a test: ``test_aot.py`` asserts; ``python -m tests.kernels.aot --write`` writes
``aot_report.md``.

What is compiled comes from the package itself: every tile that ``config.tiled_configs`` ships for
an architecture, as far as ``config.invalid_reason`` admits it, is given to the real launcher with
CPU tensors of real shapes and strides, and the launch is caught and specialised by Triton's own
rules (divisibility by 16, strides of 1) instead of run.

The full product of tiles, plans, ranks, operators, layouts and dtypes is a few thousand binaries. A
covering set of it, each member there for what it costs in registers or in addresses:

- the GEMM with a tail, bf16: each tile in each plan at the largest rank it admits, as the forward
  ([N, K] weight, bias) and as dX ([K, N] weight; masked in the tail plan), for aligned and odd
  operands, with descriptors as well where they are valid; each smaller rank bucket once, as the
  aligned forward. Adapters are fp32 in half of these and bf16 in the others. Tiles of 16 rows are
  split along K, and so is the tile of 64 rows once. The producer plan, which is not split, is there
  as dX and as the forward both masked and not.
- once per architecture, plan and way to load, the first tile: columns with strides (no unit
  stride at all), a weight that is a Conv1D's, and out_scale.
- fp16, whose tail is TF32, and fp32: each tile in each plan, aligned and odd.
- the shrink and dA/dB: each tile at the largest rank it admits masked and not, split and not,
  aligned, odd and strided, fp16 likewise but fewer, fp32 once; ranks 16 and 64 once, masked and
  aligned.
- the segmented operators: the docstring of ``aot_segmented.py``.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels.backends import cuda
from lora_kernels.planning.config import Config, tiled_configs
from lora_kernels.planning.device import DeviceFacts
from lora_kernels.planning.validity import invalid_reason
from lora_kernels.spec.problem import Problem
from lora_kernels.spec.reference import tail_dtype
from tests.kernels import aot_segmented

REPORT = Path(__file__).with_name("aot_report.md")
# Of the cores, so that the suite finishes in minutes where there are two.
WORKERS = 2

RANKS = (16, 32, 64, 128, 256)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

# Shared memory is what one block may ask for: CUDA's programming guide, table of technical
# specifications per compute capability (163 KiB on 8.0, 227 KiB on 9.0 and 10.0); 64 KiB of LDS in
# the CDNA3 instruction set's manual. Processors: A100, H200, B200, MI300X.
FACTS = {
    arch: DeviceFacts("cuda", arch, arch, processors=processors, shared_memory=shared)
    for arch, processors, shared in (
        ("sm_80", 108, 166912),
        ("sm_90", 132, 232448),
        ("sm_100", 148, 232448),
        ("gfx942", 304, 65536),
    )
}


class Call(NamedTuple):
    """One operator call on one architecture with one configuration: what a worker compiles."""

    arch: str
    config: Config
    problem: Problem
    layout: str  # "aligned", "odd" or "strided"
    packed: bool = False
    # which of the call's launches
    launch: int = -1

    @property
    def flags(self) -> str:
        """What the table says of it beyond tile, rank and dtypes."""
        problem, op = self.problem, self.problem.op
        names = {"lora_linear_fwd": "fwd", "lora_linear_dx": "dx"}
        flags = [names[op]] if op in names else []
        flags += [op.removeprefix("segmented_")] * (problem.slots > 0) + ["packed"] * self.packed
        flags += ["mask"] * problem.dropout + ["Conv1D"] * problem.fan_in_fan_out
        flags += ["out_scale"] * problem.out_scale + ["descriptors"] * self.config.descriptors
        return " ".join([*flags, self.layout])


class Row(NamedTuple):
    """What one binary takes. ``loops`` are the innermost loops that hold tensor-core instructions,
    in the order of their addresses: per loop and instruction, how often it stands in it. ``lanes``
    are scalar registers that an AMD compiler keeps in lanes of vector registers: named spills by it
    too, but no memory is touched."""

    call: Call
    kernel: str
    constants: dict[str, Any]
    registers: int
    spills: int
    lanes: int
    shared: int
    loops: tuple[dict[str, int], ...]


# The list.


def calls(arch: str) -> list[Call]:
    """The covering set of the module's docstring for one architecture, without repetitions."""
    mixed = itertools.starmap(functools.partial(Call, arch), aot_segmented.calls(FACTS[arch]))
    return list(dict.fromkeys(itertools.chain(_linear(arch), _skinny(arch), mixed)))


def _linear(arch: str) -> Iterator[Call]:
    base = Problem("lora_linear_fwd", 4096, 4096, 4096, 16, "bfloat16", "float32")
    first = set()
    for config in _tiles(arch, base, RANKS):
        # Tiles of few rows are there for few rows.
        rows = 8 if config.block_m == 16 else 4096
        fwd = base._replace(m=rows)
        admitted = _ranks(arch, config, fwd)
        if not admitted:
            continue
        # A longer tail is walked in steps of 32.
        largest = min(64, max(admitted)) if config.plan == "tail" else max(admitted)
        for r in admitted:
            if r < largest and (config.descriptors or arch not in ("sm_90", "sm_100")):
                yield from _call(arch, config, fwd._replace(r=r), "aligned")
        for layout, adapters in (("aligned", "float32"), ("odd", "bfloat16")):
            yield from _call(arch, config, fwd._replace(r=largest, adapter_dtype=adapters), layout)
        dx = fwd._replace(op="lora_linear_dx", r=largest, dropout=config.plan == "tail")
        for layout, adapters in (("aligned", "bfloat16"), ("odd", "float32")):
            yield from _call(arch, config, dx._replace(adapter_dtype=adapters), layout)
            if config.plan == "producer":
                # With a mask the two have nothing in common.
                for masked in (fwd._replace(r=largest, dropout=True), dx._replace(dropout=True)):
                    yield from _call(arch, config, masked._replace(adapter_dtype=adapters), layout)
        if config.block_m == 64 and config.plan != "producer":
            yield from _call(arch, config, fwd._replace(m=64, r=largest), "aligned")
        kind = (config.plan, config.descriptors)
        if kind not in first:
            first.add(kind)
            special = fwd._replace(r=16)
            yield from _call(arch, config, special, "strided")
            yield from _call(arch, config, special._replace(fan_in_fan_out=True), "aligned")
            yield from _call(arch, config, special._replace(out_scale=True), "aligned")
    half = base._replace(dtype="float16")
    for config in _tiles(arch, half, RANKS):
        rows = 8 if config.block_m == 16 else 4096
        fwd = half._replace(m=rows, r=64)
        dx = fwd._replace(op="lora_linear_dx", dropout=True)
        for problem, layout, adapters in (
            (fwd, "aligned", "float32"),
            (fwd._replace(r=8), "aligned", "float16"),
            (fwd, "odd", "float16"),
            (dx, "aligned", "float16"),
            (dx, "odd", "float32"),
        ):
            yield from _call(arch, config, problem._replace(adapter_dtype=adapters), layout)
    single = base._replace(dtype="float32", adapter_dtype="float32")
    for config in _tiles(arch, single, RANKS):
        rows = 8 if config.block_m == 16 else 4096
        admitted = _ranks(arch, config, single)
        if not admitted:
            continue
        r = min(64, max(admitted)) if config.plan == "tail" else max(admitted)
        yield from _call(arch, config, single._replace(m=rows, r=r), "odd")
        dx = single._replace(op="lora_linear_dx", m=rows, r=r, dropout=config.plan != "in_loop")
        yield from _call(arch, config, dx, "aligned")
        if config.plan == "producer":
            masked = single._replace(m=rows, r=r, dropout=True)
            yield from _call(arch, config, masked, "aligned")


def _skinny(arch: str) -> Iterator[Call]:
    for op in ("lora_shrink", "lora_linear_dab"):
        # One axis is summed over; long enough, it is dealt out to several programs.
        long = {"m": 8192} if op == "lora_linear_dab" else {"k": 4096}
        short = {"m": 64} if op == "lora_linear_dab" else {"k": 256}
        base = Problem(op, 512, 512, 512, 256, "bfloat16", "float32")
        for config in _tiles(arch, base, RANKS):
            variants = [
                base._replace(dtype=dtype, adapter_dtype=adapters, dropout=dropout, **size)
                for dtype, adapters, dropout, size in (
                    ("bfloat16", "float32", True, long),
                    ("bfloat16", "float32", True, short),
                    ("bfloat16", "bfloat16", False, short),
                    ("bfloat16", "bfloat16", False, long),
                    ("bfloat16", "bfloat16", True, long),
                    ("float16", "float32", True, long),
                    ("float16", "float16", False, short),
                    ("float16", "float16", True, long),
                    ("float32", "float32", True, long),
                )
            ]
            layouts = ("aligned", "odd", "aligned", "odd", "strided")
            layouts = (*layouts, "aligned", "odd", "strided", "aligned")
            for problem, layout in zip(variants, layouts, strict=True):
                ranks = [r for r in RANKS if _admitted(arch, config, problem._replace(r=r), layout)]
                for r in ranks[-1:]:
                    yield from _call(arch, config, problem._replace(r=r), layout)
            for r in (16, 64):
                yield from _call(arch, config, variants[0]._replace(r=r), "aligned")


def _tiles(arch: str, problem: Problem, ranks: Iterable[int]) -> Iterator[Config]:
    """Every shipped tile, plan and kind of address, once, whatever its rank."""
    found = (tiled_configs(problem._replace(r=r), FACTS[arch]) for r in ranks)
    # How far K is split depends on the problem, and comes back in _call.
    return iter(dict.fromkeys(dataclasses.replace(c, split_k=0) for c in itertools.chain(*found)))


def _ranks(arch: str, config: Config, problem: Problem) -> list[int]:
    """The ranks that a tile admits for aligned operands, or for others."""
    return [
        r
        for r in RANKS
        if any(
            _admitted(arch, config, problem._replace(r=r, aligned=layout == "aligned"), layout)
            for layout in ("aligned", "odd")
        )
    ]


def _admitted(arch: str, config: Config, problem: Problem, layout: str) -> bool:
    problem = problem._replace(aligned=layout == "aligned")
    return invalid_reason(config, problem, FACTS[arch]) is None


def _call(arch: str, tile: Config, problem: Problem, layout: str) -> Iterator[Call]:
    """The call of ``tile`` for ``problem``, if it is valid there, with the shipped split."""
    if layout == "odd":
        # Nothing divides by 16: neither sizes nor strides, nor a base address.
        odd = {size: getattr(problem, size) - 1 for size in ("m", "n", "k", "r")}
        problem = problem._replace(**odd)
    problem = problem._replace(aligned=layout == "aligned")
    for config in tiled_configs(problem, FACTS[arch]):
        if dataclasses.replace(config, split_k=0) == tile and _admitted(
            arch, config, problem, layout
        ):
            yield Call(arch, config, problem, layout)


# The launch.


def arguments(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's own arguments; the tensors are reserved memory that nobody touches."""
    problem, layout = call.problem, call.layout
    if problem.slots:
        return (), aot_segmented.arguments(problem, layout, call.packed)
    dtype, adapters = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]
    m, n, k, r = problem.m, problem.n, problem.k, problem.r

    def rows(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        if layout == "aligned":
            return torch.empty(shape, dtype=dtype)
        if layout == "odd":
            # a slice of something wider, so that the base address is odd too
            return torch.empty(*shape[:-1], shape[-1] + 2, dtype=dtype)[..., 1:-1]
        return torch.empty(*shape[:-1], 3 * shape[-1], dtype=dtype)[..., ::3]

    rng = torch.zeros(4, dtype=torch.int64) if problem.dropout else None
    dropout = {"rng": rng, "dropout_p": 0.1 * problem.dropout}
    scale = torch.ones(())
    if problem.op == "lora_shrink":
        # The strided layout is dX's: a is B, transposed.
        strided = layout == "strided"
        a = rows(k, r, dtype=adapters).t() if strided else rows(r, k, dtype=adapters)
        return (rows(m, k), a, scale), dropout
    if problem.op == "lora_linear_dab":
        result = {f"{name}_dtype": adapters for name in ("da", "db", "dbias")}
        tails = torch.empty(2, m, r, dtype=tail_dtype(dtype))
        return (rows(m, n), rows(m, k), *tails), dropout | result
    weight = rows(k, n) if problem.fan_in_fan_out else rows(n, k)
    lead = (
        weight,
        rows(r, k, dtype=adapters),
        rows(n, r, dtype=adapters),
        scale,
    )
    options: dict[str, Any] = {"fan_in_fan_out": problem.fan_in_fan_out} | dropout
    if problem.out_scale:
        options["out_scale"] = rows(n)
    if problem.op == "lora_linear_dx":
        return (rows(m, n), *lead), options
    return (rows(m, k), *lead), options | {"bias": rows(n)}


class _Caught(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextlib.contextmanager
def _launches() -> Iterator[list[_Caught]]:
    """Inside the block the package's kernels are not run; what they were launched with is kept."""
    from lora_kernels.kernels import (
        linear_bwd,
        linear_fwd,
        linear_producer,
        segmented,
        segmented_bwd,
        segmented_decode,
    )

    modules = (
        linear_fwd,
        linear_producer,
        linear_bwd,
        segmented,
        segmented_bwd,
        segmented_decode,
    )
    caught: list[_Caught] = []

    class Catcher:
        def __init__(self, function: Any):
            self.function = function

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: caught.append(_Caught(self.function, args, kwargs))

    kept = [
        (module, name, function)
        for module in modules
        for name, function in vars(module).items()
        if name.startswith(("_lora", "_segmented")) and name.endswith("_kernel")
    ]
    for module, name, function in kept:
        setattr(module, name, Catcher(function))
    try:
        yield caught
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def launch(call: Call) -> _Caught:
    """What the operator's launcher gives its kernel; a tail's shrink is a call of its own."""
    args, kwargs = arguments(call)
    with _launches() as caught:
        cuda.run_kernel(
            call.problem.op, call.config, call.problem, FACTS[call.arch], *args, **kwargs
        )
    return caught[call.launch]


def compile_ahead(arch: str, caught: _Caught) -> tuple[Any, dict[str, Any]]:
    """The compiled kernel and its constants, specialised as a launch on such a device would be."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    function, args, kwargs = caught
    backend = make_backend(target)
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, given = bind(*args, **kwargs)
    options, signature, constants, attributes = function._pack_args(
        backend, kwargs, bound, specialization, given
    )
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return compiled, {name: value for name, value in bound.items() if name.isupper()}


# The disassembly.


def disassembler() -> Path | None:
    """The folder of Triton's copies of nvdisasm and cuobjdump, or None."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return folder if all((folder / tool).exists() for tool in ("nvdisasm", "cuobjdump")) else None


def measure(call: Call) -> Row:
    caught = launch(call)
    compiled, constants = compile_ahead(call.arch, caught)
    read = _read_amd if call.arch.startswith("gfx") else _read_nvidia
    registers, spills, lanes, code = read(compiled)
    loops = mma_loops(code)
    counted = tuple(
        dict(collections.Counter(name for i in sorted(loop) if (name := mma(code.text[i]))))
        for loop in loops
    )
    kernel = caught.function.__name__
    shared = compiled.metadata.shared
    return Row(call, kernel, constants, registers, spills, lanes, shared, counted)


class Code(NamedTuple):
    """Instructions in the order of their addresses, and where each may go next."""

    text: list[str]
    successors: list[list[int]]


def _read_nvidia(compiled: Any) -> tuple[int, int, int, Code]:
    """Registers per thread, bytes of stack plus instructions that move local memory, no lanes, the
    code."""
    folder = disassembler()
    assert folder is not None
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run(
                [folder / tool, option, cubin], capture_output=True, text=True, check=True
            )
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found, usage.stdout
    code = _code(
        sass.stdout,
        label=re.compile(r"(\.L\w+):$"),
        instruction=re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;"),
        # On sm_80 ptxas leaves loops by calls that do not return.
        branch=re.compile(r"\b(?:BRA|CALL)(?:\.\S+)?\s.*?`\((\.L\w+)\)"),
        # neither predicated nor with a predicate as its operand
        always=re.compile(r"(BRA(\.\S+)?\s+`|EXIT\b|RET\b)"),
    )
    moved = sum(1 for text in code.text if re.search(r"\b(STL|LDL)\b", text))
    return int(found[1]), int(found[2]) + moved, 0, code


def _read_amd(compiled: Any) -> tuple[int, int, int, Code]:
    """Vector registers (of both kinds), spilled ones plus bytes of scratch, scalar registers in
    lanes, the code."""
    assembly = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        assert found, name
        return int(found[1])

    spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
    code = _code(
        assembly.split(".Lfunc_end")[0],
        label=re.compile(r"(\.LBB\w+):"),
        instruction=re.compile(r"^\s+([a-z]\w+.*)"),
        branch=re.compile(r"s_c?branch\w*\s+(\.LBB\w+)"),
        always=re.compile(r"(s_branch|s_endpgm)\b"),
    )
    return number("vgpr_count"), spills, number("sgpr_spill_count"), code


def _code(
    listing: str,
    label: re.Pattern[str],
    instruction: re.Pattern[str],
    branch: re.Pattern[str],
    always: re.Pattern[str],
) -> Code:
    text: list[str] = []
    places: dict[str, int] = {}
    for line in listing.splitlines():
        if found := label.match(line.strip()):
            places[found[1]] = len(text)
        elif found := instruction.search(line):
            text.append(found[1])
    successors = []
    for i, one in enumerate(text):
        following = [i + 1] if i + 1 < len(text) and not always.match(one) else []
        if found := branch.search(one):
            following.append(places[found[1]])
        successors.append(following)
    return Code(text, successors)


def mma(text: str) -> str | None:
    """The name and shape of a tensor-core instruction, None for any other."""
    found = re.search(
        r"\b(HGMMA\.\d+x\d+x\d+|HMMA\.\d+|UTC\w*MMA|v_s?mfmac?_[a-z0-9]+_\d+x\d+x\d+)", text
    )
    return found[1] if found else None


def mma_loops(code: Code) -> list[set[int]]:
    """The innermost loops with tensor-core instructions, as sets of instructions, by address.

    Loops are natural ones: a branch back to a block through which every path to it leads. Addresses
    alone would not do: waits for barriers stand behind the end of the kernel and jump back from
    there.
    """
    if not code.text:
        return []
    leaders = {0}
    for i, following in enumerate(code.successors):
        if following != [i + 1]:
            leaders.update(following)
            leaders.add(i + 1)
    starts = sorted(i for i in leaders if i < len(code.text))
    ends = [*starts[1:], len(code.text)]
    block_at = {start: number for number, start in enumerate(starts)}
    after = [[block_at[s] for s in code.successors[stop - 1]] for stop in ends]
    before: list[list[int]] = [[] for _ in starts]
    for number, following in enumerate(after):
        for s in following:
            before[s].append(number)

    # Sets of blocks as bits; a block that nothing reaches stays "dominated" by all and is left out.
    everything = (1 << len(starts)) - 1
    dominators = [1] + [everything] * (len(starts) - 1)
    changed = True
    while changed:
        changed = False
        for number in range(1, len(starts)):
            common = everything
            for p in before[number]:
                common &= dominators[p]
            common |= 1 << number
            if common != dominators[number]:
                dominators[number], changed = common, True

    bodies: dict[int, set[int]] = {}
    for number, following in enumerate(after):
        for head in following:
            if not dominators[number] >> head & 1 or dominators[number] == everything:
                continue
            body, queue = bodies.setdefault(head, {head}), [number]
            while queue:
                block = queue.pop()
                if block not in body:
                    body.add(block)
                    queue += before[block]
    loops = [
        {i for block in body for i in range(starts[block], ends[block])}
        for _, body in sorted(bodies.items())
    ]
    loops = [loop for loop in loops if any(mma(code.text[i]) for i in loop)]
    return [loop for loop in loops if not any(other < loop for other in loops)]


# The prediction.


def instructions(arch: str, rows: int, columns: int, depth: int, warps: int, dtype: str) -> int:
    """Tensor-core instructions that one [rows, columns] += [rows, depth] [depth, columns] puts into
    a program's instruction stream, if the work is dealt out without waste.

    sm_90: a warp group issues 64 x (up to 256) x 16. sm_100: one thread issues (up to 128) x (up to
    256) x 16 for all. Elsewhere, and for fewer than 64 rows, a warp issues 16 x 8 x 16; on gfx942 a
    wave issues 32 x 32 x 8, or 16 x 16 x 16 where a side is shorter. A warp without a tile of its
    own repeats another's. fp32 is exact (ieee): ordinary instructions on NVIDIA, 32 x 32 x 2 and
    16 x 16 x 4 on gfx942. TF32 has half the depth of the half types.
    """
    half = dtype not in ("float32", "tf32")
    if arch.startswith("gfx"):
        step = 8 if half else 4 if dtype == "tf32" else 2
        if min(rows, columns) >= 32:
            tiles, steps = (rows // 32) * (columns // 32), depth // step
        else:
            tiles, steps = (rows // 16) * (columns // 16), depth // (2 * step)
        return -(-tiles // warps) * steps
    if dtype == "float32":
        return 0
    steps = depth // (16 if half else 8)
    if arch == "sm_90" and rows >= 64:
        return -(-(rows // 64) // (warps // 4)) * -(-columns // 256) * steps
    if arch == "sm_100" and rows >= 64:
        return -(-rows // 128) * -(-columns // 256) * steps
    return -(-(rows // 16) * (columns // 8) // warps) * steps


def predicted(row: Row) -> list[int]:
    """Per loop with a product, in the order of the kernel's text, the most instructions that it
    should hold."""
    c, arch = row.constants, row.call.arch
    dtype, warps = row.call.problem.dtype, row.call.config.num_warps

    def product(rows: int, columns: int, depth: int) -> int:
        return instructions(arch, rows, columns, depth, warps, dtype)

    def of_tail(rows: int, columns: int, depth: int) -> int:
        tail = "tf32" if dtype == "float16" else dtype
        return instructions(arch, rows, columns, depth, warps, tail)

    if row.kernel == "_lora_shrink_kernel":
        loops = [of_tail(c["BLOCK_M"], c["BLOCK_R"], c["BLOCK_K"])]
    elif row.kernel == "_lora_linear_dab_kernel":
        # dA, then dB
        loops = 2 * [of_tail(c["BLOCK_C"], c["BLOCK_R"], c["BLOCK_M"])]
    elif row.kernel not in ("_lora_linear_kernel", "_lora_linear_producer_kernel"):
        loops = [of_tail(*sizes) for sizes in aot_segmented.products(row.kernel, c)]
    else:
        base = product(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"])
        side_by_side = base + of_tail(c["BLOCK_M"], c["BLOCK_R"], c["BLOCK_K"])
        if row.kernel == "_lora_linear_producer_kernel":
            # the other tiles' loop, then the owners'
            loops = [base, side_by_side]
        elif c["IN_LOOP"]:
            loops = [side_by_side]
        else:
            loops = [of_tail(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_R"]), base]
    return [count for count in loops if count]


def counted(row: Row) -> list[int]:
    return [sum(loop.values()) for loop in row.loops]


# The report.


def measure_all(chosen: list[Call], workers: int = WORKERS) -> list[Row]:
    """Rows in the order of ``chosen``, from processes of their own."""
    context = multiprocessing.get_context("spawn")
    with (
        _quiet(),
        concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool,
    ):
        return list(pool.map(measure, chosen, chunksize=4))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Triton warns of a default that it will change; here the one it has now is said aloud."""
    name = "TRITON_DEFAULT_FP_FUSION"
    before = os.environ.setdefault(name, "1")
    kept = dict(os.environ)
    try:
        yield
    finally:
        os.environ[name] = kept.get(name, before)


def version_line() -> str:
    import triton

    return f"Compiled by triton {triton.__version__}."


def table_rows(rows: list[Row]) -> list[str]:
    """One line of the table per binary."""
    lines = []
    for row in rows:
        config, problem = row.call.config, row.call.problem
        sizes = "x".join(str(s) for s in (config.block_m, config.block_n, config.block_k) if s)
        tile = f"{sizes} w{config.num_warps} s{config.num_stages}"
        tile += f" split {config.split_k}" * (config.split_k > 1)
        kernel = row.kernel.removeprefix("_").removesuffix("_kernel")
        plan = "" if config.plan in ("skinny", "grouped", "decode") else f" {config.plan}"
        loops = [" + ".join(f"{n} {name}" for name, n in loop.items()) for loop in row.loops]
        cells = (
            f"{kernel}{plan}",
            tile,
            problem.r,
            f"{SHORT[problem.dtype]}/{SHORT[problem.adapter_dtype]}",
            row.call.flags,
            row.registers,
            f"{row.spills} ({row.lanes} in lanes)" if row.lanes else row.spills,
            row.shared,
            "; ".join(loops) or "none",
            "; ".join(map(str, predicted(row))) or "none",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def report(rows: list[Row]) -> str:
    head = (
        "kernel, plan",
        "tile",
        "r",
        "dtype/adapters",
        "operator, operands",
        "registers",
        "spills",
        "shared, bytes",
        "tensor-core instructions per iteration",
        "at most",
    )
    lines = [
        "# The kernels, compiled ahead of time",
        "",
        "Written by `python -m tests.kernels.aot --write`; `test_aot.py` regenerates it and",
        "compares. What is listed, and why these: the docstring of `aot.py`. Loops are",
        "separated by a semicolon: of a tail plan the walk along the rank and then the one along",
        "K, of dA/dB one each, of a producer plan the owners' and the others', in either order.",
        "Spills in lanes are scalar registers kept in vector registers.",
        "",
        version_line(),
    ]
    for arch, facts in FACTS.items():
        lines += [
            "",
            f"## {arch}",
            "",
            f"Shared memory: at most {facts.shared_memory} bytes a block.",
            "",
            f"| {' | '.join(head)} |",
            f"| {' | '.join(['---'] * len(head))} |",
            *table_rows([row for row in rows if row.call.arch == arch]),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=measure_all.__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name}, else print it")
    parser.add_argument("--arch", action="append", choices=FACTS, help="only these (prints)")
    parser.add_argument("--list", action="store_true", help="count the calls, compile nothing")
    asked = parser.parse_args()
    chosen = [call for arch in asked.arch or FACTS for call in calls(arch)]
    if asked.list:
        counts = collections.Counter((call.arch, call.problem.op) for call in chosen)
        print(*(f"{arch} {op} {n}" for (arch, op), n in counts.items()), len(chosen), sep="\n")
        return
    text = report(measure_all(chosen))
    if asked.write and not asked.arch:
        REPORT.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
