"""What the reports ``python -m bench.NAME`` share: the command line, NAME.json and NAME.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .tables import origin, piped, told, write

OUT = Path(__file__).parent / "out"
Content = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """``measure(case, seconds)`` makes a row, ``lines`` the lines of the table that tell it.

    ``columns`` is "heading: cell | heading: cell", where a cell is a format string of the line's
    names and of the variants in its "us", alone or as "one / other". ``after`` adds to the page;
    ``misses`` says which bars a row misses.
    """

    name: str
    cases: Sequence[Any]
    measure: Callable[[Any, float], Row]
    seconds: float
    packages: Sequence[str]
    note: str
    columns: str
    lines: Callable[[Row], list[Row]] = lambda row: [row]
    after: Callable[[list[Row]], list[str]] = lambda rows: []
    misses: Callable[[Row], list[str]] = lambda row: []

    def run(self, cases: Sequence[Any], seconds: float) -> Content:
        rows = [self.measure(case, seconds) for case in tqdm(cases, desc=self.name)]
        return origin("cpu", self.packages) | {"rows": rows}

    def page(self, content: Content) -> list[str]:
        columns = dict(column.split(": ", 1) for column in self.columns.split(" | "))
        lines = [_Line(line) for row in content["rows"] for line in self.lines(row)]
        body = [[cell.format_map(line) for cell in columns.values()] for line in lines]
        table = piped(([*columns], body)).splitlines()
        return [f"{told(content)}. {self.note}", "", *table, *self.after(content["rows"])]

    def main(
        self, doc: str | None, arguments: Sequence[str] | None = None, **others: Report
    ) -> None:
        """Measure and report; with ``--NAME`` another report of the module."""
        parser = parser_of(self.name, doc)
        parser.add_argument("--seconds", type=float, help="for each row of the table")
        for name, other in others.items():
            parser.add_argument(f"--{name}", dest="report", action="store_const", const=other)
        args = parser.parse_args(arguments)
        chosen = getattr(args, "report", None) or self
        seconds = chosen.seconds if args.seconds is None else args.seconds
        content = chosen.run(chosen.cases, seconds)
        misses = [miss for row in content["rows"] for miss in chosen.misses(row)]
        sys.exit(finish(chosen.name, content, chosen.page(content), args.out, misses))


class _Line(dict[str, Any]):
    """A row, and what its cells ask of its variants."""

    def __missing__(self, name: str) -> Any:
        times = [self["us"].get(part) for part in name.split(" / ")]
        if None in times:
            return _Blank()
        return times[0] if len(times) == 1 else times[0] / times[1]


class _Blank:
    """Of a variant that was not measured."""

    def __format__(self, how: str) -> str:
        return ""


def parser_of(name: str, doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    text = f"where {name}.json and {name}.md go"
    parser.add_argument("--out", type=Path, default=OUT / name, metavar="DIR", help=text)
    return parser


def finish(
    name: str, content: Content, page: Sequence[str], out: Path, failures: Sequence[str]
) -> int:
    """Write and print the page; returns the exit status, 1 if something failed."""
    write(content, page, out, name)
    print("\n".join([*page, "", f"wrote {out / name}.json, {name}.md"]))
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0
