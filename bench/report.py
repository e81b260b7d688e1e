"""The report of ``pytest bench``, in Markdown, from its JSON alone: the targets and two tables.

A ratio says how many times as fast as the other ours is: 1.40 is 1.4x faster, below 1 is slower.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import segmented_cases
from .cases import CPU_RANKS, CPU_SHAPES, MODES, Setting
from .segmented_cases import DECODE, PREFILL
from .segmented_cases import setting_of as mixed_setting
from .tables import Table, number, piped

Content = dict[str, Any]
Row = dict[str, Any]

CELLS = len(CPU_SHAPES) * len(CPU_RANKS)

# Quartiles this far apart, as a part of the median, come from other work on the machine. A guess.
_RESTLESS = 0.25


class Target(NamedTuple):
    """What the speed of ``ours`` over that of ``theirs`` has to be on a CPU: its geometric mean
    over the cells of a dtype and pass, or its worst. None: it is shown, and nothing is demanded.
    ``shape``: of the batch of mixed adapters of that shape instead."""

    dtype: str
    mode: str
    ours: str
    theirs: str
    statistic: str
    least: float | None = None
    shape: tuple[int, int, int] | None = None


# Of one linear: pass, ours, over, of the cells, at least in bfloat16 and in float32.
_ONE_LINEAR = (
    ("forward", "fused", "plain", "mean", 1.0, 1 / 1.05),
    ("forward", "fused", "plain", "worst", 1 / 1.15, 1 / 1.15),
    ("forward", "fused", "packed", "worst", 1 / 1.10, 1 / 1.10),
    ("forward", "fused", "packed", "mean", None, None),
    ("forward", "fused", "peft", "mean", 1.30, None),
    ("forward", "unpacked", "plain", "mean", None, None),
    ("training", "fused", "plain", "mean", 1 / 1.12, 1 / 1.12),
    ("training", "fused", "plain", "worst", None, None),
    ("training", "fused", "peft", "mean", 1.25, None),
    ("training", "always", "plain", "mean", None, None),
    ("training", "always", "peft", "mean", 1.25, None),
)
# Of a batch that mixes adapters, in bfloat16: its shape, ours, over, at least.
_MIXED = (
    (DECODE, "fused", "plain", 1 / 1.25),
    (DECODE, "segmented", "plain", None),
    (DECODE, "packed", "plain", None),
    (DECODE, "segmented", "peft", 1.5),
    (DECODE, "segmented", "loop", None),
    (PREFILL, "segmented_part", "gather_fp32_part", 10.0),
    (PREFILL, "segmented_part", "gather_part", 10.0),
)
TARGETS = (
    *(Target("bfloat16", *row[:4], row[4]) for row in _ONE_LINEAR),
    *(Target("float32", *row[:4], row[5]) for row in _ONE_LINEAR),
    *(
        Target("bfloat16", "forward", ours, theirs, "mean", least, shape)
        for shape, ours, theirs, least in _MIXED
    ),
)


class Verdict(NamedTuple):
    target: Target
    value: float | None = None
    cells: int = 0
    worst_cell: str | None = None
    worst: float | None = None

    @property
    def outcome(self) -> str:
        if self.target.least is None:
            return "-"
        if self.value is None:
            return "no number"
        return "met" if self.value >= self.target.least else "not met"


def setting_of(row: Row) -> Setting:
    return Setting(**row["setting"])


def mixed_part(content: Content) -> Content:
    return content.get("mixed", {"variants": {}, "rows": []})


def median(row: Row, key: str) -> float | None:
    """Seconds, or None where the variant has no number."""
    return row["variants"].get(key, {}).get("median_s")


def speed(row: Row, ours: str, theirs: str) -> float | None:
    """How many times as fast as ``theirs`` ours is, or None where one has no number."""
    ours_s, theirs_s = median(row, ours), median(row, theirs)
    return None if ours_s is None or theirs_s is None else theirs_s / ours_s


def cells_of(target: Target, content: Content) -> dict[str, Row]:
    """{cell: row} that a target speaks of: of one linear the grid of ``cases.CPU_SHAPES``, or all
    rows without dropout where a run has none of the grid."""
    if target.shape is not None:
        asked = segmented_cases.mixed("rows", target.shape)
        rows = mixed_part(content)["rows"]
        return {str(asked): row for row in rows if mixed_setting(row) == asked}
    found = {
        f"{s.shape} r={s.r}": row
        for row in content["rows"]
        if (s := setting_of(row)).p == 0 and (s.dtype, s.mode) == (target.dtype, target.mode)
    }
    return {cell: row for cell, row in found.items() if in_grid(setting_of(row))} or found


def in_grid(setting: Setting) -> bool:
    shape = (setting.m, setting.k, setting.n)
    return shape in CPU_SHAPES and setting.r in CPU_RANKS and setting.p == 0


def judge(target: Target, content: Content) -> Verdict:
    rows = cells_of(target, content)
    found = {
        cell: value
        for cell, row in rows.items()
        if (value := speed(row, target.ours, target.theirs)) is not None
    }
    if not found:
        return Verdict(target)
    worst_cell = min(found, key=found.__getitem__)
    mean = math.exp(sum(map(math.log, found.values())) / len(found))
    value = mean if target.statistic == "mean" else found[worst_cell]
    return Verdict(target, value, len(found), worst_cell, found[worst_cell])


def verdicts(content: Content) -> list[Verdict]:
    """One for each target of what was measured; none for another device."""
    if content["device"]["kind"] != "cpu":
        return []
    return [judge(target, content) for target in TARGETS if cells_of(target, content)]


def targets_table(content: Content) -> Table:
    head = ["dtype", "pass", "ours", "over", "of the cells", "times as fast", "target", "outcome"]
    head += ["cells", "worst cell", "there"]
    body = []
    for verdict in verdicts(content):
        t = verdict.target
        variants = (mixed_part(content) if t.shape else content)["variants"]
        names = [variants.get(key, {"label": key})["label"] for key in (t.ours, t.theirs)]
        line = [t.dtype, "mixed batch" if t.shape else MODES[t.mode], *names, t.statistic]
        line += [_ratio(verdict.value, 3), "-" if t.least is None else f">= {t.least:.3f}"]
        line += [verdict.outcome, str(verdict.cells), verdict.worst_cell or "-"]
        body.append([*line, _ratio(verdict.worst)])
    return head, body


def linear_table(content: Content) -> Table:
    """A line for each row of one linear."""
    head = ["M x K x N", "r", "dtype", "pass", "dropout"]
    roof, lines = content["roofline"], []
    for row in content["rows"]:
        s, found = setting_of(row), row["variants"]["fused"]
        work = s.work()
        flop_s = work["flop"] / roof["gemm_flop_per_s"][s.dtype]
        least = max(flop_s, work["bytes"] / roof["copy_bytes_per_s"])
        saved = f"{found['saved_bytes'] / 2**20:.2f}" if "saved_bytes" in found else "-"
        cells = [s.shape, str(s.r), s.short_dtype, s.mode, f"{s.p:g}"]
        lines.append((row, cells, [f"{least / found['median_s']:.0%}", saved]))
    return _table(content["variants"], head, lines, "fused", ["of roofline", "saved MiB"])


def mixed_table(content: Content) -> Table:
    """A line for each batch of mixed adapters. What is called "alone" is compared with our part
    alone; tables are built once per batch and in no other column, so theirs are times."""
    variants, rows = (mixed_part(content)[key] for key in ("variants", "rows"))
    measured = _measured(variants, rows)
    tables = [key for key in measured if key.endswith("table")]
    lines = []
    for row in rows:
        s = mixed_setting(row)
        cells = [s.shape, s.layer or "-", str(s.r), str(s.adapters), s.population, s.dtype]
        lines.append((row, cells, [_ms(median(row, key)) for key in tables]))
    head = ["M x K x N", "layer", "r", "adapters", "population", "dtype"]
    ours = "fused" if "fused" in measured else "segmented"
    return _table(variants, head, lines, ours, [f"{variants[key]['label']} ms" for key in tables])


def _table(
    variants: Content,
    head: list[str],
    lines: list[tuple[Row, list[str], list[str]]],
    ours: str,
    last: list[str],
) -> Table:
    """``lines``: a row, its first cells and its last ones; between them our time and how many times
    as fast as every other variant that is."""
    rivals = [
        key
        for key in _measured(variants, [row for row, *_ in lines])
        if key not in (ours, "segmented_part") and not key.endswith("table")
    ]
    body = []
    for row, first, rest in lines:
        beside = {key: "segmented_part" if key.endswith("_part") else ours for key in rivals}
        ratios = [_ratio(speed(row, beside[key], key)) for key in rivals]
        body.append([*first, _ms(median(row, ours)), *ratios, *rest, plans(row, ours)])
    labels = [f"/ {variants[key]['label']}" for key in rivals]
    return [*head, "ours ms", *labels, *last, "answered by"], body


def _measured(variants: Content, rows: Sequence[Row]) -> list[str]:
    return [key for key in variants if any(key in row["variants"] for row in rows)]


def plans(row: Row, key: str) -> str:
    """ "native, packed" or "vendor", or operator by operator where they differ."""
    answered = {op.removeprefix("lora_linear_"): p for op, p in row["plans"].get(key, {}).items()}
    packed = ", packed" if row.get("packed_copies", {}).get(key) else ""
    if len(set(answered.values())) <= 1:
        return next(iter(answered.values()), "-") + packed
    return ", ".join(f"{op} {plan}" for op, plan in answered.items()) + packed


def notes(content: Content) -> list[str]:
    """What has no number, and why; and which numbers are not to be trusted."""
    lines = []
    for part in (content, mixed_part(content)):
        variants, rows = part["variants"], part["rows"]
        reasons: Counter[str] = Counter()
        for key, reason in (missing for row in rows for missing in row["missing"].items()):
            version = f" ({variants[key]['version']})" if variants[key].get("peer") else ""
            reasons[f"no number for {variants[key]['label']}{version}: {reason}"] += 1
        lines += [f"{told} ({count} of {len(rows)} rows)" for told, count in reasons.items()]
        restless = sum(map(_is_restless, rows))
        lines += [f"the machine was busy: {restless} of {len(rows)} rows scatter"] * (restless > 0)
    for outcome, names in content["unmeasured"].items():
        lines += [f"{outcome}, so no row: {', '.join(names)}"] * bool(names)
    return lines


def _is_restless(row: Row) -> bool:
    """Whether the quartiles of the floor or of our own variant lie far apart."""
    found = [row["variants"].get(key) for key in ("plain", "fused", "segmented")]
    return any(v and v["q3_s"] - v["q1_s"] > _RESTLESS * v["median_s"] for v in found)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else number(seconds * 1e3)


def _ratio(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def headline(content: Content) -> list[str]:
    """Which machine, when, with what."""
    device, roof = content["device"], content["roofline"]
    on_cpu = device["kind"] == "cpu"
    what = [device["name"], device["arch"]]
    what += [f"{device['processors']} {'threads' if on_cpu else 'processors'}"]
    what += [f"native kernels: {device.get('native') or 'none'}"] * on_cpu
    gemm = [f"{name} {number(rate / 1e12)}" for name, rate in roof["gemm_flop_per_s"].items()]
    for name, rate in roof.get("own_gemm_flop_per_s", {}).items():
        gemm.append(f"{name} over our packed weight {number(rate / 1e12)}")
    return [
        ", ".join([*what, content["date"]]),
        ", ".join(f"{name} {value}" for name, value in content["versions"].items()),
        f"roofline, measured first: a GEMM of {roof['gemm_size']}^3 in TFLOP/s: {', '.join(gemm)}; "
        f"a copy, read + write: {number(roof['copy_bytes_per_s'] / 1e9)} GB/s",
    ]


_HOW = """\
Columns "/ X": how many times as fast as X ours is; 1.40 is 1.4x faster, below 1 is slower. Times
are medians of interleaved rounds with cold weights; every variant was held against float64 before
it was timed. "forward" records no gradient; "training" is forward and backward with a frozen
weight. "of roofline": FLOP at the GEMM's rate or bytes at the copy's, whichever takes longer, over
the time. "saved": what autograd keeps, x included. All numbers, quartiles too, are in the JSON."""
_OF_TARGETS = f"Set for a grid of {CELLS} cells per dtype and pass, without dropout."


def markdown(content: Content) -> str:
    lines = ["# Throughput of LoRA linear layers", "", *(f"- {line}" for line in headline(content))]
    lines += [f"- {note}" for note in notes(content)] + ["", _HOW, ""]
    described = content["variants"] | mixed_part(content)["variants"]
    of_variants = [[v["label"], v["version"], v["what"]] for v in described.values()]
    for title, table, below in (
        ("Targets", targets_table(content), _OF_TARGETS),
        ("One linear", linear_table(content), ""),
        ("Batches that mix adapters", mixed_table(content), ""),
        ("Variants", (["variant", "version", "what it is"], of_variants), ""),
    ):
        if table[1]:
            lines += [f"## {title}", "", piped(table), "", *([below, ""] if below else [])]
    return "\n".join(lines)
