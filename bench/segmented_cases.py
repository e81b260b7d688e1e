"""The batches that mix adapters: layers and populations as plain data, and the tensors drawn.

Where they come from: T2 is SGLang's table of decode shapes, T3 vLLM's sweep, T4 punica's
populations (Chen et al., arXiv:2310.18547).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import lora_kernels as lk

# Row i uses adapter i mod S, or adapters of so many rows each as punica gives them.
POPULATIONS = ("modulo", "identical", "distinct", "uniform", "zipf")
_ZIPF = 1.5

# The cells that the CPU's criteria are set for, as (M, K, N), with 8 adapters of rank 16.
DECODE = (32, 2048, 2048)
PREFILL = (512, 2048, 2048)
ADAPTERS, RANK = 8, 16


@dataclass(frozen=True)
class MixedSetting:
    """One row of the report: M rows through one linear [sum of widths, K], each with its own of
    ``adapters`` adapters of rank r, one slice of them for each width."""

    group: str
    layer: str
    m: int
    k: int
    widths: tuple[int, ...]
    r: int
    population: str
    adapters: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        parts = [self.layer, self.shape, f"r{self.r}", self.population, f"a{self.adapters}"]
        return "-".join([*filter(None, parts), self.dtype])

    @property
    def n(self) -> int:
        return sum(self.widths)

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.k}x{'+'.join(map(str, self.widths))}"

    @property
    def gathered_bytes(self) -> int:
        """What gathering A and B of every row in float32 amounts to."""
        return 4 * self.m * self.r * (len(self.widths) * self.k + self.n)


def setting_of(row: dict[str, Any]) -> MixedSetting:
    """The setting of a row that may come from a JSON file."""
    found = MixedSetting(**row["setting"])
    return replace(found, widths=tuple(found.widths))


def mixed(
    group: str, shape: tuple[int, int, int], *, r: int = RANK, population: str = "modulo"
) -> MixedSetting:
    """A linear of one slice; the number of adapters is 8, or what the population says."""
    m, k, n = shape
    adapters = min(ADAPTERS, m) if population == "modulo" else len(row_counts(population, m))
    return MixedSetting(group, "", m, k, (n,), r, population, adapters)


def row_counts(population: str, rows: int) -> list[int]:
    """How many rows each adapter has, the most popular first.

    >>> row_counts("uniform", 32), row_counts("zipf", 32)
    ([6, 6, 5, 5, 5, 5], [11, 7, 5, 3, 2, 2, 1, 1])
    """
    if population == "identical":
        return [rows]
    if population == "distinct":
        return [1] * rows
    if population == "uniform":
        adapters = math.isqrt(rows - 1) + 1
        return [rows // adapters + (i < rows % adapters) for i in range(adapters)]
    if population == "zipf":
        # Each adapter is 1.5 times as popular as the next.
        counts: list[int] = []
        popularity = 1.0
        while sum(counts) + int(popularity) < rows:
            counts.append(int(popularity))
            popularity *= _ZIPF
        return sorted([*counts, rows - sum(counts)], reverse=True)
    raise ValueError(f"{population!r} is no population; there are {', '.join(POPULATIONS)}")


def slots_of(setting: MixedSetting) -> list[int]:
    """The adapter of each row; those of punica's populations arrive in a drawn order."""
    if setting.population == "modulo":
        return [row % setting.adapters for row in range(setting.m)]
    counts = row_counts(setting.population, setting.m)
    slots = [slot for slot, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(setting.m, generator=torch.Generator().manual_seed(0))
    return [slots[place] for place in order]


# T2 as (layer, K, widths of the slices).
_DECODER = (
    ("qkv", 4096, (8192, 1024, 1024)),
    ("gate_up", 4096, (12288, 12288)),
    ("down", 12288, (4096,)),
)
# A part of T3's sweep that fits: its batches 1 to 8192 and widths 1024 to 16384, of each the ends
# and one or two between them, with its most adapters and its fewest and most slices.
_SWEEP = itertools.product((1, 3), (1024, 4096, 16384), (1, 64, 1024, 8192))
_SWEPT = [
    MixedSetting("T3", "", m, hidden, (hidden,) * slices, RANK, "modulo", min(4, m))
    for slices, hidden, m in _SWEEP
]


def mixed_settings(
    device: str, *, dtypes: Sequence[str] | None = None, quick: bool = False
) -> list[MixedSetting]:
    """The device's rows, in ``dtypes`` (default bfloat16)."""
    gpu = device == "cuda"
    if quick:
        found = [mixed("rows", (32, 512, 512)), mixed("T4", (32, 512, 512), population="zipf")]
        found.append(MixedSetting("T2", "qkv", 32, 512, (512, 128, 128), 32, "modulo", 8))
    else:
        found = [mixed("rows", (m, *DECODE[1:])) for m in (1, 8, 32, 128, 512)]
        found += [
            MixedSetting("T2", layer, m, k, widths, 32, "modulo", min(8, m))
            for layer, k, widths in _DECODER
            for m in ((1, 8, 32, 64, 128, 8192) if gpu else (32,))
        ]
        found += _SWEPT if gpu else []
        batches, k, n = ((1, 8, 32, 64), 4096, 11008) if gpu else ((32, 64), 2048, 5504)
        found += [
            mixed("T4", (m, k, n), population=population)
            for population in POPULATIONS[1:]
            for m in batches
        ]
    return [replace(setting, dtype=dtype) for dtype in dtypes or ["bfloat16"] for setting in found]


@dataclass(frozen=True)
class MixedInputs:
    """The tensors of one row: x [M, K], weight [N, K], and for each slice A [S, r, K] and
    B [S, N, r]; scales [S] in float32."""

    x: Tensor
    weight: Tensor
    lora_a: list[Tensor]
    lora_b: list[Tensor]
    scales: list[float]
    slots: list[int]

    def copy(self) -> MixedInputs:
        """The same values in memory of their own, but for x, which all copies share."""
        a, b = ([t.clone() for t in stack] for stack in (self.lora_a, self.lora_b))
        return replace(self, weight=self.weight.clone(), lora_a=a, lora_b=b)

    def table(self) -> lk.SegmentTable:
        ranks = [self.lora_a[0].shape[1]] * len(self.scales)
        return lk.SegmentTable.from_rows(self.slots, ranks, self.scales, device=self.x.device)


def draw(setting: MixedSetting, device: str) -> MixedInputs:
    """Inputs in which the adapters' part of y is as large as the base's."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, setting.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(dtype)

    s, k, r = setting.adapters, setting.k, setting.r
    scales = [0.5 + 0.25 * (slot % 4) for slot in range(s)]
    amplify = [1 / (scale * r**0.5) for scale in scales]
    inner = k**-0.5
    return MixedInputs(
        x=normal(setting.m, k),
        weight=normal(setting.n, k, scale=inner),
        lora_a=[normal(s, r, k, scale=inner) for _ in setting.widths],
        lora_b=[
            torch.stack([normal(width, r, scale=factor) for factor in amplify])
            for width in setting.widths
        ],
        scales=scales,
        slots=slots_of(setting),
    )
