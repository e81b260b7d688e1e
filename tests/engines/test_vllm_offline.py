"""vLLM in this process (``LLM``): each request has the tokens of its adapter merged into the model,
and our kernels computed them."""

import pytest
from in_process import LAYERS, TOKENS, check, engine, generate, mixed
from served_models import ADAPTERS, prompt


@pytest.fixture(scope="module")
def llm(served_model):
    with engine(served_model) as llm:
        yield llm


def test_mixed_requests(llm, served_model):
    """Base and all adapters in one call: ranks 8 to 64, all kinds of targets, prompts in chunks."""
    requests = mixed(ADAPTERS, 21)
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
        requests = mixed(ADAPTERS, 14)
        outputs, counts = generate(llm, served_model, requests, tokens=1)
        assert set(counts) == {"segmented_lora_", "segmented_expand_"}
        right = [
            list(output.outputs[0].token_ids) == served_model.answer(adapter, ids, TOKENS)[:1]
            for (adapter, ids), output in zip(requests, outputs, strict=True)
        ]
        assert sum(right) >= len(right) - 1  # half precision may decide a close call otherwise
