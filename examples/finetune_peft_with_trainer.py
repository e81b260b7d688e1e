"""Fine-tune a model of PEFT with transformers' Trainer; one line moves it onto lora_kernels.

python examples/finetune_peft_with_trainer.py MODEL TEXT_FILE OUTPUT
"""

import argparse

import peft
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import lora_kernels as lk


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or a name on the hub")
    parser.add_argument("text", help="a text file")
    parser.add_argument("output", help="the folder for the adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=256, help="per sequence")
    args = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    with open(args.text, encoding="utf-8") as file:
        ids = tokenizer(file.read())["input_ids"]
    pieces = [ids[i : i + args.tokens] for i in range(0, len(ids), args.tokens)]

    model = AutoModelForCausalLM.from_pretrained(args.model)
    config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")
    model = peft.get_peft_model(model, config)
    report = lk.accelerate_peft(model)  # the only line that is not PEFT's

    options = TrainingArguments(args.output, max_steps=args.steps, save_strategy="no")
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    dataset = [{"input_ids": piece} for piece in pieces]
    Trainer(model, options, train_dataset=dataset, data_collator=collator).train()
    print(report.calls)
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
