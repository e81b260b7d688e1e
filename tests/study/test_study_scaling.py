"""The finding about alpha and the learning rate, from its rows."""

from examples.study import scaling
from examples.study.wording import NO_DIFFERENCE


def test_rows(tiny):
    content = tiny.content("scaling")
    assert [row["factor"] for row in content["rows"]] == list(scaling.FACTORS)
    for row in content["rows"]:
        assert [len(losses) for losses in row["held_out"]] == [2] * len(content["rates"])


def test_finding_follows_the_rows(tiny):
    content = tiny.content("scaling")
    rows, content["rates"] = content["rows"], [0.001, 0.01, 0.1]
    for row in rows:
        row["held_out"] = [[2.0, 2.1], [1.5, 1.6], [3.0, 3.1]]
    said = scaling.finding(content)
    assert "the best of the learning rates is 0.01 at both ends" in said and NO_DIFFERENCE in said
    assert "by 0.0000 to 0.0000 at 0.001, 0.0000 to 0.0000 at 0.01 and" in said
    rows[0]["held_out"] = [[2.5, 2.6], [2.0, 2.2], [1.4, 1.5]]
    said = scaling.finding(content)
    assert "falls from 0.1 to 0.01" in said and "at most 0.1000 apart" in said
    assert "the lowest is 0.25 at 0.1" in said
    assert "by 0.5000 to 0.5000 at 0.001, 0.5000 to 0.6000 at 0.01 and 1.6000 to 1.6000" in said
    rows[0]["held_out"], rows[-1]["held_out"] = rows[-1]["held_out"], rows[0]["held_out"]
    assert "rises from 0.01 to 0.1" in scaling.finding(content)
