"""Adapters on the experts of mixtures: equal to PEFT's ``target_parameters`` in outputs, gradients
and files, within the one budget."""

import copy
import io
import json

import mixtures
import peft
import pytest
import safetensors.torch
import small
import torch
from mixtures import BATCH, FAMILIES, PARAMETERS

import lora_kernels as lk
from lora_kernels.layers.experts import FusedLoRAExperts
from lora_kernels.layers.routed import experts_forward
from lora_kernels.models.experts import expert_layers
from lora_kernels.planning.device import facts
from lora_kernels.testing.linear import assert_within_budget


@pytest.fixture
def pair(request, tmp_path):
    """PEFT's model and ours with the same adapter, which went through a file of PEFT's."""
    family = getattr(request, "param", "qwen3_moe")
    stock = mixtures.stock_model(family)
    stock.save_pretrained(tmp_path / "theirs")
    return stock, lk.load_adapter(mixtures.build(family), tmp_path / "theirs")


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.parametrize("pair", FAMILIES, indirect=True)
def test_outputs_gradients_and_files_are_pefts(pair, tmp_path):
    stock, ours = pair
    exact, exact_gradients = mixtures.step(mixtures.in_float64(stock))
    eager, eager_gradients = mixtures.step(stock)
    with lk.record_plans() as answers:
        output, gradients = mixtures.step(ours)
    assert_within_budget("logits", output, eager, exact)
    assert {mixtures.peft_name(name) for name in gradients} == set(eager_gradients)
    for name, gradient in gradients.items():
        theirs = mixtures.peft_name(name)
        assert gradient.abs().max() > 0
        assert_within_budget(name, gradient, eager_gradients[theirs], exact_gradients[theirs])
    count = 2 * len(expert_layers(ours))
    assert count and [a.op for a in answers] == [
        *["expert_linear_fwd"] * count,
        *["expert_linear_dx", "expert_linear_dab"] * (count - 1),
        # Nothing below the first experts trains.
        *["expert_shrink", "expert_linear_dab"],
    ]
    if facts("cpu").native not in ("", "baseline"):
        assert {answer.plan for answer in answers} == {"native"}

    bare = logits(stock.unload())
    assert small.relative_difference(output, bare) > 0.1
    lk.save_adapter(ours, tmp_path / "ours")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("theirs", "ours")]
    first, second = map(safetensors.torch.load_file, files)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    back = peft.PeftModel.from_pretrained(mixtures.build(family_of(ours)), tmp_path / "ours")
    assert torch.equal(logits(back), eager)


