"""How the reports of bench look: numbers, Markdown tables, and a page beside its JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_kernels.planning.device import facts

# A heading, and lines of cells.
Table = tuple[list[str], list[list[str]]]


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def count(number: int) -> str:
    """Three significant digits and a unit: "65.5 k"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


def piped(table: Table) -> str:
    """A Markdown table, its columns aligned for those who read it as text."""
    head, body = table
    widths = [max(3, *map(len, column)) for column in zip(head, *body, strict=True)]
    # Columns of words to the left, of numbers to the right.
    words = [any(c[:1].isalpha() for c in column) for column in zip(*body, strict=True)]
    words[:1] = [True]
    lines = [
        [c.ljust(w) if left else c.rjust(w) for c, w, left in zip(line, widths, words, strict=True)]
        for line in (head, *body)
    ]
    rule = ["-" * w if left else "-" * (w - 1) + ":" for w, left in zip(widths, words, strict=True)]
    lines.insert(1, rule)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def origin(device: Any, packages: Sequence[str]) -> dict[str, Any]:
    """When, on which machine and with which versions something is measured."""
    machine = facts(device)
    units = "threads" if machine.kind == "cpu" else "processors"
    return {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "device_name": f"{machine.name} ({machine.arch}, {machine.processors} {units})",
        "versions": {package: version(package) for package in packages},
    }


def told(content: dict[str, Any]) -> str:
    """What :func:`origin` found, in a line."""
    versions = (f"{name} {number}" for name, number in content["versions"].items())
    return ", ".join([content["date"], content["device_name"], *versions])


def write(content: dict[str, Any], lines: Sequence[str], directory: Path, name: str) -> None:
    """The numbers into NAME.json, the page into NAME.md."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (directory / f"{name}.md").write_text("\n".join(lines) + "\n")
