"""Others' kernels as baselines: how copies are found, and what becomes of a peer that fails.

What needs the copies is skipped where there are none.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import zipfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import (
    bench_lora_linear,
    bench_segmented,
    fetch_peers,
    gpu,
    peers,
    peers_probe,
    peers_report,
    report,
)
from bench.baselines import VARIANTS, Addmm
from bench.cases import Setting
from bench.measure import CpuClock
from bench.peers_serving import MIXED_PEERS
from bench.peers_training import TRAINING_PEERS
from bench.picture import picture
from bench.segmented_baselines import Loop
from bench.segmented_cases import MixedSetting
from tests.test_bench_segmented import content, row

ROOT = Path(__file__).parent.parent
SMALL = MixedSetting("T2", "qkv", 10, 96, (64, 48), 8, "modulo", 5, "bfloat16")
STEP = Setting(16, 64, 64, 8, 16, 0.0, "float32", "training")
EVERY_PEER = MIXED_PEERS | TRAINING_PEERS


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """An empty folder of copies; what is loaded from it is forgotten afterwards."""
    monkeypatch.setattr(peers, "_loaded", {})
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


@pytest.mark.parametrize("key", EVERY_PEER)
def test_a_peer_without_a_copy_says_so(key, copies):
    variant: Any = EVERY_PEER[key]
    setting: Any = SMALL if key in MIXED_PEERS else replace(STEP, dtype="bfloat16")
    assert "GPU" in variant.missing(setting, "cpu")
    assert "float32" in variant.missing(replace(setting, dtype="float32"), "cuda")
    assert "bench.fetch_peers" in variant.missing(setting, "cuda")


def test_a_copy_is_imported_without_the_rest_of_its_engine(copies):
    write(
        copies / "somebodys",
        {
            "PKG-INFO": "Metadata-Version: 2.1\nName: somebodys\nVersion: 1.2.3\n",
            "somebodys/__init__.py": "raise RuntimeError('the engine starts')",
            "somebodys/ops/__init__.py": "raise RuntimeError('so does this')",
            "somebodys/ops/kernel.py": "from somebodys.log import told\n"
            "from somebodys.ops.tool import half\n"
            "import an_absent_package.deep as other\n"
            "four = half(8) if told == 'log' else None\nnine = other.nine\n",
            "somebodys/ops/tool.py": "def half(n): return n // 2\n",
        },
    )
    modules = ("somebodys.ops.kernel",)
    own = {"somebodys.log": {"told": "log"}}
    foreign = {"an_absent_package": {}, "an_absent_package.deep": {"nine": 9}, "torch": {}}
    peers.load("somebodys", modules, own, foreign)
    kernel = importlib.import_module(modules[0])
    assert (kernel.four, kernel.nine) == (4, 9)
    assert "an_absent_package" not in sys.modules and sys.modules["torch"] is torch
    assert peers.version("somebodys") == "1.2.3"


def test_a_copy_that_does_not_import_is_a_reason(copies):
    write(copies / "somebodys", {"somebodys/kernel.py": "import an_absent_package\n"})
    for _ in range(2):
        with pytest.raises(peers.MissingPeerError, match=r"ModuleNotFoundError.*an_absent_package"):
            peers.load("somebodys", ("somebodys.kernel",), {}, {})


def test_another_of_that_name_is_a_reason(copies, monkeypatch):
    write(copies / "somebodys", {"somebodys/kernel.py": ""})
    monkeypatch.setitem(sys.modules, "somebodys", sys)
    with pytest.raises(peers.MissingPeerError, match="imported already"):
        peers.load("somebodys", ("somebodys.kernel",), {}, {})


def test_a_copy_of_a_clone_is_named_by_its_commit(copies):
    assert peers.version("somebodys") is None
    write(copies / "somebodys", {"COMMIT": "0123456789abcdef0123\n"})
    assert peers.version("somebodys") == "commit 0123456789ab"


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

    def __init__(self, variants=(), broken=()):
        self.device, self.clock = "cpu", OneSet()
        self.variants, self.broken_peers = list(variants), dict(broken)
        self.warmup, self.warmup_seconds, self.mixed_warmup_seconds = 1, 1.0, 1.0

    def skip_if_late(self):
        pass

    def mixed_count(self, seconds):
        return 2

    def rounds_for(self, setting, seconds):
        return 2

    def add_row(self, *found):
        self.found = found
        return {}

    add_mixed = add_row


class FakeBenchmark:
    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds, iterations):
        for _ in range(rounds):
            setup()
            target()


def test_what_fails_in_a_mixed_batch_has_a_reason_and_no_time(monkeypatch):
    monkeypatch.setattr(bench_segmented, "mixed_peers", lambda device: FAILING)
    session = FakeSession(broken={"right": "missing: it breaks the process"})
    bench_segmented.test_segmented_lora(SMALL, FakeBenchmark(), session)
    _, measured, missing, _ = session.found
    assert missing["raises"] == "missing: ValueError: GPU H9000 not supported"
    assert missing["own_assertion"] == "missing: AssertionError: x must be contiguous"
    assert missing["wrong"].startswith("WRONG") and "over the budget" in missing["wrong"]
    assert missing["not_a_number"].startswith("WRONG") and "NaN" in missing["not_a_number"]
    assert missing["right"] == "missing: it breaks the process"
    assert "segmented" in measured and not set(measured) & set(FAILING)
    session = FakeSession()
    bench_segmented.test_segmented_lora(SMALL, FakeBenchmark(), session)
    _, measured, missing, _ = session.found
    assert "right" in measured and "right" not in missing


def test_what_fails_and_is_no_peer_fails_the_run(monkeypatch):
    monkeypatch.setattr(bench_segmented, "mixed_peers", lambda device: {"raises": _OursRaises})
    with pytest.raises(ValueError, match="H9000"):
        bench_segmented.test_segmented_lora(SMALL, FakeBenchmark(), FakeSession())


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
    session = FakeSession(variants=["plain", *failing, "fused"])
    bench_lora_linear.test_lora_linear(STEP, FakeBenchmark(), session)
    _, measured, missing, *_ = session.found
    assert set(measured) == {"plain", "fused"}
    assert missing["half"].startswith("WRONG") and " dx: " in missing["half"]
    assert missing["backward"].startswith("missing: AttributeError")


PROBE = """
import json, os, sys, time
key, rows = sys.argv[1], json.load(sys.stdin)
print(rows[0], flush=True)
if key == "dies":
    print("row-2: an illegal memory access", flush=True)
    os._exit(1)
