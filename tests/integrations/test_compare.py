"""``python -m lora_kernels compare``: what it says of a model, and what it says of a wrong call."""

import json
import re
import subprocess
import sys

import peft
import pytest
import small
import torch
from transformers import AutoConfig

from lora_kernels import accelerate_peft
from lora_kernels.__main__ import main
from lora_kernels.integrations import compare, compare_model


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


@pytest.fixture
def gpt2(tmp_path):
    """A folder with weights."""
    small.build("gpt2").save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def configuration(name, folder):
    """A folder without weights."""
    model = small.build(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


def adapter_for(folder, where, **config):
    model = peft.get_peft_model(small.build("gpt2"), peft.LoraConfig(r=4, **config))
    model.peft_config["default"].base_model_name_or_path = str(folder)
    small.draw_adapter(model)
    model.save_pretrained(where)
    return where


def run(capsys, *arguments):
    status = main(["compare", *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err


SMALL = ("--rows", "2x8", "--steps", "2")


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("what", ["--train", "--generate"])
def test_a_model_is_compared(what, dtype, gpt2, capsys):
    status, out, _ = run(capsys, gpt2, what, "--dtype", dtype, *SMALL)
    assert status == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"GPT2LMHeadModel in {gpt2}: ") and "random" not in lines[0]
    assert "new adapter of PEFT: 8 layers" in lines[1]
    assert ("generation of 32" if what == "--generate" else "training steps") in lines[2]
    titles = ["ms per token" if what == "--generate" else "ms per step", "tokens per second"]
    titles += ["peak memory of a step, MiB"] + ["saved activations, MiB"] * (what == "--train")
    for title in titles:
        (line,) = (line for line in lines if line.startswith(title))
        assert re.match(rf"{title} +[\d,.]+ +[\d,.]+", line)
    assert ("packed weights" in out) == (what == "--generate")
    calls = 8 * (1 + 2 + 2 + 2) if what == "--train" else 8 * (1 + (2 + 2 + 1) * 32)
    assert f"fused: 8 layers (2 c_attn, 4 c_proj, 2 c_fc), {calls:,} calls" in out
    assert "without an adapter: lm_head" in out and "fell back" not in out
    assert ("gradients differ" in out) == (what == "--train")


@pytest.mark.parametrize("name", ["llama", "vit", "bert", "t5", "llama bare"])
def test_a_configuration_without_weights_is_enough(name, tmp_path, capsys):
    folder = configuration(name, tmp_path / "model")
    rows = "2" if name == "vit" else "2x8"
    status, out, _ = run(capsys, folder, "--rows", rows, "--steps", "1")
    assert status == 0
    assert "random weights" in out and " differ by " in out
    assert ("images per second" in out) == (name == "vit")


@pytest.mark.parametrize("given", ["alone", "with its base", "relative"])
def test_an_adapter_of_peft(given, gpt2, tmp_path, capsys):
    named = "../gpt2" if given == "relative" else gpt2
    adapter = adapter_for(named, tmp_path / "adapter", target_modules=["c_attn"], lora_dropout=0.1)
    arguments = (gpt2, "--adapter", adapter) if given == "with its base" else (adapter,)
    status, out, _ = run(capsys, *arguments, *SMALL)
    assert status == 0
    assert f"adapter {adapter}: 2 layers" in out
    assert "fused: 2 layers (2 c_attn)" in out
    assert "without an adapter: 4 c_proj, 2 c_fc, lm_head" in out


@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_a_new_adapter_drops_what_is_asked(dropout, gpt2, capsys):
    status, out, _ = run(capsys, gpt2, *SMALL, "--dropout", dropout)
    assert status == 0 and f"trainable parameters, dropout {dropout}\n" in out
    (saved,) = (line for line in out.splitlines() if line.startswith("saved activations"))
    assert ("x less" in saved) == (dropout == "0.1")
    assert ("without dropout PEFT saves no copy of x" in saved) == (dropout == "0")


def test_what_is_left_to_peft_is_told_with_the_reason(gpt2, tmp_path, capsys):
    velora = peft.tuners.lora.config.VeloraConfig(num_groups=4)
    changes = {"target_modules": ["c_attn"], "velora_config": velora}
    adapter = adapter_for(gpt2, tmp_path / "velora", **changes)
    status, out, err = run(capsys, adapter, *SMALL)
    assert status == 1
    assert re.search(r"(left|fell back) to PEFT: .*Velora", out, re.IGNORECASE)
    assert "FAILED: no call was fused" in err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", ["nothing", "adapter", "scale", "one layer"])
def test_a_wrong_result_is_seen(wrong, dtype):
    model = small.build("llama").to(dtype)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    stock = peft.get_peft_model(model, config)
    ours = compare_model.shared_copy(stock)
    accelerate_peft(ours)
    layers = [m for m in ours.modules() if hasattr(m, "lora_B") and hasattr(m, "base_layer")]
    for layer in layers if wrong in ("adapter", "scale") else layers[:1] * (wrong == "one layer"):
        layer.scaling["default"] *= 0.5 if wrong == "scale" else 0.0
    inputs = compare_model.inputs_for(model, (2, 16), False)
    found = compare.check(stock, ours, inputs, False)
    assert [d.what for d in found] == ["logits", "gradients"]
    assert all(d.equal == (wrong == "nothing") for d in found), list(map(str, found))


def test_a_difference_ends_with_status_1(gpt2, capsys, monkeypatch):
    wrong = compare.Difference("logits", 1e-2, 1e-6)
    monkeypatch.setattr(compare, "check", lambda *arguments: [wrong])
    status, _, err = run(capsys, gpt2, *SMALL)
    assert status == 1 and err.strip().endswith("FAILED: logits of PEFT and ours are not equal")


def test_both_share_the_frozen_weights_and_train_their_own(gpt2):
    stock = small.peft_model(small.build("llama tied"), target_modules=["q_proj"])
    ours = compare_model.shared_copy(stock)
    for (name, theirs), own in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert (own is theirs) == (not theirs.requires_grad), name
        assert torch.equal(own, theirs)


def wrong_calls(tmp_path):
    """What is wrong -> (arguments, words of the message)."""
    (tmp_path / "a file").write_text("{}")
    (tmp_path / "empty").mkdir()
    for name, text in (("broken", "{"), ("a list", "[]"), ("unknown", '{"model_type": "nobody"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    gpt2 = configuration("gpt2", tmp_path / "gpt2")
    kinds = {"prefix": {"peft_type": "PREFIX_TUNING"}, "no weights": {"peft_type": "LORA"}}
    for name, content in kinds.items():
        (tmp_path / name).mkdir()
        content["base_model_name_or_path"] = "nobody/nothing"
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(content))
    (tmp_path / "no weights" / "adapter_model.safetensors").touch()
    (tmp_path / "cut off").mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": str(gpt2)}
    (tmp_path / "cut off" / "adapter_config.json").write_text(json.dumps(content))
    (tmp_path / "cut off" / "adapter_model.safetensors").write_bytes(b"123")
    audio = configuration("wav2vec2", tmp_path / "audio")
    bert = configuration("bert", tmp_path / "bert")
    clip = configuration("clip", tmp_path / "clip")
    here = tmp_path
    return {
        "no such folder": ([here / "nowhere"], ["nowhere is no folder", "hf download"]),
        "a name, unreachable": (["gpt2"], ["gpt2 is no folder", "config.json"]),
        "a file": ([here / "a file"], ["is a file"]),
        "no configuration": ([here / "empty"], ["config.json", "adapter_config.json"]),
        "broken JSON": ([here / "broken"], ["config.json cannot be read"]),
        "no object": ([here / "a list"], ["no JSON object"]),
        "an unknown model": ([here / "unknown"], ["unknown", "nobody"]),
        "no adapter there": ([gpt2, "--adapter", here / "nowhere"], ["is no folder"]),
        "an adapter without its file": ([gpt2, "--adapter", gpt2], ["no adapter_config.json"]),
        "another kind of adapter": ([here / "prefix", "--steps", "1"], ["nobody/nothing"]),
        "of another kind": ([gpt2, "--adapter", here / "prefix"], ["PREFIX_TUNING, not LORA"]),
        "no base": ([here / "no weights"], ["base model nobody/nothing", "--adapter"]),
        "a cut off file": ([here / "cut off"], ["cut off"]),
        "another input": ([audio], ["input_values", "text"]),
        "two inputs": ([clip], ["clip: CLIPModel fails on input_ids alone"]),
        "no generation": ([bert, "--generate"], ["does not generate"]),
        "too long": ([gpt2, "--rows", "1x65"], ["64 tokens at most"]),
        "too long with what is made": ([gpt2, "--generate", "--rows", "1x40"], ["it generates"]),
        "no steps": ([gpt2, "--steps", "0"], ["--steps must be at least 1"]),
        "no rank": ([gpt2, "--r", "0"], ["--r must be at least 1"]),
        "no probability": ([gpt2, "--dropout", "1"], ["--dropout must be", "below 1, not 1"]),
        "of an adapter that is": (
            [gpt2, "--adapter", here, "--dropout", "0.1"],
            ["--dropout is for a new adapter"],
        ),
        "no device": ([gpt2, "--device", "nothing"], ["--device nothing"]),
        "no GPU": ([gpt2, "--device", "cuda:99"], ["--device cuda:99"]),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="a bare name may be in the cache there")
def test_a_wrong_call_is_one_line_and_status_2(tmp_path, capsys):
    for what, (arguments, words) in wrong_calls(tmp_path).items():
        status, _, err = run(capsys, *arguments)
        assert status == 2, what
        lines = err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), (what, err)
        assert all(word in lines[0] for word in words), (what, err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rows", "0x8"],
        ["--rows", "8x8x8"],
        ["--rows", "many"],
        ["--dtype", "int8"],
        ["--train", "--generate"],
        ["--steps", "x"],
    ],
)
def test_a_wrong_option_is_told_before_anything_is_read(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["compare", "nowhere", *arguments])
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_model_without_linear_layers(tmp_path, capsys):
    folder = tmp_path / "model"
    config = AutoConfig.for_model("resnet", hidden_sizes=[8], depths=[1], embedding_size=8)
    config.architectures = ["ResNetModel"]
    config.save_pretrained(folder)
    status, _, err = run(capsys, folder, "--rows", "1")
    assert status == 2 and "no linear layer" in err


def test_too_little_memory_is_told_before_loading(tmp_path, capsys, monkeypatch):
    config = AutoConfig.for_model("llama", hidden_size=16384, num_hidden_layers=200)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "huge")
    monkeypatch.setattr(compare, "available_bytes", lambda device: 3 << 30)
    monkeypatch.setattr(compare, "load", None)
    status, _, err = run(capsys, tmp_path / "huge", "--dtype", "bf16")
    assert status == 2
    need = float(re.search(r"takes ([\d.]+) GiB at least and 3.0 GiB are free", err).group(1))
    weights = 200 * (4 * 16384**2 + 3 * 16384 * 11008) * 2 / 2**30
    assert weights < need < 1.5 * weights
    assert "--dtype bfloat16" in err


