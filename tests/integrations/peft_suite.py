"""PEFT's own tests of LoRA, run twice: with PEFT's layers as they are, and with ours instead.

``make test-peft`` runs it. PEFT's source distribution of the installed
version is downloaded by pip into build/ (its tests are in it), together with what only its tests
import; ``--source`` names a checkout of the same version instead. Nothing is asked of the hub: the
tiny mixtures of test_target_parameters.py are drawn here, from transformers' configurations of
:data:`MODELS`; tests that need another model from it fail in both runs.

It fails if a test passes with PEFT's layers and not with ours, unless :data:`EXPECTED` says why; if
our forward answered nothing; or if less than 90% of the calls that have an adapter to compute were
fused. The file is the plugin of both runs as well.

PEFT's matrix of methods and quantisations leaves LoRA to tests that need a GPU. Here it runs with
LoRA over bitsandbytes' four bits.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import time
import types
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "peft-suite"

# Those that build their models themselves, and their neighbours that mostly do. (What asks the hub
# for every model is left out: test_seq_classifier.py, test_token_classification_qa.py.)
FILES = (
    "test_custom_models.py",
    "test_initialization.py",
    "test_lora_conversion.py",
    "test_lora_ga.py",
    "test_lora_intruders.py",
    "test_lora_variants.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_low_level_api.py",
    "test_mixed.py",
    "test_other.py",
    "test_quantization.py",
    "test_target_parameters.py",
    "test_trainable_tokens.py",
    "test_tuners_utils.py",
    "test_bdlora.py",
    "test_velora.py",
)
SELECTION = "(lora or TestTargetParameters or target_parameters)" + "".join(
    f" and not {other}"
    for other in ("randlora", "vblora", "gralora", "tinylora", "unilora", "delora")
    + ("gloraconfig",)
)

# What only PEFT's tests import: module -> distributions.
IMPORTED = {
    "attr": ["attrs"],
    "diffusers": ["diffusers", "importlib_metadata", "zipp", "pillow", "requests", "certifi"]
    + ["charset_normalizer", "idna", "urllib3"],
    "parameterized": ["parameterized"],
    "scipy": ["scipy"],
}

# Part of a test's name -> why it passes with PEFT's layers alone.
EXPECTED: dict[str, str] = {
    # Of 10 x 1000 x 1000 in float32 ours is 6.0e-7 from float64, the library's 7.4e-7 (2026-11-29).
    "test_adalora_default_init_identity": "it asks for the library's order of sums",
    "test_target_parameter_result_caching_works": "it counts PEFT's deltas, and ours makes none",
}

# The hub's name of a model -> the class of its configuration, and sizes like that model's.
_SIZES = {
    "vocab_size": 1000,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssConfig", _SIZES),
    "trl-internal-testing/tiny-Llama4ForCausalLM": (
        "Llama4TextConfig",
        _SIZES | {"intermediate_size_mlp": 24, "num_experts_per_tok": 1},
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaConfig", _SIZES),
    # Of no name that other tests ask for.
    "four-bits/tiny-opt": (
        "OPTConfig",
        _SIZES | {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
    ),
}

# Where the plugin writes its account; set for the second run only.
_ACCOUNT = "LORA_KERNELS_PEFT_SUITE"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Raw)
    parser.add_argument("--source", type=Path, help="a checkout of PEFT, instead of pip's download")
    parser.add_argument("-k", dest="selection", default=SELECTION, help="pytest's -k")
    parser.add_argument("-n", dest="workers", default="2", help="processes")
    parser.add_argument("--least-share", type=float, default=0.9, help="of calls to be fused")
    parser.add_argument("files", nargs="*", default=FILES, help="of PEFT's tests/")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    _draw_models()
    source = (options.source or _download()).resolve()
    _install_imports()
    files = [f"tests/{name}" for name in options.files if (source / "tests" / name).is_file()]
    stock = _run(source, files, options, swapped=False)
    ours = _run(source, files, options, swapped=True)
    return _compare(stock, ours, options.least_share)


class _Raw(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def _download() -> Path:
    version = importlib.metadata.version("peft")
    source = FOLDER / f"peft-{version}"
    if not source.is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "peft"]
        subprocess.run([*pip, "-d", FOLDER, f"peft=={version}"], check=True)
        with tarfile.open(FOLDER / f"peft-{version}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")
    if not (source / "tests" / "test_custom_models.py").is_file():
        raise SystemExit(f"peft {version}'s source distribution has no tests: use --source")
    # Its tests import each other relatively, and the distribution leaves this file out.
    (source / "tests" / "__init__.py").touch()
    return source


def _draw_models() -> None:
    import torch
    import transformers

    for name, (config, sizes) in MODELS.items():
        torch.manual_seed(0)
        built = getattr(transformers, config)(**sizes, initializer_range=0.2)
        transformers.AutoModelForCausalLM.from_config(built).save_pretrained(_folder_of(name))


def _folder_of(model: str) -> Path:
    return FOLDER / "models" / model


def _install_imports() -> None:
    missing = [module for module in IMPORTED if importlib.util.find_spec(module) is None]
    wanted = [name for m in missing if not (FOLDER / "deps" / m).is_dir() for name in IMPORTED[m]]
    if wanted:
        # Beside the environment, not into it.
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*pip, FOLDER / "deps", *wanted], check=True)


def _run(
    source: Path, files: list[str], options: argparse.Namespace, *, swapped: bool
) -> dict[str, str]:
    """The outcome of each test by its name."""
    label = "swapped" if swapped else "stock"
    results = FOLDER / f"{label}.xml"
    results.unlink(missing_ok=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    # Appended: no module of ours may stand before one of theirs.
    paths = [str(ROOT), str(FOLDER / "deps"), os.environ.get("PYTHONPATH", ""), str(HERE)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment.pop(_ACCOUNT, None)
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
    command += ["--tb=short", f"--junitxml={results}", "-o", "junit_logging=no", "-W", "ignore"]
    command += ["-n", options.workers, "-k", options.selection, "-p", "peft_suite", *files]
    if swapped:
        environment[_ACCOUNT] = str(FOLDER / "account")
        for old in FOLDER.glob("account-*.json"):
            old.unlink()
    print(f"--- {label}: {' '.join(command[2:])}", flush=True)
    with open(FOLDER / f"{label}.log", "w") as log:
        subprocess.run(command, cwd=source, env=environment, stdout=log, stderr=log)
    if not results.is_file():
        raise SystemExit(f"pytest did not finish, see {FOLDER / label}.log")
    outcomes = {}
    for case in ElementTree.parse(results).iter("testcase"):
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        name = f"{case.get('classname')}::{case.get('name')}"
        outcomes[name] = next(iter(kinds), "passed")
    print(f"    {dict(Counter(outcomes.values()))}", flush=True)
    return outcomes


def _compare(stock: dict[str, str], ours: dict[str, str], least_share: float) -> int:
    worse, expected, better = [], [], []
    for name, outcome in stock.items():
        now = ours.get(name, "missing")
        if outcome == "passed" and now != "passed":
            reason = next((why for part, why in EXPECTED.items() if part in name), None)
            (worse if reason is None else expected).append(f"{name}: {now}. {reason or ''}")
        elif outcome != "passed" and now == "passed":
            better.append(f"{name}: {outcome} with PEFT's layers")
    answered: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    fused = tests = 0
    for path in FOLDER.glob("account-*.json"):
        account = json.loads(path.read_text())
        fused, tests = fused + account["fused"], tests + account["tests"]
        answered.update(account["answered"])
        reasons.update(account["fallen_back"])
    share = fused / max(fused + reasons.total(), 1)
    for title, names in (("worse", worse), ("expected", expected), ("better", better)):
        print(f"{len(names)} {title}")
        print("".join(f"    {name}\n" for name in names), end="")
    print(
        f"{fused} calls fused of {fused + reasons.total()} ({100 * share:.1f}%), in {tests} tests"
    )
    for reason, count in reasons.most_common():
        print(f"    {count} fell back: {reason}")
    print("answered by " + ", ".join(f"{who}: {n}" for who, n in answered.most_common()))
    passed = sum(outcome == "passed" for outcome in stock.values())
    good = not worse and passed > 0 and fused > 0 and share >= least_share
    print(f"{passed} pass with PEFT's layers; {'the same with ours' if good else 'NOT GOOD'}")
    return 0 if good else 1


# What follows is the plugin.


def pytest_configure(config):
    """A model that is not there is asked for once: five retries would take 23 seconds each."""
    from huggingface_hub.utils import _http

    _http.time = types.SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None})

    import transformers

    from_hub = transformers.AutoModelForCausalLM.from_pretrained

    def from_here(name, *args, **kwargs):
        return from_hub(_folder_of(name) if name in MODELS else name, *args, **kwargs)

    transformers.AutoModelForCausalLM.from_pretrained = from_here
    if (Path.cwd() / "tests" / "test_quantization.py").is_file():
        _test_lora_over_four_bits()


def _test_lora_over_four_bits():
    """In the lists that PEFT's tests take their parameters from, before they are collected."""
    from peft import LoraConfig

    from tests import test_quantization as matrix  # type: ignore[attr-defined]

    matrix.Bnb4bitLoader.model_id = "four-bits/tiny-opt"
    matrix.QUANTIZATION_BACKENDS[:] = [matrix.Bnb4bitLoader()]
    every = {"target_modules": "all-linear", "lora_dropout": 0.1}
    options = ({}, {"r": 5, "use_rslora": True}, every, {"lora_bias": True})
    matrix.TEST_CASES[:] = [(LoraConfig, chosen) for chosen in options]


