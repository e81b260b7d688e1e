"""The table of ``make memory``: what it counts, and a small run of it."""

import json
import math
import os
import time

import pytest
import torch
from torch import nn

import lora_kernels as lk
from bench import training_memory
from bench.training_memory import OURS, PEFT, call_apart
from lora_kernels.integrations.compare_memory import SavedTensors, step_peak

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

ROWS, WIDTH, RANK = 5, 24, 4
# Per layer: x and S, in float32.
X_BYTES, S_BYTES = 4 * ROWS * WIDTH, 4 * ROWS * RANK


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layers(count):
    return nn.ModuleList(lk.FusedLoRALinear(WIDTH, WIDTH, r=RANK) for _ in range(count))


def apart(module):
    return [*module.parameters(), *module.buffers()]


def inputs():
    return torch.randn(ROWS, WIDTH, requires_grad=True)


def test_a_layer_saves_x_and_s_and_its_parameters_do_not_count():
    (layer,) = module = layers(1)
    with SavedTensors(apart(module)) as saved:
        y = layer(inputs())
        assert saved.now == saved.peak == X_BYTES + S_BYTES
        y.sum().backward()
    assert saved.now == 0 and saved.peak == X_BYTES + S_BYTES


def test_what_is_shared_counts_once():
    module = layers(3)
    x = inputs()
    with SavedTensors(apart(module)) as saved:
        # Views of x are x.
        y = sum(
            layer(view) for layer, view in zip(module, (x, x.view(1, ROWS, -1)[0], x), strict=True)
        )
        assert saved.now == X_BYTES + 3 * S_BYTES
        y.sum().backward()
    assert saved.now == 0


def test_the_peak_is_that_of_one_micro_batch():
    (layer,) = module = layers(1)
    with SavedTensors(apart(module)) as saved:
        for _ in range(3):
            layer(inputs()).sum().backward()
        assert saved.peak == X_BYTES + S_BYTES
        kept = [layer(inputs()) for _ in range(3)]
        assert saved.peak == 3 * (X_BYTES + S_BYTES)
    del kept
    assert saved.now == 0


def test_the_peak_of_a_step_is_what_was_out_at_a_time():
    mib = 2**20

    def step():
        first = torch.empty(3 * mib, dtype=torch.uint8)
        del first
        second, third = (torch.empty(2 * mib, dtype=torch.uint8) for _ in range(2))
        del second, third

    assert step_peak(step, "cpu") == 4 * mib


def cell(**changes):
    return {"loss": 4.0, "answers": {"cpu: native": 3}} | changes


@pytest.mark.parametrize(
    ("ours", "problem"),
    [
        (cell(answers={}), "answered by no kernel"),
        (cell(answers={"cpu: native": 3, "reference: reference": 1}), "reference: reference"),
        (cell(loss=4.1), r"a loss of 4.1000, PEFT's is 4.0000"),
        (cell(loss=float("nan")), "a loss of nan"),
    ],
)
def test_a_cell_that_compares_nothing_is_a_failure(ours, problem):
    (found,) = training_memory.problems({PEFT: cell(answers={}), OURS: ours}, "cpu")
    assert found.startswith(OURS) and problem in found


def test_a_small_run(tmp_path, monkeypatch, capfd):
    pytest.importorskip("peft")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--quick", "--rows", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert training_memory.main(arguments) == 0
    content = json.loads((tmp_path / "memory.json").read_text())
    (row,) = content["rows"]
    cells = row["cells"]
    assert list(cells) == content["libraries"] and {PEFT, OURS} <= cells.keys()
    for measured in cells.values():
        assert measured["step_s"] > 0 and measured["steps"] >= 1
        assert measured["step_peak_bytes"] > measured["saved_bytes"] > 0
        assert measured["weight_bytes"] == cells[PEFT]["weight_bytes"]
    assert cells[OURS]["saved_bytes"] < cells[PEFT]["saved_bytes"]
    assert cells[OURS]["answers"] and not cells[PEFT]["answers"]
    lines = (tmp_path / "memory.md").read_text().splitlines()
    assert len(lines) == 4 + len(cells)
    assert lines[0].startswith(content["date"]) and "rank 16" in lines[0]
    assert all("(1.00x)" in line for line in lines[-len(cells) :])
    # One step was taken: its time would say nothing.
    assert "ms / step" not in lines[2]
    assert "wrote" in capfd.readouterr().out


def test_every_trick_is_measured_where_it_matters():
    """In one process: what each row changes is seen in its own number."""
    size = training_memory.SIZES["quick"]
    measured = [
        training_memory.measure(OURS, setting, size, "cpu") for setting in training_memory.SETTINGS
    ]
    baseline, accumulation, mixed, checkpointing, half, four = (m["saved_bytes"] for m in measured)
    assert accumulation < baseline / 3
    assert mixed < accumulation
    assert checkpointing < mixed / 2
    assert four <= half < checkpointing
    weights = [m["weight_bytes"] for m in measured]
    assert weights[:4] == weights[:1] * 4 and weights[5] < weights[4] < weights[0]
    assert not training_memory.problems({str(i): m for i, m in enumerate(measured[:5])}, "cpu")


def test_four_bits_are_those_of_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    *_, four = training_memory.SETTINGS
    size = training_memory.SIZES["quick"]
    cells = {
        library: training_memory.measure(library, four, size, "cpu")
        for library in (PEFT, OURS, training_memory.SWAPPED)
    }
    assert not training_memory.problems(cells, "cpu")
    assert len({measured["weight_bytes"] for measured in cells.values()}) == 1


def test_a_failed_cell_is_told_and_the_others_stand(tmp_path, monkeypatch, capfd):
    def answer(found):
        if found[0] == OURS:
            raise RuntimeError("measure failed: out of memory")
        return {"saved_bytes": 2**20, "step_s": 1.0} | cell(answers={})

    monkeypatch.setattr(training_memory, "_apart", answer)
    arguments = ["--quick", "--rows", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert training_memory.main(arguments) == 1
    text = (tmp_path / "memory.md").read_text()
    assert text.count("failed") and "1.0 (1.00x)" in text
    assert "out of memory" in capfd.readouterr().err


def test_no_times_on_a_busy_machine(tmp_path, monkeypatch):
    sizes = []

    def answer(found):
        sizes.append(found[2])
        return {"saved_bytes": 2**20, "step_s": 1.0} | cell()

    monkeypatch.setattr(training_memory, "_apart", answer)
    arguments = ["--rows", "1", "--device", "cpu", "--out", str(tmp_path)]
    for extra, shown in (([], True), (["--no-times"], False)):
        assert training_memory.main([*arguments, *extra]) == 0
        assert ("ms / step" in (tmp_path / "memory.md").read_text()) is shown
        assert (sizes[-1].seconds > 0) is shown and sizes[-1].hidden == 256


def test_a_call_apart_passes_on_what_goes_wrong(capfd):
    assert call_apart(math.sqrt, (16.0,), 60) == 4.0
    for call, said in (
        ((math.sqrt, (-1.0,), 60), "ValueError: "),
        ((os._exit, (3,), 60), "BrokenProcessPool: "),
        ((time.sleep, (60,), 1), "not done after 1 s"),
    ):
        with pytest.raises(RuntimeError, match=said):
            call_apart(*call)
