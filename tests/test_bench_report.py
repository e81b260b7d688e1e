"""The arithmetic of bench's report: the CPU's targets, and what is said where numbers are missing.
The measuring itself is tested by measuring: every row of bench checks its variants first."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch

from bench import bar, cases, checks, report
from bench.bar import Criterion
from bench.cases import CPU_RANKS, CPU_SHAPES, Setting
from bench.rows import is_grid

LABELS = {"plain": "plain linear", "packed": "packed linear", "peft": "PEFT", "fused": "fused"}


def row(
    times: dict[str, float],
    shape: tuple[int, int, int] = (1, 2048, 2048),
    r: int = 8,
    p: float = 0.0,
    dtype: str = "bfloat16",
    mode: str = "forward",
) -> dict[str, Any]:
    setting = Setting(*shape, r, 16, p, dtype, mode)
    return {
        "setting": asdict(setting),
        "work": {"adapter": setting.work(True), "plain": setting.work(False)},
        "variants": {
            key: {"median_s": value, "q1_s": value, "q3_s": value, "rounds": 5}
            for key, value in times.items()
        },
        "missing": {},
        "backend": "cpu",
        "plans": {"fused": {"lora_linear_fwd": "native"}},
        "packed_copies": {"fused": 1},
    }


def content(*rows: dict[str, Any], kind: str = "cpu") -> dict[str, Any]:
    return {
        "date": "today",
        "device": {"kind": kind, "name": "a machine", "arch": "avx512", "processors": 2},
        "versions": {"torch": "2"},
        "roofline": {
            "gemm_size": 2048,
            "gemm_flop_per_s": {"bfloat16": 1e12, "float32": 1e11},
            "own_gemm_flop_per_s": {"bfloat16": 2e12},
            "copy_bytes_per_s": 1e10,
        },
        "cache_bytes": 2**25,
        "warmup": 3,
        "variants": {
            key: {"label": name, "what": "", "version": "", "work": "plain"}
            for key, name in LABELS.items()
        },
        "rows": [*rows],
        "unmeasured": {},
    }


MEAN = Criterion("bfloat16", "forward", "fused", "plain", "mean", 1.0)
WORST = Criterion("bfloat16", "forward", "fused", "plain", "worst", 1.15)
FASTER = Criterion("bfloat16", "forward", "peft", "fused", "mean", 1.3, at_least=True)


def test_the_mean_is_geometric():
    # Twice as slow and twice as fast is even; an arithmetic mean would say 1.25.
    rows = [row({"plain": 1.0, "fused": 2.0}), row({"plain": 1.0, "fused": 0.5}, r=16)]
    verdict = bar.judge(MEAN, rows)
    assert verdict.value == pytest.approx(1.0)
    assert verdict.cells == 2
    assert bar.geometric_mean([1.0, 10.0, 100.0]) == pytest.approx(10.0)


def test_the_worst_cell_is_named():
    rows = [
        row({"plain": 1.0, "fused": 1.0}),
        row({"plain": 2.0, "fused": 2.4}, shape=(16, 4096, 4096), r=64),
        row({"plain": 9.0, "fused": 9.9}, r=16),
    ]
    verdict = bar.judge(WORST, rows)
    assert verdict.value == pytest.approx(1.2)
    assert verdict.worst_cell == "16x4096x4096 r=64"
    assert verdict.outcome == "not met"


def test_of_a_least_value_the_worst_is_the_smallest():
    rows = [row({"peft": 1.5, "fused": 1.0}), row({"peft": 1.2, "fused": 1.0}, r=64)]
    verdict = bar.judge(FASTER, rows)
    assert verdict.worst == pytest.approx(1.2)
    assert verdict.value == pytest.approx(math.sqrt(1.8))
    assert verdict.outcome == "met"


@pytest.mark.parametrize(
    "criterion, value, outcome",
    [
        (MEAN, 1.0, "met"),
        (MEAN, 1.01, "not met"),
        (FASTER, 1.3, "met"),
        (FASTER, 1.29, "not met"),
        (Criterion("bfloat16", "forward", "fused", "plain", "worst"), 9.0, "-"),
    ],
)
def test_met_or_not(criterion, value, outcome):
    verdict = bar.judge(criterion, [row({criterion.of: value, criterion.to: 1.0})])
    assert verdict.outcome == outcome


def test_a_missing_variant_is_no_success():
    rows = [row({"plain": 1.0, "fused": 0.9})]
    verdict = bar.judge(FASTER, rows)
    assert (verdict.value, verdict.cells, verdict.outcome) == (None, 0, "no number")
    both = [*rows, row({"peft": 2.0, "fused": 1.0}, r=16)]
    assert bar.judge(FASTER, both).cells == 1


def test_only_its_own_dtype_and_mode_count():
    rows = [
        row({"plain": 1.0, "fused": 1.0}),
        row({"plain": 1.0, "fused": 5.0}, dtype="float32"),
        row({"plain": 1.0, "fused": 5.0}, mode="training"),
    ]
    assert bar.judge(WORST, rows).value == pytest.approx(1.0)


def test_the_grid_is_what_a_cpu_measures_by_default():
    settings = cases.settings("cpu")
    grid = [setting for setting in settings if bar.in_grid(setting)]
    kinds = {(setting.dtype, setting.mode) for setting in grid}
    assert kinds == {(c.dtype, c.mode) for c in bar.CRITERIA}
    assert len(grid) == len(kinds) * bar.CELLS == 4 * 45
    assert all(setting.p > 0 for setting in settings if setting not in grid)


def test_rows_outside_the_grid_do_not_count_beside_it():
    inside = row({"plain": 1.0, "fused": 1.0})
    outside = row({"plain": 1.0, "fused": 3.0}, shape=(64, 512, 512))
    dropout = row({"plain": 1.0, "fused": 3.0}, p=0.1)
    assert bar.judged_rows(content(inside, outside, dropout)) == [inside]
    assert bar.judged_rows(content(outside, dropout)) == [outside]
    assert "none of them" in bar.coverage(content(outside))
    assert "only 1" in bar.coverage(content(inside))


def test_a_whole_grid_is_said_to_be_one():
    rows = [row({"plain": 1.0, "fused": 0.9}, shape, r) for shape in CPU_SHAPES for r in CPU_RANKS]
    assert is_grid(rows) and is_grid(rows[1:])
    assert not is_grid([found for found in rows if found["setting"]["r"] == 8])
    run = content(*rows)
    assert "all of them" in bar.coverage(run)
    assert {verdict.cells for verdict in bar.verdicts(run)} == {0, bar.CELLS}


def test_the_bar_is_a_cpus():
    rows = [row({"plain": 1.0, "fused": 1.0})]
    assert bar.verdicts(content(*rows)) and not bar.verdicts(content(*rows, kind="cuda"))


def test_a_cell_above_a_target_comes_with_its_floors():
    slow = row({"plain": 1.0, "fused": 1.3, "packed": 1.1}, r=64)
    fine = row({"plain": 1.0, "fused": 0.5, "packed": 0.5})
    run = content(slow, fine)
    ((found, reasons),) = bar.above_target(run)
    assert found is slow
    assert reasons == ["/ plain linear 1.30 > 1.15", "/ packed linear 1.18 > 1.10"]
    work = slow["work"]["adapter"]
    floor = bar.floor(run, slow)
    assert floor["bytes"] == pytest.approx(work["bytes"] / 1e10)
    assert floor["plain"] == pytest.approx(work["flop"] / slow["work"]["plain"]["flop"])
    assert floor["flop"] == pytest.approx(work["flop"] / 2e12)
    del run["roofline"]["own_gemm_flop_per_s"]
    assert bar.floor(run, slow)["flop"] is None


def test_the_report_has_the_bar_and_every_ratio():
    run = content(
        row({"plain": 1e-3, "fused": 0.9e-3, "packed": 0.8e-3}),
        row({"plain": 1e-3, "fused": 1.2e-3}, r=16),
    )
    run["unmeasured"] = {"failed": ["a-row"]}
    for told in (report.text(run), report.markdown(run)):
        for part in ("the bar", "not met", "no number", "0.90", "1.20", "native, packed", "a-row"):
            assert part.lower() in told.lower(), part


@pytest.mark.parametrize("m", [1, 2, 63, 64, 65, 2048])
def test_checked_rows_hold_the_first_and_the_last(m):
    rows = checks.rows_to_check(m, 64)
    assert rows[0] == 0 and rows[-1] == m - 1
    assert torch.equal(rows, rows.unique())
    assert len(rows) == min(m, 64)
