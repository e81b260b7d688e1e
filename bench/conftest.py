"""Options of ``pytest bench``, the session that its rows share, and the report at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.planning.device import facts

from . import cases, peers, report, segmented_cases
from .baselines import VARIANTS, Variant, version
from .cases import Setting
from .measure import CpuClock, CudaClock, roofline
from .peers_serving import MIXED_PEERS, mixed_peers
from .segmented_baselines import MIXED_VARIANTS, MixedVariant
from .segmented_cases import MixedSetting

# Seconds of samples per row on a CPU, where the count follows from the speed of the row: at least
# so many rounds, more for the few tokens whose times scatter more.
_CPU_SECONDS = 1.5
_FEWEST, _FEWEST_OF_FEW_TOKENS, _MOST = 5, 30, 100
_FEW_TOKENS = 128
_GPU_ROUNDS = 200
# A mixed batch, whose slowest rival takes tens of times as long as ours.
_MIXED_SECONDS = 1.5
_DEVICES = ("cpu", "cuda")
_VARIANTS = VARIANTS | peers.TRAINING_PEERS


_OPTIONS = {
    "--shapes": ("MxKxN,...", "tokens x in_features x out_features, for each row"),
    "--dtypes": ("NAME,...", "fp32, bf16, fp16; default on a CPU fp32,bf16, on a GPU bf16"),
    "--ranks": ("R,...", "ranks of the adapter; default on a CPU 8,16,64, on a GPU 16"),
    "--dropout": ("P,...", "dropout probabilities of the adapter's input"),
    "--modes": ("NAME,...", "forward, training (forward + backward); default both"),
    "--rounds": ("N", "samples of each variant; default on a GPU 200, on a CPU by time"),
    "--warmup": ("N", "rounds before them that do not count; default on a GPU 200, on a CPU 3"),
    "--time-limit": ("S", "skip the rows that would begin after S seconds"),
    "--bench-device": ("NAME", "cpu or cuda; default cuda where there is one"),
    "--report-dir": ("DIR", "where the report is written; default bench/out"),
    "--peers": ("DIR", "copies of others' kernels, measured on a GPU; default bench/peer_copies"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("bench", "throughput of the fused LoRA layer").addoption
    for name, (metavar, text) in _OPTIONS.items():
        add(name, metavar=metavar, help=text)
    defaults = "; ".join(f"on {device} {', '.join(_baselines(device))}" for device in _DEVICES)
    text = f"of {', '.join(_baselines())}; default {defaults}"
    add("--baselines", metavar="NAME,...", help=text)
    add("--quick", action="store_true", help="a few small rows, to see that all of it works")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("bench measures one thing at a time: run it without -n")
    config.stash[_SESSION] = Session(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "setting" in metafunc.fixturenames:
        settings = metafunc.config.stash[_SESSION].settings
        metafunc.parametrize("setting", settings, ids=str)
    if "mixed" in metafunc.fixturenames:
        metafunc.parametrize("mixed", metafunc.config.stash[_SESSION].mixed_settings, ids=str)


# After pytest-benchmark's own tables: the report is what the run ends with.
@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    if not session.rows and not session.mixed_rows:
        return
    for outcome in ("failed", "error", "skipped"):
        session.unmeasured[outcome] = [
            item.nodeid.rpartition("[")[2].rstrip("]")
            for item in terminalreporter.stats.get(outcome, [])
            # Not what stands for a benchmark that was asked for no row.
            if "bench_" in item.nodeid and not item.nodeid.endswith("[NOTSET]")
        ]
    content = session.content()
    terminalreporter.section("throughput")
    terminalreporter.write_line(report.summary(content))
    for line in report.write(content, session.directory):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    found = request.config.stash[_SESSION]
    found.begin()
    return found


class Session:
    """What one run of the benchmarks was asked for, and what it has found so far."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        self.quick = option("--quick")
        self.device = option("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device not in _DEVICES:
            raise pytest.UsageError(f"--bench-device: {self.device!r} is neither cpu nor cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--bench-device: torch sees no CUDA device here")
        self.settings = cases.settings(
            self.device,
            shapes=_parsed(config, "--shapes", cases.parse_shapes),
            dtypes=_parsed(config, "--dtypes", cases.parse_dtypes),
            ranks=_parsed(config, "--ranks", cases.parse_ranks),
            dropouts=_parsed(config, "--dropout", cases.parse_dropouts),
            modes=_parsed(config, "--modes", cases.parse_modes),
            quick=self.quick,
        )
        self.mixed_settings: list[MixedSetting] = []
        # Who asks for rows of the fused layer wants those.
        if not any(map(option, ("--shapes", "--ranks", "--dropout", "--modes"))):
            self.mixed_settings = segmented_cases.mixed_settings(
                self.device,
                dtypes=_parsed(config, "--dtypes", cases.parse_dtypes),
                quick=self.quick,
            )
        chosen = _parsed(config, "--baselines", _parse_baselines)
        # Compiling takes longer than all else in a quick run.
        default = [key for key in _baselines(self.device) if not (self.quick and key == "compiled")]
        self.variants = [*(default if chosen is None else chosen), "fused"]
        peers.use(Path(option("--peers") or peers.DEFAULT_DIRECTORY).resolve())
        self.broken_peers: dict[str, str] = {}
        self.rounds = _parsed(config, "--rounds", _parse_count)
        clock = CudaClock if self.device == "cuda" else CpuClock
        warmup = _parsed(config, "--warmup", _parse_count)
        self.warmup = clock.warmup if warmup is None else warmup
        self.warmup_seconds = clock.warmup_seconds if warmup is None else math.inf
        self.mixed_warmup_seconds = min(self.warmup_seconds, _MIXED_SECONDS)
        if warmup is not None:
            self.mixed_warmup_seconds = math.inf
        self.time_limit = _parsed(config, "--time-limit", _parse_count)
        default_directory = Path(__file__).parent / "out"
        self.directory = Path(option("--report-dir") or default_directory)
        self.rows: list[dict[str, Any]] = []
        self.mixed_rows: list[dict[str, Any]] = []
        self.unmeasured: dict[str, list[str]] = {}
        self.started = time.time()

    def begin(self) -> None:
        """Measure the machine and try the peers; asked for by the first row, so collecting touches
        no device."""
        self.clock = CudaClock() if self.device == "cuda" else CpuClock()
        dtypes = list(dict.fromkeys(setting.dtype for setting in self.settings))
        self.roofline = roofline(self.clock, self.device, dtypes)
        if self.device == "cuda":
            tried = [(key, self.settings) for key in self.variants if key in peers.TRAINING_PEERS]
            tried += [(key, self.mixed_settings) for key in mixed_peers("cuda")]
            known = peers.TRAINING_PEERS | MIXED_PEERS
            copied = {
                key: rows for key, rows in tried if rows and peers.version(known[key].package)
            }
            self.broken_peers = peers.broken_here(copied)

    def skip_if_late(self) -> None:
        if self.time_limit is not None and time.time() - self.started > self.time_limit:
            pytest.skip(f"the time limit of {self.time_limit} s is over")

    def rounds_for(self, setting: Setting, seconds: float) -> int:
        if self.rounds is not None:
            return self.rounds
        if self.quick:
            return 5
        if self.device == "cuda":
            return _GPU_ROUNDS
        fewest = _FEWEST_OF_FEW_TOKENS if setting.m <= _FEW_TOKENS else _FEWEST
        return min(max(int(_CPU_SECONDS / seconds), fewest), _MOST)

    def mixed_count(self, seconds: float) -> int:
        """The rounds of a mixed batch, one of which takes so many seconds."""
        if self.rounds is not None or self.quick:
            return self.rounds or 5
        most = _GPU_ROUNDS if self.device == "cuda" else _MOST
        return min(max(int(_MIXED_SECONDS / seconds), _FEWEST), most)

    def add_row(
        self,
        setting: Setting | MixedSetting,
        variants: dict[str, dict[str, float]],
        missing: dict[str, str],
        plans: dict[str, dict[str, str]],
        copies: dict[str, int] | None = None,
    ) -> dict[str, Any]:
        row = {
            "setting": asdict(setting),
            "variants": variants,
            "missing": missing,
            "backend": self.device,
            "plans": plans,
        }
        if isinstance(setting, MixedSetting):
            self.mixed_rows.append(row)
        else:
            work = {"adapter": setting.work(True), "plain": setting.work(False)}
            row |= {"work": work, "packed_copies": copies}
            self.rows.append(row)
        return row

    def content(self) -> dict[str, Any]:
        """All that the report says, as JSON."""
        device = facts(self.device)
        packages = ("lora_kernels", "torch", "triton", "peft")
        versions = {package: version(package) for package in packages}
        if torch.version.cuda and self.device == "cuda":
            versions["CUDA"] = torch.version.cuda
        return {
            "format": 1,
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.started)),
            "device": {field.name: getattr(device, field.name) for field in fields(device)},
            "versions": versions,
            "roofline": self.roofline,
            "cache_bytes": self.clock.cache_bytes,
            "warmup": self.warmup,
            "variants": {
                key: _described(_VARIANTS[key])
                | {"work": "adapter" if _VARIANTS[key].computes == "lora" else "plain"}
                for key in self.variants
            },
            "rows": self.rows,
            "mixed": {
                "variants": {
                    key: _described(variant)
                    for key, variant in (MIXED_VARIANTS | mixed_peers(self.device)).items()
                },
                "rows": self.mixed_rows,
            },
            "unmeasured": self.unmeasured,
        }


