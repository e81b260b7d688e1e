"""The error budget, the cases and the poisoned inputs that tests/ and bench/ share.

One budget for every operator and dtype, on the largest and on the root-mean-square error:

    err(ours, float64) <= 2 * (err(eager torch, float64) + eps * size(float64))

where eager torch runs the naive formula with all operands cast to the compute dtype (which is the
dtype of Y: the adapter's gradients are computed in it too, whatever dtype they are returned in),
and size is max|.| or rms.

Every case draws A and B such that the adapter's part is as large as the base's: at B near zero an
output without its tail would pass any half-precision budget.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..planning.answers import record_plans
from ..spec import four_bit, reference

Arguments = dict[str, Any]


def error_and_budget(ours: Tensor, eager: Tensor, exact: Tensor) -> dict[str, tuple[float, float]]:
    """{"max": (error, budget), "rms": (error, budget)}; ``eager`` is in the dtype whose eps
    counts."""
    eps = torch.finfo(eager.dtype).eps
    exact = exact.double()
    sizes: dict[str, Callable[[Tensor], float]] = {
        "max": lambda t: t.abs().max().item() if t.numel() else 0.0,
        "rms": lambda t: t.square().mean().sqrt().item() if t.numel() else 0.0,
    }
    ours_error, eager_error = ours.double() - exact, eager.double() - exact
    return {
        name: (size(ours_error), 2 * (size(eager_error) + eps * size(exact)))
        for name, size in sizes.items()
    }


def assert_within_budget(
    name: str, ours: Tensor, eager: Tensor, exact: Tensor, budgets: int = 1
) -> None:
    """Fail unless ``ours`` has the shape of ``exact``, holds no NaN where it holds none, and keeps
    the budget, or as many of them."""
    assert ours.shape == exact.shape, (
        f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    )
    for metric, (error, budget) in error_and_budget(ours, eager, exact).items():
        # Written so that a NaN error fails.
        assert error <= budgets * budget, (
            f"{name}: {metric} error {error:.3e} over the budget of {budgets * budget:.3e}"
        )


@dataclass(frozen=True)
class Case:
    """One problem with its inputs' formats; :meth:`draw` makes the tensors."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype | None = None
    bias: bool = True
    dropout_p: float = 0.0
    fan_in_fan_out: bool = False
    layout: str = "contiguous"
    zero_weight: bool = False
    out_scale: bool = False
    # the weight is four-bit: its type, its block, and whether absmax is quantised too
    quant: tuple[str, int, bool] | None = None
    scale: float = 0.75
    device: str = "cpu"
    seed: int = 0

    def __str__(self) -> str:
        parts = [
            f"{self.m}x{self.k}x{self.n}",
            f"r{self.r}",
            str(self.dtype).removeprefix("torch."),
        ]
        if self.adapter_dtype not in (None, self.dtype):
            parts.append(f"adapter-{self.adapter_dtype}".replace("torch.", ""))
        parts += [f"p{self.dropout_p}"] * (self.dropout_p > 0) + ["KN"] * self.fan_in_fan_out
        parts += [self.layout] * (self.layout != "contiguous") + ["W0"] * self.zero_weight
        parts += ["out_scale"] * self.out_scale + ["nobias"] * (not self.bias)
        if self.quant is not None:
            kind, block, double = self.quant
            parts.append(f"{kind}-{block}" + "-double" * double)
        return "-".join(parts)

    def draw(self) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64, device=self.device)

        adapter_dtype = self.adapter_dtype or self.dtype
        # rms(x W^T) = rms(scale/(1-p) (mask*x) A^T B^T) = 1 in expectation; dY W against D A
        # likewise.
        weight = normal(self.n, self.k) / self.k**0.5 * (not self.zero_weight)
        amplify = (1 - self.dropout_p) ** 0.5 / (self.scale * self.r**0.5)
        layout = LAYOUTS[self.layout]
        rng = None
        if self.dropout_p:
            # Not the origin, and a seed that fills both
            # key words.
            rng = torch.tensor([-(2**61) - self.seed, 2**33 + 5, 3, 24], device=self.device)
        stored, packed = weight.t() if self.fan_in_fan_out else weight, None
        if self.quant is not None:
            stored, packed = quantized(stored, self.quant)
        return Inputs(
            case=self,
            x=layout(normal(self.m, self.k).to(self.dtype)),
            dy=layout(normal(self.m, self.n).to(self.dtype)),
            weight=layout(stored.to(self.dtype)) if packed is None else stored,
            lora_a=layout((normal(self.r, self.k) / self.k**0.5).to(adapter_dtype)),
            lora_b=layout((normal(self.n, self.r) * amplify).to(adapter_dtype)),
            scale=torch.tensor(self.scale, dtype=_scale_dtype(self.dtype), device=self.device),
            bias=normal(self.n).to(self.dtype) if self.bias else None,
            rng=rng,
            out_scale=(1 + 0.5 * normal(self.n)).to(self.dtype) if self.out_scale else None,
            packed=packed,
        )


