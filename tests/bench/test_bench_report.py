"""The report of bench: its targets, its one direction of ratios, and what it says is missing."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bench import cases, checks, engines, report, shared_input, training_memory
from bench.baselines import VARIANTS
from bench.cases import CPU_RANKS, CPU_SHAPES, Setting
from bench.command import Report
from bench.report import TARGETS, judge
from bench.segmented_baselines import MIXED_VARIANTS
from bench.segmented_cases import DECODE, MixedSetting, mixed

RESULTS = Path(__file__).parents[2] / "bench" / "results"
CELL = Setting(1, 2048, 2048, 8, 16, 0.0, "bfloat16", "forward")


def row(times: dict[str, float], setting: Setting | MixedSetting = CELL, **changes) -> Any:
    setting = replace(setting, **changes)
    return {
        "setting": asdict(setting),
        "variants": {key: {"median_s": s, "q1_s": s, "q3_s": s} for key, s in times.items()},
        "missing": {},
        "plans": {"fused": {"lora_linear_fwd": "native"}},
        "packed_copies": {"fused": 1},
    }


def content(*rows: Any, mixed_rows: tuple = (), kind: str = "cpu") -> Any:
    def described(variants):
        return {k: {"label": v.label, "what": v.what, "version": "1"} for k, v in variants.items()}

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
        "variants": described(VARIANTS),
        "rows": [*rows],
        "mixed": {"variants": described(MIXED_VARIANTS), "rows": [*mixed_rows]},
        "unmeasured": {},
    }


def target(mode: str, theirs: str, statistic: str, dtype: str = "bfloat16") -> report.Target:
    asked = (dtype, mode, "fused", theirs, statistic, None)
    return next(t for t in TARGETS if asked == (*asked_of(t), t.shape))


def asked_of(t: report.Target) -> tuple[str, ...]:
    return t.dtype, t.mode, t.ours, t.theirs, t.statistic


def test_twice_the_speed_is_two_and_the_mean_is_geometric():
    # Twice as slow and twice as fast is even; an arithmetic mean would say 1.25.
    rows = [row({"plain": 1.0, "fused": 2.0}), row({"plain": 1.0, "fused": 0.5}, r=16)]
    assert report.speed(rows[1], "fused", "plain") == 2.0
    verdict = judge(target("forward", "plain", "mean"), content(*rows))
    assert verdict.value == pytest.approx(1.0) and verdict.outcome == "met"
    worst = judge(target("forward", "plain", "worst"), content(*rows))
    assert (worst.value, worst.worst_cell, worst.outcome) == (0.5, "1x2048x2048 r=8", "not met")


def test_met_or_not():
    for mode, theirs, statistic, theirs_s, outcome in (
        ("forward", "plain", "worst", 1 / 1.15, "met"),
        ("forward", "plain", "worst", 1 / 1.16, "not met"),
        ("forward", "peft", "mean", 1.3, "met"),
        ("forward", "peft", "mean", 1.29, "not met"),
        ("training", "plain", "mean", 1 / 1.13, "not met"),
        ("training", "plain", "worst", 0.1, "-"),
    ):
        run = content(row({theirs: theirs_s, "fused": 1.0}, mode=mode))
        assert judge(target(mode, theirs, statistic), run).outcome == outcome, (mode, theirs_s)


def test_a_missing_variant_is_no_success_and_only_its_own_dtype_and_mode_count():
    run = content(
        row({"plain": 1.0, "fused": 0.9}),
        row({"plain": 1.0, "peft": 9.0, "fused": 1.0}, dtype="float32"),
        row({"plain": 1.0, "peft": 9.0, "fused": 1.0}, mode="training"),
    )
    verdict = judge(target("forward", "peft", "mean"), run)
    assert (verdict.value, verdict.cells, verdict.outcome) == (None, 0, "no number")


def test_the_grid_is_what_a_cpu_measures_and_other_rows_do_not_count_beside_it():
    settings = cases.settings("cpu")
    grid = [setting for setting in settings if report.in_grid(setting)]
    assert len(grid) == 4 * report.CELLS == 4 * len(CPU_SHAPES) * len(CPU_RANKS)
    assert all(setting.p > 0 for setting in settings if setting not in grid)
    inside = row({"plain": 1.0, "fused": 1.0})
    outside = row({"plain": 1.0, "fused": 3.0}, m=64, k=512, n=512)
    dropout = row({"plain": 1.0, "fused": 3.0}, p=0.1)
    t = target("forward", "plain", "mean")
    assert [*report.cells_of(t, content(inside, outside, dropout)).values()] == [inside]
    assert [*report.cells_of(t, content(outside, dropout)).values()] == [outside]


def test_targets_are_a_cpus():
    rows = [row({"plain": 1.0, "fused": 1.0})]
    assert report.verdicts(content(*rows)) and not report.verdicts(content(*rows, kind="cuda"))


def test_mixed_batches_are_judged_by_the_row_they_name():
    decode = mixed("rows", DECODE)
    times = {"plain": 1.0, "fused": 1.2, "segmented": 1.3, "peft": 2.6}
    others = [replace(decode, **c) for c in ({"population": "zipf"}, {"r": 32}, {"adapters": 4})]
    rows = [row(times, decode), *(row({"plain": 9.0, "fused": 1.0}, s) for s in others)]
    run = content(mixed_rows=tuple(json.loads(json.dumps(rows))))
    found = {(v.target.ours, v.target.theirs): v for v in report.verdicts(run)}
    assert found["fused", "plain"].value == pytest.approx(1 / 1.2)
    assert found["fused", "plain"].outcome == found["segmented", "peft"].outcome == "met"
    assert found["packed", "plain"].outcome == "-"


def test_the_report_has_every_ratio_and_says_what_is_missing():
    slow = row({"plain": 1e-3, "fused": 1.25e-3, "peft": 3e-3}, r=16)
    slow["missing"] = {"packed": "a reason"}
    batch = row({"plain": 1e-3, "segmented": 1.2e-3, "vllm": 6e-3}, mixed("rows", DECODE))
    batch["missing"] = {"sglang_csgmv": "no copy of sglang"}
    run = content(row({"plain": 1e-3, "fused": 0.8e-3}), slow, mixed_rows=(batch,))
    theirs = {"what": "", "peer": True}
    run["mixed"]["variants"] |= {
        "vllm": theirs | {"label": "vLLM", "version": "vllm 9.9"},
        "sglang_csgmv": theirs | {"label": "csgmv", "version": "sglang not copied"},
    }
    run["unmeasured"] = {"failed": ["a-row"]}
    text = report.markdown(run)
    for part in (
        *("Targets", "not met", "no number", "1.25", "0.80", "2.40", "native, packed", "a-row"),
        *("no number for packed linear: a reason (1 of 2 rows)", "vLLM", "5.00"),
        "no number for csgmv (sglang not copied): no copy of sglang (1 of 1 rows)",
    ):
        assert part in text, part
    assert "1.40 is 1.4x faster" in text


def test_a_missed_bar_is_the_exit_status_and_an_absent_variant_a_blank(tmp_path, capsys):
    for missed in ([], ["too slow"]):
        made = Report(
            *("one", [7], lambda case, seconds: {"case": case, "us": {"a": 3.0, "c": 2.0}}),
            *(0.0, ["torch"], "A note."),
            "case: {case} | a us: {a:.1f} | b us: {b:.1f} | a / c: {a / c:.2f} | b / c: {b / c}",
            misses=lambda row, missed=missed: missed,
        )
        with pytest.raises(SystemExit) as ended:
            made.main("", ["--out", str(tmp_path)])
        assert ended.value.code == len(missed)
        assert ("FAILED: too slow" in capsys.readouterr().err) == bool(missed)
    line = (tmp_path / "one.md").read_text().splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["7", "3.0", "", "1.50", ""]


@pytest.mark.parametrize("path", sorted(RESULTS.rglob("*.json")), ids=lambda p: p.stem)
def test_committed_results_are_what_their_reports_say(path):
    """Every committed table is today's report of the JSON beside it."""
    found = json.loads(path.read_text())
    markdown = path.with_name("report.md" if path.stem == "results" else f"{path.stem}.md")
    of_one_layer = {"results": report.markdown, "segmented": report.markdown}
    pages = of_one_layer | {"memory": training_memory.table, "engines": engines.table}
    pages["shared_input_models"] = shared_input.OF_MODELS.page
    if path.stem not in pages:
        pages[path.stem] = importlib.import_module(f"bench.{path.stem}").REPORT.page
    page = pages[path.stem](found)
    text = page if isinstance(page, str) else "\n".join(page)
    assert markdown.read_text().splitlines() == text.splitlines()


def test_checked_rows_hold_the_first_and_the_last():
    for m in (1, 2, 63, 64, 65, 2048):
        rows = checks.rows_to_check(m, 64).tolist()
        assert rows[0] == 0 and rows[-1] == m - 1 and rows == sorted(set(rows))
        assert len(rows) == min(m, 64)


def test_work_counts_each_operand_once():
    setting = Setting(2, 8, 4, 1, 16, 0.0, "float32", "forward")
    flop, elements = 2 * 2 * (8 * 4 + 8 + 4), 16 + 32 + 8 + 12
    assert setting.work() == {"flop": flop, "bytes": 4 * elements}
    # dX, dA and dB as well; dY and x are read, dX and the gradients written.
    training = replace(setting, mode="training").work()
    assert training["flop"] == flop + 2 * 2 * (8 * 4 + 2 * (8 + 4))
    assert training["bytes"] == 4 * (elements + 16 + 32 + 8 + 2 * 12 + 16)
    assert math.isclose(setting.scale, 16.0)
