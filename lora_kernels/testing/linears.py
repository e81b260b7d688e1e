"""Cases of projections that share an input, and what a broken kernel of theirs would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..planning.answers import record_plans
from ..spec.linears import rng_of
from .linear import (
    Arguments,
    Case,
    Inputs,
    Mutation,
    _dab_of_given,
    _shift_offset,
    _with,
    assert_within_budget,
    naive,
    poisoned_memory,
)


@dataclass(frozen=True)
class Projections:
    """``case`` for each width, with the ranks in turn; all of them read the first one's x."""

    case: Case
    widths: tuple[int, ...]
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        sizes = "+".join(map(str, self.widths)), "+".join(map(str, self.ranks))
        return f"{self.case}-N{sizes[0]}-r{sizes[1]}"

    def draw(self) -> list[Inputs]:
        found: list[Inputs] = []
        for j, n in enumerate(self.widths):
            case = replace(
                self.case, n=n, r=self.ranks[j % len(self.ranks)], seed=self.case.seed + j,
                # Not one for all, and a projection without a bias.
                scale=self.case.scale * (1 + j / 4), bias=self.case.bias and j != 1,
            )  # fmt: skip
            inputs = case.draw()
            if found:
                inputs = replace(inputs, x=found[0].x, rng=rng_of(found[0].rng, j))
            found.append(inputs)
        return found


def arguments(inputs: list[Inputs], op: str) -> Arguments:
    """The keyword arguments of ``op``; S and D as the forward and dX would hand them over."""
    each = [t.arguments("lora_linear_dab") for t in inputs]
    common: Arguments = {"rng": inputs[0].rng, "dropout_p": inputs[0].case.dropout_p}
    if op == "lora_linears_dab":
        return common | {
            "dy": [t.dy for t in inputs],
            "x": inputs[0].x,
            "s": torch.cat([t["s"] for t in each], dim=1),
            "d": torch.cat([t["d"] for t in each], dim=1),
            "ranks": [t.case.r for t in inputs],
            "da_dtype": inputs[0].lora_a.dtype,
            "db_dtype": inputs[0].lora_b.dtype,
            "dbias_dtype": inputs[0].case.dtype if inputs[0].bias is not None else None,
        }
    common |= {
        "weights": [t.weight for t in inputs],
        "lora_a": [t.lora_a for t in inputs],
        "lora_b": [t.lora_b for t in inputs],
        "scales": [t.scale for t in inputs],
        "fan_in_fan_out": inputs[0].case.fan_in_fan_out,
    }
    if op == "lora_linears_dx":
        return common | {"dy": [t.dy for t in inputs]}
    return common | {"x": inputs[0].x, "biases": [t.bias for t in inputs]}


def expected(inputs: list[Inputs], dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Y_j, S, D, dX and the gradients by the formula as people write it, in ``dtype``."""
    each = [naive(t, dtype) for t in inputs]
    found = {name: [t[name] for t in each] for name in ("y", "da", "db")}
    found["dbias"] = [t.dy.to(dtype).sum(0) for t in inputs]
    for name in ("s", "d"):
        found[name] = [torch.cat([t[name] for t in each], dim=1)]
    found["dx"] = [torch.stack([t["dx"] for t in each]).sum(0)]
    return found


RESULTS = {
    "lora_linears_fwd": ("y", "s"),
    "lora_linears_dx": ("dx", "d"),
    "lora_linears_dab": ("da", "db", "dbias"),
}


def check(
    op: str, run: Callable[..., Any], case: Projections, *, backend: str, plan: str | None = None
) -> None:
    """Run ``run(**arguments)`` as ``op`` on ``case`` in poisoned memory and hold every result to
    the budget; ``backend`` (and ``plan``) must have answered."""
    inputs = case.draw()
    given = arguments(inputs, op)
    exact, eager = expected(inputs, torch.float64), expected(inputs, case.case.dtype)
    if op == "lora_linears_dab":
        # Judged on the S and D that they were given.
        for t in (exact, eager):
            own = [_dab_of_given(i.arguments("lora_linear_dab"), t["dx"][0].dtype) for i in inputs]
            t |= {name: [gradients[name] for gradients in own] for name in ("da", "db")}
    with poisoned_memory(), record_plans() as answers:
        results = run(**given)
    assert [(a.op, a.backend) for a in answers] == [(op, backend)], f"answered by {answers}"
    assert plan in (None, answers[0].plan), f"answered by {answers}"
    for name, result in zip(RESULTS[op], results, strict=True):
        if name == "dbias" and given["dbias_dtype"] is None:
            assert not result
            continue
        each = result if isinstance(result, (list, tuple)) else [result]
        for j, (t, e, x) in enumerate(zip(each, eager[name], exact[name], strict=True)):
            assert_within_budget(f"{op} {case} {name}[{j}]", t, e, x)


def _swapped(*names: str) -> Mutation:
    def mutation(run: Callable[..., Any], given: Arguments) -> Any:
        return run(**(given | {name: given[name][::-1] for name in names}))

    return mutation


def _same_mask(run: Callable[..., Any], given: Arguments) -> Any:
    """Every projection with the mask of the first."""
    results: list[Any] = []
    for j in range(len(given["dy"])):
        r = given["ranks"][0]
        own = slice(j * r, (j + 1) * r)
        one = {"dy": [given["dy"][j]], "s": given["s"][:, own], "d": given["d"][:, own]}
        results.append(run(**(given | one | {"ranks": [r]})))
    return tuple(
        [t for each in gradients for t in each] for gradients in zip(*results, strict=True)
    )


def _without_last(run: Callable[..., Any], given: Arguments) -> Any:
    """dX without the last projection."""
    last = [torch.zeros_like(given["dy"][-1])]
    _, d = run(**given)
    return run(**(given | {"dy": [*given["dy"][:-1], *last]}))[0], d


# Of projections with equal widths and ranks.
MUTATIONS: dict[str, dict[str, Mutation]] = {
    "lora_linears_fwd": {
        "another projection's A": _swapped("lora_a"),
        "another projection's B": _swapped("lora_b"),
        "another projection's scale": _swapped("scales"),
        "no bias": _with(biases=lambda t: [None] * len(t)),
        "no mask": _with(rng=None),
        "another offset": _with(rng=_shift_offset),
    },
    "lora_linears_dx": {
        "another projection's weight": _swapped("weights"),
        "another projection's A": _swapped("lora_a"),
        "another projection's scale": _swapped("scales"),
        "the last projection is missing": _without_last,
        "no mask": _with(rng=None),
        "another offset": _with(rng=_shift_offset),
    },
    "lora_linears_dab": {
        "one mask for all": _same_mask,
        "no mask": _with(rng=None),
        "another offset": _with(rng=_shift_offset),
    },
}


def mutation_case(dtype: torch.dtype, device: str = "cpu") -> Projections:
    case = Case(70, 48, 40, 20, dtype=dtype, dropout_p=0.25, device=device)
    return Projections(case, (48, 48, 48), (20,))
