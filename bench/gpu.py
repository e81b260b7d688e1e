"""Everything to run on a machine with a GPU: tests, tuning, benchmarks, within ten minutes.

``python -m bench.gpu --out DIR`` runs, each under its own time limit and with its own log in DIR:

1. the tests of the GPU in bfloat16;
2. ``python -m lora_kernels tune`` for the shapes of the report, its tables in DIR/plans, with and
   without dropout, and for its batches that mix 8 adapters;
3. ``pytest bench`` with those tables: results.json, report.md. Others' kernels are in
   it where their copies were carried along (``--peers``, made by ``bench.peers``);
4. ``compute-sanitizer`` (memcheck, then racecheck) over the smallest kernel tests, where it is
   installed;
5. all tests, for as long as time is left.

A stage that fails or runs late does not keep the next from running: every row of the benchmarks
is checked by itself. ``summary.json`` and the exit status say what happened.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from . import report
from .cases import GPU_SHAPES, QUICK_SHAPES
from .peers import DEFAULT_DIRECTORY
from .segmented_cases import ADAPTERS, mixed_settings

_ROOT = Path(__file__).parent.parent
# What the whole run keeps back for starting Python and for writing down what was found.
_RESERVE_S = 20
# The benchmarks' part of it. Their rows stop beginning before the stage is stopped, so that the
# last of them ends and the report is written.
_BENCH_SHARE = 0.5
_LAST_ROW_S = 60


@dataclass
class Stage:
    """One command; ``share``: how much of the run's whole time it may take; ``tuned``: it writes or
    reads this run's tables of plans, where the others keep the user's.
    """

    name: str
    command: list[str]
    share: float
    tuned: bool = False
    status: str = "not run"
    seconds: float = 0.0
    last_line: str = ""

    @property
    def log(self) -> str:
        return self.name.replace(" ", "-") + ".log"

    def run(self, directory: Path, limit: float) -> None:
        start = time.monotonic()
        path = directory / self.log
        tables = {"LORA_KERNELS_CACHE": str(directory / "plans")} if self.tuned else {}
        with path.open("w") as log:
            process = subprocess.Popen(
                self.command,
                cwd=_ROOT,
                env=os.environ | tables,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit)
                self.status = "ok" if code == 0 else f"FAILED (exit status {code})"
            except subprocess.TimeoutExpired:
                # With what it has started: compilers, workers.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                self.status = f"STOPPED after {limit:.0f} s"
        self.seconds = time.monotonic() - start
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
        self.last_line = next((line for line in reversed(lines) if line), "")


def stages(
    out: Path, bench_seconds: float, quick: bool, peers: Path = DEFAULT_DIRECTORY
) -> list[Stage]:
    python = [sys.executable, "-m"]
    shapes = QUICK_SHAPES["cuda"] if quick else GPU_SHAPES
    shape_names = ",".join("x".join(map(str, shape)) for shape in shapes)
    bench = [*python, "pytest", "bench", "-q", "--bench-device", "cuda", "--report-dir", str(out)]
    bench += ["--time-limit", str(int(bench_seconds)), "--benchmark-columns", "median,iqr,rounds"]
    bench += ["--peers", str(peers)]
    on_gpu = "(cuda or gpu or kernels) and bfloat16"
    tune = [*python, "lora_kernels", "tune", "--shapes", shape_names, "--seconds", "0.7"]
    return [
        Stage("tests in bfloat16", [*python, "pytest", "tests", "-q", "-k", on_gpu], 0.16),
        Stage("tune with dropout", [*tune, "--dropout", "0.1"], 0.12, tuned=True),
        Stage("tune", tune, 0.12, tuned=True),
        *_mixed_stages(python, quick),
        Stage("bench", bench + ["--quick"] * quick, _BENCH_SHARE, tuned=True),
        *_sanitizer_stages(python),
        Stage("all tests", [*python, "pytest", "tests", "-q"], 1.0),
    ]


def _mixed_stages(python: list[str], quick: bool) -> list[Stage]:
    """Tuning of the report's batches of 8 adapters (the populations have others, and keep the
    heuristic), rank by rank."""
    shapes: dict[int, list[str]] = {}
    for setting in mixed_settings("cuda", quick=quick):
        if setting.adapters == ADAPTERS and setting.population == "modulo":
            shapes.setdefault(setting.r, []).append(setting.shape)
    tune = [*python, "lora_kernels", "tune", "--slots", str(ADAPTERS), "--seconds", "0.4"]
    tune += ["--ops", "segmented_lora_,segmented_linear_fwd"]
    return [
        Stage(
            f"tune mixed rank {r}",
            [*tune, "--r", str(r), "--shapes", ",".join(found)],
            0.08 / len(shapes),
            tuned=True,
        )
        for r, found in sorted(shapes.items())
    ]


def _sanitizer_stages(python: list[str]) -> list[Stage]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return []
    small = "(one and row or tiny or skinny_kernels) and bfloat16"
    tests = [*python, "pytest", "tests/kernels/test_kernels.py", "-q", "-x", "-k", small]
    return [
        Stage(check, [tool, "--tool", check, "--error-exitcode", "9", *tests], 0.1)
        for check in ("memcheck", "racecheck")
    ]


def run(out: Path, minutes: float, quick: bool, peers: Path = DEFAULT_DIRECTORY) -> int:
    out.mkdir(parents=True, exist_ok=True)
    # An earlier run's must not pass for this one's.
    (out / report.JSON_NAME).unlink(missing_ok=True)
    whole = minutes * 60 - _RESERVE_S
    end = time.monotonic() + whole
    planned = stages(out, _BENCH_SHARE * whole - _LAST_ROW_S, quick, peers)
    for stage in planned:
        limit = min(stage.share * whole, end - time.monotonic())
        if limit < 5:
            stage.status = "no time left"
        else:
            stage.run(out, limit)
        print(f"{stage.name}: {stage.status}, {stage.seconds:.0f} s", flush=True)
        (out / "summary.json").write_text(json.dumps([asdict(s) for s in planned], indent=1) + "\n")
    print(_table(planned, out), flush=True)
    return 0 if all(stage.status == "ok" for stage in planned) else 1


def _table(planned: list[Stage], out: Path) -> str:
    lines = []
    results = out / report.JSON_NAME
    if results.exists():
        lines += [report.summary(json.loads(results.read_text())), ""]
    width = max(len(stage.name) for stage in planned)
    for stage in planned:
        line = f"{stage.name:<{width}}  {stage.seconds:5.0f} s  {stage.status}"
        lines.append(f"{line}: {stage.last_line[:120]}" if stage.last_line else line)
    return "\n".join([*lines, f"logs and reports: {out}"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    default = os.environ.get("OUT") or _ROOT / "bench" / "out"
    parser.add_argument("--out", type=Path, default=Path(default), help="default $OUT or bench/out")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it; default 10")
    parser.add_argument("--quick", action="store_true", help="one shape: does all of it work?")
    parser.add_argument(
        "--peers", type=Path, default=DEFAULT_DIRECTORY, help="for pytest bench --peers"
    )
    chosen = parser.parse_args()
    if chosen.minutes < 3:
        parser.error("--minutes: it takes three at least")
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"bench.gpu needs a GPU, and torch {torch.__version__} sees none here; "
            "on a CPU, run: pytest bench"
        )
    sys.exit(run(chosen.out.resolve(), chosen.minutes, chosen.quick, chosen.peers.resolve()))


if __name__ == "__main__":
    main()
