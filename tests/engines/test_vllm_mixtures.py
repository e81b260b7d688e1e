"""Mixtures in vLLM on a CPU, where vLLM alone serves none with adapters: attention, experts and
router of each request have its adapter's."""

import pytest
from in_process import LAYERS, TOKENS, check, engine, generate, mixed
from served_models import prompt


@pytest.mark.parametrize(
    "served_model, options",
    [
        # PEFT's adapters of whole Parameters beside those of every expert's projections; compiled.
        ("qwen3_moe", {"enable_mixed_moe_lora_format": True}),
        ("mixtral", {"enable_mixed_moe_lora_format": True, "enforce_eager": True}),
        # vLLM keeps gate and up in one; biases, and rows of gate and up that alternate.
        ("gpt_oss", {"enforce_eager": True}),
    ],
    indirect=["served_model"],
)
def test_mixed_requests(served_model, options):
    adapters = [
        a
        for a in served_model.adapters
        if "each" not in a.targets or options.get("enable_mixed_moe_lora_format")
    ]
    with engine(served_model, max_lora_rank=16, **options) as llm:
        requests = mixed(adapters, 2 * len(adapters) + 2)
        outputs, counts = generate(llm, served_model, requests)
        check(served_model, requests, outputs)
        # Every step: attention; experts' two products, and their adapters.
        steps, rest = divmod(counts["segmented_linear_fwd"], 2 * LAYERS)
        assert steps >= TOKENS and rest == 0
        assert counts["expert_linear_fwd"] == 2 * LAYERS * steps
        assert counts["segmented_lora_"] >= 2 * LAYERS * TOKENS
        requests = [(None, prompt(50 + i, 20 + i)) for i in range(3)]
        outputs, _ = generate(llm, served_model, requests)
        for (_, ids), output in zip(requests, outputs, strict=True):
            assert list(output.outputs[0].token_ids) == served_model.answer(None, ids, TOKENS)