if key == "aborts":
    os.abort()
if key == "hangs":
    time.sleep(60)
"""


def test_the_probe_finds_those_that_end_their_process():
    keys = ["well", "dies", "also_well", "hangs", "aborts"]
    found = peers_probe.broken(keys, [sys.executable, "-c", PROBE], '["row-1"]', seconds=10.0)
    assert set(found) == {"dies", "hangs", "aborts"}
    assert "exit status 1; row-2: an illegal memory access" in found["dies"]
    assert "stopped after 10 s; row-1" in found["hangs"]
    assert "exit status" in found["aborts"] and "row-1" in found["aborts"]


def test_a_probe_that_tries_nothing_clears_nobody():
    found = peers_probe.broken(["one"], [sys.executable, "-c", "raise SystemExit(3)"], "", 60.0)
    assert "exit status 3; before its first row" in found["one"]
    assert not peers_probe.broken([], ["no-such-command"], "", 60.0)


def test_only_peers_with_a_copy_are_probed(copies):
    rows = ["plain", *TRAINING_PEERS], [STEP], list(MIXED_PEERS), [SMALL]
    assert not peers_probe.broken_here(*rows)
    # No GPU is asked for the rows it is not to measure.
    write(copies / "unsloth", {"PKG-INFO": "Version: 1\n"})
    assert not peers_probe.broken_here(rows[0], [], *rows[2:])
    assert list(peers_probe._rows("unsloth", {"training": [], "mixed": []})) == []


def test_the_report_says_which_peer_ran_and_why_another_did_not():
    times = {"plain": 1e-3, "segmented": 1.1e-3, "vllm": 2e-3}
    run = content(row(SMALL, times), row(SMALL, times), kind="cuda")
    described = {"what": "theirs", "peer": True}
    run["mixed"]["variants"] |= {
        "vllm": described | {"label": "vLLM", "version": "vllm 9.9"},
        "sglang_csgmv": described | {"label": "csgmv", "version": "sglang not copied"},
    }
    for found in run["mixed"]["rows"]:
        found["missing"] = {"sglang_csgmv": "no copy of sglang"}
    lines = peers_report.lines(run)
    assert "vLLM (vllm 9.9): measured in 2 of 2 rows" in lines
    told = "csgmv (sglang not copied): measured in 0 of 2 rows; 2 x no copy of sglang"
    assert told in lines
    run["cache_bytes"] = 2**25
    for text in (report.text(run), report.markdown(run)):
        assert text.count("no copy of sglang") == 1 and told in text
        # Its time, divided by ours.
        assert "vLLM" in text and "1.82" in text


def test_the_picture_has_every_variant(tmp_path):
    pytest.importorskip("matplotlib")
    for key in (VARIANTS | TRAINING_PEERS).keys() - {"plain"}:
        found = {name: {"median_s": 1e-3, "q1_s": 1e-3, "q3_s": 1e-3} for name in ("plain", key)}
        run = {
            "device": {"kind": "cuda", "name": "a GPU"},
            "variants": {
                name: {"label": name} for name in ("plain", key, "merged", "a peer without a row")
            },
            "rows": [{"setting": asdict(STEP), "variants": found}],
            "date": "today",
            "versions": {"torch": "2"},
        }
        picture(run, tmp_path / f"{key}.png")
        assert (tmp_path / f"{key}.png").stat().st_size > 1000


def test_the_run_on_a_gpu_passes_the_folder_on():
    (bench,) = [
        s for s in gpu.stages(Path("out"), 60, True, Path("elsewhere")) if s.name == "bench"
    ]
    place = bench.command.index("--peers")
    assert bench.command[place + 1] == "elsewhere"


SOURCE = fetch_peers.Source("somebodys", None, ("somebodys/ops/*_op.py", "somebodys/plans/*.json"))
FILES = {
    "somebodys/ops/shrink_op.py": "kernel = 1",
    "somebodys/ops/server.py": "raise SystemExit",
    "somebodys/ops/deep/more_op.py": "",
    "somebodys/plans/H200.json": "{}",
    "somebodys/vendor/LICENSE": "of another",
}
PAPERS = {"LICENSE": "theirs", "PKG-INFO": "Version: 7\n"}
COLLECTED = ["LICENSE", "PKG-INFO", "somebodys/ops/shrink_op.py", "somebodys/plans/H200.json"]


def test_a_copy_holds_the_files_it_needs(tmp_path):
    origin, target = tmp_path / "origin", tmp_path / "target"
    write(origin, FILES | PAPERS)
    write(target / "somebodys", {"somebodys/ops/of_an_earlier_op.py": ""})
    assert fetch_peers.collect(SOURCE, origin, target) == COLLECTED
    found = [p.relative_to(target / "somebodys") for p in target.rglob("*") if p.is_file()]
    assert sorted(map(str, found)) == COLLECTED
    assert (target / "somebodys" / "LICENSE").read_text() == "theirs"


def test_a_copy_comes_from_a_wheel_or_a_clone(tmp_path):
    wheel, target = tmp_path / "somebodys-7.whl", tmp_path / "target"
    with zipfile.ZipFile(wheel, "w") as file:
        for name, text in FILES.items():
            file.writestr(name, text)
        for name, text in (("METADATA", "Version: 7\n"), ("licenses/LICENSE", "theirs")):
            file.writestr(f"somebodys-7.dist-info/{name}", text)
    collected = fetch_peers.collect(SOURCE, wheel, target)
    assert collected == ["LICENSE", "METADATA", *COLLECTED[2:]]

    clone = tmp_path / "clone"
    write(clone, FILES)
    git = ["git", "-C", str(clone), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    fetch_peers.collect(SOURCE, clone, target)
    assert len((target / "somebodys" / "COMMIT").read_text().strip()) == 40


def test_an_origin_without_the_files_is_refused(tmp_path):
    write(tmp_path / "origin", PAPERS)
    with pytest.raises(SystemExit, match="none of the files"):
        fetch_peers.collect(SOURCE, tmp_path / "origin", tmp_path / "target")


def test_git_ignores_the_copies():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert f"{peers.DEFAULT_DIRECTORY.relative_to(ROOT)}/" in ignored


# Those of metadata alone are built by the others too.
@pytest.mark.parametrize("key", [key for key in EVERY_PEER if not key.endswith("_table")])
def test_a_peer_is_right_in_the_interpreter(key):
    directory = peers.DEFAULT_DIRECTORY
    if not (directory / EVERY_PEER[key].package).is_dir():
        pytest.skip(f"no copy of {EVERY_PEER[key].package} (python -m bench.fetch_peers)")
    done = subprocess.run(
        [sys.executable, "-m", "tests.peers_interpreted", str(directory), key],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert done.stdout.count(": right") == (5 if key in MIXED_PEERS else 4 - (key == "lorafusion"))
    assert ("told wrong slots" in done.stdout) == (key in MIXED_PEERS)
