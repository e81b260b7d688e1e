"""The layering of the package: imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_kernels

PACKAGE = Path(lora_kernels.__file__).parent

# The rooms and what each may import: those of the lines below its own.
ROOMS = [
    {"integrations"},
    {"serving"},
    {"models"},
    {"layers"},
    {"functional"},
    {"backends"},
    {"kernels"},
    {"testing"},
    {"planning"},
    {"spec"},
]
FLOOR = {room: floor for floor, rooms in enumerate(reversed(ROOMS)) for room in rooms}
# Above everything, for users.
TOP = {"__init__", "__main__"}
# Rooms that stand above another and have nothing to do with it.
STRANGERS = {("integrations", "serving"), ("kernels", "testing"), ("backends", "testing")} | {
    (room, "testing") for room in ("integrations", "serving", "models", "layers", "functional")
}
MOST_LINES = 500


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path):
    """The parts of this package that a file imports, by any spelling."""
    package = ["lora_kernels", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            pieces = name.split(".")
            if pieces[0] == "lora_kernels" and len(pieces) > 1:
                yield pieces[1]


def siblings(path):
    """The files of its own room that a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            yield from [node.module] if node.module else [alias.name for alias in node.names]


FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_top_holds_rooms_alone():
    files = {path.name for path in PACKAGE.glob("*") if path.is_file() and path.suffix != ".so"}
    assert files - {"_build_info.json"} == {"__init__.py", "__main__.py", "py.typed"}
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == FLOOR.keys()


@pytest.mark.parametrize("name", FLOOR)
def test_a_room_says_what_belongs_there(name):
    text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text()))
    assert 2 <= len([line for line in text.splitlines() if line]) <= 5
    assert "mports" in text, "what it may import"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = room(path)
    for other in set(imported_parts(path)) & FLOOR.keys() - {own}:
        if own not in TOP:
            assert FLOOR[other] < FLOOR[own], f"{own} imports {other}, which stands above it"
            assert (own, other) not in STRANGERS, f"{own} has nothing to do with {other}"


@pytest.mark.parametrize("name", FLOOR)
def test_no_circle_inside_a_room(name):
    files = {path.stem: path for path in (PACKAGE / name).glob("*.py") if path.stem != "__init__"}
    waiting = {stem: set(siblings(path)) & files.keys() for stem, path in files.items()}
    while waiting:
        free = {stem for stem, others in waiting.items() if not others & waiting.keys()}
        assert free, f"a circle among {', '.join(waiting)}"
        waiting = {stem: others for stem, others in waiting.items() if stem not in free}


@pytest.mark.parametrize("folder", ["lora_kernels", "csrc", "bench", "tests", "examples"])
def test_no_file_is_too_long(folder):
    files = [
        path
        for pattern in ("*.py", "*.cpp", "*.h")
        for path in (PACKAGE.parent / folder).rglob(pattern)
    ]
    lengths = {path: len(path.read_text().splitlines()) for path in files}
    assert {p.name: n for p, n in lengths.items() if n > MOST_LINES} == {}


def test_memory_is_asked_for_in_one_place():
    """A function that only prefetches has no effect to GCC, which drops its calls."""
    sources = (PACKAGE.parent / "csrc").glob("*.*")
    assert [p.name for p in sources if "__builtin_prefetch" in p.read_text()] == ["memory.h"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_names_of_other_peoples_classes_have_their_place(path):
    if room(path) == "integrations" or path.name == "foreign.py":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        for module in modules:
            assert module.split(".")[0] not in {
                "transformers",
                "peft",
                "vllm",
                "sglang",
                "accelerate",
            }


@pytest.mark.slow
def test_importing_touches_no_device_and_no_heavy_library():
    code = (
        "import sys, torch, lora_kernels; "
        "assert not torch.cuda.is_initialized(); "
        "heavy = {'transformers', 'peft', 'triton', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
