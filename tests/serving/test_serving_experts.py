"""Adapters on experts in mixed batches: every token meets its router's experts with the adapter of
its own sequence."""

import json
import warnings

import mixtures
import peft
import pytest
import small
import torch
from stores import answered_by

import lora_kernels as lk
from lora_kernels.layers.multi_experts import MultiLoRAExperts

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss"]
ATTENTION = ["q_proj", "o_proj"]
# Of different ranks, scales, Parameters and layers; c has no experts, d no attention.
ADAPTERS = {
    "a": {"r": 2, "lora_alpha": 3, "target_modules": ATTENTION},
    "b": {"r": 5, "target_parameters": ["experts.down_proj"], "target_modules": ["v_proj"]},
    "c": {"r": 3, "target_parameters": None, "target_modules": ATTENTION},
    "d": {"r": 1, "use_rslora": True, "rank_pattern": {"layers.1.mlp.experts.gate_up_proj": 4}},
}
NAMES = ["a", None, "b", "c", "d", "a"]
PROMPTS = torch.arange(6 * 5).view(6, 5) * 11 % (small.VOCABULARY - 3) + 3


@pytest.fixture(scope="module", params=FAMILIES)
def zoo(request, tmp_path_factory):
    """The family, the adapters' folders as PEFT writes them, and the merged models."""
    folder = tmp_path_factory.mktemp(request.param)
    merged = {None: mixtures.build(request.param)}
    for seed, (name, changes) in enumerate(ADAPTERS.items()):
        model = peft.get_peft_model(mixtures.build(request.param), mixtures.config_for(**changes))
        mixtures.draw(model, seed)
        model.eval().save_pretrained(folder / name)
        merged[name] = model.merge_and_unload()
    return request.param, folder, merged


def open_store(zoo, names=ADAPTERS, **options):
    family, folder, _ = zoo
    options = {"max_adapters": 4, "max_rank": 8} | options
    store = lk.AdapterStore(mixtures.build(family), **options)
    for name in names:
        store.load(name, folder / name)
    return store


def generate(model, prompts):
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)


def difference(logits, model, prompts):
    with torch.no_grad():
        return small.relative_difference(logits, model(prompts).logits)


def check_logits(zoo, store, names=NAMES):
    merged = zoo[2]
    prompts = PROMPTS[: len(names)]
    with torch.no_grad(), store.batch(names):
        logits = store.model(prompts).logits
    for i, name in enumerate(names):
        for other, model in merged.items():
            found = difference(logits[i : i + 1], model, prompts[i : i + 1])
            assert (found < 1e-5) == (other == name), (i, name, other, found)


def test_tokens_are_the_merged_models(zoo):
    merged = zoo[2]
    store = open_store(zoo)
    with answered_by("expert_linear_fwd", "segmented_lora_"), store.batch(NAMES):
        tokens = generate(store.model, PROMPTS)
    expected = [
        generate(merged[name], row[None])[0] for name, row in zip(NAMES, PROMPTS, strict=True)
    ]
    assert torch.equal(tokens, torch.stack(expected))
    base = generate(merged[None], PROMPTS)
    assert [torch.equal(*pair) for pair in zip(tokens, base, strict=True)] == [
        name is None for name in NAMES
    ]
    check_logits(zoo, store)


@pytest.mark.parametrize("of_bitsandbytes", [False, True])
def test_tokens_over_experts_in_four_bits(zoo, of_bitsandbytes, monkeypatch):
    """They are those of merged models with what the bytes mean."""
    family, folder, _ = zoo
    base, decoded = mixtures.in_four_bits(family)
    if of_bitsandbytes:
        bnb = pytest.importorskip("bitsandbytes.nn.parametrize")
        mixtures.decode_flat(monkeypatch)
        base = mixtures.build(family)
        options = {"compress_statistics": True, "quant_type": "nf4"}
        for layer in base.model.layers:
            for name in ("gate_up_proj", "down_proj"):
                bnb.replace_parameter_4bit(layer.mlp.experts, name, **options)
        lk.quantize_base(base)
    kinds, plain = [type(m).__name__ for m in base.modules()], generate(base, PROMPTS)
    store = lk.AdapterStore(base, max_adapters=4, max_rank=8)
    merged = {None: decoded}
    for name in ADAPTERS:
        store.load(name, folder / name)
        merged[name] = lk.load_adapter(mixtures.in_four_bits(family)[1], folder / name)
        lk.merge_adapter(merged[name])
    slots = store.model.model.layers[0].mlp.experts.slots["down_proj"]
    assert slots.lora_A.dtype == torch.float32
    with lk.record_plans() as answers, store.batch(NAMES):
        tokens = generate(store.model, PROMPTS)
    assert {a.problem.four_bit for a in answers if a.op == "expert_linear_fwd"} == {True}
    expected = [
        generate(merged[name], row[None])[0] for name, row in zip(NAMES, PROMPTS, strict=True)
    ]
    assert torch.equal(tokens, torch.stack(expected))
    assert [torch.equal(*pair) for pair in zip(tokens, plain, strict=True)] == [
        name is None for name in NAMES
    ]
    check_logits((family, folder, merged), store)
    store.close()
    assert [type(m).__name__ for m in store.model.modules()] == kinds
    assert torch.equal(generate(store.model, PROMPTS), plain)


def test_the_reference_serves_the_same(zoo):
    store = open_store(zoo)
    with lk.force_plan("reference"):
        check_logits(zoo, store)


