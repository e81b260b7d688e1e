"""The study's report: one page in Markdown and one in HTML, and a plot for each question."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from bench.tables import Table, piped, told

NAMES = ("report.md", "report.html")

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff }
h1, h2 { line-height: 1.25 } h2 { margin-top: 3rem }
.finding { border-left: 4px solid #0b6e99; padding: .4rem 1rem; background: #f2f7fa }
.origin { color: #666; font-size: .85rem }
.wide { overflow-x: auto } img { max-width: 100% }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
th { vertical-align: bottom } .word { text-align: left }
"""


class Answer(NamedTuple):
    """A question's module, what it measured, and where and when."""

    name: str
    number: int
    module: ModuleType
    content: dict[str, Any]
    origin: dict[str, Any]
    seconds: float

    @property
    def heading(self) -> str:
        return f"{self.number}. {self.module.QUESTION}"

    @property
    def measured(self) -> str:
        return f"{told(self.origin)}; measured in {self.seconds:.0f} s"


def write(answers: Sequence[Answer], about: Sequence[str], folder: Path) -> list[Path]:
    """The pages and the plots; ``about``: lines for the head. Returns the pages' paths."""
    for answer in answers:
        data, image = (folder / f"{answer.name}.{kind}" for kind in ("json", "png"))
        # What was measured before was drawn before.
        drawn = image.exists() and data.exists()
        if not drawn or image.stat().st_mtime_ns < data.stat().st_mtime_ns:
            draw(answer, image)
    pages = [folder / name for name in NAMES]
    pages[0].write_text(markdown(answers, about))
    pages[1].write_text(hyper(answers, about, folder))
    return pages


def draw(answer: Answer, path: Path) -> None:
    """The question's plot, as a PNG."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = getattr(answer.module, "AXES", 1)
    look = {"axes.spines.top": False, "axes.spines.right": False}
    look |= {"legend.frameon": False, "legend.fontsize": 9}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(5.4 * max(count, 1.3), 4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, count)
        answer.module.plot(answer.content, list(axes) if count > 1 else axes)
        figure.savefig(path)


def markdown(answers: Sequence[Answer], about: Sequence[str]) -> str:
    parts = ["# A study of LoRA", *about]
    for answer in answers:
        parts += [
            f"## {answer.heading}",
            f"**{answer.module.finding(answer.content)}**",
            piped(answer.module.table(answer.content)),
            f"![{answer.module.QUESTION}]({answer.name}.png)",
            f"*{answer.measured}*",
        ]
    return "\n\n".join(parts) + "\n"


def hyper(answers: Sequence[Answer], about: Sequence[str], folder: Path) -> str:
    """The same as a page that needs no other file."""
    parts = ["<h1>A study of LoRA</h1>", *(_tag("p", line) for line in about), "<ul>"]
    parts += [f'<li><a href="#{a.name}">{html.escape(a.heading)}</a></li>' for a in answers]
    parts.append("</ul>")
    for answer in answers:
        image = base64.b64encode((folder / f"{answer.name}.png").read_bytes()).decode()
        alternative = html.escape(answer.module.QUESTION)
        parts += [
            f'<h2 id="{answer.name}">{html.escape(answer.heading)}</h2>',
            _tag("p", answer.module.finding(answer.content), "finding"),
            f'<div class="wide">{_html_table(answer.module.table(answer.content))}</div>',
            f'<p><img alt="{alternative}" src="data:image/png;base64,{image}"></p>',
            _tag("p", answer.measured, "origin"),
        ]
    head = f'<meta charset="utf-8"><title>A study of LoRA</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(
        [*parts, "</body></html>\n"]
    )


def _tag(name: str, text: str, kind: str = "") -> str:
    opening = f'{name} class="{kind}"' if kind else name
    return f"<{opening}>{html.escape(text)}</{name}>"


def _html_table(table: Table) -> str:
    head, body = table
    # Columns of words to the left, of numbers to the right, as in bench.tables.
    columns = zip(*body, strict=True)
    kinds = ["word" if any(c[:1].isalpha() for c in column) else "" for column in columns]
    kinds[0] = "word"

    def line(name: str, cells: Iterable[str]) -> str:
        tags = (_tag(name, cell, kind) for cell, kind in zip(cells, kinds, strict=True))
        return f"<tr>{''.join(tags)}</tr>"

    rows = "\n".join([line("th", head), *(line("td", cells) for cells in body)])
    return f"<table>\n{rows}\n</table>"
