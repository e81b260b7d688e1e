"""Kernels of other systems, loaded from copies that are no part of this repository.

``python -m bench.peers`` asks pip for the pinned versions and copies of each the few files that its
kernels are in, with its licence and metadata, into bench/peer_copies, which git ignores. What is on
no index comes from a clone or an archive: ``--from lorafusion=PATH``. Loading a copy executes these
files and nothing else of the peer: no ``__init__``, and stand-ins for what they import of their
engine. What decides speed is theirs: kernels, launchers, shipped plans, a batch's metadata.

Whatever a peer raises is the reason why it has no number; it fails nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import functools
import importlib
import importlib.abc
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .turns import Call, run_together

# Ignored by git; a run elsewhere must carry it along.
DEFAULT_DIRECTORY = Path(__file__).parent / "peer_copies"

# {module: its names}, for what a copy imports and does not hold.
StandIns = Mapping[str, Mapping[str, Any]]

_LONGEST_REASON = 200
# A process that tries a peer begins no row after so many seconds, and is stopped after as many more
# as its longest row may take to compile.
_SECONDS, _LONGEST_ROW_S = 60.0, 60.0

_directory = DEFAULT_DIRECTORY


class MissingPeerError(Exception):
    """Why a peer cannot be measured here."""


def use(directory: Path) -> None:
    """Look for the copies there; what has been loaded stays."""
    global _directory
    _directory = directory


def version(name: str) -> str | None:
    """What the copy says about itself: a version, or the commit it was taken from."""
    for path in (_directory / name / paper for paper in ("METADATA", "PKG-INFO", "COMMIT")):
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            if path.name == "COMMIT":
                return f"commit {lines[0][:12]}"
            return next((line[8:].strip() for line in lines if line.startswith("Version:")), None)
    return None


def load_once(load: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a loader; it also fails but once."""

    @functools.cache
    def outcome(*arguments: str) -> Any:
        try:
            return load(*arguments)
        except Exception as error:
            return error if isinstance(error, MissingPeerError) else MissingPeerError(_told(error))

    def loaded(*arguments: str) -> Any:
        found = outcome(*arguments)
        if isinstance(found, MissingPeerError):
            raise found
        return found

    return loaded


def load(name: str, modules: Sequence[str], own: StandIns, foreign: StandIns) -> list[ModuleType]:
    """Import ``modules`` of the peer ``name`` from its copy.

    ``own`` stand in for modules of the peer, ``foreign`` for packages of somebody else where they
    are not installed, and only while the peer is imported.
    """
    root = _directory / name / name
    if not root.is_dir():
        raise MissingPeerError(f"no copy of {name} (python -m bench.peers collects it)")
    if name in sys.modules and not isinstance(
        getattr(sys.modules[name], "__loader__", None), _StandIn
    ):
        raise MissingPeerError(f"another {name} is imported already: {sys.modules[name]}")
    lent = {top: names for top, names in foreign.items() if not _installed(top)}
    borrowed = _Finder(lent)
    if name not in sys.modules:
        sys.meta_path.insert(0, _Finder(own, name, root))
    sys.meta_path.insert(0, borrowed)
    try:
        return [importlib.import_module(module) for module in modules]
    finally:
        sys.meta_path.remove(borrowed)
        for module in lent:
            sys.modules.pop(module, None)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class _Finder(importlib.abc.MetaPathFinder):
    """Modules of the package ``top`` from the folder ``root``, and stand-ins for all others."""

    def __init__(self, stand_ins: StandIns, top: str = "", root: Path | None = None) -> None:
        self.stand_ins, self.top, self.root = stand_ins, top, root

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in self.stand_ins:
            return ModuleSpec(fullname, _StandIn(self.stand_ins[fullname]), is_package=True)
        top, *inner = fullname.split(".")
        if self.root is None or top != self.top:
            return None
        place = self.root.joinpath(*inner)
        if (file := place.with_name(place.name + ".py")).is_file():
            return importlib.util.spec_from_file_location(fullname, file)
        # A package of theirs, whose __init__ would import all of their engine, or what is not here.
        return ModuleSpec(fullname, _StandIn({}, not place.is_dir()), is_package=True)


