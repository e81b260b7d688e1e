"""What ``compare`` compares: the model and adapter behind its arguments, a batch for them, and the
memory that it will take."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Generated for each prompt in a step of --generate.
NEW_TOKENS = 32
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class UserError(Exception):
    """What the user must change; the message is all that is shown."""


@dataclass
class Source:
    """Where the model and the adapter come from."""

    folder: Path
    adapter: Path | None
    has_weights: bool


def find(model: str, adapter: Path | None) -> Source:
    """The folders behind the arguments.

    Raises:
        UserError: one does not exist, or is no model or adapter.
    """
    folder = _folder(model, "MODEL")
    if not (folder / "config.json").is_file():
        if not (folder / "adapter_config.json").is_file():
            raise UserError(
                f"{folder} has neither config.json (a model) nor adapter_config.json (an adapter)"
            )
        if adapter is not None:
            raise UserError(f"{folder} is an adapter already: give its base model, or no --adapter")
        adapter = folder
        folder = _base_of(adapter)
    if adapter is not None:
        adapter = adapter.expanduser()
        _check_adapter(adapter)
    has_weights = any(any(folder.glob(pattern)) for pattern in _WEIGHTS)
    return Source(folder, adapter, has_weights)


def _folder(name: str, argument: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{argument} {name} is a file, not a folder")
    cached = _cached(name)
    if cached is None:
        raise UserError(
            f"{argument} {name} is no folder, and no model in the Hugging Face cache. Nothing is "
            "downloaded here: run 'hf download NAME' first, or give a folder with a config.json "
            "(without weight files it gets random weights)"
        )
    return cached


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that a repository may have
        return None
    return Path(found).parent if isinstance(found, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def _base_of(adapter: Path) -> Path:
    base = _read_json(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"{adapter} does not name its base model: give the model's folder, and the adapter "
            f"with --adapter {adapter}"
        )
    beside = adapter / str(base)
    try:
        folder = beside if beside.is_dir() else _folder(str(base), "the adapter's base model")
    except UserError:
        raise UserError(
            f"the adapter's base model {base} is neither a folder nor in the Hugging Face cache: "
            f"give the model's folder, and the adapter with --adapter {adapter}"
        ) from None
    if not (folder / "config.json").is_file():
        raise UserError(f"the adapter's base model {folder} has no config.json")
    return folder


def _check_adapter(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"--adapter {folder} is no folder")
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"--adapter {folder} has no adapter_config.json")
    kind = _read_json(folder / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise UserError(f"--adapter {folder} is of type {kind}, not LORA")
    if not any((folder / f"adapter_model.{ending}").is_file() for ending in ("safetensors", "bin")):
        raise UserError(f"--adapter {folder} has no adapter_model.safetensors")


def describe(folder: Path) -> tuple[Any, Any]:
    """The folder's configuration, and the class of transformers for it."""
    import transformers

    _read_json(folder / "config.json")
    config = or_error(
        folder, lambda: transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    )
    for name in getattr(config, "architectures", None) or []:
        if hasattr(transformers, name):
            return config, getattr(transformers, name)
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM"):
        known = getattr(transformers, auto)._model_mapping
        if type(config) in known:
            found = known[type(config)]
            return config, found[0] if isinstance(found, tuple) else found
    found = or_error(folder, lambda: transformers.AutoModel._model_mapping[type(config)])
    return config, found[0] if isinstance(found, tuple) else found


def outline_of(source: Source, config: Any, model_class: Any) -> Any:
    """The model without its weights, on the meta device."""
    with torch.device("meta"):
        return or_error(source.folder, lambda: model_class(config))


def load(source: Source, config: Any, model_class: Any, dtype: torch.dtype) -> Any:
    """The model with its weights, or with random ones where the folder has none."""
    if source.has_weights:
        return or_error(
            source.folder,
            lambda: model_class.from_pretrained(
                source.folder, config=config, dtype=dtype, local_files_only=True
            ),
        )
    torch.manual_seed(0)
    return or_error(source.folder, lambda: model_class._from_config(config, dtype=dtype))


def adapted(model: Any, source: Source, r: int, dropout: float) -> Any:
    """``model`` with its adapter, by PEFT."""
    import peft

    with warnings.catch_warnings():
        # PEFT sets what it warns of by itself; and PEFT 0.21 reads an attribute that transformers
        # 5.23 has renamed.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        folder = source.adapter
        if folder is not None:
            return or_error(
                folder, lambda: peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
            )
        # Drawn at random: with B = 0 a missing adapter would not show.
        adapter = peft.LoraConfig(
            r=r,
            lora_alpha=2 * r,
            lora_dropout=dropout,
            target_modules="all-linear",
            init_lora_weights=False,
        )
        return or_error(source.folder, lambda: peft.get_peft_model(model, adapter))


