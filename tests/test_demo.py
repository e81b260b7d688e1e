"""The demo: its text, its arguments, its turns and report, and a small run of all of it."""

from __future__ import annotations

import importlib.util
import json
import re
import threading

import pytest

from bench import demo, demo_report, demo_text
from bench.demo_processes import OURS, PEFT, Turns
from bench.demo_text import DEFAULT_PACKAGE, UserError, finetuning_corpus, split

HAS_PEFT = importlib.util.find_spec("peft") is not None


def write_texts(directory, **texts):
    directory.mkdir(exist_ok=True)
    for name, text in texts.items():
        (directory / f"{name}.txt").write_text(text)
    return directory


def numbered(word, lines):
    return "".join(f"{word} {i}\n" for i in range(lines))


# Text.


def test_default_text_is_one_package_and_pretraining_is_the_rest():
    corpus = finetuning_corpus(None)
    assert len(corpus.train) > 100_000 and len(corpus.held_out) > 10_000
    assert all(DEFAULT_PACKAGE in path.parts for path in corpus.files)
    rest = set(demo_text.library_sources(without=corpus.files))
    assert len(rest) > 100
    assert not corpus.files & {path.resolve() for path in rest}
    assert not any({"test", "tests", "site-packages"} & set(path.parts[-3:]) for path in rest)


def test_pretraining_text_has_none_of_the_package():
    corpus = finetuning_corpus(None)
    pretraining = demo_text.pretraining_text(without=corpus.files)
    assert len(pretraining) > 1_000_000
    for path in corpus.files:
        text = path.read_text()
        assert len(text) < 1000 or text not in pretraining


def test_pretraining_text_has_none_of_the_users_files():
    path = demo_text.standard_library() / "argparse.py"
    text = path.read_text()
    assert text in demo_text.pretraining_text(without=[])
    assert text not in demo_text.pretraining_text(without=finetuning_corpus(str(path)).files)


@pytest.mark.parametrize("text", [numbered("line", 200), "x" * 1000, "two\nlines", "ab", "a\n" * 7])
def test_split_loses_and_repeats_nothing(text):
    train, held_out = split(text)
    assert train + held_out == text
    assert train and held_out and len(held_out) <= max(len(text) / 2, 1)


def test_held_out_text_is_not_trained_on(tmp_path):
    data = write_texts(tmp_path, a=numbered("a", 300), b=numbered("b", 100))
    # A copy, whose training part would hold what the original holds out.
    write_texts(tmp_path / "deeper", copy=numbered("a", 300))
    corpus = finetuning_corpus(str(data))
    train, held_out = set(corpus.train.split("\n")), set(corpus.held_out.split("\n"))
    assert train & held_out <= {""}
    assert len(corpus.files) == 2
    assert {line.split()[0] for line in held_out if line} == {"a", "b"}
    assert len(train | held_out) == 401


def test_directory_skips_what_is_no_text(tmp_path):
    data = write_texts(tmp_path, text=numbered("text", 50), empty="")
    (data / "picture.bin").write_bytes(b"\x89PNG\0\0" * 9)
    (data / "latin.txt").write_bytes(b"caf\xe9\n" * 9)
    write_texts(data / ".hidden", secret="hidden\n" * 9)
    corpus = finetuning_corpus(str(data))
    assert {path.name for path in corpus.files} == {"text.txt"}


def test_text_beyond_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_text, "MAX_BYTES", 1001)
    data = write_texts(tmp_path, a="é" * 900, b="b" * 900)
    corpus = finetuning_corpus(str(data))
    # 1001 bytes end inside the 501st character.
    assert corpus.train.count("é") + corpus.held_out.count("é") == 500
    assert corpus.train.count("b") + corpus.held_out.count("b") == 501


def test_byte_ids_are_the_tokenizers():
    from transformers import ByT5Tokenizer

    from bench.demo_stages import token_ids

    tokenizer = ByT5Tokenizer(extra_ids=0)
    text = "def f():\n\treturn 'naïve €'\x00\x7f\r\n"
    ids = token_ids(tokenizer, text).tolist()
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


# Arguments: one line, and before anything slow.


