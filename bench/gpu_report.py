"""What ``bench.gpu`` found, as a page for each device and as lines for the README: ``python -m
bench.gpu report DIR...``, the folders of a smoke and of runs.

A plan that a check found wrong has no speed here. A ratio is to the plain product of the same row:
1.05 takes 5% longer.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .gpu import ROWS
from .tables import Table, number, piped

Line = dict[str, Any]
_PLANS = (
    *("vendor", "preload", "tail", "in_loop", "persistent", "producer"),
    *("skinny", "decode", "grouped"),
    # Of four-bit weights besides; that of bitsandbytes is the base alone.
    *("decoding_tail", "decoding_in_loop", "bitsandbytes"),
)
_BASE, _LAYERS = ("lora_linear_fwd", "lora_linear_dx"), ("plain", "addmm", "peft", "fused")


def read(folders: Iterable[Path]) -> dict[str, list[Line]]:
    """The lines by the name of their device."""
    found: dict[str, list[Line]] = defaultdict(list)
    for folder in folders:
        lines = [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]
        names = [line["facts"]["name"] for line in lines if line["kind"] == "device"]
        if not names:
            raise SystemExit(f"{folder / ROWS} does not say on which device it was measured")
        found[names[0]] += lines
    return found


def red(lines: list[Line]) -> set[tuple[str, str]]:
    """(operator, plan) of all that a check found wrong."""
    return {
        (line["op"], line["config"].split()[0])
        for line in lines
        if line["kind"] == "check" and line["error"]
    }


def operators(lines: list[Line]) -> list[Line]:
    """The timed rows, of each plan the fastest: {"best": {plan: (us, predicted)}} besides."""
    wrong = red(lines)
    rows = []
    for line in lines:
        if line["kind"] != "operator":
            continue
        best: dict[str, tuple[float, float | None]] = {}
        for label, us in line["us"].items():
            name = label.split()[0]
            if (line["work"]["op"], name) not in wrong and (name not in best or us < best[name][0]):
                best[name] = us, line["predicted_us"].get(label)
        rows.append(line | {"best": best})
    return rows


def size_of(work: Line) -> str:
    size = f"{work['m']} x {work['k']} x {'+'.join(map(str, work['n']))}"
    size += f", p {work['p']:g}" * (work["p"] > 0)
    size += f", {work['slots']} adapters" * (work["slots"] > 0)
    size += ", 4-bit" * work.get("four_bit", False)
    return size + f", {work.get('experts')} experts" * (work.get("experts", 0) > 0)


def operator_table(rows: list[Line]) -> Table:
    names = [name for name in _PLANS if any(name in row["best"] for row in rows)]
    body = []
    for row in rows:
        best, plain = row["best"], row["best"].get("plain", (None, None))[0]
        cells = [size_of(row["work"]), number(plain) if plain else "-"]
        for name in names:
            us, predicted = best.get(name, (None, None))
            if us is None:
                cells.append("-")
                continue
            cell = number(us) + (f" = {us / plain:.2f}" if plain else "")
            cells.append(cell if predicted is None else f"{cell} ({number(predicted)})")
        body.append(cells)
    return ["rows x in x out", "plain", *names], body


def layer_table(rows: list[Line]) -> Table:
    body = []
    for row in rows:
        setting = row["setting"]
        times = {key: found["median_s"] * 1e6 for key, found in row["variants"].items()}
        size = f"{setting['m']} x {setting['k']} x {setting['n']}, p {setting['p']:g}"
        cells = [f"{size}, {setting['mode']}"]
        for key in _LAYERS:
            cells.append(f"{number(times[key])} = {times[key] / times['plain']:.2f}"
                         if key in times and "plain" in times else "-")  # fmt: skip
        answered = row["plans"].get("fused", {})
        body.append([*cells, ", ".join(dict.fromkeys(answered.values()))])
    return ["rows x in x out, step", *_LAYERS, "ours by"], body


def bars(lines: list[Line]) -> Table:
    """The first light's bars, and whether they are met; what was not measured meets none."""
    rows, layers = operators(lines), [line for line in lines if line["kind"] == "layer"]

    def ratio(m: int, k: int, n: int, p: float) -> float | None:
        for row in rows:
            work = row["work"]
            if (work["op"], work["m"], work["k"], work["n"], work["p"]) == (
                "lora_linear_fwd", m, k, [n], p,
            ) and "plain" in row["best"] and not work.get("four_bit"):  # fmt: skip
                ours = [us for name, (us, _) in row["best"].items() if name != "plain"]
                return min(ours) / row["best"]["plain"][0] if ours else None
        return None

    def slower() -> float | None:
        times = [{k: v["median_s"] for k, v in layer["variants"].items()} for layer in layers]
        found = [t["fused"] / t["addmm"] for t in times if {"fused", "addmm"} <= t.keys()]
        return max(found, default=None)

    checks = [line for line in lines if line["kind"] == "family"]
    wrong = sum(line["wrong"] for line in checks)
    p0, p1 = ratio(8192, 4096, 4096, 0.0), ratio(8192, 4096, 4096, 0.1)
    asked: list[tuple[str, float | None, float]] = [
        ("calls that a check found wrong", float(wrong) if checks else None, 0.0),
        ("a layer's step over eager code at its best, the worst", slower(), 1.0),
        ("forward over plain, 8192 x 4096 x 4096", p0, 1.15),
        ("forward over plain, 8192 x 8192 x 8192", ratio(8192, 8192, 8192, 0.0), 1.08),
        ("the same, 4096 wide, p 0.1 over p 0", p1 / p0 if p0 and p1 else None, 1.02),
    ]
    body = []
    for what, value, most in asked:
        outcome = "not measured" if value is None else "met" if value <= most else "NOT met"
        body.append([what, "-" if value is None else f"{value:.2f}", f"{most:.2f}", outcome])
    return ["bar", "found", "at most", ""], body


