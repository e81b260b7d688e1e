"""Whole models: which layers get an adapter, what trains, and that the result computes what the
formula, a merge by hand and PEFT say."""

import copy
import io
import logging
import re

import models
import peft
import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES, GENERATING, build
from torch import nn

import lora_kernels as lk
from lora_kernels import FusedLoRALinear
from lora_kernels.models import lora_layers
from lora_kernels.testing import error_and_budget


@pytest.fixture(autouse=True)
def isolated():
    with models.isolated():
        yield


# A rank that is no power of two, and layers that differ in rank and scale.
CONFIG = {
    "r": 5,
    "lora_alpha": 12,
    "rank_pattern": {r".*\.0\..*": 3},
    "alpha_pattern": {r".*\.1\..*": 20},
}


def adapt(name, seed=3, **config):
    return models.draw_adapter(lk.apply_lora(build(name), **(CONFIG | config)), seed)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def in_our_names(names):
    """PEFT's names of parameters, as the same ones are called here."""
    return {
        re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)
        .removeprefix("base_model.model.")
        .replace(".base_layer.", ".")
        .replace(".modules_to_save.default.", ".")
        for name in names
    }


# ---- what is selected, compared with PEFT

SELECTIONS = {
    "endings": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "one whole name": ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"]}),
    "an ending of several parts": ("bert", {"target_modules": ["attention.output.dense"]}),
    "regex": ("llama", {"target_modules": r".*\.(0|1)\.self_attn\.[qk]_proj"}),
    "regex over containers": ("gpt2", {"target_modules": r".*\.c_attn"}),
    "exclude an ending": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    ),
    "exclude a regex": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*"},
    ),
    "a regex matches whole names": (
        "llama",
        {"target_modules": r".*\.q_proj|.*\.k_pro", "exclude_modules": r"model\.layers\.0"},
    ),
    "exclude from a regex": (
        "gpt2",
        {"target_modules": r".*c_(attn|fc|proj)", "exclude_modules": ["attn.c_proj"]},
    ),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r".*\.1\.mlp\.down_proj": 7},
            "alpha_pattern": {"k_proj": 3, "layers.0.self_attn.q_proj": 30},
        },
    ),
    "the first pattern wins": (
        "llama",
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {r"model\.layers\.0\.self_attn\.q_proj": 2, "q_proj": 6},
            "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 9, "q_proj": 1},
        },
    ),
    "a pattern is no substring": (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"proj": 2, "p_proj": 3}},
    ),
    "rslora": ("vit", {"target_modules": ["q_proj", "fc1"], "use_rslora": True}),
    "rslora and patterns": (
        "vit",
        {
            "target_modules": ["q_proj", "fc1"],
            "use_rslora": True,
            "rank_pattern": {"fc1": 9},
            "alpha_pattern": {"q_proj": 5},
        },
    ),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "a list of layers": ("bert", {"target_modules": ["query"], "layers_to_transform": [0]}),
    "layers by a pattern": (
        "gpt2",
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"},
    ),
    "layers by patterns": (
        "gpt2",
        {"target_modules": ["c_fc"], "layers_to_transform": [0], "layers_pattern": ["x", "h"]},
    ),
    "a whole name is not filtered by layers": (
        "llama",
        {
            "target_modules": ["model.layers.0.self_attn.k_proj", "q_proj"],
            "layers_to_transform": [1],
        },
    ),
    "no layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    "modules to save": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "modules to save within the targets": (
        "llama",
        {"target_modules": ["up_proj", "q_proj"], "modules_to_save": ["layers.1.mlp"]},
    ),
    "modules to save, two": (
        "bert",
        {"target_modules": ["value"], "modules_to_save": ["classifier", "pooler"]},
    ),
    "all biases": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "biases of adapted layers": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "bias": "lora_only"},
    ),
    "no biases there": ("llama", {"target_modules": ["q_proj"], "bias": "lora_only"}),
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_selection_is_pefts(selection):
    name, config = selection
    config = {"r": 4, "lora_alpha": 6} | config
    ours, theirs = (
        lk.apply_lora(build(name), **config),
        models.peft_model(build(name), **config),
    )
    expected = models.adapters(theirs)
    found = models.adapters(ours)
    assert found.keys() == expected.keys()
    for layer, (a, b, scaling, _) in expected.items():
        assert (found[layer][0].shape, found[layer][1].shape) == (a.shape, b.shape), layer
        assert found[layer][2] == pytest.approx(scaling, rel=1e-12), layer
    assert trainable(ours) == in_our_names(trainable(theirs))
    report = lk.lora_report(ours)
    assert report.adapted.keys() == expected.keys()
    assert report.trainable_parameters == sum(
        p.numel() for p in ours.parameters() if p.requires_grad
    )
    assert report.trainable_parameters == theirs.get_nb_trainable_parameters()[0]
    assert report.all_parameters == sum(p.numel() for p in ours.parameters())


