"""Bench's mixed batches: populations, variants, and checks that can fail."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import lora_kernels as lk
from bench import bench_segmented, checks
from bench.baselines import Plain
from bench.segmented_baselines import MIXED_VARIANTS, Fused, Loop, Ours
from bench.segmented_cases import (
    DECODE,
    POPULATIONS,
    PREFILL,
    MixedSetting,
    draw,
    mixed,
    mixed_settings,
    row_counts,
    slots_of,
)
from lora_kernels.planning.config import Config
from lora_kernels.spec.problem import Problem

SMALL = MixedSetting("T2", "qkv", 70, 96, (64, 48), 8, "modulo", 5, "float32")


def test_every_row_has_one_adapter():
    for population, rows in itertools.product(POPULATIONS[1:], (1, 8, 31, 64)):
        counts = row_counts(population, rows)
        assert sum(counts) == rows and min(counts) >= 1
        assert counts == sorted(counts, reverse=True)
        setting = mixed("T4", (rows, 64, 64), population=population)
        slots = slots_of(setting)
        assert [slots.count(slot) for slot in range(setting.adapters)] == counts
    assert slots_of(mixed("rows", (10, 64, 64))) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    with pytest.raises(ValueError, match="skewed"):
        row_counts("skewed", 4)


def test_the_rows_differ_and_hold_the_judged_cells():
    for device in ("cpu", "cuda"):
        settings = mixed_settings(device)
        assert len(set(settings)) == len(settings)
        assert all(setting.adapters <= setting.m for setting in settings)
        assert {mixed("rows", DECODE), mixed("rows", PREFILL)} <= set(settings)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_variant_is_right(dtype):
    setting, missing = replace(SMALL, dtype=dtype), {}
    inputs = draw(setting, "cpu")
    for key, variant in MIXED_VARIANTS.items():
        if reason := variant.missing(setting, "cpu"):
            missing[key] = reason
        else:
            step = bench_segmented.step_of(variant, setting, inputs)
            bench_segmented.Truth(setting, inputs).check(step.variant, step)
    assert missing.keys() <= {"packed", "fused", "peft", "gather_fp32", "gather_fp32_part"}, missing


class _NoTail(Ours):
    def add(self, x, y):
        pass


class _WrongAdapters(Ours):
    def __init__(self, setting, inputs):
        super().__init__(setting, replace(inputs, slots=inputs.slots[1:] + inputs.slots[:1]))


class _NoScales(Loop):
    def __init__(self, setting, inputs):
        super().__init__(setting, replace(inputs, scales=[1.0] * len(inputs.scales)))


class _LastRowForgotten(MIXED_VARIANTS["segmented_part"]):
    def add(self, x, y):
        super().add(x, y)
        y[-1] = 0


class _Adapted(Ours):
    computes = "plain"


def test_the_check_sees():
    setting = replace(SMALL, dtype="bfloat16")
    inputs = draw(setting, "cpu")
    truth = bench_segmented.Truth(setting, inputs)
    for variant in (_NoTail, _WrongAdapters, _NoScales, _LastRowForgotten, _Adapted):
        step = bench_segmented.step_of(variant, setting, inputs)
        with pytest.raises(AssertionError, match="over the budget"):
            truth.check(step.variant, step)


def test_an_answer_by_the_reference_is_refused():
    inputs = draw(SMALL, "cpu")
    step = bench_segmented.step_of(Ours, SMALL, inputs)
    with lk.force_plan("reference"), lk.record_plans() as answers:
        step()
    with pytest.raises(AssertionError, match="answered by"):
        checks.plans_of(answers, "cpu", Ours.operators)
    with lk.record_plans() as answers:
        bench_segmented.step_of(Plain, SMALL, inputs)()
    with pytest.raises(AssertionError, match="never called"):
        checks.plans_of(answers, "cpu", Ours.operators)


def answer(op, plan, backend="cuda"):
    asked = Problem(op, 8, 64, 64, 8, "bfloat16", "bfloat16", slots=4)
    return lk.Answer(backend, Config(plan), asked)


def test_the_librarys_base_is_ours_with_our_kernels_on_it_alone():
    fused = Fused.operators
    for plan in ("vendor", "tail"):
        assert checks.plans_of([answer(*fused, plan)], "cuda", fused) == {fused[0]: plan}
    for wrong in (
        answer(*fused, "reference", "reference"),
        answer(*fused, "vendor", "cpu"),
        answer("segmented_lora_", "vendor"),
    ):
        with pytest.raises(AssertionError, match="answered by"):
            checks.plans_of([wrong], "cuda", (wrong.op,))


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
