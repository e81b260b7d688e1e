"""Adapt a vision transformer to new classes: LoRA in its layers, the classifier trained in full.

python examples/vision_transformer.py MODEL OUTPUT
"""

import argparse

import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification

import lora_kernels as lk


def batches(classes, size, count):
    """Put your images here: random ones, whose brightness tells the class."""
    for _ in range(count):
        labels = torch.randint(classes, (16,))
        yield torch.randn(16, 3, size, size) + labels[:, None, None, None], labels


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a folder or a name on the hub")
    parser.add_argument("output", help="the folder for the adapter")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--classes", type=int, default=3)
    args = parser.parse_args(arguments)

    model = AutoModelForImageClassification.from_pretrained(
        args.model, num_labels=args.classes, ignore_mismatched_sizes=True
    )
    lk.apply_lora(model, r=8, modules_to_save=["classifier"])
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for images, labels in batches(args.classes, model.config.image_size, args.steps):
        loss = F.cross_entropy(model(pixel_values=images).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss of the last batch: {loss.item():.4f}")
    lk.save_adapter(model, args.output)


if __name__ == "__main__":
    main()
