"""The finding about inference, from its rows."""

from examples.study import inference
from examples.study.wording import OURS, PEFT


def test_rows(tiny):
    base, *others = tiny.content("inference")["rows"]
    assert base["kind"] == inference.BASE
    assert [row["kind"] for row in others] == list(inference.COLOURS)
    assert not base.keys() & inference.TEN.keys()
    merged, theirs, ours = others
    assert theirs["stored_mb"] == ours["stored_mb"] < merged["stored_mb"]
    for row in others:
        assert len(row["answer_ms"]) == len(inference.BATCHES)


def test_finding_follows_the_rows(tiny):
    content = tiny.content("inference")
    base, merged, theirs, ours = content["rows"]
    for row in content["rows"]:
        row |= {"answer_ms": [1.0, 2.0, 4.0]} | dict.fromkeys(inference.TEN, 1.0)
    theirs |= {"answer_ms": [2.0, 3.0, 4.0], "loaded_ms": 2.0, "switched_ms": 4.0, "batch_ms": 5.0}
    merged |= {"stored_mb": 8.0, "batch_ms": 10.0}
    said = inference.finding(content)
    assert f"2.00, 1.50 and 1.00 ({PEFT})" in said
    assert f"1.00, 1.00 and 1.00 ({OURS})" in said
    assert "Ten adapters are 8.00x smaller" in said
    assert "loads one in 0.50 of PEFT's time, switches in 0.25 of it" in said
    assert "a batch in 0.20 of it, 0.10 of the time that the merged" in said
    theirs["kind"], ours["kind"] = OURS, PEFT
    said = inference.finding(content)
    assert f"2.00, 1.50 and 1.00 ({OURS})" in said
    assert "loads one in 2.00 of PEFT's time, switches in 4.00 of it" in said
    merged["stored_mb"] = 0.5
    assert "2.00x larger on disk" in inference.finding(content)
