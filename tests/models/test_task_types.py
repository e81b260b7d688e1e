"""``task_type``: kept from a configuration to the file, with the heads that PEFT trains for it; its
``AutoPeftModel`` classes find their way by it."""

import json

import peft
import pytest
import small
import torch
from small import build

import lora_kernels as lk

TASKS = [
    ("llama", "CAUSAL_LM", set()),
    ("llama sequences", "SEQ_CLS", {"score"}),
    ("distilbert", "SEQ_CLS", {"classifier", "pre_classifier"}),
    ("bert tokens", "TOKEN_CLS", {"classifier"}),
    ("bert questions", "QUESTION_ANS", {"qa_outputs"}),
    ("t5", "SEQ_2_SEQ_LM", set()),
    ("bert bare", "FEATURE_EXTRACTION", set()),
]


@pytest.fixture(autouse=True)
def isolated():
    with small.isolated():
        yield


def task_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())["task_type"]


def same_logits(model, other):
    return small.relative_difference(small.logits(model), small.logits(other)) < 1e-5


@pytest.mark.parametrize("given", ["name", "enum", "config"])
def test_pefts_auto_class_loads_what_was_saved(tmp_path, given):
    build("llama").save_pretrained(tmp_path / "base")
    base = type(build("llama")).from_pretrained(tmp_path / "base")
    arguments = {
        "name": {"task_type": "CAUSAL_LM"},
        "enum": {"task_type": peft.TaskType.CAUSAL_LM},
        "config": {"config": peft.LoraConfig(task_type="CAUSAL_LM")},
    }
    ours = small.draw_adapter(lk.apply_lora(base, **arguments[given]))
    lk.save_adapter(ours, tmp_path / "adapter")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(theirs, peft.PeftModelForCausalLM)
    assert same_logits(theirs, ours)


@pytest.mark.parametrize(("name", "task", "heads"), TASKS)
def test_a_task_trains_and_saves_the_heads_that_it_trains_in_peft(tmp_path, name, task, heads):
    ours = lk.apply_lora(build(name), r=4, task_type=task)
    assert set(lk.lora_report(ours).modules_to_save) == heads
    trained = {n for n, p in ours.named_parameters() if p.requires_grad and "lora" not in n}
    assert {n.rpartition(".")[0] for n in trained} == heads
    small.draw_adapter(ours)
    with torch.no_grad():
        for head in heads:
            ours.get_submodule(head).weight.normal_()
    lk.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(build(name), tmp_path / "ours")
    assert theirs.active_peft_config.task_type == task
    assert same_logits(theirs, ours)
    # PEFT's file loads and is saved with its task again.
    theirs.save_pretrained(tmp_path / "theirs")
    again = lk.load_adapter(build(name), tmp_path / "theirs")
    assert same_logits(again, ours)
    lk.save_adapter(again, tmp_path / "again")
    assert task_in(tmp_path / "again") == task


def test_a_head_that_was_not_trained_is_written_for_peft(tmp_path):
    """PEFT looks for the head of a task in the file, whoever made it."""
    store = lk.AdapterStore(build("llama sequences"))
    store.create("a", r=4, task_type="SEQ_CLS")
    store.save("a", tmp_path)
    assert task_in(tmp_path) == "SEQ_CLS"
    theirs = peft.PeftModel.from_pretrained(build("llama sequences"), tmp_path)
    assert same_logits(theirs, build("llama sequences"))
    lk.load_adapter(build("llama sequences"), tmp_path)


def test_a_head_that_is_named_as_well_is_saved_once(tmp_path):
    ours = lk.apply_lora(build("bert"), task_type="SEQ_CLS", modules_to_save=["classifier"])
    lk.save_adapter(ours, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    assert content["modules_to_save"] == ["classifier"]


def test_a_file_brings_its_task_to_a_model_that_has_adapters(tmp_path):
    lk.save_adapter(lk.apply_lora(build("llama"), task_type="CAUSAL_LM"), tmp_path / "with")
    model = lk.apply_lora(build("llama"))
    lk.save_adapter(model, tmp_path / "without")
    assert task_in(tmp_path / "without") is None
    for source in ("with", "without"):
        lk.load_adapter(model, tmp_path / source)
        lk.save_adapter(model, tmp_path / "again")
        assert task_in(tmp_path / "again") == "CAUSAL_LM"


@pytest.mark.parametrize("task", ["causal_lm", "LM", 3, ["CAUSAL_LM"]])
def test_no_task_of_pefts_is_refused(task):
    model = build("llama")
    before = small.Snapshot(model)
    with pytest.raises(ValueError, match="task_type must be one of SEQ_CLS, SEQ_2_SEQ_LM, CAUSAL"):
        lk.apply_lora(model, task_type=task)
    before.assert_unchanged()


def test_the_tasks_are_pefts():
    assert list(lk.models.peft_config.HEADS_OF_TASKS) == [task.value for task in peft.TaskType]
