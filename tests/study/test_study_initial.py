"""The finding about the start of A and B, from its rows."""

import pytest

from examples.study import initial
from examples.study.wording import NO_DIFFERENCE


def test_rows(tiny):
    content = tiny.content("initial")
    assert [row["way"] for row in content["rows"]] == list(initial.WAYS)
    assert len(content["rates"]) == len(initial.SHARES)
    for row in content["rows"]:
        assert len(row["held_out"]) == len(row["start"]) == len(row["losses"]) == 2
        assert row["held_out"][0] == min(row["tried"]) and row["rate"] in content["rates"]
        # All but one compute what the base does at first.
        same = [loss == pytest.approx(content["before"], abs=initial.SAME) for loss in row["start"]]
        assert all(same) == (row["way"] != "both Kaiming")


def test_finding_follows_the_rows(tiny):
    content = tiny.content("initial")
    content["before"] = 2.0
    zero, kaiming, gaussian, orthogonal, pissa = content["rows"]
    for row in content["rows"]:
        row |= {"start": [2.0, 2.0], "held_out": [1.5, 1.6]}
    kaiming |= {"start": [3.0, 3.5], "held_out": [1.7, 1.8]}
    pissa["held_out"] = [1.4, 1.5]
    said = initial.finding(content)
    assert "the base's with B zero, gaussian, orthogonal and PiSSA" in said
    assert "with both Kaiming it is up to 1.5000 above it" in said
    assert "rises by 0.2000 with both Kaiming" in said and "falls by 0.1000 with PiSSA" in said
    assert f"shows {NO_DIFFERENCE} with gaussian and orthogonal" in said
    zero["way"], kaiming["way"] = kaiming["way"], zero["way"]
    said = initial.finding(content)
    assert "with B zero it is up to 1.5000 above it" in said
    assert "falls by 0.2000 with both Kaiming, gaussian and orthogonal" in said