def test_lists_tuples_and_sets_mean_the_same():
    for kind in (list, tuple, set):
        model = lk.apply_lora(build("llama"), target_modules=kind(["q_proj", "k_proj"]))
        assert len(lora_layers(model)) == 4


# ---- all linear layers but the heads

OUTPUT, CLASSES = "output head", "classifier head"
HEADS = {
    "gpt2": {"lm_head": OUTPUT},
    "llama": {"lm_head": OUTPUT},
    "llama tied": {"lm_head": OUTPUT},
    "qwen3": {"lm_head": OUTPUT},
    "bert": {"classifier": CLASSES},
    "vit": {"classifier": CLASSES},
    "gpt2 sequences": {"score": CLASSES},
    "gpt2 tokens": {"classifier": CLASSES},
    "llama sequences": {"score": CLASSES},
    "llama questions": {"qa_outputs": CLASSES},
    "bert masked": {"cls.predictions.transform.dense": CLASSES, "cls.predictions.decoder": OUTPUT},
    "bert tokens": {"classifier": CLASSES},
    "bert questions": {"qa_outputs": CLASSES},
    "bert bare": {},
    "gpt2 bare": {},
    "llama bare": {},
    "roberta": {"classifier.dense": CLASSES, "classifier.out_proj": CLASSES},
    "roberta masked": {"lm_head.dense": CLASSES, "lm_head.decoder": OUTPUT},
    "distilbert": {"pre_classifier": CLASSES, "classifier": CLASSES},
    "bart": {"lm_head": OUTPUT},
    "whisper": {"proj_out": OUTPUT},
    "t5": {"lm_head": OUTPUT},
    "t5 gated": {"lm_head": OUTPUT},
    "t5 encoder": {},
    "swin": {"classifier": CLASSES},
    "wav2vec2": {"lm_head": CLASSES},
}


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
@pytest.mark.parametrize("name", HEADS)
def test_all_linear_is_every_linear_but_the_heads(name, target_modules):
    model = build(name)
    linears = {
        n for n, m in model.named_modules() if isinstance(m, (nn.Linear, models.Conv1D)) and n
    }
    lk.apply_lora(model, target_modules=target_modules)
    report = lk.lora_report(model)
    assert report.skipped == HEADS[name]
    assert set(report.adapted) == set(lora_layers(model)) == linears - HEADS[name].keys()


class Embedding(nn.Module):
    """A model of no library whose output layer is tied to its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.body = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.out = nn.Linear(16, 30, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.body(self.embed(ids)))


def test_plain_modules():
    sequential = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    lk.apply_lora(sequential)
    assert lora_layers(sequential).keys() == {"0", "2"}
    tied = lk.apply_lora(Embedding())
    assert lora_layers(tied).keys() == {"body.0", "body.2"}
    assert lk.lora_report(tied).skipped == {"out": OUTPUT}


def test_exclude_and_layers_apply_to_all_linear():
    model = lk.apply_lora(
        build("llama"), exclude_modules=["lm_head", "down_proj"], layers_to_transform=[1]
    )
    report = lk.lora_report(model)
    assert len(report.adapted) == 6
    assert all(".1." in name and "down" not in name for name in report.adapted)
    assert set(report.skipped.values()) == {"in exclude_modules", "not in layers_to_transform"}


def test_report_is_readable(caplog):
    with caplog.at_level(logging.INFO, logger="lora_kernels"):
        model = lk.apply_lora(build("bert"), r=3, modules_to_save=["classifier"])
    text = str(lk.lora_report(model))
    assert text in caplog.text
    for line in (
        "adapted  bert.encoder.layer.0.attention.self.query: Linear [48, 48], r=3",
        "skipped  classifier: in modules_to_save",
        "trained in full  classifier",
    ):
        assert line in text
    share = 100 * lk.lora_report(model).trainable_parameters / lk.lora_report(model).all_parameters
    assert f"{share:.4f}%" in text


# ---- layers whose forward is not what computes

E = 16


class Functional(nn.Module):
    """WavLM's manner: the projections are never called, their weights are read."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj, self.fc = (
            nn.Linear(E, E) for _ in range(5)
        )

    def forward(self, x):
        y, _ = F.multi_head_attention_forward(
            *(x, x, x, E, 2, torch.empty(0), torch.zeros(3 * E), None, None, False, 0.0),
            self.out_proj.weight,
            self.out_proj.bias,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )
        return self.fc(y)


