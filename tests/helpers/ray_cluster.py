"""A Ray cluster of one machine, on 127.0.0.1, for one test module; and clients that keep asking it."""

from __future__ import annotations

import json
import os
import random
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

# A variable of every process of the cluster, so that no other process is ever ended.
_MARK = "ADALINK_TEST_CLUSTER"


@dataclass
class Cluster:
    """A running cluster with Ray Serve's proxy, and no application yet."""

    port: int
    metrics_port: int
    mark: str
    driver: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, **args: Any) -> None:
        """Run the application, or update it; returns once all replicas are ready."""
        assert self.driver.stdin is not None
        self.driver.stdin.write(json.dumps(args) + "\n")
        self.driver.stdin.flush()
        self.wait()

    def wait(self) -> None:
        """Wait until the driver has done what it was told."""
        assert self.driver.stdout is not None
        for line in self.driver.stdout:
            if line == "ready\n":
                return
        raise AssertionError(f"the driver ended with {self.driver.wait()}")

    def replica_pids(self) -> set[int]:
        """Processes of this cluster's replicas."""
        return {int(path.name) for path in Path("/proc").glob("[0-9]*") if self._is_replica(path)}

    def _is_replica(self, process: Path) -> bool:
        try:
            is_replica = (process / "cmdline").read_bytes().startswith(b"ray::ServeReplica")
            return is_replica and f"{_MARK}={self.mark}".encode() in (process / "environ").read_bytes()
        except OSError:
            return False


@contextmanager
def ray_cluster(cpus: int) -> Iterator[Cluster]:
    """A cluster that ends with the block; its files are in a folder of their own, and it has a token of its own.

    Ray reads its settings when it is imported, so that it runs in a process of its own.
    """
    port, metrics_port, mark = free_port(), free_port(), secrets.token_hex(8)
    environment = os.environ | {
        _MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "adalink.serving.ray:middlewares",
    }
    # A short path: sockets are in the folder, and the paths of sockets have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        settings = {"cpus": cpus, "folder": folder, "port": port, "metrics_port": metrics_port}
        driver = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_driver.py")), json.dumps(settings)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with driver:
            cluster = Cluster(port, metrics_port, mark, driver)
            cluster.wait()
            yield cluster
            assert driver.stdin is not None
            driver.stdin.close()
            driver.wait(60)
        assert not cluster.replica_pids()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass
class Crowd:
    """Threads that ask one after the other; each answer is right, refused with 503, or in ``wrong``.

    Attributes:
        expected: answer by model and prompt.
        counts: answers by how they ended; ``lost`` are refusals for a lost replica, ``cut`` streams that it ended.
    """

    url: str
    expected: dict[tuple[str, str], str]
    tokens: int
    wrong: list[Any] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("whole", "full", "lost", "cut"), 0))

    def __post_init__(self) -> None:
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    @contextmanager
    def asking(self, clients: int) -> Iterator[None]:
        """Ask from so many threads while the block runs."""
        self._threads = [threading.Thread(target=self._ask_on, args=(seed,)) for seed in range(clients)]
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in self._threads:
                thread.join()

    def _ask_on(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=30) as client:
            while not self._is_over.is_set():
                try:
                    how = self._ask(client, rng)
                except Exception as error:
                    self.wrong.append(error)
                    return
                with self._lock:
                    self.counts[how] += 1

    def _ask(self, client: httpx.Client, rng: random.Random) -> str:
        model, prompt = rng.choice(list(self.expected))
        body = {"model": model, "prompt": prompt, "max_tokens": self.tokens, "stream": rng.random() < 0.5}
        answer = client.post("/v1/completions", json=body)
        how, text = read_answer(answer)
        if how == "whole" and text != self.expected[model, prompt]:
            self.wrong.append((model, prompt, text))
        return how


def read_answer(answer: httpx.Response) -> tuple[str, str]:
    """How an answer ended, and its text; fails for anything but an answer and a refusal with 503."""
    kinds = {"queue_full": "full", "replica_lost": "lost"}
    if answer.status_code == 503:
        assert answer.headers["retry-after"]
        return kinds[answer.json()["error"]["code"]], ""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"].startswith("application/json"):
        return "whole", str(answer.json()["choices"][0]["text"])
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    if events[-1] != "[DONE]":
        assert json.loads(events[-1])["error"]["code"] == "replica_lost"
        return "cut", ""
    return "whole", "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
