"""Which layers of a model get an adapter: PEFT's rules, heads, and layers that are bypassed."""

import logging
import re

import pytest
import small
import torch
import torch.nn.functional as F
from small import build, in_our_names, trainable
from torch import nn

import lora_kernels as lk
from lora_kernels import FusedLoRALinear
from lora_kernels.models.apply import lora_layers


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


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
        small.peft_model(build(name), **config),
    )
    expected = small.adapters(theirs)
    found = small.adapters(ours)
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
        n for n, m in model.named_modules() if isinstance(m, (nn.Linear, small.Conv1D)) and n
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
        "adapted  bert.encoder.layer.0-1.attention.self.query: Linear [48, 48], r=3 (2 layers)",
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
    """Called on one path: the adapter is of use there."""

    def __init__(self):
        super().__init__()
        self.proj, self.fc = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x):
        if self.training:
            return self.fc(F.linear(x, self.proj.weight, self.proj.bias))
        return self.fc(self.proj(x))


class Joins(nn.Module):
    """diffusers' manner: a processor calls the projections; a method that is used on request alone
    reads their weights."""

    def __init__(self):
        super().__init__()
        self.proj, self.fc = nn.Linear(E, E), nn.Linear(E, E)
        self.processor = lambda owner, x: owner.fc(owner.proj(x))

    def fuse(self):
        return torch.cat([self.proj.weight, self.fc.weight])

    def forward(self, x):
        return self.processor(self, x.to(self.proj.weight.dtype))


class ReadsAndHandsOn(Joins):
    def forward(self, x):
        return self.processor(self, x + 0 * self.proj.weight.sum())


class CallsElsewhere(Joins):
    def attend(self, x):
        return self.fc(self.proj(x))

    def forward(self, x):
        return self.attend(x * self.proj.weight.abs().sum().sign())


class Iterates(Joins):
    def forward(self, x):
        x = x + 0 * F.linear(x, self.proj.weight)
        for layer in self.children():
            x = layer(x)
        return x


class ReadsTheDtype(nn.Module):
    """T5's manner: the weight is mentioned, the forward is what computes."""

    def __init__(self):
        super().__init__()
        self.proj, self.fc = nn.Linear(E, E), nn.Linear(E, E)

    def forward(self, x):
        if isinstance(self.proj.weight, torch.Tensor) and self.proj.weight.dtype != torch.int8:
            x = x.to(self.proj.weight.dtype) * torch.ones(1, dtype=self.proj.weight.dtype)
        return self.fc(self.proj(x))


class Passes(nn.Module):
    """The linear is handed on to a function that calls it."""

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
            before = small.Snapshot(model)
            with pytest.raises(ValueError, match=re.escape(f"{name!r} {reason}")):
                lk.apply_lora(model, target_modules=target)
            before.assert_unchanged()


@pytest.mark.parametrize(
    "make",
    [ReadsTheDtype, Passes, ReadsOnOnePath, Joins, ReadsAndHandsOn, CallsElsewhere, Iterates],
)
def test_linears_that_are_called_are_adapted(make):
    model = lk.apply_lora(make())
    assert lora_layers(model).keys() == {"proj", "fc"}


def test_decoder_layers_of_torch_have_no_fast_path():
    model = nn.TransformerDecoderLayer(E, 2, E)
    lk.apply_lora(model)
    assert lora_layers(model).keys() == {"linear1", "linear2"}


@pytest.mark.parametrize("name", small.ARCHITECTURES)
def test_every_adapted_layer_is_called_and_moves_the_output(name):
    model = lk.apply_lora(build(name), r=2)
    report = lk.lora_report(model)
    batch = small.batch_for(model)
    layers = lora_layers(model)
    assert layers

    def outputs():
        torch.manual_seed(0)
        with torch.no_grad():
            return small.floats(model(**batch))

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
    for n in "qkv":
        reason = reasons["wavlm"][f"wavlm.encoder.layers.0.attention.{n}_proj"]
        assert reason == "its forward is skipped by WavLMAttention, which reads its weight"
    mixer = "backbone.layers.0.mixer."
    for name, children in (
        ("mamba", ["x_proj", "dt_proj", "out_proj"]),
        ("falcon mamba", ["x_proj", "dt_proj", "out_proj"]),
        ("mamba2", ["out_proj"]),
    ):
        for child in children:
            assert reasons[name][f"{mixer}{child}"].startswith("its forward is skipped by ")
    reason = reasons["siglip"]["vision_model.head.attention.out_proj"]
    assert reason.startswith("its forward is never called: ")
