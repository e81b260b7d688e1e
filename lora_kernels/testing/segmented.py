"""Cases of a batch that mixes adapters: ``linear.py``'s budget and poison for the segmented
operators.

Slots hold live ranks of every kind, 0 among them, one slot is used by no row, and NaN lies in what
no kernel may read: beyond the live ranks and in the slots without rows or rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..planning.answers import record_plans
from ..spec import reference
from ..spec.segments import SegmentTable
from .linear import LAYOUTS, Arguments, assert_within_budget, poisoned_memory, quantized


@dataclass(frozen=True)
class SegmentedCase:
    """One mixed batch; :meth:`draw` makes the tensors. ``ranks`` are the live ranks of the slots.
    Without ``rows``, the slot of each row, no row uses the last one, and a fifth of them none."""

    m: int
    k: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    r_max: int = 0
    packed: bool = False
    dropout_p: float = 0.0
    layout: str = "contiguous"
    rows: tuple[int, ...] | None = None
    # rows that the table has room for beyond those of the batch
    spare: int = 0
    # of the base linear under the adapters; with weight 0 only the adapters are seen
    fan_in_fan_out: bool = False
    bias: bool = False
    weight: float = 1.0
    # as of ``linear.Case``
    quant: tuple[str, int, bool] | None = None
    device: str = "cpu"
    seed: int = 0

    def draw(self) -> SegmentedInputs:
        generator = torch.Generator(self.device).manual_seed(self.seed)
        slots, n, r = len(self.ranks), len(self.widths), self.r_max or max(self.ranks)
        adapter_dtype = self.adapter_dtype or self.dtype
        layout = LAYOUTS[self.layout]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device=self.device)

        uniform = torch.rand(self.m, generator=generator, device=self.device)
        slot_of_row = (uniform * (slots - 0.8) / 0.8 - (slots - 1) / 4).floor().long()
        slot_of_row = slot_of_row.clamp(-1, max(slots - 2, 0))
        used = set(range(max(slots - 1, 1)))
        if self.rows is not None:
            slot_of_row, used = torch.tensor(self.rows, device=self.device).long(), set(self.rows)
        scales = 0.5 + torch.rand(slots, generator=generator, device=self.device)
        seg = SegmentTable(self.m + self.spare, slots, r, self.device)
        logical = torch.randperm(self.m, generator=generator, device=self.device) + 2**20
        seg.update_(slot_of_row, torch.tensor(self.ranks), scales, logical_row=logical)

        lora_a, lora_b = [], []
        for width in self.widths:
            a = normal(slots, r, self.k) / self.k**0.5
            b = normal(slots, width, r)
            for slot, rank in enumerate(self.ranks):
                b[slot] *= (1 - self.dropout_p) ** 0.5 / max(rank, 1) ** 0.5
                live = rank if slot in used else 0
                a[slot, live:], b[slot, :, live:] = float("nan"), float("nan")
            lora_a.append(a.to(adapter_dtype))
            lora_b.append(b.to(adapter_dtype))
        if self.packed:
            whole = torch.full((slots, n * r, self.k), float("nan"), dtype=adapter_dtype)
            whole = whole.to(self.device)
            for slot, rank in enumerate(self.ranks):
                for j in range(n):
                    whole[slot, j * rank : (j + 1) * rank] = lora_a[j][slot, :rank]
            lora_a = [whole]
        if self.layout != "contiguous":
            lora_a = [_inside_nan(t) for t in lora_a]
            lora_b = [_inside_nan(t) for t in lora_b]
        total = sum(self.widths)
        # Without a base none is drawn: some tests have large ones.
        weight = torch.zeros(1, 1, device=self.device).expand(total, self.k)
        if self.weight:
            weight = normal(total, self.k) * (self.weight / self.k**0.5)
        if self.fan_in_fan_out:
            weight = weight.t().contiguous()
        weight, packed = weight.to(self.dtype), None
        if self.quant is not None:
            weight, packed = quantized(weight, self.quant)
        rng = None
        if self.dropout_p:
            rng = torch.tensor([-(2**61) - self.seed, 2**33 - 2, 3, 24], device=self.device)
        return SegmentedInputs(
            case=self,
            seg=seg,
            weight=weight,
            bias=normal(total).to(self.dtype) if self.bias else None,
            x=layout(normal(self.m, self.k).to(self.dtype)),
            dy=layout(normal(self.m, total).to(self.dtype)),
            y=layout(normal(self.m, total).to(self.dtype)),
            lora_a=lora_a,
            lora_b=lora_b,
            rng=rng,
            packed=packed,
        )


@dataclass(frozen=True)
class SegmentedInputs:
    case: SegmentedCase
    seg: SegmentTable
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    dy: Tensor
    y: Tensor
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    rng: Tensor | None
    packed: Arguments | None = None

    @property
    def packed_slices(self) -> int:
        return len(self.case.widths) * self.case.packed

    def bare(self) -> Tensor:
        """Rows without an adapter, bool [M]: of slot -1, and of slots of rank 0."""
        slots = self.seg.slot_of_row[: self.case.m].long()
        return (slots < 0) | (self.seg.rank_of_slot[slots.clamp(min=0)] == 0)

    def slice_of_a(self, slot: int, j: int) -> Tensor:
        """A [rank, K] of a slot and slice."""
        rank = self.case.ranks[slot]
        at = slice(j * rank, (j + 1) * rank) if self.case.packed else slice(rank)
        return self.lora_a[0 if self.case.packed else j][slot, at]

    def arguments(self, op: str) -> Arguments:
        """The keyword arguments of ``op``; S and D as the forward and dX would hand them over, and
        ``y`` a fresh copy."""
        table = self.seg.tensors()
        dropout: Arguments = {"rng": self.rng, "dropout_p": self.case.dropout_p}
        a: Arguments = {"lora_a": self.lora_a, "table": table, "packed_slices": self.packed_slices}
        both = a | {"lora_b": self.lora_b}
        y = LAYOUTS[self.case.layout](self.y.contiguous().clone())
        if op == "segmented_shrink":
            return a | dropout | {"x": self.x}
        if op == "segmented_lora":
            return both | dropout | {"x": self.x}
        if op == "segmented_lora_":
            return both | {"x": self.x, "y": y}
        if op == "segmented_lora_dx":
            return both | dropout | {"dy": self.dy}
        base: Arguments = {"weight": self.weight, "fan_in_fan_out": self.case.fan_in_fan_out}
        base |= self.packed or {}
        if op == "segmented_linear_fwd":
            return both | dropout | base | {"x": self.x, "bias": self.bias}
        if op == "segmented_linear_dx":
            return both | dropout | base | {"dy": self.dy}
        s = reference.segmented_shrink(self.x, **a, **dropout)
        if op == "segmented_lora_dab":
            _, d = reference.segmented_lora_dx(self.dy, **both, **dropout)
            return dropout | {
                "dy": self.dy,
                "x": self.x,
                "s": s,
                "d": d,
                "table": table,
                "widths": list(self.case.widths),
                "r_max": self.lora_b[0].shape[2],
                "packed_slices": self.packed_slices,
                "da_dtype": self.lora_a[0].dtype,
                "db_dtype": self.lora_b[0].dtype,
            }
        # A finished S may hold anything beyond the live rank.
        for row, slot in enumerate(self.seg.slot_of_row[: self.case.m].tolist()):
            s[row, :, self.case.ranks[slot] if slot >= 0 else 0 :] = float("nan")
        given: Arguments = {"s": s, "lora_b": self.lora_b, "table": table}
        return given | {"y": y} if op == "segmented_expand_" else given


def naive(inputs: SegmentedInputs, op: str, dtype: torch.dtype) -> list[Tensor]:
    """The results of ``op`` row by row and slot by slot, in ``dtype``, an in-place sum as its
    result. It shares no line with ``reference.py`` but the mask."""
    case, arguments = inputs.case, inputs.arguments(op)
    seg, n, k = inputs.seg, len(case.widths), case.k
    slots, r = len(case.ranks), inputs.lora_b[0].shape[2]
    first = [sum(case.widths[:j]) for j in range(n)]
    columns = [slice(f, f + w) for f, w in zip(first, case.widths, strict=True)]
    x, dy = inputs.x.to(dtype), inputs.dy.to(dtype)
    s, d = (x.new_zeros(case.m, n, r) for _ in range(2))
    delta, dx = x.new_zeros(case.m, sum(case.widths)), x.new_zeros(case.m, k)
    da = [x.new_zeros(slots, r, k) for _ in range(n)]
    if case.packed:
        da = [x.new_zeros(slots, n * r, k)]
    db = [x.new_zeros(slots, width, r) for width in case.widths]
    given_s = arguments["s"].to(dtype) if "s" in arguments else None
    given_d = arguments["d"].to(dtype) if "d" in arguments else None
    for slot, rank in enumerate(case.ranks):
        rows = (seg.slot_of_row[: case.m] == slot).nonzero().flatten()
        if rank == 0 or len(rows) == 0:
            continue
        c = seg.scale_of_slot[slot].item() / (1 - case.dropout_p)
        for j in range(n):
            at = slice(j * rank, (j + 1) * rank) if case.packed else slice(rank)
            a = inputs.slice_of_a(slot, j).to(dtype)
            b = inputs.lora_b[j][slot, :, :rank].to(dtype)
            mask = x.new_ones(len(rows), k, dtype=torch.bool)
            if inputs.rng is not None:
                seed, offset, row0, col0 = inputs.rng.tolist()
                rng = torch.tensor([seed, offset + j, row0, col0], device=x.device)
                mask = reference.dropout_mask(
                    rng, len(rows), k, case.dropout_p, seg.logical_row[rows]
                )
            dropped = x[rows].where(mask, 0)
            s[rows, j, :rank] = c * (dropped @ a.t())
            d[rows, j, :rank] = c * (dy[rows, columns[j]] @ b)
            own = s[rows, j, :rank] if given_s is None else given_s[rows, j, :rank]
            delta[rows, columns[j]] = own @ b.t()
            dx[rows] += (d[rows, j, :rank] @ a).where(mask, 0)
            if given_s is not None and given_d is not None:
                da[0 if case.packed else j][slot, at] = given_d[rows, j, :rank].t() @ dropped
                db[j][slot, :, :rank] = dy[rows, columns[j]].t() @ own
    if op == "segmented_shrink":
        return [s]
    if op == "segmented_lora":
        return [delta, s]
    weight = inputs.weight.t() if case.fan_in_fan_out else inputs.weight
    if op == "segmented_linear_fwd":
        y = x @ weight.to(dtype).t() + delta
        return [y if inputs.bias is None else y + inputs.bias.to(dtype), s]
    if op == "segmented_linear_dx":
        return [dy @ weight.to(dtype) + dx, d]
    if op == "segmented_lora_dx":
        return [dx, d]
    if op == "segmented_lora_dab":
        return [*da, *db]
    return [inputs.y.to(dtype) + delta]


def check_segmented(
    op: str, run: Callable[..., Any], case: SegmentedCase, *, backend: str | None = None
) -> list[Tensor]:
    """Run ``run(**arguments)`` as ``op`` on ``case`` in poisoned memory, hold every result to the
    budget, and rows without an adapter to zero, or in place to the bits they had. ``backend`` as in
    :func:`testing.check`. Returns the results."""
    inputs = case.draw()
    arguments = inputs.arguments(op)
    exact, eager = naive(inputs, op, torch.float64), naive(inputs, op, case.dtype)
    with poisoned_memory(), record_plans() as answers:
        results = run(**arguments)
    if backend is not None:
        assert [(a.op, a.backend) for a in answers] == [(op, backend)], f"answered by {answers}"
    flat: list[Tensor] = []
    if results is None:
        flat = [arguments["y"]]
    elif isinstance(results, Tensor):
        flat = [results]
    else:
        for result in results:
            flat += [result] if isinstance(result, Tensor) else list(result)
    for number, (ours, one, other) in enumerate(zip(flat, eager, exact, strict=True)):
        assert_within_budget(f"{op} {case} result {number}", ours, one, other)
        if op in ("segmented_linear_fwd", "segmented_linear_dx") and not number:
            # The base linear's rows are never zero.
            continue
        if op != "segmented_lora_dab":
            bare = inputs.bare()
            expected = inputs.y[bare] if results is None else torch.zeros_like(ours[bare])
            assert torch.equal(ours[bare], expected), f"{op} {case}: a row without an adapter"
            if op in _WITH_TAIL and number:
                assert not ours[other == 0].any(), f"{op} {case}: beyond the live rank"
        else:
            assert not ours[other == 0].any(), f"{op} {case}: a gradient of what no row used"
    return flat


# Operators whose second result is S or D.
_WITH_TAIL = (
    "segmented_lora_dx",
    "segmented_lora",
    "segmented_linear_fwd",
    "segmented_linear_dx",
)


def _inside_nan(stack: Tensor) -> Tensor:
    """The same values as a window into a larger buffer of NaN."""
    slots, rows, cols = stack.shape
    buffer = stack.new_full((slots + 1, rows + 1, cols + 3), float("nan"))
    return buffer[1:, 1:, 1:-2].copy_(stack)
