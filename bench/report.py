"""The report of a run: text, JSON, Markdown and a picture, all of it from the JSON alone.

``python -m bench.report results.json`` writes the Markdown and the picture again, beside the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import bar, peers_report, segmented_cases, segmented_report
from .cases import MODES
from .picture import picture
from .rows import (
    Content,
    Row,
    Table,
    by_shape,
    groups,
    is_grid,
    median,
    milliseconds,
    number,
    plans,
    quotient,
    ranks_of,
    rates,
    ratio,
    setting_of,
)

JSON_NAME, MARKDOWN_NAME, PICTURE_NAME = "results.json", "report.md", "report.png"

# What the fused layer's time is divided by.
_RIVALS = ("plain", "packed", "addmm", "peft", "peft_fp32", "lorafusion", "unsloth")
# The quotients of a grid, cell by cell.
_QUOTIENTS = (
    ("fused", "plain"),
    ("fused", "packed"),
    ("unpacked", "plain"),
    ("always", "plain"),
    ("fused", "addmm"),
    ("fused", "peft"),
    ("fused", "peft_fp32"),
)


def write(content: Content, directory: Path) -> list[str]:
    """Write everything into ``directory``; returns a line about each file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / JSON_NAME
    judged = {"bar": bar.as_json(content), "mixed_bar": segmented_report.as_json(content)}
    path.write_text(json.dumps(content | judged, indent=1) + "\n")
    return [f"wrote {path}", *render(content, directory)]


def render(content: Content, directory: Path) -> list[str]:
    (directory / MARKDOWN_NAME).write_text(markdown(content))
    lines = [f"wrote {directory / MARKDOWN_NAME}"]
    if not content["rows"]:
        return lines
    try:
        picture(content, directory / PICTURE_NAME)
        lines.append(f"wrote {directory / PICTURE_NAME}")
    except ImportError as error:
        lines.append(f"no {PICTURE_NAME}: {error}")
    return lines


def _percent(value: float) -> str:
    return f"{value * 100:.0f}%"


def _mib(found: dict[str, Any] | None, key: str) -> str:
    return "-" if found is None or key not in found else number(found[key] / 2**20)


# Cells above a target that the terminal shows.
_FLOORS_SHOWN = 16

# Quartiles this far apart, as a part of the median, come from other work on the machine. A guess.
_RESTLESS = 0.25

# Columns of words; the others hold numbers.
_LEFT = (
    "M x K x N",
    "variant",
    "fused answered by",
    "dtype",
    "pass",
    "ratio of times",
    "over the cells",
    "bar",
    "worst cell",
    "above",
    "layer",
    "population",
    "ours answered by",
    "what it is",
    "version",
)


def times_table(content: Content, rows: Sequence[Row]) -> Table:
    """Milliseconds of every variant, and the fused layer's time divided by its rivals'."""
    keys = [key for key in content["variants"] if any(key in row["variants"] for row in rows)]
    rivals = [key for key in _RIVALS if key in keys]
    head = ["M x K x N", "r", *(content["variants"][key]["label"] for key in keys)]
    head += [f"fused / {content['variants'][key]['label']}" for key in rivals]
    head += ["fused answered by"]
    body = []
    for row in rows:
        setting = setting_of(row)
        line = [setting.shape, str(setting.r), *(milliseconds(median(row, key)) for key in keys)]
        line += [quotient(ratio(row, "fused", key)) for key in rivals]
        body.append([*line, plans(row)])
    return head, body


def ratios_table(content: Content, rows: Sequence[Row]) -> Table:
    """A grid's quotients: a line per shape, a column per quotient and rank."""
    ranks, shapes = ranks_of(rows), by_shape(rows)
    pairs = [
        (key, to) for key, to in _QUOTIENTS if any(ratio(row, key, to) is not None for row in rows)
    ]
    head = ["M x K x N", "plain ms"]
    for key, to in pairs:
        names = f"{content['variants'][key]['label']} / {content['variants'][to]['label']}"
        head += [f"{names} r={rank}" for rank in ranks]
    body = []
    for shape, found in shapes.items():
        plain = [seconds for row in found.values() if (seconds := median(row, "plain"))]
        line = [shape, milliseconds(statistics.median(plain) if plain else None)]
        for (key, to), rank in itertools.product(pairs, ranks):
            line += [quotient(ratio(found[rank], key, to)) if rank in found else "-"]
        body.append([*line, "; ".join(dict.fromkeys(map(plans, found.values())))])
    return [*head, "fused answered by"], body


