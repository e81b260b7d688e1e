"""The demo's text: the standard library's sources, one of its packages, or what the user names."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .settings import UserError

# The language reference that help() prints: prose, where the rest is code. From 60 steps on its
# sources a base gained 0.17 nats a byte, on asyncio, email, unittest, xml or tkinter 0.01 to 0.05.
DEFAULT_PACKAGE = "pydoc_data"
# Tests; what is not the standard library; tables of numbers.
_NOT_TEXT = frozenset(["test", "tests", "idle_test", "site-packages", "dist-packages"])
_NOT_TEXT |= {"__pycache__", "encodings", "ensurepip"}

# A demo reads a sample of a user's text, not a corpus into memory; far more than a few dozen steps
# on a part of it read.
MAX_CHARACTERS, _LONGEST_PART = 32 << 20, 200_000
ADAPTERS = 10


class Corpus(NamedTuple):
    """Text to train on, text that is not in it, and the files that both came from."""

    name: str
    train: str
    held_out: str
    files: frozenset[Path]

    def __str__(self) -> str:
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        sizes = f"{len(self.train):,} characters, and {len(self.held_out):,} held out"
        return f"{self.name}, {files}: {sizes}"


def standard_library() -> Path:
    """Where this interpreter's own sources are."""
    return Path(sysconfig.get_path("stdlib"))


def library_sources(package: str = "") -> list[Path]:
    """The standard library's sources, minus tests; or those of one package."""
    root = standard_library()
    files = [
        path
        for path in sorted((root / package).rglob("*.py"))
        if _NOT_TEXT.isdisjoint(path.relative_to(root).parts)
        and not path.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise UserError(f"this Python has no sources under {root / package}: name a text by --data")
    return files


def pretraining_text(without: Iterable[Path]) -> str:
    """The standard library's sources in one string, minus the default package and ``without``."""
    excluded = {path.resolve() for path in (*library_sources(DEFAULT_PACKAGE), *without)}
    return "\n".join(_read(p) for p in library_sources() if p.resolve() not in excluded)


def largest_packages() -> list[Corpus]:
    """The standard library's packages with the most source text."""
    packages = [path.parent for path in standard_library().glob("*/__init__.py")]
    names = {path.name for path in packages} - _NOT_TEXT - {DEFAULT_PACKAGE}
    texts = {name: [(path, _read(path)) for path in library_sources(name)] for name in names}
    sizes = {name: -sum(len(text) for _, text in found) for name, found in texts.items()}
    largest = sorted(names, key=lambda name: (sizes[name], name))[:ADAPTERS]
    return [_corpus(name, texts[name]) for name in largest]


def parts(corpus: Corpus, context: int) -> list[Corpus]:
    """The user's text cut into parts of equal length: as many as are long enough, ten at most."""
    text = corpus.train + corpus.held_out
    # A tenth of a part is held out: a block of tokens, of some four characters each.
    count = max(min(ADAPTERS, len(text) // (40 * context)), 1)
    size = len(text) // count
    chunks = (text[i * size : (i + 1) * size][:_LONGEST_PART] for i in range(count))
    return [Corpus(f"part-{i}", *split(chunk), corpus.files) for i, chunk in enumerate(chunks, 1)]


def finetuning_corpus(data: str | None) -> Corpus:
    """The text to fine-tune on: ``data``, a file or a directory of them, or the default package.

    The end of every file is held out, cut at a line's end. In a directory hidden files are not
    read, nor is what is no UTF-8 text.

    Raises:
        UserError: ``data`` does not exist, or holds no text.
    """
    if data is None:
        files = library_sources(DEFAULT_PACKAGE)
        name = f"the prose in the standard library's {DEFAULT_PACKAGE}"
        return _corpus(name, ((path, prose(_read(path))) for path in files))
    path = Path(data).expanduser()
    if not path.exists():
        raise UserError(f"there is no file or directory {path}")
    inside = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [
        file
        for file in inside
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    return _corpus(str(path), ((file, _read(file)) for file in files))


def split(text: str) -> tuple[str, str]:
    """``text`` in two: nine tenths and the rest, cut at a line's end if there is one near."""
    cut = int(len(text) * 0.9)
    end = text.rfind("\n", len(text) // 2, cut) + 1
    return text[: end or cut], text[end or cut :]


def prose(source: str) -> str:
    """The texts of more than a line in a Python source, docstrings among them."""
    nodes = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return "\n".join(text for text in nodes if isinstance(text, str) and "\n" in text)


def _corpus(name: str, documents: Iterable[tuple[Path, str]]) -> Corpus:
    texts: dict[str, Path] = {}
    left = MAX_CHARACTERS
    for path, text in documents:
        text = text[:left]
        # A second copy of a file would put what one copy holds out into the other's training part.
        if text.strip() and text not in texts:
            texts[text] = path.resolve()
            left -= len(text)
    if not texts:
        raise UserError(f"there is no text in UTF-8 in {name}")
    train, held_out = ("\n".join(each) for each in zip(*map(split, texts), strict=True))
    return Corpus(name, train, held_out, frozenset(texts.values()))


def _read(path: Path) -> str:
    """The file's text, as far as it is read here; none where it is not UTF-8."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(MAX_CHARACTERS)
    except UnicodeDecodeError:
        return ""
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return "" if "\0" in text else text
