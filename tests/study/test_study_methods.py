"""The finding about LoRA and other methods, from its rows."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from examples.study import methods
from examples.study.houlsby import add_bottlenecks
from examples.study.wording import NO_DIFFERENCE


def test_rows(tiny):
    rows = tiny.content("methods")["rows"]
    sizes = [row["parameters"] for row in rows]
    assert sizes == sorted(sizes)
    of = {}
    for row in rows:
        of.setdefault(row["method"], []).append(row)
        assert len(row["held_out"]) == 2 and row["memory_bytes"] > 0 < row["infer_s"]
    assert {method: len(found) for method, found in of.items()} == {
        methods.LORA: 2,
        methods.HOULSBY: 2,
        methods.PREFIX: 2,
        methods.BITFIT: 1,
        methods.FULL: 1,
    }
    # The budgets are matched, but for a prefix that is as long as the text.
    for lora, bottleneck in zip(of[methods.LORA], of[methods.HOULSBY], strict=True):
        assert abs(bottleneck["parameters"] / lora["parameters"] - 1) < 0.15
    assert of[methods.PREFIX][0]["parameters"] == of[methods.LORA][0]["parameters"]
    assert of[methods.PREFIX][1]["name"] == "prefix of 16 tokens"


def test_bottlenecks_change_nothing_at_first():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=32, n_layer=2, n_head=2)).eval()
    model.requires_grad_(False)
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    add_bottlenecks(model, 3)
    assert methods.trained(model) == 4 * (2 * 3 * 32 + 3 + 32)
    y = model(input_ids=ids).logits
    assert torch.equal(y, before)
    y.sum().backward()
    ups = [p.grad for name, p in model.named_parameters() if name.endswith("up.weight")]
    assert len(ups) == 4 and all(grad.abs().max() > 0 for grad in ups)


def test_finding_follows_the_rows(tiny):
    content = tiny.content("methods")
    last = {row["method"]: row for row in content["rows"]}
    for method, losses in (
        (methods.LORA, [2.0, 2.1]),
        (methods.HOULSBY, [2.1, 2.0]),
        (methods.PREFIX, [2.5, 2.6]),
        (methods.BITFIT, [2.25, 2.35]),
        (methods.FULL, [1.5, 1.6]),
    ):
        last[method] |= {"held_out": losses, "step_s": 2.0, "infer_s": 2.0, "memory_bytes": 2.0}
    lora, full = last[methods.LORA], last[methods.FULL]
    last[methods.PREFIX]["infer_s"] = 3.0
    lora |= {"step_s": 1.0, "memory_bytes": 1.0}
    said = methods.finding(content)
    assert said.startswith(f"{lora['name']} (")
    for part in ("0.2500 below BitFit", "0.5000 below prefix of", "0.5000 above full fine-tuning"):
        assert part in said
    assert f"{NO_DIFFERENCE} to {last[methods.HOULSBY]['name']}" in said
    assert "its step is 2.00x faster, with 2.00x less memory" in said
    assert "inference is the same with LoRA merged, the same with bottleneck and 1.50x" in said
    lora["held_out"], full["held_out"] = full["held_out"], lora["held_out"]
    full |= {"step_s": 0.5, "memory_bytes": 0.5}
    said = methods.finding(content)
    assert "0.5000 below full fine-tuning" in said
    assert "its step is 2.00x slower, with 2.00x more memory" in said
