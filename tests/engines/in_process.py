"""vLLM in the tests' own process: its engine, requests of many adapters, and what is right."""

import contextlib
import os
from collections import Counter

from served_models import prompt
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

import lora_kernels as lk

SLOTS, TOKENS, LAYERS = 3, 16, 2


@contextlib.contextmanager
def engine(model, **options):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    settings = {
        "enable_lora": True,
        "max_loras": SLOTS,  # fewer than there are adapters
        "max_cpu_loras": len(model.adapters),
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


def generate(llm, model, requests, tokens=TOKENS):
    """The outputs of [(adapter or None, prompt)], and what answered."""
    loras = [
        a
        and LoRARequest(
            a.name,
            a.number + 1,
            str(model.paths[a.name]),
            is_3d_lora_weight="experts" in a.targets,
        )
        for a, _ in requests
    ]
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


def mixed(adapters, count):
    who = (None, *adapters)
    return [(who[i % len(who)], prompt(i, 3 + 9 * i % 119)) for i in range(count)]
