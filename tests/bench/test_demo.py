"""The demo: its text, its arguments and report, and a small run of all of it."""

import json
import re

import pytest

from examples.demo import __main__ as demo
from examples.demo import report, text
from examples.demo.settings import OURS, PEFT, Settings, UserError
from examples.demo.text import DEFAULT_PACKAGE, finetuning_corpus

pytest.importorskip("peft")


def write_texts(directory, **texts):
    directory.mkdir(exist_ok=True)
    for name, content in texts.items():
        (directory / f"{name}.txt").write_text(content)
    return directory


def numbered(word, lines):
    return "".join(f"{word} {i}\n" for i in range(lines))


def test_pretraining_text_has_none_of_what_is_fine_tuned_on():
    corpus = finetuning_corpus(None)
    assert len(corpus.train) > 100_000 and len(corpus.held_out) > 10_000
    assert all(DEFAULT_PACKAGE in path.parts for path in corpus.files)
    own = text.standard_library() / "argparse.py"
    pretraining = text.pretraining_text(without=finetuning_corpus(str(own)).files)
    assert len(pretraining) > 1_000_000
    for path in (*corpus.files, own):
        source = path.read_text()
        assert len(source) < 1000 or source not in pretraining
    assert (text.standard_library() / "pathlib.py").read_text() in pretraining


def test_adapters_are_for_packages_or_parts_of_the_users_text(tmp_path):
    packages = text.largest_packages()
    assert len(packages) == 10 and DEFAULT_PACKAGE not in [corpus.name for corpus in packages]
    assert all(len(corpus.held_out) > 5000 for corpus in packages)
    for lines, count in ((40_000, 10), (500, 3), (20, 1)):
        corpus = finetuning_corpus(str(write_texts(tmp_path, words=numbered("word", lines))))
        found = text.parts(corpus, context=32)
        assert len(found) == count and all(part.train and part.held_out for part in found)
        pieces = [part.train + part.held_out for part in found]
        assert all(piece in corpus.train + corpus.held_out for piece in pieces)
        numbers = [set(piece.split("\n")[1:-1]) for piece in pieces]
        assert sum(map(len, numbers)) == len(set().union(*numbers))


def test_held_out_text_is_not_trained_on(tmp_path, monkeypatch):
    for whole in (numbered("line", 200), "x" * 1000, "ab", "a\n" * 7):
        train, held_out = text.split(whole)
        assert train + held_out == whole
        assert train and held_out and len(held_out) <= max(len(whole) / 2, 1)
    data = write_texts(tmp_path, a=numbered("a", 300), b=numbered("b", 100), empty="")
    # A copy, whose training part would hold what the original holds out; and what is no text.
    write_texts(tmp_path / "deeper", copy=numbered("a", 300))
    write_texts(tmp_path / ".hidden", secret="hidden\n" * 9)
    (data / "picture.bin").write_bytes(b"\x89PNG\0\0" * 9)
    (data / "latin.txt").write_bytes(b"caf\xe9\n" * 9)
    corpus = finetuning_corpus(str(data))
    train, held_out = set(corpus.train.split("\n")), set(corpus.held_out.split("\n"))
    assert train & held_out <= {""} and len(train | held_out) == 401 and len(corpus.files) == 2
    assert {line.split()[0] for line in held_out if line} == {"a", "b"}
    monkeypatch.setattr(text, "MAX_CHARACTERS", 1000)
    corpus = finetuning_corpus(str(write_texts(tmp_path / "long", a="é" * 900, b="b" * 900)))
    assert (corpus.train + corpus.held_out).count("é") == 900
    assert (corpus.train + corpus.held_out).count("b") == 100


def test_byte_ids_are_the_tokenizers():
    from transformers import ByT5Tokenizer

    from examples.demo.training import token_ids

    tokenizer = ByT5Tokenizer(extra_ids=0)
    source = "def f():\n\treturn 'naïve €'\x00\x7f\r\n"
    ids = token_ids(tokenizer, source).tolist()
    assert ids == tokenizer(source, add_special_tokens=False).input_ids


