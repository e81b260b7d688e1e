"""Mistakes planted in the sources, each of which the tests of its part must see.

``make mutants`` runs all, ``python tests/mutants.py TEXT ...`` those whose file or name holds one
of the texts, ``--list`` shows them. The mistakes are data, ``tests/mutants.toml``:

    [[mutant]]
    name = "dX without the scale"
    file = "lora_kernels/functional/linear.py"
    where = "exactly one place of the file"    # default: old
    old = "exactly one place of that"
    new = "what stands there instead"
    tests = ["tests/functional"]    # default: the folder of tests of the file's room

Each is planted in a copy of the checkout below build/, never here; there is a copy for each core,
with one mistake at a time. Those of csrc/ are compiled together, into one extension that takes the
number of the mistake from an environment variable: they replace expressions. A mistake that no test
sees, or that is not found in its file, fails the run.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
COPIES = ROOT / "build" / "mutants"
VARIABLE = "LORA_KERNELS_MUTANT"
# Declared by the headers of the copy, defined in one of its sources.
DECLARATION = "namespace lora_kernels { extern const int mutant; }\n"
DEFINITION = f"""
#include <cstdlib>
namespace lora_kernels {{
extern const int mutant = std::getenv("{VARIABLE}") ? std::atoi(std::getenv("{VARIABLE}")) : -1;
}}
"""


@dataclass
class Mutant:
    name: str
    file: str
    old: str
    new: str
    tests: list[str] = field(default_factory=list)
    where: str = ""

    @property
    def is_native(self) -> bool:
        return self.file.startswith("csrc/")

    @property
    def part(self) -> list[str]:
        """What of ``make test`` is run for it."""
        if self.tests:
            return self.tests
        return ["tests/backends"] if self.is_native else [f"tests/{Path(self.file).parts[1]}"]

    def planted(self, text: str, new: str) -> str:
        where = self.where or self.old
        if text.count(where) != 1 or where.count(self.old) != 1:
            raise SystemExit(
                f"{self.name}: {self.file} has {text.count(where)} places like\n{where}"
            )
        return text.replace(where, where.replace(self.old, new))


def read() -> list[Mutant]:
    content = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())
    return [Mutant(**entry) for entry in content["mutant"]]


def make_copy(copy: Path) -> None:
    """The checkout's files as they are now and no others, with the extensions of its last build;
    the copy's own objects stay."""
    for held in copy.glob("*"):
        if held.is_dir() and held.name != "build":
            shutil.rmtree(held)
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    built = [path.relative_to(ROOT) for path in (ROOT / "lora_kernels").glob("*.so")]
    for name in [*filter(None, names), *built, "lora_kernels/_build_info.json"]:
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copy2(ROOT / name, target)


def build(copy: Path, mutants: list[tuple[int, Mutant]]) -> None:
    """Compile the copy's csrc/ with all its mistakes, for the widest instruction set here."""
    files = {mutant.file for _, mutant in mutants}
    for file in files:
        text = (ROOT / file).read_text()
        for number, mutant in mutants:
            if mutant.file == file:
                choice = f"(::lora_kernels::mutant == {number} ? ({mutant.new}) : ({mutant.old}))"
                text = mutant.planted(text, choice)
        first = "#pragma once\n" if file.endswith(".h") else ""
        assert text.find(first) >= 0
        text = text.replace(first, first + DECLARATION, 1) if first else DECLARATION + text
        (copy / file).write_text(text)
    home = copy / "csrc" / "bindings.cpp"
    home.write_text(home.read_text() + DEFINITION)
    loaded = "from lora_kernels.spec import native; print(native._extension(native.load()))"
    isa = run([sys.executable, "-c", loaded], ROOT).stdout.strip().rpartition("_C_")[2]
    setup = copy / "setup.py"
    every = "[make_extension(isa) for isa in ISA_FLAGS]"
    assert every in setup.read_text()
    setup.write_text(setup.read_text().replace(every, f'[make_extension("{isa}")]'))
    done = run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], copy)
    if (
        done.returncode
        or '"failed": {}' not in (copy / "lora_kernels/_build_info.json").read_text()
    ):
        raise SystemExit(f"the mistakes of csrc/ do not compile:\n{done.stdout}{done.stderr}")


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "OMP_WAIT_POLICY": "PASSIVE",
    } | environment
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def is_seen(copy: Path, number: int, mutant: Mutant) -> tuple[bool, str]:
    """Whether a test turns red in the copy, and its name or pytest's last line."""
    environment = {VARIABLE: str(number)} if mutant.is_native else {}
    if any("kernels" in part for part in mutant.part):
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    file = copy / mutant.file
    if not mutant.is_native:
        file.write_text(mutant.planted((ROOT / mutant.file).read_text(), mutant.new))
    done = run([*command, *mutant.part], copy, **environment)
    if not mutant.is_native:
        shutil.copy2(ROOT / mutant.file, file)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    # 1: tests failed; 2: stopped at the first that did. Anything else is no answer.
    return done.returncode in (1, 2) and bool(failed), (failed or lines[-1:])[0][:100]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", nargs="*", help="parts of names or files; default: all")
    parser.add_argument("--list", action="store_true", help="show them and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mistakes at once")
    options = parser.parse_args()
    chosen = [
        (number, mutant)
        for number, mutant in enumerate(read())
        if not options.texts or any(t in f"{mutant.file} {mutant.name}" for t in options.texts)
    ]
    for _, mutant in chosen:
        mutant.planted((ROOT / mutant.file).read_text(), "")
        if options.list:
            print(f"{mutant.file}: {mutant.name}")
    if options.list:
        return 0
    native = [(number, mutant) for number, mutant in chosen if mutant.is_native]
    copies: queue.Queue[Path] = queue.Queue()
    for core in range(options.jobs):
        make_copy(COPIES / f"{core}")
        copies.put(COPIES / f"{core}")
    if native:
        build(COPIES / "0", native)
        for extension in (COPIES / "0" / "lora_kernels").glob("*.so"):
            for core in range(1, options.jobs):
                shutil.copy2(extension, COPIES / f"{core}" / "lora_kernels")

    def judge(number: int, mutant: Mutant) -> bool:
        copy, start = copies.get(), time.monotonic()
        seen, what = is_seen(copy, number, mutant)
        copies.put(copy)
        seconds = f"{time.monotonic() - start:.0f} s"
        print(f"{'red' if seen else 'NOT SEEN':8} {mutant.name} ({seconds}): {what}", flush=True)
        return seen

    with ThreadPoolExecutor(options.jobs) as pool:
        survivors = [*pool.map(judge, *zip(*chosen, strict=True))].count(False)
    print(f"{len(chosen) - survivors} of {len(chosen)} mistakes are seen")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
