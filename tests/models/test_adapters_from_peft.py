"""What PEFT saves along with A and B, and what it reads otherwise than it is written here: heads in
full, embeddings, experts."""

import copy
import json
import re
import warnings

import peft
import pytest
import small
import torch
import transformers
from safetensors.torch import load_file
from small import build
from torch import nn

import lora_kernels as lk
from lora_kernels.models.apply import lora_layers
from lora_kernels.models.foreign import _EXPERT_NAMES

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


@torch.no_grad()
def assert_same(ours, theirs):
    assert small.relative_difference(small.logits(ours), small.logits(theirs)) < 1e-5


def saved_by_peft(model, folder, **config):
    theirs = small.draw_adapter(small.peft_model(model, **config))
    theirs.save_pretrained(folder)
    return theirs


# ---- modules trained in full


def bart_sequences():
    torch.manual_seed(0)
    config = transformers.BartConfig(**small.BART, num_labels=3)
    return transformers.BartForSequenceClassification(config).eval()


def xlnet():
    torch.manual_seed(0)
    size = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}
    config = transformers.XLNetConfig(vocab_size=small.VOCABULARY, **size)
    return transformers.XLNetForSequenceClassification(config).eval()


HEADS = {
    "pre_classifier ends in classifier": (
        lambda: build("distilbert"),
        {"task_type": "SEQ_CLS", "target_modules": ["q_lin"]},
        {"classifier", "pre_classifier"},
    ),
    "neither classifier nor score": (
        xlnet,
        {"task_type": "SEQ_CLS", "target_modules": ["layer_1"]},
        set(),
    ),
    "both names": (
        lambda: build("bert"),
        {"task_type": "SEQ_CLS", "target_modules": ["query"], "modules_to_save": ["pooler"]},
        {"classifier", "bert.pooler"},
    ),
    "the end of a name": (
        lambda: build("llama"),
        {"target_modules": ["q_proj"], "modules_to_save": ["head", "nothing"]},
        {"lm_head"},
    ),
    "the end of several names": (
        lambda: build("llama"),
        {"target_modules": ["q_proj"], "modules_to_save": ["attention_layernorm"]},
        {f"model.layers.{i}.post_attention_layernorm" for i in (0, 1)},
    ),
}


@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_heads_that_peft_saves(tmp_path, case):
    make, config, saved = case
    theirs = saved_by_peft(make(), tmp_path, **config)
    ours = lk.load_adapter(make(), tmp_path)
    assert_same(ours, theirs)
    assert set(lk.lora_report(ours).modules_to_save) == saved
    # Saved here, it is the same adapter for both.
    lk.save_adapter(ours, tmp_path / "ours")
    assert_same(peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval(), theirs)
    assert_same(lk.load_adapter(make(), tmp_path / "ours"), theirs)
    assert_same(lk.load_adapter(ours, tmp_path), theirs)


