"""Tokens per second of whole engines with many adapters: vLLM on a CPU without LoRA, with its own
and with ours, and transformers' continuous batching. ``python -m bench.engines``.

Every measurement is a process of its own, and those that are compared take turns. The model is a
small Llama with random weights; the requests of a batch use the adapters in turn. Timed is one
batch of requests from its first to its last token, after one whose prompts are cut to 64 tokens:
every adapter is loaded then, and every shape of a step was seen. A row that our kernels did not
compute is a failure, and so is the exit status then; a bar that is missed is shown. vLLM runs in
the environment of `make vllm`, transformers and PEFT in that of `make test`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from .command import Content, finish, parser_of
from .tables import piped, write

ROOT = Path(__file__).resolve().parents[1]
# tokens in, tokens out
WORKLOADS = {"decode": (32, 128), "prefill": (512, 16)}
RANKS = (8, 16, 32)
# Of a process: importing, starting and measuring, on a machine that does other things as well.
PROCESS_SECONDS = 3600


class Engine(NamedTuple):
    """``modes``: what every other is compared with first, ours last."""

    module: str
    python: str
    modes: tuple[str, ...]


ENGINES = {
    "vllm": Engine("bench.engine_vllm", ".venv-vllm/bin/python", ("none", "vllm", "ours")),
    "transformers": Engine(
        "bench.engine_transformers", ".venv/bin/python", ("merged", "peft", "ours")
    ),
}
LABELS = {"none": "no LoRA", "vllm": "vLLM's LoRA", "merged": "merged", "peft": "PEFT"}


class Bar(NamedTuple):
    """What ours has to be over another mode, in vLLM with 8 adapters."""

    workload: str
    theirs: str
    least: float
    hidden: tuple[int, ...]


BARS = (
    Bar("decode", "none", 0.90, (1024, 2048)),
    Bar("decode", "none", 0.80, (512,)),
    Bar("prefill", "none", 0.90, (512, 1024, 2048)),
    Bar("decode", "vllm", 5.0, (512, 1024, 2048)),
    Bar("prefill", "vllm", 5.0, (512, 1024, 2048)),
)

# Tokens per second by mode.
Rates = dict[str, "float | None"]
# Engine, mode, number of the run, and what its process is asked.
Task = tuple[str, str, int, dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = parser_of("engines", __doc__)
    add = parser.add_argument
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    add("--hidden", nargs="+", type=int, default=[512, 1024, 2048])
    add("--adapters", nargs="+", type=int, default=[1, 8, 32])
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--modes", nargs="+", help="of each engine; default: all")
    text = "float32 where the CPU has no instructions for bfloat16"
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help=text)
    add("--layers", type=int, default=4)
    add("--requests", type=int, default=32)
    add("--vocabulary", type=int, default=8192)
    add("--runs", type=int, default=3, help="processes of each kind")
    add("--quick", action="store_true", help="a tiny model, to see that all of it works")
    add("--profile", action="store_true", help="instead: what the time of one batch goes to")
    add("--report", type=Path, metavar="JSON", help="write the table and the picture again")
    args = parser.parse_args(arguments)
    if args.report:
        args.out = args.report.parent
        content = json.loads(args.report.read_text())
    else:
        content = run(args)
    picture(content, args.out / "engines.png")
    return finish("engines", content, table(content), args.out, content["failures"])


def run(args: argparse.Namespace) -> Content:
    if args.quick:
        args.hidden, args.adapters, args.layers, args.requests = [128], [1, 3], 2, 4
        args.runs, args.vocabulary = 1, 512
    workloads = {name: (8, 4) if args.quick else WORKLOADS[name] for name in args.workloads}
    asked = ("layers", "dtype", "requests", "vocabulary", "runs")
    settings = {key: getattr(args, key) for key in asked}
    content: Content = {
        "date": f"{datetime.now():%Y-%m-%d %H:%M}",
        "settings": settings | {"ranks": RANKS, "workloads": workloads},
        "engines": {},
        "rows": [],
        "profiles": [],
        "failures": [],
    }
    with tempfile.TemporaryDirectory() as work:
        for task in tqdm(list(_tasks(args, workloads, Path(work)))):
            _take(content, task)
            # A run that is cut short keeps what it has.
            write(content, table(content), args.out, "engines")
    return content


def _tasks(
    args: argparse.Namespace, workloads: dict[str, tuple[int, int]], work: Path
) -> Iterator[Task]:
    """In the order in which they are measured: by turns."""
    models = {hidden: _model(args, work / f"{hidden}", hidden) for hidden in args.hidden}
    runs = range(1 if args.profile else args.runs)
    for number, hidden, engine in itertools.product(runs, args.hidden, args.engines):
        for mode in ENGINES[engine].modes:
            if not args.modes or mode in args.modes:
                task = {"mode": mode, "hidden": hidden, "ranks": RANKS, "workloads": workloads}
                asked = ("dtype", "requests", "vocabulary", "profile")
                task |= {key: getattr(args, key) for key in asked}
                task |= {"adapters": [8] if args.profile else args.adapters, **models[hidden]}
                yield engine, mode, number, task


def _take(content: Content, task: Task) -> None:
    """Measure, and add what was found."""
    engine, mode, number, asked = task
    where = {"engine": engine, "mode": mode, "hidden": asked["hidden"], "run": number}
    name = f"{engine}, {mode}, hidden {asked['hidden']}"
    try:
        result = _process(ENGINES[engine], mode, asked)
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        content["failures"].append(f"{name}: {error}")
        return
    surroundings = {key: result[key] for key in ("device", "threads", "versions")}
    content["engines"].setdefault(engine, surroundings)
    if "profile" in result:
        content["profiles"].append(where | {"profile": result["profile"]})
        return
    answered = result["answers"]
    wrong = [answer for answer in answered if not answer.endswith(" cpu native")]
    if mode == "ours" and (wrong or not answered):
        content["failures"].append(f"{name}: answered by {wrong or 'none of ours'}")
    for row in result["rows"]:
        tokens = sum(asked["workloads"][row["workload"]][row["workload"] == "decode" :])
        rate = asked["requests"] * tokens / row["seconds"]
        content["rows"].append(where | row | {"tokens_per_s": rate})


def _model(args: argparse.Namespace, folder: Path, hidden: int) -> dict[str, Any]:
    """The model and its adapters on disk, made by a process that has torch and transformers."""
    count = max([8, *args.adapters])
    sizes = {"hidden": hidden, "layers": args.layers, "vocabulary": args.vocabulary}
    python = ROOT / ENGINES[args.engines[0]].python
    order = json.dumps({"folder": str(folder), "ranks": RANKS, "count": count, "sizes": sizes})
    subprocess.run([python, "-m", "bench.engine_models", order], cwd=ROOT, check=True)
    paths = [str(folder / "adapters" / f"adapter-{i}") for i in range(count)]
    return {"model": str(folder / "model"), "paths": paths}


def _process(engine: Engine, mode: str, task: dict[str, Any]) -> dict[str, Any]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "VLLM_PLUGINS": "lora_kernels" if mode == "ours" else "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if task["profile"] else "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [str(ROOT / engine.python), "-m", engine.module, json.dumps(task)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PROCESS_SECONDS
    )
    lines = done.stdout.splitlines()
    found = [line for line in lines if line.startswith(('{"rows"', '{"profile"'))]
    if done.returncode or not found:
        raise RuntimeError((done.stderr or done.stdout)[-1500:])
    return json.loads(found[-1])


def comparisons(content: Content) -> Iterator[tuple[dict[str, Any], Rates]]:
    """(engine, hidden, workload, adapters) and there of each mode the median of its runs."""
    keys = ("engine", "hidden", "workload", "adapters")
    found: dict[tuple[Any, ...], list[float]] = {}
    for row in content["rows"]:
        cell = (*(row[key] for key in keys), row["mode"])
        found.setdefault(cell, []).append(row["tokens_per_s"])
    medians = {cell: statistics.median(rates) for cell, rates in found.items()}
    for cell in dict.fromkeys(cell[:-1] for cell in found if cell[3]):
        # Without LoRA there are no adapters.
        yield (
            dict(zip(keys, cell, strict=True)),
            {
                mode: medians.get((*cell[:3], 0 if mode == "none" else cell[3], mode))
                for mode in ENGINES[cell[0]].modes
            },
        )


def table(content: Content) -> list[str]:
    lines = [f"# Engines, {content['date']}", ""]
    for engine, about in content["engines"].items():
        versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        lines.append(f"- {engine}: {about['device']}; {versions}")
    settings = content["settings"]
    cells = ("engine", "mode", "hidden", "workload", "adapters")
    counts = Counter(tuple(row[key] for key in cells) for row in content["rows"]).values()
    runs = sorted({min(counts), max(counts)}) if counts else [settings["runs"]]
    lines += [
        f"- Llama, {settings['layers']} layers, {settings['dtype']}, {settings['vocabulary']} "
        f"words; {settings['requests']} requests at once; adapters of ranks "
        f"{', '.join(map(str, settings['ranks']))} on all linear layers; "
        f"the median of {' to '.join(map(str, runs))} processes",
        "- decode: 32 tokens in, 128 out, tokens out per second; prefill: 512 in, 16 out, all "
        "tokens per second. A ratio above 1: ours has more tokens per second",
    ]
    for engine, (_, _, modes) in ENGINES.items():
        others = [mode for mode in modes if mode != "ours"]
        body = []
        for where, rates in comparisons(content):
            if where["engine"] == engine:
                line = [str(where[key]) for key in ("hidden", "workload", "adapters")]
                line += [_number(rates[mode], 0) for mode in modes]
                body.append([*line, *(_number(_ratio(rates, mode), 2) for mode in others)])
        if body:
            names = [LABELS[mode] for mode in others]
            head = ["hidden", "workload", "adapters", *names, "ours"]
            head += [f"ours over {name}" for name in names]
            lines += ["", f"## {engine}, tokens per second", "", piped((head, body))]
    lines += bars_table(content)
    for found in content["profiles"]:
        for workload, times in found["profile"].items():
            title = f"{found['engine']}, {found['mode']}, hidden {found['hidden']}, {workload}"
            body = [[key, f"{1e3 * value:.0f}"] for key, value in times.items()]
            lines += ["", f"## Where the time goes: {title}", ""]
            lines.append(piped((["operator", "ms of its own"], body)))
    return lines


def bars_table(content: Content) -> list[str]:
    body = []
    for where, rates in comparisons(content):
        for bar in BARS:
            here = where["engine"], where["adapters"], where["workload"]
            if here != ("vllm", 8, bar.workload) or where["hidden"] not in bar.hidden:
                continue
            value = _ratio(rates, bar.theirs)
            met = "no number" if value is None else "met" if value >= bar.least else "missed"
            line = [f"{where['hidden']}", bar.workload, f"ours over {LABELS[bar.theirs]}"]
            body.append([*line, _number(value, 2), f">= {bar.least:.2f}", met])
    if not body:
        return []
    head = ["hidden", "workload", "8 adapters", "ratio", "bar", "outcome"]
    return ["", "## Bars", "", piped((head, body))]


def _ratio(rates: Rates, theirs: str) -> float | None:
    ours, other = rates.get("ours"), rates.get(theirs)
    return ours / other if ours and other else None


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def picture(content: Content, path: Path) -> None:
    """vLLM's and ours as a part of the engine without LoRA."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Where it is, and its rates over those without LoRA.
    bars = [
        (where, {mode: (rate or 0.0) / rates["none"] for mode, rate in rates.items()})
        for where, rates in comparisons(content)
        if where["engine"] == "vllm" and rates["none"]
    ]
    workloads = list(dict.fromkeys(where["workload"] for where, _ in bars))
    if not bars:
        return
    figure, axes = pyplot.subplots(
        1, len(workloads), figsize=(6 * len(workloads), 4), squeeze=False
    )
    for axis, workload in zip(axes[0], workloads, strict=True):
        here = [bar for bar in bars if bar[0]["workload"] == workload]
        for offset, mode, label in ((-0.2, "vllm", "vLLM's LoRA"), (0.2, "ours", "ours")):
            heights = [over[mode] for _, over in here]
            axis.bar([i + offset for i in range(len(here))], heights, 0.4, label=label)
        ticks = [f"{where['hidden']}\n{where['adapters']}" for where, _ in here]
        axis.set_xticks(range(len(here)), ticks)
        axis.set_xlabel("hidden size, adapters in the batch")
        axis.set_ylabel("tokens/s over vLLM without LoRA")
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{workload}: {WORKLOADS[workload][0]} in, {WORKLOADS[workload][1]} out")
        # Room for the legend above the bars and the line.
        axis.set_ylim(0.0, 1.25 * max(1.0, *[over["ours"] for _, over in here]))
        axis.legend(loc="upper center", ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
