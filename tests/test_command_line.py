"""``python -m lora_kernels``."""

import os
import re
import subprocess
import sys

import pytest
import torch

import lora_kernels as lk
from lora_kernels import __main__ as cli
from lora_kernels.backends import tune
from lora_kernels.functional import ops
from lora_kernels.planning import device, plan, tables

# Processes are started.
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "cache"))
    plan.forget_tables()
    yield
    plan.forget_tables()


def test_the_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"lora_kernels {lk.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["tune", "--help"]])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_goes_away(arguments, buffered):
    """As in ``python -m lora_kernels | head -1``: no traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *["-u"] * (not buffered), "-m", "lora_kernels", *arguments]
    try:
        ran = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert ran.stderr == ""


def test_a_reader_that_goes_away_while_it_measures():
    """What was measured until then is kept."""
    options = ["--shapes", "4x16x8,2x8x8", "--r", "2", "--dtype", "fp32", "--seconds", "0.01"]
    command = [sys.executable, "-m", "lora_kernels", "tune", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert "tuning on" in running.stdout.readline()
        running.stdout.close()
        assert running.stderr.read() == ""
    assert tables.read_table(tune.table_path("cpu"))


def test_the_report_says_what_answers_and_why(capsys, monkeypatch):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for said in (f"lora_kernels {lk.__version__}", f"torch {torch.__version__}", "cpu:", "GPU:"):
        assert said in text
    assert "float64 is computed by the reference" in text
    answers = "native" if device.facts("cpu").native not in ("", "baseline") else "vendor"
    assert re.search(rf"^  float32\b.* by {answers}\b", text, re.MULTILINE)


def test_tune_from_the_command_line(capsys):
    options = ["--shapes", "4x16x8", "--r", "2", "--dtype", "fp32", "--seconds", "0.01"]
    assert cli.main(["tune", *options]) == 0
    text = capsys.readouterr().out
    assert "lora_linear_fwd" in text
    assert str(tune.table_path("cpu")) in text
    assert len(tables.read_table(tune.table_path("cpu"))) == len(ops.OPERATORS)


def test_tune_mixed_batches_from_the_command_line(capsys):
    options = ["--shapes", "4x16x8+3,2x8x8", "--r", "2", "--dtype", "fp32", "--seconds", "0.01"]
    chosen = ["--slots", "2", "--ops", "segmented_lora_,segmented_linear_fwd"]
    assert cli.main(["tune", *options, *chosen]) == 0
    assert "N 11 slots 2 slices 2" in capsys.readouterr().out
    assert len(tables.read_table(tune.table_path("cpu"))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("tune --shapes 4x16", "'4x16' is not MxKxN"),
        ("tune --shapes 4x16x8+8", "of batches with --slots"),
        ("tune --shapes 4x16x8 --ops segmented_lora", "an operator with --slots"),
        ("tune --shapes 4x16x8 --slots 2 --ops lora_shrink", "not an operator with --slots"),
        ("tune --shapes 4x16x0", "below 1"),
        ("tune --shapes 4x16x8 --dtype int8", "'int8' is none of"),
        ("tune --shapes 4x16x8 --ops lora_linear", "'lora_linear' is none of"),
        ("tune --shapes 4x16x8 --r 0", "--r must be at least 1"),
        ("tune", "--shapes"),
        ("tnue", "tnue"),
    ],
)
def test_a_typo_on_the_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_tuning_a_device_without_a_backend(capsys):
    assert cli.main(["tune", "--shapes", "4x16x8", "--device", "meta"]) == 1
    assert "nothing to tune on meta" in capsys.readouterr().err