@pytest.fixture
def nothing_runs(monkeypatch):
    def run_together(*args):
        raise AssertionError("a process was started")

    monkeypatch.setattr(demo, "run_together", run_together)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "{tmp}/missing.txt"], "no file or directory .*missing.txt"),
        (["--data", "{tmp}/binary"], "binary is not text in UTF-8"),
        (["--data", "{tmp}/nothing"], "there is no file in .*nothing"),
        (["--data", "{tmp}/empty.txt"], "no text in .*empty.txt"),
        (["--model", "{tmp}/gpt3"], "no model directory .*gpt3"),
        (["--model", "./gpt3"], "no model directory gpt3"),
        (["--model", "{tmp}/nothing"], "holds no model.*config.json"),
        (["--model", "{tmp}/empty.txt"], "is a file"),
        (["--out", "{tmp}/empty.txt/out"], "cannot write to"),
        (["--context", "64"], "--generated-tokens must be below --context"),
        (["--served-tokens", "256"], "--served-tokens must be below --context"),
    ],
)
def test_wrong_arguments(tmp_path, capsys, arguments, says):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.txt").write_text("\n")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    assert demo.main(["--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(says, error), error


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    "arguments",
    [["--dta", "x"], ["--steps", "0"], ["--steps", "x"], ["--dropout", "1"], ["--rank", "1.5"]],
)
def test_typos(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_only_a_hub_name_may_use_the_network(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert demo.child_environment(None)["HF_HUB_OFFLINE"] == "1"
    assert demo.child_environment(str(tmp_path))["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in demo.child_environment("somebody/some-model")


# Turns.


@pytest.mark.parametrize(("steps", "limit_s"), [(10, 60.0), (8, 60.0), (3, 60.0), (40, 0.0)])
@pytest.mark.parametrize("parties", [1, 2, 3])
def test_turns(parties, steps, limit_s):
    turns = Turns(parties, limit_s, steps_per_turn=4)
    order = []

    def train(party):
        turns.begin(party)
        for step in range(1, steps + 1):
            order.append((party, step))
            if turns.step_done(party, step):
                break
        turns.end(party)
        with turns.alone():
            order.append((party, "done"))

    threads = [threading.Thread(target=train, args=(party,)) for party in range(parties)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    last = 4 if limit_s == 0.0 else steps
    expected = [
        (party, step)
        for first in range(1, last + 1, 4)
        for party in range(parties)
        for step in range(first, min(first + 4, last + 1))
    ]
    assert order[: len(expected)] == expected
    assert sorted(order[len(expected) :]) == [(party, "done") for party in range(parties)]


# All of it, small: the run is made once, the tests look at what it left.


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    data = write_texts(root / "data", words=numbered("word", 500))
    arguments = "--layers 1 --width 32 --context 32 --batch 4 --pretrain-seconds 0.5 --steps 6"
    arguments += " --evaluation-blocks 8 --generated-tokens 8 --prompt word --alpha 12"
    arguments += " --package-steps 80 --served-tokens 6 --stream-batches 4"
    out = root / "out"
    status = demo.main([*arguments.split(), "--data", str(data), "--out", str(out)])
    return status, out, json.loads((out / demo_report.JSON_NAME).read_text())


def test_small_run_passes_its_checks(small_run):
    status, _, content = small_run
    assert status == 0
    assert all(check.passed for check in demo_report.checks(content))
    assert len(demo_report.checks(content)) == (16 if HAS_PEFT else 15)


def test_small_run_writes_its_files(small_run):
    _, out, content = small_run
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written >= {
        "demo.json",
        "demo.txt",
        "demo.png",
        "base/config.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        ".gitignore",
    }
    packages = content["serving"]["ranks"]
    assert written >= {f"adapters/{name}/adapter_model.safetensors" for name in packages}
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "demo.txt").read_text().splitlines() == demo_report.table(content)


def test_small_run_measures(small_run):
    _, _, content = small_run
    base, runs = content["base"], content["runs"]
    assert list(runs) == ([OURS, PEFT] if HAS_PEFT else [OURS])
    assert base["pretraining"]["losses"] and base["adapted_layers"] == 4
    for run in runs.values():
        assert len(run["losses"]) == len(run["step_seconds"]) == 6
        assert run["tokens_per_step"] == 4 * 32
        assert demo_report.tokens_per_second(run) > 0
        assert run["memory"]["peak"] >= run["memory"]["before"] > 0
        assert abs(run["after"] - runs[OURS]["after"]) < 1e-4
    ours = runs[OURS]
    assert ours["unmerged"] == ours["after"] != base["before"]
    assert {op for op, *_ in ours["answers"]} >= {
        "lora_linear_fwd",
        "lora_linear_dx",
        "lora_linear_dab",
    }
    if HAS_PEFT:
        pairs = zip(ours["losses"], runs[PEFT]["losses"], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-4
        assert not runs[PEFT]["answers"]


def test_small_run_serves(small_run):
    _, _, content = small_run
    serving = content["serving"]
    assert len(serving["ranks"]) == 10 and set(serving["ranks"].values()) == {8, 16}
    together, stream = serving["together"], serving["stream"]
    assert together["same_tokens"] == together["rows"] == 12
    assert together["error_over_budget"] < 1 and together["base_over_budget"] > 100
    assert stream["same_tokens"] == stream["rows"] == 4 * 8
    assert stream["slots"] == 6 and stream["brought_in"] >= 8 and stream["back_again"] > 0
    parties = {"store with eviction", "store with a slot for each", "one merged model at a time"}
    assert set(serving["seconds"]) == parties | {PEFT} if HAS_PEFT else parties
    assert all(seconds > 0 for seconds in serving["seconds"].values())
    assert serving["generated"] == 4 * 8 * 6
    assert {op for op, *_ in serving["answers"]} >= {
        "segmented_linear_fwd",
        "segmented_linear_dx",
        "segmented_lora_dab",
    }


def test_largest_packages_are_the_librarys():
    packages = demo_text.largest_packages(10)
    assert len(packages) == 10 and DEFAULT_PACKAGE not in packages
    for name, corpus in packages.items():
        assert len(corpus.held_out) > 5000
        assert all(name in path.parts for path in corpus.files)
    sizes = [len(corpus.train) + len(corpus.held_out) for corpus in packages.values()]
    # A second copy of a file counts where packages are compared, and is not read.
    assert sizes[0] > sizes[-1]


def test_table_names_its_figures(small_run):
    _, _, content = small_run
    text = "\n".join(demo_report.table(content))
    for words in (
        "held-out loss before",
        "held-out loss after",
        "merged",
        "unmerged again",
        "tokens/s",
        "peak memory",
        "lora_linear_fwd",
        "by the adapted model",
        "generated tokens/s",
        "one merged model at a time",
        "10 adapters",
    ):
        assert words in text


def test_report_without_peft(small_run, tmp_path):
    _, _, content = small_run
    alone = content | {"runs": {OURS: content["runs"][OURS]}}
    assert "comparison was left out" in "\n".join(demo_report.write(alone, tmp_path))
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("merged_difference", 2e-6),
        ("merged_difference", float("nan")),
        ("loaded_difference", 1.0),
        ("objects_restored", False),
        ("weights_restored", False),
        ("answers", []),
    ],
)
def test_a_failed_check_shows(small_run, monkeypatch, capsys, tmp_path, key, value):
    _, _, content = small_run
    runs = content["runs"] | {OURS: content["runs"][OURS] | {key: value}}
    monkeypatch.setattr(demo, "run", lambda args: content | {"runs": runs})
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("together", "same_tokens", 11),
        ("together", "error_over_budget", 1.5),
        ("together", "error_over_budget", float("nan")),
        ("together", "base_over_budget", 2.0),
        ("together", "answers", []),
        ("stream", "same_tokens", 31),
        ("stream", "back_again", 0),
        ("after", "asyncio", 99.0),
        ("others", "asyncio", -99.0),
    ],
)
def test_a_failed_check_of_serving_shows(
    small_run, monkeypatch, capsys, tmp_path, part, key, value
):
    _, _, content = small_run
    serving = content["serving"]
    serving = serving | {part: serving[part] | {key: value}}
    monkeypatch.setattr(demo, "run", lambda args: content | {"serving": serving})
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_without_the_librarys_sources_nothing_is_served(small_run, tmp_path):
    _, _, content = small_run
    lines = "\n".join(demo_report.write(content | {"serving": None}, tmp_path))
    assert "No adapters were served" in lines
    assert len(demo_report.checks(content | {"serving": None})) == (7 if HAS_PEFT else 6)


def test_text_shorter_than_a_batch():
    from transformers import ByT5Tokenizer

    from bench.demo_stages import finetuning_rows

    class Short:
        train_text, held_out_text, context, batch = "a" * 100, "b" * 100, 32, 4

    with pytest.raises(UserError, match="too short: it fills 3 blocks of 32 tokens"):
        finetuning_rows(Short, ByT5Tokenizer(extra_ids=0))
