"""Files of an adapter that cannot be loaded: the model stays as it was."""

import json
import os
import pickle
import re
import shutil
import warnings

import peft
import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from small import build

import lora_kernels as lk
from lora_kernels import FusedLoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


def read(directory):
    return json.loads((directory / CONFIG).read_text()), load_file(directory / WEIGHTS)


KEY = "model.layers.1.self_attn.q_proj.lora_A.weight"


def with_config(**changes):
    def broken(folder):
        config, _ = read(folder)
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return broken


def with_tensors(change):
    def broken(folder):
        _, tensors = read(folder)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return broken


def with_bytes(file, content):
    return lambda folder: (folder / file).write_bytes(
        content((folder / file).read_bytes()) if callable(content) else content
    )


def pickle_only(folder):
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "adapter_model.bin")


def set_key(key, *shape):
    return with_tensors(lambda tensors: tensors.update({key: torch.zeros(shape)}))


def from_peft(**config):
    """The adapter of another method, or with something that is not computed here."""

    def broken(folder):
        shutil.rmtree(folder)
        method = config.get("method", peft.LoraConfig)
        rest = {k: v for k, v in config.items() if k != "method"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(build("llama"), method(target_modules=["q_proj"], **rest))
            model.save_pretrained(folder)

    return broken


class Malicious:
    def __reduce__(self):
        return (os._exit, (1,))


BROKEN = {
    "no directory": (shutil.rmtree, FileNotFoundError, "no adapter directory"),
    "no config": (lambda f: (f / CONFIG).unlink(), FileNotFoundError, CONFIG),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), FileNotFoundError, WEIGHTS),
    "a pickle only": (pickle_only, ValueError, r"adapter_model\.bin is a pickle"),
    "a pickle by another name": (
        with_bytes(WEIGHTS, pickle.dumps(Malicious())),
        ValueError,
        f"{WEIGHTS} is not a readable safetensors file",
    ),
    "truncated": (with_bytes(WEIGHTS, lambda b: b[:-7]), ValueError, f"{WEIGHTS} is not"),
    "truncated in the header": (with_bytes(WEIGHTS, lambda b: b[:60]), ValueError, WEIGHTS),
    "empty weights": (with_bytes(WEIGHTS, b""), ValueError, f"{WEIGHTS} is not a readable"),
    "no tensors": (with_tensors(dict.clear), ValueError, f"{WEIGHTS} has no .*q_proj.lora_A"),
    "empty json": (with_bytes(CONFIG, b""), ValueError, f"{CONFIG} is not a JSON object"),
    "invalid json": (with_bytes(CONFIG, b'{"r": 4,'), ValueError, f"{CONFIG} is not a JSON"),
    "binary json": (with_bytes(CONFIG, b"\xff\xfe\x00"), ValueError, f"{CONFIG} is not a JSON"),
    "a json list": (with_bytes(CONFIG, b"[1]"), ValueError, f"{CONFIG} is not a JSON object"),
    "json null": (with_bytes(CONFIG, b"null"), ValueError, f"{CONFIG} is not a JSON object"),
    "an empty json object": (with_bytes(CONFIG, b"{}"), ValueError, f"{CONFIG}: peft_type is None"),
    "a missing key": (
        with_tensors(lambda t: t.pop(PREFIX + KEY)),
        ValueError,
        f"{WEIGHTS} has no {re.escape(KEY)}",
    ),
    "an extra key": (
        set_key(f"{PREFIX}model.layers.7.self_attn.q_proj.lora_A.weight", 4, 48),
        ValueError,
        r"no place for, or with other values: model\.layers\.7\.self_attn\.q_proj\.lora_A\.weight",
    ),
    "a layer that is no target": (
        set_key(f"{PREFIX}model.layers.1.self_attn.k_proj.lora_A.weight", 4, 48),
        ValueError,
        r"no place for, or with other values: model\.layers\.1\.self_attn\.k_proj",
    ),
    "a bias on lora_B": (
        set_key(f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.bias", 48),
        ValueError,
        r"no place for, or with other values: .*q_proj\.lora_B\.bias",
    ),
    "a base weight": (
        set_key(f"{PREFIX}model.layers.1.self_attn.q_proj.base_layer.weight", 48, 48),
        ValueError,
        r"no place for, or with other values: .*q_proj\.base_layer\.weight",
    ),
    "a resized embedding": (
        set_key(f"{PREFIX}model.embed_tokens.weight", small.VOCABULARY + 1, 48),
        ValueError,
        r"model\.embed_tokens\.weight has 65 rows, the model's has 64: call "
        r"model\.resize_token_embeddings\(65\) first, or .* load_embedding_layers=False",
    ),
    "a narrower embedding": (
        set_key(f"{PREFIX}model.embed_tokens.weight", small.VOCABULARY, 32),
        ValueError,
        r"model\.embed_tokens\.weight is \[64, 32\], the model's is \[64, 48\]",
    ),
    "an embedding of whole numbers": (
        with_tensors(
            lambda t: t.update(
                {f"{PREFIX}model.embed_tokens.weight": torch.ones(64, 48, dtype=torch.int64)}
            )
        ),
        ValueError,
        r"model\.embed_tokens\.weight is torch\.int64",
    ),
    "A of whole numbers": (
        with_tensors(lambda t: t.update({PREFIX + KEY: torch.ones(4, 48, dtype=torch.int32)})),
        ValueError,
        re.escape(f"{KEY} is torch.int32"),
    ),
    "A as exponents alone": (
        with_tensors(lambda t: t.update({PREFIX + KEY: t[PREFIX + KEY].to(torch.float8_e8m0fnu)})),
        ValueError,
        re.escape(f"{KEY} is torch.float8_e8m0fnu"),
    ),
    "a wrong rank": (
        set_key(PREFIX + KEY, 3, 48),
        ValueError,
        re.escape(f"{KEY} is [3, 48], the model's layer wants [4, 48]"),
    ),
    "a transposed tensor": (
        set_key(PREFIX + KEY, 48, 4),
        ValueError,
        re.escape(f"{KEY} is [48, 4]"),
    ),
    "one dimension": (set_key(PREFIX + KEY, 192), ValueError, re.escape(f"{KEY} is [192]")),
    "another width": (set_key(PREFIX + KEY, 4, 32), ValueError, re.escape(f"{KEY} is [4, 32]")),
    "LoHa": (from_peft(method=peft.LoHaConfig), ValueError, f"{CONFIG}: peft_type is 'LOHA'"),
    "a DoRA without its magnitudes": (
        with_config(use_dora=True),
        ValueError,
        "has no .*lora_magnitude_vector|use_dora is True|uses use_dora",
    ),
    "lora_bias": (from_peft(lora_bias=True), ValueError, f"{CONFIG} uses lora_bias"),
    "pissa": (
        from_peft(init_lora_weights="pissa"),
        ValueError,
        "init_lora_weights='pissa' changed",
    ),
    "olora": (
        from_peft(init_lora_weights="olora"),
        ValueError,
        "init_lora_weights='olora' changed",
    ),
    "token indices": (
        from_peft(trainable_token_indices=[1, 2]),
        ValueError,
        "uses trainable_token_indices",
    ),
    "alpha is no number": (
        with_config(lora_alpha="much"),
        ValueError,
        f"{CONFIG}: lora_alpha must be a finite number, not 'much'",
    ),
    "an alpha of a layer is no number": (
        with_config(alpha_pattern={"q_proj": "much"}),
        ValueError,
        rf"{CONFIG}: alpha_pattern\['q_proj'\].*not 'much'",
    ),
    **{
        f"{field} is {value!r}": (
            with_config(**{field: value}),
            ValueError,
            f"{CONFIG}: .*{'the rank r' if field == 'r' else field}",
        )
        for field, values in {
            "r": [None, True, 4.0, "4", [4], {}],
            "lora_alpha": [None, True, "8", [8], float("nan"), float("inf"), 10**400, 1e39],
            "lora_dropout": [None, True, "0.1", -0.1, 1.0, float("nan")],
            "bias": [None, True, [], {}],
            "use_rslora": [None, "false", 1, []],
            "rank_pattern": [[], "q_proj", 4, {"q_proj": None}, {"q_proj": "4"}, {"(": 4}],
            "alpha_pattern": [[], {"q_proj": None}, {"q_proj": float("nan")}, {"q_proj": [8]}],
            "target_modules": [3, {"q_proj": 1}, ["q_proj", None], "("],
            "exclude_modules": [3, [1], "("],
            "layers_to_transform": ["0", [None], {}, 0.5],
            "modules_to_save": ["lm_head", {}, [0]],
        }.items()
        for value in values
    },
    "a pattern with flags inside": (
        with_config(rank_pattern={"(?i)q_proj": 4}),
        ValueError,
        f"{CONFIG}: rank_pattern: .* is not a regular expression",
    ),
    "a pattern with too many repeats": (
        with_config(alpha_pattern={"a{99999999999999999999}": 4}),
        ValueError,
        f"{CONFIG}: alpha_pattern: .* is not a regular expression",
    ),
    "a pattern that is too deep": (
        with_config(alpha_pattern={"(" * 20000 + ")" * 20000: 4}),
        ValueError,
        f"{CONFIG}: alpha_pattern: .* is not a regular expression",
    ),
    "too many patterns": (
        with_config(alpha_pattern={f"a{i}": 4 for i in range(2**15 + 1)}),
        ValueError,
        f"{CONFIG}: alpha_pattern has 32769 patterns",
    ),
    "a field that stands there twice": (
        with_bytes(CONFIG, lambda b: b.replace(b'"r": 4', b'"r": 4, "r": 8')),
        ValueError,
        f"{CONFIG} is not a JSON object: 'r' is in it twice",
    ),
    "a deep configuration": (
        with_bytes(CONFIG, b'{"peft_type": "LORA", "r": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        ValueError,
        f"{CONFIG} is not a JSON object: .*recursion",
    ),
    "a configuration nearly too deep": (
        with_bytes(CONFIG, b'{"peft_type": "LORA", "r": ' + b"[" * 900 + b"]" * 900 + b"}"),
        ValueError,
        CONFIG,
    ),
    "a long configuration": (
        with_bytes(CONFIG, lambda b: b + b" " * 2**22),
        ValueError,
        f"{CONFIG} has .* bytes",
    ),
    "a number of many digits": (
        with_bytes(CONFIG, b'{"peft_type": "LORA", "r": ' + b"9" * 10**5 + b"}"),
        ValueError,
        f"{CONFIG} is not a JSON object",
    ),
    "a directory as its configuration": (
        lambda f: ((f / CONFIG).unlink(), (f / CONFIG).mkdir()),
        FileNotFoundError,
        CONFIG,
    ),
    "rank 0": (with_config(r=0), ValueError, f"{CONFIG}: the rank r must be"),
    "a rank that is no number": (with_config(r="4"), ValueError, f"{CONFIG}: the rank r must be"),
    "patterns are a list": (
        with_config(rank_pattern=["q_proj"]),
        ValueError,
        f"{CONFIG}: rank_pattern must be a dictionary",
    ),
    "bias is unknown": (with_config(bias="some"), ValueError, f"{CONFIG}: bias must be"),
    "target is a number": (with_config(target_modules=3), ValueError, f"{CONFIG}: target_modules"),
    "target is no regex": (
        with_config(target_modules="("),
        ValueError,
        f"{CONFIG}: target_modules",
    ),
    "modules_to_save is a name": (
        with_config(modules_to_save="lm_head"),
        ValueError,
        f"{CONFIG}: modules_to_save must be a list",
    ),
}
# Only a model that has no layers yet asks these of the configuration.
BROKEN_FOR_PLAIN = {
    "no such target": (
        with_config(target_modules=["nothing"]),
        ValueError,
        r"is for other layers than this model's: target_modules=\['nothing'\]\. Linear layers here",
    ),
    "another rank in the config": (
        with_config(r=5),
        ValueError,
        re.escape("q_proj.lora_A.weight is [4, 48], the model's layer wants [5, 48]"),
    ),
    "more targets": (
        with_config(target_modules=["q_proj", "k_proj"]),
        ValueError,
        r"has no .*k_proj\.lora_A\.weight",
    ),
    "a module in full is missing": (
        with_config(modules_to_save=["lm_head"]),
        ValueError,
        r"has no lm_head\.weight",
    ),
}


def broken_adapter(folder, case):
    ours = lk.apply_lora(build("llama"), r=4, target_modules=["q_proj"])
    lk.save_adapter(small.draw_adapter(ours), folder)
    assert load_file(folder / WEIGHTS)[PREFIX + KEY].shape == (4, 48)
    lk.load_adapter(build("llama"), folder)
    case[0](folder)


@pytest.mark.parametrize(
    "case", (BROKEN | BROKEN_FOR_PLAIN).values(), ids=[*BROKEN, *BROKEN_FOR_PLAIN]
)
def test_a_broken_adapter_leaves_a_plain_model_as_it_was(tmp_path, case):
    broken_adapter(tmp_path / "adapter", case)
    model = build("llama")
    before = small.Snapshot(model)
    with pytest.raises(case[1], match=case[2]):
        lk.load_adapter(model, tmp_path / "adapter")
    before.assert_unchanged()


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_a_broken_adapter_leaves_an_adapted_model_as_it_was(tmp_path, case):
    broken_adapter(tmp_path / "adapter", case)
    model = lk.apply_lora(build("llama"), r=4, target_modules=["q_proj"], lora_alpha=3)
    small.draw_adapter(model, seed=8)
    before = small.Snapshot(model)
    config = lk.models.apply.applied(model).config
    with pytest.raises(case[1], match=case[2]):
        lk.load_adapter(model, tmp_path / "adapter")
    before.assert_unchanged()
    assert lk.models.apply.applied(model).config is config


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ({"r": 3}, re.escape("is [4, 48], the model's layer wants [3, 48]")),
        ({"target_modules": ["q_proj", "k_proj"]}, r"has no .*k_proj\.lora_A\.weight"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            r"no place for, or with other values: .*layers\.1",
        ),
        ({"bias": "all"}, "bias is 'none', the model was adapted with bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"has no lm_head\.weight"),
    ],
)
def test_an_adapter_of_another_shape_is_refused(tmp_path, present, message):
    broken_adapter(tmp_path, (lambda folder: None,))
    model = lk.apply_lora(build("llama"), **({"r": 4, "target_modules": ["q_proj"]} | present))
    small.draw_adapter(model, seed=8)
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match=message):
        lk.load_adapter(model, tmp_path)
    before.assert_unchanged()


