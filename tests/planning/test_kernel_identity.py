"""What says that a tuned table was measured with the kernels that run now."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels as lk
from lora_kernels.planning import tables
from lora_kernels.spec import native

# Processes are started.
pytestmark = pytest.mark.slow

CHECKOUT = Path(lk.__file__).parents[1]


def python(script, directory):
    """What a script prints whose modules come from ``directory``."""
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_table_of_a_checkout_holds_for_an_installed_copy(kind, tmp_path):
    """What identifies the kernels lies in the package: nothing beside it is read."""
    package = Path(lk.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("*.so"))
    tables_of = "from lora_kernels.planning import tables"
    script = f"{tables_of}; print(tables.__file__, tables.kernel_sources_hash({kind!r}))"
    file, found = python(script, tmp_path).split()
    assert Path(file).is_relative_to(tmp_path)
    assert found == tables.kernel_sources_hash(kind)


@pytest.mark.parametrize("changed", ["csrc", "torch", "nothing built", "not installed"])
def test_tables_of_other_cpu_kernels_are_ignored(changed, tmp_path, monkeypatch):
    """Those that were built identify themselves, not the sources that lie about."""
    built = {"built": ["avx2"], "torch": torch.__version__, "sources": "0123456789abcdef"}
    changes = {
        "csrc": {"sources": "fedcba9876543210"},
        "torch": {"torch": "1.0"},
        "nothing built": {"built": []},
    }

    def hash_of(info):
        (tmp_path / "_build_info.json").write_text(json.dumps(info))
        tables.kernel_sources_hash.cache_clear()
        return tables.kernel_sources_hash("cpu")

    monkeypatch.setattr(native, "DIRECTORY", tmp_path)
    gpus = tables.kernel_sources_hash("cuda")
    try:
        usual = hash_of(built)
        assert hash_of(built | {"compiler": "another"}) == usual
        if changed == "not installed":
            (tmp_path / "_build_info.json").unlink()
            tables.kernel_sources_hash.cache_clear()
            assert tables.kernel_sources_hash("cpu") != usual
        else:
            assert hash_of(built | changes[changed]) != usual
        assert tables.kernel_sources_hash("cuda") == gpus != usual, "a GPU's are others"
    finally:
        tables.kernel_sources_hash.cache_clear()


@pytest.mark.skipif(not (CHECKOUT / "csrc").is_dir(), reason="the package is installed: no csrc")
def test_the_build_hashes_sources_and_flags(tmp_path):
    shutil.copytree(CHECKOUT / "csrc", tmp_path / "csrc")
    script = "import setuptools; setuptools.setup = dict; import setup; print(setup.sources_hash())"

    def hash_with(change):
        (tmp_path / "setup.py").write_text(change((CHECKOUT / "setup.py").read_text()))
        return python(script, tmp_path)

    usual = hash_with(lambda setup: setup)
    assert len(usual) == 16
    assert hash_with(lambda setup: setup.replace('"-O3"', '"-O2"')) != usual
    (tmp_path / "csrc" / "tests" / "main.cpp").write_text("// not part of an extension")
    assert hash_with(lambda setup: setup) == usual
    with (tmp_path / "csrc" / "vec.h").open("a") as header:
        header.write("// changed")
    assert hash_with(lambda setup: setup) != usual


@pytest.mark.skipif(native.load() is None, reason=f"no CPU extension: {native.why_not()}")
def test_the_build_records_the_hash():
    assert len(native.built_from()) == 16
