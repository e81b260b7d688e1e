"""The demo's report: checks, table, picture, all from what ``__main__.run`` returns."""

from __future__ import annotations

import json
import math
import statistics
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from bench.tables import count, told

from .settings import FOUR_BITS, OURS, PEFT

Content = dict[str, Any]
NAMES = ("demo.json", "demo.txt", "demo.png")

# What saving and unmerging may change; how far two computations of a user's float32 logits may be
# apart, whose depth is not known; and of the demo's own model, in roundings: each of the two is
# about one float32 rounding of the base's logits away from float64 (measured in every run).
LIMIT, LIMIT_OF_USERS_MODEL, ROUNDINGS = 1e-6, 1e-4, 4
# What four bits may change of the base's logits, of the held-out loss after fine-tuning, and leave
# of the weights' bytes. A right quantiser changes the logits by 0.01, one that takes the absmax of
# the neighbouring block by 0.24, which the loss does not show (2026-11-30).
FOUR_BIT_LOGITS, FOUR_BIT_LOSS, FOUR_BIT_SHARE = 0.1, 0.02, 0.5
_COLOURS = {OURS: "#0b6e99", PEFT: "#e07b39", FOUR_BITS: "#444444"}


class Check(NamedTuple):
    """One line of the table: what must hold, what was measured, and its least or most."""

    name: str
    measured: float
    least: float = -math.inf
    most: float = math.inf
    # Where False it is shown, and nothing is demanded.
    demanded: bool = True

    @property
    def passed(self) -> bool:
        return not self.demanded or self.least <= self.measured <= self.most

    def cells(self) -> list[str]:
        limit = f">= {_number(self.least)}" if self.most == math.inf else f"< {_number(self.most)}"
        limit = (
            "only shown"
            if not self.demanded
            else "yes"
            if isinstance(self.measured, bool)
            else limit
        )
        return [f"  {self.name}", _number(self.measured), limit, "ok" if self.passed else "FAILED"]


def checks(content: Content) -> list[Check]:
    """What must hold of a run."""
    ours, exact = content["runs"][OURS], content["base"]["dtype"] == "float32"
    own = content["settings"]["model"] is None
    rounded = ROUNDINGS * ours["rounding"] if own else LIMIT_OF_USERS_MODEL
    found = [
        Check("logits differ, merged from unmerged", ours["merged_difference"], 0, rounded, exact),
        Check("unmerged: the same Parameter objects", ours["objects_restored"], 1),
        Check("unmerged: every base weight, bit for bit", ours["weights_restored"], 1),
        Check("logits differ, unmerged again", ours["unmerged_difference"], 0, LIMIT),
        Check("logits differ, saved and loaded", ours["loaded_difference"], 0, LIMIT),
    ]
    if (by_peft := ours.get("loaded_by_peft_difference")) is not None:
        found.append(Check("logits differ, saved and loaded by PEFT", by_peft, 0, rounded, exact))
    calls = sum(count for *_, count in ours["answers"])
    found.append(Check("operator calls of one training step", calls, 1))
    found += four_bit_checks(content)
    serving = content["serving"]
    if serving is None:
        return found
    # How well adapters learn is demanded of the demo's own model and texts alone.
    own_text, together, stream = content["is_default"], serving["together"], serving["stream"]
    after, others = (statistics.mean(serving[key].values()) for key in ("after", "others"))
    several, evicts = together["adapters"] > 1, stream["slots"] < together["adapters"]
    gap, demanded = "held-out loss by another text's adapter, above its own's", own_text and several
    same, rows = "rows of one batch with their merged model's tokens", together["rows"]
    slots = f"rows through {stream['slots']} slots, likewise"
    apart, base_apart = together["difference"], together["base_difference"]
    return [
        *found,
        Check(gap, others - after, 1e-4, demanded=demanded),
        Check(same, together["same_tokens"], rows, demanded=exact),
        Check("  logits differ", apart, 0, 10 * rounded, exact),
        Check("  the base's differ", base_apart, 1e-3, demanded=own_text),
        Check("  calls of segmented_linear_fwd", together["fused_calls"], 1),
        Check(slots, stream["same_tokens"], stream["rows"], demanded=exact),
        Check("  adapters back after eviction", stream["back_again"], 1, demanded=evicts),
    ]


