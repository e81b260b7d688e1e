"""The demo's report: checks, table, picture, all from what ``__main__.run`` returns."""

from __future__ import annotations

import json
import statistics
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from .settings import OURS, PEFT

Content = dict[str, Any]

JSON_NAME, TABLE_NAME, PICTURE_NAME = "demo.json", "demo.txt", "demo.png"

# What two roundings of the same float32 sums may differ by in the logits of the small model. It
# grows with depth, and how deep the user's models are is not known.
LIMIT, LIMIT_OF_USERS_MODEL = 1e-6, 1e-4


class Check(NamedTuple):
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
    ours, exact = content["runs"][OURS], content["base"]["dtype"] == "float32"
    rounded = LIMIT_OF_USERS_MODEL if content["settings"]["model"] else LIMIT

    def small(name: str, key: str, limit: float, demanded: bool = True) -> Check:
        demand = f"< {limit:.0e}" if demanded else "shown: not float32"
        return Check(name, f"{ours[key]:.1e}", demand, ours[key] < limit or not demanded)

    def true(name: str, value: bool) -> Check:
        return Check(name, "yes" if value else "no", "yes", value)

    found = [
        small("logits, merged against unmerged", "merged_difference", rounded, exact),
        true("unmerged: the same Parameter objects", ours["objects_restored"]),
        true("unmerged: every base weight, bit for bit", ours["weights_restored"]),
        small("logits, unmerged again", "unmerged_difference", LIMIT),
        small("logits, saved and loaded", "loaded_difference", LIMIT),
    ]
    if (key := "loaded_by_peft_difference") in ours:
        found.append(small("logits, saved and loaded by PEFT", key, rounded, exact))
    answered = sum(count for *_, count in ours["answers"])
    found.append(Check("operator calls of one training step", str(answered), "> 0", answered > 0))
    if content["serving"]:
        found += serving_checks(content["serving"], exact, content["is_default"])
    return found


def serving_checks(serving: Content, exact: bool, is_default: bool) -> list[Check]:
    """What must hold of the adapters that were trained and served together. How well they learn is
    demanded of the demo's own model and texts only."""
    own, others = (statistics.mean(serving[key].values()) for key in ("after", "others"))
    together, stream = serving["together"], serving["stream"]

    def tokens(name: str, part: Content) -> Check:
        same, rows = part["same_tokens"], part["rows"]
        return Check(
            name, str(same), str(rows) if exact else "shown: not float32", same == rows or not exact
        )

    budget, base = together["error_over_budget"], together["base_over_budget"]
    calls, evicts = together["fused_calls"], stream["slots"] < together["adapters"]
    found = [Check("texts by their own adapters, held-out loss", f"{own:.4f}", "", True)]
    if together["adapters"] > 1:
        demand = "above" if is_default else "shown: your text"
        passed = others > own or not is_default
        found.append(Check("  by each other's", f"{others:.4f}", demand, passed))
    base_demand = "> 10" if is_default else "shown: your text"
    return [
        *found,
        tokens("rows of one batch whose tokens are their merged model's", together),
        Check("  error of their logits / budget", f"{budget:.2f}", "<= 1", budget <= 1),
        Check("  the same of the base's", f"{base:,.0f}", base_demand, base > 10 or not is_default),
        Check("  calls of segmented_linear_fwd", str(calls), "> 0", calls > 0),
        tokens(f"rows through {stream['slots']} slots, tokens likewise", stream),
        Check(
            "  adapters that came back after eviction",
            str(stream["back_again"]),
            "> 0" if evicts else "shown: all fit",
            stream["back_again"] > 0 or not evicts,
        ),
    ]


def faster(ours: float, theirs: float) -> str:
    """Of two speeds; one direction only."""
    return f"{ours / theirs:.2f}x as fast"


