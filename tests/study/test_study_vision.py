"""The finding about the vision transformer, from its rows."""

import pytest

pytest.importorskip("sklearn")

import torch

from examples.study import vision
from examples.study.wording import NO_DIFFERENCE


def test_rows(tiny):
    rows = tiny.content("vision")["rows"]
    assert [row["method"] for row in rows] == list(vision.METHODS)
    head, one, four, sixteen, full = rows
    assert sixteen["parameters"] - four["parameters"] == 4 * (
        four["parameters"] - one["parameters"]
    )
    assert head["parameters"] < one["parameters"] < full["parameters"]
    for row in rows:
        assert len(row["accuracy"]) == 2 and all(0 <= a <= 1 for a in row["accuracy"])


def test_images_that_are_held_out_are_not_trained_on():
    old, new = vision.digits(torch.device("cpu"))
    assert len(old) + len(new) == 1797 and set(new[:, -1].tolist()) == {0, 1, 2, 3, 4}
    examples, others = vision.chosen(new, 1, 400)
    assert len(examples) == 50 and len(others) == 400
    assert torch.bincount(examples[:, -1].int()).tolist() == [vision.EXAMPLES] * 5
    assert len(torch.cat([examples, others]).unique(dim=0)) == 450
    assert not torch.equal(vision.chosen(new, 2, 400)[0], examples)


def test_finding_follows_the_rows(tiny):
    content = tiny.content("vision")
    head, one, four, sixteen, full = content["rows"]
    for row, accuracy in (
        (head, [0.50, 0.52]),
        (one, [0.70, 0.72]),
        (four, [0.80, 0.82]),
        (sixteen, [0.60, 0.62]),
        (full, [0.90, 0.92]),
    ):
        row["accuracy"] = accuracy
    four["parameters"], full["parameters"] = 1000, 20_000
    said = vision.finding(content)
    assert said.startswith("LoRA of rank 4 and a new head (1 k numbers, 5.0% of everything)")
    assert "recognise 81.0%" in said
    assert f"30.0 above {vision.HEAD} and 10.0 below {vision.FULL}" in said
    full["accuracy"], head["accuracy"] = [0.82, 0.80], [0.95, 0.97]
    said = vision.finding(content)
    assert f"15.0 below {vision.HEAD}" in said and f"{NO_DIFFERENCE} to {vision.FULL}" in said