def four_bit_checks(content: Content) -> list[Check]:
    """Of the same fine-tuning over the base in four bits."""
    ours, four = content["runs"][OURS], content["four_bits"]
    apart, share = (
        abs(four["after"] / ours["after"] - 1),
        four["weight_bytes"] / ours["weight_bytes"],
    )
    # How much four bits change depends on the model: the demo knows its own.
    own = content["is_default"]
    return [
        Check("logits differ, base in four bits", four["difference"], 0, FOUR_BIT_LOGITS, own),
        Check("  held-out loss differs, both fine-tuned", apart, 0, FOUR_BIT_LOSS, own),
        Check("  bytes of the weights, over the plain ones'", share, 0, FOUR_BIT_SHARE),
    ]


def write(content: Content, directory: Path) -> list[str]:
    """Write everything into ``directory``; returns the table and a line about the files."""
    lines = table(content)
    data, page, image = (directory / name for name in NAMES)
    data.write_text(json.dumps(content, indent=1) + "\n")
    page.write_text("\n".join(lines) + "\n")
    names = f"{data}, {page.name}, adapter/, adapters/"
    try:
        picture(content, image)
        names += f", {image.name}"
    except ImportError as error:
        names += f"; no {image.name}: {error}"
    return [*lines, f"wrote {names}"]


def table(content: Content) -> list[str]:
    """The lines of the final page."""
    base, runs, settings = content["base"], content["runs"], content["settings"]
    ours, theirs = runs[OURS], runs.get(PEFT)
    lines = [
        "",
        told(content),
        f"base     {base['name']}, {count(base['parameters'])} parameters, {base['dtype']}",
    ]
    if made := base["pretraining"]:
        lines.append(
            f"         pre-trained here for {made['seconds']:.0f} s: {made['steps']} steps, "
            f"loss {made['first']:.2f} -> {made['last']:.2f}"
        )
    lines += [
        f"text     {content['corpus']}",
        f"adapter  r={settings['rank']}, alpha={settings['alpha']:g}, "
        f"dropout={settings['dropout']:g} on {base['adapted_layers']} layers, "
        f"{count(base['trainable_parameters'])} parameters",
        f"steps    {len(ours['losses'])} of {settings['steps']}, "
        f"{settings['batch']} x {settings['context']} tokens each, "
        f"learning rate {content['learning_rate']:g}",
        "",
    ]
    speeds, memory = (
        [run[k] for run in runs.values()] for k in ("tokens_per_second", "saved_bytes")
    )
    rows = [
        ["", *runs],
        ["held-out loss before", *[f"{base['before']:.4f}"] * len(runs)],
        ["held-out loss after", *(f"{run['after']:.4f}" for run in runs.values())],
        ["training tokens/s", *(f"{speed:,.0f}" for speed in speeds)],
        [
            f"saved activations, MB, dropout {content['saved_at_dropout']:g}",
            *(f"{size / 1e6:,.1f}" for size in memory),
        ],
    ]
    if theirs:
        rows[3].append(faster(*speeds))
        rows[4].append(f"{memory[1] / memory[0]:.2f}x less")
        apart = max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
        masks = ", but other dropout masks" * bool(settings["dropout"])
        said = f"Training losses differ by {apart:.1e} at most: same A, B, batches{masks}."
    else:
        said = "The comparison was left out: PEFT is not installed, or was not wanted."
    lines += [*_aligned(rows), said, *four_bit_lines(content)]
    if content["serving"]:
        lines += serving_lines(content["serving"])
    else:
        lines += ["", "No adapters were served: there was no text that fills a block of tokens."]
    lines += ["", "checks", *_aligned([check.cells() for check in checks(content)])]
    answers = (f"{n} {op} ({device}: {plan})" for op, device, plan, n in ours["answers"])
    lines += ["", f"what answered one training step: {', '.join(answers)}"]
    return [*lines, f"all of it took {content['seconds']:.0f} s"]


def four_bit_lines(content: Content) -> list[str]:
    """The same fine-tuning over the base in four bits, beside the plain one."""
    base, ours, four = content["base"], content["runs"][OURS], content["four_bits"]
    both, dtype = (ours, four), base["dtype"]
    losses = {"before": (base["before"], four["before"]), "after": (ours["after"], four["after"])}
    speeds = [run["tokens_per_second"] for run in both]
    rows = [["", f"{dtype} base", "NF4 base"]]
    for title, key in (
        ("weights below the adapters, MB", "weight_bytes"),
        (f"peak of a step, MB, dropout {content['saved_at_dropout']:g}", "peak_bytes"),
    ):
        plain, less = (run[key] for run in both)
        megabytes = [f"{size / 1e6:,.{2 if plain < 1e7 else 1}f}" for size in (plain, less)]
        ratio = plain / less
        rows.append([title, *megabytes, f"{ratio:.2f}x less" if ratio >= 1.005 else "no less"])
    rows += [[f"held-out loss {k}", *(f"{x:.4f}" for x in both)] for k, both in losses.items()]
    rows.append(["training tokens/s", *(f"{s:,.0f}" for s in speeds), faster(*reversed(speeds))])
    return [
        "",
        f"The same steps over lk.quantize_base (NF4, double quantisation), computed in {dtype}:",
        *_aligned(rows),
    ]


