"""These tests start vLLM, which has an environment of its own: `make vllm`. Elsewhere there are
none of them."""

import importlib.util
import os

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py", "in_process.py"]
else:
    # Before vllm is imported, and for the processes that it starts. The plug-in is named, nothing
    # else.
    os.environ.update(
        VLLM_PLUGINS="lora_kernels",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_NO_USAGE_STATS="1",
        HF_HUB_OFFLINE="1",
        VLLM_LOGGING_LEVEL="INFO",
    )


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def served_model(request, tmp_path_factory):
    """A model of each family on disk, its adapters, and what is right: see ``Served``."""
    from served_models import Served

    return Served(request.param, tmp_path_factory.mktemp(request.param))
