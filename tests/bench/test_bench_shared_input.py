"""The measurement of projections that share an input: it runs, and refuses what the native kernels
did not answer."""

import pytest

import lora_kernels as lk
from bench import shared_input


@pytest.mark.native
def test_a_row():
    cases = [shared_input.Case(64, (32, 16), "bfloat16", 0.1)]
    content = shared_input.run(cases, seconds=0.0, rows=8)
    (line,) = shared_input.table(content)[4:]
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
    cases = [shared_input.Model(64, 2, "float32", layers=1)]
    content = shared_input.run(cases, 0.0, rows=8, measured=shared_input.measure_model)
    (line,) = shared_input.table_of_models(content)[4:]
    assert [cell.strip() for cell in line.split("|")[1:6]] == ["8", "64", "2", "1", "float32"]


def test_what_others_answered_is_not_printed():
    cases = [shared_input.Case(64, (32,), "float32")]
    with lk.force_plan("vendor"), pytest.raises(SystemExit, match="not answered by the native"):
        shared_input.run(cases, seconds=0.0, rows=4)
