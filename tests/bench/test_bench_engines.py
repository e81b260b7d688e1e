"""The report of ``bench.engines`` from its JSON; the engines themselves are not started here."""

import json

from bench import engines


def content():
    rows = []
    for hidden in (512, 1024):
        for run, noise in enumerate((1.0, 0.5, 1.1)):
            where = {"engine": "vllm", "hidden": hidden, "workload": "decode", "run": run}
            for mode, adapters, tokens in (("none", 0, 100), ("vllm", 8, 10), ("ours", 8, 85)):
                rate = noise * tokens
                rows.append(where | {"mode": mode, "adapters": adapters, "tokens_per_s": rate})
    settings = {"layers": 4, "dtype": "bfloat16", "requests": 32, "vocabulary": 8192, "runs": 3}
    settings |= {"ranks": (8, 16, 32)}
    about = {"device": "some CPU", "versions": {"torch": "2.13"}}
    profile = {"engine": "vllm", "mode": "ours", "hidden": 512, "profile": {"decode": {"op": 0.5}}}
    return {
        "date": "today",
        "settings": settings,
        "engines": {"vllm": about},
        "rows": rows,
        "profiles": [profile],
        "failures": [],
    }


def test_medians_ratios_and_bars(tmp_path):
    (tmp_path / "engines.json").write_text(json.dumps(content()))
    assert engines.main(["--report", str(tmp_path / "engines.json")]) == 0
    lines = (tmp_path / "engines.md").read_text()
    table = [[cell.strip() for cell in line.split("|")] for line in lines.splitlines()]
    assert ["", "512", "decode", "8", "100", "10", "85", "0.85", "8.50", ""] in table
    outcomes = [line[-2] for line in table if line[-2:-1] and line[-2] in ("met", "missed")]
    assert outcomes == ["met", "met", "missed", "met"]  # 0.85 is enough at 512 alone
    assert "vllm, ours, hidden 512, decode" in lines and "the median of 3 processes" in lines
    assert (tmp_path / "engines.png").stat().st_size > 1000


def test_rows_of_fewer_processes_are_said(tmp_path):
    found = content()
    found["rows"] = [row for row in found["rows"] if row["hidden"] == 512 or row["run"] == 0]
    assert "the median of 1 to 3 processes" in "\n".join(engines.table(found))


def test_a_failure_is_the_exit_status(tmp_path):
    failed = content() | {"failures": ["vllm, ours: answered by none of ours"]}
    (tmp_path / "engines.json").write_text(json.dumps(failed))
    assert engines.main(["--report", str(tmp_path / "engines.json")]) == 1