def serving_lines(serving: Content) -> list[str]:
    """What was trained and served together, and how fast."""
    stream, speeds = serving["stream"], serving["tokens_per_second"]
    rows = [["  text", "rank", "held-out loss before", "after", "by another's adapter"]]
    for name, rank in serving["ranks"].items():
        losses = [f"{serving[key][name]:.4f}" for key in ("before", "after", "others")]
        rows.append([f"  {name}", str(rank), *losses])
    served = [["  served by", "generated tokens/s"] + ["beside PEFT"] * (PEFT in speeds)]
    for name, speed in speeds.items():
        label = "PEFT, adapter_names=" if name == PEFT else name
        beside = [faster(speed, speeds[PEFT])] if PEFT in speeds else []
        served.append([f"  {label}", f"{speed:,.0f}", *beside])
    return [
        "",
        f"{len(serving['ranks'])} adapters, one for each text, trained in mixed batches: "
        f"{serving['steps']} steps, {serving['trained_tokens_per_second']:,.0f} tokens/s",
        *_aligned(rows),
        "",
        f"{stream['batches']} batches of requests, {stream['rows']} sequences; in a store of "
        f"{stream['slots']} slots {stream['evicted']} adapters were evicted for others "
        f"({stream['back_again']} of them came back)",
        *_aligned(served),
    ]


def faster(ours: float, theirs: float) -> str:
    """Of two speeds; one direction only."""
    return f"{ours / theirs:.2f}x as fast"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns as wide as their widest cell; the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


def _number(value: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or value == 0:
        return f"{value:,}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:,.4g}"


def picture(content: Content, path: Path) -> None:
    """The gain as bars, and both losses in a small panel.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs, base = content["runs"], content["base"]
    speeds = {name: run["tokens_per_second"] for name, run in runs.items()}
    saved = {name: run["saved_bytes"] / 1e6 for name, run in runs.items()}
    title = f"Training: saved activations,\nMB at dropout {content['saved_at_dropout']:g}"
    bars = [("Training:\ntokens/s", speeds, "faster"), (title, saved, "less memory")]
    if content["serving"]:
        (_, best), *others = content["serving"]["tokens_per_second"].items()
        served = {OURS: best} | {name: speed for name, speed in others if name == PEFT}
        bars.append(("Serving mixed adapters:\ntokens/s", served, "faster"))
    figure = Figure(figsize=(3.4 * (len(bars) + 1), 3.9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(bars) + 1)
    for ax, (title, values, word) in zip(axes, bars, strict=False):
        drawn = ax.bar(values.keys(), values.values(), 0.6, color=[_COLOURS[n] for n in values])
        ax.bar_label(drawn, fmt="{:,.0f}" if max(values.values()) >= 10 else "{:,.2f}", padding=2)
        if PEFT in values:
            ratio = values[OURS] / values[PEFT]
            # Of memory less is better.
            ratio = 1 / ratio if word == "less memory" else ratio
            title += f"\n{ratio:.2f}x {word}" if ratio >= 1.005 else "\nno gain here"
        ax.set_title(title, fontsize=11)
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
        ax.margins(x=0.2, y=0.14)
    for name, run in (runs | {FOUR_BITS: content["four_bits"]}).items():
        style, width = ("-", 2.2) if name == OURS else ("--", 1.2) if name == PEFT else (":", 1.4)
        recent = (run["losses"][max(0, end - 10) : end] for end in range(1, len(run["losses"]) + 1))
        losses = [statistics.mean(window) for window in recent]
        steps = range(1, len(losses) + 1)
        axes[-1].plot(steps, losses, style, color=_COLOURS[name], linewidth=width, label=name)
    title = "The same losses\n" if PEFT in runs else "Losses\n"
    axes[-1].set_title(f"{title}(mean of 10 steps)", fontsize=11)
    axes[-1].set_xlabel("training step")
    axes[-1].legend(fontsize=9, frameon=False)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"LoRA fine-tuning and serving: {Path(base['name']).name}, {count(base['parameters'])} "
        f"parameters, {base['dtype']}\n{content['device_name']}, {content['date']}",
        fontsize=11,
    )
    figure.savefig(path)