def test_an_adapter_of_another_model_is_refused(tmp_path):
    lk.save_adapter(lk.apply_lora(build("llama"), r=4), tmp_path)
    for name in ("gpt2", "bert"):
        model = build(name)
        before = small.Snapshot(model)
        message = (
            f"^{re.escape(str(tmp_path))} is for other layers than this model's: target_modules"
        )
        with pytest.raises(ValueError, match=message):
            lk.load_adapter(model, tmp_path)
        before.assert_unchanged()
    model = build("llama", hidden_size=64)
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match=r"is \[4, 48\], the model's layer wants \[4, 64\]"):
        lk.load_adapter(model, tmp_path)
    before.assert_unchanged()


def test_loading_into_a_model_of_peft_is_refused(tmp_path):
    lk.save_adapter(lk.apply_lora(build("llama"), target_modules=["q_proj"]), tmp_path)
    model = small.peft_model(build("llama"), target_modules=["q_proj"])
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match="of PEFT already"):
        lk.load_adapter(model, tmp_path)
    before.assert_unchanged()


def test_an_error_while_applying_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    lk.save_adapter(lk.apply_lora(build("gpt2")), tmp_path)
    model = build("gpt2")
    before = small.Snapshot(model)
    original, calls = FusedLoRALinear.reset_lora_parameters, []

    def failing(layer):
        calls.append(layer)
        if len(calls) == 5:
            raise MemoryError("no memory")
        original(layer)

    monkeypatch.setattr(FusedLoRALinear, "reset_lora_parameters", failing)
    with pytest.raises(MemoryError):
        lk.load_adapter(model, tmp_path)
    before.assert_unchanged()