def test_packed_sequences(zoo):
    """Rows are told apart by the table, not by the first dimension."""
    family, _, merged = zoo
    store = open_store(zoo)
    experts = store.model.model.layers[0].mlp.experts
    assert isinstance(experts, MultiLoRAExperts)
    own = merged["a"].model.layers[0].mlp.experts, merged["d"].model.layers[0].mlp.experts
    x = torch.randn(7, mixtures.SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    index = torch.arange(14).view(7, 2) % 4
    weights = torch.rand(7, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), store.batch(["a", "d"], lengths=[5, 2]):
        y = experts(x, index, weights)
    with torch.no_grad():
        expected = [
            m(x, index, weights)[part] for m, part in zip(own, (slice(5), slice(5, 7)), strict=True)
        ]
    assert small.relative_difference(y, torch.cat(expected)) < 1e-5


def test_adapters_that_take_turns_in_a_slot(zoo):
    store = open_store(zoo, max_adapters=1)
    for name in ("a", "d", "b", "a"):
        check_logits(zoo, store, [name, None, name])


def test_files_come_out_as_they_went_in(zoo, tmp_path):
    family, folder, _ = zoo
    store = open_store(zoo)
    for name in ADAPTERS:
        store.save(name, tmp_path / name)
        theirs, ours = (
            peft.PeftModel.from_pretrained(mixtures.build(family), path / name)
            for path in (folder, tmp_path)
        )
        theirs, ours = theirs.state_dict(), ours.state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
        assert store.state_dict(name).keys() == {
            key.removeprefix("base_model.model.")
            for key in peft.utils.load_peft_weights(folder / name)
        }


def test_without_a_batch_the_model_is_what_it_was(zoo):
    family = zoo[0]
    bare = mixtures.build(family)
    store = open_store(zoo)
    assert store.model.state_dict().keys() == bare.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(store.model(PROMPTS).logits, bare(PROMPTS).logits)
        with store.batch(["c"] * 6):
            # No expert of the batch is adapted: the model's own code computes them.
            store.model(PROMPTS)
    experts = store.model.model.layers[1].mlp.experts
    trained = {name for name, p in bare.named_parameters() if p.requires_grad}
    store.close()
    assert type(experts) is type(bare.model.layers[1].mlp.experts)
    assert {name for name, p in store.model.named_parameters() if p.requires_grad} == trained


def test_slots_come_with_the_first_adapter_that_has_experts(zoo):
    with warnings.catch_warnings():
        # Of experts that no adapter could have.
        warnings.simplefilter("error")
        store = open_store(zoo, ["c"])
    path = "model.layers.0.mlp.experts"
    assert store.skipped[f"{path}.down_proj"] == "gets slots when an adapter has it"
    assert not isinstance(store.model.get_submodule(path), MultiLoRAExperts)
    store.load("b", zoo[1] / "b")
    experts = store.model.get_submodule(path)
    assert isinstance(experts, MultiLoRAExperts) and list(experts.slots) == ["down_proj"]
    assert f"{path}.down_proj" not in store.skipped
    check_logits(zoo, store, ["b", "c"])
    store.load("a", zoo[1] / "a")
    check_logits(zoo, store, ["a", "b", "c"])


def test_warmup_runs_base_and_adapters(zoo):
    store = open_store(zoo)
    k = store.model.config.num_experts_per_tok
    with lk.record_plans() as answers:
        lk.warmup(store.model, [5])
    mixed = [a.problem.m for a in answers if a.op == "segmented_lora_"]
    assert mixed == [5 * k] * 4
    assert [a.problem.r for a in answers if a.op == "expert_linear_fwd"] == [0] * 4


def test_a_compiled_model_serves_the_same(zoo):
    store = open_store(zoo)
    compiled = torch.compile(store.model, backend="aot_eager")
    for names in (["a", None], ["d", "b"]):
        with torch.no_grad(), store.batch(names):
            expected = store.model(PROMPTS[:2]).logits
            assert small.relative_difference(compiled(PROMPTS[:2]).logits, expected) < 1e-5


def with_config(zoo, name, tmp_path, **changes):
    """The adapter's files, with another configuration."""
    target = tmp_path / "changed"
    target.mkdir()
    (target / "adapter_model.safetensors").write_bytes(
        (zoo[1] / name / "adapter_model.safetensors").read_bytes()
    )
    content = json.loads((zoo[1] / name / "adapter_config.json").read_text()) | changes
    (target / "adapter_config.json").write_text(json.dumps(content))
    return target


def test_what_is_not_served_is_refused(zoo, tmp_path):
    store = open_store(zoo)
    with pytest.raises(RuntimeError, match="adapters of experts and does not train them"):
        store.requires_grad_()
    with pytest.raises(ValueError, match="no biases, modules_to_save, DoRA or experts"):
        store.create("new", target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts.gate_up_proj' is above"):
        open_store(zoo, ["d"], max_rank=8).load("e", with_config(zoo, "d", tmp_path, r=9))
    narrow = lk.AdapterStore(mixtures.build(zoo[0]), target_modules=["q_proj"])
    assert narrow.skipped["model.layers.1.mlp.experts.gate_up_proj"] == "not in target_modules"
    with pytest.raises(ValueError, match=r"mlp.experts.gate_up_proj' is not among the store's"):
        narrow.load("d", zoo[1] / "d")
    trained = open_store(zoo, ["c"])
    trained.requires_grad_()
    with pytest.raises(RuntimeError, match="does not train them"):
        trained.load("d", zoo[1] / "d")
    assert not any(isinstance(m, MultiLoRAExperts) for m in trained.model.modules())
    odd = mixtures.build(zoo[0])
    experts = odd.model.layers[1].mlp.experts
    experts.forward = lambda *args: type(experts).forward(experts, *args)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.* computes in its own way"):
        lk.AdapterStore(odd).load("d", zoo[1] / "d")
