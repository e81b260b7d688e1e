"""The Triton kernels, compiled ahead of time for devices that need not be here, and looked into.

Not a test: ``test_aot.py`` asserts. ``make aot`` (``python -m tests.kernels.aot --write``) compiles
everything that ``aot_calls.py`` lists and writes ``aot_report.md``; as long as the report is of the
sources that are there, the tests read it instead of compiling. A binary that the report has, made
by the same Triton from the same kernel and arguments, is not compiled again (``--afresh`` does).
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import functools
import hashlib
import multiprocessing
from pathlib import Path
from typing import Any, NamedTuple

import lora_kernels
from tests.kernels import aot_segmented
from tests.kernels.aot_binaries import Binary, forget_lines, launch, quiet, specialised
from tests.kernels.aot_calls import FACTS, Call, calls
from tests.kernels.aot_code import mma, mma_loops, read

REPORT = Path(__file__).with_name("aot_report.md")
# Of the cores, so that it takes minutes where there are two.
WORKERS = 2

# The report's columns, and of a row how each is written.
HEAD = (
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
    "key",
)


class Row(NamedTuple):
    """A line of the report: one binary and what it takes. ``loops`` are the innermost loops that
    hold tensor-core instructions, in the order of their addresses, each with its instructions as
    text ("36 HMMA.16816"); ``most`` are the predicted numbers. ``lanes`` are scalar registers that
    an AMD compiler keeps in lanes of vector registers: it calls them spilled too, but no memory is
    touched. ``key`` is :attr:`Binary.key`."""

    arch: str
    kernel: str
    tile: str
    r: int
    dtypes: str
    operands: str
    registers: int
    spills: int
    lanes: int
    shared: int
    loops: tuple[str, ...]
    most: tuple[int, ...]
    key: str

    @property
    def rows(self) -> int:
        """Of the tile."""
        return int(self.tile.split("x")[0])

    @property
    def counted(self) -> list[int]:
        return [sum(int(part.split()[0]) for part in loop.split(" + ")) for loop in self.loops]

    def line(self) -> str:
        cells = (
            self.kernel,
            self.tile,
            self.r,
            self.dtypes,
            self.operands,
            self.registers,
            f"{self.spills} ({self.lanes} in lanes)" if self.lanes else self.spills,
            self.shared,
            "; ".join(self.loops) or "none",
            "; ".join(map(str, self.most)) or "none",
            self.key,
        )
        return f"| {' | '.join(map(str, cells))} |"


def read_line(arch: str, line: str) -> Row:
    """The row that ``line()`` writes so."""
    *cells, key = line[2:-2].split(" | ")
    kernel, tile, r, dtypes, operands, registers, spills, shared, *lists = cells
    loops, most = ([] if cell == "none" else cell.split("; ") for cell in lists)
    spilled, *lanes = spills.replace("(", "").split()[:2]
    return Row(
        arch, kernel, tile, int(r), dtypes, operands, int(registers),
        int(spilled), int(lanes[0]) if lanes else 0, int(shared),
        tuple(loops), tuple(map(int, most)), key,
    )  # fmt: skip


class Found(NamedTuple):
    """Of a binary, by its key: what a report's row has of it."""

    registers: int
    spills: int
    lanes: int
    shared: int
    loops: tuple[str, ...]


def compiled(arch: str, binary: Binary) -> Found:
    made = binary.compile()
    registers, spills, lanes, code = read(arch, made)
    found = [
        collections.Counter(name for i in sorted(loop) if (name := mma(code.text[i])))
        for loop in mma_loops(code)
    ]
    loops = tuple(" + ".join(f"{n} {name}" for name, n in loop.items()) for loop in found)
    return Found(registers, spills, lanes, made.metadata.shared, loops)


@functools.cache
def reported() -> dict[str, Found]:
    """What the report has, if this Triton compiled it."""
    if triton_line() not in REPORT.read_text().splitlines():
        return {}
    return {row.key: Found(*row[6:11]) for row in read_report()}


def measure(call: Call, afresh: bool = False) -> Row:
    caught = launch(call)
    binary = specialised(call.arch, caught)
    known = None if afresh else reported().get(binary.key)
    found = known or compiled(call.arch, binary)
    name = caught.function.__name__
    plan = (
        ""
        if call.config.plan in ("skinny", "preload", "grouped", "decode", "vendor")
        else f" {call.config.plan}"
    )
    kernel = name.removeprefix("_").removesuffix("_kernel") + plan
    most = tuple(predicted(call, name, binary.constants))
    return Row(call.arch, kernel, *call.described, *found, most, binary.key)


def measure_all(chosen: list[Call], workers: int = WORKERS, afresh: bool = False) -> list[Row]:
    """Rows in the order of ``chosen``, from processes of their own."""
    context = multiprocessing.get_context("spawn")
    work = functools.partial(measure, afresh=afresh)
    pool_of = functools.partial(concurrent.futures.ProcessPoolExecutor, initializer=forget_lines)
    with quiet(), pool_of(workers, mp_context=context) as pool:
        return list(pool.map(work, chosen, chunksize=4))


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


