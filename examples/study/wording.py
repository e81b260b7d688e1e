"""What tables, findings and plots have in common: how numbers and their differences are told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from statistics import fmean
from textwrap import fill
from typing import Any

NO_DIFFERENCE = "no difference beyond the seeds'"

# Of ours and PEFT's, as in the demo's picture; then of whatever else there is.
OURS, PEFT = "lora_kernels", "PEFT"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0b6e99", "#e07b39", "#4c9f70", "#8a5fb0", "#777777"
COLOURS = {OURS: BLUE, PEFT: ORANGE}


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The seeds' mean, and half of their range: "2.3275 ± 0.0021"."""
    half = (max(values) - min(values)) / 2
    return f"{fmean(values):.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def gap(a: Sequence[float], b: Sequence[float]) -> float:
    """By how much ``a`` is above ``b`` in the mean; 0 unless that is more than the seeds make.

    Both have a number for each seed, in the same order. A seed draws the same batches for both, so
    it is the differences seed by seed whose range is compared with their mean.
    """
    apart = [x - y for x, y in zip(a, b, strict=True)]
    mean = fmean(apart)
    return mean if abs(mean) > max(apart) - min(apart) else 0.0


def change(after: Sequence[float], before: Sequence[float], digits: int = 4) -> str:
    """ "falls by 0.0123", "rises by ...", or that there is no difference beyond the seeds'."""
    difference = gap(after, before)
    if not difference:
        return f"shows {NO_DIFFERENCE}"
    return f"{'rises' if difference > 0 else 'falls'} by {abs(difference):.{digits}f}"


def times(a: float, b: float, more: str, less: str) -> str:
    """``a`` against ``b``: "1.23x MORE" or "1.23x LESS", always above 1; "the same" in between."""
    if max(a, b) < 1.005 * min(a, b):
        return "the same"
    return f"{a / b:.2f}x {more}" if a > b else f"{b / a:.2f}x {less}"


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def listed(words: Sequence[str], last_word: str = "and") -> str:
    """ "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} {last_word} {last}" if first else last


def changes(after: dict[str, Sequence[float]], before: Sequence[float]) -> str:
    """``change`` of several: "falls by 0.0123 with A and rises by 0.0045 with B and C"."""
    said: dict[str, list[str]] = {}
    for name, values in after.items():
        said.setdefault(change(values, before), []).append(name)
    return listed([f"{what} with {listed(names)}" for what, names in said.items()])


def beside(a: Sequence[float], others: dict[str, Sequence[float]], digits: int = 4) -> str:
    """Where ``a`` lies: "0.0123 below X, 0.0045 above Y and with no difference ... to Z"."""
    apart = {name: gap(a, values) for name, values in others.items()}
    said = [
        f"{abs(difference):.{digits}f} {'below' if difference < 0 else 'above'} {name}"
        for name, difference in apart.items()
        if difference
    ]
    same = [name for name, difference in apart.items() if not difference]
    return listed([*said, f"with {NO_DIFFERENCE} to {listed(same, 'or')}"] if same else said)


def ranges(values: Iterable[Sequence[float]]) -> dict[str, Any]:
    """The seeds' means and how far they reach below and above, as ``errorbar`` takes them."""
    below, means, above = zip(*((min(v), fmean(v), max(v)) for v in values), strict=True)
    down = [mean - low for low, mean in zip(below, means, strict=True)]
    up = [high - mean for high, mean in zip(above, means, strict=True)]
    return {"y": means, "yerr": [down, up], "capsize": 3}


def curve_beside(ax: Any, losses: Sequence[float], others: Sequence[float], **look: Any) -> None:
    """The mean loss so far at every step, minus that of ``others``. The batches are the same: what
    makes one harder than another drops out."""
    apart = accumulate(a - b for a, b in zip(losses, others, strict=True))
    means = [total / steps for steps, total in enumerate(apart, 1)]
    ax.plot(range(1, len(means) + 1), means, **look)


def costs(ax: Any, names: Sequence[str], shares: dict[str, Sequence[float]], whose: str) -> None:
    """Bars of what each of ``names`` takes of several things, where ``whose`` is 1."""
    for place, (label, values) in enumerate(shares.items()):
        at = [index + 0.27 * (place - (len(shares) - 1) / 2) for index in range(len(names))]
        ax.bar(at, values, 0.25, color=(BLUE, ORANGE, GREEN)[place], label=label)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_xticks(
        range(len(names)),
        [fill(name, 10, break_on_hyphens=False, break_long_words=False) for name in names],
        fontsize=7,
    )
    ax.set_ylabel(f"beside {whose}")
    ax.margins(y=0.15)
    ax.legend(loc="upper center", ncols=len(shares))


def heat_map(ax: Any, columns: dict[str, dict[str, float]], most: float, digits: int = 1) -> None:
    """Numbers from 0 to ``most``, by column and row; where a column has none it is empty."""
    rows = list(dict.fromkeys(row for values in columns.values() for row in values))
    grid = [[values.get(row, math.nan) for values in columns.values()] for row in rows]
    ax.imshow(grid, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    for y, line in enumerate(grid):
        for x, value in enumerate(line):
            if not math.isnan(value):
                colour = "white" if value > most / 2 else "black"
                ax.text(x, y, f"{value:.{digits}f}", ha="center", va="center", color=colour)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)


def banded(ax: Any, at: Sequence[float], values: Sequence[Sequence[float]], **look: Any) -> None:
    """The seeds' means as a line, in a band of the seeds' range."""
    (line,) = ax.plot(at, [fmean(v) for v in values], "o-", **look)
    low, high = ([extreme(v) for v in values] for extreme in (min, max))
    ax.fill_between(at, low, high, color=line.get_color(), alpha=0.15)
