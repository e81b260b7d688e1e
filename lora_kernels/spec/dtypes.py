"""In which dtypes sums are made and tails are kept: the only statements of it."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tail_dtype(dtype: torch.dtype) -> torch.dtype:
    """What S, D, A and B are rounded to where the rows are of ``dtype``."""
    return torch.float32 if dtype == torch.float16 else dtype
