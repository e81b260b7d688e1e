"""Fine-tune with ``apply_lora`` in a loop of one's own: no Trainer, no PEFT.

python examples/finetune_in_a_loop.py MODEL TEXT_FILE OUTPUT
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_kernels as lk


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or a name on the hub")
    parser.add_argument("text", help="a text file")
    parser.add_argument("output", help="the folder for the adapter")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256, help="per sequence")
    args = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.text, encoding="utf-8") as file:
        ids = torch.tensor(tokenizer(file.read())["input_ids"])
    if len(ids) <= args.tokens:
        parser.error(f"{args.text} has {len(ids)} tokens: --tokens must be fewer")

    model = AutoModelForCausalLM.from_pretrained(args.model)
    lk.apply_lora(model, r=16, lora_alpha=32, lora_dropout=0.05)  # every linear layer but the head
    print(lk.lora_report(model))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    for step in range(args.steps):
        starts = torch.randint(len(ids) - args.tokens, (args.batch,))
        batch = torch.stack([ids[start : start + args.tokens] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")
    lk.save_adapter(model, args.output)  # PEFT reads it


if __name__ == "__main__":
    main()
