"""Devices and dtypes that the tests run on: the CPU always, a GPU where there is one."""

import pytest
import torch

from lora_kernels.spec import native

HAS_GPU = torch.cuda.is_available()
DEVICES = ["cpu"] + ["cuda"] * HAS_GPU


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line("markers", "native: needs the CPU extension")


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="there is no GPU"))
        if "native" in item.keywords and native.load() is None:
            item.add_marker(pytest.mark.skip(reason=f"no CPU extension: {native.why_not()}"))


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
