"""Cases of a mixture's experts: ``linear.py``'s budget and poison for the operators of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..planning.answers import record_plans
from ..spec import reference
from .linear import LAYOUTS, Arguments, assert_within_budget, poisoned_memory, quantized


@dataclass(frozen=True)
class ExpertCase:
    """Rows sorted by expert; :meth:`draw` makes the tensors. ``counts`` are the rows of each
    expert, ``spare`` those behind them that belong to none. r = 0: no adapter."""

    counts: tuple[int, ...]
    n: int
    k: int
    r: int
    spare: int = 0
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    bias: bool = False
    fan_in_fan_out: bool = False
    # A and B as views of PEFT's lora_A [r*E, K] and lora_B [N, r*E]
    peft_layout: bool = True
    layout: str = "contiguous"
    zero_weight: bool = False
    # the weight is four-bit: its type, its block, and whether absmax is quantised too
    quant: tuple[str, int, bool] | None = None
    scale: float = 0.75
    device: str = "cpu"
    seed: int = 0

    def draw(self) -> ExpertInputs:
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device=self.device)

        experts, m = len(self.counts), sum(self.counts) + self.spare
        layout = LAYOUTS[self.layout]
        adapter_dtype = self.adapter_dtype or self.dtype
        weight = normal(experts, self.n, self.k) / self.k**0.5 * (not self.zero_weight)
        packed = None
        if self.fan_in_fan_out:
            weight = weight.transpose(1, 2).contiguous()
        if self.quant is not None:
            weight, packed = quantized(weight, self.quant)
        a = b = None
        if self.r or packed is not None:
            a = (normal(experts, self.r, self.k) / self.k**0.5).to(adapter_dtype)
            amplify = self.scale * max(self.r, 1) ** 0.5
            b = (normal(experts, self.n, self.r) / amplify).to(adapter_dtype)
            if self.peft_layout:
                stored = b.permute(1, 2, 0).reshape(self.n, -1).contiguous()
                b = stored.view(self.n, self.r, experts).permute(2, 0, 1)
        return ExpertInputs(
            case=self,
            x=layout(normal(m, self.k).to(self.dtype)),
            dy=layout(normal(m, self.n).to(self.dtype)),
            weight=weight if packed is not None else weight.to(self.weight_dtype or self.dtype),
            lora_a=a,
            lora_b=b,
            scale=torch.tensor(
                self.scale,
                dtype=torch.float64 if self.dtype == torch.float64 else torch.float32,
                device=self.device,
            ),
            offs=torch.tensor(self.counts, device=self.device).cumsum(0).int(),
            bias=normal(experts, self.n).to(self.dtype) if self.bias else None,
            packed=packed,
        )


@dataclass(frozen=True)
class ExpertInputs:
    case: ExpertCase
    x: Tensor
    dy: Tensor
    # of four-bit ones the values, in float64
    weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    scale: Tensor
    offs: Tensor
    bias: Tensor | None
    # of four-bit ones the arguments of the operators
    packed: Arguments | None = None

    def expert_of_row(self) -> Tensor:
        """int64 [M]; E: none."""
        counts = torch.tensor([*self.case.counts, self.case.spare], device=self.x.device)
        return torch.repeat_interleave(torch.arange(len(counts), device=self.x.device), counts)

    def arguments(self, op: str) -> Arguments:
        """The keyword arguments of ``op``."""
        tail: Arguments = {"scale": self.scale, "offs": self.offs}
        if op == "expert_shrink":
            return tail | {"x": self.x, "lora_a": self.lora_a}
        linear = (
            tail
            | {
                "weight": self.weight,
                "lora_a": self.lora_a,
                "lora_b": self.lora_b,
                "fan_in_fan_out": self.case.fan_in_fan_out,
            }
            | (self.packed or {})
        )
        if op == "expert_linear_fwd":
            return linear | {"x": self.x, "bias": self.bias}
        if op == "expert_linear_dx":
            return linear | {"dy": self.dy}
        assert self.lora_a is not None and self.lora_b is not None
        b = self.lora_b.transpose(1, 2)
        return {
            "dy": self.dy,
            "x": self.x,
            "s": reference.expert_shrink(self.x, self.lora_a, **tail),
            "d": reference.expert_shrink(self.dy, b, **tail),
            "offs": self.offs,
            "da_dtype": self.lora_a.dtype,
            "db_dtype": self.lora_b.dtype,
        }


def naive(inputs: ExpertInputs, op: str, dtype: torch.dtype) -> list[Tensor]:
    """The results of ``op`` with a weight and an adapter gathered for every row, in ``dtype``. It
    shares no line with the reference."""
    expert = inputs.expert_of_row()
    live = (expert < len(inputs.case.counts)).to(dtype)[:, None]
    expert = expert.clamp(max=len(inputs.case.counts) - 1)

    def of_rows(t: Tensor, rounded: torch.dtype | None = None) -> Tensor:
        return t.to(rounded or t.dtype).to(dtype)[expert]

    def times(rows: Tensor, matrices: Tensor) -> Tensor:
        """[M, i] by [M, i, j]"""
        return torch.bmm(rows.to(dtype)[:, None], matrices)[:, 0]

    x, dy, scale = inputs.x, inputs.dy, inputs.scale.item()
    a, b = inputs.lora_a, inputs.lora_b
    if op == "expert_linear_dab":
        assert a is not None and b is not None
        given = inputs.arguments(op)
        da, db = a.new_zeros(a.shape, dtype=dtype), b.new_zeros(b.shape, dtype=dtype)
        for e in range(len(da)):
            rows = ((expert == e) & (live[:, 0] > 0)).nonzero().flatten()
            da[e] = given["d"].to(dtype)[rows].t() @ x.to(dtype)[rows]
            db[e] = dy.to(dtype)[rows].t() @ given["s"].to(dtype)[rows]
        return [da, db]
    if op == "expert_shrink":
        assert a is not None
        return [scale * times(x, of_rows(a).transpose(1, 2)) * live]
    weight = of_rows(inputs.weight, None if inputs.packed else inputs.x.dtype)
    weight = weight if inputs.case.fan_in_fan_out else weight.transpose(1, 2)
    tail = x.new_zeros(len(x), 0, dtype=dtype)
    if op == "expert_linear_dx":
        y = times(dy, weight.transpose(1, 2))
        if a is not None and b is not None:
            tail = scale * times(dy, of_rows(b))
            y = y + times(tail, of_rows(a))
        return [y * live, tail * live]
    y = times(x, weight)
    if a is not None and b is not None:
        tail = scale * times(x, of_rows(a).transpose(1, 2))
        y = y + times(tail, of_rows(b).transpose(1, 2))
    if inputs.bias is not None:
        y = y + of_rows(inputs.bias)
    return [y * live, tail * live]


def check_experts(
    op: str,
    run: Callable[..., Any],
    case: ExpertCase,
    *,
    backend: str | None = None,
    budgets: int = 1,
) -> list[Tensor]:
    """Run ``run(**arguments)`` as ``op`` on ``case`` in poisoned memory and hold every result to
    the budget (``budgets`` of them); rows without an expert, and gradients of experts without rows,
    to zero. ``backend`` as in :func:`testing.check`. Returns the results."""
    inputs = case.draw()
    arguments = inputs.arguments(op)
    exact, eager = naive(inputs, op, torch.float64), naive(inputs, op, case.dtype)
    with poisoned_memory(), record_plans() as answers:
        results = run(**arguments)
    if backend is not None:
        assert [(a.op, a.backend) for a in answers] == [(op, backend)], f"answered by {answers}"
    results = [results] if isinstance(results, Tensor) else list(results)
    for number, (ours, one, other) in enumerate(zip(results, eager, exact, strict=True)):
        assert_within_budget(f"{op} {case} result {number}", ours, one, other, budgets)
        unused = torch.tensor(case.counts, device=ours.device) == 0
        if op == "expert_linear_dab":
            assert not ours[unused].any(), f"{op} {case}: a gradient of an expert without rows"
        elif case.spare:
            assert not ours[-case.spare :].any(), f"{op} {case}: a row without an expert"
    return results


def _with(run: Callable[..., Any], given: Arguments, **changed: Any) -> Any:
    return run(**(given | changed))


# Wrong kernels: what each does to the arguments of a sound one.
MUTATIONS: dict[str, Callable[[Callable[..., Any], Arguments], Any]] = {
    "no tail": lambda run, given: _with(run, given, scale=given["scale"] * 0),
    "no scale": lambda run, given: _with(run, given, scale=torch.ones_like(given["scale"])),
    "the next expert's A": lambda run, given: _with(run, given, lora_a=given["lora_a"].roll(1, 0)),
    "a row too few for the first": lambda run, given: _with(
        run, given, offs=given["offs"] - (torch.arange(len(given["offs"])) == 0).int()
    ),
}


def _with_quant(change: Callable[[list[Tensor]], list[Tensor]]) -> Any:
    return lambda run, given: _with(run, given, quant=change(given["quant"]))


# Of double-quantised bytes.
FOUR_BIT_MUTATIONS: dict[str, Callable[[Callable[..., Any], Arguments], Any]] = {
    "the halves of a byte swapped": lambda run, given: _with(
        run, given, weight=given["weight"] >> 4 | given["weight"] << 4
    ),
    "the absmax of the block before": _with_quant(lambda q: [q[0], q[1].roll(1), *q[2:]]),
    "no offset": _with_quant(lambda q: [*q[:4], torch.zeros_like(q[4])]),
    "another code": _with_quant(lambda q: [q[0].roll(1), *q[1:]]),
    "the next expert's bytes": lambda run, given: _with(
        run, given, weight=given["weight"].view(len(given["offs"]), -1).roll(1, 0).view(-1, 1)
    ),
    "the other orientation": lambda run, given: _with(
        run, given, fan_in_fan_out=not given["fan_in_fan_out"]
    ),
}
