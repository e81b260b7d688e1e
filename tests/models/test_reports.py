"""What the reports say: equal layers once, what cannot have an adapter, what was never called; and
configurations that are given as objects."""

import copy
import warnings

import peft
import pytest
import small
import torch
import torch.nn.functional as F
from torch import nn

import lora_kernels as lk
from lora_kernels.models.reports import grouped

E = 16


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        torch.compiler.reset()
        yield


def test_equal_layers_are_one_line():
    names = [f"layers.{i}.experts.{j}.w" for i in (0, 1, 2, 5) for j in range(3)]
    assert grouped(dict.fromkeys(names, "r=8") | {"layers.3.experts.0.w": "r=4", "w2": "x"}) == [
        "layers.0-2,5.experts.0-2.w: r=8 (12 layers)",
        "layers.3.experts.0.w: r=4",
        "w2: x",
    ]
    model = lk.apply_lora(small.build("llama", num_hidden_layers=12), r=8)
    lines = str(lk.lora_report(model)).splitlines()
    assert len(lines) == 9
    assert "  adapted  model.layers.0-11.mlp.up_proj: Linear [80, 48], r=8 (12 layers)" in lines
    model = small.peft_model(small.build("llama", num_hidden_layers=12), target_modules=["q_proj"])
    assert len(str(lk.accelerate_peft(model)).splitlines()) == 4


def test_refused_layers_are_one_line_of_the_error():
    model = small.build("llama")
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x: x
    with pytest.raises(ValueError, match=r"model.layers.0-1.mlp.up_proj: computes in its own way"):
        lk.apply_lora(model)


@pytest.mark.parametrize(("name", "arguments"), [("llama", {}), ("mixtral", {"experts": True})])
def test_a_merged_model_says_so(name, arguments):
    model = lk.apply_lora(small.build(name), target_modules=["q_proj"], **arguments)
    modules = 4 if arguments else 2
    line = f"  merged  into the weights of {modules} modules; unmerge_adapter undoes it"
    assert "merged" not in str(lk.lora_report(model))
    lk.merge_adapter(model)
    assert line in str(lk.lora_report(model)).splitlines()
    lk.unmerge_adapter(model)
    assert "merged" not in str(lk.lora_report(model))


def test_a_model_of_peft_has_its_report_elsewhere(tmp_path):
    for model, says in [
        (small.peft_model(small.build("llama"), target_modules=["q_proj"]), True),
        (small.build("llama"), False),
    ]:
        for call in (lk.lora_report, lambda model: lk.save_adapter(model, tmp_path)):
            with pytest.raises(ValueError, match="was not adapted by apply_lora") as error:
                call(model)
            assert ("print what accelerate_peft returns" in str(error.value)) == says


# ---- what cannot have an adapter


def warned(function, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(*args, **kwargs)
    return [str(w.message) for w in caught if "no adapter is possible" in str(w.message)]


MIXTURES = {
    "mixtral": "MixtralExperts",
    "qwen2 moe": "Qwen2MoeExperts",
    "gpt oss": "GptOssExperts",
    "deepseek v3": "DeepseekV3Experts",
}


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_three_dimensions_are_reported_with_their_share(name):
    model = small.build(name)
    kind = f"{MIXTURES[name]} (gate_up_proj, down_proj)"
    size = sum(p.numel() for n, p in model.named_parameters() if n.endswith("experts.down_proj"))
    size += sum(
        p.numel() for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj")
    )
    share = f"{100 * size / sum(p.numel() for p in model.parameters()):.1f}% of the weights"
    (message,) = warned(lk.apply_lora, model)
    assert kind in message and share in message
    report = lk.lora_report(model)
    assert list(report.unreached) == [kind] and share in report.unreached[kind]
    assert f"no adapter possible  {kind}: " in str(report)


def test_what_is_excluded_is_not_warned_of():
    named = [
        ({"target_modules": ["q_proj"]}, 1),
        ({"target_modules": ["q_proj", "down_proj"]}, 1),
        ({"target_modules": r".*(q_proj|experts\..*)"}, 1),
        ({"exclude_modules": r".*experts.*"}, 0),
    ]
    for arguments, count in named:
        model = small.build("mixtral")
        assert len(warned(lk.apply_lora, model, **arguments)) == count, arguments
        assert "MixtralExperts" in str(lk.lora_report(model))


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "whisper", "wav2vec2", "t5", "deberta"])
def test_embeddings_norms_convolutions_and_heads_are_no_news(name):
    assert not warned(lk.apply_lora, small.build(name))


