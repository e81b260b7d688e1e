"""The demo: its text, its arguments, its turns and report, and a small run of all of it."""

from __future__ import annotations

import importlib.util
import json
import re
import threading

import pytest

from bench.turns import Call, Turns, UserError, run_together
from examples.demo import __main__ as demo
from examples.demo import report, text
from examples.demo.settings import OURS, PEFT, Settings
from examples.demo.text import DEFAULT_PACKAGE, finetuning_corpus, split

HAS_PEFT = importlib.util.find_spec("peft") is not None


def write_texts(directory, **texts):
    directory.mkdir(exist_ok=True)
    for name, content in texts.items():
        (directory / f"{name}.txt").write_text(content)
    return directory


def numbered(word, lines):
    return "".join(f"{word} {i}\n" for i in range(lines))


# Text.


def test_default_text_is_one_package_and_pretraining_is_the_rest():
    corpus = finetuning_corpus(None)
    assert len(corpus.train) > 100_000 and len(corpus.held_out) > 10_000
    assert all(DEFAULT_PACKAGE in path.parts for path in corpus.files)
    rest = set(text.library_sources(without=corpus.files))
    assert len(rest) > 100
    assert not corpus.files & {path.resolve() for path in rest}
    assert not any({"test", "tests", "site-packages"} & set(path.parts[-3:]) for path in rest)


def test_pretraining_text_has_none_of_what_is_fine_tuned_on():
    corpus = finetuning_corpus(None)
    pretraining = text.pretraining_text(without=corpus.files)
    assert len(pretraining) > 1_000_000
    for path in corpus.files:
        source = path.read_text()
        assert len(source) < 1000 or source not in pretraining
    path = text.standard_library() / "argparse.py"
    source = path.read_text()
    assert source in pretraining
    assert source not in text.pretraining_text(without=finetuning_corpus(str(path)).files)


@pytest.mark.parametrize("whole", [numbered("line", 200), "x" * 1000, "ab", "a\n" * 7])
def test_split_loses_and_repeats_nothing(whole):
    train, held_out = split(whole)
    assert train + held_out == whole
    assert train and held_out and len(held_out) <= max(len(whole) / 2, 1)


@pytest.mark.parametrize(("lines", "count"), [(40_000, 10), (500, 3), (20, 1)])
def test_adapters_are_for_parts_of_the_users_text(tmp_path, lines, count):
    data = write_texts(tmp_path, words=numbered("word", lines))
    corpus = finetuning_corpus(str(data))
    found = text.parts(corpus, context=32)
    assert len(found) == count
    pieces = [train + held_out for train, held_out in found.values()]
    assert all(piece in corpus.train + corpus.held_out for piece in pieces)
    assert all(train and held_out for train, held_out in found.values())
    numbers = [set(piece.split("\n")[1:-1]) for piece in pieces]
    assert sum(map(len, numbers)) == len(set().union(*numbers))


def test_largest_packages_are_the_librarys():
    packages = text.largest_packages()
    assert len(packages) == 10 and DEFAULT_PACKAGE not in packages
    assert all(len(held_out) > 5000 for _, held_out in packages.values())


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
    monkeypatch.setattr(text, "MAX_BYTES", 1001)
    data = write_texts(tmp_path, a="é" * 900, b="b" * 900)
    corpus = finetuning_corpus(str(data))
    # 1001 bytes end inside the 501st character.
    assert corpus.train.count("é") + corpus.held_out.count("é") == 500
    assert corpus.train.count("b") + corpus.held_out.count("b") == 501


