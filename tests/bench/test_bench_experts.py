"""bench.experts: one small run, and what its page says."""

import pytest
import torch

from bench import experts

# Models are built and measured.
pytestmark = pytest.mark.slow


def test_a_run_and_its_page(monkeypatch, tmp_path):
    for name, value in {
        "HIDDEN": 64,
        "EXPERTS": 4,
        "TOP": 2,
        "INTERMEDIATE": 32,
        "TOKENS": 16,
    }.items():
        monkeypatch.setattr(experts, name, value)
    content = experts.run(0.0, [torch.float32])
    assert [row["what"] for row in content["rows"]] == ["experts", "model"]
    for row in content["rows"]:
        assert row["us"].keys() == row["peak"].keys() and min(row["us"].values()) > 0
        held = 4 * 3 * 64 * 32 * 4 * (1 if row["what"] == "experts" else 2)
        assert row["experts_bytes"] == held
        assert row["peak"][experts.PEFT] > row["peak"][experts.OURS]
    lines = experts.table(content)
    assert "rank 16" in lines[0] and len(lines) == 6
