"""A server in a thread of this process, on real sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from adalink.runtime import Deployment
from adalink.serving import ServeOptions, make_app
from adalink.serving.gateway import Gateway
from adalink.serving.server import DrainingServer, bind


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> float:
    """Seconds until something holds."""
    begun = time.perf_counter()
    while not holds():
        assert time.perf_counter() - begun < seconds
        time.sleep(0.002)
    return time.perf_counter() - begun


@dataclass
class Served:
    """A running server and its clients."""

    deployment: Deployment
    server: DrainingServer
    gateway: Gateway
    thread: threading.Thread
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def base(self) -> str:
        return self.gateway.base_name

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=20)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=20)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return httpx.post(self.url + path, json=body, headers=headers, timeout=20)

    def metric(self, name: str, **labels: str) -> float:
        """A value of /metrics; 0 if it has not been counted."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in self.get("/metrics").text.splitlines():
            name_and_labels, _, value = line.rpartition(" ")
            found, _, rest = name_and_labels.partition("{")
            if found == name and wanted == {part for part in rest.rstrip("}").split(",") if part}:
                return float(value)
        return 0.0


@contextmanager
def serve_in_thread(deployment: Deployment, **options: Any) -> Iterator[Served]:
    app = make_app(deployment, ServeOptions(**options))
    is_listening = threading.Event()
    with bind("127.0.0.1", 0, is_open=False) as listener:
        port = listener.getsockname()[1]
        server = DrainingServer(app, lambda host, port: is_listening.set())
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert is_listening.wait(10)
        try:
            yield Served(deployment, server, app.state.gateway, thread, port)
        finally:
            server.drain()
            thread.join(20)
            assert not thread.is_alive()
