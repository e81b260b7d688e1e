"""``adapter_names=`` on a LoRA layer of PEFT: each sequence with its own adapter."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft_layer_cases import IN, OUT, assert_budget, by_formula, layer_of, model_with, run

import lora_kernels as lk
from lora_kernels.testing.linear import assert_within_budget


class TestMixedBatches:
    ROWS = ["b", "__base__", "a", "b", "c", "a"]

    def operands(self, dtype, out=OUT):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(len(self.ROWS), 11, IN, generator=generator).to(dtype)
        return x, torch.randn(len(self.ROWS), 11, out, generator=generator).to(dtype)

    @pytest.mark.native
    @pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
    @pytest.mark.parametrize(
        "dtype, cast",
        [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)],
        ids=["fp32", "bf16-fp32", "bf16"],
    )
    def test_every_sequence_has_its_own_adapter(self, dtype, cast, kind):
        model = model_with("abc", kind, dtype, cast, lora_dropout=0.1)
        for name in "bc":
            # PEFT lets only active adapters train; any may stand in a batch.
            layer_of(model).lora_A[name].requires_grad_(True)
            layer_of(model).lora_B[name].requires_grad_(True)
        model.eval()
        report = lk.accelerate_peft(model)
        x, dy = self.operands(dtype, IN if kind == "conv1d" else OUT)
        ours, answers = run(model, x, dy, "abc", adapter_names=self.ROWS)
        assert [a.op for a in answers] == [
            "segmented_linear_fwd",
            "segmented_linear_dx",
            "segmented_lora_dab",
        ]
        assert {a.backend for a in answers} == {"cpu"} and report.calls.fused == 1
        assert_budget(ours, layer_of(model), x, dy, "abc", dtype, rows=self.ROWS)
        with torch.no_grad(), lk.record_plans() as answers:
            y = model(x, adapter_names=self.ROWS)
        assert [a.op for a in answers] == ["segmented_linear_fwd"]
        exact = by_formula(layer_of(model), x, dy, "abc", torch.float64, rows=self.ROWS)
        eager = by_formula(layer_of(model), x, dy, "abc", dtype, rows=self.ROWS)
        assert_within_budget("without a graph", y, eager["y"], exact["y"])

    def test_the_base_rows_are_the_base_whatever_the_others_are(self):
        model = model_with("abc").eval()
        lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        base = F.linear(x.view(-1, IN), *layer_of(model).base_layer.parameters()).view(6, 11, OUT)
        others = [name if name == "__base__" else "c" for name in self.ROWS]
        with torch.no_grad():
            y = model(x, adapter_names=self.ROWS)
            again = model(x, adapter_names=others)
        torch.testing.assert_close(y[1], base[1], rtol=1e-5, atol=1e-5)
        assert torch.equal(y[1], again[1]) and not torch.equal(y[0], again[0])

    def test_autocast(self):
        model = model_with("abc").eval()
        lk.accelerate_peft(model)
        x, dy = self.operands(torch.float32)
        ours, answers = run(model, x, dy, "a", autocast=True, adapter_names=self.ROWS)
        assert answers[0].op == "segmented_linear_fwd" and ours["y"].dtype == torch.bfloat16
        exact = by_formula(layer_of(model), x, dy, "abc", torch.float64, rows=self.ROWS)
        eager = by_formula(layer_of(model), x, dy, "abc", torch.bfloat16, rows=self.ROWS)
        for name in ours:
            assert_within_budget(name, ours[name], eager[name], exact[name])

    @pytest.mark.parametrize("write", ["data", "no_grad", "fused optimizer", "scaling"])
    def test_changed_adapters_are_seen_at_once(self, write):
        model = model_with("abc").eval()
        layer = layer_of(model)
        stock = copy.deepcopy(model)
        lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        before = model(x, adapter_names=self.ROWS)
        for changed in (layer, layer_of(stock)):
            weight = changed.lora_B["b"].weight
            if write == "data":
                weight.data.mul_(3)
            elif write == "no_grad":
                with torch.no_grad():
                    weight.mul_(3)
            elif write == "scaling":
                changed.scaling["b"] = 0.1
            else:
                weight.requires_grad_(True).grad = torch.ones_like(weight)
                torch.optim.AdamW([weight], lr=0.1, fused=True).step()
        after = model(x, adapter_names=self.ROWS)
        assert not torch.allclose(before[0], after[0], atol=1e-2)
        expected = stock(x, adapter_names=self.ROWS)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)

    def test_a_table_made_in_inference_mode_serves_training_code(self):
        model = model_with("abc").eval()
        lk.accelerate_peft(model)
        x, dy = self.operands(torch.float32)
        names = ["c", "c", "a", "__base__", "b", "b"]
        with torch.inference_mode():
            first = model(x, adapter_names=names)
        ours, answers = run(model, x, dy, "a", adapter_names=names)
        assert answers[0].op == "segmented_linear_fwd"
        torch.testing.assert_close(ours["y"], first.clone(), rtol=1e-5, atol=1e-5)

    def test_gradients_enabled_in_inference_mode_are_of_no_effect(self):
        model = model_with("abc").eval()
        report = lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        for names in (None, self.ROWS):
            with torch.no_grad():
                expected = model(x, adapter_names=names)
            with torch.inference_mode(), torch.enable_grad():
                assert torch.equal(model(x, adapter_names=names), expected)
        assert report.calls.fused == 4

    def test_the_default_device_is_not_that_of_the_operands(self):
        model = model_with("abc").eval()
        lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        names = ["a", "a", "b", "__base__", "c", "c"]
        with torch.no_grad(), torch.device("meta"):
            y = model(x, adapter_names=names)
        assert y.device.type == "cpu" and torch.equal(y, model(x, adapter_names=names))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_lora_bias(self, dtype):
        model = model_with("ab", dtype=dtype, lora_bias=True).eval()
        layer_of(model).lora_A.requires_grad_(True)
        layer_of(model).lora_B.requires_grad_(True)
        report = lk.accelerate_peft(model)
        x, dy = self.operands(dtype)
        rows = ["a", "b", "a", "__base__", "b", "b"]
        ours, answers = run(model, x, dy, "ab", adapter_names=rows)
        assert answers[0].op == "segmented_linear_fwd" and report.calls.fused == 1
        assert {"dbias a", "dbias b"} <= ours.keys()
        assert_budget(ours, layer_of(model), x, dy, "ab", dtype, rows=rows)

    def test_wrong_calls_raise_what_peft_raises(self):
        model = model_with("ab").eval()
        stock = copy.deepcopy(model)
        report = lk.accelerate_peft(model)
        x, _ = self.operands(torch.float32)
        for rows in (["a"], ["a", "b", "a", "nobody", "b", "b"]):
            messages = []
            for m in (stock, model):
                with pytest.raises(ValueError) as caught:
                    m(x, adapter_names=rows)
                messages.append(str(caught.value))
            assert messages[0] == messages[1]
        assert not report.calls