if os.environ.get(_ACCOUNT):
    import pytest
    from peft.tuners.tuners_utils import BaseTuner

    import lora_kernels as lk
    from lora_kernels.integrations import peft_calls, peft_kinds, peft_swap

    # One account for all models of this process.
    _calls = peft_calls.Calls()
    peft_swap.Calls = lambda: _calls  # type: ignore[misc,assignment]
    _answered: Counter[str] = Counter()
    _tests_with_calls: set[str] = set()

    _inject = BaseTuner.inject_adapter

    def _inject_and_swap(self, model, *args, **kwargs):
        result = _inject(self, model, *args, **kwargs)
        if peft_kinds.lora_layers(model):
            lk.accelerate_peft(model)
        return result

    BaseTuner.inject_adapter = _inject_and_swap

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(item):
        before = _calls.fused
        with lk.record_plans() as answers:
            yield
        if _calls.fused > before:
            _tests_with_calls.add(item.nodeid)
        _answered.update(f"{a.op} ({a.backend}, {a.plan})" for a in answers)

    def pytest_sessionfinish(session):
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        account = {
            "fused": _calls.fused,
            "fallen_back": dict(_calls.fallen_back),
            "answered": dict(_answered),
            "tests": len(_tests_with_calls),
        }
        Path(f"{os.environ[_ACCOUNT]}-{worker}.json").write_text(json.dumps(account))


if __name__ == "__main__":
    sys.exit(main())