class Raw(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2 * E, E))
        self.down = nn.Linear(2 * E, E)
        self.pos_embed = nn.Parameter(torch.zeros(1, 64, E))

    def forward(self, x):
        return self.down(F.linear(x, self.up))


class Dense(nn.Module):
    """A linear layer of a user's that is no nn.Linear."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(E, E))

    def forward(self, x):
        return x @ self.kernel


def test_matrices_outside_linear_layers_are_reported():
    model = nn.Sequential(Raw(), Dense(), nn.LSTM(E, E), nn.Linear(E, E))
    (message,) = warned(lk.apply_lora, model)
    kinds = list(lk.lora_report(model).unreached)
    assert kinds == ["Raw (up)", "Dense (kernel)", "LSTM (weight_ih_l0, weight_hh_l0)"]
    assert all(kind in message for kind in kinds)


def test_refused_linears_count_and_small_kinds_do_not():
    model = nn.Sequential(nn.Linear(E, E), nn.utils.parametrizations.weight_norm(nn.Linear(E, E)))
    (message,) = warned(lk.apply_lora, model)
    assert "ParametrizedLinear (its weight is no 2-D Parameter" in message
    model = nn.Sequential(nn.Linear(512, 512), Dense())
    assert not warned(lk.apply_lora, model) and not lk.lora_report(model).unreached


def test_a_store_says_what_has_no_slots():
    # Those of experts come with the first adapter that has any.
    assert not warned(lk.AdapterStore, small.build("mixtral"), max_adapters=1, max_rank=2)
    model = small.build("wavlm")
    (message,) = warned(lk.AdapterStore, model, max_adapters=1, max_rank=2)
    assert "WavLMAttention" in message
    model = small.build("llama")
    store = lk.AdapterStore(model, max_adapters=1, max_rank=2)
    assert store.skipped == {"lm_head": "output head"}
    pair = {"lm_head.lora_A.weight": torch.ones(1, 48)}
    pair["lm_head.lora_B.weight"] = torch.ones(model.lm_head.out_features, 1)
    store.load("head", pair, config={"r": 1, "target_modules": ["lm_head"]})
    assert store.skipped == {}


# ---- what was never called


class Skips(nn.Module):
    """A manner that no rule knows: a function reads the weight of a child."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.unused = nn.Linear(E, E)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def multiply(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x):
        return self.called(x) + multiply(self.read, x)


NEVER = ["blocks.0.read", "blocks.1.read", "blocks.2.read", "unused"]


def test_layers_that_no_call_reached_are_reported_after_a_forward():
    model = lk.apply_lora(Skips())
    assert lk.lora_report(model).never_called == []
    model(torch.ones(2, E))
    report = lk.lora_report(model)
    assert report.never_called == NEVER
    assert "  never called  blocks.0-2.read: not reached by any call so far" in str(report)
    assert lk.lora_report(copy.deepcopy(model)).never_called == []
    model.unused(torch.ones(2, E))
    assert lk.lora_report(model).never_called == NEVER[:-1]


@pytest.mark.parametrize("training", [False, True])
def test_compiled_calls_reach_layers_without_a_break_or_a_recompilation(training):
    model = lk.apply_lora(Skips()).train(training)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(3):
        compiled(torch.ones(2, E))
    assert len(graphs) == 1
    assert lk.lora_report(compiled).never_called == NEVER
    model(torch.ones(2, E))
    compiled(torch.ones(2, E))
    assert len(graphs) == 1 and lk.lora_report(model).never_called == NEVER


def test_code_that_equal_blocks_share_reaches_all_of_them():
    model = lk.apply_lora(Skips())
    for block in model.blocks:
        block.compile(backend="eager")
    model(torch.ones(2, E))
    assert lk.lora_report(model).never_called == NEVER


# ---- configurations as objects

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": r".*\.(q|v)_proj",
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
        "lora_dropout": 0.1,
        "use_rslora": True,
        "init_lora_weights": "gaussian",
    },
    "saved": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"], "bias": "all"},
    "no part of a layer": {
        "r": 2,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": True,
        "base_model_name_or_path": "x",
    },
}