def test_heads_without_usual_names(tmp_path):
    batch = small.batch_for(build("bart"))
    batch = {"input_ids": batch["input_ids"]}
    base = bart_sequences()
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
    theirs = small.draw_adapter(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = lk.load_adapter(base, tmp_path)
    expected = small.logits(theirs, batch)
    assert small.relative_difference(small.logits(ours, batch), expected) < 1e-5


MODULES = {
    # PEFT takes every module whose name ends in "norm".
    "norm": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "classifier": ("distilbert", {"target_modules": ["q_lin"], "modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("case", MODULES.values(), ids=MODULES)
def test_modules_saved_here_are_those_that_peft_reads(tmp_path, case):
    name, config = case
    ours = small.draw_adapter(lk.apply_lora(build(name), **config))
    lk.save_adapter(ours, tmp_path)
    assert_same(peft.PeftModel.from_pretrained(build(name), tmp_path).eval(), ours)
    assert_same(lk.load_adapter(build(name), tmp_path), ours)


def test_a_name_that_peft_reads_as_an_adapted_layer_too(tmp_path):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.lm_head = nn.Linear(8, 8), nn.Linear(8, 8)

    ours = lk.apply_lora(Heads(), target_modules=["lm_head"], modules_to_save=["head"])
    with pytest.warns(UserWarning, match="PEFT reads .*'head'.* as lm_head too"):
        lk.save_adapter(ours, tmp_path)
    again = lk.load_adapter(Heads(), tmp_path)
    assert lk.lora_report(again).modules_to_save == ["head"]


# ---- embeddings


@pytest.fixture(params=["untied", "tied", "an adapted head"])
def resized(request, tmp_path):
    """The resized base, and PEFT's model with new rows, saved."""
    torch.manual_seed(0)
    base = build("llama tied" if request.param == "tied" else "llama")
    base.resize_token_embeddings(small.VOCABULARY + 8, mean_resizing=False)
    targets = ["q_proj"] + ["lm_head"] * (request.param == "an adapted head")
    theirs = small.draw_adapter(small.peft_model(copy.deepcopy(base), target_modules=targets))
    inner = theirs.base_model.model
    with torch.no_grad():
        if request.param != "an adapted head":
            # Which is then all that PEFT saves.
            inner.get_input_embeddings().weight[small.VOCABULARY :] += 1
        head = inner.get_output_embeddings()
        getattr(head, "base_layer", head).weight[small.VOCABULARY :] -= 0.5
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    return base, theirs, tmp_path


BATCH = {"input_ids": torch.arange(60, 72).view(2, 6)}


@torch.no_grad()
def difference(ours, theirs):
    return small.relative_difference(small.logits(ours, BATCH), small.logits(theirs, BATCH))


def test_embeddings_that_peft_saved_along_load(resized):
    base, theirs, folder = resized
    ours = lk.load_adapter(copy.deepcopy(base), folder)
    assert difference(ours, theirs) < 1e-5
    assert not ours.get_input_embeddings().weight.requires_grad
    # They go along when it is saved again, also after loading it twice.
    lk.save_adapter(lk.load_adapter(ours, folder), folder / "again")
    assert difference(lk.load_adapter(copy.deepcopy(base), folder / "again"), theirs) < 1e-5
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "again").eval()
    assert difference(again, theirs) < 1e-5


def test_embeddings_load_into_a_merged_model(resized):
    base, theirs, folder = resized
    ours = lk.load_adapter(copy.deepcopy(base), folder, load_embedding_layers=False)
    assert difference(ours, theirs) > 0.01
    lk.merge_adapter(ours)
    lk.load_adapter(ours, folder)
    assert difference(ours, theirs) < 1e-5
    lk.unmerge_adapter(ours)
    assert difference(ours, theirs) < 1e-5


def test_embeddings_can_be_left_out(resized):
    base, _, folder = resized
    before = base.get_input_embeddings().weight.clone()
    ours = lk.load_adapter(base, folder, load_embedding_layers=False)
    assert torch.equal(ours.get_input_embeddings().weight, before)
    lk.save_adapter(ours, folder / "again")
    assert not any("embed_tokens" in key for key in load_file(folder / "again" / WEIGHTS))


def test_a_model_that_was_not_resized_says_so(resized):
    _, _, folder = resized
    model = build("llama")
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(72\)|vocabulary differs"):
        lk.load_adapter(model, folder)
    before.assert_unchanged()


def test_a_store_shares_its_embeddings(resized):
    base, _, folder = resized
    store = lk.AdapterStore(base)
    with pytest.raises(ValueError, match=r"\.weight; load_embedding_layers=False"):
        store.load("a", folder)
    assert store.names == []
    store.load("a", folder, load_embedding_layers=False)
    assert store.names == ["a"]


def test_a_store_takes_embeddings_that_are_its_own(resized):
    base, theirs, folder = resized
    with torch.no_grad():
        inner = theirs.base_model.model
        base.get_input_embeddings().weight.copy_(inner.get_input_embeddings().weight)
        head = inner.get_output_embeddings()
        base.get_output_embeddings().weight.copy_(getattr(head, "base_layer", head).weight)
    store = lk.AdapterStore(base)
    store.load("a", folder)
    with torch.no_grad(), store.batch(["a", "a"]):
        y = small.logits(store.model, BATCH)
    with torch.no_grad():
        assert small.relative_difference(y, small.logits(theirs, BATCH)) < 1e-5


def test_a_trained_head_is_never_left_out(tmp_path):
    saved_by_peft(build("llama"), tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
    store = lk.AdapterStore(build("llama"))
    with pytest.raises(ValueError, match=r"lm_head\.weight; a store serves A and B"):
        store.load("a", tmp_path, load_embedding_layers=False)


def test_two_values_for_a_tied_weight(tmp_path):
    theirs = small.peft_model(build("llama"), target_modules=["q_proj"])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    model = build("llama tied")
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match="differ, and are one parameter of the model"):
        lk.load_adapter(model, tmp_path)
    before.assert_unchanged()


# ---- mixtures

MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8}
MIXTURES = {
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0]},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_next": {
        "num_experts": 4,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["full_attention"] * 2,
    },
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "deepseek_v3": small.LATENT,
    "mixtral": {"num_local_experts": 4},
}
TARGETS = {
    "attention": ["q_proj", "o_proj"],
    "dense": ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "one of three": ["o_proj", "up_proj"],
    "a regex": r".*(self_attn\.o_proj|mlp\..*_proj)",
    "all": "all-linear",
}


def mixture(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        kind, **(small.DECODER | MOE | {"num_key_value_heads": 4} | MIXTURES[kind])
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("kind", MIXTURES)
def test_peft_reads_what_was_saved_of_a_mixture_or_saving_warns(tmp_path, kind, targets):
    ours = small.draw_adapter(lk.apply_lora(mixture(kind), r=3, target_modules=targets))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lk.save_adapter(ours, tmp_path)
    said = [str(w.message) for w in caught if "PEFT" in str(w.message)]
    assert_same(lk.load_adapter(mixture(kind), tmp_path), ours)
    try:
        theirs = peft.PeftModel.from_pretrained(mixture(kind), tmp_path).eval()
        right = small.relative_difference(small.logits(theirs), small.logits(ours)) < 1e-4
    except Exception:
        right = False
    assert right != bool(said), said


def test_the_names_of_experts_are_pefts():
    from peft.utils import transformers_weight_conversion as conversion

    expected = {k: frozenset(v) for k, v in conversion._MOE_TARGET_MODULE_MAPPING.items()}
    assert expected == _EXPERT_NAMES


def test_a_store_warns_as_well(tmp_path):
    store = lk.AdapterStore(mixture("qwen3_moe"))
    store.create("a", r=2, target_modules=["up_proj", "q_proj"])
    with pytest.warns(UserWarning, match=r"PEFT takes up_proj .*layers\.0\.mlp\.up_proj"):
        store.save("a", tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["q_proj", "up_proj"]
    assert re.match(
        "model", next(iter(lora_layers(lk.load_adapter(mixture("qwen3_moe"), tmp_path))))
    )