class ReadsGrandchild(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Module()
        self.block.proj = nn.Linear(E, E)
        self.fc = nn.Linear(E, E)

    def forward(self, x):
        return self.fc(F.linear(x, self.block.proj.weight, self.block.proj.bias))


class ReadsOnOnePath(nn.Module):
    """Mamba's manner: called here, read where a fused kernel is installed."""

    def __init__(self):
        super().__init__()
        self.proj, self.fc = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x):
        if self.training:
            return self.fc(F.linear(x, self.proj.weight, self.proj.bias))
        return self.fc(self.proj(x))


class ReadsTheDtype(nn.Module):
    """T5's manner: the weight is mentioned, the forward is what computes."""

    def __init__(self):
        super().__init__()
        self.proj, self.fc = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x):
        if isinstance(self.proj.weight, torch.Tensor) and self.proj.weight.dtype != torch.int8:
            x = x.to(self.proj.weight.dtype)
        return self.fc(self.proj(x))


class Passes(nn.Module):
    """The linear is handed on to somebody who calls it."""

    def __init__(self):
        super().__init__()
        self.proj, self.fc = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x):
        for layer in (self.proj, self.fc):
            x = layer(x)
        return x + 0 * self.proj.weight.sum()


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(E, 2, E, batch_first=True)
        self.fc = nn.Linear(E, E)

    def forward(self, x):
        return self.fc(self.layer(x))


BYPASSED = {
    "MultiheadAttention": (
        lambda: nn.Sequential(nn.Linear(E, E), nn.MultiheadAttention(E, 2)),
        {"1.out_proj": "its forward is never called: nn.MultiheadAttention reads its weight"},
    ),
    "TransformerEncoderLayer": (
        Encoder,
        {
            "layer.self_attn.out_proj": "its forward is never called: nn.MultiheadAttention reads "
            "its weight",
            "layer.linear1": "its forward is skipped by the fast path of TransformerEncoderLayer, "
            "which reads its weight",
            "layer.linear2": "its forward is skipped by the fast path of TransformerEncoderLayer, "
            "which reads its weight",
        },
    ),
    "functional attention": (
        Functional,
        dict.fromkeys(
            ["q_proj", "k_proj", "v_proj", "out_proj"],
            "its forward is never called: Functional reads its weight",
        ),
    ),
    "a weight below a child": (
        ReadsGrandchild,
        {"block.proj": "its forward is never called: ReadsGrandchild reads its weight"},
    ),
    "a weight on one path": (
        ReadsOnOnePath,
        {"proj": "its forward is skipped on one path of ReadsOnOnePath, which reads its weight"},
    ),
    "a forward of its own": (
        lambda: nn.Sequential(nn.Linear(E, E), OwnForward(E, E)),
        {"1": "is a OwnForward, a linear layer with a forward of its own"},
    ),
}


@pytest.mark.parametrize("case", BYPASSED.values(), ids=BYPASSED)
def test_bypassed_linears_are_refused_with_the_reason(case):
    make, reasons = case
    model = lk.apply_lora(make())
    assert lk.lora_report(model).skipped == reasons
    for name, reason in reasons.items():
        assert not isinstance(model.get_submodule(name), FusedLoRALinear)
        for target in ([name], re.escape(name)):
            model = make()
            before = models.Snapshot(model)
            with pytest.raises(ValueError, match=re.escape(f"{name!r} {reason}")):
                lk.apply_lora(model, target_modules=target)
            before.assert_unchanged()


@pytest.mark.parametrize("make", [ReadsTheDtype, Passes])
def test_linears_that_are_called_are_adapted(make):
    model = lk.apply_lora(make())
    assert lora_layers(model).keys() == {"proj", "fc"}


