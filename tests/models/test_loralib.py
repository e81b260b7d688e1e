"""Checkpoints of loralib, against loralib itself."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lora_kernels as lk

loralib = pytest.importorskip("loralib")

PATTERNS = [
    [True],
    [True, False, True],
    [False, True],
    [True, True, True, True],
    [False, False, True],
]


class Theirs(nn.Module):
    def __init__(self, enable_lora, transposed=False):
        super().__init__()
        self.embed = loralib.Embedding(30, 24, r=3, lora_alpha=6)
        self.qkv = loralib.MergedLinear(
            24, 12 * len(enable_lora), r=2, lora_alpha=6, enable_lora=enable_lora
        )
        self.out = loralib.Linear(12 * len(enable_lora), 20, r=4, lora_alpha=6)

    def forward(self, ids):
        return self.out(torch.tanh(self.qkv(self.embed(ids))))


class Plain(Theirs):
    def __init__(self, enable_lora):
        nn.Module.__init__(self)
        self.embed = nn.Embedding(30, 24)
        self.qkv = nn.Linear(24, 12 * len(enable_lora))
        self.out = nn.Linear(12 * len(enable_lora), 20)


def pair(enable_lora):
    torch.manual_seed(3)
    # In float64: rounding is for the tests of the operator.
    theirs = Theirs(enable_lora).double()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    plain = Plain(enable_lora).double()
    plain.load_state_dict({k: v for k, v in theirs.state_dict().items() if "lora_" not in k})
    return theirs, plain


@pytest.mark.parametrize("enable_lora", PATTERNS, ids=str)
@pytest.mark.parametrize("suffix", ["", ".pt", ".safetensors"])
def test_outputs_and_gradients_are_loralibs(enable_lora, suffix, tmp_path):
    theirs, plain = pair(enable_lora)
    loralib.mark_only_lora_as_trainable(theirs)
    source = loralib.lora_state_dict(theirs)
    ids = torch.randint(30, (2, 9))
    base = plain(ids)
    if suffix:
        torch.save(source, tmp_path / "checkpoint.pt")
        source = tmp_path / f"checkpoint{suffix}"
        if suffix == ".safetensors":
            copied = lk.load_loralib(
                copy.deepcopy(plain), tmp_path / "checkpoint.pt", lora_alpha=6,
                enable_lora={"qkv": enable_lora},
            )  # fmt: skip
            lk.save_loralib(copied, source)
    ours = lk.load_loralib(plain, source, lora_alpha=6, enable_lora={"qkv": enable_lora})
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in theirs.named_parameters() if p.requires_grad}
    results = []
    for model in ours, theirs:
        y = model(ids)
        y.square().sum().backward()
        results.append((y, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (y, gradients), (expected, others) = results
    assert (y - base).abs().max() > 0.5
    torch.testing.assert_close(y, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name])
    state = lk.loralib_state_dict(ours)
    for key, tensor in loralib.lora_state_dict(theirs).items():
        assert torch.equal(state.pop(key), tensor)
    assert not state


@pytest.mark.parametrize("enable_lora", PATTERNS, ids=str)
def test_merged(enable_lora):
    theirs, plain = pair(enable_lora)
    weights = [plain.embed.weight, plain.qkv.weight, plain.out.weight]
    source = loralib.lora_state_dict(theirs)
    ours = lk.load_loralib(plain, source, lora_alpha=6, enable_lora={"qkv": enable_lora}).eval()
    ids = torch.randint(30, (2, 9))
    expected = theirs.eval()(ids)
    lk.merge_adapter(ours)
    torch.testing.assert_close(ours(ids), expected)
    torch.testing.assert_close(ours.qkv.weight, theirs.qkv.weight)
    torch.testing.assert_close(ours.embed.weight, theirs.embed.weight)
    lk.unmerge_adapter(ours)
    assert [ours.embed.weight, ours.qkv.weight, ours.out.weight] == weights
    again = Theirs(enable_lora).double()
    again.load_state_dict(theirs.train().state_dict() | lk.loralib_state_dict(ours))
    torch.testing.assert_close(again(ids), theirs(ids))


def test_conv1d_of_gpt2():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    theirs = loralib.MergedLinear(
        16, 48, r=2, lora_alpha=4, enable_lora=[True, False, True], fan_in_fan_out=True
    )
    nn.init.normal_(theirs.lora_B)
    model = nn.Sequential(Conv1D(48, 16))
    with torch.no_grad():
        model[0].weight.copy_(theirs.weight)
        model[0].bias.copy_(theirs.bias)
    source = {f"0.{k}": v for k, v in theirs.state_dict().items() if "lora_" in k}
    lk.load_loralib(model, source, lora_alpha=4, enable_lora=[True, False, True])
    x = torch.randn(5, 16)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named_and_changes_nothing(tmp_path):
    theirs, plain = pair([True, False, True])
    source = loralib.lora_state_dict(theirs)
    options = {"lora_alpha": 6, "enable_lora": {"qkv": [True, False, True]}}
    (tmp_path / "truncated.pt").write_bytes(b"PK12")
    wrong = [
        (source, {"lora_alpha": 6}, ValueError, "qkv: .*enable_lora"),
        (source, {"lora_alpha": 6, "enable_lora": {"qkv": [True] * 3}}, ValueError, "do not fit"),
        (source, {"lora_alpha": 6, "enable_lora": {"qkv": [False] * 3}}, ValueError, "enable a"),
        ({}, options, ValueError, "none of loralib"),
        (source | {"other.lora_A": source["out.lora_A"]}, options, ValueError, "other"),
        (source | {"out.weight": torch.zeros(2)}, options, ValueError, "out.weight"),
        (tmp_path / "none.pt", options, FileNotFoundError, "none.pt"),
        (tmp_path / "truncated.pt", options, ValueError, "truncated.pt"),
    ]
    before = {name: (p, p.requires_grad) for name, p in plain.named_parameters()}
    for given, arguments, error, says in wrong:
        with pytest.raises(error, match=says):
            lk.load_loralib(plain, given, **arguments)
        assert {n: (p, p.requires_grad) for n, p in plain.named_parameters()} == before


@pytest.mark.parametrize("enable_lora", PATTERNS, ids=str)
def test_old_files_of_peft_with_slices(enable_lora, tmp_path):
    torch.manual_seed(0)
    theirs = loralib.MergedLinear(
        16, 8 * len(enable_lora), r=2, lora_alpha=6, enable_lora=enable_lora
    )
    nn.init.normal_(theirs.lora_B)
    model = nn.Sequential(nn.Linear(16, 8 * len(enable_lora)))
    model[0].load_state_dict({"weight": theirs.weight, "bias": theirs.bias})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["0"]}
    config |= {"enable_lora": enable_lora, "merge_weights": False, "fan_in_fan_out": False}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"lora_A": theirs.lora_A.detach(), "lora_B": theirs.lora_B.detach()[..., None]}
    tensors = {f"base_model.model.0.{name}.weight": t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    x = torch.randn(5, 16)
    ours = lk.load_adapter(model, tmp_path)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
