"""The report of a run: text, JSON, Markdown and a picture, all of it from the JSON alone.

``python -m bench.report results.json`` writes the Markdown and the picture again, beside the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import MODES, Setting

Content = dict[str, Any]
Row = dict[str, Any]

JSON_NAME, MARKDOWN_NAME, PICTURE_NAME = "results.json", "report.md", "report.png"

# What the fused layer's time is divided by.
_RIVALS = ("plain", "addmm", "peft", "peft_fp32")


def write(content: Content, directory: Path) -> list[str]:
    """Write everything into ``directory``; returns a line about each file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / JSON_NAME
    path.write_text(json.dumps(content, indent=1) + "\n")
    return [f"wrote {path}", *render(content, directory)]


def render(content: Content, directory: Path) -> list[str]:
    (directory / MARKDOWN_NAME).write_text(markdown(content))
    lines = [f"wrote {directory / MARKDOWN_NAME}"]
    try:
        picture(content, directory / PICTURE_NAME)
        lines.append(f"wrote {directory / PICTURE_NAME}")
    except ImportError as error:
        lines.append(f"no {PICTURE_NAME}: {error}")
    return lines


# What a row says.


def setting_of(row: Row) -> Setting:
    return Setting(**row["setting"])


def median(row: Row, key: str) -> float | None:
    """Seconds, or None where the variant has no number."""
    found = row["variants"].get(key)
    return None if found is None else found["median_s"]


def ratio(row: Row, key: str, to: str) -> float | None:
    ours, theirs = median(row, key), median(row, to)
    return None if ours is None or theirs is None else ours / theirs


def rates(content: Content, row: Row, key: str) -> dict[str, float] | None:
    """tokens/s, TFLOP/s, GB/s and the share of the roofline, from :meth:`Setting.work`."""
    seconds = median(row, key)
    if seconds is None:
        return None
    setting, work = setting_of(row), row["work"][content["variants"][key]["work"]]
    roof = content["roofline"]
    least = max(
        work["flop"] / roof["gemm_flop_per_s"][setting.dtype],
        work["bytes"] / roof["copy_bytes_per_s"],
    )
    return {
        "tokens": setting.m / seconds,
        "tflops": work["flop"] / seconds / 1e12,
        "gbps": work["bytes"] / seconds / 1e9,
        "share": least / seconds,
    }


def plans(row: Row, key: str = "fused") -> str:
    """ "cpu: vendor", or operator by operator where they differ."""
    answered = {
        op.removeprefix("lora_linear_"): plan for op, plan in row["plans"].get(key, {}).items()
    }
    if len(set(answered.values())) == 1:
        return f"{row['backend']}: {next(iter(answered.values()))}"
    return f"{row['backend']}: " + ", ".join(f"{op} {plan}" for op, plan in answered.items())


def groups(content: Content) -> dict[str, list[Row]]:
    """{title: rows} of the same dtype, dropout and mode."""
    found: dict[str, list[Row]] = {}
    for row in content["rows"]:
        setting = setting_of(row)
        title = f"{setting.dtype}, {MODES[setting.mode]}, dropout {setting.p:g}"
        found.setdefault(title, []).append(row)
    return found


# Numbers and tables as text.


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def _times(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1e3)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value * 100:.0f}%"


def _mib(found: dict[str, Any] | None, key: str) -> str:
    return "-" if found is None or key not in found else number(found[key] / 2**20)


# Quartiles this far apart, as a part of the median, come from other work on the machine. A guess.
_RESTLESS = 0.25

Table = tuple[list[str], list[list[str]]]

# Columns of words; the others hold numbers.
_LEFT = ("M x K x N", "variant", "fused answered by")


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
        line = [setting.shape, str(setting.r), *(_times(median(row, key)) for key in keys)]
        line += [_ratio(ratio(row, "fused", key)) for key in rivals]
        body.append([*line, plans(row)])
    return head, body


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
                _times(found["median_s"]),
                f"{_times(found['q1_s'])} to {_times(found['q3_s'])}",
            ]
            line += [number(rate[name]) for name in ("tokens", "tflops", "gbps")]
            line += [_percent(rate["share"])]
            line += [_mib(found, "saved_bytes")] * saved + [_mib(found, "peak_bytes")] * peak
            body.append(line)
    return head, body


def headline(content: Content) -> list[str]:
    """Which machine, when, with what."""
    device, roof = content["device"], content["roofline"]
    processors = "threads" if device["kind"] == "cpu" else "processors"
    gemm = ", ".join(f"{name} {number(v / 1e12)}" for name, v in roof["gemm_flop_per_s"].items())
    return [
        f"{device['name']}, {device['arch']}, {device['processors']} {processors}, "
        f"{content['date']}",
        ", ".join(f"{name} {value}" for name, value in content["versions"].items()),
        f"roofline measured first: library GEMM of {roof['gemm_size']}^3 in TFLOP/s: {gemm}; "
        f"copy, read + write: {number(roof['copy_bytes_per_s'] / 1e9)} GB/s",
    ]


def notes(content: Content) -> list[str]:
    """What has no number, and why; and which numbers are not to be trusted."""
    reasons: dict[str, None] = {}
    for row in content["rows"]:
        for key, reason in row["missing"].items():
            label = content["variants"][key]["label"]
            reasons[f"{label}: no number in {row['setting']['dtype']}: {reason}"] = None
    restless = [str(setting_of(row)) for row in content["rows"] if _is_restless(row)]
    if restless:
        reasons[f"the machine was busy, repeat these: {', '.join(restless)}"] = None
    for outcome, names in content["unmeasured"].items():
        if names:
            reasons[f"{outcome}, so no row: {', '.join(names)}"] = None
    return list(reasons)


