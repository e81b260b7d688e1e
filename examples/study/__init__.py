"""Questions about LoRA, each answered by a measurement on your machine; ``make study``.

Every question is a module here, short enough to copy: what it measures, its table, its plot, and a
finding of one or two sentences that is computed from the table. By default they are asked of the
demo's small GPT-2, which is pre-trained once; ``--model`` and ``--data`` name yours. Everything
goes into one report, in Markdown and in HTML. A question that has been answered is not measured
again until its settings, its sources or the base model change.
"""

# In the order of their numbers; each is a module of this package.
QUESTIONS = (
    "rank",
    "initial",
    "modules",
    "scaling",
    "merging",
    "memory",
    "inference",
    "methods",
    "adalora",
    "four_bit",
    "vision",
    "variants",
)
