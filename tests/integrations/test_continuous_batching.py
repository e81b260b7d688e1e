"""Continuous batching with an adapter per request: tokens against each adapter's merged model."""

import contextlib
import copy
import threading
import time

import pytest
import torch

import lora_kernels as lk
from lora_kernels.integrations.continuous_batching import adapt_requests
from lora_kernels.planning.device import facts

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


# On a model with a store.


class Served:
    """A store with adapters french, code and poems, and a manager over it."""

    def __init__(self, model, **options):
        self.base = copy.deepcopy(model)
        self.store = lk.AdapterStore(model, max_adapters=4, max_rank=RANK)
        self.sources = {}
        for name in [*NAMES, "newer"]:
            tensors = {}
            for path, module in self.base.named_modules():
                if path.endswith("v_proj"):
                    n, k = module.weight.shape
                    tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, k)
                    tensors[f"{path}.lora_B.weight"] = torch.randn(n, RANK)
            self.sources[name] = tensors
            if name in NAMES:
                self.load(name, name)
        self.model = model
        self.options = {"num_blocks": 32, "max_batch_tokens": 16} | options
        self.steps, self.at_step = 0, {}
        self.new_manager()

    def new_manager(self):
        """Of transformers 5.17 one that starts a second time computes wrongly, without us too."""
        config = transformers.ContinuousBatchingConfig(allow_block_sharing=False, **self.options)
        settings = transformers.GenerationConfig(
            max_new_tokens=24, do_sample=False, eos_token_id=-1
        )
        self.manager = self.model.init_continuous_batching(settings, config)
        adapt_requests(self.manager, self.adapter_of, self.batch_of)

    def load(self, name, source):
        config = {"r": RANK, "lora_alpha": RANK, "target_modules": ["v_proj"]}
        self.store.load(name, self.sources[source], config=config)

    def adapter_of(self, request):
        name = request.split("-")[0]
        return {"plain": None}.get(name, name)

    def batch_of(self, names):
        self.steps += 1
        self.at_step.pop(self.steps, lambda: None)()
        return self.store.batch(rows=names)

    def run(self, *requests):
        """The results by request, which is named by its adapter and a number."""
        results = {}
        self.manager.start()
        try:
            for i, request in enumerate(requests):
                self.manager.add_request([3 + i, 7, 11, 5], request_id=request, max_new_tokens=24)
            while len(results) < len(requests):
                result = self.manager.get_result(timeout=20)
                assert result is not None, results
                if result.is_finished():
                    results[result.request_id] = result
                    if result.request_id in self.at_step:
                        self.at_step[result.request_id]()
        finally:
            self.manager.stop(block=True, timeout=10)
        return results

    def expected(self, source, i):
        model = copy.deepcopy(self.base)
        for path, module in model.named_modules():
            if source and path.endswith("v_proj"):
                a, b = (self.sources[source][f"{path}.lora_{c}.weight"] for c in "AB")
                module.weight.data += b @ a
        ids = torch.tensor([[3 + i, 7, 11, 5]])
        found = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        return found[0, 4:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("few", [False, True])
def test_a_request_keeps_the_version_that_it_began_with(model, few):
    served = Served(model, **{"num_blocks": 8, "block_size": 8} if few else {})
    requests = ["french-0", "plain-0", "code-0", "french-1"]
    # With few blocks of the cache requests are taken out of it and computed again.
    served.at_step[8] = lambda: served.load("french", "newer")
    offloads = []
    create = served.manager._create_batch_processor

    def counting():
        processor = create()
        offload = processor.offloading_manager.offload_requests
        processor.offloading_manager.offload_requests = lambda: offloads.append(1) or offload()
        return processor

    served.manager._create_batch_processor = counting
    results = served.run(*requests)
    assert bool(offloads) == few
    sources = ["french", None, "code", "french"]
    for i, (request, source) in enumerate(zip(requests, sources, strict=True)):
        assert results[request].error is None
        assert results[request].generated_tokens == served.expected(source, i), request
    assert served.expected("newer", 0) != served.expected("french", 0)
    served.new_manager()
    again = served.run("french-2")["french-2"]
    assert again.generated_tokens == served.expected("newer", 0)


@torch.no_grad()
def test_an_adapter_is_unloaded_when_its_requests_have_ended(model):
    served = Served(model)
    refused, ended = [], []

    def unload():
        for name in ("french", "poems"):
            try:
                served.store.unload(name)
            except RuntimeError as error:
                refused.append(str(error))

    served.at_step[6] = unload
    # As soon as its result is there.
    served.at_step["french-0"] = lambda: ended.append(served.store.unload("french"))
    results = served.run("french-0", "plain-0", "code-0")
    assert refused == ["adapter 'french' is held by 1 callers or requests"] and ended == [None]
    assert served.store.names == ["code"]
    for i, source in enumerate(("french", None, "code")):
        found = results[f"{source or 'plain'}-0"]
        assert found.error is None and found.generated_tokens == served.expected(source, i)


@torch.no_grad()
def test_a_request_without_its_adapter_ends_alone(model):
    served = Served(model)
    results = served.run("french-0", "nobody-0", "plain-0")
    assert "there is no adapter 'nobody'" in results["nobody-0"].error
    for i, source in ((0, "french"), (2, None)):
        found = results[f"{source or 'plain'}-0"]
        assert found.error is None and found.generated_tokens == served.expected(source, i)


@torch.no_grad()
def test_a_cancelled_request_lets_go_of_its_adapter(model):
    served = Served(model)
    served.at_step[3] = lambda: served.manager.cancel_request("french-0")
    served.manager.start()
    try:
        served.manager.add_request([3, 7], request_id="french-0", max_new_tokens=100)
        end = time.monotonic() + 20
        while "french" in served.store and time.monotonic() < end:
            time.sleep(0.05)
            if served.steps >= 3:
                with contextlib.suppress(RuntimeError):
                    served.store.unload("french")
    finally:
        served.manager.stop(block=True, timeout=10)
    assert "french" not in served.store


@torch.no_grad()
def test_what_a_request_is_forked_into_has_its_version(model):
    served = Served(model)
    # The configuration allows it for sampling alone, whose tokens are not known beforehand.
    served.manager.num_return_sequences = 3
    served.at_step[5] = lambda: served.load("french", "newer")
    found = []
    served.manager.start()
    try:
        served.manager.add_request([3, 7, 11, 5], request_id="french-0", max_new_tokens=24)
        while len(found) < 3:
            result = served.manager.get_result(timeout=20)
            assert result is not None and result.error is None, result
            found += [result.generated_tokens] if result.is_finished() else []
    finally:
        served.manager.stop(block=True, timeout=10)
    assert found == [served.expected("french", 0)] * 3
