"""Serve many adapters of PEFT from one model: every prompt of a batch with its own.

python examples/serve_many_adapters.py MODEL ADAPTER ADAPTER ... --prompt "Once upon a time"
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_kernels as lk


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or a name on the hub")
    parser.add_argument("adapters", nargs="+", help="folders of adapters")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=20)
    args = parser.parse_args(arguments)

    # Left, so that every prompt ends where the answer begins.
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model).eval()
    store = lk.AdapterStore(model, max_adapters=8, max_rank=64)  # 8 at a time, more in memory
    for folder in args.adapters:
        store.load(Path(folder).name, folder)

    names = [None, *store.names]  # None: the model without an adapter
    for first in range(0, len(names), 8):
        group = names[first : first + 8]
        prompts = tokenizer([args.prompt] * len(group), return_tensors="pt", padding=True)
        with torch.no_grad(), store.batch(group):
            answers = model.generate(**prompts, max_new_tokens=args.tokens)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        for name, text in zip(group, texts, strict=True):
            print(f"{name or 'no adapter'}: {text}")


if __name__ == "__main__":
    main()
