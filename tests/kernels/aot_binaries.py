"""From a call to its binary, and what that holds.

The real launcher is given CPU tensors of real shapes and strides; its launch is caught and
specialised by Triton's own rules (divisibility by 16, strides of 1) instead of run.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels import kernels
from lora_kernels.backends import cuda
from lora_kernels.spec.reference import tail_dtype
from tests.kernels import aot_experts, aot_four_bit, aot_linears, aot_segmented
from tests.kernels.aot_calls import DTYPES, FACTS, Call


def arguments(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's own arguments; the tensors are reserved memory that nobody touches."""
    problem, layout = call.problem, call.layout
    if problem.slots:
        return (), aot_segmented.arguments(problem, layout, call.packed)
    if problem.experts:
        return (), aot_experts.arguments(problem, layout)
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


class Caught(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextlib.contextmanager
def launches() -> Iterator[list[Caught]]:
    """Inside the block the package's kernels are not run; the list gets what they are launched
    with."""
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    caught: list[Caught] = []

    class Catcher:
        def __init__(self, function: Any):
            self.function = function

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: caught.append(Caught(self.function, args, kwargs))

    kept = [
        (module, name, function)
        for module in modules
        for name, function in vars(module).items()
        if name.startswith(("_lora", "_segmented", "_expert")) and name.endswith("_kernel")
    ]
    for module, name, function in kept:
        setattr(module, name, Catcher(function))
    try:
        yield caught
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def launch(call: Call) -> Caught:
    """What the operator's launcher gives its kernel; a tail's shrink is a call of its own."""
    if call.problem.op in aot_linears.OPERATORS:
        with launches() as caught:
            aot_linears.shrink(call.config, call.problem, call.layout)
        return caught[call.launch]
    if call.problem.four_bit:
        with launches() as caught:
            aot_four_bit.launch(call.config, call.problem, call.layout, FACTS[call.arch])
        return caught[call.launch]
    args, kwargs = arguments(call)
    with launches() as caught:
        cuda.run_kernel(
            call.problem.op, call.config, call.problem, FACTS[call.arch], *args, **kwargs
        )
    return caught[call.launch]


def compile_ahead(arch: str, caught: Caught) -> tuple[Any, dict[str, Any]]:
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


def disassembler() -> Path | None:
    """The folder of Triton's copies of nvdisasm and cuobjdump, or None."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return folder if all((folder / tool).exists() for tool in ("nvdisasm", "cuobjdump")) else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Triton warns of a default that it will change; here the one it has now is said aloud."""
    name = "TRITON_DEFAULT_FP_FUSION"
    before = os.environ.setdefault(name, "1")
    kept = dict(os.environ)
    try:
        yield
    finally:
        os.environ[name] = kept.get(name, before)


class Code(NamedTuple):
    """Instructions in the order of their addresses, and where each may go next."""

    text: list[str]
    successors: list[list[int]]


def read(arch: str, compiled: Any) -> tuple[int, int, int, Code]:
    """Registers, spills, spills in lanes, and the code."""
    return (_read_amd if arch.startswith("gfx") else _read_nvidia)(compiled)


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
