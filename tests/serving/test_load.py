"""Many clients that come and go, and tasks that come and go: each whole answer is the reference, no slot is lost."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.runtime import Tiny
from helpers.served import Served, serve_in_thread, wait_for

from adalink.runtime import Deployment

PROMPTS = ["Q", "wheat", "crude oil, 1987", "a bank raised its rates"]
TOKENS = 12


class Clients:
    """Threads that ask, leave early, and add and remove a task, until the time is over."""

    def __init__(self, server: Served, wanted: dict[tuple[str, str], str], seconds: float) -> None:
        self.server, self.wanted = server, wanted
        self.end = time.perf_counter() + seconds
        self.counts = {"whole": 0, "left": 0, "refused": 0}
        self.wrong: list[Any] = []
        self._lock = threading.Lock()

    def run(self, clients: int) -> None:
        threads = [threading.Thread(target=self._ask_on, args=(seed,)) for seed in range(clients)]
        threads.append(threading.Thread(target=self._change_tasks))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _ask_on(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self.server.url, timeout=30) as client:
            while time.perf_counter() < self.end:
                try:
                    self._ask(client, rng)
                except Exception as error:
                    self.wrong.append(error)
                    return

    def _ask(self, client: httpx.Client, rng: random.Random) -> None:
        model, prompt = rng.choice(list(self.wanted))
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "stream": rng.random() < 0.5}
        if rng.random() < 0.3:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code == 200:
                    next(answer.iter_raw())
            self._count("left")
            return
        answer = client.post("/v1/completions", json=body)
        if answer.status_code in (404, 503):
            assert answer.status_code == 503 or model == "guest"
            self._count("refused")
            return
        text = text_of(answer)
        if text != self.wanted[model, prompt]:
            self.wrong.append((model, prompt, text))
        self._count("whole")

    def _change_tasks(self) -> None:
        with httpx.Client(base_url=self.server.url, timeout=30) as client:
            while time.perf_counter() < self.end:
                body = {"lora_name": "guest", "lora_path": "guest"}
                if client.post("/v1/load_lora_adapter", json=body).status_code != 200:
                    self.wrong.append("not added")
                time.sleep(0.05)
                if client.post("/v1/unload_lora_adapter", json={"lora_name": "guest"}).status_code != 200:
                    self.wrong.append("not removed")

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def text_of(answer: httpx.Response) -> str:
    if answer.headers["content-type"].startswith("application/json"):
        return str(answer.json()["choices"][0]["text"])
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def resident_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


@pytest.mark.parametrize(
    ("clients", "seconds"), [(16, 2), pytest.param(64, 60, marks=pytest.mark.slow)], ids=["quick", "minute"]
)
def test_clients_and_tasks_come_and_go(llama: Tiny, tmp_path: Path, clients: int, seconds: float) -> None:
    shutil.copytree(llama.sources / "alpha", tmp_path / "guest")
    with Deployment.open(llama.folder, threads=1, slots=8, queue_limit=40) as deployment:
        wanted = {}
        for task in (None, "alpha", "beta", "prompted"):
            for prompt in PROMPTS:
                name = task or deployment.manifest.base.name
                wanted[name, prompt] = deployment.generate([prompt], tasks=task, max_new_tokens=TOKENS)[0].text
                if task == "alpha":
                    wanted["guest", prompt] = wanted[name, prompt]
        with serve_in_thread(deployment, tasks_folder=tmp_path) as server:
            crowd = Clients(server, wanted, seconds / 2)
            crowd.run(clients)
            before = resident_kb()  # that of the clients is in it: they are threads of this process
            crowd.end = time.perf_counter() + seconds / 2
            crowd.run(clients)
            wait_for(lambda: deployment.running == deployment.waiting == server.gateway.in_flight == 0)
            grown = resident_kb() - before
        print(crowd.counts, f"{grown} kB")
        assert crowd.wrong == []
        assert min(crowd.counts.values()) > 0
        # The runtime itself grows by one or two kB a request, in native memory; a body that is kept would be more.
        assert grown < 40_000
        assert deployment.generate(["wheat"], tasks="beta", max_new_tokens=TOKENS)[0].text == wanted["beta", "wheat"]
