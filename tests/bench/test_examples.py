"""The scripts of examples/ on tiny models, without a network."""

import importlib.util
from pathlib import Path

import peft
import pytest
import small
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import lora_kernels as lk

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = [f"word{i}" for i in range(small.VOCABULARY - 3)]


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def folder(tmp_path):
    """A Llama with a tokenizer of whole words, and a text of these."""
    small.build("llama").save_pretrained(tmp_path / "llama")
    ids = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path / "llama")
    (tmp_path / "text").write_text(" ".join(WORDS * 8))
    return tmp_path


def test_every_example_is_short_and_tried():
    files = sorted(path for path in EXAMPLES.glob("*.py") if path.stem != "__init__")
    assert {path.stem for path in files} == {
        "finetune_in_a_loop",
        "finetune_peft_with_trainer",
        "lora_linear_in_your_layer",
        "serve_many_adapters",
        "vision_transformer",
    }
    for path in files:
        assert len(path.read_text().splitlines()) < 50, path.name


def test_finetune_peft_with_trainer(folder, capsys):
    arguments = [str(folder / name) for name in ("llama", "text", "out")]
    example("finetune_peft_with_trainer")([*arguments, "--steps", "3", "--tokens", "16"])
    assert f"{14 * 3} of {14 * 3} calls fused" in capsys.readouterr().out
    model = peft.PeftModel.from_pretrained(small.build("llama"), folder / "out")
    assert all(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_finetune_in_a_loop(folder, capsys):
    arguments = [str(folder / name) for name in ("llama", "text", "out")]
    example("finetune_in_a_loop")([*arguments, "--steps", "3", "--tokens", "16", "--batch", "2"])
    assert "step 3: loss" in capsys.readouterr().out
    model = peft.PeftModel.from_pretrained(small.build("llama"), folder / "out")
    assert all(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_a_text_too_short_is_told(folder, capsys):
    arguments = [str(folder / name) for name in ("llama", "text", "short")]
    with pytest.raises(SystemExit):
        example("finetune_in_a_loop")([*arguments, "--tokens", "1000000"])
    assert "--tokens must be fewer" in capsys.readouterr().err


def test_vision_transformer(tmp_path, capsys):
    small.build("vit").save_pretrained(tmp_path / "vit")
    example("vision_transformer")([str(tmp_path / "vit"), str(tmp_path / "out"), "--steps", "2"])
    assert "loss of the last batch" in capsys.readouterr().out
    model = lk.load_adapter(small.build("vit", num_labels=3), tmp_path / "out")
    assert lk.lora_report(model).modules_to_save == ["classifier"]


def test_serve_many_adapters(folder, capsys):
    """More adapters than fit in one batch, and each answers with its own tokens."""
    for seed in range(9):
        model = small.peft_model(small.build("llama"), target_modules=["q_proj", "down_proj"])
        small.draw_adapter(model, seed).save_pretrained(folder / f"adapter{seed}")
    adapters = [str(folder / f"adapter{seed}") for seed in range(9)]
    prompt = ["--prompt", "word1 word2", "--tokens", "6"]
    example("serve_many_adapters")([str(folder / "llama"), *adapters, *prompt])
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["no adapter", *(f"adapter{seed}" for seed in range(9))]
    assert all(text.startswith("word1 word2") for text in lines.values())
    assert len(set(lines.values())) >= 9


def test_lora_linear_in_your_layer():
    with torch.random.fork_rng():
        assert example("lora_linear_in_your_layer")() < 0.1
