"""The picture of a report: every time divided by that of the plain linear."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from .rows import (
    Content,
    Row,
    by_shape,
    groups,
    is_grid,
    label,
    median,
    milliseconds,
    ranks_of,
    ratio,
    setting_of,
)

_COLOURS = {
    "plain": "#4d4d4d",
    "merged": "#9a9a9a",
    "eager": "#e6a64c",
    "compiled": "#c58adb",
    "addmm": "#5aa7d6",
    "peft": "#d9655b",
    "peft_fp32": "#9e2f35",
    "fused_fp32": "#7cc48a",
    "packed": "#4d4d4d",
    "unpacked": "#a8cf5f",
    "always": "#2b8c96",
    "fused": "#1f8a4c",
    "lorafusion": "#6c5fc7",
    "unsloth": "#c9a227",
}
_ROWS_PER_PANEL = 9

# What a grid shows beside the fused layer, and how: (variant, marker).
_BESIDE = (("packed", "_"), ("always", "x"), ("addmm", "."), ("peft", "."))


def picture(content: Content, path: Path) -> None:
    """Lines over the cells for groups that are a grid, else bars from zero."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows_of = {
        title: [row for row in rows if median(row, "plain") is not None]
        for title, rows in groups(content).items()
    }
    grids = {title: rows for title, rows in rows_of.items() if is_grid(rows)}
    if grids:
        figure = _grids(pyplot, content, grids)
    elif any(rows_of.values()):
        figure = _bars(pyplot, content, rows_of)
    else:
        return
    device = content["device"]
    figure.suptitle(
        "One LoRA linear: median time (line: quartiles) / that of the plain frozen linear, "
        "lower is better\n"
        f"{device['name']}, {content['date']}, torch {content['versions']['torch']}",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# A grid: a panel per dtype and mode, a line per rank.


def _grids(pyplot: Any, content: Content, grids: dict[str, list[Row]]) -> Any:
    figure, axes = pyplot.subplots(
        len(grids), 1, figsize=(13, 1.4 + 3.4 * len(grids)), squeeze=False, layout="constrained"
    )
    for panel, (title, rows) in zip(axes[:, 0], grids.items(), strict=True):
        _grid(panel, content, title, rows)
    return figure


def _grid(axes: Any, content: Content, title: str, rows: list[Row]) -> None:
    shapes, ranks = by_shape(rows), ranks_of(rows)
    step = 0.6 / len(ranks)
    offsets = {rank: (place + 0.5) * step - 0.3 for place, rank in enumerate(ranks)}
    for key, marker in _BESIDE:
        points = [
            (x + offsets[rank], value)
            for x, found in enumerate(shapes.values())
            for rank, row in found.items()
            if (value := ratio(row, key, "plain")) is not None
        ]
        if points:
            style = {"color": _COLOURS[key], "label": label(content, key), "markersize": 6}
            axes.plot(*zip(*points, strict=True), marker, **style)
    lowest, highest = 0.67, 1.33
    for rank, shade in zip(ranks, _shades(len(ranks)), strict=True):
        name: str | None = f"fused, r={rank}"
        for run in _runs([*shapes.values()]):
            found = {x + offsets[rank]: row[rank] for x, row in run if rank in row}
            values = [ratio(row, "fused", "plain") or math.nan for row in found.values()]
            style = {"color": shade, "markersize": 4, "linewidth": 1.2, "label": name}
            axes.plot([*found], values, "o-", **style)
            for x, row in found.items():
                _quartiles(axes, x, row, shade)
            lowest, highest = min([lowest, *values]), max([highest, *values])
            name = None
    axes.axhline(1.0, color=_COLOURS["plain"], linewidth=1.0, linestyle="--")
    names = []
    for shape, found in shapes.items():
        m, weight = shape.split("x", 1)
        plain = median(next(iter(found.values())), "plain")
        names.append(f"M={m}\n{weight}\n{milliseconds(plain)} ms")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    # A rival far off, or a quartile, must not flatten the lines.
    axes.set_ylim(0.9 * lowest, 1.2 * highest)
    axes.set_title(f"{title} (below each cell: the plain linear's time)", loc="left", fontsize=10)
    axes.set_ylabel("time / plain linear")
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def _runs(cells: list[dict[int, Row]]) -> list[list[tuple[int, dict[int, Row]]]]:
    """Neighbouring cells that share their weight's shape, with their places: a line joins these."""

    def weight(cell: tuple[int, dict[int, Row]]) -> tuple[int, int]:
        setting = setting_of(next(iter(cell[1].values())))
        return setting.k, setting.n

    return [[*run] for _, run in itertools.groupby(enumerate(cells), weight)]


def _shades(count: int) -> list[tuple[float, ...]]:
    """Greens from light to dark, one per rank."""
    import matplotlib

    return [matplotlib.colormaps["Greens"](0.45 + 0.55 * i / (count - 1)) for i in range(count)]


def _quartiles(axes: Any, x: float, row: Row, colour: str) -> None:
    plain, fused = median(row, "plain"), row["variants"].get("fused")
    if plain is not None and fused is not None:
        axes.plot([x, x], [fused["q1_s"] / plain, fused["q3_s"] / plain], color=colour, lw=0.8)


# Other rows: bars of every variant.


def _bars(pyplot: Any, content: Content, rows_of: dict[str, list[Row]]) -> Any:
    panels = [
        (title, rows[i : i + _ROWS_PER_PANEL])
        for title, rows in rows_of.items()
        for i in range(0, len(rows), _ROWS_PER_PANEL)
    ]
    measured = {key for rows in rows_of.values() for row in rows for key in row["variants"]}
    keys = [key for key in content["variants"] if key in measured and key != "plain"]
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
    return figure


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
        f"{row_setting.shape}\nr={row_setting.r}, plain {milliseconds(median(row, 'plain'))} ms"
        for row, row_setting in ((row, setting_of(row)) for row in rows)
    ]
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.set_xlim(-0.5, len(rows) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