def test_decoder_layers_of_torch_have_no_fast_path():
    model = nn.TransformerDecoderLayer(E, 2, E)
    lk.apply_lora(model)
    assert lora_layers(model).keys() == {"linear1", "linear2"}


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_adapted_layer_is_called_and_moves_the_output(name):
    model = lk.apply_lora(build(name), r=2)
    report = lk.lora_report(model)
    batch = models.batch_for(model)
    layers = lora_layers(model)
    assert layers

    def outputs():
        torch.manual_seed(0)
        with torch.no_grad():
            return models.floats(model(**batch))

    for mode in (True, False):
        model.train(mode)
        calls = dict.fromkeys(layers, 0)
        handles = [
            layer.register_forward_hook(
                lambda *_, n=n: calls.__setitem__(n, calls[n] + 1)  # noqa: B023 (used before the next one)
            )
            for n, layer in layers.items()
        ]
        before = outputs()
        for handle in handles:
            handle.remove()
        assert not [n for n, count in calls.items() if not count], f"never called, {mode=}"
    assert all(map(torch.equal, before, outputs()))
    for n, layer in layers.items():
        with torch.no_grad():
            layer.lora_B.normal_()
        assert not all(map(torch.equal, before, outputs())), f"{n} has no effect"
        nn.init.zeros_(layer.lora_B)
    assert report.adapted.keys() == layers.keys()


def test_bypassed_layers_of_transformers_are_skipped():
    reasons = {
        name: lk.lora_report(lk.apply_lora(build(name))).skipped
        for name in ("wavlm", "mamba", "falcon mamba", "mamba2", "siglip")
    }
    never, one_path = "its forward is never called: ", "its forward is skipped on one path of "
    for n in "qkv":
        reason = reasons["wavlm"][f"wavlm.encoder.layers.0.attention.{n}_proj"]
        assert reason == f"{never}WavLMAttention reads its weight"
    mixer = "backbone.layers.0.mixer."
    assert reasons["mamba"][f"{mixer}dt_proj"].startswith(never)
    for name, children in (
        ("mamba", ["x_proj", "out_proj"]),
        ("falcon mamba", ["x_proj", "dt_proj", "out_proj"]),
        ("mamba2", ["out_proj"]),
    ):
        for child in children:
            assert reasons[name][f"{mixer}{child}"].startswith(one_path)
    assert reasons["siglip"]["vision_model.head.attention.out_proj"].startswith(never)


# ---- what it computes


def assert_close(name, ours, eager, exact):
    """The budget of one operator, doubled: a model is a chain of them, and transformers computes
    norms and softmax in float32 in the float64 model too."""
    assert ours.shape == exact.shape
    for metric, (error, budget) in error_and_budget(ours, eager, exact).items():
        assert error <= 2 * budget, f"{name}: {metric} error {error:.3e} over {2 * budget:.3e}"


