"""What the tests of the segmented Triton kernels share: configurations, cases, launchers, and
kernels with a mistake in them."""

import functools
import importlib.metadata
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

# Below the skip: nothing of Triton's is imported where it is missing.
from lora_kernels.backends import vendor  # noqa: E402
from lora_kernels.kernels import (  # noqa: E402
    linear_fwd,
    rows,
    segmented,
    segmented_bwd,
    segmented_decode,
)
from lora_kernels.planning.config import MIXED_LINEAR_OPS, Config  # noqa: E402
from lora_kernels.testing.segmented import SegmentedCase, check_segmented  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


SKIPS = [
    pytest.mark.skipif(
        DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and TRITON_INTERPRET=1 is not set"
    ),
]

# The interpreter multiplies bfloat16 by its raw bits.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")

GROUPED = Config("grouped", 32, 32, 16, 0, 2, 4, 2, block_r=16)
CONFIGS = {
    "grouped": GROUPED,
    "grouped, whole": replace(GROUPED, split_k=1, block_r=64),
    "decode": replace(GROUPED, plan="decode", chunk=32),
    "decode, whole": replace(GROUPED, plan="decode", chunk=64, split_k=1, block_n=32, block_r=64),
}
# Of the shrink under a base linear, which is not what its tests are about.
SHRINK = replace(GROUPED, block_r=64)
# Of the base linear; a vendor's are the adapters' that are added to the library's result.
LINEAR_CONFIGS = {
    "tail": Config("tail", 32, 32, 16, 2, 1, 4, 2),
    "tail, split": Config("tail", 16, 32, 16, 1, 3, 4, 2),
    "vendor, grouped": GROUPED,
    "vendor, decode": CONFIGS["decode"],
}

# Two tiles and a remainder in K and in the widths, and live ranks of none, one, less than a tile, a
# tile, two tiles and a remainder, and nearly three.
RANKS = (33, 0, 1, 8, 41, 16)
SIZE = SegmentedCase(70, 43, (37, 70), RANKS, device=DEVICE)

# Each after those that it imports.
MODULES = (rows, segmented, segmented_bwd, segmented_decode, linear_fwd)


def launch(op, config, modules=MODULES):
    _, grouped, backward, decode, linear = modules
    if op in MIXED_LINEAR_OPS:
        if config.plan == "tail":
            return functools.partial(getattr(linear, op), config=config, shrink=SHRINK)
        module = decode if config.plan == "decode" else grouped
        onto = module.lora_onto if op == "segmented_linear_fwd" else grouped.dx_onto
        return functools.partial(getattr(vendor, op), onto=functools.partial(onto, config=config))
    module = backward if op == "segmented_lora_dab" else grouped
    if config.plan == "decode":
        module = decode
    return functools.partial(getattr(module, op), config=config)


def combinations(operators, variants):
    """(operator, variant, dtype). The interpreter takes seconds for one: there the dtypes alternate
    from variant to variant and from operator to operator."""
    for i, op in enumerate(operators):
        for j, variant in enumerate(variants):
            for k, dtype in enumerate(DTYPES):
                if not INTERPRETED or (i + j + k) % len(DTYPES) == 0:
                    yield op, variant, dtype


def rows_apart(monkeypatch):
    """NumPy's product gives a row other bits in another place of the matrix; a tensor core's
    instruction does not, and neither does this one."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        x, w, acc = a.data.astype(np.float32), b.data.astype(np.float32), d.data.copy()
        for k in range(x.shape[1]):
            acc += x[:, k, None] * w[None, k, :]
        return interpreter.TensorHandle(acc, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def assert_red(mistake, config, case, tmp_path, monkeypatch):
    """The check fails with kernels that say ``broken`` where they say ``sound``."""
    op, sound, broken = mistake
    modules, said = [], 0
    for module in MODULES:
        source = Path(module.__file__).read_text()
        said += sound in source
        path = tmp_path / Path(module.__file__).name
        source = source.replace(sound, broken)
        for other in ("segmented", "rows"):
            source = source.replace(f"from .{other} import", f"from .broken_{other} import")
        path.write_text(source)
        name = f"lora_kernels.kernels.broken_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        modules.append(importlib.util.module_from_spec(spec))
        monkeypatch.setitem(sys.modules, name, modules[-1])
        spec.loader.exec_module(modules[-1])
    assert said, "the kernel has changed: say the mistake anew"
    with pytest.raises(AssertionError, match="segmented"):
        check_segmented(op, launch(op, config, modules), case)
