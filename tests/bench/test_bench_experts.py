"""bench.experts: one small run, and what its page says."""

import pytest

from bench import experts

# Models are built and measured.
pytestmark = pytest.mark.slow


def test_a_run_and_its_page():
    sizes = {"hidden": 64, "experts": 4, "top": 2, "intermediate": 32, "tokens": 16}
    cases = [experts.Case(what, "float32", **sizes) for what in ("experts", "model")]
    content = experts.REPORT.run(cases, 0.0)
    assert [row["what"] for row in content["rows"]] == ["experts", "model"]
    for row in content["rows"]:
        assert row["us"].keys() == row["peak"].keys() and min(row["us"].values()) > 0
        held = 4 * 3 * 64 * 32 * 4 * (1 if row["what"] == "experts" else 2)
        assert row["experts_bytes"] == held
        assert row["peak"][experts.PEFT] > row["peak"][experts.OURS]
    lines = experts.REPORT.page(content)
    assert "rank 16" in lines[0] and len(lines) == 6