def gradients(model):
    """name -> gradients of A and B, after a backward of the loss."""
    model.zero_grad()
    models.loss(model, models.batch_for(model, rows=3)).backward()
    return {
        f"{name} {which}": parameter.grad.clone()
        for name, (a, b, *_) in models.adapters(model).items()
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
    theirs = models.draw_adapter(models.peft_model(build(name), target_modules=targets, **CONFIG))
    for n, (a, b, scaling, _) in models.adapters(theirs).items():
        layer = lora_layers(ours)[n]
        assert torch.equal(layer.lora_A, a) and torch.equal(layer.lora_B, b)
        assert layer.scaling == pytest.approx(scaling)
    exact = in_double(theirs)
    with torch.no_grad():
        base, y = models.logits(build(name)), models.logits(ours)
        assert (y - base).abs().max() > 0.3 * base.abs().max(), "the adapter cannot be seen"
        assert_close("logits", y, models.logits(theirs), models.logits(exact))
    mine, eager, reference = gradients(ours), gradients(theirs), gradients(exact)
    assert mine.keys() == reference.keys() and len(mine) == 2 * len(targets)
    for n, gradient in mine.items():
        assert reference[n].abs().max() > 0, n
        assert_close(n, gradient, eager[n], reference[n])


@pytest.mark.parametrize("name", FAMILIES)
def test_forward_is_that_of_weights_merged_by_hand(name):
    ours = adapt(name)
    merged = in_double(models.merged_by_hand(build(name), ours))
    with torch.no_grad():
        y, exact = models.logits(ours), models.logits(merged)
        assert models.relative_difference(y.double(), exact) < 1e-5
        assert models.relative_difference(models.logits(build(name)).double(), exact) > 0.3


def test_square_conv1d_by_its_formula():
    model = models.Square()
    plain = copy.deepcopy(model)
    models.draw_adapter(lk.apply_lora(model, r=3, lora_alpha=7, target_modules=["proj"]))
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
    assert models.relative_difference(y.double(), exact) < 1e-5
    assert models.relative_difference(turned, exact) > 0.3
    ours = torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy.float())
    reference = torch.autograd.grad(exact, [x64, a, b], dy)
    for name, gradient, expected in zip("xAB", ours, reference, strict=True):
        assert models.relative_difference(gradient.double(), expected) < 1e-5, name
    delta = 7 / 3 * (layer.lora_B.double() @ layer.lora_A.double()).t()
    assert models.relative_difference(layer.delta_weight().double(), delta) < 1e-5
    layer.merge()
    assert models.relative_difference(layer.weight.double(), w + delta) < 1e-5
    assert models.relative_difference(model(x).double(), exact) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_adapter_changes_nothing(name):
    before = models.logits(build(name))
    assert torch.equal(models.logits(lk.apply_lora(build(name))), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_training_lowers_the_loss_and_touches_only_the_adapter(name):
    model = lk.apply_lora(build(name), r=5, lora_dropout=0.1).train()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert trainable(model) == {f"{n}.lora_{x}" for n in lora_layers(model) for x in "AB"}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.02)
    model.eval()
    first = models.loss(model).item()
    model.train()
    for _ in range(12):
        optimizer.zero_grad()
        models.loss(model).backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.step()
    assert models.loss(model.eval()).item() < 0.7 * first
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
    by_hand = models.merged_by_hand(build(name), adapted)
    plain = build(name)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = models.batch_for(plain)["input_ids"]

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
        unmerged = models.logits(model)
        lk.merge_adapter(model)
        assert all(layer.merged for layer in lora_layers(model).values())
        merged = models.logits(model)
        lk.unmerge_adapter(model)
        assert torch.equal(models.logits(model), unmerged)
    assert not torch.equal(merged, unmerged), "merged outputs come from another computation"
    assert models.relative_difference(merged, unmerged) < 5e-6
    assert all(layer.weight is weights[n] for n, layer in lora_layers(model).items())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    lk.merge_adapter(model, keep_base=False)
    assert torch.equal(models.logits(model), merged)
    assert model.state_dict().keys() == build(name).state_dict().keys()
    with pytest.raises(RuntimeError, match="keep_base=False"):
        lk.unmerge_adapter(model)
    exported = build(name, seed=9)
    exported.load_state_dict(model.state_dict())
    assert models.relative_difference(models.logits(exported), merged) < 1e-6


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_state_dict_and_copies(name, merged):
    model = adapt(name)
    expected = models.logits(model)
    if merged:
        lk.merge_adapter(model)
    state = model.state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    other = adapt(name, seed=4)
    assert not torch.equal(models.logits(other), expected)
    assert str(other.load_state_dict(torch.load(buffer))) == "<All keys matched successfully>"
    assert torch.equal(models.logits(other), expected)

    copied = copy.deepcopy(model)
    assert torch.equal(models.logits(copied), models.logits(model))
    assert lk.lora_report(copied).adapted == lk.lora_report(model).adapted
    with torch.no_grad():
        for layer in lora_layers(copied).values():
            layer.unmerge()
            layer.lora_B.zero_()
    assert torch.equal(models.logits(copied), models.logits(build(name)))
    lk.unmerge_adapter(model)
    assert torch.equal(models.logits(model), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_base_keeps_adapters_in_float32(name):
    model = build(name).to(torch.bfloat16)
    reference = in_double(model)
    lk.apply_lora(model, **CONFIG)
    models.draw_adapter(model)
    assert all(layer.lora_A.dtype == torch.float32 for layer in lora_layers(model).values())
    batch = {
        k: v.bfloat16() if v.is_floating_point() else v for k, v in models.batch_for(model).items()
    }
    plain = models.logits(reference).detach()
    exact = models.logits(models.merged_by_hand(reference, model))
    with torch.no_grad():
        y = models.logits(model, batch).double()
    assert models.relative_difference(y, exact) < 0.2 < models.relative_difference(plain, exact)
    models.loss(model, batch).backward()
    assert all(layer.lora_B.grad.abs().max() > 0 for layer in lora_layers(model).values())


# ---- tied, shared and adapted already


def test_a_tied_weight_is_named_and_never_written():
    model = build("llama tied")
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    lk.apply_lora(model, target_modules=["lm_head", "q_proj"])
    models.draw_adapter(model)
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
    before = models.Snapshot(model)
    with pytest.raises(ValueError, match=r"tied to model\.embed_tokens\.weight"):
        lk.apply_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    before.assert_unchanged()
    lk.apply_lora(model, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    assert model.lm_head.weight.requires_grad


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
    models.draw_adapter(model)
    a, b, s, w = (
        t.detach() if isinstance(t, torch.Tensor) else t for t in models.adapters(model)["first"]
    )
    merged = Shared()
    merged.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    with torch.no_grad():
        merged.first.weight.copy_(w + s * b @ a)
        if targets is None:
            a, b, s, w = models.adapters(model)["last"]
            merged.last.weight.copy_(w + s * b @ a)
    assert models.relative_difference(model(x), merged(x)) < 1e-5
    assert models.relative_difference(plain, merged(x)) > 0.1


def test_a_model_adapted_already_is_refused():
    model = adapt("gpt2", target_modules=["c_attn"])
    before = models.Snapshot(model)
    with pytest.raises(ValueError, match=r"LoRA layers already .*c_attn.*load_adapter"):
        lk.apply_lora(model, target_modules=["c_fc"])
    before.assert_unchanged()


@pytest.mark.parametrize("config", [peft.LoraConfig, peft.LoHaConfig])
@pytest.mark.parametrize("inner", [False, True])
def test_a_model_of_peft_is_refused(config, inner):
    model = peft.get_peft_model(build("llama"), config(target_modules=["q_proj"]))
    model = model.base_model.model if inner else model
    before = models.Snapshot(model)
    with pytest.raises(ValueError, match="of PEFT already: the plain model is needed"):
        lk.apply_lora(model)
    before.assert_unchanged()


# ---- wrong calls leave the model as it was

WRONG = {
    "no match": ({"target_modules": ["nothing"]}, r"'nothing'.* leaves no layer.*q_proj"),
    "an ending is a whole part": ({"target_modules": ["proj"]}, r"\['proj'\] leaves no layer"),
    "a regex is no ending": ({"target_modules": "q_proj"}, r"'q_proj' leaves no layer"),
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
    before = models.Snapshot(model)
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
    # Whoever froze or unfroze something before finds it so.
    model.transformer.h[0].attn.c_attn.weight.requires_grad_(False)
    before = models.Snapshot(model)
    if where == "building":
        fail_at(monkeypatch, FusedLoRALinear, "_add_lora", call)
    elif where == "putting in":
        fail_at(monkeypatch, models.transformers.PreTrainedModel, "get_submodule", call)
    elif where == "freezing":
        fail_at(monkeypatch, nn.Module, "requires_grad_", 1)
    else:
        fail_at(monkeypatch, lk.models, "LoRAReport", 1)
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
    models.logits(model)
    assert seen == [1]
    handle.remove()
    models.logits(model)
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
        models.logits(model)
        assert moved == [FusedLoRALinear]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models(tmp_path, wrap):
    inner = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, 3))
    plain = copy.deepcopy(inner)
    wrapped = wrap(inner)
    assert lk.apply_lora(wrapped, r=2) is wrapped
    assert lora_layers(inner).keys() == lora_layers(wrapped).keys() == {"0", "2"}
    assert lk.lora_report(wrapped) is lk.lora_report(inner)
    models.draw_adapter(inner)
    x = torch.randn(5, E)
    y = wrapped(x)
    lk.save_adapter(wrapped, tmp_path)
    other = wrap(plain)
    assert (other(x) - y).abs().max() > 0.1
    lk.load_adapter(other, tmp_path)
    assert torch.equal(other(x), y)
    lk.merge_adapter(other)
    assert models.relative_difference(other(x), y) < 1e-6
    lk.unmerge_adapter(other)
    assert torch.equal(other(x), y)