def quantized(weight: Tensor, quant: tuple[str, int, bool]) -> tuple[Tensor, Arguments]:
    """``weight`` as its bytes say it, exact in float64, and the arguments that say it."""
    kind, block, double = quant
    data, state = four_bit.quantize(weight.float(), kind, block=block, double_quant=double)
    exact = four_bit.dequantize(data, state, torch.float64)
    return exact, {"weight": data, "quant": state.tensors(), "quant_block": block}


@dataclass(frozen=True)
class Inputs:
    case: Case
    x: Tensor
    dy: Tensor
    # of a four-bit one the values, in float64
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scale: Tensor
    bias: Tensor | None
    rng: Tensor | None
    out_scale: Tensor | None
    # of a four-bit weight the arguments in the place of ``weight``
    packed: Arguments | None = None

    def mask(self) -> Tensor | None:
        if self.rng is None:
            return None
        return reference.dropout_mask(self.rng, self.case.m, self.case.k, self.case.dropout_p)

    def arguments(self, op: str) -> Arguments:
        """The keyword arguments of ``op``; S and D, where it wants them, as the forward and dX
        would hand them over."""
        case = self.case
        common: Arguments = {"rng": self.rng, "dropout_p": case.dropout_p}
        linear = (
            common
            | {
                "weight": self.weight,
                "lora_a": self.lora_a,
                "lora_b": self.lora_b,
                "scale": self.scale,
                "fan_in_fan_out": case.fan_in_fan_out,
                "out_scale": self.out_scale,
            }
            | (self.packed or {})
        )
        if op == "lora_shrink":
            return common | {"x": self.x, "lora_a": self.lora_a, "scale": self.scale}
        if op == "lora_linear_fwd":
            return linear | {"x": self.x, "bias": self.bias}
        if op == "lora_linear_dx":
            return linear | {"dy": self.dy}
        scaled = reference.scaled_rows(self.dy, self.out_scale)
        return common | {
            "dy": self.dy,
            "x": self.x,
            "s": reference.lora_shrink(self.x, self.lora_a, self.scale, self.rng, case.dropout_p),
            "d": reference.lora_shrink(scaled, self.lora_b.t(), self.scale, None, case.dropout_p),
            "da_dtype": self.lora_a.dtype,
            "db_dtype": self.lora_b.dtype,
            "dbias_dtype": case.dtype if self.bias is not None else None,
            "out_scale": self.out_scale,
        }


def naive(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    """Y, S, D and every gradient by the formula as people write it, in ``dtype``, gradients by
    autograd.

    In the compute dtype it is the eager baseline of the budget, in float64 the exact value. It
    shares no line with ``reference.py`` but the mask, which the tests check against Philox written
    out in Python.
    """
    case = inputs.case

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype).clone().requires_grad_()

    x, a, b = leaf(inputs.x), leaf(inputs.lora_a), leaf(inputs.lora_b)
    weight = inputs.weight.to(dtype)
    weight = weight.t() if case.fan_in_fan_out else weight
    mask = inputs.mask()
    scale = inputs.scale.item() / (1 - case.dropout_p)
    out_scale = None if inputs.out_scale is None else inputs.out_scale.to(dtype)
    dropped = x if mask is None else x.where(mask, 0)
    s = scale * (dropped @ a.t())
    y = x @ weight.t() + s @ b.t()
    if out_scale is not None:
        y = y * out_scale
    bias = None if inputs.bias is None else leaf(inputs.bias)
    if bias is not None:
        y = y + bias
    dy = inputs.dy.to(dtype)
    leaves = [x, a, b] + ([] if bias is None else [bias])
    dx, da, db, *dbias = torch.autograd.grad(y, leaves, dy)
    d = scale * ((dy if out_scale is None else dy * out_scale) @ b)
    results = {"y": y, "s": s, "d": d, "dx": dx, "da": da, "db": db}
    if dbias:
        results["dbias"] = dbias[0]
    return {name: tensor.detach() for name, tensor in results.items()}


# What each operator returns, in the names of naive().
RESULTS = {
    "lora_shrink": ("s",),
    "lora_linear_fwd": ("y", "s"),
    "lora_linear_dx": ("dx", "d"),
    "lora_linear_dab": ("da", "db", "dbias"),
}


def check(op: str, run: Callable[..., Any], case: Case, *, backend: str | None = None) -> None:
    """Run ``run(**arguments)`` as ``op`` on ``case`` in poisoned memory and hold every result to
    the budget.

    ``backend`` names who must have answered ("cpu", "cuda", "reference"); a call that another one
    answered fails.
    """
    inputs = case.draw()
    arguments = inputs.arguments(op)
    exact, eager = naive(inputs, torch.float64), naive(inputs, case.dtype)
    if op == "lora_linear_dab":
        # dA and dB are judged on the S and D they were given, whose own rounding was judged where
        # they were made.
        exact |= _dab_of_given(arguments, torch.float64)
        eager |= _dab_of_given(arguments, case.dtype)
    with poisoned_memory(), record_plans() as answers:
        results = run(**arguments)
    if backend is not None:
        assert [(a.op, a.backend) for a in answers] == [(op, backend)], f"answered by {answers}"
    results = results if isinstance(results, (tuple, list)) else (results,)
    for name, result in zip(RESULTS[op], results, strict=True):
        if name in exact:
            assert_within_budget(f"{op} {case} {name}", result, eager[name], exact[name])


