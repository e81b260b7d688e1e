"""What is measured, as plain data: shapes, dtypes, modes, and the work no step can avoid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

MODES = {"forward": "forward", "training": "forward + backward"}

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SHORT = {name: short for short, name in _DTYPES.items()}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Shape = tuple[int, int, int]

# The cells that report.TARGETS are set for on a CPU, as (M, K, N): from a token over a batch of
# decoding to the tokens of a training step; a weight that a large last cache holds and two that it
# does not.
CPU_SHAPES: tuple[Shape, ...] = tuple(
    (m, k, n)
    for k, n in ((2048, 2048), (4096, 4096), (2048, 8192))
    for m in (1, 16, 128, 512, 2048)
)
CPU_RANKS = (8, 16, 64)
# Where a CPU trains with dropout besides: (shapes, ranks, probabilities).
_CPU_DROPOUT = (((512, 2048, 2048),), (16,), (0.1,))
_QUICK_CPU_DROPOUT = (((64, 512, 512),), (8,), (0.1,))
# LoRAFusion's setting (EuroSys'26): in = out, and the tokens of one micro-batch.
GPU_SHAPES: tuple[Shape, ...] = tuple(
    (m, size, size) for size in (4096, 5120, 8192) for m in (2048, 4096, 8192)
)
QUICK_SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((1, 512, 512), (64, 512, 512)),
    "cuda": ((2048, 4096, 4096),),
}


@dataclass(frozen=True)
class Setting:
    """One row of the report: a linear layer [N, K], its adapter of rank r, and M tokens.

    ``mode`` is "forward" (no gradient is recorded; dropout is active where p > 0) or "training"
    (forward, then the gradients of x, A and B; W is frozen).
    """

    m: int
    k: int
    n: int
    r: int
    alpha: int
    p: float
    dtype: str
    mode: str

    def __str__(self) -> str:
        return f"{self.shape}-r{self.r}-p{self.p:g}-{self.short_dtype}-{self.mode}"

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"

    @property
    def short_dtype(self) -> str:
        return _SHORT[self.dtype]

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def work(self, adapter: bool) -> dict[str, int]:
        """The FLOP of the step, and its bytes: every operand and result once per direction.

        Counted for the mathematics and not for an implementation, so two variants of one step
        compare by time alone. Without ``adapter``: the same step of the plain frozen linear.
        """
        m, k, n, r = self.m, self.k, self.n, self.r
        flop = 2 * m * k * n
        elements = m * k + k * n + m * n
        if adapter:
            flop += 2 * m * r * (k + n)
            elements += r * (k + n)
        if self.mode == "training":
            flop += 2 * m * k * n
            elements += m * n + k * n + m * k
            if adapter:
                # D, its product with A, dA and dB; A and B are read, dA and dB written, x read
                # again for dA.
                flop += 4 * m * r * (k + n)
                elements += 2 * r * (k + n) + m * k
        return {"flop": flop, "bytes": elements * _ITEM_BYTES[self.dtype]}


def parse_shapes(text: str) -> list[Shape]:
    """ "512x4096x4096,1x64x64" as (M, K, N) each."""
    shapes: list[Shape] = []
    for part in text.split(","):
        numbers = part.strip().lower().split("x")
        if len(numbers) != 3 or not all(number.isdecimal() and int(number) for number in numbers):
            raise ValueError(f"{part!r} is no shape: it takes MxKxN, as in 512x4096x4096")
        m, k, n = map(int, numbers)
        shapes.append((m, k, n))
    return shapes


def parse_dtypes(text: str) -> list[str]:
    return [_one_of(part, _DTYPES, "dtype") for part in text.split(",")]


def parse_modes(text: str) -> list[str]:
    return [_one_of(part, {mode: mode for mode in MODES}, "mode") for part in text.split(",")]


def parse_ranks(text: str) -> list[int]:
    for part in text.split(","):
        if not part.strip().isdecimal() or not int(part):
            raise ValueError(f"{part!r} is no rank: it takes whole numbers from 1, as in 8,16")
    return [int(part) for part in text.split(",")]


def parse_dropouts(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [1.0]
    if not all(0.0 <= value < 1.0 for value in values):
        raise ValueError(f"{text!r} are no dropout probabilities: they lie in [0, 1), as in 0,0.1")
    return values


def _one_of(part: str, known: dict[str, str], what: str) -> str:
    part = part.strip().lower()
    if part in known.values():
        return part
    if part not in known:
        raise ValueError(f"{part!r} is no {what}; there are {', '.join(known)}")
    return known[part]


def settings(
    device: str,
    *,
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    dropouts: Sequence[float] | None = None,
    modes: Sequence[str] | None = None,
    alpha: int = 16,
    quick: bool = False,
) -> list[Setting]:
    """The rows to measure: what was asked for, the device's defaults for the rest."""
    gpu = device == "cuda"
    default_shapes = QUICK_SHAPES[device] if quick else GPU_SHAPES if gpu else CPU_SHAPES
    default_dropouts = [0.1] if gpu and quick else [0.1, 0.0] if gpu else [0.0]
    modes, p_values = modes or tuple(MODES), dropouts or default_dropouts
    if gpu:
        default_ranks: Sequence[int] = (16,)
    else:
        default_ranks = (8, 64) if quick else CPU_RANKS
    groups = [(shapes or default_shapes, ranks or default_ranks, p_values, modes)]
    if not gpu and not (shapes or ranks or dropouts) and "training" in modes:
        groups.append((*(_QUICK_CPU_DROPOUT if quick else _CPU_DROPOUT), ("training",)))
    dtypes = dtypes or (["bfloat16"] if gpu else ["float32", "bfloat16"])
    found: dict[Setting, None] = {}
    for group in groups:
        for dtype, (m, k, n), r, p, mode in itertools.product(dtypes, *group):
            found[Setting(m, k, n, r, alpha, p, dtype, mode)] = None
    # Rows that the report shows together, one after the other: a run that is cut short has whole
    # groups.
    order = {mode: place for place, mode in enumerate(MODES)}
    return sorted(found, key=lambda s: (dtypes.index(s.dtype), -s.p if gpu else s.p, order[s.mode]))
