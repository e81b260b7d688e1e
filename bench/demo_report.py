"""The demo's report: checks, table, picture, all from what ``demo.run`` returns."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from .demo_processes import OURS, PEFT

Content = dict[str, Any]

JSON_NAME, TABLE_NAME, PICTURE_NAME = "demo.json", "demo.txt", "demo.png"

# What two roundings of the same float32 sums may differ by in the logits of the small model. It
# grows with depth, and how deep the user's models are is not known.
LIMIT, LIMIT_OF_USERS_MODEL = 1e-6, 1e-4


@dataclass(frozen=True)
class Check:
    """One line of the table; ``passed`` is True too where there is nothing to demand."""

    name: str
    measured: str
    demanded: str
    passed: bool


def write(content: Content, directory: Path) -> list[str]:
    """Write everything into ``directory``; returns the table and a line about each file."""
    lines = table(content)
    (directory / JSON_NAME).write_text(json.dumps(content, indent=1) + "\n")
    (directory / TABLE_NAME).write_text("\n".join(lines) + "\n")
    lines += ["", f"wrote {directory / JSON_NAME}, {TABLE_NAME}, adapter/"]
    try:
        picture(content, directory / PICTURE_NAME)
        lines.append(f"wrote {directory / PICTURE_NAME}")
    except ImportError as error:
        lines.append(f"no {PICTURE_NAME}: {error}")
    return lines


def checks(content: Content) -> list[Check]:
    """What must hold of a run."""
    ours = content["runs"][OURS]
    exact = content["base"]["dtype"] == "float32"

    rounded = LIMIT_OF_USERS_MODEL if content["settings"]["model"] else LIMIT

    def small(name: str, key: str, limit: float, demanded: bool = True) -> Check:
        value = ours[key]
        demand = f"< {limit:.0e}" if demanded else "only shown: not float32"
        return Check(name, f"{value:.1e}", demand, value < limit or not demanded)

    def true(name: str, value: bool) -> Check:
        return Check(name, "yes" if value else "no", "yes", value)

    found = [
        small("logits, merged against unmerged", "merged_difference", rounded, exact),
        true("unmerged: the same Parameter objects", ours["objects_restored"]),
        true("unmerged: every base weight, bit for bit", ours["weights_restored"]),
        small("logits, unmerged again", "unmerged_difference", LIMIT),
        small("logits, saved and loaded", "loaded_difference", LIMIT),
    ]
    if "loaded_by_peft_difference" in ours:
        found.append(
            small("logits, saved and loaded by PEFT", "loaded_by_peft_difference", rounded, exact)
        )
    answered = sum(count for *_, count in ours["answers"])
    found.append(Check("operator calls of one training step", str(answered), "> 0", answered > 0))
    return found + (serving_checks(content["serving"], exact) if content["serving"] else [])


def serving_checks(serving: Content, exact: bool) -> list[Check]:
    """What must hold of the adapters that were trained and served together."""
    own, others = (statistics.mean(serving[key].values()) for key in ("after", "others"))
    together, stream = serving["together"], serving["stream"]

    def tokens(name: str, part: Content) -> Check:
        same, rows = part["same_tokens"], part["rows"]
        demand = str(rows) if exact else "only shown: not float32"
        return Check(name, str(same), demand, same == rows or not exact)

    budget, base = together["error_over_budget"], together["base_over_budget"]
    evicts = stream["slots"] < together["adapters"]
    calls = sum(count for op, *_, count in together["answers"] if op == "segmented_linear_fwd")
    return [
        Check("packages by their own adapters, held-out loss", f"{own:.4f}", "", True),
        Check("  by each other's", f"{others:.4f}", "above", others > own),
        Check("rows of one batch with an adapter", *2 * [str(together["adapters"])], True),
        tokens("  whose tokens are their merged model's", together),
        Check("  error of their logits / budget", f"{budget:.2f}", "<= 1", budget <= 1),
        Check("  the same of the base's logits, at least", f"{base:,.0f}", "> 10", base > 10),
        Check("  calls of segmented_linear_fwd", str(calls), "> 0", calls > 0),
        tokens(f"rows through {stream['slots']} slots, tokens likewise", stream),
        Check(
            "  adapters that came back after eviction",
            str(stream["back_again"]),
            "> 0" if evicts else "only shown: all fit",
            stream["back_again"] > 0 or not evicts,
        ),
    ]


def serving_lines(serving: Content) -> list[str]:
    """What was trained and served together, and how fast."""
    names, stream = list(serving["ranks"]), serving["stream"]
    lines = [
        "",
        f"{len(names)} adapters, one for each of the standard library's largest packages, "
        f"trained in mixed batches: {serving['steps']} steps, "
        f"{serving['tokens_per_second']:,.0f} tokens/s",
    ]
    rows = [["  package", "rank", "held-out loss before", "after", "by another's adapter"]]
    for name in names:
        losses = [f"{serving[key][name]:.4f}" for key in ("before", "after", "others")]
        rows.append([f"  {name}", str(serving["ranks"][name]), *losses])
    lines += _aligned(rows)
    lines += [
        "",
        f"{stream['batches']} batches of requests, {stream['rows']} sequences; of a store of "
        f"{stream['slots']} slots {stream['brought_in']} adapters were evicted for others "
        f"({stream['back_again']} of them came back)",
    ]
    speeds = {name: serving["generated"] / s for name, s in serving["seconds"].items()}
    first = next(iter(speeds.values()))
    rows = [["  served by", "generated tokens/s", "the first / it"]]
    labels = {PEFT: "PEFT, adapter_names="}
    for name, speed in speeds.items():
        rows.append([f"  {labels.get(name, name)}", f"{speed:,.0f}", f"{first / speed:.2f}"])
    return lines + _aligned(rows)


def table(content: Content) -> list[str]:
    """The lines of the final table."""
    base, runs = content["base"], content["runs"]
    ours, theirs = runs[OURS], runs.get(PEFT)
    settings = content["settings"]
    pretraining = base["pretraining"]
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    lines = [
        "",
        f"{content['date']}  {base['device_name']}, {versions}",
        f"base     {settings.get('model') or base['model_class']}, "
        f"{_count(base['base_parameters'])} parameters, {base['dtype']}",
    ]
    if pretraining:
        lines.append(
            f"         pre-trained here for {pretraining['seconds']:.0f} s: "
            f"{len(pretraining['losses'])} steps, {_count(pretraining['tokens'])} bytes, "
            f"loss {pretraining['losses'][0]:.2f} -> {_smooth(pretraining['losses'])[-1]:.2f}"
        )
    lines += [
        f"text     {content['corpus']}",
        f"adapter  r={settings['rank']}, alpha={settings['alpha']:g}, "
        f"dropout={settings['dropout']:g} on {base['adapted_layers']} layers, "
        f"{_count(base['trainable_parameters'])} parameters",
        f"steps    {len(ours['losses'])} of {settings['steps']}, "
        f"{settings['batch']} x {settings['context']} tokens each, "
        f"learning rate {settings['learning_rate']:g}",
        "",
    ]
    lines += _aligned(_rows(base, ours, theirs))
    if theirs is None:
        lines.append("The comparison was left out: PEFT is not installed, or was not wanted.")
    else:
        lines += ["", loss_difference(content)]
    if content["serving"]:
        lines += serving_lines(content["serving"])
    else:
        lines += ["", "No adapters were served: this Python has no sources to train them on."]
    lines += ["", "checks"]
    lines += _aligned(
        [
            [f"  {check.name}", check.measured, check.demanded, "ok" if check.passed else "FAILED"]
            for check in checks(content)
        ]
    )
    lines += ["", "what answered one training step"]
    lines += _aligned(
        [
            [f"  {op}", f"{count} calls", f"backend {backend}, plan {plan}"]
            for op, backend, plan, count in ours["answers"]
        ]
    )
    if any(backend == "reference" for _, backend, *_ in ours["answers"]):
        lines.append("  the reference answered: no kernel of this package runs on this device")
    lines += ["", f"{content['prompt']!r} is continued (seeded sampling)"]
    for who, sample in (("base", base["sample"]), ("adapted", ours["sample"])):
        lines += [f"  by the {who} model:"]
        lines += [f"    | {line}" for line in (content["prompt"] + sample).splitlines()]
    return [*lines, "", f"all of it took {content['seconds']:.0f} s"]


def tokens_per_second(run: Content) -> float:
    """Of the median training step."""
    return run["tokens_per_step"] / run["step_quartiles"][1]


def loss_difference(content: Content) -> str:
    """How far the two training curves are apart, in words."""
    pairs = zip(*(content["runs"][name]["losses"] for name in (OURS, PEFT)), strict=True)
    largest = max(abs(ours - theirs) for ours, theirs in pairs)
    text = (
        f"training losses, step by step: max |difference| {largest:.1e}; same base, A, B, batches"
    )
    return f"{text}, but other dropout masks" if content["settings"]["dropout"] else text


def _rows(base: Content, ours: Content, theirs: Content | None) -> list[list[str]]:
    """The table proper: a header, then a row per figure."""
    rows = [["", OURS] if theirs is None else ["", OURS, PEFT, "ratio"]]

    def add(name: str, cells: list[str], ratio: float | None = None) -> None:
        if theirs is None:
            cells = cells[:1]
        elif ratio is not None:
            cells = [*cells, f"{ratio:.2f}"]
        rows.append([name, *cells])

    other = theirs or ours
    loss = "{:.4f}".format
    add("held-out loss before", [loss(base["before"])] * 2)
    add("held-out loss after", [loss(ours["after"]), loss(other["after"])])
    add("  merged", [loss(ours["merged"])])
    add("  unmerged again", [loss(ours["unmerged"])])
    speeds = [tokens_per_second(run) for run in (ours, other)]
    add("training tokens/s, median step", [f"{v:,.0f}" for v in speeds], speeds[0] / speeds[1])
    spread = "{0:,.0f} ({1:,.0f}-{2:,.0f})".format
    steps = [[1e3 * s for s in run["step_quartiles"]] for run in (ours, other)]
    add("  step, ms (its quartiles)", [spread(mid, low, high) for low, mid, high in steps])
    peaks = [run["memory"]["peak"] for run in (ours, other)]
    if None not in peaks:
        used = [run["memory"]["peak"] - run["memory"]["before"] for run in (ours, other)]
        add("peak memory, MB", [f"{v / 1e6:,.1f}" for v in peaks], peaks[0] / peaks[1])
        add("  added by training", [f"{v / 1e6:,.1f}" for v in used], used[0] / max(used[1], 1))
    return rows


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _count(number: int) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)


_WINDOW = 50


def _smooth(losses: list[float]) -> list[float]:
    """At every step the mean of the ``_WINDOW`` steps before it, or of as many as there are."""
    recent = (losses[max(0, end - _WINDOW) : end] for end in range(1, len(losses) + 1))
    return [sum(window) / len(window) for window in recent]


_COLOURS = {OURS: "#0b6e99", PEFT: "#e07b39"}


def picture(content: Content, path: Path) -> None:
    """Write the curves and the bars as a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    base, runs = content["base"], content["runs"]
    figure = Figure(figsize=(12, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    widths = [1.5, 1.5, 0.8, 0.8] if base["pretraining"] else [2.5, 0.8, 0.8]
    axes = list(figure.subplots(1, len(widths), width_ratios=widths))
    if base["pretraining"]:
        losses = base["pretraining"]["losses"]
        ax = axes.pop(0)
        steps = range(1, len(losses) + 1)
        ax.plot(steps, losses, color="#bbbbbb", linewidth=0.6, label="each step")
        ax.plot(steps, _smooth(losses), color="#333333", label=f"mean of the last {_WINDOW}")
        ax.legend(fontsize=8)
        ax.set(title="pre-training", xlabel="step", ylabel="training loss (nats per token)")
    ax, speed, memory = axes
    for name, run in runs.items():
        steps = range(1, len(run["losses"]) + 1)
        style = "-" if name == OURS else "--"
        ax.plot(steps, run["losses"], style, color=_COLOURS[name], label=f"{name}, training")
    for key, value, style in (
        ("before", base["before"], ":"),
        ("after", runs[OURS]["after"], "-."),
    ):
        ax.axhline(value, color="#999999", linestyle=style, label=f"held out, {key}: {value:.3f}")
    ax.set(title="fine-tuning", xlabel="step")
    ax.legend(fontsize=8, framealpha=0.9)
    _bars(speed, "training tokens/s", {n: tokens_per_second(r) for n, r in runs.items()})
    figures = {n: r["memory"] for n, r in runs.items()}
    if all(memory["peak"] for memory in figures.values()):
        added = {n: (m["peak"] - m["before"]) / 1e6 for n, m in figures.items()}
        _bars(memory, "MB added by training", added)
    else:
        memory.set_axis_off()
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"lora_kernels demo, {base['device_name']}, {content['date']}", fontsize=11)
    figure.savefig(path)


def _bars(ax: Any, title: str, values: dict[str, float]) -> None:
    colours = [_COLOURS[name] for name in values]
    bars = ax.bar(list(values), list(values.values()), width=0.6, color=colours)
    ax.bar_label(bars, fmt="{:,.0f}", padding=2)
    ax.set_title(title, fontsize=10)
    ax.margins(x=0.25, y=0.12)
