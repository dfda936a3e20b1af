"""Clients of a soak, as threads of one process: they ask, leave early, hang up and send nonsense, until SIGTERM."""

from __future__ import annotations

import json
import random
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import httpx

NONSENSE: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b'{"model": "alpha", "prompt": 7}', 400),
    (b'{"model": "nobody", "prompt": "a"}', 404),
    (b'{"model": "alpha", "prompt": "a", "max_tokens": -1}', 400),
]


class Clients:
    """Threads that ask, and what they were answered."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.url, self.seed, self.threads = settings["url"], settings["seed"], settings["threads"]
        self.tokens, self.guests = settings["tokens"], settings["guests"]
        self.expected = json.loads(Path(settings["expected"]).read_text())
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.is_over = threading.Event()
        self._lock = threading.Lock()

    def run(self, report: Path) -> None:
        """Ask until it is over; write a report each second."""
        threads = [threading.Thread(target=self._ask_on, args=(number,)) for number in range(self.threads)]
        for thread in threads:
            thread.start()
        with report.open("a") as file:
            while any(thread.is_alive() for thread in threads):
                time.sleep(1)
                with self._lock:
                    found = {"counts": dict(self.counts), "wrong": self.wrong}
                    self.counts, self.wrong = Counter(), []
                file.write(json.dumps(found) + "\n")
                file.flush()

    def _ask_on(self, number: int) -> None:
        rng = random.Random(f"{self.seed} {number}")
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.is_over.is_set():
                try:
                    how = self._ask(client, rng)
                except Exception as error:
                    how = "failed"
                    with self._lock:
                        self.wrong.append(f"{type(error).__name__}: {error}")
                with self._lock:
                    self.counts[how] += 1

    def _ask(self, client: httpx.Client, rng: random.Random) -> str:
        model = rng.choice(list(self.expected))
        prompt = rng.choice(list(self.expected[model]))
        body = {"model": model, "prompt": prompt, "max_tokens": self.tokens, "stream": rng.random() < 0.5}
        kind = rng.random()
        if kind < 0.15:
            with client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code == 200:
                    next(answer.iter_raw())
            return "left"
        if kind < 0.25:
            self._hang_up(body, rng)
            return "hung up"
        if kind < 0.3:
            return self._send_nonsense(client, rng)
        if kind < 0.4:
            body |= {"n": 2, "stream": False}
        return self._check(model, prompt, client.post("/v1/completions", json=body))

    def _check(self, model: str, prompt: str, answer: httpx.Response) -> str:
        if answer.status_code == 503:
            return "refused"
        if answer.status_code == 404 and model in self.guests:
            return "not there"
        assert answer.status_code == 200, answer.text[:300]
        texts = read_texts(answer)
        right = self.expected[model][prompt]
        assert texts
        assert set(texts) <= set(right), f"{model} on {prompt!r} gave {texts}, right is {right}"
        return "whole"

    def _hang_up(self, body: dict[str, Any], rng: random.Random) -> None:
        """Close the connection after a part of the request, or before the answer."""
        data, address = json.dumps(body).encode(), urlsplit(self.url)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        whole = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        with socket.create_connection((address.hostname, address.port), 30) as connection:
            connection.sendall(whole[: rng.choice([20, len(whole) - 5, len(whole)])])
            time.sleep(rng.choice([0, 0.01, 0.05]))

    def _send_nonsense(self, client: httpx.Client, rng: random.Random) -> str:
        data, status = rng.choice(NONSENSE)
        answer = client.post("/v1/completions", content=data, headers={"Content-Type": "application/json"})
        assert answer.status_code == status, answer.text[:300]
        assert answer.json()["error"]["message"]
        return "nonsense"


def read_texts(answer: httpx.Response) -> list[str]:
    """Texts of the choices of an answer, whole or as events."""
    if answer.headers["content-type"].startswith("application/json"):
        return [choice["text"] for choice in answer.json()["choices"]]
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert events[-1] == "[DONE]", events[-1][:300]
    return ["".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])]


def main() -> None:
    clients = Clients(json.loads(sys.argv[1]))

    def end(number: int, frame: FrameType | None) -> None:
        clients.is_over.set()

    signal.signal(signal.SIGTERM, end)
    clients.run(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
