"""AdaLoRA's layers of PEFT on our kernels: one layer against float64, and a run with a budget."""

import copy
import itertools
import json
import warnings

import peft
import pytest
import small
import torch
from peft.tuners.adalora.layer import SVDLinear
from torch import nn

import lora_kernels as lk
from lora_kernels.integrations.peft_adalora import FusedSVDLinear
from lora_kernels.spec import reference
from lora_kernels.testing.linear import assert_within_budget, poisoned_memory

IN, OUT, R = 136, 200, 6
SCHEDULE = {"init_r": R, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 14, "deltaT": 1}
KEPT = torch.tensor([True, False, True, True, False, True])


def adalora(model, targets, name="default", **options):
    config = peft.AdaLoraConfig(target_modules=targets, lora_alpha=9, **SCHEDULE | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config, name)


def svd_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, SVDLinear)}


@torch.no_grad()
def draw(model, kept=KEPT, seed=3):
    """Adapters as large as the weights, with the ranks that are not ``kept`` at E = 0."""
    generator = torch.Generator().manual_seed(seed)
    for layer in svd_layers(model).values():
        a, e, b = (getattr(layer, part)["default"] for part in ("lora_A", "lora_E", "lora_B"))
        for t in (a, e, b):
            t.copy_(torch.randn(t.shape, generator=generator))
        e.masked_fill_(~kept[:, None], 0.0)
        weight = layer.base_layer.weight
        b.mul_(weight.float().norm() / layer.get_delta_weight("default").norm())


