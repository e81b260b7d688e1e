"""Kernels of other systems, from copies that are no part of this repository; those that train.

``python -m bench.peers`` asks pip for the pinned versions and copies of each the few files that its
kernels are in, with its licence and metadata, into bench/peer_copies, which git ignores. What is on
no index comes from a clone: ``lorafusion=PATH``. Loading a copy executes these files and nothing
else of the peer: no ``__init__``, and stand-ins for what they import of their engine. What decides
speed is theirs: kernels, launchers, shipped plans, a batch's metadata.

Whatever a peer raises is the reason why it has no number; it fails nothing. One that breaks the
device is left out by ``--baselines``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import itertools
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

from .baselines import Variant, keyed

# Ignored by git; a run elsewhere must carry it along.
DEFAULT_DIRECTORY = Path(__file__).parent / "peer_copies"

# {module: its names}, for what a copy imports and does not hold.
StandIns = Mapping[str, Mapping[str, Any]]

_LONGEST_REASON = 200

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


@functools.cache
def engine(load: Callable[[], Any]) -> Any:
    """What ``load`` returns, or the MissingPeerError that says why it does not; asked once."""
    try:
        return load()
    except Exception as error:
        return error if isinstance(error, MissingPeerError) else MissingPeerError(_told(error))


def load(name: str, modules: Sequence[str], own: StandIns, foreign: StandIns) -> list[ModuleType]:
    """Import ``modules`` of the peer ``name`` from its copy.

    ``own`` stand in for modules of the peer, ``foreign`` for other packages that are not installed,
    and only while the peer is imported.
    """
    root = _directory / name / name
    if not root.is_dir():
        raise MissingPeerError(f"no copy of {name} (python -m bench.peers collects it)")
    if name not in sys.modules:
        for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
            # Its __init__ would import all of the engine.
            package = ".".join(folder.relative_to(root.parent).parts)
            _stand_in(package, {"__path__": [str(folder)]})
        for module, names in own.items():
            _stand_in(module, names)
        sys.meta_path.append(_Absent(name))
    elif getattr(sys.modules[name], "__path__", None) != [str(root)]:
        raise MissingPeerError(f"another {name} is imported already: {sys.modules[name]}")
    lent = [module for module in foreign if not _installed(module)]
    for module in lent:
        _stand_in(module, foreign[module])
    try:
        return [importlib.import_module(module) for module in modules]
    finally:
        for module in lent:
            del sys.modules[module]


def _stand_in(name: str, names: Mapping[str, Any]) -> None:
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update({"__path__": []} | dict(names))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The modules of a peer that its copy lacks: every name is a class that says so when used."""

    def __init__(self, top: str) -> None:
        self.top = top

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        inside = fullname.startswith(f"{self.top}.")
        return ModuleSpec(fullname, self, is_package=True) if inside else None

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = self._refusing

    @staticmethod
    def _refusing(name: str) -> Any:
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


class Peer(Variant):
    """A layer and its adapters as another system computes them."""

    peer = True
    devices = ("cuda",)

    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        self.engine = engine(self.load)

    @classmethod
    def missing(cls, setting: Any, device: str) -> str | None:
        if device != "cuda":
            return "it is measured on a GPU"
        if setting.dtype not in ("bfloat16", "float16"):
            return f"it takes no {setting.dtype}"
        found = engine(cls.load)
        return str(found) if isinstance(found, MissingPeerError) else None

    @classmethod
    def load(cls) -> Any:
        """The peer's function or class."""
        raise NotImplementedError


# Collecting the copies.

_OPS, _LORA = "sglang/kernels/ops/lora/dense", "sglang/srt/lora"
# What pip is asked for, None where no index has it, and patterns of the files below the root.
SOURCES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "vllm": ("vllm==0.33.0", ("vllm/lora/ops/triton_ops/*.py", "vllm/lora/punica_wrapper/*.py")),
    "sglang": (
        "sglang==0.5.23",
        (
            *(f"{_OPS}/*.py", f"{_OPS}/csgmv_configs/*/*.json"),
            *(f"{_LORA}/backend/*.py", f"{_LORA}/utils.py"),
        ),
    ),
    "unsloth": ("unsloth==2026.10.9", ("unsloth/kernels/fast_lora.py", "unsloth/kernels/utils.py")),
    "lorafusion": (None, ("lorafusion/ops/lora_v1.py", "lorafusion/ops/triton_ops/*.py")),
}
# Beside the code of every copy.
_PAPERS = ("METADATA", "PKG-INFO", "LICENSE*", "COPYING*", "NOTICE*")
# Its wheel is half a gigabyte; the others' are small, or there is no other file.
_FROM_SOURCE = ("vllm",)


def collect(name: str, files: Sequence[str], root: Path, directory: Path) -> list[str]:
    """Copy the ``files`` of a peer, and what says whose they are; returns their paths."""
    target = directory / name
    shutil.rmtree(target, ignore_errors=True)
    copied = {path: path.relative_to(root) for pattern in files for path in root.glob(pattern)}
    if not copied:
        raise SystemExit(f"{root} holds none of the files of {name}")
    for folder, paper in itertools.product(("", "*.dist-info/", "*.dist-info/**/"), _PAPERS):
        copied |= {path: Path(path.name) for path in root.glob(folder + paper) if path.is_file()}
    for path, place in copied.items():
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / place)
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        (target / "COMMIT").write_bytes(subprocess.check_output(command))
    return sorted(map(str, copied.values()))


