"""What a vLLM worker gets beside its own methods (``--worker-extension-cls``): which kernels
answered, asked by ``collective_rpc``, also over HTTP."""

from collections import Counter

import lora_kernels as lk


class Extension:
    def record_answers(self):
        """From now on."""
        self._lora_kernels_recorder = lk.record_plans()
        self._lora_kernels_answers = self._lora_kernels_recorder.__enter__()

    def answers(self):
        """{"operator backend plan": calls} since this was asked the last time."""
        found = self._lora_kernels_answers
        counts = Counter(f"{a.op} {a.backend} {a.plan}" for a in found)
        found.clear()
        return dict(counts)

    def stop_recording(self):
        self._lora_kernels_recorder.__exit__(None, None, None)
