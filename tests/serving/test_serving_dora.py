"""DoRA adapters in a store's mixed batches, against PEFT's merged models in float64."""

import copy

import peft
import pytest
import small
import torch
from stores import answered_by
from torch import nn

import lora_kernels as lk
from lora_kernels.testing.linear import assert_within_budget

NAMES = ["dora", None, "plain", "other"]


def adapted(family, seed, **config):
    model = small.peft_model(small.build(family), **config)
    small.draw_adapter(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.base_model.model.modules():
            for held in getattr(layer, "lora_magnitude_vector", {}).values():
                # Of the sum, whose rows the draw has lengthened, some longer and some shorter.
                weight = layer.base_layer.weight
                product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
                whole = (weight.t() if layer.fan_in_fan_out else weight) + (
                    layer.scaling["default"] * product
                )
                norm = whole.norm(dim=1)
                held.weight.copy_(norm * (0.5 + torch.rand(norm.shape, generator=generator)))
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def zoo(request, tmp_path_factory):
    """Adapters in directories, and their merged models in float64, by name."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    some = {"llama": ["q_proj", "o_proj", "up_proj"], "gpt2": ["c_attn", "c_proj"]}[family]
    targets, every = {"target_modules": some}, {"target_modules": "all-linear"}
    with small.isolated():
        models = {
            "dora": adapted(family, 3, r=4, lora_alpha=8, use_dora=True, **targets),
            "other": adapted(family, 4, r=7, lora_alpha=5, use_dora=True, **every),
            "plain": adapted(family, 5, r=5, lora_alpha=9, **targets),
        }
        merged = {None: small.build(family).double()}
        for name, model in models.items():
            model.save_pretrained(folder / name)
            merged[name] = copy.deepcopy(model).double().merge_and_unload()
    return family, folder, merged


def store_of(zoo, slots=3, model=None, **options):
    family, folder, merged = zoo
    model = small.build(family) if model is None else model
    store = lk.AdapterStore(model, max_adapters=slots, max_rank=8, **options)
    for name in merged:
        if name is not None:
            store.load(name, folder / name)
    return store


def check(y, names, merged, batch, tolerance=1e-5):
    for row, name in enumerate(names):
        inputs = {k: v[row : row + 1] for k, v in batch.items()}
        for other in merged:
            exact = small.logits(merged[other], inputs)[0]
            difference = small.relative_difference(y[row].double(), exact)
            assert (difference < tolerance) == (other == name), (name, other, difference)


@pytest.mark.parametrize("slots", [3, 2, 1])
@torch.no_grad()
def test_every_row_is_its_own_merged_model(zoo, slots):
    store, merged = store_of(zoo, slots), zoo[2]
    batch = small.batch_for(store.model, rows=4)
    groups = {3: [NAMES, NAMES[::-1]], 2: [["dora", None, "plain", "dora"], ["other", "plain"] * 2]}
    # With one slot each takes the place of the one before it: what was a DoRA adapter's is plain.
    for names in groups.get(slots) or [[name, None] * 2 for name in merged if name]:
        with store.batch(names), answered_by("segmented_linear_fwd"):
            y = small.logits(store.model, batch)
        check(y, names, merged, batch)


@torch.no_grad()
def test_rows_of_others_keep_their_bits(zoo):
    store = store_of(zoo)
    batch = small.batch_for(store.model, rows=4)
    with store.batch(NAMES):
        mixed = small.logits(store.model, batch)
    with store.batch([None, None, "plain", None]):
        others = small.logits(store.model, batch)
    assert torch.equal(mixed[1:3], others[1:3]) and not torch.equal(mixed[0], others[0])


@pytest.mark.slow
@torch.no_grad()
def test_tokens_are_those_of_the_merged_models(zoo):
    store, merged = store_of(zoo), zoo[2]
    ids = small.batch_for(store.model, rows=4)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with store.batch(NAMES):
        found = store.model.generate(ids, **options)
    for row, name in enumerate(NAMES):
        expected = merged[name].generate(ids[row : row + 1], **options)
        assert torch.equal(found[row : row + 1], expected), name


@torch.no_grad()
def test_saved_as_peft_reads_it(zoo, tmp_path):
    family, _, merged = zoo
    store = store_of(zoo, 1)
    store.save("dora", tmp_path)
    again = peft.PeftModel.from_pretrained(small.build(family), tmp_path).eval()
    assert again.peft_config["default"].use_dora
    batch = small.batch_for(store.model, rows=1)
    check(small.logits(again, batch), ["dora"], merged, batch)


def test_gradients_of_the_input_pass(zoo):
    store, merged = store_of(zoo), zoo[2]
    ids = small.batch_for(store.model, rows=4)["input_ids"]
    with store.batch(NAMES):
        ours = gradients(store.model, ids)
    for row, name in enumerate(NAMES):
        exact = gradients(merged[name], ids[row : row + 1])
        assert small.relative_difference(ours[row].double(), exact[0]) < 1e-4, name


def gradients(model, ids):
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().sum().backward()
    return embedded.grad


class One(nn.Module):
    def __init__(self, dtype, bias):
        super().__init__()
        self.proj = nn.Linear(72, 56, bias=bias, dtype=dtype)

    def forward(self, x):
        return self.proj(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_one_layer_against_float64(dtype, bias):
    torch.manual_seed(0)
    model = One(dtype, bias)
    weight = model.proj.weight.double()
    a, b = torch.randn(5, 72).to(dtype), torch.randn(56, 5).to(dtype)
    scale = 7 / 5
    b.mul_(weight.norm() / (scale * b.double() @ a.double()).norm())
    norm = (weight + scale * b.double() @ a.double()).norm(dim=1)
    m = (norm * (0.5 + torch.rand(56))).to(dtype)
    tensors = {"proj.lora_A.weight": a, "proj.lora_B.weight": b, "proj.lora_magnitude_vector": m}
    config = {"r": 5, "lora_alpha": 7, "target_modules": ["proj"], "use_dora": True}
    store = lk.AdapterStore(model, 2, 8, ["proj"])
    store.load("a", tensors, config=config)
    x = torch.randn(3, 11, 72).to(dtype)
    with store.batch(["a", None, "a"]):
        y = model(x)
    results = []
    for kind in torch.float64, dtype:
        w, a_, b_, x_ = (t.to(kind) for t in (model.proj.weight, a, b, x))
        base = x_ @ w.t()
        rows = (base + scale * (x_ @ a_.t()) @ b_.t()) * (m.to(kind) / norm.to(kind))
        rows[1] = base[1]
        results.append(rows if model.proj.bias is None else rows + model.proj.bias.to(kind))
    assert_within_budget("y", y, results[1], results[0])


def test_what_is_not_served_is_refused(zoo):
    store = store_of(zoo)
    with pytest.raises(RuntimeError, match="does not train"):
        store.requires_grad_()
    assert not any(p.requires_grad for p in store.parameters())
    with pytest.raises(ValueError, match="DoRA"):
        store.create("new", use_dora=True)
    _, folder, _ = zoo
    training = lk.AdapterStore(small.build(zoo[0]), 2, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="does not train"):
        training.load("dora", folder / "dora")
    assert training.names == []
