"""The measurement of layers of PEFT: it runs, and refuses what our kernels did not answer."""

import time
from functools import partial

import pytest

pytest.importorskip("peft")

import lora_kernels as lk
from bench import peft_layer
from bench.measure import samples


def test_a_row_of_each_kind():
    training = peft_layer.TRAINING
    cases = [
        *(peft_layer.Case(1, 32, "float32", mode) for mode in ("evaluation", "forward")),
        peft_layer.Case(8, 32, "bfloat16", training, 0.1, "always"),
        peft_layer.Case(8, 32, "bfloat16", training, layers=3),
    ]
    lines = peft_layer.REPORT.page(peft_layer.REPORT.run(cases, 0.0))
    kinds = [[cell.strip() for cell in line.split("|")[1:7]] for line in lines[4:]]
    assert kinds == [
        ["1 x 32", "1", "float32", "0", "eval", "evaluation"],
        ["1 x 32", "1", "float32", "0", "eval", "forward"],
        ["8 x 32", "1", "bfloat16", "0.1", "always", training],
        ["8 x 32", "3", "bfloat16", "0", "eval", training],
    ]
    assert "1.4x faster" in lines[0]


def test_what_fell_back_is_not_printed(monkeypatch):
    accelerate = lk.accelerate_peft

    def spoiled(model, **options):
        report = accelerate(model, **options)
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.register_forward_hook(lambda *_: None)
        return report

    monkeypatch.setattr(lk, "accelerate_peft", spoiled)
    with pytest.raises(SystemExit, match="not answered by lora_kernels"):
        peft_layer.measure(peft_layer.Case(1, 32, "float32"), 0.0)


def test_a_wrong_result_has_no_speed(monkeypatch):
    layers_of = peft_layer.layers_of

    def spoiled(case, accelerated):
        layers, report = layers_of(case, accelerated)
        if accelerated:
            layers[-1].scaling["default"] = 0.0
        return layers, report

    monkeypatch.setattr(peft_layer, "layers_of", spoiled)
    with pytest.raises(AssertionError, match="over the budget"):
        peft_layer.measure(peft_layer.Case(1, 32, "float32", layers=2), 0.0)


def test_samples_take_turns_and_each_is_prepared():
    called = []
    steps = {name: partial(called.append, name) for name in "ab"}
    found = samples(steps, 0.0, before=lambda name: called.append(f"before {name}"))
    assert [len(times) for times in found.values()] == [5, 5]
    there, back = ["before a", "a", "before b", "b"], ["before b", "b", "before a", "a"]
    assert called[-20:] == there + back + there + back + there


def test_a_sample_is_a_run_of_steps_after_one_that_is_not_timed():
    called = []

    def step():
        called.append(1)
        time.sleep(0.001)

    (times,) = samples({"a": step}, 0.0, lasting=0.01).values()
    assert len(times) == 5 and min(times) > 1000
    # Four to warm up; then five samples of as many, one of each untimed.
    assert len(called) % 5 == 4 and len(called) >= 4 + 5 * 2
