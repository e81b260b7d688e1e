"""The serving engines' own sources: where they are installed, else fetched once into build/.

Neither engine can be imported where the tests run: both need a CUDA build. Their sources can be
read, and the base classes loaded from them over stand-ins for what they import.
"""

import ast
import functools
import importlib.machinery
import importlib.util
import inspect
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import pytest

# The releases that the plug-ins are written against.
PINS = {"vllm": "0.33.0", "sglang": "0.5.23"}
PARTS = {
    "vllm": (
        "vllm/lora",
        "vllm/model_executor/layers/fused_moe",
        "vllm/platforms/cuda.py",
        "vllm/plugins",
        "vllm/v1/worker",
        "tests/lora",
    ),
    "sglang": ("sglang/srt/lora", "sglang/srt/plugins", "sglang/srt/arg_groups"),
}
CACHE = Path(__file__).parents[2] / "build" / "peers"


@functools.cache
def root_of(engine):
    """The folder that holds the engine's package, or why there is none."""
    # Not what stands in for it in sys.modules.
    spec = importlib.machinery.PathFinder.find_spec(engine)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).parent
    folder = CACHE / f"{engine}-{PINS[engine]}"
    if _is_whole(folder, engine):
        return folder
    with tempfile.TemporaryDirectory() as work:
        try:
            unpacked = _download(engine, Path(work))
        except subprocess.TimeoutExpired:
            unpacked = None
        if unpacked is None:
            return f"{engine} {PINS[engine]} is neither installed nor to be had from pip"
        CACHE.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=CACHE))
        for part in PARTS[engine]:
            source, target = unpacked / part, fresh / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                ignore = shutil.ignore_patterns("*.json", "*.so", "*.cu", "__pycache__")
                shutil.copytree(source, target, ignore=ignore)
            else:
                shutil.copy(source, target)
    if not _is_whole(folder, engine):  # from before a part was added
        shutil.rmtree(folder, ignore_errors=True)
    try:
        fresh.rename(folder)
    except OSError:  # another process of this run was first
        shutil.rmtree(fresh)
    return folder


def _is_whole(folder, engine):
    return all((folder / part).exists() for part in PARTS[engine])


def _download(engine, work):
    """The unpacked distribution below ``work``, or None."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    pip += ["--retries", "0", "--timeout", "30", "-d", str(work), f"{engine}=={PINS[engine]}"]
    if engine == "sglang":
        wheels = ["--only-binary", ":all:", "--python-version", "3.11"]
        wheels += ["--platform", "manylinux_2_34_x86_64"]
        subprocess.run([*pip, *wheels], capture_output=True, timeout=300)
        for wheel in work.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                wanted = [n for n in archive.namelist() if n.startswith("sglang/srt/")]
                archive.extractall(work, [n for n in wanted if n.endswith(".py")])
            return work
        return None
    # pip asks a source distribution for its metadata, which vLLM cannot say without a compiler for
    # Rust, and leaves what it had unpacked until then where --no-clean says.
    source = ["--no-clean", "--no-build-isolation", "--no-binary", ":all:"]
    environment = {**os.environ, "TMPDIR": str(work), "VLLM_TARGET_DEVICE": "empty"}
    subprocess.run([*pip, *source], capture_output=True, timeout=300, env=environment)
    for archive in work.glob("vllm-*.tar.gz"):
        shutil.unpack_archive(archive, work)
    found = [path.parents[2] for path in work.glob("**/vllm/lora/punica_wrapper")]
    return found[0] if found else None


def root(engine):
    """The same, or the test is skipped."""
    found = root_of(engine)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def tree(engine, path):
    return ast.parse((root(engine) / path).read_text())


def definition(engine, path, qualified_name):
    """The node of ``Class.function`` or ``function`` in a file of the engine."""
    node = tree(engine, path)
    for name in qualified_name.split("."):
        found = [
            child
            for child in ast.walk(node)
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and child.name == name
        ]
        assert found, f"{path} of {engine} has no {qualified_name}"
        node = found[0]
    return node


def parameters(engine, path, qualified_name):
    """The parameters of a function as text, without annotations."""
    arguments = definition(engine, path, qualified_name).args
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ast.unparse(arguments)


def our_parameters(function):
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))[1:-1]


def calls(engine, folder, owner):
    """(file:line, method, number of positional arguments, keywords) of every call of a method of
    ``owner``, such as ``punica_wrapper`` in ``self.punica_wrapper.add_shrink(...)``."""
    for path in sorted((root(engine) / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            function = getattr(node, "func", None)
            if (
                isinstance(node, ast.Call)
                and isinstance(function, ast.Attribute)
                and owner
                in (getattr(function.value, "attr", ""), getattr(function.value, "id", ""))
                and not any(isinstance(a, ast.Starred) for a in node.args)
            ):
                keywords = [k.arg for k in node.keywords if k.arg]
                yield f"{path.name}:{node.lineno}", function.attr, len(node.args), keywords


def assert_binds(function, count, keywords, where):
    try:
        arguments = itertools.repeat(None, count)
        inspect.signature(function).bind(None, *arguments, **dict.fromkeys(keywords))
    except TypeError as error:
        raise AssertionError(f"{where} calls {function.__name__} otherwise: {error}") from error


def load(monkeypatch, engine, module, stand_ins):
    """A module of the engine from its source, over modules that stand in for what it imports:
    {name: {attribute: value}}."""
    for name, attributes in stand_ins.items():
        pieces = name.split(".")
        for depth in range(1, len(pieces) + 1):
            parent = ".".join(pieces[:depth])
            if parent not in sys.modules:
                made = types.ModuleType(parent)
                made.__path__ = []
                monkeypatch.setitem(sys.modules, parent, made)
        for attribute, value in attributes.items():
            monkeypatch.setattr(sys.modules[name], attribute, value, raising=False)
    path = root(engine) / (module.replace(".", "/") + ".py")
    spec = importlib.util.spec_from_file_location(module, path)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, loaded)
    spec.loader.exec_module(loaded)
    return loaded
