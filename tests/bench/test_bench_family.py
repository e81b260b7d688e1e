"""The measurement of the family: it runs, and tells which aims it misses."""

import pytest
import torch

pytest.importorskip("loralib")

from bench import family


@pytest.mark.slow
def test_a_row_and_its_table(monkeypatch):
    monkeypatch.setattr(family, "SAMPLE", 0.0)
    cases = [family.Case(8, 64, dtype) for dtype in ("bfloat16", "float32")]
    lines = family.REPORT.page(family.REPORT.run(cases, 0.0))
    cells = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines if "|" in line][2:]
    names = [family.PLAIN, family.LORA, family.DORA, family.ADALORA, family.MERGED]
    assert cells == [[dtype, name] for dtype in ("bfloat16", "float32") for name in names]
    assert "MultiheadAttention" in lines[-1]


def test_missed_aims_are_told():
    samples = {f"{name} ours": [10.0] * 3 for name in (family.LORA, family.ADALORA, family.MERGED)}
    samples |= {f"{family.DORA} ours": [13.0, 12.0, 14.0], f"{family.DORA} theirs": [20.0] * 3}
    row = {"dtype": "float32", "samples_us": samples}
    assert family.misses(row) == [
        "float32: DoRA takes 1.30 of our LoRA layer's time",
        "float32: DoRA is 1.54x faster than PEFT's",
    ]
    samples[f"{family.DORA} theirs"] = [40.0] * 3
    samples[f"{family.DORA} ours"] = [11.0] * 3
    assert family.misses(row) == []


def test_a_wrong_result_has_no_speed():
    case = family.Case(8, 64, "float32")
    pair = family.pairs_of(case)[family.ADALORA]
    with torch.no_grad():
        pair.ours.lora_E[0] = 0.0
    with pytest.raises(AssertionError, match="over the budget"):
        family.check(family.ADALORA, pair, torch.randn(8, 64))
