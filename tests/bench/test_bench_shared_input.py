"""The measurement of projections that share an input: it runs, and refuses what the native kernels
did not answer."""

import pytest

import lora_kernels as lk
from bench import shared_input


@pytest.mark.native
def test_a_row():
    content = shared_input.REPORT.run([shared_input.Case(64, (32, 16), "bfloat16", 0.1, 8)], 0.0)
    (line,) = shared_input.REPORT.page(content)[4:]
    assert [cell.strip() for cell in line.split("|")[1:5]] == [
        "8 x 64",
        "32 + 16",
        "bfloat16",
        "0.1",
    ]
    # x, and S of both.
    saved = content["rows"][0]["saved"][shared_input.TOGETHER]
    assert saved == pytest.approx(1 + 2 * shared_input.RANK / 64, abs=0.1)


@pytest.mark.native
def test_a_model():
    content = shared_input.OF_MODELS.run([shared_input.Model(64, 2, "float32", 1, 8)], 0.0)
    (line,) = shared_input.OF_MODELS.page(content)[4:]
    assert [cell.strip() for cell in line.split("|")[1:6]] == ["8", "64", "2", "1", "float32"]


def test_what_others_answered_is_not_printed():
    with lk.force_plan("vendor"), pytest.raises(SystemExit, match="not answered by the native"):
        shared_input.measure(shared_input.Case(64, (32,), "float32", rows=4), 0.0)
