"""Matrices that are in no linear layer, and so get no adapter: apply_lora says so."""

import warnings

import models
import pytest
import torch
import transformers
from torch import nn

import lora_kernels as lk


@pytest.fixture(autouse=True)
def isolated():
    with models.isolated():
        yield


MIXTURE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("targets", [None, ["q_proj"]], ids=["all-linear", "q_proj"])
@pytest.mark.parametrize(
    ("kind", "more", "experts"),
    [
        ("Qwen3Moe", {"moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8}, "gate_up"),
        ("Mixtral", {"num_local_experts": 4}, "MixtralExperts.down_proj [4, 32, 64], 2 times"),
        ("GptOss", {"num_local_experts": 4, "head_dim": 8}, "GptOssExperts.gate_up_proj"),
    ],
)
def test_what_no_adapter_reaches_is_said_once(kind, more, experts, targets):
    config = getattr(transformers, f"{kind}Config")(**MIXTURE, **more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    outside = sum(
        p.numel()
        for n, p in model.named_parameters()
        if p.dim() > 1 and (".experts." in n or ".gate." in n or ".router." in n)
        if not n.endswith("bias")
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lk.apply_lora(model, r=4, target_modules=targets)
    report = lk.lora_report(model)
    (said,) = [str(warning.message) for warning in caught]
    assert experts in said and said.endswith(report.notes[-1]) and report.notes[-1] in str(report)
    assert report.unreached_parameters == outside
    assert f"{100 * outside / report.all_parameters:.1f}% of the weights" in said


def test_a_matrix_multiplied_directly_is_unreached_and_others_are_not():
    class Raw(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.matrix = nn.Linear(8, 8), nn.Parameter(torch.ones(8, 8))
            self.position = nn.Parameter(torch.ones(1, 4, 8))
            self.norm, self.convolution = nn.LayerNorm([4, 8]), nn.Conv1d(4, 4, 3)

    model = nn.Sequential(nn.Embedding(9, 8), Raw())
    with pytest.warns(UserWarning, match=r"Raw.matrix \[8, 8\]"):
        lk.apply_lora(model)
    assert lk.lora_report(model).unreached == {"Raw.matrix [8, 8]": 1}
    saved = nn.Sequential(nn.Linear(8, 8), Raw())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lk.apply_lora(saved, target_modules=["0"], modules_to_save=["1"])
