"""The demo's text: the standard library's sources, one of its packages, or what the user names."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.turns import UserError

# The language reference that help() prints: prose, where the rest is code. From 60 steps on its
# sources a base gained 0.17 nats a byte, on asyncio, email, unittest, xml or tkinter 0.01 to 0.05.
DEFAULT_PACKAGE = "pydoc_data"

# Tests; what is not the standard library; tables of numbers; what describes one machine's build.
_NOT_TEXT = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"]
    + ["encodings", "ensurepip"]
)

HELD_OUT_SHARE = 0.1

# A demo reads a sample of somebody's text, not a corpus into memory.
MAX_BYTES = 32 << 20
# Far more than a few dozen steps on a part of it read.
_LONGEST_PART = 200_000

ADAPTERS = 10


@dataclass(frozen=True)
class Corpus:
    """Text to train on, text that is not in it, and the files that both came from."""

    description: str
    train: str
    held_out: str
    files: frozenset[Path]

    def __str__(self) -> str:
        return (
            f"{self.description}, {len(self.files)} files: {len(self.train):,} characters, "
            f"and {len(self.held_out):,} held out"
        )


def standard_library() -> Path:
    """Where this interpreter's own sources are."""
    return Path(sysconfig.get_path("stdlib"))


def library_sources(
    root: Path | None = None, without: Collection[Path] = (), package: str | None = None
) -> list[Path]:
    """The standard library's sources, minus tests and the files of ``without``; or one package's.

    Raises:
        UserError: there are none (a Python whose library is in an archive, say).
    """
    root = standard_library() if root is None else root
    folder = root if package is None else root / package
    excluded = {path.resolve() for path in without}
    files = [
        path
        for path in sorted(folder.rglob("*.py"))
        if _NOT_TEXT.isdisjoint(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
        and path.resolve() not in excluded
    ]
    if not files:
        raise UserError(f"this Python has no sources under {folder}: name a text with --data")
    return files


def pretraining_text(without: Iterable[Path]) -> str:
    """The standard library's sources in one string, minus the default package and ``without``."""
    package = library_sources(package=DEFAULT_PACKAGE)
    texts = (_decoded(path) for path in library_sources(without=[*package, *without]))
    return "\n".join(text for text in texts if text)


def largest_packages(count: int = ADAPTERS) -> dict[str, tuple[str, str]]:
    """{name: (text to train on, text held out)} of the standard library's packages with the most
    source text; fewer where this Python has fewer of them, none where it has no sources."""
    root = standard_library()
    found = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        name = folder.name
        if not (folder / "__init__.py").is_file() or name in _NOT_TEXT | {DEFAULT_PACKAGE}:
            continue
        texts = [(path, _decoded(path) or "") for path in library_sources(package=name)]
        found.append((-sum(len(text) for _, text in texts), name, texts))
    corpora = {name: _corpus(name, texts) for _, name, texts in sorted(found)[:count]}
    return {name: (corpus.train, corpus.held_out) for name, corpus in corpora.items()}


def parts(corpus: Corpus, context: int, count: int = ADAPTERS) -> dict[str, tuple[str, str]]:
    """The same of the user's text, cut into parts of equal length: as many as are long enough."""
    text = corpus.train + corpus.held_out
    # A tenth of a part is held out: a block of tokens, of some four characters each.
    count = max(min(count, len(text) // (40 * context)), 1)
    size = len(text) // count
    chunks = (text[i * size : (i + 1) * size][:_LONGEST_PART] for i in range(count))
    return {f"part-{i + 1}": split(chunk) for i, chunk in enumerate(chunks)}


def finetuning_corpus(data: str | None) -> Corpus:
    """The text to fine-tune on: ``data``, a file or a directory of them, or the default package.

    The end of every file is held out, cut at a line's end. In a directory hidden files are not
    read, nor is what is no UTF-8 text.

    Raises:
        UserError: ``data`` does not exist, is no text, or is empty.
    """
    if data is None:
        files = library_sources(package=DEFAULT_PACKAGE)
        texts = ((path, prose(_decoded(path) or "")) for path in files)
        return _corpus(f"the prose in the standard library's {DEFAULT_PACKAGE}", texts)
    path = Path(data).expanduser()
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise UserError(f"there is no file in {path}")
    elif path.is_file():
        files = [path]
        if _decoded(path) is None:
            raise UserError(f"{path} is not text in UTF-8")
    else:
        raise UserError(f"there is no file or directory {path}")
    return _corpus(str(path), ((file, _decoded(file) or "") for file in files))


def split(text: str) -> tuple[str, str]:
    """``text`` in two: nine tenths and the rest, cut at a line's end if there is one near."""
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    end = text.rfind("\n", len(text) // 2, cut) + 1
    return text[: end or cut], text[end or cut :]


def prose(source: str) -> str:
    """The texts of more than a line in a Python source, docstrings among them."""
    constants = (
        node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)
    )
    return "\n".join(text for text in constants if isinstance(text, str) and "\n" in text)


def _corpus(description: str, documents: Iterable[tuple[Path, str]]) -> Corpus:
    texts: dict[str, Path] = {}
    left = MAX_BYTES
    for path, text in documents:
        text = text[:left]
        # A second copy of a file would put what one copy holds out into the other's training part.
        if text.strip() and text not in texts:
            texts[text] = path.resolve()
            left -= len(text)
    if not texts:
        raise UserError(f"there is no text in {description}: nothing but empty or binary files")
    train, held_out = zip(*(split(text) for text in texts), strict=True)
    return Corpus(description, "\n".join(train), "\n".join(held_out), frozenset(texts.values()))


def _decoded(path: Path) -> str | None:
    """The file's text, its first ``MAX_BYTES`` at most; None where it is no UTF-8 text.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if b"\0" in content:
        return None
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        # A character that the limit cut in two is no defect of the file.
        if error.start >= MAX_BYTES - 4:
            return content[: error.start].decode("utf-8-sig")
        return None
