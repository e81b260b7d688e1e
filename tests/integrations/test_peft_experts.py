"""PEFT's ``target_parameters`` on our kernels, against PEFT's own wrappers."""

import copy

import mixtures
import pytest
import safetensors.torch
import small
import torch
from mixtures import BATCH, FAMILIES
from peft.tuners.lora.layer import ParamWrapper

import lora_kernels as lk
from lora_kernels.integrations.peft_experts import FusedParamWrapper
from lora_kernels.testing.linear import assert_within_budget


def pair(family="qwen3_moe", **config):
    theirs = mixtures.stock_model(family, **config)
    ours = copy.deepcopy(theirs)
    return theirs, ours, lk.accelerate_peft(ours)


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_pefts(family):
    theirs, ours, report = pair(family)
    wrappers = [m for m in ours.modules() if isinstance(m, FusedParamWrapper)]
    assert len(report.fused) == len(wrappers) > 0 and not report.skipped
    exact, exact_gradients = mixtures.step(mixtures.in_float64(theirs))
    eager, eager_gradients = mixtures.step(theirs)
    output, gradients = mixtures.step(ours)
    assert report.calls.fused == len(wrappers) // 2 and not report.calls.fallen_back
    assert_within_budget("logits", output, eager, exact)
    assert gradients.keys() == eager_gradients.keys() and len(gradients) == 2 * len(wrappers)
    for name, gradient in gradients.items():
        assert_within_budget(name, gradient, eager_gradients[name], exact_gradients[name])
    with ours.disable_adapter(), theirs.disable_adapter():
        bare = logits(ours)
        assert torch.equal(bare, logits(theirs))
    assert small.relative_difference(output, bare) > 0.1


def test_everything_of_pefts_stays(tmp_path):
    theirs, ours, report = pair("gpt_oss", rank_pattern={"experts.down_proj": 5})
    assert repr(ours) == repr(theirs)
    names = [dict(model.named_parameters()) for model in (theirs, ours)]
    assert names[0].keys() == names[1].keys()
    described = [text for text in report.fused.values() if "down_proj" in text]
    assert described == ["GptOssExperts.down_proj [4, 32, 40], default r=5"] * 2
    for name, model in {"theirs": theirs, "ours": ours}.items():
        model.save_pretrained(tmp_path / name)
    files = [tmp_path / n / "adapter_model.safetensors" for n in ("theirs", "ours")]
    first, second = map(safetensors.torch.load_file, files)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    kept = dict(ours.named_parameters())
    assert len(lk.restore_peft(ours)) == 4
    assert not any(isinstance(m, FusedParamWrapper) for m in ours.modules())
    assert all(kept[name] is p for name, p in ours.named_parameters())
    assert torch.equal(logits(ours), logits(theirs))


def test_merged_and_adapters_that_change():
    theirs, ours, report = pair()
    for model in theirs, ours:
        model.add_adapter("other", mixtures.config_for(lora_alpha=9))
    mixtures.draw(theirs, seed=5)
    ours.load_state_dict(theirs.state_dict())
    seen = []
    for name in ("other", "default"):
        for model in theirs, ours:
            model.set_adapter(name)
        seen.append(logits(ours))
        assert small.relative_difference(seen[-1], logits(theirs)) < 1e-5
    assert small.relative_difference(*seen) > 0.1
    fused = report.calls.fused
    for model in theirs, ours:
        model.merge_adapter()
    assert torch.equal(logits(ours), logits(theirs))
    for model in theirs, ours:
        model.unmerge_adapter()
        model.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(ours), logits(theirs))
    assert report.calls.fused == fused
    assert dict(report.calls.fallen_back) == {"several active adapters on experts": 2}


def test_a_hook_on_the_experts_is_called():
    theirs, ours, report = pair()
    called = []
    for model in theirs, ours:
        experts = model.base_model.model.model.layers[1].mlp.experts.get_base_layer()
        experts.register_forward_hook(lambda module, *_: called.append(module))
    assert small.relative_difference(logits(ours), logits(theirs)) < 1e-5
    assert len(called) == 2 and report.calls.fused == 1
    assert list(report.calls.fallen_back) == ["a hook, or a forward of its own, on the experts"]


