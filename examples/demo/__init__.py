"""The main job on real input: fine-tune a LoRA adapter, and what follows from it; ``make demo``.

By default a small GPT-2 is pre-trained for a minute on the standard library's sources, without one
of its packages, and then fine-tuned on that package through ``apply_lora``, in turns with the same
steps through PEFT and with the same steps over the base in four bits. The adapter is merged,
unmerged, saved and loaded into a fresh model. Then up to ten more adapters, for ten other packages
or for parts of the user's text, are trained in mixed batches and served together through an
``AdapterStore``. Every number is a measurement of that run; the exit status is 1 if a check failed.
"""
