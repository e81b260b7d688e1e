"""What was done to a model, for people: reports that say equal things once."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

# A kind of layer with less of the model's weights than this is not worth a line.
_WORTH_A_LINE = 0.01

# Parameters, and classes of modules, whose matrices are looked up or added or choose experts: LoRA
# leaves them alone.
_NO_FACTOR = re.compile("embed|pos|token|quer|bias|norm|scale|gamma|latent|A_log", re.I)
_NO_LAYER = re.compile("embed|norm|router", re.I)


@dataclass
class LoRAReport:
    """What :func:`apply_lora` did.

    ``adapted``: name -> "kind [out, in], r"; ``skipped``: name -> reason; ``unreached``: kind of
    module -> how much of the model's weights it holds as matrices that cannot have an adapter
    (from 1% on); ``never_called``: adapted layers that no call reached, known once another was;
    ``merged``: how many modules have their adapter merged into the weights now.
    """

    adapted: dict[str, str]
    skipped: dict[str, str]
    modules_to_save: list[str]
    notes: list[str]
    trainable_parameters: int
    all_parameters: int
    unreached: dict[str, str] = field(default_factory=dict)
    never_called: list[str] = field(default_factory=list)
    merged: int = 0

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.all_parameters, 1)
        lines = [
            f"LoRA on {len(self.adapted)} layers, {len(self.skipped)} linear layers skipped; "
            f"trainable {self.trainable_parameters:,} of {self.all_parameters:,} parameters "
            f"({share:.4f}%)"
        ]
        lines += [f"  adapted  {line}" for line in grouped(self.adapted)]
        lines += [f"  skipped  {line}" for line in grouped(self.skipped)]
        lines += [f"  no adapter possible  {kind}: {what}" for kind, what in self.unreached.items()]
        lines += [f"  trained in full  {name}" for name in self.modules_to_save]
        if self.merged:
            modules = f"{self.merged} module{'s' * (self.merged > 1)}"
            lines.append(f"  merged  into the weights of {modules}; unmerge_adapter undoes it")
        why = "not reached by any call so far, so its adapter has no effect"
        lines += [f"  never called  {x}" for x in grouped(dict.fromkeys(self.never_called, why))]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def pattern(name: str) -> str:
    """``name`` with a star for each number: the same for equal layers of a model."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def grouped(items: Mapping[str, str]) -> list[str]:
    """ "name: what" of each item; those that differ in numbers of the name alone in one line.

    >>> grouped({"h.0.fc": "r=8", "h.1.fc": "r=8", "h.2.fc": "r=4"})
    ['h.0-1.fc: r=8 (2 layers)', 'h.2.fc: r=4']
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name, what in items.items():
        groups.setdefault((pattern(name), what), []).append(name)
    lines = []
    for (_, what), names in groups.items():
        parts = zip(*(name.split(".") for name in names), strict=True)
        name = ".".join(_ranges(column) for column in parts)
        lines.append(f"{name}: {what}" + f" ({len(names)} layers)" * (len(names) > 1))
    return lines


def _ranges(column: Collection[str]) -> str:
    """ "0-3,5" for the numbers in ``column``; what is no number is the same in all."""
    if not all(part.isdigit() for part in column):
        return next(iter(column))
    runs: list[list[int]] = []
    for number in sorted(set(map(int, column))):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def unreached(
    model: nn.Module,
    known: Collection[nn.Module],
    refused: Mapping[nn.Module, str],
    is_named: Callable[[str], bool],
) -> tuple[dict[str, str], list[str]]:
    """:attr:`LoRAReport.unreached`, and the kinds of it of which a user has to be told: those that
    ``is_named`` a path of.

    ``known``: modules that are adapted or were left out on purpose; ``refused``: linear layers that
    were wanted, with the reasons.
    """
    everything = sum(parameter.numel() for parameter in model.parameters())
    kinds: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    told: list[str] = []
    seen: set[Tensor] = {p for module in known for p in module.parameters()}
    for path, module in model.named_modules():
        convolution = isinstance(module, nn.modules.conv._ConvNd)
        # What a parametrisation holds is the layer's own.
        whole = convolution or module in refused
        matrices = {
            name: parameter
            for name, parameter in module.named_parameters(recurse=whole)
            if parameter not in seen and _is_matrix(module, name, parameter)
        }
        if not matrices:
            continue
        seen.update(matrices.values())
        if module in refused:
            kind = f"{type(module).__name__} ({refused[module]})"
        else:
            kind = f"{type(module).__name__} ({', '.join(matrices)})"
        kinds.setdefault(kind, []).append(path)
        sizes[kind] = sizes.get(kind, 0) + sum(p.numel() for p in matrices.values())
        if not convolution and any(is_named(f"{path}.{name}") for name in matrices):
            told.append(kind)
    worth = {k: size for k, size in sizes.items() if size >= _WORTH_A_LINE * everything}
    texts = {
        kind: f"{len(kinds[kind])} module{'s' * (len(kinds[kind]) > 1)}, "
        f"{100 * size / everything:.1f}% of the weights"
        for kind, size in worth.items()
    }
    return texts, [kind for kind in worth if kind in told]


def _is_matrix(module: nn.Module, name: str, parameter: Tensor) -> bool:
    return (
        not nn.parameter.is_lazy(parameter)
        and sum(size > 1 for size in parameter.shape) > 1
        and not isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        and not _NO_FACTOR.search(name)
        and not _NO_LAYER.search(type(module).__name__)
    )
