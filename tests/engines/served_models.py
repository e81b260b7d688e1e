"""Small models with random weights and adapters in PEFT's format, and what each adapter's model
answers in transformers once it is merged in float64."""

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
VOCABULARY = 320


@dataclass(frozen=True)
class Adapter:
    name: str
    rank: int
    targets: tuple[str, ...]
    number: int

    @property
    def scale(self):
        return 2.0 if self.number % 2 else 0.5


ADAPTERS = tuple(
    Adapter(name, rank, targets, number)
    for number, (name, rank, targets) in enumerate(
        (
            ("attention-8", 8, ("q_proj", "v_proj")),
            ("linear-16", 16, LINEAR),
            ("linear-64", 64, LINEAR),
            ("gate-12", 12, ("gate_proj", "down_proj")),
            ("head-8", 8, ("q_proj", "lm_head", "embed_tokens")),
            ("keys-32", 32, ("k_proj", "o_proj")),
        )
    )
)


# Of mixtures: "experts" is PEFT's target_parameters on the 3-D Parameters of transformers 5, "each"
# names the projections of every expert, as before transformers 5; "gate" is the router.
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss")
EXPERT_ADAPTERS = tuple(
    Adapter(name, rank, targets, number)
    for number, (name, rank, targets) in enumerate(
        (
            ("attention-8", 8, ("q_proj", "v_proj")),
            ("experts-4", 4, ("experts",)),
            ("both-16", 16, (*ATTENTION, "experts")),
            ("each-8", 8, ("each",)),
            ("router-12", 12, ("gate", "o_proj")),
            ("rank-of-experts-8", 2, ("q_proj", "each")),
        )
    )
)


def config_of(family, hidden=128, layers=2, vocabulary=VOCABULARY, positions=1024):
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32 if hidden < 512 else hidden // 64,
        "num_key_value_heads": hidden // 64 if hidden < 512 else hidden // 128,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.12 * (128 / hidden) ** 0.5,
    }
    if family == "llama":
        return transformers.LlamaConfig(**sizes)
    if family in MIXTURES:
        experts = {"num_experts_per_tok": 2, "moe_intermediate_size": 96, "num_experts": 8}
        if family != "qwen3_moe":
            experts = {"num_experts_per_tok": 2, "num_local_experts": 4}
            sizes["intermediate_size"] = 160
        name = {"qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral", "gpt_oss": "GptOss"}[family]
        return getattr(transformers, f"{name}Config")(**sizes | experts, head_dim=32)
    return transformers.Qwen3Config(
        **sizes, head_dim=sizes["hidden_size"] // sizes["num_attention_heads"]
    )


