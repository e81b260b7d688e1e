"""``bench.gpu`` without a GPU: all of it against a stand-in, and the page of what it finds."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_report, gpu_work
from lora_kernels.planning.config import Config

ROOT = Path(__file__).parents[2]


def rehearse(command: str, out: Path, skip: str) -> list[dict[str, Any]]:
    """What a rehearsal finds; it must end well."""
    asked = [command, "--rehearse", "--out", str(out), "--skip", skip]
    ran = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *asked], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert (out / gpu.LOG).read_text() == ran.stdout
    # The tables, too, and nothing else: few files come back from such a machine.
    (out / "cuda-a-stand-in-sm-90.json").read_text()
    assert len([*out.iterdir()]) == 3
    return [json.loads(line) for line in (out / gpu.ROWS).read_text().splitlines()]


@pytest.mark.slow
def test_a_smoke_against_a_stand_in(tmp_path):
    pytest.importorskip("triton")
    lines = rehearse("smoke", tmp_path, "tail,in_loop,skinny,grouped,decode,producer")
    kinds = [line["kind"] for line in lines]
    assert kinds.count("operator") == 2 and {"device", "floors", "replay"} <= {*kinds}
    families = {line["family"]: line for line in lines if line["kind"] == "family"}
    assert {*families} == {"vendor", "preload", "persistent", "mixed", "four_bit", "experts"}
    assert all(line["right"] >= 6 and not line["wrong"] for line in families.values())
    (compiled,) = (line for line in lines if line["kind"] == "compiled")
    assert compiled["hits"] + compiled["misses"] > 0 and not compiled["failed"]
    for line in lines:
        if line["kind"] == "operator":
            assert {label.split()[0] for label in line["us"]} == {"plain", "vendor", "preload"}
            assert not line["wrong"]


@pytest.mark.slow
def test_a_run_against_a_stand_in_and_its_page(tmp_path, capsys):
    pytest.importorskip("triton")
    lines = rehearse("run", tmp_path, "tail,in_loop,persistent,grouped,decode,producer")
    expected = gpu_work.rows(True)
    assert [line["row"] for line in lines if "row" in line] == [*range(len(expected))]
    kinds = {line["kind"] for line in lines}
    assert {"operator", "layer", "far"} <= kinds and not kinds & {"failed", "step"}
    (four_bit,) = [line for line in lines if line.get("work", {}).get("four_bit")]
    assert four_bit["us"].keys() >= {"plain", "vendor"} and not four_bit["wrong"]
    assert (find_spec("bitsandbytes") is None) == ("bitsandbytes" not in four_bit["us"])
    gpu_report.main([tmp_path])
    printed = capsys.readouterr().out
    for heading in ("## Bars", "## lora_linear_dx", "## Layers", "## Predictions", "Floors:"):
        assert heading in printed
    assert (tmp_path / "gpu-a-stand-in.md").read_text() in printed


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_is_launched():
    """The binaries of tensors that nobody holds serve those that hold numbers."""
    pytest.importorskip("triton")
    machine = gpu_work.Machine(Path(), True, [])
    work = gpu_work.Work("lora_linear_fwd", 64, 128, (64,), 16, 0.1)
    run = gpu_work.operator(machine, work.op, Config("preload", 16, 128, 128, 0, 1, 4, 4))
    with gpu_work.compiling("sm_90") as counts:
        run(**work.arguments(torch.bfloat16, "meta"))
        first = dict(counts)
        run(**work.arguments(torch.bfloat16, "cpu"))
    assert sum(first.values()) == 1 and counts == first


def test_families_and_rows_are_all_there():
    assert [*gpu_work.OF_FAMILY] and {*gpu_work.OF_FAMILY} == {*gpu.FAMILIES}
    assert gpu.FAMILIES[-1] == "producer", "its tiles wait without an end"
    rows = gpu_work.rows(False)
    assert rows[0] == gpu_work.Work("lora_linear_fwd", 8192, 4096, (4096,))
    assert len(rows) == len({*rows}) and {type(row).__name__ for row in rows} == {
        "Work", "Layer", "Far",
    }  # fmt: skip


def test_a_row_that_ends_the_process_ends_no_more(tmp_path, monkeypatch):
    asked = []

    class Child:
        def __init__(self, command, *step, interpret=True):
            asked.append(step)
            self.dies = step[0] == "rows" and len([s for s in asked if s[0] == "rows"]) == 1
            if self.dies:
                with (command.out / gpu.ROWS).open("a") as file:
                    file.write('{"kind": "operator", "row": 3}\n')

        def wait(self, limit):
            return not self.dies

    monkeypatch.setattr(gpu, "Child", Child)
    gpu.Command(tmp_path, gpu.RUN_S, False, []).run()
    firsts = [step[step.index("--first") + 1] for step in asked if step[0] == "rows"]
    # Row 4 was being measured, and is not tried again.
    assert firsts == ["0", "5"]


def test_a_step_that_hangs_is_stopped_and_said(tmp_path, monkeypatch):
    command = gpu.Command(tmp_path, 100, False, [])
    monkeypatch.setattr(
        gpu.subprocess, "Popen", lambda arguments, **more: real(["sleep", "60"], **more)
    )
    assert not gpu.Child(command, "family", "tail").wait(0.1)
    (line,) = (tmp_path / gpu.ROWS).read_text().splitlines()
    assert "STOPPED" in json.loads(line)["status"] and not command.well


real = subprocess.Popen
DEVICE = {"kind": "device", "date": "today", "versions": {"triton": "3.6"}, "smi": "cool"}


def folder(path: Path, name: str, *lines: dict[str, Any]) -> Path:
    path.mkdir()
    every = [DEVICE | {"facts": {"name": name}}, *lines]
    (path / gpu.ROWS).write_text("".join(json.dumps(line) + "\n" for line in every))
    return path


def operator(us: dict[str, float], **work: Any) -> dict[str, Any]:
    usual = {"op": "lora_linear_fwd", "m": 8192, "k": 4096, "n": [4096], "p": 0.0, "slots": 0}
    predicted = {label: 400.0 for label in us if label != "plain"}
    return {"kind": "operator", "work": usual | work, "us": us, "predicted_us": predicted}


def test_the_page(tmp_path):
    times = {
        "plain": 360.0,
        "preload 32x128x128": 405.0,
        "preload 16x128x128": 420.0,
        "tail": 300.0,
    }
    wrong = {"kind": "check", "op": "lora_linear_fwd", "config": "tail 128x256x64", "error": "NaN"}
    one = folder(tmp_path / "one", "NVIDIA H200", operator(times), wrong)
    two = folder(tmp_path / "two", "NVIDIA H100", operator({"plain": 400.0, "vendor": 500.0}))
    found = gpu_report.read([one, two])
    assert {*found} == {"NVIDIA H200", "NVIDIA H100"}
    page = gpu_report.page("NVIDIA H200", found["NVIDIA H200"])
    assert "405 = 1.12 (400)" in page, "the fastest of the plan, its ratio, its prediction"
    assert "300" not in page and "500" not in page, "no speed of what is wrong or of another device"
    verdicts = {row[0]: row[1:] for row in gpu_report.bars(found["NVIDIA H200"])[1]}
    assert verdicts["forward over plain, 8192 x 4096 x 4096"] == ["1.12", "1.15", "met"]
    assert verdicts["forward over plain, 8192 x 8192 x 8192"][-1] == "not measured"
    slow = {row[0]: row[-1] for row in gpu_report.bars(found["NVIDIA H100"])[1]}
    assert slow["forward over plain, 8192 x 4096 x 4096"] == "NOT met"
    assert len(gpu_report.readme("NVIDIA H200", found["NVIDIA H200"])) == 1