def test_the_system_tells_its_free_memory():
    assert 1 << 20 < compare_model.available_bytes(torch.device("cpu")) < 1 << 50


def test_without_transformers_the_error_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    status, _, err = run(capsys, "gpt2")
    assert status == 2 and "pip install transformers peft" in err


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ([2.0] * 5, [1.0] * 5, "ours 2.00x faster"),
        ([1.0] * 5, [1.5] * 5, "ours 1.50x slower"),
        ([1.0, 2.0, 1.0, 2.0, 1.0], [2.0, 1.0, 2.0, 1.0, 1.5], "no clear difference"),
        ([2.0, 9.0], [1.0, 1.0], "no clear difference"),
    ],
)
def test_a_ratio_says_which_way(theirs, ours, said):
    sides = {
        name: compare.Side(None, None, seconds, peak_bytes=size << 20, saved_bytes=size << 20)
        for name, seconds, size in ((compare.PEFT, theirs, 4), (compare.OURS, ours, 8))
    }
    lines = compare.table(sides, {"input_ids": torch.zeros(2, 3)}, False)
    assert said in lines[1]
    assert "ours 2.00x more" in lines[3] and "ours 2.00x more" in lines[4]
    assert ("busy" in lines[-1]) == (said == "no clear difference")


def test_as_a_command(gpt2):
    command = [sys.executable, "-m", "lora_kernels", "compare", str(gpt2), *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "results: logits differ by" in done.stdout
    assert "timed steps" in done.stderr and "USDT" not in done.stderr
