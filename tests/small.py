"""Tiny models of transformers with random weights, their inputs, and adapters that show.

Every weight is drawn so large, and every adapter made as large as the weight it belongs to, that
logits without the adapter are far away from logits with it: nothing here passes by being near zero.
"""

import contextlib
import copy
import os
import re
import socket
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_kernels as lk
from lora_kernels import FusedLoRALinear

transformers.logging.set_verbosity_error()


def need_peft_for_transformers():
    """Skip where transformers' own integration refuses the PEFT that is installed as too old."""
    from transformers.integrations import peft as integration
    from transformers.utils.peft_utils import check_peft_version

    try:
        check_peft_version(min_version=integration.MIN_PEFT_VERSION)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__}: {error}")


VOCABULARY = 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = TEXT | SPECIAL | {"num_key_value_heads": 2}
# Attention's c_proj is a square Conv1D.
GPT = SPECIAL | {
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
}
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
T5 = SPECIAL | {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_ff": 64,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART = SPECIAL | {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "init_std": 0.2,
}
SPEECH = TEXT | {
    "conv_dim": [16, 16],
    "conv_stride": [5, 4],
    "conv_kernel": [10, 4],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "mask_time_prob": 0.0,
    "layerdrop": 0.0,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
MIXTURE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
DISENTANGLED = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
}
MAMBA = {"state_size": 8, "time_step_rank": 4}

# name -> (model class, configuration class, configuration)
ARCHITECTURES = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 16}),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT | {"num_labels": 5}),
    "vit": ("ViTForImageClassification", "ViTConfig", VISION | {"num_labels": 5}),
    # Other heads.
    "gpt2 sequences": ("GPT2ForSequenceClassification", "GPT2Config", GPT),
    "gpt2 tokens": ("GPT2ForTokenClassification", "GPT2Config", GPT),
    "gpt2 bare": ("GPT2Model", "GPT2Config", GPT),
    "llama sequences": ("LlamaForSequenceClassification", "LlamaConfig", DECODER),
    "llama questions": ("LlamaForQuestionAnswering", "LlamaConfig", DECODER),
    "llama bare": ("LlamaModel", "LlamaConfig", DECODER),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", DECODER | {"tie_word_embeddings": True}),
    "bert bare": ("BertModel", "BertConfig", TEXT),
    "bert masked": ("BertForMaskedLM", "BertConfig", TEXT),
    "bert tokens": ("BertForTokenClassification", "BertConfig", TEXT),
    "bert questions": ("BertForQuestionAnswering", "BertConfig", TEXT),
    "roberta masked": ("RobertaForMaskedLM", "RobertaConfig", TEXT),
    "t5 encoder": ("T5EncoderModel", "T5Config", T5),
    # Encoders of text.
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", TEXT),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", TEXT | {"embedding_size": 16}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4},
    ),
    "deberta": ("DebertaForSequenceClassification", "DebertaConfig", TEXT | DISENTANGLED),
    "deberta v2": ("DebertaV2ForSequenceClassification", "DebertaV2Config", TEXT | DISENTANGLED),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", TEXT),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        TEXT | SPECIAL | {"cls_token_id": 1, "sep_token_id": 2},
    ),
    # Decoders.
    "opt": ("OPTForCausalLM", "OPTConfig", DECODER | {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "gpt neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", DECODER),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT | {"rotary_dim": 4}),
    "falcon": ("FalconForCausalLM", "FalconConfig", DECODER),
    "bloom": ("BloomForCausalLM", "BloomConfig", DECODER | {"n_head": 4, "n_layer": 2}),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | {"num_local_experts": 4}),
    "phi": ("PhiForCausalLM", "PhiConfig", DECODER),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", DECODER | {"head_dim": 12}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | {"head_dim": 12}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "qwen2 moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        DECODER | MIXTURE | {"shared_expert_intermediate_size": 16},
    ),
    "deepseek v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DECODER | LATENT),
    "gpt oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        DECODER | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12},
    ),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", DECODER),
    "mamba": ("MambaForCausalLM", "MambaConfig", DECODER | MAMBA),
    "falcon mamba": ("FalconMambaForCausalLM", "FalconMambaConfig", DECODER | MAMBA),
    "mamba2": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        DECODER | {"num_heads": 12, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    ),
    # Encoders with decoders.
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5 gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu"},
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        BART | {"max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 8},
    ),
    # Images, and images with text.
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", VISION),
    "beit": ("BeitForImageClassification", "BeitConfig", VISION),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": TEXT | SPECIAL, "vision_config": VISION, "projection_dim": 16},
    ),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": TEXT | SPECIAL, "vision_config": VISION},
    ),
    # Speech.
    "wav2vec2": ("Wav2Vec2ForCTC", "Wav2Vec2Config", SPEECH),
    "wavlm": ("WavLMForCTC", "WavLMConfig", SPEECH),
}

# The five that every promise is checked on.
FAMILIES = ["gpt2", "llama", "qwen3", "bert", "vit"]
GENERATING = ["gpt2", "llama", "qwen3"]


