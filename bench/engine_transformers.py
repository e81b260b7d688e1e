"""One process of ``bench.engines``: transformers' continuous batching, or PEFT's mixed batch.

``python -m bench.engine_transformers JSON`` prints a line of JSON. "merged" is one adapter in the
weights of all requests, which continuous batching serves with nothing added: the ceiling. "peft" is
``generate(adapter_names=...)`` over one padded batch. "ours" is ``adapt_requests`` over a store.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from typing import Any

import torch
import transformers

import lora_kernels as lk
from lora_kernels.integrations.continuous_batching import adapt_requests

from .engine_vllm import WARM_UP, surroundings


def main() -> int:
    print("\n" + json.dumps(measure(json.loads(sys.argv[1]))))
    return 0


@torch.no_grad()
def measure(task: dict[str, Any]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    answers: Counter[str] = Counter()
    for adapters in task["adapters"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            task["model"], dtype=getattr(torch, task["dtype"])
        ).eval()
        model.generation_config.eos_token_id = -1
        run = {"merged": Merged, "peft": Peft, "ours": Ours}[task["mode"]](model, task, adapters)
        for name, (length, tokens) in task["workloads"].items():
            draw = random.Random(length)
            prompts = [
                [draw.randrange(3, task["vocabulary"]) for _ in range(length)]
                for _ in range(task["requests"])
            ]
            with lk.record_plans() as answered:
                run([prompt[:WARM_UP] for prompt in prompts], 2)
            answers.update(f"{a.op} {a.backend} {a.plan}" for a in answered)
            seconds = run(prompts, tokens)
            rows.append({"workload": name, "adapters": adapters, "seconds": seconds})
    return {"rows": rows, "answers": dict(answers), **surroundings()}


class Merged:
    def __init__(self, model: Any, task: dict[str, Any], adapters: int) -> None:
        self.model, self.task, self.adapters = model, task, adapters
        self.prepare()

    def prepare(self) -> None:
        lk.load_adapter(self.model, self.task["paths"][0])
        self.model = lk.unload(self.model, merge=True)

    def adapt(self, manager: Any) -> None:
        pass

    def __call__(self, prompts: list[list[int]], tokens: int) -> float:
        """Seconds from the first request to the last token, once a manager serves."""
        settings = transformers.GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=-1
        )
        config = transformers.ContinuousBatchingConfig(allow_block_sharing=False)
        manager = self.model.init_continuous_batching(settings, config)
        self.adapt(manager)
        manager.start()
        try:
            # A manager allocates its cache while the first request waits.
            self.serve(manager, prompts[:1], 1)
            began = time.perf_counter()
            self.serve(manager, prompts, tokens)
            return time.perf_counter() - began
        finally:
            manager.stop(block=True, timeout=60)

    def serve(self, manager: Any, prompts: list[list[int]], tokens: int) -> None:
        for i, prompt in enumerate(prompts):
            manager.add_request(prompt, request_id=f"{i}-{tokens}", max_new_tokens=tokens)
        done = 0
        while done < len(prompts):
            result = manager.get_result(timeout=600)
            assert result is not None and result.error is None, result
            done += result.is_finished()


class Ours(Merged):
    def prepare(self) -> None:
        ranks = max(self.task["ranks"])
        self.store = lk.AdapterStore(self.model, max_adapters=self.adapters, max_rank=ranks)
        for i in range(self.adapters):
            self.store.load(f"{i}", self.task["paths"][i])

    def adapt(self, manager: Any) -> None:
        adapt_requests(
            manager,
            lambda request: f"{int(request.split('-')[0]) % self.adapters}",
            lambda names: self.store.batch(rows=names),
        )


class Peft(Merged):
    def prepare(self) -> None:
        import peft

        self.names = [f"{i}" for i in range(self.adapters)]
        for name, path in zip(self.names, self.task["paths"], strict=False):
            if isinstance(self.model, peft.PeftModel):
                self.model.load_adapter(path, name)
            else:
                self.model = peft.PeftModel.from_pretrained(self.model, path, name)
        self.model.eval()

    def __call__(self, prompts: list[list[int]], tokens: int) -> float:
        began, ids = time.perf_counter(), torch.tensor(prompts)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            adapter_names=[self.names[i % self.adapters] for i in range(len(prompts))],
        )
        return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
