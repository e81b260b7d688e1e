"""The arithmetic of bench's mixed batches: populations, criteria, and checks that can fail."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

import lora_kernels as lk
from bench import bench_segmented, report, segmented_report
from bench.segmented_baselines import MIXED_VARIANTS, Fused, Loop, Ours, OursPart, Plain
from bench.segmented_cases import (
    DECODE,
    POPULATIONS,
    PREFILL,
    MixedSetting,
    draw,
    mixed,
    mixed_settings,
    row_counts,
    setting_of,
    slots_of,
)
from lora_kernels.config import Config
from lora_kernels.problem import Problem

SMALL = MixedSetting("T2", "qkv", 70, 96, (64, 48), 8, "modulo", 5, "float32")


def row(setting: MixedSetting, times: dict[str, float]) -> dict[str, Any]:
    return {
        "setting": asdict(setting) | {"widths": list(setting.widths)},
        "variants": {
            key: {"median_s": value, "q1_s": value, "q3_s": value, "rounds": 5}
            for key, value in times.items()
        },
        "missing": {"gather": "a reason"},
        "backend": "cpu",
        "plans": {"segmented": {"segmented_lora_": "native"}},
    }


def content(*rows: dict[str, Any], kind: str = "cpu") -> dict[str, Any]:
    return {
        "date": "today",
        "device": {"kind": kind, "name": "a machine", "arch": "avx512", "processors": 2},
        "versions": {"torch": "2"},
        "roofline": {"gemm_size": 2048, "gemm_flop_per_s": {}, "copy_bytes_per_s": 1e10},
        "cache_bytes": 2**25,
        "warmup": 3,
        "variants": {},
        "rows": [],
        "mixed": {
            "variants": {
                key: {"label": variant.label, "what": variant.what, "version": "1"}
                for key, variant in MIXED_VARIANTS.items()
            },
            "rows": list(rows),
        },
        "unmeasured": {},
    }


@pytest.mark.parametrize("population", POPULATIONS[1:])
@pytest.mark.parametrize("rows", [1, 2, 8, 31, 64])
def test_every_row_has_one_adapter(population, rows):
    counts = row_counts(population, rows)
    assert sum(counts) == rows and min(counts) >= 1
    assert counts == sorted(counts, reverse=True)
    setting = mixed("T4", (rows, 64, 64), population=population)
    slots = slots_of(setting)
    assert [slots.count(slot) for slot in range(setting.adapters)] == counts


def test_the_decode_batch_takes_turns():
    assert slots_of(mixed("rows", (10, 64, 64))) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


def test_an_unknown_population_is_named():
    with pytest.raises(ValueError, match="skewed"):
        row_counts("skewed", 4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_rows_differ_and_hold_the_judged_cells(device):
    settings = mixed_settings(device)
    assert len({str(setting) for setting in settings}) == len(settings)
    for criterion in segmented_report.CRITERIA:
        assert sum(map(criterion.covers, settings)) == 1, criterion
    assert all(setting.adapters <= setting.m for setting in settings)


def test_a_setting_survives_json():
    assert setting_of(row(SMALL, {})) == SMALL


@pytest.mark.parametrize(("ours", "outcome"), [(1.2, "met"), (1.3, "not met")])
def test_the_criteria_are_judged(ours, outcome):
    times = {"plain": 1.0, "fused": ours, "segmented": 1.3, "peft": 2.6}
    run = content(row(mixed("rows", DECODE), times))
    outcomes = {(c.of, c.to): c.outcome(value) for c, value in segmented_report.verdicts(run)}
    assert outcomes["fused", "plain"] == outcome
    assert outcomes["segmented", "plain"] == "-"
    assert outcomes["peft", "segmented"] == "met"
    assert outcomes["packed", "plain"] == "-"
    assert outcomes["gather_part", "segmented_part"] == "no number"


def test_another_population_or_dtype_is_not_judged():
    for change in ({"population": "zipf"}, {"dtype": "float32"}, {"r": 32}, {"adapters": 4}):
        setting = replace(mixed("rows", PREFILL), **change)
        assert not any(c.covers(setting) for c in segmented_report.CRITERIA), change


def test_the_criteria_are_a_cpus():
    run = content(row(mixed("rows", DECODE), {"plain": 1.0, "segmented": 1.0}), kind="cuda")
    assert not segmented_report.verdicts(run)


def test_the_report_has_the_quotients_and_the_bar():
    times = {"plain": 1e-3, "segmented": 1.2e-3, "peft": 2.4e-3, "table": 1e-5}
    run = content(row(mixed("rows", DECODE), times))
    for told in (report.text(run), report.markdown(run)):
        for part in (
            "bar of mixed batches",
            "1.200",
            "2.00",
            "cpu: native",
            "a reason",
            "no number",
        ):
            assert part in told, part


def test_a_report_without_mixed_batches_is_silent():
    run = content()
    del run["mixed"]
    assert not segmented_report.groups(run) and not segmented_report.as_json(run)
    assert "mixed" not in report.text(run)


@pytest.mark.parametrize("variant", MIXED_VARIANTS.values(), ids=list(MIXED_VARIANTS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_variant_is_right(variant, dtype):
    setting = replace(SMALL, dtype=dtype)
    if reason := variant.missing(setting, "cpu"):
        pytest.skip(reason)
    inputs = draw(setting, "cpu")
    step = bench_segmented.MixedStep(variant(setting, inputs))
    bench_segmented.Truth(setting, inputs).check(step.variant, step)


class _NoTail(Ours):
    def add(self, x, y):
        pass


class _WrongAdapters(Ours):
    def __init__(self, setting, inputs):
        super().__init__(setting, replace(inputs, slots=inputs.slots[1:] + inputs.slots[:1]))


class _NoScales(Loop):
    def __init__(self, setting, inputs):
        super().__init__(setting, replace(inputs, scales=[1.0] * len(inputs.scales)))


class _LastRowForgotten(OursPart):
    def add(self, x, y):
        super().add(x, y)
        y[-1] = 0


class _Adapted(Ours):
    computes = "plain"


@pytest.mark.parametrize(
    "variant", [_NoTail, _WrongAdapters, _NoScales, _LastRowForgotten, _Adapted]
)
def test_the_check_sees(variant):
    setting = replace(SMALL, dtype="bfloat16")
    inputs = draw(setting, "cpu")
    truth = bench_segmented.Truth(setting, inputs)
    step = bench_segmented.MixedStep(variant(setting, inputs))
    with pytest.raises(AssertionError, match="over the budget"):
        truth.check(step.variant, step)


def test_an_answer_by_the_reference_is_refused():
    inputs = draw(SMALL, "cpu")
    step = bench_segmented.MixedStep(Ours(SMALL, inputs))
    with lk.force_plan("reference"), lk.record_plans() as answers:
        step()
    with pytest.raises(AssertionError, match="answered by"):
        bench_segmented.plans_of(answers, "cpu", Ours.operators)
    with lk.record_plans() as answers:
        bench_segmented.MixedStep(Plain(SMALL, inputs))()
    with pytest.raises(AssertionError, match="never called"):
        bench_segmented.plans_of(answers, "cpu", Ours.operators)


def answer(op, plan, backend="cuda"):
    asked = Problem(op, 8, 64, 64, 8, "bfloat16", "bfloat16", slots=4)
    return lk.Answer(backend, Config(plan), asked)


def test_the_librarys_base_is_ours_with_our_kernels_on_it_alone():
    fused = Fused.operators
    for plan in ("vendor", "tail"):
        assert bench_segmented.plans_of([answer(*fused, plan)], "cuda", fused) == {fused[0]: plan}
    for wrong in (
        answer(*fused, "reference", "reference"),
        answer(*fused, "vendor", "cpu"),
        answer("segmented_lora_", "vendor"),
    ):
        with pytest.raises(AssertionError, match="answered by"):
            bench_segmented.plans_of([wrong], "cuda", (wrong.op,))


def test_copies_share_x_alone():
    inputs = draw(SMALL, "cpu")
    copied = inputs.copy()
    assert copied.x is inputs.x
    pairs = zip(
        (copied.weight, *copied.lora_a, *copied.lora_b),
        (inputs.weight, *inputs.lora_a, *inputs.lora_b),
        strict=True,
    )
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
