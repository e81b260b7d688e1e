"""PEFT's format on disk, both ways."""

import json
import re
import warnings

import peft
import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from small import FAMILIES, build, in_our_names
from test_model_selection import SELECTIONS
from test_model_state import Shared

import lora_kernels as lk
from lora_kernels import FusedLoRALinear
from lora_kernels.models.apply import lora_layers
from lora_kernels.models.config import exact_patterns
from lora_kernels.models.on_disk import without_prefix

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


@torch.no_grad()
def assert_same_logits(ours, theirs, name):
    """In float32, between two implementations, on an adapter that moves the logits far."""
    y, expected = small.logits(ours), small.logits(theirs)
    assert small.relative_difference(small.logits(build(name)), expected) > 0.05
    assert small.relative_difference(y, expected) < 1e-5


def read(directory):
    return json.loads((directory / CONFIG).read_text()), load_file(directory / WEIGHTS)


# What PEFT's configurations can say, on the model it is said of.
ADAPTERS = SELECTIONS | {
    f"{name} {bias}": (name, {"target_modules": r".*(proj|c_attn|query|fc1)", "bias": bias})
    for name in FAMILIES
    for bias in ("none", "all", "lora_only")
}
ADAPTERS |= {
    "all biases and a module in full": (
        "bert",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "all biases and modules in full": (
        "roberta",
        {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]},
    ),
    "every Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "r": 3}),
    "an output head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_saved_here_loads_in_peft(tmp_path, adapter):
    name, config = adapter
    ours = small.draw_adapter(lk.apply_lora(build(name), lora_alpha=6, **config))
    lk.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_same_logits(ours, theirs, name)
    # What PEFT itself would have written, tensor by tensor, but for what it writes twice.
    theirs.save_pretrained(tmp_path / "theirs")
    _, expected = read(tmp_path / "theirs")
    _, found = read(tmp_path)
    extra = re.compile(r"\.(original_module|modules_to_save)\.|lm_head\.base_layer\.weight$")
    assert found.keys() == {key for key in expected if not extra.search(key)}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_saved_by_peft_loads_here(tmp_path, adapter):
    name, config = adapter
    theirs = small.draw_adapter(small.peft_model(build(name), lora_alpha=6, **config))
    theirs.save_pretrained(tmp_path)
    ours = lk.load_adapter(build(name), tmp_path)
    assert_same_logits(ours, theirs, name)
    found, expected = small.adapters(ours), small.adapters(theirs)
    assert found.keys() == expected.keys()
    for layer, (a, b, scaling, _) in expected.items():
        assert torch.equal(found[layer][0], a) and torch.equal(found[layer][1], b), layer
        assert found[layer][2] == pytest.approx(scaling), layer
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == in_our_names(
        n for n, p in theirs.named_parameters() if p.requires_grad
    )

    # Onto a model that was adapted alike and holds another adapter, merged ones included.
    other = small.draw_adapter(lk.apply_lora(build(name), lora_alpha=99, **config), seed=8)
    lk.merge_adapter(other)
    lk.load_adapter(other, tmp_path)
    assert all(layer.merged for layer in lora_layers(other).values())
    assert_same_logits(other, theirs, name)
    lk.unmerge_adapter(other)
    assert_same_logits(other, theirs, name)

    # And on from here: saved again, it is the same adapter.
    lk.save_adapter(other, tmp_path / "again")
    assert_same_logits(
        peft.PeftModel.from_pretrained(build(name), tmp_path / "again").eval(), theirs, name
    )


@pytest.mark.parametrize("name", [*FAMILIES, "t5", "bart", "llama bare", "bert masked", "roberta"])
@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_all_linear_both_ways(tmp_path, name, target_modules):
    ours = small.draw_adapter(lk.apply_lora(build(name), r=3, target_modules=target_modules))
    lk.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert small.adapters(theirs).keys() == lk.lora_report(ours).adapted.keys()
    assert_same_logits(ours, theirs, name)
    assert_same_logits(lk.load_adapter(build(name), tmp_path), theirs, name)

    theirs = small.draw_adapter(small.peft_model(build(name), target_modules="all-linear"))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_logits(lk.load_adapter(build(name), tmp_path / "theirs"), theirs, name)


@pytest.mark.parametrize("layers", [[1], [0, 1]])
@pytest.mark.parametrize(
    ("name", "targets"), [("gpt2 bare", ["c_attn"]), ("llama bare", ["q_proj", "down_proj"])]
)
def test_layers_of_a_model_without_a_prefix(tmp_path, name, targets, layers):
    """PEFT finds no index in "h.0.attn.c_attn", so the file must not ask it to."""
    ours = lk.apply_lora(build(name), target_modules=targets, layers_to_transform=layers)
    assert len(lora_layers(ours)) == len(targets) * len(layers)
    lk.save_adapter(small.draw_adapter(ours), tmp_path)
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path).eval()
    assert_same_logits(ours, theirs, name)
    assert_same_logits(lk.load_adapter(build(name), tmp_path), theirs, name)