ENDLESS = {
    "target_modules": "(a+|[a-z._0-9]+)+!",
    "exclude_modules": r"(([a-z._0-9])*)*\d!",
    "rank_pattern": {r"([a-z0-9_]+\.?)+!": 4},
    "alpha_pattern": {r"(?=model.*q_proj$)(.|\w)*!": 4},
}


@pytest.mark.parametrize(("field", "value"), ENDLESS.items(), ids=ENDLESS)
def test_a_pattern_that_never_ends_is_refused(tmp_path, monkeypatch, field, value):
    monkeypatch.setattr(lk.models.config, "_PATTERN_SECONDS", 1.0)
    broken_adapter(tmp_path / "adapter", (with_config(**{field: value}),))
    message = f"{CONFIG}: matching {field} .* took more than 1 s"
    model = build("llama")
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match=message):
        lk.load_adapter(model, tmp_path / "adapter")
    before.assert_unchanged()
    store = lk.AdapterStore(model)
    with pytest.raises(ValueError, match=message):
        store.load("a", tmp_path / "adapter")


def test_a_pattern_that_ends_is_tried_and_loads(tmp_path):
    broken_adapter(tmp_path, (with_config(target_modules=r"(\w+\.)*(self_attn|mlp)\.(q|r)_proj"),))
    assert len(lk.lora_report(lk.load_adapter(build("llama"), tmp_path)).adapted) == 2


STORES = {k: v for k, v in BROKEN.items() if "embedding" not in k}


@pytest.mark.parametrize("case", STORES.values(), ids=STORES)
def test_a_store_refuses_a_broken_adapter(tmp_path, case):
    """It has the same reader, with the same sentences."""
    broken_adapter(tmp_path / "adapter", case)
    store = lk.AdapterStore(build("llama"))
    with pytest.raises(case[1]):
        store.load("a", tmp_path / "adapter")
    assert store.names == []
