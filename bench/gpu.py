"""The first minutes on a GPU: a smoke of at most 150 s, then a run of at most 390 s.

``python -m bench.gpu smoke --out DIR``: facts and floors of the device, every family of kernels
against float64, graphs, and one shape by every plan. ``python -m bench.gpu run --out DIR --skip
FAMILY,...``: the rows of ``gpu_work.rows()`` in order of worth, for as long as time is left. Each
part is a process of its own with a time limit, since after one illegal access a process has no
device any more. What was found is appended line by line, so that a kill loses nothing:

    run.log       what was printed
    rows.jsonl    one result a line; ``python -m bench.gpu report DIR`` makes pages of it
    cuda-*.json   the table of the fastest plans so far, as ``lora_kernels tune`` writes it

``--rehearse`` runs all of it on this CPU and Triton's interpreter: is the script whole? Its times
mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path(__file__).parent.parent
ROWS, LOG = "rows.jsonl", "run.log"
# What each command may take in all, and after how long the rows stop beginning.
SMOKE_S, RUN_S, LAST_ROW_S = 150, 390, 340
# A process imports torch and Triton and makes a context in 6 to 10 s (a guess).
_FAMILY_S, _PLANS_S = 35, 45
# The producer's tiles wait for one another without an end: it comes last, and alone.
_LAST = "producer"


class Child:
    """One step in a process of its own."""

    def __init__(self, command: Command, *step: str, interpret: bool = True) -> None:
        self.command, self.step = command, " ".join(step)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "LORA_KERNELS_CACHE": str(command.out)}
        arguments = ["--out", str(command.out), "--skip", ",".join(command.skip)]
        if command.rehearse:
            arguments.append("--rehearse")
            environment["TRITON_INTERPRET"] = str(int(interpret))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu_steps", *step, *arguments],
            cwd=_ROOT,
            env=environment,
            start_new_session=True,
        )

    def wait(self, limit: float) -> bool:
        """Whether it ended well within ``limit`` seconds, and before the command's own end."""
        limit = min(limit * self.command.slower, self.command.left())
        status = f"STOPPED after {limit:.0f} s"
        try:
            code = self.process.wait(max(limit, 0.1))
            status = "" if code == 0 else f"FAILED with exit status {code}"
        except subprocess.TimeoutExpired:
            # With what it has started. First in a way that lets it write.
            for sign in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(self.process.pid, sign)
                try:
                    self.process.wait(5)
                    break
                except subprocess.TimeoutExpired:
                    continue
        if status:
            self.command.note({"kind": "step", "step": self.step, "status": status})
        return not status


class Command:
    """A smoke or a run: its folder, its clock, and its children."""

    def __init__(self, out: Path, seconds: float, rehearse: bool, skip: list[str]) -> None:
        self.out, self.rehearse, self.skip = out, rehearse, skip
        out.mkdir(parents=True, exist_ok=True)
        # An earlier run's must not pass for this one's.
        (out / ROWS).write_text("")
        # The interpreter takes its time.
        self.slower = 12 if rehearse else 1
        self.begin = time.monotonic()
        self.end = self.begin + self.slower * (seconds - 5)
        self.well = True

    def left(self) -> float:
        return self.end - time.monotonic()

    def note(self, line: dict[str, object]) -> None:
        self.well = False
        print(f"{line['step']}: {line['status']}", flush=True)
        with (self.out / ROWS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def prepare(self, what: str) -> None:
        """The device's facts and floors, and meanwhile the binaries that ``what`` needs."""
        workers = 1 if self.rehearse else max((os.cpu_count() or 4) - 2, 1)
        children = [Child(self, "device")]
        children += [
            Child(self, "compile", "--of", what, "--share", f"{i}/{workers}", interpret=False)
            for i in range(workers)
        ]
        for child in children:
            child.wait(60)
        self.say(f"{what}: compiled")

    def say(self, what: str) -> None:
        print(f"-- {time.monotonic() - self.begin:5.1f} s: {what}", flush=True)

    def smoke(self, families: list[str]) -> None:
        self.prepare("smoke")
        chosen = [name for name in families if name not in (*self.skip, _LAST)]
        # Each in a process of its own; a rehearsal is cheaper in one.
        alone = [chosen] if self.rehearse else [[name] for name in chosen]
        children = [Child(self, "family", *names) for names in alone]
        children.append(Child(self, "replay"))
        for child in children:
            child.wait(_FAMILY_S)
        self.say("families")
        Child(self, "plans").wait(_PLANS_S)
        if _LAST not in self.skip:
            Child(self, "family", _LAST).wait(_FAMILY_S)
        self.say("the producer")

    def run(self) -> None:
        self.prepare("run")
        last = self.begin + self.slower * LAST_ROW_S
        first = 0
        # What ended the process ends no more than its row.
        while (left := last - time.monotonic()) > 15:
            child = Child(self, "rows", "--first", str(first), "--seconds", f"{left:.0f}")
            if child.wait(RUN_S):
                break
            found = [line["row"] + 1 for line in self.lines() if "row" in line]
            first = 1 + max([first, *found])
        self.say("rows")

    def lines(self) -> list[dict[str, int]]:
        return [json.loads(line) for line in (self.out / ROWS).read_text().splitlines()]


# Those of gpu_work.OF_FAMILY; here since this process does without torch.
FAMILIES = ["vendor", "preload", "tail", "in_loop", "persistent", "skinny", "grouped", "decode"]
FAMILIES += ["mixed", "four_bit", "experts", _LAST]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("smoke", "run", "report"))
    parser.add_argument("folders", nargs="*", type=Path, help="of report: those of smokes and runs")
    default = os.environ.get("OUT") or _ROOT / "bench" / "out"
    parser.add_argument("--out", type=Path, default=Path(default), help="default $OUT or bench/out")
    parser.add_argument("--skip", default="", help="families: " + ",".join(FAMILIES))
    parser.add_argument("--rehearse", action="store_true", help="without a GPU; see above")
    chosen = parser.parse_args()
    if chosen.command == "report":
        from . import gpu_report

        gpu_report.main(chosen.folders or [chosen.out])
        return
    skip = [name for name in chosen.skip.split(",") if name]
    if unknown := set(skip) - set(FAMILIES):
        parser.error(f"--skip: there is no family {', '.join(sorted(unknown))}")
    seconds = {"smoke": SMOKE_S, "run": RUN_S}[chosen.command]
    command = Command(chosen.out.resolve(), seconds, chosen.rehearse, skip)
    # All that this process and its children print goes into the log, too.
    tee = subprocess.Popen(["tee", command.out / LOG], stdin=subprocess.PIPE)
    assert tee.stdin is not None
    kept = [os.dup(stream) for stream in (1, 2)]
    for stream in (1, 2):
        os.dup2(tee.stdin.fileno(), stream)
    try:
        command.smoke(FAMILIES) if chosen.command == "smoke" else command.run()
        command.say("all well" if command.well else "NOT all well")
    finally:
        # The log is whole before this process ends.
        for stream, before in zip((1, 2), kept, strict=True):
            os.dup2(before, stream)
        tee.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            tee.wait(10)
    sys.exit(not command.well)


if __name__ == "__main__":
    main()
