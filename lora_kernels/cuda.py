"""The CUDA (and ROCm) backend."""

from __future__ import annotations

from typing import Any

import torch

from . import plan, reference, vendor
from .config import PROBLEM_OF
from .device import facts


def answer(op: str, *args: Any, **kwargs: Any) -> Any:
    """Run one operator on CUDA tensors, by the plan that ``plan.plan`` chooses for its problem."""
    device = args[0].device
    problem = PROBLEM_OF[op](*args, **kwargs)
    config = plan.plan(problem, facts(device))
    # Launches go to the tensors' device, whichever is current.
    with torch.cuda.device(device):
        if config.plan == "reference":
            plan.answered("reference", config, problem)
            return getattr(reference, op)(*args, **kwargs)
        plan.answered("cuda", config, problem)
        return getattr(vendor, op)(*args, **kwargs, masked=reference.masked)
