"""What is measured, as plain data: shapes, dtypes, modes, and the work no step can avoid."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

MODES = {"forward": "forward", "training": "forward + backward"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SHORT = {name: short for short, name in DTYPES.items()}
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
# LoRAFusion's setting (EuroSys'26): in = out, and the tokens of one micro-batch.
GPU_SHAPES: tuple[Shape, ...] = tuple(
    (m, size, size) for size in (4096, 5120, 8192) for m in (2048, 4096, 8192)
)


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

    def work(self) -> dict[str, int]:
        """The FLOP of the step, and its bytes: every operand and result once per direction.

        Counted for the mathematics and not for an implementation, so two variants of one step
        compare by time alone.
        """
        m, k, n, r = self.m, self.k, self.n, self.r
        base, tail = 2 * m * k * n, 2 * m * r * (k + n)
        passed, adapter = m * k + k * n + m * n, r * (k + n)
        flop, elements = base + tail, passed + adapter
        if self.mode == "training":
            # D, its product with A, dA and dB; A and B are read, dA and dB written, x read again
            # for dA.
            flop += base + 2 * tail
            elements += passed + 2 * adapter + m * k
        return {"flop": flop, "bytes": elements * _ITEM_BYTES[self.dtype]}


def settings(
    device: str,
    *,
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    dropouts: Sequence[float] | None = None,
    modes: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Setting]:
    """The rows to measure: what was asked for, the device's defaults for the rest."""
    if device == "cuda":
        usual = [*GPU_SHAPES[:1]] if quick else [*GPU_SHAPES]
        usual_dtypes, usual_ranks, usual_dropouts = ["bfloat16"], [16], [0.0, 0.1]
    else:
        usual = [(1, 512, 512), (64, 512, 512)] if quick else [*CPU_SHAPES]
        usual_dtypes, usual_ranks, usual_dropouts = ["float32", "bfloat16"], [*CPU_RANKS], [0.0]
        usual_ranks = [8, 64] if quick else usual_ranks
    modes, dtypes = modes or [*MODES], dtypes or usual_dtypes
    groups = [(modes, dropouts or usual_dropouts, shapes or usual, ranks or usual_ranks)]
    if device == "cpu" and not (shapes or ranks or dropouts) and "training" in modes:
        # A CPU trains with dropout besides.
        groups.append((["training"], [0.1], [(512, 2048, 2048) if not quick else usual[1]], [16]))
    # Rows that the report shows together, one after the other: a run that is cut short has whole
    # groups.
    return [
        Setting(m, k, n, r, 16, p, dtype, mode)
        for dtype in dtypes
        for group in groups
        for mode, p, (m, k, n), r in itertools.product(*group)
    ]
