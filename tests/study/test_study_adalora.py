"""The finding about AdaLoRA, from its rows."""

from examples.study import adalora
from examples.study.wording import NO_DIFFERENCE


def test_rows(tiny):
    rows = {row["name"]: row for row in tiny.content("adalora")["rows"]}
    assert list(rows) == list(adalora.NAMES)
    ada, same, more = rows.values()
    assert ada["ranks"].keys() == same["ranks"].keys() and len(ada["ranks"]) == 4
    assert set(same["ranks"].values()) == {adalora.KEPT}
    # The budget is kept, and the ranks were not spread evenly.
    assert adalora.total(ada) == adalora.total(same) == adalora.total(more) / 2
    assert len(set(ada["ranks"].values())) > 1
    assert max(ada["ranks"].values()) <= adalora.FIRST
    # Training starts with all ranks, each with a factor.
    assert (
        ada["parameters"] == more["parameters"] + 4 * adalora.FIRST == 2 * same["parameters"] + 32
    )


def test_places():
    ranks = {"transformer.h.0.attn.c_proj": 1.0, "transformer.h.11.attn.c_proj": 2.0, "proj": 3.0}
    assert adalora.by_place(ranks) == {"attn.c_proj": {"0": 1.0, "11": 2.0}, "proj": {"": 3.0}}


def test_finding_follows_the_rows(tiny):
    content = tiny.content("adalora")
    ada, same, more = content["rows"]
    ada |= {"held_out": [2.0, 2.1], "step_s": 3.0}
    same |= {"held_out": [2.5, 2.6], "step_s": 2.0}
    more["held_out"] = [2.1, 2.0]
    ada["ranks"] = dict(zip(ada["ranks"], (1, 2, 7, 6), strict=True))
    said = adalora.finding(content)
    assert said.startswith(
        f"AdaLoRA (16 ranks at the end) ends 0.5000 below {adalora.SAME} (16 ranks)"
    )
    assert f"{NO_DIFFERENCE} to {adalora.MORE} (32 ranks)" in said and "1.50x slower" in said
    assert "to mlp.c_fc most (7.0 in a layer), to attn.c_attn least (1.0)" in said
    same["held_out"], ada["held_out"] = ada["held_out"], same["held_out"]
    ada["step_s"] = 1.0
    said = adalora.finding(content)
    assert f"ends 0.5000 above {adalora.SAME}" in said and "2.00x faster" in said
