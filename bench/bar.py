"""The CPU's targets: what the fused layer may cost, whether it keeps to it, and what bounds it.

The grid is ``cases.CPU_SHAPES`` at ``cases.CPU_RANKS`` without dropout. Every value is a quotient
of medians of one row, whose variants took turns; a mean of them is the geometric one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .cases import CPU_RANKS, CPU_SHAPES, MODES, Setting
from .rows import Content, Row, Table, label, median, milliseconds, quotient, ratio, setting_of

CELLS = len(CPU_SHAPES) * len(CPU_RANKS)


@dataclass(frozen=True)
class Criterion:
    """A mean over the cells, or the largest of them, of the times of ``of`` / those of ``to``;
    without ``limit`` there is no target."""

    dtype: str
    mode: str
    of: str
    to: str
    statistic: Literal["mean", "worst"]
    limit: float | None = None
    at_least: bool = False

    def keeps(self, value: float) -> bool:
        assert self.limit is not None
        return value >= self.limit if self.at_least else value <= self.limit


def _criteria(dtype: str, forward_mean: float, peft: dict[str, float]) -> tuple[Criterion, ...]:
    return (
        Criterion(dtype, "forward", "fused", "plain", "mean", forward_mean),
        Criterion(dtype, "forward", "fused", "plain", "worst", 1.15),
        Criterion(dtype, "forward", "fused", "packed", "worst", 1.10),
        Criterion(dtype, "forward", "fused", "packed", "mean"),
        Criterion(dtype, "forward", "peft", "fused", "mean", peft.get("forward"), True),
        Criterion(dtype, "forward", "unpacked", "plain", "mean"),
        Criterion(dtype, "training", "fused", "plain", "mean", 1.12),
        Criterion(dtype, "training", "fused", "plain", "worst"),
        Criterion(dtype, "training", "peft", "fused", "mean", peft.get("training"), True),
        Criterion(dtype, "training", "always", "plain", "mean"),
        Criterion(dtype, "training", "peft", "always", "mean", peft.get("training"), True),
    )


CRITERIA = (
    *_criteria("bfloat16", 1.00, {"forward": 1.30, "training": 1.25}),
    *_criteria("float32", 1.05, {}),
)


@dataclass(frozen=True)
class Verdict:
    """What the rows of a run say to one criterion: its value, None without a row; the cells that it
    covers; the cell furthest on the wrong side, and its value."""

    criterion: Criterion
    value: float | None
    cells: int
    worst_cell: str | None
    worst: float | None

    @property
    def outcome(self) -> str:
        if self.criterion.limit is None:
            return "-"
        if self.value is None:
            return "no number"
        return "met" if self.criterion.keeps(self.value) else "not met"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def in_grid(setting: Setting) -> bool:
    shape = (setting.m, setting.k, setting.n)
    return shape in CPU_SHAPES and setting.r in CPU_RANKS and setting.p == 0


def judged_rows(content: Content) -> list[Row]:
    """The rows of the grid; where a run has none of them, all its rows without dropout."""
    rows = content["rows"]
    grid = [row for row in rows if in_grid(setting_of(row))]
    return grid or [row for row in rows if row["setting"]["p"] == 0]


def judge(criterion: Criterion, rows: Sequence[Row]) -> Verdict:
    """The verdict over those of ``rows`` that have both numbers."""
    found: dict[str, float] = {}
    for row in _rows_of(criterion, rows):
        value = ratio(row, criterion.of, criterion.to)
        if value is not None:
            found[cell(setting_of(row))] = value
    if not found:
        return Verdict(criterion, None, 0, None, None)
    worst_cell = (min if criterion.at_least else max)(found, key=found.__getitem__)
    worst = found[worst_cell]
    mean = geometric_mean([*found.values()])
    value = mean if criterion.statistic == "mean" else worst
    return Verdict(criterion, value, len(found), worst_cell, worst)


def verdicts(content: Content) -> list[Verdict]:
    """One per criterion of the dtypes and modes that were measured; none for another device."""
    if content["device"]["kind"] != "cpu":
        return []
    rows = judged_rows(content)
    return [judge(criterion, rows) for criterion in CRITERIA if _rows_of(criterion, rows)]


def as_json(content: Content) -> list[dict[str, Any]]:
    return [asdict(verdict) | {"outcome": verdict.outcome} for verdict in verdicts(content)]


def cell(setting: Setting) -> str:
    return f"{setting.shape} r={setting.r}"


def _rows_of(criterion: Criterion, rows: Sequence[Row]) -> list[Row]:
    where = {"dtype": criterion.dtype, "mode": criterion.mode}
    return [row for row in rows if where.items() <= row["setting"].items()]


def table(content: Content) -> Table:
    """Every criterion beside its target."""
    head = ["dtype", "pass", "ratio of times", "over the cells", "measured", "target", "bar"]
    head += ["cells", "worst cell", "there"]
    body = []
    for verdict in verdicts(content):
        c = verdict.criterion
        sign = ">=" if c.at_least else "<="
        line = [c.dtype, MODES[c.mode], f"{label(content, c.of)} / {label(content, c.to)}"]
        line += ["geometric mean" if c.statistic == "mean" else "worst"]
        line += [f"{verdict.value:.3f}" if verdict.value is not None else "-"]
        line += ["-" if c.limit is None else f"{sign} {c.limit:.2f}", verdict.outcome]
        body.append([*line, str(verdict.cells), verdict.worst_cell or "-", quotient(verdict.worst)])
    return head, body


def coverage(content: Content) -> str:
    """How much of the grid the verdicts cover."""
    rows = judged_rows(content)
    grid = [setting_of(row) for row in rows if in_grid(setting_of(row))]
    what = f"the bar's grid is {CELLS} cells per dtype and pass, without dropout"
    if not grid:
        return f"{what}: this run has none of them, and is judged by what it has"
    kinds = {(setting.dtype, setting.mode) for setting in grid}
    fewest = min(sum((s.dtype, s.mode) == kind for s in grid) for kind in kinds)
    if fewest < CELLS:
        return f"{what}: this run has only {fewest} of some of them"
    return f"{what}: all of them are here"


# What bounds a cell.


def above_target(content: Content) -> list[tuple[Row, list[str]]]:
    """(row, what it is above) for the cells above a limit of the fused layer that the run does not
    keep, the worst first."""
    found: dict[str, tuple[float, Row, list[str]]] = {}
    rows = judged_rows(content)
    for verdict in verdicts(content):
        c = verdict.criterion
        if c.limit is None or verdict.outcome != "not met" or c.of != "fused":
            continue
        for row in _rows_of(c, rows):
            value = ratio(row, c.of, c.to)
            if value is None or c.keeps(value):
                continue
            excess, _, reasons = found.get(str(setting_of(row)), (0.0, row, []))
            reasons = [*reasons, f"/ {label(content, c.to)} {value:.2f} > {c.limit:.2f}"]
            found[str(setting_of(row))] = max(excess, value / c.limit), row, reasons
    ordered = sorted(found.values(), key=lambda entry: entry[0], reverse=True)
    return [(row, reasons) for _, row, reasons in ordered]


def floor(content: Content, row: Row) -> dict[str, float | None]:
    """Seconds that bound a row from below: its bytes at the bandwidth of a copy, its FLOP at the
    rate of our own packed GEMM, and the plain linear's time for as many FLOP as the row has."""
    work, roof = row["work"]["adapter"], content["roofline"]
    rate = roof.get("own_gemm_flop_per_s", {}).get(row["setting"]["dtype"])
    plain = median(row, "plain")
    return {
        "bytes": work["bytes"] / roof["copy_bytes_per_s"],
        "flop": None if rate is None else work["flop"] / rate,
        "plain": None if plain is None else plain * work["flop"] / row["work"]["plain"]["flop"],
    }


def floors_table(content: Content) -> Table:
    """The cells above a target, each beside what bounds it."""
    head = ["M x K x N", "r", "dtype", "pass", "fused ms", "plain ms", "packed ms"]
    head += ["bytes at copy's rate ms", "FLOP at our rate ms", "plain at the same FLOP ms"]
    head += ["above"]
    body = []
    for row, reasons in above_target(content):
        setting = setting_of(row)
        bounds = floor(content, row)
        line = [setting.shape, str(setting.r), setting.dtype, MODES[setting.mode]]
        line += [milliseconds(median(row, key)) for key in ("fused", "plain", "packed")]
        line += [milliseconds(bounds[name]) for name in ("bytes", "flop", "plain")]
        body.append([*line, "; ".join(reasons)])
    return head, body