def test_byte_ids_are_the_tokenizers():
    from transformers import ByT5Tokenizer

    from examples.demo.training import token_ids

    tokenizer = ByT5Tokenizer(extra_ids=0)
    source = "def f():\n\treturn 'naïve €'\x00\x7f\r\n"
    ids = token_ids(tokenizer, source).tolist()
    assert ids == tokenizer(source, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == source


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
        (["--context", "48"], "--context must be above"),
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
    [["--dta", "x"], ["--steps", "0"], ["--alpha", "nan"], ["--dropout", "1"], ["--rank", "1.5"]],
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


def test_processes_answer_in_order_and_pass_on_what_goes_wrong(capfd):
    calls = [Call("math:sqrt", (16.0,)), Call("os:getenv", ("TOLD",))]
    assert run_together(calls, {"TOLD": "yes"}) == [4.0, "yes"]
    with pytest.raises(RuntimeError, match="math:sqrt failed: ValueError"):
        run_together([Call("math:sqrt", (-1.0,))], {})
    with pytest.raises(UserError, match="no file or directory"):
        run_together([Call("examples.demo.text:finetuning_corpus", ("/none",))], {})
    with pytest.raises(RuntimeError, match="exit code 3"):
        run_together([Call("os:_exit", (3,))], {})
    with pytest.raises(RuntimeError, match="not done after 1 s"):
        run_together([Call("time:sleep", (60,))], {}, seconds=1)


# All of it, small: the run is made once, the tests look at what it left.


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    data = write_texts(root / "data", words=numbered("word", 1500))
    out = root / "out"
    settings = Settings(
        out=out,
        data=str(data),
        layers=1,
        width=32,
        context=32,
        batch=4,
        pretrain_seconds=0.5,
        steps=6,
        evaluation_blocks=8,
        adapter_steps=20,
        served_tokens=6,
        stream_batches=4,
    )
    content = demo.run(settings)
    report.write(content, out)
    return out, json.loads((out / report.JSON_NAME).read_text())


def test_small_run_passes_its_checks_and_writes_its_files(small_run):
    out, content = small_run
    assert [check.name for check in report.checks(content) if not check.passed] == []
    assert len(report.checks(content)) == (15 if HAS_PEFT else 14)
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    names = ["demo.json", "demo.txt", "demo.png", ".gitignore", "base/config.json"]
    names += [f"adapters/{name}/adapter_model.safetensors" for name in content["serving"]["ranks"]]
    assert written >= {*names, "adapter/adapter_model.safetensors"}
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_small_run_trains(small_run):
    _, content = small_run
    runs, ours = content["runs"], content["runs"][OURS]
    assert list(runs) == ([OURS, PEFT] if HAS_PEFT else [OURS])
    assert content["base"]["adapted_layers"] == 4
    for run in runs.values():
        assert len(run["losses"]) == 6 and run["tokens_per_second"] > 0
        assert abs(run["after"] - ours["after"]) < 1e-4
    answered = {op for op, *_ in ours["answers"]}
    assert answered >= {"lora_linear_fwd", "lora_linear_dx", "lora_linear_dab"}
    if HAS_PEFT:
        pairs = zip(ours["losses"], runs[PEFT]["losses"], strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-4
        assert not runs[PEFT]["answers"] and ours["saved_bytes"] < runs[PEFT]["saved_bytes"]


def test_small_run_serves_adapters_for_parts_of_the_text(small_run):
    _, content = small_run
    serving = content["serving"]
    assert set(serving["ranks"]) == {f"part-{i}" for i in range(1, 11)}
    together, stream = serving["together"], serving["stream"]
    assert together["same_tokens"] == together["rows"] == 12
    assert together["error_over_budget"] < 1
    assert stream["same_tokens"] == stream["rows"] == 4 * 8
    assert stream["slots"] == 6 and stream["evicted"] >= 8 and stream["back_again"] > 0
    parties = {"store with eviction", "store with a slot for each", "one merged model at a time"}
    assert set(serving["tokens_per_second"]) == parties | ({PEFT} if HAS_PEFT else set())
    answered = {op for op, *_ in serving["answers"]}
    assert answered >= {"segmented_linear_fwd", "segmented_linear_dx", "segmented_lora_dab"}


def test_the_table_says_of_what_and_which_way(small_run, tmp_path):
    _, content = small_run
    lines = "\n".join(report.table(content))
    words = ["held-out loss before", "training tokens/s", "saved activations", "dropout 0.1"]
    words += ["generated tokens/s", "10 adapters", "lora_linear_fwd"]
    words += ["x as fast", "x less", "beside PEFT"] if HAS_PEFT else []
    for word in words:
        assert word in lines
    alone = content | {"runs": {OURS: content["runs"][OURS]}, "serving": None}
    lines = "\n".join(report.write(alone, tmp_path))
    assert "comparison was left out" in lines and "No adapters were served" in lines
    assert (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("ours", "merged_difference", 2e-6),
        ("ours", "merged_difference", float("nan")),
        ("ours", "loaded_difference", 1.0),
        ("ours", "objects_restored", False),
        ("ours", "weights_restored", False),
        ("ours", "answers", []),
        ("together", "same_tokens", 11),
        ("together", "error_over_budget", 1.5),
        ("together", "error_over_budget", float("nan")),
        ("together", "fused_calls", 0),
        ("stream", "same_tokens", 31),
        ("stream", "back_again", 0),
    ],
)
def test_a_failed_check_shows(small_run, monkeypatch, capsys, tmp_path, part, key, value):
    _, content = small_run
    if part == "ours":
        found = {"runs": content["runs"] | {OURS: content["runs"][OURS] | {key: value}}}
    else:
        serving = content["serving"]
        found = {"serving": serving | {part: serving[part] | {key: value}}}
    monkeypatch.setattr(demo, "run", lambda settings: content | found)
    assert demo.main(["--out", str(tmp_path)]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("part", "key", "value"), [("others", "part-1", -99.0), ("together", "base_over_budget", 2.0)]
)
def test_how_well_adapters_learn_is_demanded_of_the_own_text_only(small_run, part, key, value):
    _, content = small_run
    serving = content["serving"]
    found = content | {"serving": serving | {part: serving[part] | {key: value}}}
    assert not content["is_default"] and all(check.passed for check in report.checks(found))
    assert not all(check.passed for check in report.checks(found | {"is_default": True}))


def test_text_shorter_than_a_batch():
    from transformers import ByT5Tokenizer

    from examples.demo.training import finetuning_rows

    short = Settings(train_text="a" * 100, held_out_text="b" * 100, context=32, batch=4)
    with pytest.raises(UserError, match="too short: it fills 3 blocks of 32 tokens"):
        finetuning_rows(short, ByT5Tokenizer(extra_ids=0))
