"""Collect the copies that ``bench.peers`` loads: of each peer the files its kernels are in.

``python -m bench.fetch_peers`` asks pip for the pinned versions and copies a few files of each,
some hundred kilobytes in all, into bench/peer_copies (``--to`` names another folder), which git
ignores. What is no package on an index comes from a git clone: ``--from lorafusion=PATH``. With
``--from NAME=PATH`` any peer is taken from a clone, an unpacked archive, a wheel or a .tar.gz.

No file of a copy belongs to this repository, and none may be committed to it.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from . import peers

_KERNELS = "sglang/kernels/ops/lora"
_LORA = "sglang/srt/lora"


@dataclass(frozen=True)
class Source:
    """``files`` are patterns over the paths in the peer's distribution.

    ``built``: the index holds a small wheel of it."""

    name: str
    requirement: str | None
    files: tuple[str, ...]
    built: bool = False


SOURCES = (
    Source(
        "vllm",
        "vllm==0.33.0",
        (
            "vllm/lora/ops/triton_ops/kernel_utils.py",
            "vllm/lora/ops/triton_ops/lora_*_op.py",
            "vllm/lora/ops/triton_ops/lora_kernel_metadata.py",
            "vllm/lora/ops/triton_ops/utils.py",
            "vllm/lora/punica_wrapper/punica_base.py",
            "vllm/lora/punica_wrapper/punica_gpu.py",
            "vllm/lora/punica_wrapper/utils.py",
        ),
    ),
    Source(
        "sglang",
        "sglang==0.5.23",
        (
            f"{_KERNELS}/common/*.py",
            f"{_KERNELS}/dense/*.py",
            f"{_KERNELS}/dense/csgmv_configs/*/*.json",
            f"{_LORA}/backend/base_backend.py",
            f"{_LORA}/backend/chunked_backend.py",
            f"{_LORA}/backend/lmhead_mixing.py",
            f"{_LORA}/backend/triton_backend.py",
            f"{_LORA}/backend/triton_v2_backend.py",
            f"{_LORA}/dense/*.py",
            f"{_LORA}/dense/configs/*.json",
            f"{_LORA}/utils.py",
            f"{_LORA}/workspace.py",
        ),
        built=True,
    ),
    Source(
        "unsloth",
        "unsloth==2026.10.9",
        ("unsloth/kernels/fast_lora.py", "unsloth/kernels/utils.py"),
        built=True,
    ),
    Source(
        "lorafusion",
        None,
        (
            "lorafusion/ops/lora_v1.py",
            "lorafusion/ops/triton_ops/config.py",
            "lorafusion/ops/triton_ops/dropout.py",
            "lorafusion/ops/triton_ops/fused_dropout_matmul.py",
            "lorafusion/ops/triton_ops/fused_lora_*.py",
            "lorafusion/ops/triton_ops/utils.py",
        ),
    ),
)
# Beside the code of every copy, by their names alone.
_PAPERS = ("METADATA", "PKG-INFO", "LICENSE*", "COPYING*", "NOTICE*")
_LARGEST_COPY = 4 * 2**20


def collect(source: Source, origin: Path, directory: Path) -> list[str]:
    """Copy the files of ``source`` from an archive or a folder; returns their paths."""
    target = directory / source.name
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        tree = _unpacked(origin, Path(scratch), source)
        chosen = {
            path: _place(path, source) for path in _paths(tree) if _place(path, source) is not None
        }
        code = [path for path in chosen if path.endswith(".py")]
        if not code:
            raise SystemExit(f"{origin} holds none of the files of {source.name}")
        size = sum((tree / path).stat().st_size for path in chosen)
        if size > _LARGEST_COPY:
            raise SystemExit(f"the copy of {source.name} would take {size} bytes")
        for path, place in chosen.items():
            copied = target / str(place)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / path, copied)
        commit = _commit(tree)
        if commit is not None:
            (target / "COMMIT").write_text(commit + "\n")
    return sorted(map(str, chosen.values()))


def _place(path: str, source: Source) -> str | None:
    """Where in the copy a file of the distribution goes, or None if it stays behind."""
    pure = PurePosixPath(path)
    if any(pure.match(pattern) for pattern in source.files):
        return path
    # The distribution's own papers, not those of what it vendors.
    folders = pure.parts[:-1]
    own = not folders or folders[0].endswith(".dist-info")
    return pure.name if own and any(fnmatch.fnmatch(pure.name, p) for p in _PAPERS) else None


def _paths(tree: Path) -> list[str]:
    found: list[str] = []
    for folder, inner, files in os.walk(tree):
        inner[:] = [name for name in inner if name != ".git"]
        base = Path(folder).relative_to(tree)
        found += [(base / name).as_posix() for name in files]
    return sorted(found)


def _unpacked(origin: Path, scratch: Path, source: Source) -> Path:
    if origin.is_dir():
        git = subprocess.run(
            ["git", "-C", str(origin), "rev-parse", "--is-bare-repository"],
            capture_output=True,
            text=True,
        )
        if git.stdout.strip() != "true":
            return origin
        archive = scratch / "tree.tar"
        subprocess.run(
            ["git", "-C", str(origin), "archive", "-o", str(archive), "HEAD"], check=True
        )
        tree = scratch / "tree"
        with tarfile.open(archive) as tar:
            tar.extractall(tree, filter="data")
        (tree / ".commit").write_text(_head(origin))
        return tree
    tree = scratch / "tree"
    if zipfile.is_zipfile(origin):
        with zipfile.ZipFile(origin) as wheel:
            names = [name for name in wheel.namelist() if _place(name, source) is not None]
            wheel.extractall(tree, names)
        return tree
    with tarfile.open(origin) as tar:
        tar.extractall(tree, filter="data")
    (only,) = tree.iterdir()
    return only


def _head(repository: Path) -> str:
    command = ["git", "-C", str(repository), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _commit(tree: Path) -> str | None:
    if (tree / ".commit").is_file():
        return (tree / ".commit").read_text()
    return _head(tree) if (tree / ".git").exists() else None


def _downloaded(source: Source, scratch: Path) -> Path:
    """What pip fetches: a wheel, or the unpacked source.

    pip builds the metadata of a source distribution, which takes the peer's whole tool chain; told
    to keep its temporary folder, it leaves the source there when that fails.
    """
    kept, target = scratch / "kept", scratch / "target"
    kept.mkdir()
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target)]
    command += ["--only-binary" if source.built else "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--no-clean"] * (not source.built)
    assert source.requirement is not None
    done = subprocess.run(
        [*command, source.requirement],
        env=os.environ | {"TMPDIR": str(kept)},
        capture_output=True,
        text=True,
    )
    found = [*target.glob("*"), *kept.glob(f"pip-download-*/{source.name}_*")]
    if not found:
        raise SystemExit(f"pip has no {source.requirement}:\n{done.stdout[-1000:]}{done.stderr}")
    return found[0]


def _named_path(text: str) -> tuple[str, Path]:
    name, _, path = text.partition("=")
    if name not in {source.name for source in SOURCES} or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=PATH of a peer and what it is in")
    return name, Path(path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fetch_peers", description=__doc__.split("\n")[0]
    )
    default = peers.DEFAULT_DIRECTORY
    parser.add_argument("--to", type=Path, default=default, help=f"default {default}")
    parser.add_argument(
        "--from", dest="origins", type=_named_path, action="append", default=[], metavar="NAME=PATH"
    )
    parser.add_argument("names", nargs="*", help="of these peers alone; default all")
    chosen = parser.parse_args(arguments)
    origins = dict(chosen.origins)
    peers.use(chosen.to)
    for source in SOURCES:
        if chosen.names and source.name not in chosen.names:
            continue
        origin = origins.get(source.name)
        if origin is None and source.requirement is None:
            print(f"{source.name}: on no index; clone it and name it with --from")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            files = collect(source, origin or _downloaded(source, Path(scratch)), chosen.to)
        print(f"{source.name}: {peers.version(source.name)}, {len(files)} files")


if __name__ == "__main__":
    main()