@pytest.mark.parametrize(
    ("name", "task", "targets"),
    [
        ("bert", "SEQ_CLS", "all-linear"),
        ("bert tokens", "TOKEN_CLS", ["query", "value"]),
        ("bert questions", "QUESTION_ANS", ["query", "value"]),
        ("llama", "CAUSAL_LM", "all-linear"),
        ("llama sequences", "SEQ_CLS", "all-linear"),
        ("t5", "SEQ_2_SEQ_LM", "all-linear"),
        ("bert bare", "FEATURE_EXTRACTION", "all-linear"),
    ],
)
def test_task_types_of_peft(tmp_path, name, task, targets):
    """With a task PEFT trains heads in full, and lists their usual names, present or not."""
    theirs = small.peft_model(build(name), task_type=task, target_modules=targets)
    small.draw_adapter(theirs).save_pretrained(tmp_path)
    ours = lk.load_adapter(build(name), tmp_path)
    assert_same_logits(ours, theirs, name)
    lk.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours").eval()
    assert_same_logits(again, theirs, name)


def test_adapters_of_transformers_own_integration(tmp_path):
    small.need_peft_for_transformers()
    theirs = build("llama")
    theirs.add_adapter(peft.LoraConfig(target_modules=["q_proj", "o_proj"]))
    small.draw_adapter(theirs).save_pretrained(tmp_path)
    ours = lk.load_adapter(build("llama"), tmp_path)
    assert_same_logits(ours, theirs, "llama")
    lk.save_adapter(ours, tmp_path / "ours")
    model = build("llama")
    model.load_adapter(tmp_path / "ours")
    assert_same_logits(ours, model, "llama")


def test_a_scaling_set_by_hand_is_saved(tmp_path):
    config = {"r": 4, "lora_alpha": 6, "alpha_pattern": {"q_proj": 9}, "use_rslora": True}
    ours = lk.apply_lora(build("llama"), target_modules=["q_proj", "v_proj"], **config)
    small.draw_adapter(ours)
    ours.model.layers[0].self_attn.q_proj.scaling = 0.31
    ours.model.layers[1].self_attn.v_proj.scaling *= 2
    lk.save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(build("llama"), tmp_path).eval()
    assert_same_logits(ours, theirs, "llama")
    for name, (_, _, scaling, _) in small.adapters(theirs).items():
        assert lora_layers(ours)[name].scaling == pytest.approx(scaling), name
    assert_same_logits(lk.load_adapter(build("llama"), tmp_path), theirs, "llama")


