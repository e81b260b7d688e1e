"""What is run: on which devices, and how much of the products of parameters (``covering.py``)."""

import os

# Threads that spin while they wait for each other stand still where the machine has other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from covering import left_out

from lora_kernels.spec import native

# What the tests of one of these share takes seconds to make: one worker has them all. (xdist_group
# would say so in each, but pytest 9.2 hides its groups from xdist 3.8.)
ONE_WORKER = (
    "tests/bench/test_demo.py",
    "tests/kernels/test_aot.py",
    "tests/models/test_distributed.py",
    "tests/study/",
    "tests/test_packaging.py",
)

HAS_GPU = torch.cuda.is_available()
DEVICES = ["cpu"] + ["cuda"] * HAS_GPU


def pytest_addoption(parser):
    parser.addoption("--whole", action="store_true", help="products of parameters as a whole")
    parser.addoption("--seed", type=int, default=0, help="of what is drawn from the products")


def pytest_report_header(config):
    if config.getoption("--whole"):
        return "products of parameters: whole"
    seed = config.getoption("--seed")
    return f"products of parameters: every pair of values, drawn with --seed {seed}"


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "native: needs the CPU extension")
    config.addinivalue_line("markers", "slow: not in make quick")
    config.addinivalue_line("markers", "whole: of its parameters nothing is left out")


def pytest_collection_modifyitems(config, items):
    # Who names a single case gets it.
    if not config.getoption("--whole") and not any("[" in argument for argument in config.args):
        dropped = left_out(items, config.getoption("--seed"))
        items[:] = [item for item in items if item not in dropped]
        config.hook.pytest_deselected(items=[*dropped])
    for item in items:
        # A marker: the keywords hold the names of folders too.
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
        if item.get_closest_marker("native") and native.load() is None:
            item.add_marker(pytest.mark.skip(reason=f"no CPU extension: {native.why_not()}"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return next((place for place in ONE_WORKER if nodeid.startswith(place)), nodeid)

    return Scheduling(config, log)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def zoos(tmp_path_factory):
    """Adapters on disk by architecture, see ``stores.Zoo``."""
    import small
    from stores import Zoo

    found = {}

    def zoo(architecture, **changes):
        key = architecture, *changes.items()
        if key not in found:
            with small.isolated():
                directory = tmp_path_factory.mktemp(architecture.replace(" ", "_"))
                found[key] = Zoo(architecture, directory, **changes)
        return found[key]

    return zoo


@pytest.fixture
def zoo(zoos):
    return zoos("llama")
