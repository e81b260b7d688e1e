"""Whole models with adapters compute what the formula, a merge by hand and PEFT say."""

import copy
import io

import pytest
import small
import torch
from small import CONFIG, FAMILIES, GENERATING, adapt, build, trainable
from training import assert_close

import lora_kernels as lk
from lora_kernels.models.apply import lora_layers


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


def gradients(model):
    """name -> gradients of A and B, after a backward of the loss."""
    model.zero_grad()
    small.loss(model, small.batch_for(model, rows=3)).backward()
    return {
        f"{name} {which}": parameter.grad.clone()
        for name, (a, b, *_) in small.adapters(model).items()
        for which, parameter in (("A", a), ("B", b))
    }


def in_double(model):
    """The model in float64, and its inputs with it."""
    model = copy.deepcopy(model).double()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: (
            args,
            {k: v.double() if v.is_floating_point() else v for k, v in kwargs.items()},
        ),
        with_kwargs=True,
    )
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_and_gradients_are_those_of_pefts_eager_model(name):
    ours = adapt(name)
    targets = list(lora_layers(ours))
    theirs = small.draw_adapter(small.peft_model(build(name), target_modules=targets, **CONFIG))
    for n, (a, b, scaling, _) in small.adapters(theirs).items():
        layer = lora_layers(ours)[n]
        assert torch.equal(layer.lora_A, a) and torch.equal(layer.lora_B, b)
        assert layer.scaling == pytest.approx(scaling)
    exact = in_double(theirs)
    with torch.no_grad():
        # Of a classifier's few logits the largest error of one library may be far from another's.
        batch = small.batch_for(ours, rows=32)
        base, y = small.logits(build(name), batch), small.logits(ours, batch)
        assert (y - base).abs().max() > 0.3 * base.abs().max(), "the adapter cannot be seen"
        assert_close("logits", y, small.logits(theirs, batch), small.logits(exact, batch))
    mine, eager, reference = gradients(ours), gradients(theirs), gradients(exact)
    assert mine.keys() == reference.keys() and len(mine) == 2 * len(targets)
    for n, gradient in mine.items():
        assert reference[n].abs().max() > 0, n
        assert_close(n, gradient, eager[n], reference[n])


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_is_that_of_weights_merged_by_hand(name):
    ours = adapt(name)
    merged = in_double(small.merged_by_hand(build(name), ours))
    with torch.no_grad():
        y, exact = small.logits(ours), small.logits(merged)
        assert small.relative_difference(y.double(), exact) < 1e-5
        assert small.relative_difference(small.logits(build(name)).double(), exact) > 0.3


def test_square_conv1d_by_its_formula():
    model = small.Square()
    plain = copy.deepcopy(model)
    small.draw_adapter(lk.apply_lora(model, r=3, lora_alpha=7, target_modules=["proj"]))
    layer = model.proj
    assert layer.fan_in_fan_out and layer.weight.shape == plain.proj.weight.shape
    assert torch.equal(layer.weight, plain.proj.weight)
    x = torch.randn(9, 40)
    dy = torch.randn(9, 40, dtype=torch.float64)

    def leaf(tensor):
        return tensor.detach().double().requires_grad_()

    x64, w, a, b = map(leaf, (x, layer.weight, layer.lora_A, layer.lora_B))
    exact = x64 @ w + 7 / 3 * (x64 @ a.t()) @ b.t() + layer.bias.double()
    turned = x64 @ w.t() + 7 / 3 * (x64 @ a.t()) @ b.t() + layer.bias.double()
    x.requires_grad_()
    y = model(x)
    assert small.relative_difference(y.double(), exact) < 1e-5
    assert small.relative_difference(turned, exact) > 0.3
    ours = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy.float())
    reference = torch.autograd.grad(exact, [x64, a, b], dy)
    for name, gradient, expected in zip("xAB", ours, reference, strict=True):
        assert small.relative_difference(gradient.double(), expected) < 1e-5, name
    delta = 7 / 3 * (layer.lora_B.double() @ layer.lora_A.double()).t()
    assert small.relative_difference(layer.delta_weight().double(), delta) < 1e-5
    layer.merge()
    assert small.relative_difference(layer.weight.double(), w + delta) < 1e-5
    assert small.relative_difference(model(x).double(), exact) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_adapter_changes_nothing(name):
    before = small.logits(build(name))
    with torch.no_grad():
        fresh = small.logits(lk.apply_lora(build(name)))
    # Our kernels add in another order than the library's.
    assert small.relative_difference(fresh, before) < 1e-6