class One(nn.Module):
    def __init__(self, transposed, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.proj = small.Conv1D(OUT, IN) if transposed else nn.Linear(IN, OUT)
        nn.init.normal_(self.proj.bias)
        self.to(dtype)

    def forward(self, x):
        return self.proj(x)


def formula(layer, x, dy, dtype, mask):
    """y and the gradients with all operands in ``dtype``."""
    parts = (layer.lora_A, layer.lora_E, layer.lora_B)
    leaves = [x, *(part["default"] for part in parts)]
    x, a, e, b = (t.detach().to(dtype).requires_grad_() for t in leaves)
    weight = layer.base_layer.weight.detach().to(dtype)
    weight = weight if isinstance(layer.base_layer, nn.Linear) else weight.t()
    scale = 9 / (R + 1e-5)
    y = x @ weight.t() + layer.base_layer.bias.detach().to(dtype)
    y = y + scale * ((x if mask is None else x * mask.to(dtype)) @ (a * e).t() @ b.t())
    return [y.detach(), *torch.autograd.grad(y, [x, a, e, b], dy.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cast", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_one_layer(dtype, cast, transposed, dropout, monkeypatch):
    model = adalora(One(transposed, dtype), ["proj"], lora_dropout=dropout)
    layer = model.base_model.model.proj
    if not cast:
        for part in (layer.lora_A, layer.lora_E, layer.lora_B):
            part["default"].data = part["default"].data.to(dtype)
    draw(model)
    report = lk.accelerate_peft(model.train())
    assert type(layer) is FusedSVDLinear and str(R) in next(iter(report.fused.values()))
    x = torch.randn(45, IN).to(dtype)
    dy = torch.randn(45, OUT).to(dtype)
    rng = torch.tensor([3, 4, 0, 0])
    monkeypatch.setattr("lora_kernels.functional.linear.draw_rng", lambda device: rng)
    mask = reference.dropout_mask(rng, 45, IN, dropout) / (1 - dropout) if dropout else None
    leaves = [x.clone().requires_grad_()]
    leaves += [part["default"] for part in (layer.lora_A, layer.lora_E, layer.lora_B)]
    with poisoned_memory(), lk.record_plans() as answers:
        y = layer(leaves[0])
        found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    ops = ["lora_linear_fwd", "lora_linear_dx", "lora_linear_dab"]
    assert [a.op for a in answers] == ops and {a.backend for a in answers} == {"cpu"}
    exact, eager = (formula(layer, x, dy, t, mask) for t in (torch.float64, dtype))
    for name, ours, low, high in zip(
        ("y", "dx", "da", "de", "db"), found, eager, exact, strict=True
    ):
        assert_within_budget(name, ours, low, high)
    assert found[3][~KEPT].abs().min() > 0
    assert report.calls.fused == 1 and not report.calls.fallen_back


def test_several_active_adapters():
    model = adalora(One(False, torch.float32), ["proj"])
    frozen = peft.AdaLoraConfig(target_modules=["proj"], lora_alpha=5, **SCHEDULE)
    frozen.inference_mode = True
    model.add_adapter("second", frozen)
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model.proj
    for part in (layer.lora_A, layer.lora_E, layer.lora_B):
        for name in ("default", "second"):
            nn.init.normal_(part[name])
    ours = copy.deepcopy(model)
    report = lk.accelerate_peft(ours)
    x = torch.randn(9, IN)
    exact = model.double()(x.double())
    torch.testing.assert_close(ours(x).double(), exact, rtol=1e-4, atol=1e-3)
    assert report.calls.fused == 1
    # With dropout each has a mask of its own, and all but the first are added by PEFT's lines.
    fused = ours.base_model.model.proj
    fused.lora_dropout["default"] = fused.lora_dropout["second"] = nn.Dropout(1e-9)
    torch.testing.assert_close(ours.train()(x).double(), exact, rtol=1e-4, atol=1e-3)
    assert report.calls.fused == 2


def step(model, optimizer, batch, number):
    loss = model(**batch, labels=batch["input_ids"]).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.base_model.update_and_allocate(number)
    pattern = model.peft_config["default"].rank_pattern or {}
    return loss.item(), {name: list(kept) for name, kept in pattern.items()}


@pytest.mark.slow
def test_a_run_with_a_budget_has_pefts_losses_and_ranks():
    # Importance that forgets soon, and factors that one step changes: ranks change places.
    options = {"beta1": 0.2, "beta2": 0.2, "target_r": 3}
    theirs = adalora(small.build("gpt2"), ["c_attn", "c_proj", "c_fc"], **options)
    draw(theirs, torch.ones(R, dtype=torch.bool))
    with torch.no_grad():
        for layer in svd_layers(theirs).values():
            layer.lora_E["default"].mul_(0.1)
    ours = copy.deepcopy(theirs)
    report = lk.accelerate_peft(ours)
    assert len(report.fused) == len(svd_layers(theirs)) and not report.skipped
    batch = small.batch_for(theirs.get_base_model())
    runs = []
    for model in theirs, ours, copy.deepcopy(theirs).double():
        model.eval()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=5e-2)
        runs.append([step(model, optimizer, batch, number) for number in range(14)])
    # Such steps multiply what is rounded: PEFT's own float32 says by how much.
    errors = [
        [abs(loss - exact) for (loss, _), (exact, _) in zip(run, runs[2], strict=True)]
        for run in runs
    ]
    assert max(errors[1]) <= 4 * max(errors[0]) < 1e-3, errors
    for (_, ranks), (_, expected) in zip(*reversed(runs[:2]), strict=True):
        assert ranks == expected
    losses, patterns = zip(*runs[1], strict=True)
    total = [sum(sum(kept) for kept in pattern.values()) for pattern in patterns if pattern]
    assert total[-1] < total[0] and losses[-1] < losses[0]
    returned = [
        name
        for before, after in itertools.pairwise(patterns)
        for name in before
        for was, now in zip(before[name], after[name], strict=True)
        if now and not was
    ]
    assert returned
    assert report.calls.fused == 14 * len(report.fused) and not report.calls.fallen_back


def test_masks_recompile_nothing():
    model = adalora(small.build("llama"), ["q_proj", "up_proj"])
    draw(model)
    ours = copy.deepcopy(model)
    lk.accelerate_peft(ours)
    batch = small.batch_for(model.get_base_model())
    # What other tests compiled of the same code would count.
    torch._dynamo.reset()
    compiled = torch.compile(ours.eval(), fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for shift in range(3):
            kept = KEPT.roll(shift)
            for m in model, ours:
                draw(m, kept)
            found = compiled(**batch).logits
            assert small.relative_difference(found, small.logits(model.eval())) < 1e-4


def test_files_merging_and_the_way_back_are_pefts(tmp_path):
    theirs = adalora(small.build("llama"), ["q_proj", "up_proj"])
    draw(theirs)
    names = [f"{name}.lora_E.default" for name in svd_layers(theirs.base_model.model)]
    theirs.peft_config["default"].rank_pattern = {name: KEPT.tolist() for name in names}
    theirs.peft_config["default"].rank_pattern[names[0]] = [False] * R
    with torch.no_grad():
        svd_layers(theirs.base_model.model)[names[0][:-15]].lora_E["default"].zero_()
    ours = copy.deepcopy(theirs)
    report = lk.accelerate_peft(ours)
    before = small.logits(ours.eval())
    assert small.relative_difference(before, small.logits(theirs.eval())) < 1e-5
    for model, folder in (theirs, "theirs"), (ours, "ours"):
        model.save_pretrained(tmp_path / folder)
    weights, configs = [], []
    for folder in tmp_path / "ours", tmp_path / "theirs":
        weights.append((folder / "adapter_model.safetensors").read_bytes())
        configs.append(json.loads((folder / "adapter_config.json").read_text()))
        configs[-1]["target_modules"].sort()  # a set in PEFT
    assert weights[0] == weights[1] and configs[0] == configs[1]
    read = peft.PeftModel.from_pretrained(small.build("llama"), tmp_path / "ours")
    again = lk.accelerate_peft(read)
    assert small.relative_difference(small.logits(read.eval()), before) < 1e-5
    # What the allocator took whole is PEFT's own forward.
    assert again.calls.fused == len(names) - 1
    assert again.calls.fallen_back == {"a rank of 0": 1}
    ours.merge_adapter()
    theirs.merge_adapter()
    assert small.relative_difference(small.logits(ours), small.logits(theirs)) < 1e-6
    ours.unmerge_adapter()
    theirs.unmerge_adapter()
    assert small.relative_difference(small.logits(ours), before) < 1e-4
    assert set(lk.restore_peft(ours)) == set(report.fused)
    assert {type(layer) for layer in svd_layers(ours).values()} == {SVDLinear}
    assert torch.equal(small.logits(ours), small.logits(theirs))
