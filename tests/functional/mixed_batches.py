"""Drawn batches that mix adapters, and what holds an operator's results to float64."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import lora_kernels as lk
from lora_kernels.functional import ops
from lora_kernels.spec import reference
from lora_kernels.spec.segments import SegmentTable
from lora_kernels.testing.linear import assert_within_budget, poisoned_memory

NAN = float("nan")
MOST_WEIGHT = 5_000_000


@dataclass
class Mixed:
    """A drawn batch: NaN in unused slots and beyond live ranks, rows of every kind."""

    m: int
    k: int
    widths: tuple[int, ...]
    ranks: tuple[int, ...] = (5, 0, 33, 16, 1, 20)
    r_max: int = 40
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    packed: bool = False
    dropout_p: float = 0.0
    slots: list[int] | None = None
    seed: int = 0
    # Of the linear layer under the adapters; none where a test would be busy with that alone.
    weight: Tensor | None = field(init=False)
    a: list[Tensor] = field(init=False)
    b: list[Tensor] = field(init=False)

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape, dtype=self.dtype):
            return torch.randn(*shape, generator=generator).to(dtype)

        slots, n = len(self.ranks), len(self.widths)
        adapter = self.adapter_dtype or self.dtype
        if self.slots is None:
            drawn = torch.randint(-1, slots, (self.m,), generator=generator)
            # The last slot that is meant to be unused, and the last row in use.
            drawn[drawn == 3] = -1
            if self.m:
                drawn[-1] = slots - 1
            self.slots = drawn.tolist()
        self.scales = [0.5 + 0.25 * i for i in range(slots)]
        self.logical = torch.randperm(10_000, generator=generator)[: self.m]
        self.seg = SegmentTable.from_rows(
            self.slots, self.ranks, self.scales, logical_row=self.logical, max_rank=self.r_max
        )
        self.x = normal(self.m, self.k)
        self.dy = normal(self.m, sum(self.widths))
        self.y = normal(self.m, sum(self.widths))
        size, self.weight = (sum(self.widths), self.k), None
        if size[0] * size[1] < MOST_WEIGHT:
            self.weight = normal(*size) / max(self.k, 1) ** 0.5
            self.bias = normal(size[0])
        used = set(self.slots)
        size = (n * self.r_max if self.packed else self.r_max, self.k)
        self.a = [normal(slots, *size, dtype=adapter) for _ in range(1 if self.packed else n)]
        self.b = [normal(slots, width, self.r_max, dtype=adapter) for width in self.widths]
        for slot, rank in enumerate(self.ranks):
            live = rank if slot in used else 0
            for a in self.a:
                a[slot] /= self.k**0.5
                a[slot, live * (n if self.packed else 1) :] = NAN
            for b in self.b:
                b[slot, :, live:] = NAN
        self.rng = torch.tensor([7, 8, 9, 10]) if self.dropout_p else None

    @property
    def packed_slices(self):
        return len(self.widths) if self.packed else 0

    def arguments(self):
        return (self.a, self.b, self.seg.tensors(), self.packed_slices, self.rng, self.dropout_p)

    def adapter_of(self, slot, j, dtype):
        """A [rank, K] and B [N, rank] of one slot and slice, rounded first as the operators do."""
        return (t.to(reference.tail_dtype(self.dtype)).to(dtype) for t in self.stored(slot, j))

    def rows_of(self, slot):
        return [i for i, other in enumerate(self.slots) if other == slot]

    def mask(self, j):
        rng = self.rng + torch.tensor([0, j, 0, 0])
        return reference.dropout_mask(rng, self.m, self.k, self.dropout_p, self.logical)

    def naive(self, dtype):
        """Every result by the formula, adapter after adapter, the adapters' dX by autograd, in
        ``dtype``."""
        x = self.x.to(dtype).requires_grad_()
        dy = self.dy.to(dtype)
        s = torch.zeros(self.m, len(self.widths), self.r_max, dtype=dtype)
        d, slices, first = torch.zeros_like(s), [], 0
        for j, width in enumerate(self.widths):
            dropped = x if self.rng is None else torch.where(self.mask(j), x, 0)
            # In the graph, also where nobody has an adapter.
            delta = dropped.sum() * torch.zeros(self.m, width, dtype=dtype)
            for slot in sorted(set(self.slots) - {-1}):
                rows, (a, b) = self.rows_of(slot), self.adapter_of(slot, j, dtype)
                scale, rank = self.scales[slot] / (1 - self.dropout_p), self.ranks[slot]
                tail = scale * (dropped[rows] @ a.t())
                s[rows, j, :rank] = tail.detach()
                d[rows, j, :rank] = scale * (dy[rows, first : first + width] @ b)
                delta = delta.index_add(0, torch.tensor(rows), tail @ b.t())
            slices.append(delta)
            first += width
        delta = torch.cat(slices, dim=1)
        (dx,) = torch.autograd.grad(delta, x, dy)
        results = {
            "delta": delta.detach(),
            "s": s,
            "sum": self.y.to(dtype) + delta.detach(),
            "dx": dx,
            "d": d,
        }
        if self.weight is not None:
            weight, x = self.weight.to(dtype), x.detach()
            results["linear"] = x @ weight.t() + delta.detach() + self.bias.to(dtype)
            results["linear's dx"] = dy @ weight + dx
        return results

    def stored(self, slot, j):
        """A [rank, K] and B [N, rank] of one slot and slice as they are stored."""
        rank = self.ranks[slot]
        a = self.a[0][slot, j * rank : (j + 1) * rank] if self.packed else self.a[j][slot, :rank]
        return a, self.b[j][slot, :, :rank]

    def gradients_of_given(self, s, d, dtype):
        """dA and dB from an S and a D whose own rounding was judged where they were made."""
        x, dy, s, d = (t.to(dtype) for t in (self.x, self.dy, s, d))
        results, first = {}, 0
        for j, width in enumerate(self.widths):
            dropped = x if self.rng is None else torch.where(self.mask(j), x, 0)
            for slot in set(self.slots) - {-1}:
                rows, rank = self.rows_of(slot), self.ranks[slot]
                results["da", slot, j] = d[rows, j, :rank].t() @ dropped[rows]
                results["db", slot, j] = dy[rows, first : first + width].t() @ s[rows, j, :rank]
            first += width
        return results

    def slices_of(self, da, db):
        """Gradients of the stacks as naive() names them, and whether all the rest is zero."""
        found = {}
        for slot in sorted(set(self.slots)):
            rank = self.ranks[slot] if slot >= 0 else 0
            if not rank:
                continue
            for j in range(len(self.widths)):
                a = da[0][slot, j * rank : (j + 1) * rank] if self.packed else da[j][slot, :rank]
                found["da", slot, j] = a
                found["db", slot, j] = db[j][slot, :, :rank]
        total = sum((t != 0).sum() for t in (*da, *db))
        return found, total == sum((t != 0).sum() for t in found.values())


def check(case, backend="cpu"):
    """Forward, in place and every gradient against float64, in poisoned memory."""
    exact, eager = case.naive(torch.float64), case.naive(case.dtype)
    results = {}
    with poisoned_memory(), lk.record_plans() as answers:
        results["delta"], results["s"] = ops.segmented_lora(case.x, *case.arguments())
        results["dx"], results["d"] = ops.segmented_lora_dx(case.dy, *case.arguments())
        da, db = ops.segmented_lora_dab(
            case.dy,
            case.x,
            results["s"],
            results["d"],
            case.seg.tensors(),
            case.widths,
            case.r_max,
            case.packed_slices,
            case.rng,
            case.dropout_p,
            torch.float32,
            torch.float32,
        )
        if case.weight is not None:
            stacks, (rng, p) = case.arguments()[:4], case.arguments()[4:]
            results["linear"], s = ops.segmented_linear_fwd(
                case.x, case.weight, *stacks, case.bias, rng, p
            )
            results["linear's dx"], d = ops.segmented_linear_dx(
                case.dy, case.weight, *stacks, rng, p
            )
            assert torch.equal(s, results["s"]) and torch.equal(d, results["d"])
        if not case.dropout_p:
            results["sum"] = case.y.clone()
            ops.segmented_lora_(results["sum"], case.x, *case.arguments()[:4])
            for i, slot in enumerate(case.slots):
                if slot < 0 or case.ranks[slot] == 0:
                    assert torch.equal(results["sum"][i], case.y[i]), "a row without an adapter"
    assert {(a.backend, a.plan) for a in answers} == {
        (backend, "reference" if backend == "reference" else "native")
    }
    gradients, rest_is_zero = case.slices_of(da, db)
    assert rest_is_zero
    for i, slot in enumerate(case.slots):
        if slot < 0 or case.ranks[slot] == 0:
            assert not results["delta"][i].any() and not results["dx"][i].any()
    exact |= case.gradients_of_given(results["s"], results["d"], torch.float64)
    eager |= case.gradients_of_given(results["s"], results["d"], case.dtype)
    for name, result in (results | gradients).items():
        assert_within_budget(f"{name} of {case.ranks}", result, eager[name], exact[name])