@pytest.mark.parametrize("name", FAMILIES)
def test_training_lowers_the_loss_and_touches_only_the_adapter(name):
    model = lk.apply_lora(build(name), r=5, lora_dropout=0.1).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert trainable(model) == {f"{n}.lora_{x}" for n in lora_layers(model) for x in "AB"}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    model.eval()
    first = small.loss(model).item()
    model.train()
    for _ in range(12):
        optimizer.zero_grad()
        small.loss(model).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
    assert small.loss(model.eval()).item() < 0.7 * first
    for n, parameter in model.named_parameters():
        if n in frozen:
            assert torch.equal(parameter, frozen[n]), n


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing(name, use_reentrant):
    def run(checkpointing):
        model = adapt(name, lora_dropout=0.2).train()
        # Checkpointing turns the cache off, and attention is then computed in another way.
        model.config.use_cache = False
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            if use_reentrant:
                # The recomputation starts only from an input that requires grad.
                if hasattr(model, "enable_input_require_grads") and name != "vit":
                    model.enable_input_require_grads()
                else:
                    model.get_input_embeddings().register_forward_hook(
                        lambda _, args, output: output.requires_grad_()
                    )
        torch.manual_seed(5)
        return gradients(model)

    plain, checkpointed = run(False), run(True)
    for n, gradient in plain.items():
        assert gradient.abs().max() > 0, n
        assert torch.equal(checkpointed[n], gradient), n


@pytest.mark.parametrize("name", GENERATING)
def test_generate(name):
    adapted = adapt(name)
    by_hand = small.merged_by_hand(build(name), adapted)
    plain = build(name)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = small.batch_for(plain)["input_ids"]

    def text(model):
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    expected = text(by_hand)
    assert torch.equal(text(adapted), expected)
    assert not torch.equal(text(plain), expected), "the adapter cannot be seen"
    lk.merge_adapter(adapted)
    assert torch.equal(text(adapted), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_merging_keeps_the_outputs_and_unmerging_the_bits(name):
    model = adapt(name)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    weights = {n: layer.weight for n, layer in lora_layers(model).items()}
    with torch.no_grad():
        unmerged = small.logits(model)
        lk.merge_adapter(model)
        assert all(layer.merged for layer in lora_layers(model).values())
        merged = small.logits(model)
        lk.unmerge_adapter(model)
        assert torch.equal(small.logits(model), unmerged)
    assert not torch.equal(merged, unmerged), "merged outputs come from another computation"
    assert small.relative_difference(merged, unmerged) < 5e-6
    assert all(layer.weight is weights[n] for n, layer in lora_layers(model).items())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    lk.merge_adapter(model, keep_base=False)
    assert small.relative_difference(small.logits(model), merged) < 1e-6
    assert model.state_dict().keys() == build(name).state_dict().keys()
    with pytest.raises(RuntimeError, match="keep_base=False"):
        lk.unmerge_adapter(model)
    exported = build(name, seed=9)
    exported.load_state_dict(model.state_dict())
    assert small.relative_difference(small.logits(exported), merged) < 1e-6


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_and_copies(name, merged):
    model = adapt(name)
    expected = small.logits(model)
    if merged:
        lk.merge_adapter(model)
    state = model.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = adapt(name, seed=4)
    assert not torch.equal(small.logits(other), expected)
    assert str(other.load_state_dict(torch.load(buffer))) == "<All keys matched successfully>"
    assert torch.equal(small.logits(other), expected)

    copied = copy.deepcopy(model)
    assert torch.equal(small.logits(copied), small.logits(model))
    assert lk.lora_report(copied).adapted == lk.lora_report(model).adapted
    with torch.no_grad():
        for layer in lora_layers(copied).values():
            layer.unmerge()
            layer.lora_B.zero_()
    assert small.relative_difference(small.logits(copied), small.logits(build(name))) < 1e-6
    lk.unmerge_adapter(model)
    assert torch.equal(small.logits(model), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_base_keeps_adapters_in_float32(name):
    model = build(name).to(torch.bfloat16)
    reference = in_double(model)
    lk.apply_lora(model, **CONFIG)
    small.draw_adapter(model)
    assert all(layer.lora_A.dtype == torch.float32 for layer in lora_layers(model).values())
    batch = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in small.batch_for(model).items()
    }
    plain = small.logits(reference).detach()
    exact = small.logits(small.merged_by_hand(reference, model))
    with torch.no_grad():
        y = small.logits(model, batch).double()
    assert small.relative_difference(y, exact) < 0.2 < small.relative_difference(plain, exact)
    small.loss(model, batch).backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in lora_layers(model).values())


@pytest.mark.parametrize(
    ("field", "says"), [("lora_aplha", "did you mean 'lora_alpha'"), ("megatron", "there are r, ")]
)
def test_an_unknown_field_is_named(field, says):
    with pytest.raises(TypeError, match=says):
        lk.apply_lora(build("gpt2"), **{field: 1})
