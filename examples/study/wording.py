"""What tables, findings and plots have in common: how numbers and their differences are told."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

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
    """``a`` against ``b``: "1.23x MORE" or "1.23x LESS", always above 1; "as much" in between."""
    if max(a, b) < 1.005 * min(a, b):
        return "as much"
    return f"{a / b:.2f}x {more}" if a > b else f"{b / a:.2f}x {less}"


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f}"


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
