"""vLLM's own tests of its LoRA layers and manager, run twice: with vLLM's wrapper, and with ours.

``make vllm`` runs it. pip downloads vLLM's source distribution in the installed version, which has
the tests; ``--source`` names a checkout instead. The hub is not asked: tests that need a model
from it fail in both runs. Weights in float16, the dtype of the test of layers, are not packed, so
that the test runs in bfloat16 as well.

It fails if a test passes with vLLM's wrapper and not with ours, or if our kernels did not answer.
The file is the plugin of both runs as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import types
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "vllm-suite"
# Those that start no engine and ask the hub for little.
FILES = (
    "test_layers.py",
    "test_layers_bfloat16.py",
    "test_layers_utils.py",
    "test_lora_manager.py",
    "test_lora_utils.py",
    "test_lora_weights.py",
    "test_moe_lora_ep_load.py",
    "test_peft_helper.py",
    "test_utils.py",
)
# What the two operators are that have to answer: of layers in bfloat16, and of all others.
ANSWERS = ("segmented_linear_fwd", "segmented_lora_")
# Left out, since the same tests are there with smaller stacks and with other numbers of adapters.
LEFT_OUT = {"vocab_size": (128000, 256512, 258048), "num_loras": (1, 2)}
# Where the plugin writes what answered; set for the second run only.
_ACCOUNT = "LORA_KERNELS_VLLM_SUITE"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="a checkout of vLLM, instead of pip's download")
    parser.add_argument("files", nargs="*", default=FILES, help="of vLLM's tests/lora/")
    options = parser.parse_args()
    source = _copy(options.source)
    files = [f"tests/lora/{name}" for name in options.files]
    theirs = _run(source, files, "vllm", {})
    account = FOLDER / "answers.json"
    account.unlink(missing_ok=True)
    ours = _run(source, files, "ours", {_ACCOUNT: str(account)})
    worse = [name for name, was in theirs.items() if was == "passed" != ours.get(name)]
    print("".join(f"worse: {name}: {ours.get(name, 'missing')}\n" for name in worse), end="")
    answers = json.loads(account.read_text())
    print("answered by", ", ".join(f"{who}: {count}" for who, count in answers.items()))
    good = not worse and all(answers.get(f"{op} (cpu, native)") for op in ANSWERS)
    passed = sum(outcome == "passed" for outcome in theirs.values())
    print(f"{passed} pass with vLLM's wrapper; {'the same with ours' if good else 'NOT GOOD'}")
    return 0 if good and passed else 1


def _copy(checkout: Path | None) -> Path:
    """A folder with the tests alone: beside the package's source they would import that."""
    import vllm

    target = FOLDER / vllm.__version__
    if target.is_dir() and checkout is None:
        return target
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory() as work:
        tests = (checkout or _download(Path(work), vllm.__version__)) / "tests"
        for part in ("lora", "models"):
            shutil.copytree(tests / part, target / "tests" / part)
        for file in tests.glob("*.py"):
            shutil.copy(file, target / "tests")
    layers = target / "tests" / "lora" / "test_layers.py"
    text = layers.read_text().replace("torch.float16", "torch.bfloat16")
    layers.with_name("test_layers_bfloat16.py").write_text(text)
    return target


def _download(work: Path, version: str) -> Path:
    sys.path.insert(0, str(ROOT / "tests" / "integrations"))
    import engine_sources

    engine_sources.PINS["vllm"] = version
    found = engine_sources._download("vllm", work)
    if found is None:
        raise SystemExit(f"vllm {version} is not to be had from pip: use --source")
    return found


def _run(source: Path, files: list[str], label: str, changes: dict[str, str]) -> dict[str, str]:
    """The outcome of each test by its name."""
    results = FOLDER / f"{label}.xml"
    results.unlink(missing_ok=True)
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir", str(source)]
    command += ["-p", "no:cacheprovider", "-p", "vllm_suite"]
    command += ["--tb=short", f"--junitxml={results}", "-o", "junit_logging=no", "-W", "ignore"]
    print(f"--- {label}: {' '.join(command[2:])} {' '.join(files)}", flush=True)
    with open(FOLDER / f"{label}.log", "w") as log:
        subprocess.run(
            [*command, *files], cwd=source, env=environment | changes, stdout=log, stderr=log
        )
    if not results.is_file():
        raise SystemExit(f"pytest did not finish, see {FOLDER / label}.log")
    outcomes = {}
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcomes[f"{case.get('classname')}::{case.get('name')}"] = next(iter(kinds), "passed")
    print(f"    {dict(Counter(outcomes.values()))}", flush=True)
    return outcomes


# What follows is the plugin.


def pytest_configure(config):
    # Their clean-up asks it to shut down.
    ray = types.ModuleType("ray")
    ray.shutdown = lambda: None
    sys.modules.setdefault("ray", ray)
    if os.environ.get(_ACCOUNT):
        _enable(config)
    _load_layers_on_first_use()


def _enable(config):
    import vllm.config

    import lora_kernels as lk
    from lora_kernels.integrations import vllm as plugin

    # Their layers are made without the config of an engine that serves adapters.
    current = vllm.config.get_current_vllm_config_or_none
    engine = types.SimpleNamespace(lora_config=object())
    vllm.config.get_current_vllm_config_or_none = lambda: engine
    plugin.enable()
    vllm.config.get_current_vllm_config_or_none = current
    assert plugin.PunicaWrapper
    config._lora_kernels_recorder = lk.record_plans()
    config._lora_kernels_answers = config._lora_kernels_recorder.__enter__()


def _load_layers_on_first_use():
    """vLLM's loader packs weights on a CPU, without which layers compute nothing. These layers have
    not met it, and their tests compare with the weight, which stays."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.model_executor.layers import linear, utils, vocab_parallel_embedding

    linear_method = linear.UnquantizedLinearMethod
    head_method = vocab_parallel_embedding.UnquantizedEmbeddingMethod

    def load(layer):
        method = getattr(layer, "quant_method", None)
        if isinstance(method, (linear_method, head_method)) and not hasattr(layer, "cpu_linear"):
            weight = layer.weight
            utils.dispatch_cpu_unquantized_gemm(layer, isinstance(method, linear_method))
            layer.weight = weight

    def loading(owner, name, layer_of):
        original = getattr(owner, name)

        def call(self, *args, **kwargs):
            load(layer_of(self, *args))
            return original(self, *args, **kwargs)

        setattr(owner, name, call)

    loading(BaseLinearLayerWithLoRA, "_apply_sync", lambda self, *_: self.base_layer)
    for method in (linear_method, head_method):
        loading(method, "apply", lambda _, layer, *rest: layer)


def pytest_collection_modifyitems(config, items):
    def stays(item):
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return not any(parameters.get(name) in values for name, values in LEFT_OUT.items())

    for module in {item.module for item in items if os.environ.get(_ACCOUNT)}:
        if hasattr(module, "check_punica_wrapper"):  # that the class is the platform's own
            module.check_punica_wrapper = lambda wrapper: type(wrapper).__name__ == "PunicaWrapper"
    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = [item for item in items if stays(item)]


def pytest_sessionfinish(session):
    answers = getattr(session.config, "_lora_kernels_answers", None)
    if answers is not None:
        counts = Counter(f"{a.op} ({a.backend}, {a.plan})" for a in answers)
        Path(os.environ[_ACCOUNT]).write_text(json.dumps(counts))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    sys.exit(main())