def _dab_of_given(arguments: Arguments, dtype: torch.dtype) -> dict[str, Tensor]:
    dy, x, s, d = (arguments[name].to(dtype) for name in ("dy", "x", "s", "d"))
    if arguments["rng"] is not None:
        x = x.where(_mask(arguments, x), 0)
    if arguments["out_scale"] is not None:
        dy = dy * arguments["out_scale"].to(dtype)
    return {"da": d.t() @ x, "db": dy.t() @ s}


def _mask(arguments: Arguments, x: Tensor) -> Tensor:
    rows, cols = x.shape
    return reference.dropout_mask(arguments["rng"], rows, cols, arguments["dropout_p"])


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside the block ``torch.empty`` hands out NaN, so that an unwritten element shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Any: the switch is made at run time and unknown to a type checker.
    switch: Any = torch.utils.deterministic
    fill = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        switch.fill_uninitialized_memory = fill


def _inside_nan(tensor: Tensor, stride: int = 1, offset: int = 0) -> Tensor:
    """The same values as a window into a larger buffer of NaN."""
    rows, cols = tensor.shape
    buffer = tensor.new_full((rows + 2, cols * stride + offset + 3), float("nan"))
    window = buffer[1 : rows + 1, offset : offset + cols * stride : stride]
    return window.copy_(tensor)


# How a matrix may lie in memory: name -> the same values in that layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "sliced": lambda t: _inside_nan(t, offset=1),
    "strided": lambda t: _inside_nan(t, stride=2, offset=1),
    "expanded": lambda t: t[:1].expand_as(t),
}


# What a broken kernel would do: operator -> name -> the arguments and the function that a mutant
# runs with.
Mutation = Callable[[Callable[..., Any], Arguments], Any]


def _with(**changes: Any) -> Mutation:
    def mutation(run: Callable[..., Any], arguments: Arguments) -> Any:
        changed = {k: (v(arguments[k]) if callable(v) else v) for k, v in changes.items()}
        return run(**(arguments | changed))

    return mutation


def _wrong_last_row(run: Callable[..., Any], arguments: Arguments) -> Any:
    first, *rest = run(**arguments)
    first[-1] = first[0]
    return first, *rest


def _forward_mask_position(run: Callable[..., Any], arguments: Arguments) -> Any:
    """dX with the mask on the operand that makes D instead of on the tail's product (N = K
    only)."""
    if arguments["rng"] is None:
        return run(**arguments)
    base, d = run(**(arguments | {"lora_a": torch.zeros_like(arguments["lora_a"])}))
    dropped = reference.masked(arguments["dy"], arguments["rng"], arguments["dropout_p"])
    zeros = torch.zeros_like(arguments["weight"])
    tail, _ = run(**(arguments | {"dy": dropped, "weight": zeros, "rng": None}))
    return base + tail, d


def _forget_last_row(run: Callable[..., Any], arguments: Arguments) -> Any:
    rows = {name: arguments[name][:-1] for name in ("dy", "x", "s", "d")}
    return run(**(arguments | rows))


def _shift_offset(rng: Tensor | None) -> Tensor | None:
    return None if rng is None else rng + torch.tensor([0, 1, 0, 0], device=rng.device)


_LINEAR_MUTATIONS: dict[str, Mutation] = {
    "no scale": _with(scale=torch.ones_like),
    "no mask": _with(rng=None),
    "no 1/(1-p)": _with(dropout_p=lambda p: p / 2),
    "another offset": _with(rng=_shift_offset),
    "wrong last row": _wrong_last_row,
    "transposed weight": _with(fan_in_fan_out=lambda flag: not flag),
}

MUTATIONS: dict[str, dict[str, Mutation]] = {
    "lora_linear_fwd": _LINEAR_MUTATIONS
    | {
        "no tail": lambda run, a: (
            run(**(a | {"lora_b": torch.zeros_like(a["lora_b"])}))[0],
            run(**a)[1],
        ),
        "no bias": _with(bias=None),
    },
    "lora_linear_dx": _LINEAR_MUTATIONS
    | {
        "no tail": _with(lora_a=torch.zeros_like),
        "the forward's mask position": _forward_mask_position,
    },
    "lora_linear_dab": {
        "no mask": _with(rng=None),
        "another offset": _with(rng=_shift_offset),
        "forgotten last row": _forget_last_row,
    },
    "lora_shrink": {
        "no scale": _with(scale=torch.ones_like),
        "no mask": _with(rng=None),
        "another offset": _with(rng=_shift_offset),
    },
}


def mutation_case(dtype: torch.dtype, device: str = "cpu") -> Case:
    """A square problem with dropout, on which every mutation must turn :func:`check` red."""
    return Case(70, 48, 48, 20, dtype=dtype, dropout_p=0.25, device=device)


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
