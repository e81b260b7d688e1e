"""Tied and shared modules, models adapted already, and wrong calls that change nothing."""

import copy

import peft
import pytest
import small
import torch
from small import adapt, build
from torch import nn

import lora_kernels as lk
from lora_kernels import FusedLoRALinear
from lora_kernels.models.apply import lora_layers


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


# ---- tied, shared and adapted already


def test_a_tied_weight_is_named_and_never_written():
    model = build("llama tied")
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    lk.apply_lora(model, target_modules=["lm_head", "q_proj"])
    small.draw_adapter(model)
    (note,) = lk.lora_report(model).notes
    assert "the weight of lm_head is tied to model.embed_tokens.weight" in note
    assert model.lm_head.weight is embedding
    lk.merge_adapter(model)
    assert model.lm_head.weight is not embedding
    assert torch.equal(embedding, before)
    lk.unmerge_adapter(model)
    assert model.lm_head.weight is embedding


def test_modules_to_save_refuse_a_tied_weight():
    model = build("llama tied")
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match=r"tied to model\.embed_tokens\.weight"):
        lk.apply_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    before.assert_unchanged()
    lk.apply_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    assert model.lm_head.weight.requires_grad


E = 16


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(E, E)
        self.again = self.first
        self.last = nn.Linear(E, E)

    def forward(self, x):
        return self.last(self.again(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("targets", [None, ["again"], ["first"], ["first", "again"]])
def test_a_shared_module_gets_one_adapter_at_all_its_places(targets):
    model = Shared()
    x = torch.randn(3, E)
    plain = model(x)
    lk.apply_lora(model, target_modules=targets)
    assert model.first is model.again and isinstance(model.first, FusedLoRALinear)
    assert "first is one module at 2 places" in lk.lora_report(model).notes[0]
    small.draw_adapter(model)
    a, b, s, w = (
        t.detach() if isinstance(t, torch.Tensor) else t for t in small.adapters(model)["first"]
    )
    merged = Shared()
    merged.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    with torch.no_grad():
        merged.first.weight.copy_(w + s * b @ a)
        if targets is None:
            a, b, s, w = small.adapters(model)["last"]
            merged.last.weight.copy_(w + s * b @ a)
    assert small.relative_difference(model(x), merged(x)) < 1e-5
    assert small.relative_difference(plain, merged(x)) > 0.1


def test_a_model_adapted_already_is_refused():
    model = adapt("gpt2", target_modules=["c_attn"])
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match=r"LoRA layers already .*c_attn.*load_adapter"):
        lk.apply_lora(model, target_modules=["c_fc"])
    before.assert_unchanged()


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.LoHaConfig])
@pytest.mark.parametrize("inner", [False, True])
def test_a_model_of_peft_is_refused(config, inner):
    model = peft.get_peft_model(build("llama"), config(target_modules=["q_proj"]))
    model = model.base_model.model if inner else model
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match="of PEFT already: the plain model is needed"):
        lk.apply_lora(model)
    before.assert_unchanged()


# ---- wrong calls leave the model as it was

WRONG = {
    "no match": (
        {"target_modules": ["nothing"]},
        r"^target_modules=\['nothing'\] leaves no layer to adapt\. Linear layers here: q_proj, "
        r"k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head$",
    ),
    "a match that is near": (
        {"target_modules": ["nothing", "v_porj"]},
        r"leaves no layer to adapt; did you mean 'v_proj'\? Linear layers here: q_proj, ",
    ),
    "many names": (
        {"target_modules": [f"x{i}" for i in range(900)]},
        r"'x7'\] and more leaves no layer to adapt\. Linear layers here: q_proj, ",
    ),
    "a typo beside what is excluded": (
        {"target_modules": ["q_porj"], "exclude_modules": ["k_proj"]},
        r"did you mean 'q_proj'\? Linear layers here: ",
    ),
    "an ending is a whole part": ({"target_modules": ["proj"]}, r"\['proj'\] leaves no layer"),
    "a regex is no ending": (
        {"target_modules": "q_proj"},
        r"'q_proj' leaves no layer to adapt; a string is a regular expression of whole names\. "
        r"For every layer of that name give \['q_proj'\]\. Linear layers here: q_proj, k_proj, ",
    ),
    "a regex of nothing": (
        {"target_modules": ".*q_porj"},
        r"leaves no layer to adapt; a string is a regular expression of whole names\. Linear ",
    ),
    "an empty list": ({"target_modules": []}, r"\[\] leaves no layer"),
    "everything excluded": ({"exclude_modules": ".*"}, "in exclude_modules"),
    "no such layer": (
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
        "not in layers_to_transform",
    ),
    "a container": ({"target_modules": ["mlp"]}, r"'model\.layers\.0\.mlp' is a LlamaMLP"),
    "an embedding": ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is a Embedding"),
    "rank 0": ({"r": 0}, "rank r must be an integer >= 1, not 0"),
    "rank below 0": ({"r": -1}, "rank r must be an integer >= 1, not -1"),
    "a rank that is no integer": ({"r": 2.0}, r"not 2\.0"),
    "rank 0 by pattern": ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\].*not 0"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha must be a finite number, not nan"),
    "alpha by pattern": ({"alpha_pattern": {"k": "x"}}, r"alpha_pattern\['k'\].*not 'x'"),
    "dropout 1": ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), not 1.0"),
    "bias": ({"bias": "some"}, "bias must be 'none', 'all' or 'lora_only', not 'some'"),
    "init": ({"init_lora_weights": "pissa"}, "init_lora_weights .*not 'pissa'"),
    "not a regex": ({"target_modules": "(q_proj"}, r"target_modules: '\(q_proj' is not a regular"),
    "exclude is no regex": ({"exclude_modules": "*"}, r"exclude_modules: '\*' is not a regular"),
    "a pattern is no regex": ({"rank_pattern": {"[": 2}}, r"rank_pattern: '\[' is not a regular"),
    "targets are no names": ({"target_modules": [1]}, "target_modules must be names"),
    "modules_to_save is no list": ({"modules_to_save": "lm_head"}, "must be a list of names"),
    "modules_to_save is not there": (
        {"modules_to_save": ["lm_head", "scores"]},
        "no module is called 'scores'",
    ),
    "layers of a regex": (
        {"target_modules": ".*q_proj", "layers_to_transform": [0]},
        "layers_to_transform wants a list of target_modules",
    ),
    "a pattern of no layers": (
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        "layers_pattern is used with layers_to_transform only",
    ),
    "layers are no indices": (
        {"target_modules": ["q_proj"], "layers_to_transform": ["0"]},
        "layers_to_transform must be one or more indices",
    ),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_a_wrong_call_says_why_and_changes_nothing(case):
    config, message = case
    model = build("llama")
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match=message):
        lk.apply_lora(model, **config)
    before.assert_unchanged()
    lk.apply_lora(model, r=2)


