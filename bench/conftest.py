"""Options of ``pytest bench``, the session that its rows share, and the report at the end."""

from __future__ import annotations

import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_kernels.planning.device import facts

from . import cases, peers, report, segmented_cases
from .baselines import VARIANTS, Variant, version
from .command import OUT
from .measure import CpuClock, CudaClock, roofline
from .peers_serving import MIXED_PEERS, mixed_peers
from .rows import Prepared
from .segmented_baselines import MIXED_VARIANTS
from .tables import write

# Seconds of samples per row, and at least so many rounds, more for the few tokens whose times
# scatter more.
_SECONDS, _FEWEST = 1.5, 5
_FEW_TOKENS, _FEWEST_OF_FEW_TOKENS = 128, 30
_VARIANTS = VARIANTS | peers.TRAINING_PEERS
_EVERY = _VARIANTS | MIXED_VARIANTS | MIXED_PEERS


def _shape(text: str) -> cases.Shape:
    m, k, n = map(int, text.split("x"))
    return m, k, n


# What a part of each list is, and its meaning.
_LISTS: dict[str, tuple[Any, str, str]] = {
    "--shapes": (_shape, "MxKxN", "tokens x in_features x out_features, for each row"),
    "--dtypes": (cases.DTYPES.__getitem__, "NAME", ", ".join(cases.DTYPES)),
    "--ranks": (int, "R", "ranks of the adapter"),
    "--dropout": (float, "P", "dropout probabilities of the adapter's input"),
    "--modes": (str, "NAME", f"{', '.join(cases.MODES)} (and backward)"),
    "--baselines": (str, "NAME", f"beside ours, of {', '.join(_EVERY)}"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("bench", "throughput of the fused LoRA layer").addoption
    for name, (_, part, text) in _LISTS.items():
        add(name, metavar=f"{part},...", help=text)
    add("--bench-device", choices=("cpu", "cuda"), help="default cuda where there is one")
    add("--report-dir", type=Path, default=OUT, metavar="DIR", help="where the report is written")
    text = "copies of others' kernels, measured on a GPU"
    add("--peers", type=Path, default=peers.DEFAULT_DIRECTORY, metavar="DIR", help=text)
    add("--quick", action="store_true", help="a few small rows, to see that all of it works")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        raise pytest.UsageError("bench measures one thing at a time: run it without -n")
    config.stash[_SESSION] = Session(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[_SESSION]
    for name, found in (("setting", session.settings), ("mixed", session.mixed_settings)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, found, ids=str)


# After pytest-benchmark's own tables: the report is what the run ends with.
@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    if session.rows or session.mixed_rows:
        for outcome in ("failed", "error"):
            items = terminalreporter.stats.get(outcome, [])
            session.unmeasured[outcome] = [item.nodeid.rpartition("[")[2][:-1] for item in items]
        content = session.content()
        page = report.markdown(content)
        directory = config.getoption("--report-dir")
        write(content, page.splitlines(), directory, "results")
        terminalreporter.section("throughput")
        terminalreporter.write_line(f"{page}\nwrote {directory / 'results'}.json, results.md")


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    found = request.config.stash[_SESSION]
    found.begin()
    return found


class Session:
    """What one run of the benchmarks was asked for, and what it has found so far."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        asked = {name: _parsed(name, option(name)) for name in _LISTS}
        self.quick = option("--quick")
        self.device = option("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")
        of_rows: dict[str, Any] = {
            name[2:]: asked[name] for name in ("--shapes", "--ranks", "--modes")
        }
        of_rows["dropouts"] = asked["--dropout"]
        common: dict[str, Any] = {"dtypes": asked["--dtypes"], "quick": self.quick}
        self.settings = cases.settings(self.device, **of_rows, **common)
        # Who asks for rows of the fused layer wants those.
        mixed = not any(of_rows.values())
        self.mixed_settings = segmented_cases.mixed_settings(self.device, **common) if mixed else []
        peers.use(option("--peers").resolve())
        known = MIXED_VARIANTS | mixed_peers(self.device)
        chosen = asked["--baselines"]
        self.variants = [*(_usual(self.device, self.quick) if chosen is None else chosen), "fused"]
        self.variants = [key for key in _VARIANTS if key in self.variants]
        self.mixed_variants = {
            key: variant
            for key, variant in known.items()
            if chosen is None or key in (*chosen, "segmented", "fused")
        }
        self.rows: list[dict[str, Any]] = []
        self.mixed_rows: list[dict[str, Any]] = []
        self.unmeasured: dict[str, list[str]] = {}
        self.started = time.gmtime()

    def begin(self) -> None:
        """Measure the machine; asked for by the first row, so collecting touches no device."""
        self.clock = CudaClock() if self.device == "cuda" else CpuClock()
        dtypes = list(dict.fromkeys(setting.dtype for setting in self.settings))
        self.roofline = roofline(self.clock, self.device, dtypes)

    def rounds_for(self, setting: Any, seconds: float) -> int:
        """How many rounds a row has, one of which takes so many seconds."""
        if self.quick:
            return _FEWEST
        few = isinstance(setting, cases.Setting) and setting.m <= _FEW_TOKENS
        fewest = _FEWEST_OF_FEW_TOKENS if few else _FEWEST
        return min(max(int(_SECONDS / seconds), fewest), self.clock.rounds)

    def add_row(
        self, setting: Any, measured: dict[str, dict[str, float]], found: Prepared
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "setting": asdict(setting),
            "variants": measured,
            "missing": found.missing,
        }
        row |= {"backend": self.device, "plans": found.plans, "packed_copies": found.copies}
        (self.rows if isinstance(setting, cases.Setting) else self.mixed_rows).append(row)
        return row

    def content(self) -> dict[str, Any]:
        """All that the report says, as JSON."""
        device = facts(self.device)
        packages = ("lora_kernels", "torch", "triton", "peft")
        versions = {package: version(package) for package in packages}
        if self.device == "cuda":
            versions["CUDA"] = str(torch.version.cuda)
        return {
            "date": time.strftime("%Y-%m-%d %H:%M UTC", self.started),
            "device": {field.name: getattr(device, field.name) for field in fields(device)},
            "versions": versions,
            "roofline": self.roofline,
            "variants": {key: _described(_VARIANTS[key]) for key in self.variants},
            "rows": self.rows,
            "mixed": {
                "variants": {key: _described(v) for key, v in self.mixed_variants.items()},
                "rows": self.mixed_rows,
            },
            "unmeasured": self.unmeasured,
        }


_SESSION = pytest.StashKey[Session]()


def _described(variant: type[Variant]) -> dict[str, Any]:
    """What a report says about a variant."""
    found = peers.version(variant.package) if variant.peer else None
    named = f"{variant.package} {found or version(variant.package)}"
    return {"label": variant.label, "what": variant.what, "version": named, "peer": variant.peer}


def _parsed(option: str, text: str | None) -> list[Any] | None:
    """The option's list, None if it was not given; a wrong one is an error that names it."""
    if text is None:
        return None
    convert, part, meaning = _LISTS[option]
    try:
        found = [convert(one.strip()) for one in text.split(",") if one.strip()]
    except (ValueError, KeyError):
        raise pytest.UsageError(f"{option}: {text!r} is not {part},...: {meaning}") from None
    every: dict[str, Any] = {"--modes": cases.MODES, "--baselines": _EVERY}
    known = every.get(option, found)
    if unknown := [one for one in found if one not in known]:
        raise pytest.UsageError(f"{option}: there is no {unknown}; there are {', '.join(known)}")
    return found


def _usual(device: str, quick: bool) -> list[str]:
    # Compiling takes longer than all else in a quick run.
    return [
        key
        for key, variant in _VARIANTS.items()
        if device in variant.devices and not (quick and key == "compiled")
    ]