def predictions(rows: list[Line]) -> Table:
    """By plan: how far off the planner's estimate is."""
    errors: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, (us, predicted) in row["best"].items():
            if predicted and row["work"]["op"] in _BASE:
                errors[name].append(math.log(us / predicted))
    body = []
    for name, found in errors.items():
        mean, worst = sum(found) / len(found), max(found, key=abs)
        body.append([name, str(len(found)), f"{math.exp(mean):.2f}", f"{math.exp(worst):.2f}"])
    return ["plan", "rows", "measured / predicted, mean", "the farthest"], body


def page(name: str, lines: list[Line]) -> str:
    first = next(line for line in lines if line["kind"] == "device")
    versions = ", ".join(f"{package} {v}" for package, v in first["versions"].items())
    text = [f"# First light: {name}", "", f"{first['date']}. {versions}. {first['smi']}.", ""]
    text += ["Microseconds = times the plain product (predicted).", "", "## Bars", ""]
    text += [piped(bars(lines)), ""]
    families = [line for line in lines if line["kind"] == "family"]
    if families:
        table = [[f["family"], str(f["right"]), str(f["wrong"])] for f in families]
        text += ["## Against float64", "", piped((["family", "right", "wrong"], table)), ""]
    rows = operators(lines)
    for op in dict.fromkeys(row["work"]["op"] for row in rows):
        chosen = [row for row in rows if row["work"]["op"] == op]
        text += [f"## {op}", "", piped(operator_table(chosen)), ""]
    layers = [line for line in lines if line["kind"] == "layer"]
    if layers:
        text += ["## Layers", "", piped(layer_table(layers)), ""]
    if any(row["work"]["op"] in _BASE for row in rows):
        text += ["## Predictions", "", piped(predictions(rows)), ""]
    floors = [line for line in lines if line["kind"] == "floors"]
    if floors:
        rates = {d: f"{r / 1e12:.0f} TFLOP/s" for d, r in floors[0]["gemm_flop_per_s"].items()}
        bandwidth = f"{floors[0]['copy_bytes_per_s'] / 1e12:.2f} TB/s"
        text += [f"Floors: the library's product {rates}, a copy {bandwidth}.", ""]
    failed = [line for line in lines if line["kind"] in ("failed", "step")]
    text += [f"- {line.get('what') or line['step']}: {line.get('error') or line['status']}"
             for line in failed]  # fmt: skip
    return "\n".join(text).rstrip() + "\n"


def readme(name: str, lines: list[Line]) -> list[str]:
    """Lines of the README's table of results: what was asked of the device, and what it gave."""
    _, body = bars(lines)
    return [f"| {name}: {what} | {found} | {most}: {outcome} |" for what, found, most, outcome in
            body if found != "-"]  # fmt: skip


def plot(lines: list[Line], path: Path) -> bool:
    """Bars of the forward's plans over the plain product; False without matplotlib."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return False
    rows = [row for row in operators(lines) if row["work"]["op"] == "lora_linear_fwd"]
    rows = [row for row in rows if "plain" in row["best"]]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.5 * len(rows)))
    for place, name in enumerate(_PLANS[:6]):
        found = [row["best"].get(name, (0.0, 0))[0] / row["best"]["plain"][0] for row in rows]
        axes.barh([i + 0.14 * place for i in range(len(rows))], found, 0.13, label=name)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks([i + 0.35 for i in range(len(rows))], [size_of(row["work"]) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("times the plain product")
    axes.legend()
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)
    return True


def main(folders: Sequence[Path]) -> None:
    for name, lines in read(folders).items():
        stem = "gpu-" + "-".join(name.lower().split())
        target = folders[0] / f"{stem}.md"
        target.write_text(page(name, lines))
        drawn = plot(lines, target.with_suffix(".png"))
        print(target.read_text(), *readme(name, lines), f"written: {target}", sep="\n")
        if not drawn:
            print("no plot: matplotlib is not installed")
