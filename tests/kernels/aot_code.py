"""What a binary holds: registers, spills, and its code with the loops of its tensor-core
instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


def disassembler() -> Path | None:
    """The folder of Triton's copies of nvdisasm and cuobjdump, or None."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return folder if all((folder / tool).exists() for tool in ("nvdisasm", "cuobjdump")) else None


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
