"""The layering of the package: imports point down only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_kernels

PACKAGE = Path(lora_kernels.__file__).parent

LAYERS = [
    {
        "reference",
        "problem",
        "config",
        "device",
        "segments",
        "vendor",
        "_native",
        "kernels",
    },
    {"cuda", "cpu", "plan", "tune"},
    {"ops"},
    {"functional", "segmented", "segmented_autograd"},
    {"nn", "merging", "packed", "replacing", "multi_lora", "batches"},
    {
        "models",
        "reports",
        "selection",
        "unloading",
        "warming",
        "serving",
        "running",
        "slots",
        "slotted_model",
        "transfers",
        "adapters",
        "integrations",
    },
]
# Above everything, for users and tests.
TOP = {
    "__init__",
    "__main__",
    "compare",
    "compare_memory",
    "compare_model",
    "testing",
    "testing_segmented",
}

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names} | dict.fromkeys(
    TOP, len(LAYERS)
)


def part(path):
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


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = part(path)
    assert own in LEVEL, f"{path.name} has no layer: say in DESIGN's order where it stands"
    for other in imported_parts(path):
        if other in LEVEL and other != own and own not in TOP:
            assert LEVEL[other] <= LEVEL[own], f"{own} imports {other}, which stands above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_names_of_other_peoples_classes_stay_in_integrations(path):
    # compare loads what users have.
    if part(path) in ("integrations", "__main__", "compare", "compare_model", "testing"):
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


def test_importing_touches_no_device_and_no_heavy_library():
    code = (
        "import sys, torch, lora_kernels; "
        "assert not torch.cuda.is_initialized(); "
        "heavy = {'transformers', 'peft', 'triton', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
