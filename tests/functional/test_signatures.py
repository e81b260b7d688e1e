"""Every implementation of an operator takes what the operator's schema says: the same names in the
same order, with the same defaults."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch._library.simple_registry import singleton

from lora_kernels import kernels
from lora_kernels.backends import cpu, vendor
from lora_kernels.functional import ops
from lora_kernels.spec import native
from lora_kernels.spec.linears import reference_of
from lora_kernels.spec.problem import PROBLEM_OF

EVERY = (
    *ops.OPERATORS, *ops.SEGMENTED_OPERATORS, *ops.LINEARS_OPERATORS, *ops.EXPERT_OPERATORS
)  # fmt: skip
# The library has the GEMMs of several projections on a GPU.
KERNELS = (*ops.OPERATORS, *ops.SEGMENTED_OPERATORS, *ops.EXPERT_OPERATORS)
REQUIRED = inspect.Parameter.empty


def of_schema(schema):
    return [(a.name, a.default_value if a.has_default_value() else REQUIRED) for a in schema]


def of_function(function):
    parameters = inspect.signature(function).parameters.values()
    assert not {p.kind for p in parameters} & {
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    }, "its arguments are not written out"
    # What a backend adds, a tile or a dropout kernel, is keyword-only.
    given = [p for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    return [(p.name, p.default) for p in given]


def schema_of(op):
    return of_schema(getattr(torch.ops.lora_kernels, op).default._schema.arguments)


@pytest.mark.parametrize("op", EVERY)
def test_reference_problem_and_fake(op):
    registered = singleton.find(f"lora_kernels::{op}").fake_impl.kernel.func
    fake = inspect.getclosurevars(registered).nonlocals["func"]
    for function in (reference_of(op), PROBLEM_OF[op], fake):
        assert of_function(function) == schema_of(op), function


def test_vendor():
    found = [op for op in EVERY if hasattr(vendor, op)]
    assert len(found) == 13
    for op in found:
        assert of_function(getattr(vendor, op)) == schema_of(op), op


@pytest.mark.skipif(native.load() is None, reason=f"no CPU extension: {native.why_not()}")
@pytest.mark.parametrize("op", EVERY)
def test_native(op):
    cpu_ops = getattr(torch.ops.lora_kernels_cpu, op).default
    assert of_schema(cpu_ops._schema.arguments) == schema_of(op)


def test_launchers():
    pytest.importorskip("triton")
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    launchers = [
        (op, module)
        for op in KERNELS
        for module in modules
        if getattr(getattr(module, op, None), "__module__", None) == module.__name__
    ]
    assert {op for op, _ in launchers} == set(KERNELS)
    for op, module in launchers:
        wanted = schema_of(op)
        if op in ops.EXPERT_OPERATORS:
            # The backend decodes their weights first.
            wanted = [pair for pair in wanted if not pair[0].startswith("quant")]
        assert of_function(getattr(module, op)) == wanted, (op, module.__name__)


@pytest.mark.skipif(native.load() is None, reason=f"no CPU extension: {native.why_not()}")
def test_the_node_in_cpp():
    node = torch.ops.lora_kernels_cpu.lora_linear.default
    names = [argument.name for argument in node._schema.arguments]
    assert names == list(inspect.signature(cpu.lora_linear).parameters)