@pytest.mark.parametrize("as_keyword", [False, True])
@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_of_pefts_is_taken(values, as_keyword):
    config = peft.LoraConfig(**values)
    model = small.build("llama")
    if as_keyword:
        lk.apply_lora(model, config=config)
    else:
        lk.apply_lora(model, config)
    expected = small.adapters(small.peft_model(small.build("llama"), **values))
    found = small.adapters(model)
    assert found.keys() == expected.keys()
    for name, (a, b, scaling, _) in expected.items():
        assert (found[name][0].shape, found[name][1].shape) == (a.shape, b.shape)
        assert found[name][2] == pytest.approx(scaling)
    layer = next(iter(lk.models.apply.lora_layers(model).values()))
    assert layer.lora_dropout == config.lora_dropout


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.AdaLoraConfig])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("excluded", [None, ["0.self_attn.v_proj"]])
@pytest.mark.filterwarnings("ignore:exclude_modules:UserWarning")
def test_a_config_of_pefts_without_targets_means_what_peft_chooses(kind, family, excluded):
    schedule = {"total_step": 10} if kind is peft.AdaLoraConfig else {}
    config = kind(exclude_modules=excluded, **schedule)
    theirs = peft.get_peft_model(small.build(family), copy.deepcopy(config))
    model = lk.apply_lora(small.build(family), config)
    adapted = lk.lora_report(model).adapted
    assert adapted.keys() == set(theirs.base_model.targeted_module_names)
    assert config.target_modules is None
    # By keywords, and in a configuration of ours, None is every linear layer.
    for arguments in ({}, {"config": lk.LoRAConfig()}):
        assert len(lk.lora_report(lk.apply_lora(small.build(family), **arguments)).adapted) > len(
            adapted
        )


def test_a_config_of_pefts_that_names_parameters_means_no_linear_layer():
    config = peft.LoraConfig(target_parameters=["experts.down_proj"])
    theirs = peft.get_peft_model(small.build("mixtral"), copy.deepcopy(config)).base_model
    assert not theirs.targeted_module_names
    model = lk.apply_lora(small.build("mixtral"), config)
    assert lk.lora_report(model).adapted.keys() == set(theirs.targeted_parameter_names)


@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.AdaLoraConfig])
def test_a_model_that_peft_does_not_know_wants_targets(kind):
    class Own(nn.Sequential):
        config = None

    config = kind(**({"total_step": 10} if kind is peft.AdaLoraConfig else {}))
    models = [Own(nn.Linear(4, 4)), small.build("llama")]
    models[1].config.model_type = "unheard of"
    for model in models:
        before = small.Snapshot(model)
        with pytest.raises(ValueError, match="no default target_modules for model_type"):
            lk.apply_lora(model, config)
        before.assert_unchanged()


def test_a_configuration_of_our_own_is_taken_and_not_kept():
    config = lk.LoRAConfig(r=3, target_modules=["q_proj"])
    model = lk.apply_lora(small.build("llama"), config, autocast_adapter_dtype=False)
    config.r = 99
    assert model._lora_kernels_applied.config.r == 3
    assert not model._lora_kernels_applied.config.autocast_adapter_dtype
    assert {layer.r for layer in lk.models.apply.lora_layers(model).values()} == {3}


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (peft.LoraConfig(lora_bias=True), {}, "config sets lora_bias, which is not computed"),
        (
            peft.LoraConfig(lora_bias=True, layer_replication=[(0, 1)]),
            {},
            "config sets layer_replication, lora_bias|config sets lora_bias, layer_replication",
        ),
        (peft.LoraConfig(init_lora_weights="pissa"), {}, "init_lora_weights must be"),
        (peft.LoHaConfig(), {}, "config is of LOHA"),
        (peft.LoraConfig(), {"r": 4, "bias": "all"}, "r, bias belongs into the config"),
        (lk.LoRAConfig(), {"lora_alpha": 3}, "lora_alpha belongs into the config"),
    ],
)
def test_a_configuration_that_is_not_computed_is_refused_by_name(config, arguments, message):
    model = small.build("llama")
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match=message):
        lk.apply_lora(model, config=config, **arguments)
    before.assert_unchanged()


def test_what_is_no_configuration():
    with pytest.raises(TypeError, match="config must be a LoraConfig of PEFT or an lk.LoRAConfig"):
        lk.apply_lora(small.build("llama"), config={"r": 4})