class _StandIn(importlib.abc.Loader):
    """A module of ``names``; where it is ``absent``, any other name of it is a class that says so
    when it is used. In a package that is here other names are modules."""

    def __init__(self, names: Mapping[str, Any], absent: bool = False) -> None:
        self.names, self.absent = names, absent

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.names)
        if self.absent:
            vars(module)["__getattr__"] = self._absent

    @staticmethod
    def _absent(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(self: Any, *args: object, **kwargs: object) -> None:
            raise MissingPeerError(f"{name} is not in the copy")

        return type(name, (), {"__init__": refuse})


def _told(error: BaseException) -> str:
    first_line = (str(error).strip() or repr(error)).splitlines()[0]
    return f"{type(error).__name__}: {first_line}"[:_LONGEST_REASON]


@contextlib.contextmanager
def tolerated(variant: Any, missing: dict[str, str], *found: dict[str, Any]) -> Iterator[None]:
    """Whatever a peer does wrong inside is the reason why it has no number in this row, with
    nothing of it left in ``found``; what any other variant raises goes on."""
    try:
        yield
    except Exception as error:
        if not variant.peer:
            raise
        # So begin the checks of bench; a peer's own assertions do not.
        if isinstance(error, AssertionError) and str(error).startswith(variant.key):
            reason = f"WRONG, so not timed: {_told(error).removeprefix('AssertionError: ')}"
        else:
            reason = f"missing: {_told(error)}"
        missing[variant.key] = reason
        for each in found:
            each.pop(variant.key, None)


def unavailable(variant: Any, setting: Any, device: str) -> str | None:
    """Why a peer has no number in such a row, or None."""
    if device != "cuda":
        return "it is measured on a GPU"
    if setting.dtype not in ("bfloat16", "float16"):
        return f"it takes no {setting.dtype}"
    try:
        variant.load()
    except MissingPeerError as error:
        return str(error)
    return None


# An access out of bounds ends every later call of its process, ours included. So each peer first
# computes its rows in a process of its own, all of them at once, which compiles its kernels too.


def broken_here(
    rows: Mapping[str, Sequence[Any]], function: str = "bench.peers:probe"
) -> dict[str, str]:
    """{key: why} of the peers that break their process in one of their rows."""

    def reason(key: str) -> str | None:
        call = Call(function, (key, _directory, list(rows[key])))
        try:
            run_together([call], {}, _SECONDS + _LONGEST_ROW_S)
        except RuntimeError as error:
            return f"missing: it breaks its process ({error})"
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(rows, pool.map(reason, rows), strict=True))
    return {key: why for key, why in found.items() if why}


def probe(key: str, directory: Path, settings: Sequence[Any]) -> None:
    """Compute the rows of one peer; raises RuntimeError where the device no longer answers."""
    from .bench_lora_linear import step_of
    from .bench_segmented import MixedStep
    from .checks import draw
    from .measure import CapturedStep
    from .peers_serving import MIXED_PEERS
    from .peers_training import TRAINING_PEERS
    from .segmented_cases import draw as draw_mixed

    use(directory)
    variant: Any = (MIXED_PEERS | TRAINING_PEERS)[key]
    end = time.monotonic() + _SECONDS
    for setting in settings:
        if time.monotonic() > end or variant.missing(setting, "cuda") is not None:
            continue
        # What else it raises its row will say, if the device still answers.
        with contextlib.suppress(Exception):
            if key in MIXED_PEERS:
                step: Any = MixedStep(variant(setting, draw_mixed(setting, "cuda")))
            else:
                step = step_of(variant, draw(setting, "cuda"), setting)
            (CapturedStep(step) if getattr(variant, "captured", True) else step)()
        try:
            torch.ones(8, device="cuda").sum().item()
        except Exception as error:
            raise RuntimeError(f"{setting}: {_told(error)}") from None


# Collecting the copies.


class Source(NamedTuple):
    """``files``: patterns below the peer's root. ``built``: the index holds a small wheel of it."""

    requirement: str | None
    files: tuple[str, ...]
    built: bool = False


