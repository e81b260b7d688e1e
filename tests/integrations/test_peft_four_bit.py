"""PEFT's LoRA layers over bitsandbytes' four-bit base, on our kernels."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

import lora_kernels as lk

bnb = pytest.importorskip("bitsandbytes")


def quantised(model, dtype=torch.float32, kind="nf4"):
    """As transformers loads it: every linear layer but the head."""
    for module in list(model.modules()):
        for child_name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child_name != "lm_head":
                four = bnb.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    child.bias is not None,
                    compute_dtype=dtype,
                    quant_type=kind,
                )
                four.load_state_dict(child.state_dict())
                setattr(module, child_name, four.to("cpu"))
    model.is_loaded_in_4bit = True
    model.is_quantized = True
    model.quantization_method = "bitsandbytes"
    return model


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return transformers.LlamaForCausalLM(config)


def adapted(dtype=torch.float32, adapters=("default",), **options):
    model = quantised(llama(), dtype)
    for name in adapters:
        config = peft.LoraConfig(
            r=4, init_lora_weights=False, target_modules="all-linear", **options
        )
        torch.manual_seed(len(name))
        if name == adapters[0]:
            model = peft.get_peft_model(model, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    return model


IDS = torch.arange(24).view(2, 12)


def in_full(model):
    """Without the kernel of bitsandbytes for evaluation, which computes in bfloat16."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def close(one, other, eps=1e-4):
    return (one - other).abs().max() <= eps * other.abs().max()


def test_every_layer_is_served_and_answers_as_stock():
    stock = adapted()
    ours = copy.deepcopy(stock)
    in_full(stock)
    report = lk.accelerate_peft(ours)
    assert len(report.fused) == 14 and not report.skipped
    for mode in (True, False):
        stock.train(mode), ours.train(mode)
        expected = stock(input_ids=IDS, labels=IDS)
        found = ours(input_ids=IDS, labels=IDS)
        assert close(found.logits, expected.logits)
        expected.loss.backward(), found.loss.backward()
    for (name, one), other in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if one.requires_grad:
            assert close(one.grad, other.grad, 1e-3), name
    assert report.calls.fused == 28 and not report.calls.fallen_back
    with lk.record_plans() as answers:
        ours(input_ids=IDS)
    assert {(a.op, a.problem.four_bit, a.backend) for a in answers} == {
        ("lora_linear_fwd", True, "cpu")
    }
    with ours.disable_adapter(), stock.disable_adapter():
        assert close(ours(input_ids=IDS).logits, stock(input_ids=IDS).logits)
    # The base layer was called in evaluation mode, and its bytes are still as they were.
    ours(input_ids=IDS)
    assert not report.calls.fallen_back
    lk.restore_peft(ours)
    assert {type(m) for m in ours.modules()} == {type(m) for m in stock.modules()}


def test_prepared_for_training_with_checkpointing():
    model = quantised(llama(), torch.bfloat16)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)
    )
    report = lk.accelerate_peft(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert report.calls.fused >= 6 * 14 and not report.calls.fallen_back


def test_mixed_batches():
    stock = adapted(adapters=("a", "bb"))
    ours = copy.deepcopy(stock)
    in_full(stock)
    report = lk.accelerate_peft(ours)
    names = ["bb", "__base__"]
    expected = stock.eval()(input_ids=IDS, adapter_names=names).logits
    assert close(ours.eval()(input_ids=IDS, adapter_names=names).logits, expected)
    assert report.calls.fused == 14 and not report.calls.fallen_back


def test_files_pickles_and_merging_are_pefts(tmp_path):
    stock = adapted()
    ours = copy.deepcopy(stock)
    lk.accelerate_peft(ours)
    stock.save_pretrained(tmp_path / "stock"), ours.save_pretrained(tmp_path / "ours")
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "stock" / name).read_bytes()
    assert stock.state_dict().keys() == ours.state_dict().keys()
    ours.eval()
    layer = next(m for m in ours.modules() if type(m).__name__ == "FusedLinear4bit")
    x = torch.randn(3, layer.in_features)
    y = layer(x)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.merge()
        merged = layer(x)
        layer.unmerge()
    # PEFT quantises the sum anew.
    assert close(merged, y, 0.5) and close(layer(x), y, 0.5)


def test_apply_lora_on_what_bitsandbytes_quantised():
    model = lk.apply_lora(quantised(llama()), r=4, init_lora_weights=False).eval()
    with lk.record_plans() as answers:
        y = model(input_ids=IDS).logits
    assert len(answers) == 14 and all(a.problem.four_bit for a in answers)
    lk.merge_adapter(model)
    assert close(model(input_ids=IDS).logits, y)
    lk.unmerge_adapter(model)
    assert torch.equal(model(input_ids=IDS).logits, y)


def loaded(folder, dtype=torch.float32):
    """From disk, by transformers' own quantiser; every linear layer but the head."""
    llama().save_pretrained(folder)
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map="cpu"
    )


def test_a_model_that_transformers_loads_in_four_bits(tmp_path):
    base = in_full(loaded(tmp_path))
    assert sum(isinstance(m, bnb.nn.Linear4bit) for m in base.modules()) == 14
    expected = base(input_ids=IDS).logits
    model = lk.apply_lora(loaded(tmp_path), r=4, init_lora_weights=False)
    assert len(lk.lora_report(model).adapted) == 14
    with lk.record_plans() as answers:
        found = model(input_ids=IDS).logits
    assert len(answers) == 14 and all(a.problem.four_bit for a in answers)
    assert not close(found, expected, 1e-2)
    with lk.disable_adapter(model):
        assert close(model(input_ids=IDS).logits, expected)
    lk.save_adapter(model, tmp_path / "adapter")
    theirs = in_full(peft.PeftModel.from_pretrained(loaded(tmp_path), tmp_path / "adapter"))
    assert close(theirs(input_ids=IDS).logits, found)
    assert close(lk.load_adapter(loaded(tmp_path), tmp_path / "adapter")(IDS).logits, found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_trainer(checkpointing, tmp_path):
    model = peft.prepare_model_for_kbit_training(
        loaded(tmp_path, torch.bfloat16), use_gradient_checkpointing=checkpointing
    )
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    report = lk.accelerate_peft(model)
    before = [p.detach().clone() for p in model.parameters()]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    # Recomputing a block ends before its last layer, whose result is not saved.
    assert report.calls.fused == 6 * (14 + 12 * checkpointing)
    assert not report.calls.fallen_back
    for old, parameter in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, parameter) != parameter.requires_grad


@pytest.mark.parametrize("how", ["apply_lora", "accelerate_peft"])
def test_compiled(how, tmp_path):
    if how == "apply_lora":
        model = lk.apply_lora(loaded(tmp_path), r=4, init_lora_weights=False)
    else:
        model = adapted()
        lk.accelerate_peft(model)
    model.eval()
    block = (model if how == "apply_lora" else model.base_model.model).model.layers[0].mlp
    x = torch.randn(2, 5, 64)
    leaves = [x.requires_grad_(), *(p for p in block.parameters() if p.requires_grad)]
    expected = block(x)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found = compiled(x)
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), leaves), gradients, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_eight_bits_are_left_to_peft_with_a_reason():
    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    with pytest.raises(TypeError, match="Linear8bitLt"):
        lk.FusedLoRALinear.from_linear(layer)
