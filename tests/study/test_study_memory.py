"""The finding about memory, from its rows."""

import pytest
import torch

from examples.study import memory
from examples.study.wording import NO_DIFFERENCE


def test_rows(tiny):
    rows = {row["tricks"]: row for row in tiny.content("memory")["rows"]}
    assert list(rows) == list(memory.CASES)
    none, every = rows["none"], rows["all four"]
    assert every["weight_bytes"] < none["weight_bytes"]
    assert rows["accumulation"]["saved_bytes"] < none["saved_bytes"]
    assert rows["checkpointing"]["saved_bytes"] < none["saved_bytes"]
    assert every["saved_bytes"] < none["saved_bytes"] / 4
    # The same sums in another order.
    assert rows["accumulation"]["held_out"] == pytest.approx(none["held_out"], abs=1e-4)


def test_accumulated_gradients_are_the_whole_batch_s():
    x, weight = torch.randn(4, 3), torch.ones(3, requires_grad=True)

    class Model:
        device = x.device

    def loss_of(model, rows):
        return (rows @ weight).square()

    expected = loss_of(Model, x).mean()
    (gradient,) = torch.autograd.grad(expected, weight)
    loss = memory.in_parts(loss_of, Model, x)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(weight.grad, gradient)


def test_finding_follows_the_rows(tiny):
    content = tiny.content("memory")
    for row in content["rows"]:
        row |= {"peak_bytes": 100, "weight_bytes": 60, "step_s": 1.0, "held_out": [2.0, 2.1]}
    rows = {row["tricks"]: row for row in content["rows"]}
    rows["checkpointing"]["peak_bytes"] = 50
    rows["four-bit base"]["weight_bytes"] = 20
    rows["all four"] |= {"peak_bytes": 10, "weight_bytes": 20, "step_s": 3.0}
    said = memory.finding(content)
    assert "checkpointing helps a step's peak most (2.00x smaller)" in said
    assert "four-bit base helps the weights most (3.00x smaller)" in said
    assert "the peak is 10.00x smaller, the weights are 3.00x smaller" in said
    assert "a step is 3.00x slower, and the held-out loss" in said
    assert f"shows {NO_DIFFERENCE}" in said
    rows["accumulation"]["peak_bytes"] = 25
    rows["all four"] |= {"peak_bytes": 200, "step_s": 0.5, "held_out": [3.0, 3.1]}
    said = memory.finding(content)
    assert "accumulation helps a step's peak most (4.00x smaller)" in said
    assert "the peak is 2.00x larger" in said and "a step is 2.00x faster" in said
    assert "rises by 1.0000" in said