def test_warmup_runs_the_wrapped_experts_and_counts_no_call():
    _, ours, report = pair()
    with lk.record_plans() as answers:
        lk.warmup(ours, [3], training=False)
    # Of each module twice: as the outer wrapper has it, and the inner one.
    assert [(a.op, a.problem.m) for a in answers] == [("expert_linear_fwd", 3 * 2)] * 8
    assert report.calls.fused == 0


def test_linear_layers_beside_the_experts():
    theirs, ours, report = pair("qwen2_moe", target_modules=["q_proj", "shared_expert.down_proj"])
    assert len(report.fused) == 8
    assert small.relative_difference(logits(ours), logits(theirs)) < 1e-5
    assert report.calls.fused == 6


def test_other_parameters_are_left_to_peft():
    theirs, ours, report = pair(
        "qwen3_moe", target_parameters=["mlp.gate.weight", "experts.down_proj"]
    )
    assert sorted(report.fused) == [
        f"base_model.model.model.layers.{i}.mlp.experts" for i in range(2)
    ]
    assert all("use_experts_implementation" in reason for reason in report.skipped.values())
    assert len(report.skipped) == 2
    assert small.relative_difference(logits(ours), logits(theirs)) < 1e-5


def test_experts_that_bitsandbytes_parametrised(monkeypatch):
    """Against PEFT over the decoded weights: over such experts PEFT 0.21 forgets one of two
    adapters, and removes none behind a call."""
    bnb = pytest.importorskip("bitsandbytes.nn.parametrize")
    mixtures.decode_flat(monkeypatch)
    base, decoded = mixtures.build("qwen3_moe"), mixtures.build("qwen3_moe")
    targets = []
    for i, (one, other) in enumerate(zip(base.model.layers, decoded.model.layers, strict=True)):
        for name in ("gate_up_proj", "down_proj"):
            bnb.replace_parameter_4bit(one.mlp.experts, name, quant_type="nf4")
            targets.append(f"model.layers.{i}.mlp.experts.{name}")
            with torch.no_grad():
                getattr(other.mlp.experts, name).copy_(getattr(one.mlp.experts, name))
    bare = logits(decoded)
    ours, theirs = (
        mixtures.stock_model("qwen3_moe", model, target_parameters=targets)
        for model in (base, decoded)
    )
    wrappers = [{}, {}]
    for found, model in zip(wrappers, (ours, theirs), strict=True):
        for path, wrapper in model.named_modules():
            if isinstance(wrapper, ParamWrapper):
                found[path.removesuffix(".base_layer"), wrapper.parameter_name] = wrapper
    assert wrappers[0].keys() == wrappers[1].keys() and len(wrappers[0]) == len(targets)
    pairs = [(wrapper, wrappers[1][key]) for key, wrapper in wrappers[0].items()]
    for pair in pairs:
        for part in ("lora_A", "lora_B"):
            mine, other = (getattr(w, part)["default"].weight for w in pair)
            other.data.copy_(mine.data)
    report = lk.accelerate_peft(ours)
    assert len(report.fused) == len(targets) and not report.skipped
    described = [text for text in report.fused.values() if "down_proj" in text]
    assert described == ["ParametrizedQwen3MoeExperts.down_proj [6, 32, 24], default r=3"] * 2
    expected, _ = mixtures.step(theirs)
    with lk.record_plans() as answers:
        output, gradients = mixtures.step(ours)
    assert report.calls.fused == 2 and not report.calls.fallen_back and len(gradients) == 8
    products = [a for a in answers if a.op in ("expert_linear_fwd", "expert_linear_dx")]
    assert products and all(a.problem.four_bit for a in products)
    assert small.relative_difference(output, expected) < 1e-5
    for pair in pairs:
        for part in ("lora_A", "lora_B"):
            mine, other = (getattr(w, part)["default"].weight.grad for w in pair)
            assert small.relative_difference(mine, other) < 1e-4
    with ours.disable_adapter():
        assert small.relative_difference(logits(ours), bare) < 1e-5
    assert small.relative_difference(output, bare) > 0.1
