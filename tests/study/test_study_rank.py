"""The first question's finding, from its rows."""

from examples.study import rank
from examples.study.wording import NO_DIFFERENCE


def with_losses(content, *losses):
    """``losses`` of the first and of the last rank, for each scaling."""
    for (low, high), name in zip(losses, rank.SCALINGS, strict=True):
        content["rows"][0]["held_out"][name] = low
        content["rows"][-1]["held_out"][name] = high
    return content


def test_rows(tiny):
    rows = tiny.content("rank")["rows"]
    assert [row["rank"] for row in rows] == list(rank.RANKS)
    for row in rows:
        assert row["parameters"] == rows[0]["parameters"] * row["rank"] // 2
        assert {len(losses) for losses in row["held_out"].values()} == {2}
    # At rank 16 the same alpha and alpha = r are the same adapter.
    same = next(row for row in rows if row["rank"] == rank.ALPHA)["held_out"]
    assert same[rank.FIXED] == same[rank.EQUAL] != same[rank.STABLE]
    assert rows[0]["saved_bytes"] < rows[-1]["saved_bytes"]


def test_finding_follows_the_rows(tiny):
    content = with_losses(
        tiny.content("rank"),
        ([2.0, 2.1], [2.5, 2.6]),
        ([2.0, 2.1], [2.1, 2.0]),
        ([2.0, 2.1], [1.5, 1.6]),
    )
    said = rank.finding(content)
    assert f"rises by 0.5000 with {rank.FIXED}" in said
    assert f"{NO_DIFFERENCE} with {rank.EQUAL}" in said
    assert f"falls by 0.5000 with {rank.STABLE}" in said
    assert f"{rank.STABLE} is best" in said and f"1.0000 below {rank.FIXED}" in said
    for row in content["rows"]:
        row["held_out"] = dict(zip(rank.SCALINGS, reversed(row["held_out"].values()), strict=True))
    assert f"{rank.FIXED} is best" in rank.finding(content)
    same = with_losses(content, *[([2.0, 2.1], [2.0, 2.1])] * 3)
    assert f"the scalings show {NO_DIFFERENCE}" in rank.finding(same)
    low, high = content["rows"][0], content["rows"][-1]
    low["step_s"], high["step_s"] = 2.0, 1.0
    assert "a step that is 2.00x faster" in rank.finding(content)