def test_saving_while_merged_saves_the_adapter_and_not_the_sum(tmp_path):
    ours = small.draw_adapter(lk.apply_lora(build("gpt2"), modules_to_save=["ln_f"], bias="all"))
    lk.save_adapter(ours, tmp_path / "unmerged")
    lk.merge_adapter(ours)
    lk.save_adapter(ours, tmp_path / "merged")
    assert all(layer.merged for layer in lora_layers(ours).values())
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "merged" / file).read_bytes() == (
            tmp_path / "unmerged" / file
        ).read_bytes()
    lk.merge_adapter(ours, keep_base=False)
    with pytest.raises(RuntimeError, match="keep_base=False"):
        lk.save_adapter(ours, tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
    lk.load_adapter(ours, tmp_path / "merged")
    assert lora_layers(ours)


def test_half_precision(tmp_path):
    ours = lk.apply_lora(build("llama").bfloat16(), target_modules=["q_proj"])
    small.draw_adapter(ours)
    lk.save_adapter(ours, tmp_path)
    config, tensors = read(tmp_path)
    assert "autocast_adapter_dtype" not in config
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    save_file({k: t.bfloat16() for k, t in tensors.items()}, tmp_path / WEIGHTS)
    loaded = lk.load_adapter(build("llama"), tmp_path)
    for name, layer in lora_layers(loaded).items():
        saved = tensors[f"{PREFIX}{name}.lora_A.weight"]
        assert layer.lora_A.dtype == torch.float32
        assert torch.equal(layer.lora_A, saved.bfloat16().float())


def test_load_replaces_only_the_adapter_and_its_scaling(tmp_path):
    theirs = small.peft_model(
        build("llama"), r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj"]
    )
    small.draw_adapter(theirs).save_pretrained(tmp_path)
    ours = lk.apply_lora(
        build("llama"), r=2, rank_pattern={"q_proj": 4}, target_modules=["q_proj"], lora_dropout=0.3
    )
    report = lk.lora_report(ours)
    lk.load_adapter(ours, tmp_path)
    assert lk.lora_report(ours) is report
    assert {layer.lora_dropout for layer in lora_layers(ours).values()} == {0.3}
    assert {layer.scaling for layer in lora_layers(ours).values()} == {6 / 2}
    lk.save_adapter(ours, tmp_path / "ours")
    config, _ = read(tmp_path / "ours")
    expected = {"r": 2, "rank_pattern": {"q_proj": 4}, "lora_alpha": 6, "use_rslora": True}
    expected |= {"lora_dropout": 0.3, "alpha_pattern": {}}
    assert expected.items() <= config.items()
    assert_same_logits(
        peft.PeftModel.from_pretrained(build("llama"), tmp_path / "ours").eval(), theirs, "llama"
    )


def test_keys_without_pefts_prefix_are_read(tmp_path):
    ours = small.draw_adapter(lk.apply_lora(build("llama"), target_modules=["q_proj"]))
    lk.save_adapter(ours, tmp_path)
    tensors = {k.removeprefix(PREFIX): t for k, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    assert_same_logits(lk.load_adapter(build("llama"), tmp_path), ours, "llama")


def test_embeddings_that_peft_saved_along_are_no_news(tmp_path):
    theirs = small.draw_adapter(small.peft_model(build("llama"), target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert f"{PREFIX}model.embed_tokens.weight" in load_file(tmp_path / WEIGHTS)
    assert_same_logits(lk.load_adapter(build("llama"), tmp_path), theirs, "llama")


def test_a_shared_module_is_saved_with_a_warning(tmp_path):
    ours = small.draw_adapter(lk.apply_lora(Shared()))
    with pytest.warns(UserWarning, match="again is one module with another place"):
        lk.save_adapter(ours, tmp_path)
    other = Shared()
    other.load_state_dict({k: v for k, v in ours.state_dict().items() if "lora" not in k})
    with pytest.warns(UserWarning, match="PEFT applies it at the first place only"):
        lk.load_adapter(other, tmp_path)
    x = torch.randn(3, 16)
    assert torch.equal(other(x), ours(x))
    assert isinstance(other.again, FusedLoRALinear)


def test_fields_of_later_versions_are_named(tmp_path):
    ours = small.draw_adapter(lk.apply_lora(build("llama"), target_modules=["q_proj"]))
    lk.save_adapter(ours, tmp_path)
    config, _ = read(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config | {"use_later": True, "not_used": None}))
    with pytest.warns(UserWarning, match="ignored fields that are not known here: use_later$"):
        lk.load_adapter(build("llama"), tmp_path)


def test_every_field_of_peft_is_known(tmp_path):
    """A field that PEFT adds must be looked at: does it change what a layer computes?"""
    small.peft_model(build("llama"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    config, _ = read(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({k: v or 1 for k, v in config.items()}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="FusedLoRALinear does not compute"):
            lk.load_adapter(build("llama"), tmp_path)
    neutral = {"use_dora", "lora_bias", "use_qalora"}
    known = peft.LoraConfig(target_modules=["q_proj"]).to_dict().keys()
    assert neutral <= known


def test_an_overwritten_adapter_is_never_half_written(tmp_path, monkeypatch):
    ours = small.draw_adapter(lk.apply_lora(build("llama"), target_modules=["q_proj"]))
    lk.save_adapter(ours, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(lk.models.checkpoints, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        lk.save_adapter(small.draw_adapter(ours, seed=8), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_a_plain_model_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel .*apply_lora"):
        lk.save_adapter(build("gpt2"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_pattern_that_is_made_matches_its_own_layer_alone():
    layers = {"a.q": (8, 16.0), "abq": (4, 16.0)}
    patterns = exact_patterns(lk.LoRAConfig(r=4, lora_alpha=16), layers)["rank_pattern"]
    # As PEFT reads them.
    ranks = {
        name: next((r for key, r in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), 4)
        for name in layers
    }
    assert ranks == {name: r for name, (r, _) in layers.items()}


def test_a_model_may_have_pefts_prefix_of_its_own():
    factor = torch.ones(2, 3)
    keys = {"base_model.model.q.lora_A.weight": factor}
    theirs = without_prefix(keys, ["base_model", "base_model.model", "base_model.model.q"])
    assert list(theirs) == list(keys)
    assert list(without_prefix(keys, ["q"])) == ["q.lora_A.weight"]
