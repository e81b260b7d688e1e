"""Kernels of other systems, loaded from copies that are no part of this repository.

``python -m bench.fetch_peers`` collects the copies: of each peer only the files that its kernels
are in, with its licence and the metadata that its version is read from. Loading one executes these
files and nothing else of the peer: no ``__init__``, and small stand-ins for what they import of
their engine (its logger, its environment variables, its distributed groups). What decides speed is
theirs: the kernels, the launchers, the plans they ship for a GPU and the code that builds a
batch's metadata.

Whatever a peer raises is the reason why it has no number; it fails nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

# Ignored by git; a run elsewhere must carry it along.
DEFAULT_DIRECTORY = Path(__file__).parent / "peer_copies"

# {module: its names}, for what a copy imports and does not hold.
StandIns = Mapping[str, Mapping[str, Any]]

_METADATA = ("METADATA", "PKG-INFO")
_COMMIT = "COMMIT"
_LONGEST_REASON = 200

_directory = DEFAULT_DIRECTORY
_loaded: dict[str, Exception | None] = {}


class MissingPeerError(Exception):
    """Why a peer cannot be measured here."""


def use(directory: Path) -> None:
    """Look for the copies there; what has been loaded stays."""
    global _directory
    _directory = directory


def directory() -> Path:
    return _directory


def folder(name: str) -> Path:
    return _directory / name


def version(name: str) -> str | None:
    """What the copy says about itself: a version, or the commit it was taken from."""
    for metadata in _METADATA:
        path = folder(name) / metadata
        if path.is_file():
            with path.open(encoding="utf-8") as lines:
                for line in lines:
                    if line.startswith("Version:"):
                        return line.removeprefix("Version:").strip()
    path = folder(name) / _COMMIT
    if path.is_file():
        return f"commit {path.read_text().strip()[:12]}"
    return None


def load(name: str, modules: tuple[str, ...], own: StandIns, foreign: StandIns) -> None:
    """Import ``modules`` of the peer ``name`` from its copy, once.

    ``own`` stand in for modules of the peer, ``foreign`` for packages of somebody else where they
    are not installed, and only while the peer is imported. Raises MissingPeerError.
    """
    if name not in _loaded:
        try:
            _import(name, modules, own, foreign)
        except Exception as error:
            _loaded[name] = error
        else:
            _loaded[name] = None
    failed = _loaded[name]
    if failed is not None:
        reason = str(failed) if isinstance(failed, MissingPeerError) else _told(failed)
        raise MissingPeerError(reason) from failed


def _import(name: str, modules: tuple[str, ...], own: StandIns, foreign: StandIns) -> None:
    root = folder(name) / name
    if not root.is_dir():
        raise MissingPeerError(f"no copy of {name} (python -m bench.fetch_peers collects it)")
    if name in sys.modules:
        raise MissingPeerError(f"another {name} is imported already: {sys.modules[name]}")
    lent = {top: names for top, names in foreign.items() if not _installed(top)}
    borrowed = _Finder(dict(lent))
    sys.meta_path.insert(0, _Finder(dict(own), name, root))
    sys.meta_path.insert(0, borrowed)
    try:
        for module in modules:
            importlib.import_module(module)
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
    """Modules of the package ``top`` from the folder ``root``, and stand-ins for some names."""

    def __init__(
        self, stand_ins: dict[str, Mapping[str, Any]], top: str = "", root: Path | None = None
    ) -> None:
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
        if place.is_dir():
            # A package of theirs, whose __init__ would import all of their engine.
            spec = ModuleSpec(fullname, _StandIn({}), is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        file = place.with_name(place.name + ".py")
        return importlib.util.spec_from_file_location(fullname, file) if file.is_file() else None


class _StandIn(importlib.abc.Loader):
    def __init__(self, names: Mapping[str, Any]) -> None:
        self.names = names

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self.names)


def unused(what: str) -> Any:
    """Stands in for a function that no step reaches."""

    def call(*args: object, **kwargs: object) -> Any:
        raise MissingPeerError(f"{what} is not in the copy")

    return call


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