def predicted(call: Call, kernel: str, c: dict[str, Any]) -> list[int]:
    """Per loop with a product, in the order of the kernel's text, the most instructions that it
    should hold; ``c`` are the kernel's constants."""
    arch, dtype, warps = call.arch, call.problem.dtype, call.config.num_warps

    def product(rows: int, columns: int, depth: int) -> int:
        return instructions(arch, rows, columns, depth, warps, dtype)

    def of_tail(rows: int, columns: int, depth: int) -> int:
        tail = "tf32" if dtype == "float16" else dtype
        return instructions(arch, rows, columns, depth, warps, tail)

    if kernel in ("_lora_shrink_kernel", "_lora_shrinks_kernel", "_expert_shrink_kernel"):
        loops = [of_tail(c["BLOCK_M"], c["BLOCK_R"], c["BLOCK_K"])]
    elif kernel == "_lora_preload_kernel":
        loops = [of_tail(c["BLOCK_M"], c["BLOCK_R"], c["BLOCK_K"])]
        loops.append(of_tail(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_R"]))
    elif kernel in ("_lora_linear_dab_kernel", "_expert_linear_dab_kernel"):
        # dA, then dB
        loops = 2 * [of_tail(c["BLOCK_C"], c["BLOCK_R"], c["BLOCK_M"])]
    elif kernel == "_lora_decode_kernel":
        loops = []
    elif kernel == "_lora_linear_persistent_kernel":
        # The tail is a step of the base's loop.
        loops = [product(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"])]
    elif kernel.startswith("_segmented"):
        loops = [of_tail(*sizes) for sizes in aot_segmented.products(kernel, c)]
    else:
        base = product(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_K"])
        side_by_side = base + of_tail(c["BLOCK_M"], c["BLOCK_R"], c["BLOCK_K"])
        if kernel == "_lora_linear_producer_kernel":
            # the other tiles' loop, then the owners'
            loops = [base, side_by_side]
        elif c.get("IN_LOOP"):
            loops = [side_by_side]
        else:
            loops = [of_tail(c["BLOCK_M"], c["BLOCK_N"], c["BLOCK_R"]), base]
    return [count for count in loops if count]


# The report.


def triton_line() -> str:
    import triton

    return f"Compiled by triton {triton.__version__}."


def sources_line() -> str:
    """Names the sources that decide about what is in the report."""
    package, tests = Path(lora_kernels.__file__).parent, Path(__file__).parent
    planning = [package / "planning" / f"{name}.py" for name in ("config", "validity")]
    files = [*sorted((package / "kernels").glob("*.py")), *planning, *sorted(tests.glob("aot*.py"))]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"Sources: {digest.hexdigest()[:16]}."


def report(rows: list[Row]) -> str:
    lines = [
        "# The kernels, compiled ahead of time",
        "",
        "Written by `make aot`, read by `test_aot.py`. What is listed, and why these: the",
        "docstring of `aot_calls.py`. Loops are separated by a semicolon: of a tail plan the walk",
        "along the rank and then the one along K, of dA/dB one each, of a producer plan the",
        "owners' and the others', in either order. Spills in lanes are scalar registers kept in",
        "vector registers.",
        "",
        triton_line(),
        sources_line(),
    ]
    for arch, facts in FACTS.items():
        lines += [
            "",
            f"## {arch}",
            "",
            f"Shared memory: at most {facts.shared_memory} bytes a block.",
            "",
            f"| {' | '.join(HEAD)} |",
            f"| {' | '.join(['---'] * len(HEAD))} |",
            *(row.line() for row in rows if row.arch == arch),
        ]
    return "\n".join(lines) + "\n"


def read_report() -> list[Row]:
    rows, arch = [], ""
    for line in REPORT.read_text().splitlines():
        if line.startswith("## "):
            arch = line[3:]
        elif line.startswith("| ") and not line.startswith(("| kernel,", "| ---")):
            rows.append(read_line(arch, line))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=measure_all.__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {REPORT.name}, else print it")
    parser.add_argument("--arch", action="append", choices=FACTS, help="only these (prints)")
    parser.add_argument("--afresh", action="store_true", help="compile what the report has, too")
    parser.add_argument("--list", action="store_true", help="count the calls, compile nothing")
    asked = parser.parse_args()
    chosen = [call for arch in asked.arch or FACTS for call in calls(arch)]
    if asked.list:
        counts = collections.Counter((call.arch, call.problem.op) for call in chosen)
        print(*(f"{arch} {op} {n}" for (arch, op), n in counts.items()), len(chosen), sep="\n")
        return
    text = report(measure_all(chosen, afresh=asked.afresh))
    if asked.write and not asked.arch:
        REPORT.write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
