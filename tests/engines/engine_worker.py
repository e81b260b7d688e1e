"""What `vllm serve` adds to its worker for the tests: which kernels answered, asked over HTTP."""

from collections import Counter

import lora_kernels as lk

_recorder = lk.record_plans()
_answers = _recorder.__enter__()


class Extension:
    """vLLM's ``--worker-extension-cls``."""

    def lora_kernels_answers(self):
        """{"operator backend plan": calls} since the last time this was asked."""
        counts = Counter(f"{a.op} {a.backend} {a.plan}" for a in _answers)
        _answers.clear()
        return dict(counts)
