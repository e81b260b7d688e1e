"""The measurement of layers of PEFT: it runs, and refuses what our kernels did not answer."""

import pytest

pytest.importorskip("peft")

import lora_kernels as lk
from bench import peft_layer


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