_OPS, _LORA = "sglang/kernels/ops/lora", "sglang/srt/lora"
SOURCES = {
    "vllm": Source(
        "vllm==0.33.0", ("vllm/lora/ops/triton_ops/*.py", "vllm/lora/punica_wrapper/*.py")
    ),
    "sglang": Source(
        "sglang==0.5.23",
        (
            *(f"{_OPS}/common/*.py", f"{_OPS}/dense/*.py", f"{_OPS}/dense/csgmv_configs/*/*.json"),
            *(f"{_LORA}/backend/*.py", f"{_LORA}/dense/*.py", f"{_LORA}/dense/configs/*.json"),
            *(f"{_LORA}/utils.py", f"{_LORA}/workspace.py"),
        ),
        built=True,
    ),
    "unsloth": Source(
        "unsloth==2026.10.9",
        ("unsloth/kernels/fast_lora.py", "unsloth/kernels/utils.py"),
        built=True,
    ),
    "lorafusion": Source(None, ("lorafusion/ops/lora_v1.py", "lorafusion/ops/triton_ops/*.py")),
}
# Beside the code of every copy.
_PAPERS = ("METADATA", "PKG-INFO", "LICENSE*", "COPYING*", "NOTICE*")


def collect(name: str, source: Source, origin: Path, directory: Path) -> list[str]:
    """Copy the files of ``source`` from an archive or a folder; returns their paths."""
    target = directory / name
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        if not origin.is_dir():
            kind = "zip" if zipfile.is_zipfile(origin) else "gztar"
            shutil.unpack_archive(origin, scratch, kind)
        tree = origin if origin.is_dir() else Path(scratch)
        root = next((p.parent for p in (tree / name, *tree.glob(f"*/{name}")) if p.is_dir()), tree)
        code = [path for pattern in source.files for path in root.glob(pattern)]
        if not code:
            raise SystemExit(f"{origin} holds none of the files of {name}")
        beside = (*root.glob("*"), *root.glob("*.dist-info/**/*"))
        papers = [
            path
            for path in beside
            if path.is_file() and any(fnmatch.fnmatch(path.name, paper) for paper in _PAPERS)
        ]
        copied = {path: str(path.relative_to(root)) for path in code}
        copied |= {path: path.name for path in papers}
        for path, place in copied.items():
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / place)
        if (root / ".git").exists():
            command = ["git", "-C", str(root), "rev-parse", "HEAD"]
            head = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            (target / "COMMIT").write_text(head)
    return sorted(copied.values())


def _downloaded(name: str, source: Source, scratch: Path) -> Path:
    """What pip fetches: a wheel, or the unpacked source.

    pip builds the metadata of a source distribution, which takes the peer's whole tool chain; told
    to keep its temporary folder, it leaves the source there when that fails.
    """
    kept, target = scratch / "kept", scratch / "target"
    kept.mkdir()
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target)]
    command += ["--only-binary" if source.built else "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--no-clean"] * (not source.built)
    environment = os.environ | {"TMPDIR": str(kept)}
    done = subprocess.run(
        [*command, str(source.requirement)], env=environment, capture_output=True, text=True
    )
    found = [*target.glob("*"), *kept.glob(f"pip-download-*/{name}_*")]
    if not found:
        raise SystemExit(f"pip has no {source.requirement}:\n{done.stdout[-1000:]}{done.stderr}")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--to", type=Path, default=DEFAULT_DIRECTORY, metavar="DIR")
    parser.add_argument("--from", dest="origins", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("names", nargs="*", choices=[[], *SOURCES], help="these alone; default all")
    chosen = parser.parse_args(arguments)
    origins = dict(origin.split("=", 1) for origin in chosen.origins)
    use(chosen.to)
    for name in chosen.names or SOURCES:
        source = SOURCES[name]
        if name not in origins and source.requirement is None:
            print(f"{name}: on no index; clone it and name it with --from {name}=PATH")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            origin = origins.get(name) or _downloaded(name, source, Path(scratch))
            files = collect(name, source, Path(origin), chosen.to)
        print(f"{name}: {version(name)}, {len(files)} files")


if __name__ == "__main__":
    main()