def table(content: Content) -> list[str]:
    """The lines of the final table."""
    base, runs, settings = content["base"], content["runs"], content["settings"]
    ours, theirs = runs[OURS], runs.get(PEFT)
    versions = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    lines = [
        "",
        f"{content['date']}  {base['device_name']}, {versions}",
        f"base     {settings['model'] or base['model_class']}, "
        f"{_count(base['base_parameters'])} parameters, {base['dtype']}",
    ]
    if made := base["pretraining"]:
        lines.append(
            f"         pre-trained here for {made['seconds']:.0f} s: {made['steps']} steps, "
            f"loss {made['first_loss']:.2f} -> {made['last_loss']:.2f}"
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
    lines += _aligned(_rows(content))
    if theirs is None:
        lines.append("The comparison was left out: PEFT is not installed, or was not wanted.")
    else:
        pairs = zip(ours["losses"], theirs["losses"], strict=True)
        largest = max(abs(one - other) for one, other in pairs)
        masks = ", but other dropout masks" * bool(settings["dropout"])
        lines += [f"Training losses differ by {largest:.1e} at most: same A, B, batches{masks}."]
    if content["serving"]:
        lines += serving_lines(content["serving"])
    else:
        lines += ["", "No adapters were served: there was no text that fills a block of tokens."]
    marks = [
        [f"  {c.name}", c.measured, c.demanded, "ok" if c.passed else "FAILED"]
        for c in checks(content)
    ]
    lines += ["", "checks", *_aligned(marks), "", "what answered one training step"]
    lines += _aligned(
        [
            [f"  {op}", f"{n} calls", f"{backend}: {plan}"]
            for op, backend, plan, n in ours["answers"]
        ]
    )
    return [*lines, "", f"all of it took {content['seconds']:.0f} s"]


def _rows(content: Content) -> list[list[str]]:
    """The table proper: a header, then a row per figure."""
    base, ours, theirs = content["base"], content["runs"][OURS], content["runs"].get(PEFT)
    saved = f"saved activations, MB, dropout {content['saved_at_dropout']:g}"
    runs = [ours, theirs] if theirs else [ours]
    ratios = ["", "", "", ""]
    if theirs:
        ratios[2] = faster(ours["tokens_per_second"], theirs["tokens_per_second"])
        ratios[3] = f"{theirs['saved_bytes'] / ours['saved_bytes']:.2f}x less"
    rows = [
        ["", OURS, PEFT][: 1 + len(runs)],
        ["held-out loss before", *[f"{base['before']:.4f}"] * len(runs)],
        ["held-out loss after", *[f"{run['after']:.4f}" for run in runs]],
        ["training tokens/s", *[f"{run['tokens_per_second']:,.0f}" for run in runs]],
        [saved, *[f"{run['saved_bytes'] / 1e6:,.1f}" for run in runs]],
    ]
    return [rows[0], *([*row, ratio] for row, ratio in zip(rows[1:], ratios, strict=True))]


def serving_lines(serving: Content) -> list[str]:
    """What was trained and served together, and how fast."""
    stream = serving["stream"]
    lines = [
        "",
        f"{len(serving['ranks'])} adapters, one for each text, trained in mixed batches: "
        f"{serving['steps']} steps, {serving['trained_tokens_per_second']:,.0f} tokens/s",
    ]
    rows = [["  text", "rank", "held-out loss before", "after", "by another's adapter"]]
    for name, rank in serving["ranks"].items():
        losses = [f"{serving[key][name]:.4f}" for key in ("before", "after", "others")]
        rows.append([f"  {name}", str(rank), *losses])
    lines += [
        *_aligned(rows),
        "",
        f"{stream['batches']} batches of requests, {stream['rows']} sequences; in a store of "
        f"{stream['slots']} slots {stream['evicted']} adapters were evicted for others "
        f"({stream['back_again']} of them came back)",
    ]
    labels = {PEFT: "PEFT, adapter_names="}
    speeds = serving["tokens_per_second"]
    rows = [["  served by", "generated tokens/s"]]
    rows += [[f"  {labels.get(name, name)}", f"{speed:,.0f}"] for name, speed in speeds.items()]
    if PEFT in speeds:
        for row, speed in zip(rows[1:], speeds.values(), strict=True):
            row.append(faster(speed, speeds[PEFT]))
        rows[0].append("beside PEFT")
    return lines + _aligned(rows)


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


_COLOURS = {OURS: "#0b6e99", PEFT: "#e07b39"}


def picture(content: Content, path: Path) -> None:
    """The gain as bars, and both losses in a small panel.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs, base = content["runs"], content["base"]
    bars = {
        "Training:\ntokens/s": ({n: r["tokens_per_second"] for n, r in runs.items()}, "faster"),
        f"Training: saved activations,\nMB at dropout {content['saved_at_dropout']:g}": (
            {n: r["saved_bytes"] / 1e6 for n, r in runs.items()},
            "less memory",
        ),
    }
    if content["serving"]:
        speeds = list(content["serving"]["tokens_per_second"].items())
        served = {OURS: speeds[0][1]} | {name: s for name, s in speeds if name == PEFT}
        bars["Serving mixed adapters:\ntokens/s"] = served, "faster"
    figure = Figure(figsize=(3.4 * (len(bars) + 1), 3.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(bars) + 1)
    for ax, (title, (values, word)) in zip(axes, bars.items(), strict=False):
        _bars(ax, title, values, word)
    ax = axes[-1]
    for name, run in runs.items():
        style, width = ("-", 2.2) if name == OURS else ("--", 1.2)
        losses = _smooth(run["losses"])
        steps = range(1, len(losses) + 1)
        ax.plot(steps, losses, style, color=_COLOURS[name], linewidth=width, label=name)
    ax.set_title("The same losses\n(mean of 10 steps)", fontsize=11)
    ax.set_xlabel("training step")
    ax.legend(fontsize=9, frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    model = content["settings"]["model"] or f"{base['model_class']}, made here"
    figure.suptitle(
        f"LoRA fine-tuning and serving: {Path(model).name}, {_count(base['base_parameters'])} "
        f"parameters, {base['dtype']}\n{base['device_name']}, {content['date']}",
        fontsize=11,
    )
    figure.savefig(path)


def _bars(ax: Any, title: str, values: dict[str, float], word: str) -> None:
    bars = ax.bar(list(values), list(values.values()), 0.6, color=[_COLOURS[n] for n in values])
    ax.bar_label(bars, fmt="{:,.0f}" if max(values.values()) >= 10 else "{:,.2f}", padding=2)
    if len(values) > 1:
        ratio = values[OURS] / values[PEFT]
        # Of memory less is better.
        ratio = 1 / ratio if word == "less memory" else ratio
        title += f"\n{ratio:.2f}x {word}" if ratio >= 1.005 else "\nno gain here"
    ax.set_title(title, fontsize=11)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.margins(x=0.2, y=0.14)


def _smooth(losses: list[float]) -> list[float]:
    """At every step the mean of the ten up to it, or of as many as there are."""
    recent = (losses[max(0, end - 10) : end] for end in range(1, len(losses) + 1))
    return [sum(window) / len(window) for window in recent]