def rates_table(content: Content, rows: Sequence[Row], keys: Iterable[str]) -> Table:
    """Rates and memory of the variants ``keys``, one line each."""
    peak = any("peak_bytes" in found for row in rows for found in row["variants"].values())
    saved = any("saved_bytes" in found for row in rows for found in row["variants"].values())
    head = [
        "M x K x N",
        "r",
        "variant",
        "ms",
        "quartiles",
        "tokens/s",
        "TFLOP/s",
        "GB/s",
        "of roofline",
    ]
    head += ["saved MiB"] * saved + ["peak MiB"] * peak
    body = []
    for row in rows:
        setting = setting_of(row)
        for key in keys:
            found, rate = row["variants"].get(key), rates(content, row, key)
            if found is None or rate is None:
                continue
            line = [setting.shape, str(setting.r), content["variants"][key]["label"]]
            line += [
                milliseconds(found["median_s"]),
                f"{milliseconds(found['q1_s'])} to {milliseconds(found['q3_s'])}",
            ]
            line += [number(rate[name]) for name in ("tokens", "tflops", "gbps")]
            line += [_percent(rate["share"])]
            line += [_mib(found, "saved_bytes")] * saved + [_mib(found, "peak_bytes")] * peak
            body.append(line)
    return head, body


def headline(content: Content) -> list[str]:
    """Which machine, when, with what."""
    device, roof = content["device"], content["roofline"]
    on_cpu = device["kind"] == "cpu"
    processors = f"{device['processors']} {'threads' if on_cpu else 'processors'}"
    what = [device["name"], device["arch"], processors, content["date"]]
    if on_cpu:
        # A report kept from before there were any has no such entry.
        what.insert(3, f"native kernels: {device.get('native') or 'none'}")
    gemm = _teraflops(roof["gemm_flop_per_s"])
    if roof.get("own_gemm_flop_per_s"):
        gemm += f"; our own, packed: {_teraflops(roof['own_gemm_flop_per_s'])}"
    cold = _COLD_CPU if on_cpu else _COLD_GPU
    return [
        ", ".join(what),
        ", ".join(f"{name} {value}" for name, value in content["versions"].items()),
        f"roofline measured first: library GEMM of {roof['gemm_size']}^3 in TFLOP/s: {gemm}; "
        f"copy, read + write: {number(roof['copy_bytes_per_s'] / 1e9)} GB/s",
        cold.format(cache=content["cache_bytes"] // 2**20),
    ]


def _teraflops(rates: dict[str, float]) -> str:
    return ", ".join(f"{name} {number(rate / 1e12)}" for name, rate in rates.items())


def notes(content: Content) -> list[str]:
    """What has no number, and why; and which numbers are not to be trusted."""
    missing: dict[str, dict[str, None]] = {}
    for row in content["rows"]:
        setting = setting_of(row)
        for key, reason in row["missing"].items():
            if peers_report.is_peer(content["variants"], key):
                continue
            where = missing.setdefault(f"{content['variants'][key]['label']}: {reason}", {})
            where[f"{setting.dtype} {MODES[setting.mode]}"] = None
    lines = [f"no number for {what} ({', '.join(where)})" for what, where in missing.items()]
    restless = [str(setting_of(row)) for row in content["rows"] if _is_restless(row, "fused")]
    restless += [
        str(segmented_cases.setting_of(row))
        for row in segmented_report.rows_of(content)
        if _is_restless(row, "segmented")
    ]
    if restless:
        lines.append(f"the machine was busy, repeat these: {', '.join(restless)}")
    for outcome, names in content["unmeasured"].items():
        if names:
            lines.append(f"{outcome}, so no row: {', '.join(names)}")
    return [*lines, *segmented_report.notes(content), *peers_report.lines(content)]


def _is_restless(row: Row, ours: str) -> bool:
    """Whether the quartiles of the floor or of our own variant lie far apart."""
    found = [row["variants"][key] for key in ("plain", ours) if key in row["variants"]]
    return any(v["q3_s"] - v["q1_s"] > _RESTLESS * v["median_s"] for v in found)


def summary(content: Content) -> str:
    """One line per row: the fused layer's time, and its ratios."""
    lines = headline(content)[:1]
    for title, rows in groups(content).items():
        head, body = times_table(content, rows)
        kept = [
            place
            for place, name in enumerate(head)
            if place < 2 or " / " in name or name in ("fused", "fused answered by")
        ]
        short = [[line[place] for place in kept] for line in [head, *body]]
        lines += ["", f"{title}: median ms, and ratios of time", _aligned((short[0], short[1:]))]
    return "\n".join([*lines, *notes(content)])


def text(content: Content) -> str:
    """For the terminal: a grid's ratios, other rows' times and ratios, the bar, notes."""
    lines = headline(content)
    for title, rows in groups(content).items():
        lines += ["", f"{title}: {_what(rows)}", _aligned(_row_table(content, rows))]
    if content["device"]["kind"] == "cpu":
        lines += ["", *_bar_text(content)]
    elif content["rows"]:
        lines += ["", "the fused layer's rates"]
        for title, rows in groups(content).items():
            lines += [f"{title}:", _aligned(rates_table(content, rows, ["fused"]))]
    return "\n".join([*lines, *_mixed_text(content), "", *notes(content)])


def _mixed_text(content: Content) -> list[str]:
    """The batches that mix adapters: quotients, and their criteria."""
    lines = []
    for title, rows in segmented_report.groups(content).items():
        table = segmented_report.ratios_table(content, rows)
        lines += ["", f"{title}: ratios of time", _aligned(table)]
    judged = segmented_report.criteria_table(content)
    if judged[1]:
        lines += ["", "the bar of mixed batches", _aligned(judged)]
    return lines


def _row_table(content: Content, rows: Sequence[Row]) -> Table:
    return ratios_table(content, rows) if is_grid(rows) else times_table(content, rows)


def _what(rows: Sequence[Row]) -> str:
    return "ratios of time" if is_grid(rows) else "median ms, and ratios of time"


def _bar_text(content: Content) -> list[str]:
    judged = bar.table(content)
    if not judged[1]:
        return []
    lines = []
    head, floors = bar.floors_table(content)
    if floors:
        lines += ["cells above a target that is not met, and what bounds them, worst first:"]
        lines += [_aligned((head, floors[:_FLOORS_SHOWN]))]
        more = len(floors) - _FLOORS_SHOWN
        lines += [f"and {more} more, in {MARKDOWN_NAME}"] * (more > 0) + [""]
    return [*lines, "the bar", _aligned(judged), bar.coverage(content)]


def _aligned(table: Table) -> str:
    head, body = table
    # A heading of several words takes several lines, so that the columns stay narrow.
    stacked = [name.replace(" / ", " /").split(" ") for name in head]
    stacked[0] = [head[0]]
    depth = max(map(len, stacked))
    lines = [
        [column[i - depth + len(column)] if i >= depth - len(column) else "" for column in stacked]
        for i in range(depth)
    ]
    lines += body
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {place for place, name in enumerate(head) if name in _LEFT}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def markdown(content: Content) -> str:
    lines = ["# Throughput of one LoRA linear layer", ""]
    lines += [*(f"- {line}" for line in headline(content)), ""]
    how = _HOW_GPU if content["device"]["kind"] == "cuda" else _HOW_CPU
    lines += [how.format(cold=2 * content["cache_bytes"] // 2**20)]
    lines += [_HOW.format(warmup=content["warmup"])]
    if unsaid := notes(content):
        lines += ["", *(f"- {note}" for note in unsaid)]
    lines += ["", "| variant | what it is | version |", "| --- | --- | --- |"]
    lines += [
        f"| {v['label']} | {v['what']} | {v['version']} |" for v in content["variants"].values()
    ]
    if content["rows"]:
        lines += [
            "",
            f"![time of each variant divided by that of the plain linear]({PICTURE_NAME})",
        ]
    lines += [""]
    if bar.verdicts(content):
        lines += [
            "## The bar",
            "",
            _piped(bar.table(content)),
            "",
            f"({bar.coverage(content)}.)",
            "",
        ]
        lines += [_HOW_BAR, ""]
    floors = bar.floors_table(content)
    if floors[1]:
        lines += [
            "### Cells above a target that is not met, and what bounds them",
            "",
            "Worst first.",
            "",
        ]
        lines += [_piped(floors), "", _HOW_FLOORS, ""]
    for title, rows in groups(content).items():
        if is_grid(rows):
            lines += [f"## {title}: ratios of time", "", _piped(ratios_table(content, rows)), ""]
    for title, rows in groups(content).items():
        lines += [f"## {title}", "", "Median ms, then ratios of time.", ""]
        lines += [_piped(times_table(content, rows)), ""]
    lines += ["## Rates and memory", ""]
    for title, rows in groups(content).items():
        # All variants of all cells of a grid are in the JSON.
        keys = ["plain", "packed", "fused"] if is_grid(rows) else content["variants"]
        lines += [f"### {title}", "", _piped(rates_table(content, rows, keys)), ""]
    return "\n".join([*lines, *_mixed_markdown(content)])


def _mixed_markdown(content: Content) -> list[str]:
    groups_of_mixed = segmented_report.groups(content)
    if not groups_of_mixed:
        return []
    lines = ["## Batches that mix adapters", "", segmented_report.HOW, ""]
    lines += [_piped(_variants_table(content["mixed"])), ""]
    judged = segmented_report.criteria_table(content)
    if judged[1]:
        lines += ["### The bar of mixed batches", "", _piped(judged), ""]
    for title, rows in groups_of_mixed.items():
        lines += [f"### {title}", "", _piped(segmented_report.ratios_table(content, rows)), ""]
        lines += ["Median ms.", "", _piped(segmented_report.times_table(content, rows)), ""]
    return lines


def _variants_table(content: Content) -> Table:
    variants = content["variants"].values()
    return ["variant", "what it is", "version"], [
        [v["label"], v["what"], v["version"]] for v in variants
    ]


_COLD_CPU = (
    "weights are cold: steps take turns among copies of the weight, packed ones included, that "
    "with their results exceed twice the last cache of {cache} MiB"
)
_COLD_GPU = "weights are cold: twice the L2 cache of {cache} MiB is read before every step"
_HOW_BAR = """\
"measured" is the geometric mean, or the worst, of the ratios of medians of the cells; "cells" is
how many have both numbers; a ratio without a target is there for comparison. The packed linear is
the fused layer's kernel without an adapter, so a ratio to it shows fusion without packing."""
_HOW_FLOORS = """\
"bytes at copy's rate": each operand and result, moved once per direction, at the bandwidth of a
copy; a step that mostly reads can be faster. "FLOP at our rate": at the rate of our own packed
GEMM, measured first. "plain at the same FLOP": the library's time for the plain linear, times the
adapted step's FLOP / the plain one's."""
_HOW_CPU = """\
Each step is called, and timed by the host's clock. Consecutive steps take turns among copies of the
weight that together with their results exceed {cold} MiB, twice the last cache (16 copies at most,
so a small layer stays in it)."""
_HOW_GPU = """\
Each step, backward included, is captured in a CUDA graph; events around its replay time it. {cold}
MiB, twice the L2 cache, are read before every replay, so that it finds none of its operands
there."""
_HOW = """\
Variants take turns round by round, in rotating order, after at most {warmup} rounds that do not
count; times are medians. x and dY are random and drawn anew for every round. Before a row is timed,
the outputs and gradients of every variant are held against float64 (on a CPU 64 rows of y and dX,
the first and the last among them, and all of dA and dB), with an adapter whose part is as large as
the base's. A ratio below 1 means that the fused layer is faster.

tokens/s, TFLOP/s, GB/s and the share of the roofline count what the mathematics needs: its FLOP,
and each operand and result moved once per direction; the plain and the merged linear are counted
without an adapter. The roofline is the larger of FLOP / GEMM rate and bytes / copy bandwidth; a
step that mostly reads can be above what a copy allows. "forward" records no gradient; "forward +
backward" computes the gradients of x, A and B with W frozen (of x alone without an adapter). "saved
MiB" is what autograd keeps between forward and backward, x included, parameters not; "peak MiB" is
the most that the step allocates."""


def _piped(table: Table) -> str:
    head, body = table
    rule = ["---" if name in _LEFT else "---:" for name in head]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *body])


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, help=f"a {JSON_NAME}")
    parser.add_argument("--out", type=Path, help="where to; default the folder of the JSON")
    chosen = parser.parse_args(arguments)
    try:
        content = json.loads(chosen.results.read_text())
        rows = content["rows"] or segmented_report.rows_of(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{chosen.results} is no report of bench: {error!r}")
    if not rows:
        parser.error(f"{chosen.results} has no rows")
    directory = chosen.out or chosen.results.parent
    directory.mkdir(parents=True, exist_ok=True)
    say(text(content))
    for line in render(content, directory):
        say(line)


if __name__ == "__main__":
    main()
