"""What a report says about batches that mix adapters: tables, and the criteria of a CPU.

A ``results.json`` from before there were any has nothing to say here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .peers_report import is_peer
from .rows import Content, Row, Table, median, milliseconds, plans, quotient, ratio
from .segmented_cases import ADAPTERS, DECODE, GROUPS, PREFILL, RANK, MixedSetting, setting_of

# What the quotients of a row are, cell by cell.
_QUOTIENTS = (
    ("segmented", "plain"),
    ("packed", "plain"),
    ("fused", "plain"),
    ("peft", "segmented"),
    ("gather_fp32", "segmented"),
    ("gather", "segmented"),
    ("loop", "segmented"),
    ("vllm", "segmented"),
    ("sglang_csgmv", "segmented"),
    ("sglang_csgmv_split", "segmented"),
    ("sglang_triton", "segmented"),
    ("sglang_triton_v2", "segmented"),
    ("gather_fp32_part", "segmented_part"),
    ("gather_part", "segmented_part"),
)


@dataclass(frozen=True)
class MixedCriterion:
    """The time of ``of`` / that of ``to`` in the row of 8 adapters of rank 16 over ``shape`` in
    bfloat16; without ``limit`` there is no target."""

    shape: tuple[int, int, int]
    of: str
    to: str
    limit: float | None = None
    at_least: bool = False

    def covers(self, setting: MixedSetting) -> bool:
        return (
            (setting.m, setting.k, *setting.widths) == self.shape
            and (setting.r, setting.adapters, setting.population) == (RANK, ADAPTERS, "modulo")
            and setting.dtype == "bfloat16"
        )

    def outcome(self, value: float | None) -> str:
        if self.limit is None:
            return "-"
        if value is None:
            return "no number"
        kept = value >= self.limit if self.at_least else value <= self.limit
        return "met" if kept else "not met"


CRITERIA = (
    MixedCriterion(DECODE, "fused", "plain", 1.25),
    MixedCriterion(DECODE, "segmented", "plain"),
    MixedCriterion(DECODE, "packed", "plain"),
    MixedCriterion(DECODE, "peft", "segmented", 1.5, True),
    MixedCriterion(DECODE, "loop", "segmented"),
    MixedCriterion(PREFILL, "gather_fp32_part", "segmented_part", 10.0, True),
    MixedCriterion(PREFILL, "gather_part", "segmented_part", 10.0, True),
)


def rows_of(content: Content) -> list[Row]:
    return content.get("mixed", {}).get("rows", [])


def verdicts(content: Content) -> list[tuple[MixedCriterion, float | None]]:
    """Every criterion and its measured value, None where the run has no such row; none on another
    device."""
    rows = rows_of(content)
    if content["device"]["kind"] != "cpu" or not rows:
        return []
    found = []
    for criterion in CRITERIA:
        covered = [row for row in rows if criterion.covers(setting_of(row))]
        value = ratio(covered[0], criterion.of, criterion.to) if covered else None
        found.append((criterion, value))
    return found


def as_json(content: Content) -> list[dict[str, Any]]:
    return [
        {"criterion": asdict(criterion), "value": value, "outcome": criterion.outcome(value)}
        for criterion, value in verdicts(content)
    ]


def criteria_table(content: Content) -> Table:
    head = ["M x K x N", "r", "adapters", "ratio of times", "measured", "target", "bar"]
    body = []
    for criterion, value in verdicts(content):
        line = ["x".join(map(str, criterion.shape)), str(RANK), str(ADAPTERS)]
        line += [_quotient_name(content, criterion.of, criterion.to)]
        line += [f"{value:.3f}" if value is not None else "-"]
        sign = ">=" if criterion.at_least else "<="
        line += ["-" if criterion.limit is None else f"{sign} {criterion.limit:.2f}"]
        body.append([*line, criterion.outcome(value)])
    return head, body


def groups(content: Content) -> dict[str, list[Row]]:
    """{title: rows} of the same dtype and origin."""
    found: dict[str, list[Row]] = {}
    for row in rows_of(content):
        setting = setting_of(row)
        title = f"mixed batches, {setting.dtype}, {GROUPS[setting.group]}"
        found.setdefault(title, []).append(row)
    return found


def ratios_table(content: Content, rows: Sequence[Row]) -> Table:
    """Quotients of times, the table's own milliseconds, and what answered ours."""
    pairs = [(key, to) for key, to in _QUOTIENTS if any(ratio(row, key, to) for row in rows)]
    head = [*_HEAD, "plain ms", "ours ms"]
    head += [_quotient_name(content, key, to) for key, to in pairs]
    head += ["table ms", "ours answered by"]
    body = []
    for row in rows:
        line = _cells(row)
        line += [milliseconds(median(row, key)) for key in ("plain", "segmented")]
        line += [quotient(ratio(row, key, to)) for key, to in pairs]
        body.append([*line, milliseconds(median(row, "table")), plans(row, "segmented")])
    return head, body


def times_table(content: Content, rows: Sequence[Row]) -> Table:
    """Milliseconds of every variant."""
    variants = content["mixed"]["variants"]
    keys = [key for key in variants if any(key in row["variants"] for row in rows)]
    body = [[*_cells(row), *(milliseconds(median(row, key)) for key in keys)] for row in rows]
    return [*_HEAD, *(variants[key]["label"] for key in keys)], body


def notes(content: Content) -> list[str]:
    """What has no number, and why."""
    missing: dict[str, list[str]] = {}
    for row in rows_of(content):
        for key, reason in row["missing"].items():
            if is_peer(content["mixed"]["variants"], key):
                continue
            what = f"{content['mixed']['variants'][key]['label']}: {reason}"
            missing.setdefault(what, []).append(str(setting_of(row)))
    return [f"no number for {what} ({', '.join(rows)})" for what, rows in missing.items()]


_HEAD = ["M x K x N", "layer", "r", "adapters", "population"]

HOW = """\
All of it without gradients. Every row of the batch has an adapter, and every variant computes base
+ adapters, but for those called "alone": the adapters, added to the same y every time. Steps take
turns among copies of the weight and of the adapters. The table is built once per batch for all
layers, so its time is a column of its own and in no other; the same holds for the metadata of other
engines, which their hosts build. Before a row is timed, every variant is
held against float64 (on a CPU up to 64 rows), with adapters whose part is as large as the base's.
Rows of the populations arrive in a drawn order; identical: one adapter, distinct: one a row,
uniform: sqrt(M) of them, zipf: each 1.5 times as popular as the next."""


def _cells(row: Row) -> list[str]:
    setting = setting_of(row)
    counts = [str(setting.r), str(setting.adapters)]
    return [setting.shape, setting.layer or "-", *counts, setting.population]


def _quotient_name(content: Content, key: str, to: str) -> str:
    variants = content["mixed"]["variants"]
    return f"{variants[key]['label']} / {variants[to]['label']}"
