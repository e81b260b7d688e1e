"""Others' kernels as baselines: how copies are found, and what becomes of a peer that fails.

What needs the copies is skipped where there are none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bench_lora_linear, bench_segmented, peers
from bench.baselines import Addmm
from bench.cases import Setting
from bench.measure import CpuClock
from bench.peers import TRAINING_PEERS
from bench.peers_serving import MIXED_PEERS
from bench.segmented_baselines import MIXED_VARIANTS, Loop
from bench.segmented_cases import MixedSetting

ROOT = Path(__file__).parents[2]
SMALL = MixedSetting("T2", "qkv", 10, 96, (64, 48), 8, "modulo", 5, "bfloat16")
STEP = Setting(16, 64, 64, 8, 16, 0.0, "float32", "training")
EVERY_PEER = MIXED_PEERS | TRAINING_PEERS


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """An empty folder of copies; what is loaded from it is forgotten afterwards."""
    monkeypatch.setattr(peers, "_directory", tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("somebodys"):
            del sys.modules[name]


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_peer_without_a_copy_says_so():
    peers.use(Path("none"))
    try:
        for key, found in EVERY_PEER.items():
            variant: Any = found
            setting: Any = SMALL if key in MIXED_PEERS else replace(STEP, dtype="bfloat16")
            assert "GPU" in variant.missing(setting, "cpu")
            assert "float32" in variant.missing(replace(setting, dtype="float32"), "cuda")
            assert "bench.peers" in variant.missing(setting, "cuda")
    finally:
        peers.use(peers.DEFAULT_DIRECTORY)


def test_a_copy_is_imported_without_the_rest_of_its_engine(copies):
    write(
        copies / "somebodys",
        {
            "PKG-INFO": "Metadata-Version: 2.1\nName: somebodys\nVersion: 1.2.3\n",
            "somebodys/__init__.py": "raise RuntimeError('the engine starts')",
            "somebodys/ops/__init__.py": "raise RuntimeError('so does this')",
            "somebodys/ops/kernel.py": "from somebodys import envs\n"
            "from somebodys.ops.tool import half\n"
            "from somebodys.server.all import Server\n"
            "import an_absent_package.deep as other\n"
            "def serve(s: Server | None): return Server(s)\n"
            "four = half(8) if envs.TOLD else None\nnine = other.nine\n",
            "somebodys/ops/tool.py": "def half(n): return n // 2\n",
        },
    )
    own = {"somebodys.envs": {"TOLD": True}}
    foreign = {"an_absent_package": {}, "an_absent_package.deep": {"nine": 9}, "torch": {}}
    kernel: Any
    (kernel,) = peers.load("somebodys", ["somebodys.ops.kernel"], own, foreign)
    assert (kernel.four, kernel.nine) == (4, 9)
    with pytest.raises(peers.MissingPeerError, match="Server is not in the copy"):
        kernel.serve(None)
    assert "an_absent_package" not in sys.modules and sys.modules["torch"] is torch
    assert peers.version("somebodys") == "1.2.3"


def test_a_copy_that_does_not_load_is_a_reason_and_is_asked_once(copies, monkeypatch):
    asked = []

    def load():
        asked.append(1)
        return peers.load("somebodys", ["somebodys.kernel"], {}, {})

    write(copies / "somebodys", {"somebodys/kernel.py": "import an_absent_package\n"})
    for _ in range(2):
        found = peers.engine(load)
        assert isinstance(found, peers.MissingPeerError)
        assert "ModuleNotFoundError: No module named 'an_absent_package'" in str(found)
    assert asked == [1]
    monkeypatch.setitem(sys.modules, "somebodys", sys)
    with pytest.raises(peers.MissingPeerError, match="imported already"):
        load()


class _Raises(Loop):
    key, peer = "raises", True

    def add(self, x, y):
        raise ValueError("GPU H9000 not supported\nby these plans")


class _OwnAssertion(Loop):
    key, peer = "own_assertion", True

    def __init__(self, setting, inputs):
        raise AssertionError("x must be contiguous")


class _Wrong(Loop):
    key, peer = "wrong", True

    def add(self, x, y):
        super().add(x, y)
        y[-1] = 0


class _NotANumber(_Wrong):
    key = "not_a_number"

    def add(self, x, y):
        y.fill_(float("nan"))


class _Right(Loop):
    key, peer = "right", True


class _OursRaises(_Raises):
    peer = False


FAILING = {v.key: v for v in (_Raises, _OwnAssertion, _Wrong, _NotANumber, _Right)}


class OneSet(CpuClock):
    def sets(self, weight, result):
        return 1


class FakeSession:
    """What a row asks of the session; it keeps what the row found."""

    def __init__(self, variants):
        self.device, self.clock, self.variants = "cpu", OneSet(), variants
        self.mixed_variants = variants

    def rounds_for(self, setting, seconds):
        return 2

    def add_row(self, setting, measured, found):
        self.found = measured, found.missing
        return {}


class FakeBenchmark:
    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            target()


def test_what_fails_in_a_mixed_batch_has_a_reason_and_no_time():
    session = FakeSession(MIXED_VARIANTS | FAILING)
    bench_segmented.test_segmented_lora(SMALL, FakeBenchmark(), session)
    measured, missing = session.found
    assert missing["raises"] == "missing: ValueError: GPU H9000 not supported"
    assert missing["own_assertion"] == "missing: AssertionError: x must be contiguous"
    assert missing["wrong"].startswith("WRONG") and "over the budget" in missing["wrong"]
    assert missing["not_a_number"].startswith("WRONG") and "NaN" in missing["not_a_number"]
    assert "segmented" in measured and set(measured) & set(FAILING) == {"right"}
    assert "right" not in missing


def test_what_fails_and_is_no_peer_fails_the_run():
    session = FakeSession(MIXED_VARIANTS | {"raises": _OursRaises})
    with pytest.raises(ValueError, match="H9000"):
        bench_segmented.test_segmented_lora(SMALL, FakeBenchmark(), session)


class _HalfGradients(Addmm):
    key, peer = "half", True

    def forward(self, x):
        return super().forward(x.detach() + (x - x.detach()) / 2)


class _RaisesBackward(Addmm):
    key, peer = "backward", True

    def forward(self, x):
        y = super().forward(x)
        y.register_hook(lambda dy: dy.no_such_thing)
        return y


def test_what_fails_in_a_training_step_has_a_reason_and_no_time(monkeypatch):
    failing = {"half": _HalfGradients, "backward": _RaisesBackward}
    monkeypatch.setattr(bench_lora_linear, "TRAINING_PEERS", failing)
    session = FakeSession(["plain", *failing, "fused"])
    bench_lora_linear.test_lora_linear(STEP, FakeBenchmark(), session)
    measured, missing = session.found
    assert set(measured) == {"plain", "fused"}
    assert missing["half"].startswith("WRONG") and " dx: " in missing["half"]
    assert missing["backward"].startswith("missing: AttributeError")


FILES = {
    "somebodys/ops/shrink_op.py": "kernel = 1",
    "somebodys/ops/server.py": "raise SystemExit",
    "somebodys/ops/deep/more_op.py": "",
    "somebodys/plans/H200.json": "{}",
    "somebodys/vendor/LICENSE": "of another",
}
PATTERNS = ("somebodys/ops/*_op.py", "somebodys/plans/*.json")
COLLECTED = ["LICENSE", "METADATA", "somebodys/ops/shrink_op.py", "somebodys/plans/H200.json"]


@pytest.mark.parametrize("papers", ["", "somebodys-7.dist-info/"])
def test_a_copy_holds_the_files_it_needs(tmp_path, monkeypatch, papers):
    origin, target = tmp_path / "origin", tmp_path / "target"
    write(origin, FILES | {f"{papers}METADATA": "Version: 7\n", f"{papers}LICENSE": "theirs"})
    write(target / "somebodys", {"somebodys/ops/of_an_earlier_op.py": ""})
    assert peers.collect("somebodys", PATTERNS, origin, target) == COLLECTED
    found = [p.relative_to(target / "somebodys") for p in target.rglob("*") if p.is_file()]
    assert sorted(map(str, found)) == COLLECTED
    assert (target / "somebodys" / "LICENSE").read_text() == "theirs"
    monkeypatch.setattr(peers, "_directory", target)
    assert peers.version("somebodys") == "7"
    with pytest.raises(SystemExit, match="none of the files"):
        peers.collect("somebodys", ("else/*.py",), origin, target)


def test_a_copy_of_a_clone_names_its_commit(tmp_path, monkeypatch):
    write(tmp_path / "clone", FILES)
    git = ["git", "-C", str(tmp_path / "clone"), "-c", "user.name=n", "-c", "user.email=e@x.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    peers.collect("somebodys", PATTERNS, tmp_path / "clone", tmp_path)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True)
    monkeypatch.setattr(peers, "_directory", tmp_path)
    assert peers.version("somebodys") == f"commit {commit[:12]}"


def test_a_peer_is_right_in_the_interpreter():
    directory = peers.DEFAULT_DIRECTORY
    # Those of metadata alone are built by the others too.
    known = [key for key in EVERY_PEER if not key.endswith("_table")]
    keys = [key for key in known if (directory / EVERY_PEER[key].package).is_dir()]
    if not keys:
        pytest.skip("no copies (python -m bench.peers)")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.peers_interpreted", str(directory), *keys],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    for key in keys:
        right = 5 if key in MIXED_PEERS else 4 - (key == "lorafusion")
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"{key} ")]
        assert sum(line.endswith(": right") for line in lines) == right, key
        assert any("told wrong slots" in line for line in lines) == (key in MIXED_PEERS), key
