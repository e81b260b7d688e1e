"""What is distributed: the source distribution, and what pyproject.toml promises."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

# Processes are started.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    # A copy is packed, for setuptools writes an egg-info beside what it packs.
    for source in ("lora_kernels", "csrc", "tests"):
        for path in sorted((ROOT / source).rglob("*")):
            if path.is_file() and path.suffix in (".py", ".cpp", ".h", ".json", ".typed"):
                copy = folder / "checkout" / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        (folder / "checkout" / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder],
        cwd=folder / "checkout",
        check=True,
        capture_output=True,
    )
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_the_source_distribution_has_no_tests_and_all_that_a_build_reads(sdist):
    assert not (sdist / "tests").exists()
    packaged = {path.relative_to(ROOT) for path in (ROOT / "lora_kernels").rglob("*.py")}
    assert packaged <= {path.relative_to(sdist) for path in sdist.rglob("*.py")}
    assert (sdist / "lora_kernels" / "py.typed").exists()
    assert not (sdist / "lora_kernels" / "_build_info.json").exists()
    sources = sorted((ROOT / "csrc").glob("*.cpp"))
    for source in [*sources, *sorted((ROOT / "csrc").glob("*.h"))]:
        assert (sdist / "csrc" / source.name).exists()
    # What a source includes is beside it.
    for path in (sdist / "csrc").iterdir():
        for name in re.findall(r'#include "(\w+\.h)"', path.read_text()):
            assert (sdist / "csrc" / name).exists(), f"{path.name} includes {name}"


def test_the_source_distribution_builds_its_python_part(sdist):
    """The compilation itself is every install's."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "built"],
        cwd=sdist,
        check=True,
        capture_output=True,
    )
    built = {path.relative_to(sdist / "built") for path in (sdist / "built").rglob("*.py")}
    assert built == {path.relative_to(ROOT) for path in (ROOT / "lora_kernels").rglob("*.py")}


def test_the_oldest_stack_is_the_one_that_is_promised():
    """The lower bounds of pyproject.toml are the versions that `make compat` tries."""
    declared = (ROOT / "pyproject.toml").read_text()
    oldest = (ROOT / "requirements" / "oldest.txt").read_text()
    (torch,) = re.findall(r"compat-oldest: COMPAT_TORCH := (\S+)", (ROOT / "Makefile").read_text())
    pins = dict(re.findall(r"^([\w-]+)==(\S+?);?(?: .*)?$", oldest, re.MULTILINE), torch=torch)
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)[";]', declared))
    for name in ("torch", "triton", "transformers", "peft", "safetensors"):
        wanted = (bounds[name] + ".0.0").split(".")[:3]
        assert pins[name].split(".") == wanted, name
