"""The finding about four-bit bases, from its rows."""

import pytest

from examples.study import four_bit
from examples.study.wording import NO_DIFFERENCE


def test_rows(tiny):
    rows = {row["name"]: row for row in tiny.content("four_bit")["rows"]}
    assert list(rows) == list(four_bit.NAMES)
    plain, nf4, double = (rows[name] for name in (four_bit.PLAIN, "NF4", "NF4 double"))
    assert four_bit.bits(plain) == 16
    # An absmax in float32 for 64 weights. Of so few weights the tables of 256 floats that double
    # quantisation needs are not paid back.
    assert four_bit.bits(nf4) == pytest.approx(4.5) and double["bytes"] != nf4["bytes"]
    assert len({row["weights"] for row in rows.values()}) == 1
    assert nf4["before"] != plain["before"] and nf4["before"] != rows["FP4"]["before"]
    assert all(
        len(row["after"]) == 2 and row["after"] != plain["after"]
        for row in rows.values()
        if row is not plain
    )


def test_finding_follows_the_rows(tiny):
    content = tiny.content("four_bit")
    plain, nf4, nf4_double, fp4, fp4_double = content["rows"]
    for row, before, after in (
        (plain, 3.0, [2.0, 2.1]),
        (nf4, 3.25, [2.1, 2.0]),
        (nf4_double, 3.5, [2.5, 2.6]),
        (fp4, 2.75, [1.5, 1.6]),
        (fp4_double, 3.0, [2.5, 2.6]),
    ):
        row |= {"before": before, "after": after, "step_s": 1.0, "infer_s": 1.0}
    nf4 |= {"step_s": 2.0, "infer_s": 0.5}
    said = four_bit.finding(content)
    assert "+0.2500 in NF4, +0.5000 in NF4 double, -0.2500 in FP4 and +0.0000 in FP4 double" in said
    assert f"shows {NO_DIFFERENCE} with NF4, rises by 0.5000 with NF4 double and FP4 double" in said
    assert "falls by 0.5000 with FP4" in said
    assert (
        "A step is 2.00x slower with NF4," in said and "inference is 2.00x faster with NF4," in said
    )
    nf4_double["bytes"] = 4 * nf4_double["weights"] / 8
    assert "shrink 4.0x, to 4.00 bits (NF4 double)" in four_bit.finding(content)
    nf4["step_s"], nf4["after"] = 0.5, [3.0, 3.1]
    said = four_bit.finding(content)
    assert "A step is 2.00x faster with NF4," in said and "rises by 1.0000 with NF4," in said