def save_model(folder, family, dtype=torch.float32, **sizes):
    """A model of ``family`` ("llama", "qwen3" or one of ``MIXTURES``) in ``folder``."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **sizes))
    model.to(dtype).save_pretrained(folder)
    vocabulary = {f"t{i}": i for i in range(model.config.vocab_size)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    return Path(folder)


def matrices(adapter, model):
    """{path: (A [r, in], B [out, r])} of every layer the adapter reaches, of an embedding A [r, V],
    B [D, r], of a Parameter of experts A [E, r, in], B [E, out, r]."""
    generator = torch.Generator().manual_seed(100 + adapter.number)
    found = {}

    def draw(path, r):
        found[path] = _factors(adapter, model, path, r, generator)
        return found[path]

    for owner, _ in model.named_modules():
        name = owner.rpartition(".")[2]
        if name == "experts" and name in adapter.targets:
            draw(f"{owner}.gate_up_proj", adapter.rank)
            draw(f"{owner}.down_proj", adapter.rank)
        elif name == "experts" and "each" in adapter.targets:
            _, b = draw(f"{owner}.gate_up_proj", 2 * adapter.rank)
            # Gate and up have an A of their own: half of the rank each.
            half, r = b.shape[1] // 2, adapter.rank
            b[:, :half, r:], b[:, half:, :r] = 0, 0
            draw(f"{owner}.down_proj", r)
        elif name in adapter.targets:
            draw(f"{owner}.weight", adapter.rank)
    return found


def _factors(adapter, model, path, r, generator):
    """A and B that are together about as large as the weight: the adapter shows in the tokens."""
    weight = model.get_parameter(path).detach().float()
    *experts, n, k = weight.shape
    if _is_transposed(model, path):
        n, k = k, n
    a = torch.randn(*experts, r, k, generator=generator)
    b = torch.randn(*experts, n, r, generator=generator)
    return a, b * float(weight.std()) / (adapter.scale * r**0.5)


def _is_transposed(model, path):
    """Whether the weight is [in, out]."""
    owner = model.get_submodule(path.rpartition(".")[0])
    return isinstance(owner, torch.nn.Embedding) or getattr(owner, "is_transposed", False)


def _stored(path, a, b, adapter):
    """The tensors of a file, by name."""
    owner, _, name = path.rpartition(".")
    if owner.endswith("embed_tokens"):
        return {f"{owner}.lora_embedding_A": a, f"{owner}.lora_embedding_B": b}
    if a.dim() == 2:
        return {f"{owner}.lora_A.weight": a, f"{owner}.lora_B.weight": b}
    if "experts" in adapter.targets:
        # PEFT wraps a module once for each Parameter: the first one's are innermost.
        owner += ".base_layer" * (name == "gate_up_proj")
        b = b.permute(1, 2, 0)
        return {f"{owner}.lora_A.weight": a.flatten(0, 1), f"{owner}.lora_B.weight": b.flatten(1)}
    parts = {name: (a, b)}
    if name == "gate_up_proj":
        half, r = b.shape[1] // 2, adapter.rank
        parts = {"gate_proj": (a[:, :r], b[:, :half, :r]), "up_proj": (a[:, r:], b[:, half:, r:])}
    return {
        f"{owner}.{e}.{part}.lora_{side}.weight": t[e]
        for part, both in parts.items()
        for side, t in zip("AB", both, strict=True)
        for e in range(len(t))
    }


def _before_transformers_5(name):
    """Mixtral's name of then, which vLLM knows; those of now it drops."""
    for new, old in (("mlp", "block_sparse_moe"), ("gate_proj", "w1"), ("up_proj", "w3")):
        name = name.replace(f".{new}.", f".{old}.")
    return name.replace(".down_proj.", ".w2.")


def save_adapter(folder, adapter, model, dtype=torch.float32):
    """The adapter in PEFT's format, in a folder of its name below ``folder``."""
    folder = Path(folder, adapter.name)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}": tensor.to(dtype).contiguous()
        for path, (a, b) in matrices(adapter, model).items()
        for name, tensor in _stored(path, a, b, adapter).items()
    }
    if model.config.model_type == "mixtral":
        tensors = {_before_transformers_5(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "target_modules": sorted(adapter.targets),
        "bias": "none",
        "base_model_name_or_path": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(folder, adapter):
    """The model with the adapter in its weights; without one the model alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for path, (a, b) in (matrices(adapter, model) if adapter else {}).items():
        weight = model.get_parameter(path)
        delta = adapter.scale * b.double() @ a.double()
        delta = delta.mT if _is_transposed(model, path) else delta
        weight.data = (weight.double() + delta).float()
    return model


@torch.no_grad()
def greedy(model, prompt, tokens):
    """The next ``tokens`` tokens of the model, one at a time."""
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return out[0, len(prompt) :].tolist()


class Served:
    """A model on disk with the adapters beside it, and the tokens that each of them answers."""

    def __init__(self, family, folder):
        self.family, self.folder = family, save_model(folder / "model", family)
        model = merged(self.folder, None)
        self.adapters = EXPERT_ADAPTERS if family in MIXTURES else ADAPTERS
        self.paths = {a.name: save_adapter(folder, a, model) for a in self.adapters}
        self._models, self._answers = {None: model}, {}

    def answer(self, adapter, prompt, tokens):
        key = adapter, tuple(prompt), tokens
        if key not in self._answers:
            if adapter not in self._models:
                self._models[adapter] = merged(self.folder, adapter)
            self._answers[key] = greedy(self._models[adapter], prompt, tokens)
        return self._answers[key]


def prompt(number, length):
    generator = torch.Generator().manual_seed(1000 + number)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