def family_of(model):
    return model.config.model_type


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_all_linear_with_experts(family, tmp_path):
    ours = lk.apply_lora(mixtures.build(family), r=2, experts=True, init_lora_weights=False)
    mixtures.draw(ours)
    report = lk.lora_report(ours)
    kinds = {type(m).__name__ for m in ours.modules() if isinstance(m, FusedLoRAExperts)}
    assert len(kinds) == 1 and len(expert_layers(ours)) == 2
    assert sum(".experts." in name for name in report.adapted) == 4
    assert sum("_proj" in name and ".experts." not in name for name in report.adapted) == 8
    assert "LoRA on 12 layers" in str(report) and not report.unreached
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained) and len(trained) == 24
    lk.save_adapter(ours, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["target_parameters"] == sorted(PARAMETERS) and "experts" not in content
    theirs = peft.PeftModel.from_pretrained(mixtures.build(family), tmp_path)
    exact = logits(mixtures.in_float64(theirs))
    assert_within_budget("logits", logits(ours), logits(theirs), exact)
    again = lk.load_adapter(mixtures.build(family), tmp_path)
    assert torch.equal(logits(again), logits(ours))


def test_ranks_and_alphas_by_name_pass_both_ways(tmp_path):
    given = {
        "rank_pattern": {"experts.down_proj": 5, "layers.1.mlp.experts.gate_up_proj": 2},
        "alpha_pattern": {"layers.0.mlp.experts.down_proj": 7},
        "use_rslora": True,
    }
    stock = mixtures.stock_model("mixtral", **given)
    stock.save_pretrained(tmp_path / "theirs")
    ours = lk.load_adapter(mixtures.build("mixtral"), tmp_path / "theirs")
    ranks = [a.r for m in expert_layers(ours).values() for a in m.adapters().values()]
    assert ranks == [3, 5, 2, 5]
    exact = logits(mixtures.in_float64(stock))
    assert_within_budget("logits", logits(ours), logits(stock), exact)
    fresh = lk.apply_lora(
        mixtures.build("mixtral"),
        r=3,
        lora_alpha=5,
        target_modules=[],
        target_parameters=PARAMETERS,
        **given,
    )
    lk.load_adapter(fresh, tmp_path / "theirs")
    assert torch.equal(logits(fresh), logits(ours))
    expert_layers(fresh)["model.layers.1.mlp.experts"].adapters()["down_proj"].scaling *= 2
    lk.save_adapter(fresh, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(mixtures.build("mixtral"), tmp_path / "ours")
    exact = logits(mixtures.in_float64(back))
    assert_within_budget("logits", logits(fresh), logits(back), exact)


@pytest.mark.parametrize("pair", ["qwen3_moe", "gpt_oss"], indirect=True)
def test_merged_and_unmerged(pair):
    stock, ours = pair
    bare, adapted = logits(mixtures.build(family_of(ours))), logits(ours)
    state = copy.deepcopy(ours.state_dict())
    pristine = {n: p for n, p in ours.named_parameters() if ".experts." in n}
    lk.merge_adapter(ours)
    assert small.relative_difference(logits(ours), adapted) < 1e-5
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    with lk.disable_adapter(ours):
        assert torch.equal(logits(ours), bare)
    for copied in copy.deepcopy(ours), pickled(ours):
        assert torch.equal(logits(copied), logits(ours))
        lk.unmerge_adapter(copied)
        assert torch.equal(logits(copied), adapted)
    ours.load_state_dict({key: value * 0.9 for key, value in state.items()})
    ours.load_state_dict(state)
    assert all(m.merged for m in expert_layers(ours).values())
    assert small.relative_difference(logits(ours), adapted) < 1e-5
    ours.train()
    assert not any(m.merged for m in expert_layers(ours).values())
    ours.eval()
    assert torch.equal(logits(ours), adapted)
    assert all(p is pristine[n] for n, p in ours.named_parameters() if n in pristine)
    with lk.disable_adapter(ours):
        assert torch.equal(logits(ours), bare)
    plain = lk.unload(copy.deepcopy(ours))
    assert torch.equal(logits(plain), bare) and not expert_layers(plain)
    lk.merge_adapter(ours, keep_base=False)
    assert not expert_layers(ours) and ours.state_dict().keys() == plain.state_dict().keys()
    assert small.relative_difference(logits(ours), adapted) < 1e-5
    theirs = stock.merge_and_unload()
    assert small.relative_difference(logits(ours), logits(theirs)) < 1e-5


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_what_is_not_adapted_is_untouched():
    bare = mixtures.build("qwen3_moe")
    ours = lk.apply_lora(
        copy.deepcopy(bare),
        target_modules=[],
        target_parameters=["layers.1.mlp.experts.down_proj"],
        init_lora_weights=False,
    )
    first, second = (layer.mlp.experts for layer in ours.model.layers)
    assert type(first) is type(bare.model.layers[0].mlp.experts)
    assert list(second.lora) == ["down_proj"]
    one, other = (m.model(**BATCH, output_hidden_states=True).hidden_states for m in (bare, ours))
    assert torch.equal(one[1], other[1]) and not torch.equal(one[2], other[2])
    report = lk.lora_report(ours)
    assert report.skipped["model.layers.0.mlp.experts.down_proj"].startswith("not in target_param")


def test_half_precision_and_autocast():
    ours = lk.apply_lora(
        mixtures.build("qwen3_moe").bfloat16(), target_modules=[], experts=True, r=3, lora_alpha=5
    )
    mixtures.draw(ours)
    adapter = next(iter(expert_layers(ours).values())).adapters()["down_proj"]
    assert adapter.lora_A.dtype == torch.float32
    output, gradients = mixtures.step(ours)
    assert output.dtype == torch.bfloat16 and len(gradients) == 8
    exact, exact_gradients = mixtures.step(copy.deepcopy(ours).double())
    assert small.relative_difference(output, exact) < 0.1
    whole = copy.deepcopy(ours).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, gradients = mixtures.step(whole)
    assert small.relative_difference(output, exact) < 0.1
    for name, gradient in gradients.items():
        assert small.relative_difference(gradient, exact_gradients[name]) < 0.2, name


def test_another_devices_experts_add_nothing():
    ours = lk.apply_lora(
        mixtures.build("qwen3_moe"), target_modules=[], experts=True, init_lora_weights=False
    )
    module = next(iter(expert_layers(ours).values()))
    factors = {name: a.factors() for name, a in module.adapters().items()}
    x = torch.randn(5, 32, requires_grad=True)
    index = torch.tensor([[0, 6], [6, 6], [2, 3], [5, 6], [6, 1]])
    weights = torch.rand(5, 2)
    own = experts_forward(module, factors, x, index, weights)
    own.sum().backward()
    rows = [
        experts_forward(
            module,
            factors,
            x[i : i + 1],
            index[i : i + 1, j : j + 1],
            weights[i : i + 1, j : j + 1],
        )[0]
        for i in range(5)
        for j in range(2)
        if index[i, j] < 6
    ]
    expected = torch.stack([rows[0], rows[0] * 0, rows[1] + rows[2], rows[3], rows[4]])
    torch.testing.assert_close(own, expected)
    assert not x.grad[1].any() and x.grad[0].any()


class Unknown(torch.nn.Module):
    """Experts without a declared computation."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 8, 12))
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x):
        return torch.einsum("ti,eio->to", self.linear(x), self.gate_up_proj)


def test_unknown_experts_are_left_alone_and_named():
    model = torch.nn.Sequential(Unknown())
    with pytest.warns(UserWarning, match=r"Unknown \(gate_up_proj\)"):
        lk.apply_lora(model, r=2, experts=True)
    report = lk.lora_report(model)
    assert list(report.adapted) == ["0.linear"] and list(report.unreached) == [
        "Unknown (gate_up_proj)"
    ]


WRONG = {
    "a linear's weight": (
        {"target_parameters": ["q_proj.weight"]},
        "q_proj.weight.*target_modules",
    ),
    "a router": ({"target_parameters": ["mlp.gate.weight"]}, "mlp.gate.weight"),
    "a bias of experts": ({"target_parameters": ["down_proj_bias"]}, "no matrix"),
    "nothing": ({"target_parameters": ["expert.down"], "target_modules": []}, "leaves no layer"),
    "dropout": ({"experts": True, "lora_dropout": 0.1}, "neither dropout nor DoRA"),
    "DoRA": ({"target_parameters": PARAMETERS, "use_dora": True}, "neither dropout nor DoRA"),
    "a string": ({"target_parameters": "experts"}, "list of names"),
    "no switch": ({"experts": 1}, "True or False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_configuration_is_named(name):
    fields, message = WRONG[name]
    model = mixtures.build("gpt_oss" if "bias" in name else "qwen3_moe")
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        lk.apply_lora(model, **fields)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


def test_an_error_half_way_leaves_the_model_as_it_was(monkeypatch):
    model = mixtures.build("qwen3_moe")
    kinds = [type(m) for m in model.modules()]
    monkeypatch.setattr("lora_kernels.models.apply._report", None)
    with pytest.raises(TypeError):
        lk.apply_lora(model, experts=True)
    assert [type(m) for m in model.modules()] == kinds
    assert all(p.requires_grad for p in model.parameters())


def test_adapted_twice(pair):
    _, ours = pair
    with pytest.raises(ValueError, match="has LoRA layers already"):
        lk.apply_lora(ours, experts=True)


def test_entries_that_match_nothing_are_warned_of():
    with pytest.warns(UserWarning, match=r"target_parameters: 'experts.w1' matches no Parameter"):
        lk.apply_lora(
            mixtures.build("mixtral"),
            target_modules=[],
            target_parameters=["experts.down_proj", "experts.w1"],
        )


@pytest.mark.parametrize("merged", [False, True])
def test_warmup_runs_the_experts(pair, merged):
    _, ours = pair
    if merged:
        lk.merge_adapter(ours)
    with lk.record_plans() as answers:
        lk.warmup(ours, [5], training=not merged)
    experts = [(a.op, a.problem.m) for a in answers if a.op.startswith("expert")]
    m = 5 * mixtures.SIZES["num_experts_per_tok"]
    step = [(f"expert_linear_{op}", m) for op in ("fwd", "fwd", "dx", "dab", "dx", "dab")]
    assert experts == ([] if merged else 2 * step)
    assert all(p.grad is None for p in ours.parameters())


def test_checkpointing_computes_the_same_gradients(pair):
    _, ours = pair
    ours.train()
    _, plain = mixtures.step(ours)
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    _, checkpointed = mixtures.step(ours)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.slow
def test_compiled_whole(pair):
    _, ours = pair
    mixtures.check_compiled_whole(next(iter(expert_layers(ours).values())))
