"""The study as a whole: its command line, its report, and what it does not measure twice."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from examples.study import QUESTIONS, lab, wording
from examples.study import __main__ as study

SOURCES = Path(study.__file__).parent


def test_every_question_is_listed_and_short():
    modules = {path.stem for path in SOURCES.glob("*.py")}
    frame = {"__init__", "__main__", "settings", "lab", "report", "wording", "houlsby"}
    assert modules - frame == set(QUESTIONS)
    page = (SOURCES.parents[1] / "docs" / "study.md").read_text()
    for number, name in enumerate(QUESTIONS, 1):
        assert len((SOURCES / f"{name}.py").read_text().splitlines()) <= 150, name
        question = import_module(f"examples.study.{name}").QUESTION
        assert f"| {number} `{name}` | {question} |" in page


def test_all_of_it_ends_in_a_report(tiny):
    assert tiny() == 0
    pages = {name: (tiny.out / name).read_text() for name in ("report.md", "report.html")}
    assert pages["report.html"].count("data:image/png;base64,") == len(QUESTIONS)
    assert not re.search(r'(src|href)="(?!data:|#)', pages["report.html"])
    for number, name in enumerate(QUESTIONS, 1):
        question = import_module(f"examples.study.{name}")
        content = json.loads((tiny.out / f"{name}.json").read_text())["content"]
        head, body = question.table(content)
        assert len(body) >= 2 and {len(line) for line in body} == {len(head)}, name
        assert f"## {number}. {question.QUESTION}\n" in pages["report.md"]
        assert f"**{question.finding(content)}**\n" in pages["report.md"]
        assert f"]({name}.png)" in pages["report.md"]
        assert (tiny.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_measured_twice(tiny, monkeypatch, capsys):
    name = QUESTIONS[0]
    content, question = tiny.content(name), import_module(f"examples.study.{name}")
    calls = []

    def pretrain(*arguments):
        raise AssertionError("pre-trained again")

    monkeypatch.setattr(lab.training, "pretrain", pretrain)
    monkeypatch.setattr(question, "measure", lambda lab: calls.append(lab) or content)
    assert tiny(name) == 0 and tiny("1") == 0
    assert not calls and "measured before" in capsys.readouterr().out
    assert tiny(name, "--again") == 0 and len(calls) == 1
    made_from = json.loads((tiny.out / f"{name}.json").read_text())["made_from"]
    assert study._result(tiny.out, name, made_from)["content"] == content
    for key in made_from:
        assert study._result(tiny.out, name, made_from | {key: "other"}) is None, key
    (tiny.out / "cut.json").write_text('{"made_from": ')
    assert study._result(tiny.out, "cut", made_from) is None


def test_what_fails_or_cannot_be_asked_spares_the_others(tiny, monkeypatch, capsys):
    first, second = (import_module(f"examples.study.{name}") for name in QUESTIONS[:2])
    before = {name: tiny.content(name) for name in QUESTIONS[:2]}

    def refused(lab_):
        raise lab.Unanswered("this model has no such layers")

    def broken(lab_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(first, "measure", refused)
    assert tiny(QUESTIONS[0], QUESTIONS[1], "--again") == 0
    assert f"No answer to 1, {QUESTIONS[0]}: this model has" in capsys.readouterr().out
    page = (tiny.out / "report.md").read_text()
    assert "this model has no such layers" in page and f"## 1. {first.QUESTION}" not in page
    monkeypatch.setattr(first, "measure", broken)
    assert tiny(QUESTIONS[0]) == 1
    assert f"## 2. {second.QUESTION}" in (tiny.out / "report.md").read_text()
    assert "ZeroDivisionError: oh" in (tiny.out / "report.md").read_text()
    monkeypatch.setattr(first, "measure", lambda lab_: before[QUESTIONS[0]])
    assert tiny(QUESTIONS[0]) == 0


def test_wrong_arguments_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("")
    wrong = {
        ("rnak",): r"no question 'rnak'; there are 1 rank, .* merging",
        ("0",): "no question '0'",
        ("99",): "no question '99'",
        ("rank", "--data", f"{tmp_path}/missing.txt"): "no file or directory .*missing.txt",
        ("rank", "--model", f"{tmp_path}/missing"): "no model directory .*missing",
        ("rank", "--out", f"{tmp_path}/file/out"): "cannot write to",
    }
    for arguments, says in wrong.items():
        assert study.main(["--out", str(tmp_path / "out"), *arguments]) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert re.search(says, error), error


def test_a_difference_must_be_beyond_the_seeds():
    assert wording.gap([2.0, 3.0, 4.0], [1.0, 2.0, 3.1]) == pytest.approx(2.9 / 3)
    assert wording.gap([1.0, 2.0], [1.1, 1.9]) == 0
    assert wording.change([1.0, 1.0], [2.0, 2.1]) == "falls by 1.0500"
    assert wording.change([2.0, 2.1], [1.0, 1.0]) == "rises by 1.0500"
    assert wording.change([1.0, 2.0], [1.1, 1.9]) == f"shows {wording.NO_DIFFERENCE}"
    assert wording.times(2, 1, "slower", "faster") == "2.00x slower"
    assert wording.times(1, 2, "slower", "faster") == "2.00x faster"
    assert wording.times(1, 1.001, "slower", "faster") == "the same"
    assert wording.spread([1.0, 1.5], 2) == "1.25 ± 0.25" and wording.spread([1.0], 2) == "1.00"
