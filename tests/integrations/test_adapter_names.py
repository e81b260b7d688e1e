"""Names and patterns of an adapter: what is saved means the same when it is loaded, here, in a
store and by PEFT; an entry that means nothing is said."""

import json
import math
import random
import re
import threading
import warnings

import peft
import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from small import build
from torch import nn

import lora_kernels as lk
from lora_kernels.models.apply import lora_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


class Tree(nn.Module):
    """Linear layers at any paths, one after the other."""

    def __init__(self, paths):
        super().__init__()
        torch.manual_seed(0)
        self.paths = paths
        for path in paths:
            *parents, last = path.split(".")
            node = self
            for name in parents:
                if name not in node._modules:
                    node.add_module(name, nn.Module())
                node = node._modules[name]
            node.add_module(last, nn.Linear(4, 4))

    def forward(self, x):
        for path in self.paths:
            x = self.get_submodule(path)(x)
        return x


def ranks_and_scales(model):
    """By path, of a model of ours or of PEFT's."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, lk.FusedLoRALinear):
            found[name] = module.r, module.scaling
        elif isinstance(module, peft.tuners.lora.LoraLayer):
            path = name.removeprefix("base_model.model.")
            found[path] = module.r["default"], module.scaling["default"]
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, (rank, scale) in expected.items():
        assert found[name][0] == rank and math.isclose(found[name][1], scale), name


@torch.no_grad()
def assert_same(y, expected):
    assert small.relative_difference(y, expected) < 1e-4


SIGNS = ["a", "b", "ab", "a+b", "c(1)", "q[0]", "(x", "x)", "*", "a|b", "^a", "a$", r"a\d", "a{2}"]
SIGNS += ["?", "0", "1", "-", "a b", "[", "\\", "a#b", "~", "é"]


def drawn_tree(draw):
    """Paths, none of which lies below another; many end alike."""
    paths = []
    for _ in range(draw.randint(1, 8)):
        path = ".".join(draw.choice(SIGNS) for _ in range(draw.randint(1, 3)))
        if not any(f"{p}.".startswith(f"{path}.") or f"{path}.".startswith(f"{p}.") for p in paths):
            paths.append(path)
    return paths


def drawn_pattern(draw, paths):
    """One that matches some of ``paths``, or perhaps none."""
    path = draw.choice(paths)
    parts = path.split(".")
    ending = re.escape(".".join(parts[-draw.randint(1, len(parts)) :]))
    kinds = [
        ending,
        f"^{ending}",
        f"^{re.escape(path)}",
        f"{ending}|b",
        ".*",
        r"[^.]*",
        f".*{ending}",
    ]
    return draw.choice(kinds)


def drawn_config(draw, paths):
    def patterns(values):
        return {drawn_pattern(draw, paths): draw.choice(values) for _ in range(draw.randint(0, 4))}

    return {
        "r": draw.randint(1, 3),
        "lora_alpha": draw.choice([4, 0.5, 3]),
        "use_rslora": draw.random() < 0.3,
        "rank_pattern": patterns([1, 2, 5]),
        "alpha_pattern": patterns([1, 8, 16, 0.1]),
    }


@pytest.mark.filterwarnings("ignore:.* matches no :UserWarning")
@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("seed", range(60))
def test_ranks_and_scalings_of_drawn_names_and_patterns(tmp_path, seed):
    draw = random.Random(seed)
    paths = drawn_tree(draw)
    config = drawn_config(draw, paths)
    print(f"seed {seed}: {paths} {config}")
    # As a regular expression: the end of a path may be that of a container too.
    targets = "|".join(map(re.escape, draw.sample(paths, draw.randint(1, len(paths)))))
    ours = small.draw_adapter(lk.apply_lora(Tree(paths), target_modules=targets, **config))
    for layer in lora_layers(ours).values():
        if draw.random() < 0.3:
            layer.scaling = draw.choice([0.0, 5.0, 1 / 3, -2.5])
    expected = ranks_and_scales(ours)
    lk.save_adapter(ours, tmp_path / "ours")
    x = torch.randn(3, 4)

    again = lk.load_adapter(Tree(paths), tmp_path / "ours")
    assert_equal(ranks_and_scales(again), expected)
    assert_same(again(x), ours(x))
    # Onto the model that has it, whose own patterns are then the file's.
    assert_equal(ranks_and_scales(lk.load_adapter(ours, tmp_path / "ours")), expected)

    theirs = peft.PeftModel.from_pretrained(Tree(paths), tmp_path / "ours")
    assert_equal(ranks_and_scales(theirs), expected)
    assert_same(theirs(x), ours(x))
    # PEFT sorts what it writes.
    theirs.save_pretrained(tmp_path / "theirs")
    assert_equal(ranks_and_scales(lk.load_adapter(Tree(paths), tmp_path / "theirs")), expected)

    store = lk.AdapterStore(Tree(paths), max_rank=5)
    store.load("a", tmp_path / "ours")
    store.save("a", tmp_path / "store")
    assert_equal(ranks_and_scales(lk.load_adapter(Tree(paths), tmp_path / "store")), expected)
    with store.batch(["a"] * 3):
        assert_same(store.model(x), ours(x))


def test_patterns_that_mean_the_same_when_sorted_stay_short(tmp_path):
    patterns = {"v_proj": 8, "q_proj": 32}
    ours = lk.apply_lora(
        build("llama"), target_modules=["q_proj", "v_proj"], alpha_pattern=patterns
    )
    lk.save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["alpha_pattern"] == patterns


def test_the_first_pattern_of_a_file_decides(tmp_path):
    """As PEFT reads a file of another program."""
    lk.save_adapter(lk.apply_lora(build("llama"), r=4, target_modules=["q_proj"]), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["alpha_pattern"] = {"q_proj": 8, "0.self_attn.q_proj": 64, "a)|(.*1.self_attn.q_proj": 1}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    expected = ranks_and_scales(peft.PeftModel.from_pretrained(build("llama"), tmp_path))
    assert {scale for _, scale in expected.values()} == {2.0}
    assert_equal(ranks_and_scales(lk.load_adapter(build("llama"), tmp_path)), expected)


def test_a_group_in_layers_pattern():
    model = lk.apply_lora(
        build("gpt2"), target_modules=["c_fc"], layers_to_transform=[1], layers_pattern="(x|h)"
    )
    assert list(lora_layers(model)) == ["transformer.h.1.mlp.c_fc"]


# ---- names that the format uses itself

OWN_NAMES = ["lora_A", "lora_B", "base_layer", "modules_to_save", "default", "original_module"]
OWN_NAMES += ["lora_A.weights", "base_model.model", "base_model.model.base_model.model"]
PLACES = ["{}", "m.{}", "{}.m", "{}.{}", "m.{}.lora_A", "m.{}.base_layer"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_modules_that_are_called_as_the_format_calls_its_own(tmp_path, name, place, bias):
    path = place.format(name, name)
    paths = [path, f"other.{path}", "m.plain"]
    config = {"r": 2, "bias": bias, "modules_to_save": [f"other.{path}"]}
    for targets in ([path], [path, "m.plain"]):
        regex = "|".join(map(re.escape, targets))
        ours = lk.apply_lora(Tree(paths), target_modules=regex, **config)
        small.draw_adapter(ours)
        folder = tmp_path / str(len(targets))
        lk.save_adapter(ours, folder)
        x = torch.randn(3, 4)
        again = lk.load_adapter(Tree(paths), folder)
        assert_same(again(x), ours(x))
        assert lk.lora_report(again).adapted.keys() == lk.lora_report(ours).adapted.keys()
        assert_same(lk.load_adapter(again, folder)(x), ours(x))
        # Without the prefix too.
        bare = {
            k.removeprefix("base_model.model."): t for k, t in load_file(folder / WEIGHTS).items()
        }
        save_file(bare, folder / WEIGHTS)
        assert_same(lk.load_adapter(Tree(paths), folder)(x), ours(x))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_store_of_modules_that_are_called_so(tmp_path, name, place):
    paths = [place.format(name, name), "m.plain"]
    ours = small.draw_adapter(lk.apply_lora(Tree(paths), r=2))
    lk.save_adapter(ours, tmp_path)
    store = lk.AdapterStore(Tree(paths))
    store.load("a", tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    store.load("b", store.state_dict("a"), config=config)
    store.save("b", tmp_path / "b")
    x = torch.randn(2, 4)
    for adapter in ("a", "b"):
        with store.batch([adapter] * 2):
            assert_same(store.model(x), ours(x))
    assert_same(lk.load_adapter(Tree(paths), tmp_path / "b")(x), ours(x))


@pytest.mark.parametrize("name", ["base_layer", "lora_A", "lora_B", "default", "modules_to_save"])
@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_peft_reads_such_names_or_cannot_write_them_either(tmp_path, name, bias):
    paths = [f"m.{name}", f"{name}.m", "m.plain"]
    config = {"target_modules": paths, "r": 2, "bias": bias}
    theirs = small.draw_adapter(peft.get_peft_model(Tree(paths), peft.LoraConfig(**config)))
    x = torch.randn(3, 4)
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(lk.load_adapter(Tree(paths), tmp_path / "theirs")(x), theirs(x))
    ours = small.draw_adapter(lk.apply_lora(Tree(paths), **config))
    lk.save_adapter(ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(Tree(paths), tmp_path / "ours")
    assert_same(again(x), ours(x))


# ---- entries that mean nothing

UNMATCHED = {
    "a rank": ({"rank_pattern": {"q_porj": 16}}, "rank_pattern: 'q_porj' .* mean 'q_proj'?"),
    "an alpha": ({"alpha_pattern": {"^q_proj": 9}}, r"alpha_pattern: '\^q_proj' .* mean 'q_proj'"),
    "an alpha of a layer that has no adapter": (
        {"alpha_pattern": {"o_proj": 9}},
        "alpha_pattern: 'o_proj' matches no adapted layer",
    ),
    "a path": (
        {"alpha_pattern": {r"layers\.0\.self_atn\.q_proj": 9}},
        r"mean 'layers\.0\.self_attn\.q_proj'",
    ),
    "a target": (
        {"target_modules": ["q_proj", "v_porj"]},
        "target_modules: 'v_porj' matches no layer .* mean 'v_proj'",
    ),
    "an exclusion": (
        {"exclude_modules": ["0.self_attn.q_prj"]},
        "exclude_modules: '0.self_attn.q_",
    ),
    "an exclusion that is a container": (
        {"exclude_modules": ["layers.0"]},
        r"exclude_modules: 'layers.0' matches no layer .* use the regular expression",
    ),
    "a regex that excludes nothing": (
        {"exclude_modules": r"layers\.0\..*"},
        "exclude_modules: 'lay",
    ),
    "a layer": ({"layers_to_transform": [0, 7]}, "layers_to_transform: 7 matches no layer of"),
}


@pytest.mark.parametrize("case", UNMATCHED.values(), ids=UNMATCHED)
def test_an_entry_that_matches_nothing_is_said(tmp_path, case):
    arguments, message = case
    config = {"target_modules": ["q_proj"]} | arguments
    with pytest.warns(UserWarning, match=message) as caught:
        ours = lk.apply_lora(build("llama"), r=4, **config)
    assert [w.filename for w in caught] == [__file__]
    (note,) = lk.lora_report(ours).notes
    assert re.search(message, note)
    assert f"note: {note}" in str(lk.lora_report(ours))
    # What PEFT's file says is said as well.
    theirs = small.peft_model(build("llama"), r=4, **config)
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=message) as caught:
        lk.load_adapter(build("llama"), tmp_path)
    assert [w.filename for w in caught] == [__file__]
    store = lk.AdapterStore(build("llama"))
    with pytest.warns(UserWarning, match=message) as caught:
        store.load("a", tmp_path)
    with pytest.warns(UserWarning, match=message) as created:
        store.create("b", r=4, **config)
    assert [w.filename for w in [*caught, *created]] == [__file__] * 2


def test_entries_that_match_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = lk.apply_lora(
            build("llama"),
            target_modules=["q_proj", "0.mlp.up_proj", "model.layers.1.mlp.down_proj"],
            exclude_modules=["lm_head", "1.self_attn.q_proj"],
            rank_pattern={"q_proj": 3, ".*mlp.*": 2},
            alpha_pattern={"^model.layers.0.self_attn.q_proj": 1, "proj_up|up_proj": 3},
        )
    assert lk.lora_report(ours).notes == []


def test_many_entries_that_match_nothing_are_said_in_short():
    patterns = {f"x{i}": 4 for i in range(3000)}
    with pytest.warns(UserWarning, match="matches no adapted layer") as caught:
        ours = lk.apply_lora(build("llama"), target_modules=["q_proj"], alpha_pattern=patterns)
    assert len(caught) == 21
    assert lk.lora_report(ours).notes[-1].startswith("more entries of the configuration match no")


def test_a_warning_that_is_an_error_leaves_the_model_as_it_was():
    model = build("llama")
    before = small.Snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="q_porj"):
            lk.apply_lora(model, target_modules=["q_proj"], rank_pattern={"q_porj": 3})
    before.assert_unchanged()


# ---- writers at the same time


def test_threads_that_save_into_one_directory(tmp_path):
    adapted = [
        small.draw_adapter(lk.apply_lora(build("llama"), target_modules=["q_proj"]), seed)
        for seed in range(4)
    ]
    errors, start = [], threading.Barrier(len(adapted))

    def save(model):
        start.wait()
        try:
            for _ in range(20):
                lk.save_adapter(model, tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in adapted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    found = small.logits(lk.load_adapter(build("llama"), tmp_path))
    assert any(torch.equal(found, small.logits(model)) for model in adapted)