def _downloaded(name: str, requirement: str, scratch: Path) -> Path:
    """The unpacked wheel or source that pip fetches.

    pip builds the metadata of a source distribution, which takes the peer's whole tool chain; told
    to keep its temporary folder, it leaves the source there when that fails.
    """
    kinds = ["--no-binary", ":all:", "--no-build-isolation", "--no-clean"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", f"{scratch}/got"]
    command += kinds if name in _FROM_SOURCE else ["--only-binary", ":all:"]
    environment = os.environ | {"TMPDIR": str(scratch)}
    done = subprocess.run([*command, requirement], env=environment, capture_output=True, text=True)
    for archive in scratch.glob("got/*"):
        shutil.unpack_archive(archive, scratch / "wheel", "zip")
    found = [*scratch.glob("wheel"), *scratch.glob(f"pip-download-*/{name}_*")]
    if not found:
        raise SystemExit(f"pip has no {requirement}:\n{done.stdout[-1000:]}{done.stderr}")
    return found[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--to", type=Path, default=DEFAULT_DIRECTORY, metavar="DIR")
    text = f"{', '.join(SOURCES)}, or NAME=PATH of a clone; default all"
    parser.add_argument("peers", nargs="*", metavar="NAME", help=text)
    chosen = parser.parse_args(arguments)
    use(chosen.to)
    for name, _, path in (peer.partition("=") for peer in chosen.peers or SOURCES):
        if name not in SOURCES:
            parser.error(f"{name!r} is no peer; there are {', '.join(SOURCES)}")
        requirement, files = SOURCES[name]
        if not path and requirement is None:
            print(f"{name}: on no index; clone it and name it with {name}=PATH")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(path) if path else _downloaded(name, str(requirement), Path(scratch))
            count = len(collect(name, files, root, chosen.to))
        print(f"{name}: {version(name)}, {count} files")


# Those that train.


class TrainingPeer(Peer):
    def __init__(self, setting: Any, inputs: Any) -> None:
        super().__init__(setting, inputs)
        self.own_adapter()


class LoraFusion(TrainingPeer):
    key, label = "lorafusion", "LoRAFusion"
    what = (
        "LoRAFusion's fused_linear_lora without descriptors, by its plans for an H100 on any "
        "Hopper GPU; one dropout seed for all steps"
    )
    package = "lorafusion"

    def forward(self, x: Tensor) -> Tensor:
        s, weights = self.setting, (self.weight, self.a, self.b)
        # It takes a batch of sequences alone; its seeds are the host's numbers, so a captured step
        # has one, and every step may have the same.
        return self.engine(x[None], *weights, alpha=s.scale, seed=1234, dropout_p=s.p)[0]

    @classmethod
    def load(cls) -> Any:
        operators = "lorafusion.ops.triton_ops"
        own: StandIns = {
            "lorafusion.utils.common": {"get_device_short_name": cls._device},
            # Written for a descriptor interface that Triton has dropped; where that is so, the
            # function that the other file defines is chosen by its own code.
            f"{operators}.tma_utils": {"HAS_TMA_DESC": False},
            f"{operators}.fused_lora_xw_sb_tma": {},
            f"{operators}.fused_lora_dyw_dsa_tma": {},
        }
        foreign = {"loguru": {"logger": logging.getLogger("lorafusion")}}
        return load("lorafusion", ["lorafusion.ops.lora_v1"], own, foreign)[0].fused_linear_lora

    @staticmethod
    def _device() -> str:
        # The plans it has for a Hopper GPU, under an H100's name; any other name is an error.
        if torch.cuda.get_device_capability()[0] == 9:
            return "h100-80gb-hbm3"
        return torch.cuda.get_device_name().replace("NVIDIA ", "").strip().replace(" ", "-").lower()


class Unsloth(TrainingPeer):
    key, label = "unsloth", "Unsloth"
    what = "Unsloth's autograd function of one linear, LoRA_W (its apply_lora_o)"
    package = "unsloth"

    def forward(self, x: Tensor) -> Tensor:
        arguments = (x[None], self.weight, None, self.a, self.b, self.setting.scale)
        # What apply_lora_o gives it where the layer has no dropout, or has.
        dropout = (self.setting.p, None) if self.setting.p else ()
        return self.engine.apply(*arguments, *dropout)[0]

    @classmethod
    def load(cls) -> Any:
        device: dict[str, Any] = {"DEVICE_TYPE": "cuda", "DEVICE_TYPE_TORCH": "cuda"}
        device |= {"is_hip": lambda: False, "get_device_type": lambda: "cuda"}
        device |= {"DEVICE_COUNT": torch.cuda.device_count(), "ALLOW_PREQUANTIZED_MODELS": False}
        own = {
            "unsloth.bnb_availability": {"native_kernels_ready": lambda *ignored: False},
            "unsloth.device_type": device,
        }
        foreign: StandIns = {
            "unsloth_zoo": {},
            "unsloth_zoo.utils": {"Version": lambda text: Version(text)},
        }
        return load("unsloth", ["unsloth.kernels.fast_lora"], own, foreign)[0].LoRA_W


TRAINING_PEERS = keyed(LoraFusion, Unsloth)


if __name__ == "__main__":
    main()