_SESSION = pytest.StashKey[Session]()


def _described(variant: type[Variant] | type[MixedVariant]) -> dict[str, Any]:
    """What a report says about a variant."""
    if variant.peer:
        named = f"{variant.package} {peers.version(variant.package) or 'not copied'}"
        return {"label": variant.label, "what": variant.what, "version": named, "peer": True}
    named = f"{variant.package} {version(variant.package)}"
    return {"label": variant.label, "what": variant.what, "version": named}


def _parsed(config: pytest.Config, option: str, parse: Callable[[str], Any]) -> Any:
    """The option's value, None if it was not given; a wrong one is an error that names it."""
    text = config.getoption(option)
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise pytest.UsageError(f"{option}: {error}") from None


def _baselines(device: str | None = None) -> list[str]:
    """Those measured by default on a device, or all."""
    return [
        key
        for key, variant in _VARIANTS.items()
        if key != "fused" and (device is None or device in variant.devices)
    ]


def _parse_baselines(text: str) -> list[str]:
    chosen = [part.strip() for part in text.split(",") if part.strip()]
    for key in chosen:
        if key not in _baselines():
            raise ValueError(f"{key!r} is no baseline; there are {', '.join(_baselines())}")
    return [key for key in _baselines() if key in chosen]


def _parse_count(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise ValueError(f"{text!r} is no whole number from 1")
    return int(text)