WRONG = {
    "no data": (["--data", "{tmp}/missing.txt"], "no file or directory .*missing.txt"),
    "binary": (["--data", "{tmp}/binary"], "no text in UTF-8 in .*binary"),
    "no file": (["--data", "{tmp}/nothing"], "no text in UTF-8 in .*nothing"),
    "no text": (["--data", "{tmp}/empty.txt"], "no text in UTF-8 in .*empty.txt"),
    "too short": (["--data", "{tmp}/short.txt"], "too short: it fills 9 blocks of 64 tokens"),
    "no model": (["--model", "{tmp}/gpt3"], "no model directory .*gpt3"),
    "relative": (["--model", "./gpt3"], "no model directory gpt3"),
    "no config": (["--model", "{tmp}/nothing"], "holds no model.*config.json"),
    "a file": (["--model", "{tmp}/empty.txt"], "is a file"),
    "no folder": (["--out", "{tmp}/empty.txt/out"], "cannot write to"),
}


def test_wrong_arguments_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "nothing").mkdir()
    write_texts(tmp_path, empty="\n", short="a" * 640)
    for what, (arguments, says) in WRONG.items():
        arguments = [argument.format(tmp=tmp_path) for argument in arguments]
        out = ["--out", str(tmp_path / "out"), "--context", "64", "--batch", "20"]
        assert demo.main([*out, *arguments]) == 2, what
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1, what
        assert re.search(says, error), error
    for option in (["--dta", "x"], ["--steps", "0"], ["--alpha", "nan"], ["--dropout", "1"]):
        with pytest.raises(SystemExit) as stopped:
            demo.main(option)
        assert stopped.value.code == 2 and option[0] in capsys.readouterr().err