def fail_at(monkeypatch, owner, name, call):
    """Let ``owner.name`` raise at its ``call``-th call."""
    original, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise MemoryError("no memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("call", [1, 2, 7])
@pytest.mark.parametrize("where", ["building", "putting in", "freezing", "the report"])
def test_an_error_midway_leaves_the_model_as_it_was(monkeypatch, where, call):
    model = build("gpt2")
    # What was frozen or unfrozen before stays so.
    model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    before = small.Snapshot(model)
    if where == "building":
        fail_at(monkeypatch, FusedLoRALinear, "_add_lora", call)
    elif where == "putting in":
        fail_at(monkeypatch, small.transformers.PreTrainedModel, "get_submodule", call)
    elif where == "freezing":
        fail_at(monkeypatch, nn.Module, "requires_grad_", 1)
    else:
        fail_at(monkeypatch, lk.models.apply, "LoRAReport", 1)
    with pytest.raises(MemoryError):
        lk.apply_lora(model)
    monkeypatch.undo()
    before.assert_unchanged()
    assert lora_layers(lk.apply_lora(model))


def test_calls_on_a_plain_model_say_so():
    model = build("gpt2")
    for call in (lk.merge_adapter, lk.unmerge_adapter, lk.lora_report):
        with pytest.raises(ValueError, match="GPT2LMHeadModel .*apply_lora"):
            call(model)


def test_hooks_training_mode_and_requires_grad_of_others():
    model = build("bert").train()
    seen = []
    query = model.bert.encoder.layer[0].attention.self.query
    handle = query.register_forward_hook(lambda *_: seen.append(1))
    model.bert.pooler.eval()
    lk.apply_lora(model)
    small.logits(model)
    assert seen == [1]
    handle.remove()
    small.logits(model)
    assert seen == [1]
    assert not model.bert.pooler.dense.training
    assert model.bert.encoder.layer[0].attention.self.query.training


@pytest.mark.parametrize("offload", [False, True])
def test_layers_dispatched_by_accelerate(offload):
    """``device_map=`` puts a hook on every module; what it does must go on happening."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = build("llama")
    name = "model.layers.0.mlp.up_proj"
    hook = hooks.AlignDevicesHook(execution_device="cpu", offload=offload, weights_map={})
    hook.init_hook = lambda module: module
    moved = []
    hook.pre_forward = lambda module, *args, **kwargs: moved.append(type(module)) or (args, kwargs)
    hook.post_forward = lambda module, output: output
    hooks.add_hook_to_module(model.get_submodule(name), hook)
    lk.apply_lora(model)
    skipped = lk.lora_report(model).skipped
    if offload:
        assert skipped[name] == "its weight is offloaded by accelerate's device_map"
    else:
        assert name not in skipped
        small.logits(model)
        assert moved == [FusedLoRALinear]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models(tmp_path, wrap):
    inner = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, 3))
    plain = copy.deepcopy(inner)
    wrapped = wrap(inner)
    assert lk.apply_lora(wrapped, r=2) is wrapped
    assert lora_layers(inner).keys() == lora_layers(wrapped).keys() == {"0", "2"}
    assert lk.lora_report(wrapped) is lk.lora_report(inner)
    small.draw_adapter(inner)
    x = torch.randn(5, E)
    y = wrapped(x)
    lk.save_adapter(wrapped, tmp_path)
    other = wrap(plain)
    assert (other(x) - y).abs().max() > 0.1
    lk.load_adapter(other, tmp_path)
    assert torch.equal(other(x), y)
    lk.merge_adapter(other)
    assert small.relative_difference(other(x), y) < 1e-6
    lk.unmerge_adapter(other)
    assert torch.equal(other(x), y)