def _is_restless(row: Row) -> bool:
    """Whether the quartiles of the floor or of the fused layer lie far apart."""
    found = [row["variants"][key] for key in ("plain", "fused") if key in row["variants"]]
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
    """For the terminal: times and ratios of every row, the fused layer's rates, notes."""
    lines = headline(content)
    for title, rows in groups(content).items():
        lines += [
            "",
            f"{title}: median ms, and ratios of time",
            _aligned(times_table(content, rows)),
        ]
    lines += ["", "the fused layer's rates"]
    for title, rows in groups(content).items():
        lines += [f"{title}:", _aligned(rates_table(content, rows, ["fused"]))]
    return "\n".join([*lines, *notes(content)])


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
    lines += [
        "",
        f"![time of each variant divided by that of the plain linear]({PICTURE_NAME})",
        "",
    ]
    for title, rows in groups(content).items():
        lines += [f"## {title}", "", "Median ms, then ratios of time.", ""]
        lines += [_piped(times_table(content, rows)), ""]
    lines += ["## Rates and memory of every variant", ""]
    for title, rows in groups(content).items():
        lines += [f"### {title}", "", _piped(rates_table(content, rows, content["variants"])), ""]
    return "\n".join(lines)


_HOW_CPU = """\
Each step is called, and timed by the host's clock. Consecutive steps take turns among copies of the
weight that together exceed {cold} MiB, twice the last cache (16 copies at most, so a small layer
stays in it)."""
_HOW_GPU = """\
Each step, backward included, is captured in a CUDA graph; events around its replay time it. {cold}
MiB, twice the L2 cache, are read before every replay, so that it finds none of its operands
there."""
_HOW = """\
Variants take turns round by round, in rotating order, after {warmup} rounds that do not count;
times are medians. x and dY are random and drawn anew for every round. Before a row is timed, the
outputs and gradients of every variant are held against float64, with an adapter whose part is as
large as the base's. A ratio below 1 means that the fused layer is faster.

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


# The picture.

_COLOURS = {
    "plain": "#4d4d4d",
    "merged": "#9a9a9a",
    "eager": "#e6a64c",
    "compiled": "#c58adb",
    "addmm": "#5aa7d6",
    "peft": "#d9655b",
    "peft_fp32": "#9e2f35",
    "fused_fp32": "#7cc48a",
    "fused": "#1f8a4c",
}
_ROWS_PER_PANEL = 9


def picture(content: Content, path: Path) -> None:
    """Bars from zero: the time of each variant divided by that of the plain linear."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = []
    for title, rows in groups(content).items():
        rows = [row for row in rows if median(row, "plain") is not None]
        panels += [
            (title, rows[i : i + _ROWS_PER_PANEL]) for i in range(0, len(rows), _ROWS_PER_PANEL)
        ]
    if not panels:
        return
    keys = [key for key in content["variants"] if key != "plain"]
    figure, grid = pyplot.subplots(
        len(panels), 1, figsize=(13, 1.4 + 2.9 * len(panels)), squeeze=False, layout="constrained"
    )
    for axes, (title, rows) in zip(grid[:, 0], panels, strict=True):
        _panel(
            axes, title, rows, [key for key in keys if any(key in row["variants"] for row in rows)]
        )
    handles = {key: pyplot.Rectangle((0, 0), 1, 1, color=_COLOURS[key]) for key in keys}
    labels = [content["variants"][key]["label"] for key in handles]
    figure.legend(
        handles.values(), labels, loc="outside lower center", ncols=len(labels), frameon=False
    )
    device = content["device"]
    figure.suptitle(
        "One LoRA linear: median time (line: quartiles) / that of the plain frozen linear, "
        "lower is better\n"
        f"{device['name']}, {content['date']}, torch {content['versions']['torch']}",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axes: Any, title: str, rows: list[Row], keys: list[str]) -> None:
    width = 0.84 / max(len(keys), 1)
    ratios = [ratio(row, key, "plain") for row in rows for key in keys]
    # By the medians: a quartile far outside must not flatten the bars.
    top = 1.3 * max([1.0, *(value for value in ratios if value is not None)])
    for place, key in enumerate(keys):
        for x, row in enumerate(rows):
            value = ratio(row, key, "plain")
            if value is None:
                continue
            found, floor = row["variants"][key], row["variants"]["plain"]["median_s"]
            low, high = found["q1_s"] / floor, min(found["q3_s"] / floor, 0.93 * top)
            at = x - 0.42 + (place + 0.5) * width
            axes.bar(at, value, width * 0.92, color=_COLOURS[key])
            axes.plot([at, at], [low, high], color="#333333", linewidth=0.8)
            axes.annotate(
                f"{value:.2f}",
                (at, max(value, high)),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
            )
    axes.axhline(1.0, color=_COLOURS["plain"], linewidth=1.0, linestyle="--")
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_ylabel("time / plain linear")
    axes.set_ylim(0, top)
    names = [
        f"{row_setting.shape}\nr={row_setting.r}, plain {_times(median(row, 'plain'))} ms"
        for row, row_setting in ((row, setting_of(row)) for row in rows)
    ]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, help=f"a {JSON_NAME}")
    parser.add_argument("--out", type=Path, help="where to; default the folder of the JSON")
    chosen = parser.parse_args(arguments)
    try:
        content = json.loads(chosen.results.read_text())
        rows = content["rows"]
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
