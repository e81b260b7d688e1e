"""vLLM in this process (``LLM``): each request has the tokens of its adapter merged into the model,
and our kernels computed them."""

import contextlib
import os
from collections import Counter

import pytest
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

import lora_kernels as lk
from bench.engine_models import ADAPTERS, prompt

SLOTS, TOKENS, LAYERS = 3, 16, 2


@contextlib.contextmanager
def engine(model, **options):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    settings = {
        "enable_lora": True,
        "max_loras": SLOTS,  # fewer than there are adapters
        "max_cpu_loras": len(ADAPTERS),
        "max_lora_rank": 64,
        "dtype": "float32",
        "max_num_seqs": 16,
        "max_model_len": 256,
        "max_num_batched_tokens": 64,  # fewer than some prompts have: they come in chunks
        "enable_chunked_prefill": True,
        "enable_prefix_caching": True,
    }
    llm = LLM(model=str(model.folder), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def llm(served_model):
    with engine(served_model) as llm:
        yield llm


def generate(llm, model, requests, tokens=TOKENS):
    """The outputs of [(adapter or None, prompt)], and what answered."""
    loras = [a and LoRARequest(a.name, a.number + 1, str(model.paths[a.name])) for a, _ in requests]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for _, ids in requests]
    with lk.record_plans() as answers:
        outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
    assert {(a.backend, a.plan) for a in answers} == {("cpu", "native")}, "ours did not answer"
    return outputs, Counter(a.op for a in answers)


def check(model, requests, outputs):
    base, right = 0, 0
    for (adapter, ids), output in zip(requests, outputs, strict=True):
        expected = model.answer(adapter, ids, TOKENS)
        assert list(output.outputs[0].token_ids) == expected, adapter
        base += expected == model.answer(None, ids, TOKENS)
        right += 1
    # The adapters show: only requests without one have the model's own tokens.
    assert base == sum(adapter is None for adapter, _ in requests) < right


def mixed(count):
    who = (None, *ADAPTERS)
    return [(who[i % len(who)], prompt(i, 3 + 9 * i % 119)) for i in range(count)]


def test_mixed_requests(llm, served_model):
    """Base and all adapters in one call: ranks 8 to 64, all kinds of targets, prompts in chunks."""
    requests = mixed(21)
    assert max(len(ids) for _, ids in requests) > 64
    outputs, counts = generate(llm, served_model, requests)
    check(served_model, requests, outputs)
    # Every linear layer of every step, and what adapters of embedding and head add.
    steps, rest = divmod(counts["segmented_linear_fwd"], 4 * LAYERS)
    assert steps >= TOKENS and rest == 0
    assert set(counts) == {"segmented_linear_fwd", "segmented_expand_", "segmented_lora_"}


def test_base_requests_alone(llm, served_model):
    requests = [(None, prompt(50 + i, 20 + i)) for i in range(5)]
    outputs, counts = generate(llm, served_model, requests)
    assert set(counts) == {"segmented_linear_fwd"}
    for (_, ids), output in zip(requests, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == served_model.answer(None, ids, TOKENS)


def test_prefixes_in_the_cache_are_an_adapters_own(llm, served_model):
    shared = prompt(99, 130)
    for again in range(2):
        requests = [(adapter, shared + prompt(i, 7)) for i, adapter in enumerate((None, *ADAPTERS))]
        outputs, _ = generate(llm, served_model, requests)
        check(served_model, requests, outputs)
        assert all((output.num_cached_tokens >= 128) == bool(again) for output in outputs)


@pytest.mark.parametrize("served_model", ["llama"], indirect=True)
def test_without_our_packing_the_wrapper_serves(served_model):
    """float16 is not packed: base products stay vLLM's, and adapters are ours."""
    with engine(served_model, dtype="float16", enable_prefix_caching=False) as llm:
        requests = mixed(14)
        outputs, counts = generate(llm, served_model, requests, tokens=1)
        assert set(counts) == {"segmented_lora_", "segmented_expand_"}
        right = [
            list(output.outputs[0].token_ids) == served_model.answer(adapter, ids, TOKENS)[:1]
            for (adapter, ids), output in zip(requests, outputs, strict=True)
        ]
        assert sum(right) >= len(right) - 1  # half precision may decide a close call otherwise