def shared_copy(model: nn.Module) -> Any:
    """A copy that shares the frozen parameters and has trainable ones of its own."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


def or_error(where: Path | str, action: Callable[[], Any]) -> Any:
    """``action()``; what it raises becomes one line that begins with ``where``."""
    try:
        return action()
    except Exception as error:  # of transformers, PEFT, safetensors: they share no class
        raise UserError(f"{where}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# A batch, and the memory it takes.


def inputs_for(model: Any, rows: tuple[int, int | None] | None, generate: bool) -> dict[str, Any]:
    """A random batch for ``model``, the same for the same arguments.

    Raises:
        UserError: the model wants other inputs than text or images, does not generate, or has a
            shorter context.
    """
    generator = torch.Generator().manual_seed(1)
    config = model.config.get_text_config()
    batch, tokens = rows or ((1, None) if generate else (4, None))
    name, kind = model.main_input_name, type(model).__name__
    if generate and not model.can_generate():
        raise UserError(f"{kind} does not generate: leave --generate out")
    if name == "pixel_values":
        side = getattr(model.config, "image_size", None) or 224
        height, width = (side, side) if isinstance(side, int) else side
        channels = getattr(model.config, "num_channels", 3)
        return {name: torch.randn(batch, channels, height, width, generator=generator)}
    if name != "input_ids" or not hasattr(config, "vocab_size"):
        raise UserError(f"{kind} takes {name}: compare can make text (input_ids) and images only")
    made = NEW_TOKENS if generate else 0
    limit = getattr(config, "max_position_embeddings", None)
    room = limit - made if isinstance(limit, int) and limit > 0 else None
    if tokens is None:
        tokens = min(32 if generate else 128, room or 128)
    elif room is not None and tokens > room:
        what = f" and the {made} it generates" if made else ""
        raise UserError(f"--rows {batch}x{tokens}{what}: {kind} takes {limit} tokens at most")

    def draw() -> Tensor:
        return torch.randint(config.vocab_size, (batch, tokens), generator=generator)

    inputs = {name: draw()}
    if getattr(model.config, "is_encoder_decoder", False) and not generate:
        inputs["decoder_input_ids"] = draw()
    return inputs


def required_bytes(
    outline: Any, inputs: dict[str, Tensor], dtype: torch.dtype, r: int, generate: bool
) -> int:
    """What a comparison takes at least: one set of weights, two adapters, the activations of a
    step, and on a CPU the packed weights of generation.

    Raises:
        UserError: there is no linear layer for an adapter.
    """
    head = outline.get_output_embeddings()
    linears = [layer for layer in linear_layers(outline).values() if layer is not head]
    if not linears:
        raise UserError(
            f"{type(outline).__name__} has no linear layer besides its head: nothing to adapt"
        )
    size = dtype.itemsize
    weights = size * sum(p.numel() for p in outline.parameters())
    widths = sum(sum(layer.weight.shape) for layer in linears)
    # A, B, their gradients and AdamW's two moments, in float32, for both.
    adapters = 2 * 4 * 4 * r * widths
    if generate:
        return weights + adapters + size * sum(layer.weight.numel() for layer in linears)
    rows = next(iter(inputs.values())).shape[:2].numel() if "input_ids" in inputs else 0
    vocabulary = len(head.weight) if head is not None else 0
    # Logits in the model's dtype, and their softmax and gradient in float32.
    return weights + adapters + rows * (size * widths + (size + 8) * vocabulary)


def linear_layers(model: Any) -> dict[str, Any]:
    """Every ``nn.Linear`` and Conv1D by name, heads too."""
    from transformers.pytorch_utils import Conv1D

    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free for this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    meminfo, limit, used = (
        Path(path)
        for path in (
            "/proc/meminfo",
            "/sys/fs/cgroup/memory.max",
            "/sys/fs/cgroup/memory.current",
        )
    )
    if meminfo.is_file():
        lines = meminfo.read_text().splitlines()
        found += [int(s.split()[1]) * 1024 for s in lines if s.startswith("MemAvailable:")]
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found, default=None)


def check_memory(need: int, available: int | None) -> None:
    if available is not None and need > available:
        raise UserError(
            f"too little memory: this takes {need / 2**30:.1f} GiB at least and "
            f"{available / 2**30:.1f} GiB are free; try --dtype bfloat16, fewer --rows or a "
            "smaller model"
        )