def test_only_a_hub_name_may_use_the_network(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not demo.may_use_the_network(None) and not demo.may_use_the_network(str(tmp_path))
    assert demo.may_use_the_network("someone/some-model")
    with pytest.raises(UserError):
        demo.may_use_the_network("/no/such/model")


# All of it, small: the run is made once, the tests look at what it left.


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    data = write_texts(root / "data", words=numbered("word", 1500))
    small = {"layers": 1, "width": 32, "context": 32, "batch": 4, "steps": 6, "adapter_steps": 20}
    small |= {"evaluation_blocks": 8, "served_tokens": 6, "stream_batches": 4}
    settings = Settings(out=root / "out", data=str(data), pretrain_seconds=0.5, **small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        demo.prepare_environment(settings)
        content = demo.run(settings)
    report.write(content, settings.out)
    return settings.out, json.loads((settings.out / "demo.json").read_text())


def test_small_run_passes_its_checks_and_writes_its_files(small_run):
    out, content = small_run
    assert [check for check in report.checks(content) if not check.passed] == []
    assert len(report.checks(content)) == 17
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    names = [f"adapters/{name}/adapter_model.safetensors" for name in content["serving"]["ranks"]]
    assert written >= {*names, *report.NAMES, ".gitignore", "adapter/adapter_model.safetensors"}
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_small_run_trains_and_serves(small_run):
    _, content = small_run
    runs, ours, serving = content["runs"], content["runs"][OURS], content["serving"]
    assert list(runs) == [OURS, PEFT] and content["base"]["adapted_layers"] == 4
    assert 1e-8 < ours["rounding"] < 5e-7
    for run in runs.values():
        assert len(run["losses"]) == 6 and run["tokens_per_second"] > 0
        assert abs(run["after"] - ours["after"]) < 1e-4
    pairs = zip(ours["losses"], runs[PEFT]["losses"], strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-4
    assert ours["saved_bytes"] < runs[PEFT]["saved_bytes"]
    answered = {op for op, *_ in ours["answers"]}
    assert answered >= {"lora_linear_fwd", "lora_linear_dx", "lora_linear_dab"}
    assert set(serving["ranks"]) == {f"part-{i}" for i in range(1, 11)}
    four = content["four_bits"]
    assert len(four["losses"]) == 6 and abs(four["after"] - ours["after"]) < 0.1
    assert 0 < abs(four["before"] - content["base"]["before"]) < 0.1 and four["difference"] > 1e-3
    assert four["weight_bytes"] < ours["weight_bytes"] / 2
    assert 0.9 < four["peak_bytes"] / ours["peak_bytes"] < 1.1
    together, stream = serving["together"], serving["stream"]
    assert together["same_tokens"] == together["rows"] == 12
    assert stream["same_tokens"] == stream["rows"] == 4 * 8
    assert stream["slots"] == 6 and stream["evicted"] >= 8 and stream["back_again"] > 0
    parties = ["store with a slot for each", "store with eviction", PEFT]
    assert [*serving["tokens_per_second"]] == [*parties, "one merged model at a time"]
    answered = {op for op, *_ in serving["answers"]}
    assert answered >= {"segmented_linear_fwd", "segmented_linear_dx", "segmented_lora_dab"}


def test_the_page_says_of_what_and_which_way(small_run, tmp_path):
    _, content = small_run
    twice = json.loads(json.dumps(content))
    for run, factor in ((twice["runs"][OURS], 2.0), (twice["runs"][PEFT], 1.0)):
        run |= {"tokens_per_second": 100 * factor, "saved_bytes": 3e6 / factor}
    speeds = twice["serving"]["tokens_per_second"]
    speeds |= dict(zip(speeds, (300.0, 150.0, 200.0, 100.0), strict=True))
    twice["runs"][OURS] |= {"weight_bytes": 8e6, "peak_bytes": 5e8}
    twice["four_bits"] |= {"weight_bytes": 1e6, "peak_bytes": 4e8, "tokens_per_second": 250.0}
    lines = report.table(twice)
    for line in (
        *("training tokens/s .* 200 +100 +2.00x as fast", "MB, dropout 0.1 +1.5 +3.0 +2.00x less"),
        *("a slot for each +300 +1.50x as fast", "PEFT, adapter_names= +200 +1.00x as fast"),
        "with eviction +150 +0.75x as fast",
        *("weights below .* 8.00 +1.00 +8.00x less", "peak of a step.* 500.0 +400.0 +1.25x less"),
        "training tokens/s +200 +250 +1.25x as fast",
    ):
        assert any(re.search(line, found) for found in lines), line
    alone = content | {"runs": {OURS: content["runs"][OURS]}, "serving": None}
    lines = "\n".join(report.write(alone, tmp_path))
    assert "comparison was left out" in lines and "No adapters were served" in lines
    assert (tmp_path / "demo.png").exists()


FAILURES = (
    *(("ours", "merged_difference", value) for value in (2e-6, float("nan"))),
    *(("ours", "loaded_difference", 1.0), ("ours", "objects_restored", False)),
    *(("ours", "weights_restored", False), ("ours", "answers", [])),
    *(("together", "same_tokens", 11), ("together", "fused_calls", 0)),
    *(("together", "difference", value) for value in (1e-3, float("nan"))),
    *(("stream", "same_tokens", 31), ("stream", "back_again", 0)),
    ("four_bits", "weight_bytes", 30_000),
)


def test_a_failed_check_shows(small_run, monkeypatch, capsys, tmp_path):
    _, content = small_run
    for part, key, value in FAILURES:
        if part == "ours":
            found = {"runs": content["runs"] | {OURS: content["runs"][OURS] | {key: value}}}
        elif part == "four_bits":
            found = {part: content[part] | {key: value}}
        else:
            serving = content["serving"]
            found = {"serving": serving | {part: serving[part] | {key: value}}}
        monkeypatch.setattr(demo, "run", lambda settings, found=found: content | found)
        monkeypatch.setattr(report, "picture", lambda *arguments: None)
        assert demo.main(["--out", str(tmp_path)]) == 1, key
        assert capsys.readouterr().out.count("FAILED") == 1, key


def test_how_well_adapters_learn_is_demanded_of_the_own_text_only(small_run):
    _, content = small_run
    serving, four = content["serving"], content["four_bits"]
    others, together = serving["others"], serving["together"]
    ours = content["runs"][OURS]["after"]
    assert not content["is_default"]
    assert all(check.passed for check in report.checks(content | {"is_default": True}))
    for change in (
        {"serving": serving | {"others": others | {"part-1": -99.0}}},
        {"serving": serving | {"together": together | {"base_difference": 1e-5}}},
        *({"four_bits": four | change} for change in ({"after": 1.03 * ours}, {"difference": 0.2})),
    ):
        found = content | change
        assert all(check.passed for check in report.checks(found))
        failed = [c for c in report.checks(found | {"is_default": True}) if not c.passed]
        assert len(failed) == 1, change
