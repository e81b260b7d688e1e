"""The finding about the layers, from its rows."""

from examples.study import modules
from examples.study.wording import NO_DIFFERENCE


def test_rows(tiny):
    rows = tiny.content("modules")["rows"]
    named = [(family, name) for family, sets in modules.SETS.items() for name in sets]
    assert [(row["base"], row["layers"]) for row in rows] == named
    for family in modules.SETS:
        *some, every = (row for row in rows if row["base"] == family)
        assert every["ranks"] == [modules.RANK] * 2
        assert every["held_out"][0] == every["held_out"][1] and len(every["held_out"][0]) == 2
        for row in some:
            assert row["parameters"][0] < every["parameters"][0]
            assert abs(row["parameters"][1] / every["parameters"][1] - 1) < 0.05
            assert row["ranks"][1] > modules.RANK


def test_finding_follows_the_rows(tiny):
    content = tiny.content("modules")
    for row in content["rows"]:
        row["held_out"] = [[2.0, 2.1], [2.0, 2.1]]
    few, every = content["rows"][0], content["rows"][4]
    few["held_out"], every["held_out"] = [[2.5, 2.6], [1.5, 1.6]], [[2.0, 2.1]] * 2
    few["parameters"], every["parameters"] = [100, 400], [400, 400]
    first, second = modules.finding(content).split(" Llama: ")
    assert "GPT-2: from c_attn to all linear the held-out loss falls by 0.5000 at rank 8" in first
    assert "(4.00x more parameters)" in first
    assert "rises by 0.5000 at an equal count, where the lowest is that of c_attn: 0.5000" in first
    assert "below attention, " in first
    assert f"shows {NO_DIFFERENCE} at rank" in second
    assert f"is that of q + v: with {NO_DIFFERENCE} to MLP or all linear" in second
    few["held_out"], every["held_out"] = every["held_out"], few["held_out"]
    assert "rises by 0.5000 at rank 8" in modules.finding(content)
    assert "is that of all linear: 0.5000 below c_attn" in modules.finding(content)
