"""What ``bench.gpu`` runs, as data, and on what.

All is listed in an order that every process finds again: the compiling processes deal it out among
them, and the measuring ones find their binaries in Triton's cache.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels.backends import cuda, tune
from lora_kernels.backends.tune import CapturedCall
from lora_kernels.planning import plan
from lora_kernels.planning.config import DECODE_OPS, MIXED_LINEAR_OPS, PLANS, Config
from lora_kernels.planning.device import DeviceFacts, facts
from lora_kernels.planning.validity import candidates
from lora_kernels.spec.operators import EXPERT_OPERATORS
from lora_kernels.spec.problem import PROBLEM_OF, Problem, is_aligned
from lora_kernels.testing.experts import ExpertCase
from lora_kernels.testing.linear import Case
from lora_kernels.testing.segmented import SegmentedCase

from .gpu import ROWS
from .measure import CpuClock, CudaClock

LINEAR_OPS = ("lora_linear_fwd", "lora_linear_dx")
SKINNY_OPS = ("lora_shrink", "lora_linear_dab")
SEGMENTED = ("segmented_lora", "segmented_lora_", "segmented_lora_dx", "segmented_lora_dab")

# Of each family the operators and plans.
OF_FAMILY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "vendor": ((*LINEAR_OPS, *SKINNY_OPS), ("vendor",)),
    "skinny": (SKINNY_OPS, ("skinny",)),
    "grouped": (SEGMENTED, ("grouped",)),
    "decode": (DECODE_OPS, ("decode",)),
    "mixed": (MIXED_LINEAR_OPS, ("tail", "preload", "vendor")),
    "four_bit": (LINEAR_OPS, ("vendor", "preload", "tail", "in_loop")),
    "experts": (EXPERT_OPERATORS, ("tail", "skinny", "vendor")),
} | {
    name: (LINEAR_OPS, (name,)) for name in ("preload", "tail", "in_loop", "persistent", "producer")
}

# In a rehearsal: what a plan may ask of the device, and sizes that the interpreter is done with.
_STAND_IN = DeviceFacts(
    "cuda", "a stand-in", "sm_90", 4, 232448, 2**20, 2**30, half_flops=1e12, bandwidth=1e11
)
# A candidate whose estimate is so many times the shortest is not worth measuring (a guess).
_HOPELESS = 1.6


class Machine:
    """The GPU; in a rehearsal this CPU, whose graphs are calls."""

    def __init__(self, out: Path, rehearse: bool, skip: list[str]) -> None:
        self.out, self.rehearse, self.skip = out, rehearse, skip
        self.device = "cpu" if rehearse else "cuda"
        # The interpreter multiplies bfloat16 by its raw bits, and float16 is not preload's.
        self.dtype = torch.float32 if rehearse else torch.bfloat16

    @functools.cached_property
    def known(self) -> DeviceFacts:
        return _STAND_IN if self.rehearse else facts("cuda")

    @functools.cached_property
    def clock(self) -> CpuClock | CudaClock:
        return CpuClock() if self.rehearse else CudaClock()

    def captured(self, step: Callable[[], Any]) -> Callable[[], Any]:
        return step if self.rehearse else CapturedCall(step)

    def synchronize(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def note(self, kind: str, **found: Any) -> None:
        """One line of the results, on the disk before anything else happens."""
        with (self.out / ROWS).open("a") as file:
            file.write(json.dumps({"kind": kind} | found) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def admits(self, config: Config) -> bool:
        return config.plan not in (*self.skip, "reference", "native")

    def planned(self, problem: Problem) -> Problem:
        """What the planner is asked; in a rehearsal as on a GPU, which computes in bfloat16."""
        if not self.rehearse:
            return problem
        return problem._replace(dtype="bfloat16", adapter_dtype="bfloat16")

    def candidates(self, problem: Problem, names: Sequence[str] = PLANS) -> list[Config]:
        """Of the plans of these ``names``; in a rehearsal one of each, the last and smallest."""
        every = candidates(self.planned(problem), self.known)
        found = [c for c in every if c.plan in names and self.admits(c)]
        return [*{c.plan: c for c in found}.values()] if self.rehearse else found


class Work(NamedTuple):
    """One operator at one size; ``n`` are the widths of the slices where ``slots`` mix. Of
    ``experts`` each has the same rows but for one more of some."""

    op: str
    m: int
    k: int
    n: tuple[int, ...]
    r: int = 16
    p: float = 0.0
    slots: int = 0
    four_bit: bool = False
    experts: int = 0

    def __str__(self) -> str:
        size = f"{self.op} {self.m}x{self.k}x{'+'.join(map(str, self.n))} r{self.r}"
        size += f" p{self.p:g}" * (self.p > 0) + f" a{self.slots}" * (self.slots > 0)
        size += " 4-bit" * self.four_bit
        return size + f" e{self.experts}" * (self.experts > 0)

    def arguments(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        common: dict[str, Any] = {
            "dtype": dtype,
            "adapter_dtype": dtype,
            "dropout_p": self.p,
            "fan_in_fan_out": False,
            "four_bit": self.four_bit,
            "device": torch.device(device),
        }
        sizes = (self.op, self.m, self.k)
        if self.experts:
            return self._of_experts(dtype, device)
        if self.slots:
            return tune.mixed_arguments_for(*sizes, self.n, self.r, slots=self.slots, **common)
        return tune.arguments_for(*sizes, self.n[0], self.r, **common)

    def _of_experts(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        m, k, (n,), r, experts = self.m, self.k, self.n, self.r, self.experts

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, dtype=dtype, device=device)

        ends = [(e + 1) * m // experts for e in range(experts)]
        offs = torch.tensor(ends, dtype=torch.int32, device=device)
        if self.op == "expert_linear_dab":
            rows = {"dy": normal(m, n), "x": normal(m, k), "s": normal(m, r), "d": normal(m, r)}
            return rows | {"offs": offs, "da_dtype": dtype, "db_dtype": dtype}
        rows = {"dy": normal(m, n)} if self.op == "expert_linear_dx" else {"x": normal(m, k)}
        adapter = {"lora_a": normal(experts, r, k), "lora_b": normal(experts, n, r)}
        scale = torch.ones((), device=device)
        return rows | adapter | {"weight": normal(experts, n, k), "scale": scale, "offs": offs}


class Layer(NamedTuple):
    """A step of whole layers at one size."""

    mode: str
    m: int
    k: int
    n: int
    p: float = 0.0


class Far(NamedTuple):
    """x of more than 2^31 elements."""

    plan: str


Row = Work | Layer | Far
AnyCase = Case | SegmentedCase | ExpertCase


def rows(rehearse: bool) -> list[Row]:
    """In order of worth."""
    if rehearse:
        shape = (40, 136, 72)
        found = _of_layer(*shape, 0.0)[1:] + _of_layer(*shape, 0.1)[:1]
        mixed = Work("segmented_linear_fwd", 40, 136, (48, 24), 16, 0.0, 3)
        four_bit = Work("lora_linear_fwd", *shape[:2], (shape[2],), four_bit=True)
        experts = Work("expert_linear_fwd", 40, 72, (48,), 16, experts=3)
        return [*found, mixed, four_bit, experts, Far("vendor"), Far("preload")]
    sizes = [(m, 4096, 4096) for m in (8192, 4096, 2048, 16384)]
    wide = [(8192, 8192, 8192), (8192, 4096, 14336), (8192, 14336, 4096)]
    plain = [row for shape in (*sizes, *wide) for row in _of_layer(*shape, 0.0)]
    masked = [row for shape in sizes for row in _of_layer(*shape, 0.1)]
    decode: list[Row] = []
    for m in (1, 16, 64):
        decode += [Work("lora_linear_fwd", m, 4096, (4096,)), Layer("forward", m, 4096, 4096)]
    decoder = ((4096, (8192, 1024, 1024)), (4096, (12288, 12288)), (12288, (4096,)))
    mixed_rows = [
        Work(op, m, k, widths, 32, 0.0, min(8, m))
        for k, widths in decoder
        for m in (32, 8, 128, 4096)
        for op in ("segmented_lora_", "segmented_linear_fwd")
    ]
    four_bits = [
        Work("lora_linear_fwd", m, 4096, (4096,), four_bit=True) for m in (1, 16, 64, 256, 4096)
    ]
    four_bits.append(Work("lora_linear_dx", 4096, 4096, (4096,), four_bit=True))
    four_bits.append(Work("segmented_linear_fwd", 32, 4096, (12288, 12288), 32, 0.0, 8, True))
    # Qwen3-30B-A3B's gate_up_proj: 2048 tokens of a step, and 16 sequences that decode; top 8.
    of_experts = [
        Work(f"expert_linear_{op}", m, 2048, (1536,), 16, experts=128)
        for m in (16384, 128)
        for op in ("fwd", "dx", "dab")[: 3 if m > 128 else 1]
    ]
    rest: list[Row] = [*four_bits, *of_experts, *mixed_rows, *masked[5:]]
    far = [Far(name) for name in ("preload", "vendor", "tail", "in_loop", "persistent", "producer")]
    return [*plain, *masked[:5], *decode, *rest, *far]


def _of_layer(m: int, k: int, n: int, p: float) -> list[Row]:
    ops = ("lora_linear_fwd", "lora_linear_dx", "lora_linear_dab")
    steps = [Layer(mode, m, k, n, p) for mode in ("forward", "training")]
    return [*(Work(op, m, k, (n,), 16, p) for op in ops), *steps]


def works_of(what: str, rehearse: bool) -> list[Work]:
    """The operators that a command times."""
    if what == "run":
        return [row for row in rows(rehearse) if isinstance(row, Work)]
    shape = (40, 136, 72) if rehearse else (8192, 4096, 4096)
    return [Work(op, shape[0], shape[1], (shape[2],)) for op in LINEAR_OPS]


def configs(machine: Machine, problem: Problem, *, most: float = _HOPELESS) -> list[Config]:
    """The candidates of a row that are not hopeless, nor pointers where there are descriptors."""
    found = machine.candidates(problem)
    described = {replace(c, descriptors=False) for c in found if c.descriptors}
    found = [c for c in found if c.descriptors or c not in described]
    if problem.slots and problem.op not in MIXED_LINEAR_OPS:
        # No estimate tells them apart.
        return found
    estimates = {c: plan.estimate_us(c, problem, machine.known) for c in found}
    return [c for c in found if estimates[c] <= most * min(estimates.values())]


def checks_of(machine: Machine, family: str) -> Iterator[tuple[str, AnyCase, Config]]:
    """The calls of a family that are held against float64: odd sizes, two tiles and remainders, few
    rows; both half types, float32, dropout."""
    ops, plans = OF_FAMILY[family]
    half, device = machine.dtype, machine.device
    every: AnyCase
    cases: list[AnyCase]
    if ops[0].startswith("segmented"):
        wide, few = (530, 64, 200), (1024, 256)
        ranks = (33, 0, 1, 8, 64, 16)
        one = SegmentedCase(150, 520, wide, ranks, half, device=device)
        two = SegmentedCase(5, 512, few, (16, 16, 8), half, device=device)
        if machine.rehearse:
            one, two = replace(one, m=40, k=72, widths=(40, 24)), replace(two, k=64, widths=(48,))
        every, cases = one, [one, two]
        if not machine.rehearse:
            cases += [replace(two, m=70, dtype=dtype) for dtype in (torch.float16, torch.float32)]
        if family in ("grouped", "mixed"):
            cases.append(replace(two, m=70, dropout_p=0.1))
        if family == "mixed":
            cases.append(replace(two, m=70, quant=("nf4", 64, True)))
    elif family == "experts":
        many = ExpertCase((3, 290, 0, 64), 530, 200, 40, 5, half, bias=True, device=device)
        even_ = ExpertCase((70, 0, 130), 1024, 640, 16, 0, half, device=device)
        if machine.rehearse:
            many, even_ = replace(many, n=69, k=43), replace(even_, n=72, k=136)
        every, cases = even_, [many, even_]
        if not machine.rehearse:
            cases += [replace(even_, dtype=dtype) for dtype in (torch.float16, torch.float32)]
    else:
        odd = Case(300, 530, 200, 40, half, device=device)
        even = Case(512, 1024, 640, 16, half, device=device)
        if machine.rehearse:
            odd, even = replace(odd, m=40, n=69, k=43), replace(even, m=40, n=72, k=136)
        if family == "four_bit":
            # Rows of whole units, and such as begin within a byte.
            odd = replace(odd, k=odd.k | 1, quant=("nf4", 64, True))
            even = replace(even, k=even.k // 32 * 32, quant=("fp4", 128, False))
        if family == "persistent":
            # Rows of whole 16 bytes, and a tail of two steps.
            odd = replace(odd, n=odd.n // 8 * 8, k=odd.k // 8 * 8, r=72)
        every, cases = even, [odd, even, replace(even, m=5)]
        if not machine.rehearse:
            cases += [replace(even, dtype=dtype) for dtype in (torch.float16, torch.float32)]
        if family != "in_loop":
            cases += [replace(even, dropout_p=0.1), replace(odd, dropout_p=0.1)]
    for case in cases:
        for op in ops:
            dropout_p = 0.0 if isinstance(case, ExpertCase) else case.dropout_p
            if dropout_p and op in DECODE_OPS:
                continue
            problem = problem_of(op, drawn(case).arguments(op))
            if dropout_p and not problem.dropout:
                continue
            found = machine.candidates(problem, plans)
            # All tiles once; of the other formats and sizes the largest and the smallest.
            for config in found if case == every else dict.fromkeys([*found[:1], *found[-1:]]):
                yield op, case, config


@functools.lru_cache(maxsize=4)
def drawn(case: AnyCase) -> Any:
    return case.draw()


def problem_of(op: str, arguments: dict[str, Any]) -> Problem:
    """As on a GPU: elsewhere the alignment of operands is not asked."""
    return PROBLEM_OF[op](**arguments)._replace(aligned=is_aligned(arguments))


def operator(machine: Machine, op: str, config: Config) -> Callable[..., Any]:
    def run(**arguments: Any) -> Any:
        problem = machine.planned(problem_of(op, arguments))
        with torch.no_grad():
            return cuda.run(op, config, problem, machine.known, **arguments)

    return run


@contextlib.contextmanager
def compiling(arch: str) -> Iterator[dict[str, int]]:
    """Inside the block Triton's launches compile for ``arch`` and do no more, whatever device there
    is or is not. Counts what its cache had and had not."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class NoDevice:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)

    run = jit.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    before = driver._active
    with counting() as counts:
        driver.set_active(NoDevice())
        jit.JITFunction.run = compile_only
        try:
            yield counts
        finally:
            jit.JITFunction.run = run
            driver._active = before


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """What Triton's cache has, and has not."""
    from triton import knobs

    counts = {"hits": 0, "misses": 0}

    def listener(*, cache_hit: bool, **_: Any) -> None:
        counts["hits" if cache_hit else "misses"] += 1

    knobs.compilation.listener = listener
    try:
        yield counts
    finally:
        knobs.compilation.listener = None


def label_of(config: Config) -> str:
    """The plan first, then what tells it from its siblings."""
    tile = "x".join(str(s) for s in (config.block_m, config.block_n, config.block_k) if s)
    parts = [
        "decoding_" * config.decodes + config.plan,
        tile,
        f"w{config.num_warps}s{config.num_stages}" * (config.block_m > 0),
    ]
    parts += [f"r{config.block_r}"] * (config.block_r > 0) + [f"c{config.chunk}"] * (
        config.chunk > 0
    )
    parts += [f"split{config.split_k}"] * (config.split_k > 1) + ["td"] * config.descriptors
    return " ".join(filter(None, parts))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
