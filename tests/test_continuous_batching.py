"""Continuous batching with an adapter per request: tokens against each adapter's merged model."""

import contextlib
import copy
import threading

import pytest
import torch

import lora_kernels as lk
from lora_kernels.device import facts
from lora_kernels.integrations.continuous_batching import adapt_requests

transformers = pytest.importorskip("transformers")

NAMES, RANK = ["french", "code", "poems"], 4
PROMPTS = {f"{name}-{i}": (name, [3 + i, 7, 11 + i, 5]) for i in range(2) for name in NAMES}
PROMPTS |= {f"plain-{i}": (None, [3 + i, 7, 11 + i, 5, 9]) for i in range(2)}


@pytest.fixture
def model():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    config.eos_token_id = config.pad_token_id = config.bos_token_id = None
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.pad_token_id = 0
    return model


class Adapters:
    """Stacks of the three adapters in every value projection, and the table of the running step."""

    def __init__(self, model):
        self.seg, self.rows, self.threads, self.answers = None, [], set(), []
        self.stacks = {}
        for name, module in model.named_modules():
            if name.endswith(("v_proj", "down_proj")):
                n, k = module.weight.shape
                stacks = torch.randn(3, RANK, k) / k**0.5, torch.randn(3, n, RANK)
                self.stacks[name] = stacks
                module.register_forward_hook(self.hook(*stacks))

    def hook(self, a, b):
        def add(module, inputs, output):
            if self.seg is None:
                return output
            return lk.segmented_lora(inputs[0], a, b, self.seg, out=output)

        return add

    @contextlib.contextmanager
    def batch(self, names):
        self.rows.append(names)
        self.threads.add(threading.current_thread())
        slots = [NAMES.index(name) if name else -1 for name in names]
        self.seg = lk.SegmentTable.from_rows(slots, [RANK] * 3, [0.5] * 3)
        try:
            with lk.record_plans() as answers:
                yield
            self.answers += answers
        finally:
            self.seg = None

    def merged(self, model, name):
        model = copy.deepcopy(model)
        for path, (a, b) in self.stacks.items():
            module = model.get_submodule(path)
            module._forward_hooks.clear()
            if name is not None:
                slot = NAMES.index(name)
                module.weight.data += 0.5 * b[slot] @ a[slot]
        return model


def run(model, adapters, **config):
    """The new tokens of every prompt, all requests in flight together."""
    config = transformers.ContinuousBatchingConfig(
        allow_block_sharing=False, num_blocks=32, max_batch_tokens=16, **config
    )
    settings = transformers.GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1)
    manager = model.init_continuous_batching(settings, config)
    adapt_requests(manager, lambda request: PROMPTS[request][0], adapters.batch)
    manager.start()
    results = {}
    try:
        for request, (_, prompt) in PROMPTS.items():
            manager.add_request(prompt, request_id=request, max_new_tokens=8)
        while len(results) < len(PROMPTS):
            result = manager.get_result(timeout=30)
            assert result is not None and result.error is None, result
            if result.is_finished():
                results[result.request_id] = result.generated_tokens
    finally:
        manager.stop(block=True, timeout=10)
    return results


@torch.no_grad()
def test_every_request_has_its_own_adapter(model):
    adapters = Adapters(model)
    found = run(model, adapters)
    merged = {name: adapters.merged(model, name) for name in [*NAMES, None]}
    for request, (name, prompt) in PROMPTS.items():
        expected = merged[name].generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        assert found[request] == expected[0, len(prompt) :].tolist(), request
    alone = {request: tuple(tokens) for request, tokens in found.items()}
    assert len({alone[f"{name}-0"] for name in NAMES}) == 3, "the adapters do nothing"
    assert any(len(set(names)) > 2 for names in adapters.rows), "no step mixed adapters"
    assert adapters.threads and threading.main_thread() not in adapters.threads
    backend = "cpu" if facts("cpu").native not in ("", "baseline") else "reference"
    assert len(adapters.answers) == len(adapters.rows) * len(adapters.stacks)
    assert {(a.op, a.backend) for a in adapters.answers} == {("segmented_lora_", backend)}


def test_shared_prompts_are_refused(model):
    settings = transformers.GenerationConfig(max_new_tokens=4, eos_token_id=-1)
    config = transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=16)
    manager = model.init_continuous_batching(settings, config)
    with pytest.raises(ValueError, match="allow_block_sharing=False"):
        adapt_requests(manager, lambda request: None, contextlib.nullcontext)
