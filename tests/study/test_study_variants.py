"""The finding about LoRA's variants, from its rows."""

from examples.study import variants
from examples.study.wording import NO_DIFFERENCE


def test_rows(tiny):
    rows = tiny.content("variants")["rows"]
    plain, stable, dora, plus = rows
    assert [row["name"] for row in rows] == list(variants.VARIANTS)
    assert plain["parameters"] == stable["parameters"] == plus["parameters"] < dora["parameters"]
    for row in rows:
        assert len(row["tried"]) == len(variants.RATES) and len(row["held_out"]) == 2
        assert row["held_out"][0] == min(row["tried"]) and len(row["losses"]) == 2
    # B is zero at first, so that the first step's loss is the base's; no variant learns as LoRA.
    assert len({round(row["losses"][0], 5) for row in rows}) == 1
    assert all(row["held_out"] != plain["held_out"] for row in rows[1:])


def test_two_learning_rates(tiny):
    import torch

    import lora_kernels as lk

    model = lk.apply_lora(torch.nn.Sequential(torch.nn.Linear(4, 6)), r=2)
    a, b = variants.groups(model, variants.PLUS, 0.5)
    assert [p.shape for p in a["params"]] == [(2, 4)] and a["lr"] == 0.5
    assert [p.shape for p in b["params"]] == [(6, 2)] and b["lr"] == 0.5 * variants.RATIO


def test_finding_follows_the_rows(tiny):
    content = tiny.content("variants")
    plain, stable, dora, plus = content["rows"]
    for row, losses in zip(
        content["rows"], ([2.0, 2.1], [1.5, 1.6], [2.1, 2.0], [2.5, 2.6]), strict=True
    ):
        row |= {"held_out": losses, "step_s": 1.0}
    dora["step_s"] = 2.0
    said = variants.finding(content)
    assert "falls by 0.5000 with rsLoRA" in said and f"{NO_DIFFERENCE} with DoRA" in said
    assert f"rises by 0.5000 with {variants.PLUS}" in said
    assert "2.00x slower with DoRA" in said
    stable["held_out"], plus["held_out"] = plus["held_out"], stable["held_out"]
    said = variants.finding(content)
    assert "rises by 0.5000 with rsLoRA" in said and f"falls by 0.5000 with {variants.PLUS}" in said
