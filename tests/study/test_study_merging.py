"""The finding about merging, from its rows."""

from examples.study import merging
from examples.study.wording import OURS, PEFT


def test_rows(tiny):
    rows = tiny.content("merging")["rows"]
    assert [(row["dtype"], row["library"]) for row in rows] == [
        (dtype, library) for dtype in merging.DTYPES for library in (OURS, PEFT)
    ]
    for row in rows:
        assert len(row["drift"]) == len(merging.CYCLES) and 0 < row["layer"] < 0.1
        if row["library"] == OURS:
            assert row["changed"] == 0 and not any(row["drift"])
        if row["dtype"] == "float32":
            assert row["layer"] < 1e-6


def test_finding_follows_the_rows(tiny):
    content = tiny.content("merging")
    ours, theirs = ([r for r in content["rows"] if r["library"] == lib] for lib in (OURS, PEFT))
    ours[0]["layer"] = 3e-7
    for row in theirs:
        row |= {"changed": 0.5, "drift": [*row["drift"][:-1], 0.25]}
    said = merging.finding(content)
    assert "changes by 3.0e-07" in said and "(3 times the type's precision)" in said
    assert f"of {OURS} are the base's bit for bit" in said
    assert "those of PEFT have drifted by 2e-01 in float32" in said
    for one, other in zip(ours, theirs, strict=True):
        one["library"], other["library"] = PEFT, OURS
    swapped = merging.finding(content)
    assert f"of {OURS} have drifted" in swapped and "those of PEFT are the base's" in swapped
    theirs[0]["layer"] = 2e-6
    assert "(17 times the type's precision)" in merging.finding(content)
    ours[0]["layer"] = 4e-6
    assert "and by 4.0e-06 when PEFT does" in merging.finding(content)