def build(name, seed=0, **changes):
    """A model in eval mode; the same name, seed and changes give the same weights."""
    model_class, config_class, config = ARCHITECTURES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**copy.deepcopy(config | changes))
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def batch_for(model, rows=2, seed=1):
    """Inputs of every kind that the model's forward asks for."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length):
        ids = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        ids[:, -1] = 2
        return ids

    def normal(*shape):
        return torch.randn(rows, *shape, generator=generator)

    kind = type(model).__name__
    if kind.startswith(("CLIP", "Siglip")):
        return {"input_ids": tokens(9), "pixel_values": normal(3, 16, 16)}
    if kind.startswith("Whisper"):
        return {"input_features": normal(8, 64), "decoder_input_ids": tokens(7)}
    if model.main_input_name == "pixel_values":
        side = model.config.image_size
        return {"pixel_values": normal(3, side, side)}
    if model.main_input_name == "input_values":
        return {"input_values": normal(4000)}
    batch = {"input_ids": tokens(11)}
    if model.config.is_encoder_decoder and not kind.endswith("EncoderModel"):
        batch["decoder_input_ids"] = tokens(7)
    return batch


def floats(output):
    """Every floating tensor of a model's output but its cache, in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if hasattr(output, "items"):
        return [
            t for k, v in output.items() if "past" not in k and "cache" not in k for t in floats(v)
        ]
    return [t for v in output for t in floats(v)] if isinstance(output, (list, tuple)) else []


def logits(model, batch=None):
    output = model(**(batch_for(model) if batch is None else batch))
    return output.logits if hasattr(output, "logits") else floats(output)[0]


def loss(model, batch=None):
    """Cross entropy of the logits against classes drawn at random, the same ones every time."""
    y = logits(model, batch).flatten(0, -2)
    classes = torch.randint(y.shape[-1], y.shape[:1], generator=torch.Generator().manual_seed(2))
    return F.cross_entropy(y, classes)


def adapters(model):
    """name -> (A, B, scaling, base weight as [out, in]) of a model of ours or of PEFT's."""
    found = {}
    for name, module in model.named_modules():
        name = name.removeprefix("base_model.model.")
        if isinstance(module, FusedLoRALinear):
            transposed = module.fan_in_fan_out
            found[name] = module.lora_A, module.lora_B, module.scaling, module.weight
        elif isinstance(module, peft.tuners.lora.LoraLayer):
            transposed = isinstance(module.base_layer, Conv1D)
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            found[name] = a, b, module.scaling["default"], module.base_layer.weight
        else:
            continue
        a, b, scaling, weight = found[name]
        found[name] = a, b, scaling, weight.t() if transposed else weight
    return found


@torch.no_grad()
def draw_adapter(model, seed=3):
    """A and B at random, with ``scaling * B A`` as large as the weight; biases and modules that are
    trained in full are drawn anew too. The same adapter for the same names, ours or PEFT's."""
    generator = torch.Generator().manual_seed(seed)
    pairs = adapters(model)
    for name in sorted(pairs):
        a, b, scaling, weight = pairs[name]
        a.copy_(torch.randn(a.shape, generator=generator))
        b.copy_(torch.randn(b.shape, generator=generator))
        b.mul_(weight.norm() / (scaling * b @ a).norm())
    drawn = {parameter for a, b, *_ in pairs.values() for parameter in (a, b)}
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad and parameter not in drawn:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@torch.no_grad()
def merged_by_hand(model, adapted):
    """``model`` (a plain one) with ``scaling * B A`` of ``adapted`` added to its weights."""
    for name, (a, b, scaling, _) in adapters(adapted).items():
        module = model.get_submodule(name)
        delta = scaling * b.double() @ a.double()
        weight = module.weight.double()
        module.weight.copy_(weight + (delta.t() if isinstance(module, Conv1D) else delta))
    return model


def peft_model(model, **config):
    return peft.get_peft_model(model, peft.LoraConfig(**config)).eval()


def relative_difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


class Snapshot:
    """Everything of a model that a refused call must leave alone."""

    def __init__(self, model):
        self.model = model
        self.before = self._state()

    def _state(self):
        state = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            state[f"module {name}"] = (id(module), type(module), module.training)
            state[f"hooks {name}"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
            state[f"attributes {name}"] = sorted(vars(module))
            state[f"scaling {name}"] = getattr(module, "scaling", None)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            state[f"parameter {name}"] = (id(parameter), parameter.requires_grad, parameter.dtype)
            state[f"values {name}"] = parameter.detach().clone()
        for name, buffer in self.model.named_buffers(remove_duplicate=False):
            state[f"values {name}"] = buffer.clone()
        return state

    def assert_unchanged(self):
        after = self._state()
        assert after.keys() == self.before.keys()
        for name, value in self.before.items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(value, after[name]), f"{name} changed"


@contextlib.contextmanager
def isolated():
    """No network, and one thread: on shapes this small a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with mock.patch.object(
            socket.socket, "connect", side_effect=OSError("no network in tests")
        ):
            yield
    finally:
        torch.set_num_threads(threads)


class Square(nn.Module):
    """A square Conv1D by itself: a weight used the wrong way round passes every check of shapes."""

    def __init__(self, width=40):
        super().__init__()
        self.proj = Conv1D(width, width)
        nn.init.normal_(self.proj.weight, std=width**-0.5)
        nn.init.normal_(self.proj.bias)

    def forward(self, x):
        return self.proj(x)


# A rank that is no power of two, and layers that differ in rank and scale.
CONFIG = {
    "r": 5,
    "lora_alpha": 12,
    "rank_pattern": {r".*\.0\..*": 3},
    "alpha_pattern": {r".*\.1\..*": 20},
}


def adapt(name, seed=3, **config):
    return draw_adapter(lk.apply_lora(build(name), **(CONFIG | config)), seed)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def in_our_names(names):
    """PEFT's names of parameters, as the same ones are called here."""
    return {
        re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", name)
        .removeprefix("base_model.model.")
        .replace(".base_layer.", ".")
        .replace(".modules_to_save.default.", ".")
        for name in names
    }
