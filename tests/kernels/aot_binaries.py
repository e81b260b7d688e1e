"""From a call to its binary.

The real launcher is given CPU tensors of real shapes and strides; its launch is caught and
specialised by Triton's own rules (divisibility by 16, strides of 1) instead of run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import kernels
from lora_kernels.backends import cuda
from lora_kernels.spec.reference import tail_dtype
from tests.kernels import aot_code, aot_experts, aot_four_bit, aot_linears, aot_segmented
from tests.kernels.aot_calls import DTYPES, FACTS, Call

_READER = Path(aot_code.__file__)


def arguments(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's own arguments; the tensors are reserved memory that is never touched."""
    problem, layout = call.problem, call.layout
    if problem.slots:
        return (), aot_segmented.arguments(problem, layout, call.packed)
    if problem.experts:
        return (), aot_experts.arguments(problem, layout)
    dtype, adapters = DTYPES[problem.dtype], DTYPES[problem.adapter_dtype]
    m, n, k, r = problem.m, problem.n, problem.k, problem.r

    def rows(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        if layout == "aligned":
            return torch.empty(shape, dtype=dtype)
        if layout == "odd":
            # a slice of something wider, so that the base address is odd too
            return torch.empty(*shape[:-1], shape[-1] + 2, dtype=dtype)[..., 1:-1]
        return torch.empty(*shape[:-1], 3 * shape[-1], dtype=dtype)[..., ::3]

    rng = torch.zeros(4, dtype=torch.int64) if problem.dropout else None
    dropout = {"rng": rng, "dropout_p": 0.1 * problem.dropout}
    scale = torch.ones(())
    if problem.op == "lora_shrink":
        # The strided layout is dX's: a is B, transposed.
        strided = layout == "strided"
        a = rows(k, r, dtype=adapters).t() if strided else rows(r, k, dtype=adapters)
        return (rows(m, k), a, scale), dropout
    if problem.op == "lora_linear_dab":
        result = {f"{name}_dtype": adapters for name in ("da", "db", "dbias")}
        tails = torch.empty(2, m, r, dtype=tail_dtype(dtype))
        return (rows(m, n), rows(m, k), *tails), dropout | result
    weight = rows(k, n) if problem.fan_in_fan_out else rows(n, k)
    lead = (
        weight,
        rows(r, k, dtype=adapters),
        rows(n, r, dtype=adapters),
        scale,
    )
    options: dict[str, Any] = {"fan_in_fan_out": problem.fan_in_fan_out} | dropout
    if problem.out_scale:
        options["out_scale"] = rows(n)
    if problem.op == "lora_linear_dx":
        return (rows(m, n), *lead), options
    return (rows(m, k), *lead), options | {"bias": rows(n)}


class Caught(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _modules() -> list[Any]:
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    return [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]


def forget_lines() -> None:
    """A kernel that moved within its file is the same one, in this process: Triton's hash of it
    counts the line that it begins in."""
    for module in _modules():
        for function in vars(module).values():
            if isinstance(getattr(function, "starting_line_number", None), int):
                function.starting_line_number, function.hash = 0, None


class _NoProducts(TorchDispatchMode):
    """The library's product behind a kernel, seconds on a CPU, is not computed either."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket is torch.ops.aten.addmm_:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def launches() -> Iterator[list[Caught]]:
    """Inside the block the package's kernels are not run; the list gets what they are launched
    with."""
    caught: list[Caught] = []

    class Catcher:
        def __init__(self, function: Any):
            self.function = function

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **kwargs: caught.append(Caught(self.function, args, kwargs))

    kept = [
        (module, name, function)
        for module in _modules()
        for name, function in vars(module).items()
        if name.startswith(("_lora", "_segmented", "_expert")) and name.endswith("_kernel")
    ]
    for module, name, function in kept:
        setattr(module, name, Catcher(function))
    try:
        with _NoProducts():
            yield caught
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def launch(call: Call) -> Caught:
    """What the operator's launcher gives its kernel; a tail's shrink is a call of its own."""
    if call.problem.op in aot_linears.OPERATORS:
        with launches() as caught:
            aot_linears.shrink(call.config, call.problem, call.layout)
        return caught[call.launch]
    if call.problem.four_bit:
        with launches() as caught:
            aot_four_bit.launch(call.config, call.problem, call.layout, FACTS[call.arch])
        return caught[call.launch]
    args, kwargs = arguments(call)
    with launches() as caught:
        cuda.run_kernel(
            call.problem.op, call.config, call.problem, FACTS[call.arch], *args, **kwargs
        )
    return caught[call.launch]


class Binary(NamedTuple):
    """What a launch would compile on a device of ``target``; ``constants`` are the kernel's."""

    source: Any
    target: Any
    options: Any
    constants: dict[str, Any]

    @property
    def key(self) -> str:
        """Names all that decides about what is compiled, but for the compiler, and about how it is
        read."""
        parts = self.source.hash(), str(self.target), self.options.hash(), _READER.read_text()
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def compile(self) -> Any:
        import triton

        return triton.compile(self.source, target=self.target, options=self.options.__dict__)


def specialised(arch: str, caught: Caught) -> Binary:
    """As Triton's own launcher specialises the arguments of a launch on such a device."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    function, args, kwargs = caught
    backend = make_backend(target)
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, given = bind(*args, **kwargs)
    options, signature, constants, attributes = function._pack_args(
        backend, kwargs, bound, specialization, given
    )
    source = ASTSource(function, signature, constants, attributes)
    own = {name: value for name, value in bound.items() if name.isupper()}
    return Binary(source, target, options, own)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Triton warns of a default that it will change; here the one it has now is said aloud."""
    name = "TRITON_DEFAULT_FP_FUSION"
    before = os.environ.setdefault(name, "1")
    kept = dict(os.environ)
    try:
        yield
    finally:
        os.environ[name] = kept.get(name, before)
