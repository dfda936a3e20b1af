"""Limits: keys, sizes, deadlines, addresses, and what a browser may send."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from helpers.served import Served, serve_in_thread, wait_for

from adalink.runtime import ConfigError, Deployment
from adalink.serving import ServeOptions, make_app
from adalink.serving.guard import is_local
from adalink.serving.keys import read_keys
from adalink.serving.server import bind

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer one\r\n"
HEAD += b"Content-Type: application/json\r\n"
COMPLETION = {"model": "beta", "prompt": "wheat", "max_tokens": 2}


@pytest.fixture(scope="module")
def strict(opened: Deployment) -> Iterator[Served]:
    with serve_in_thread(
        opened, api_keys=("one", "töw"), body_bytes=2000, body_seconds=0.3, header_seconds=0.3
    ) as server:
        yield server


def raw(port: int, data: bytes, *, wait: float = 3, shut: bool = False) -> bytes:
    """What a server sends for bytes, until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as connection:
        connection.sendall(data)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


@pytest.mark.parametrize("header", ["Bearer one", "bearer one", "Bearer töw".encode()])
def test_key_opens(strict: Served, header: str) -> None:
    answer = strict.post("/v1/completions", COMPLETION, Authorization=header)
    assert answer.status_code == 200


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer on", "Bearer onee", "Basic one", "one", "Bearer ö"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nope"])
def test_without_key_is_401(strict: Served, path: str, header: str) -> None:
    answer = httpx.get(strict.url + path, headers={"Authorization": header.encode()})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


def test_health_needs_no_key(strict: Served) -> None:
    assert [strict.get(f"/health/{name}").status_code for name in ("live", "ready")] == [200, 200]


def test_large_body_is_413(strict: Served) -> None:
    body = b'{"prompt": "' + b"a" * 3000
    # Said beforehand, the body is not even read.
    assert raw(strict.port, HEAD + b"Content-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413")
    chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(body), body)
    assert raw(strict.port, HEAD + chunked).startswith(b"HTTP/1.1 413")


def test_slow_body_is_408(strict: Served) -> None:
    answer = raw(strict.port, HEAD + b'Content-Length: 100\r\n\r\n{"model":')
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"0.3 s" in answer


@pytest.mark.parametrize("data", [b"", b"GET /v1/models HTTP/1.1\r\nHost:"], ids=["nothing", "half a header"])
def test_slow_headers_end_the_connection(strict: Served, data: bytes) -> None:
    begun = time.perf_counter()
    assert raw(strict.port, data) == b""
    assert 0.2 < time.perf_counter() - begun < 2


def test_slow_second_request_ends_the_connection(strict: Served) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=3) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert answer.startswith(b"HTTP/1.1 200")
        begun = time.perf_counter()
        connection.sendall(b"GET /health")
        assert connection.recv(65536) == b""
        assert 0.2 < time.perf_counter() - begun < 2


def test_long_answer_is_not_cut_by_the_deadline_of_headers(strict: Served, slow_steps: None) -> None:
    answer = strict.post(
        "/v1/completions", {**COMPLETION, "max_tokens": 30, "min_tokens": 30}, Authorization="Bearer one"
    )
    assert answer.json()["usage"]["completion_tokens"] == 30
    assert answer.elapsed.total_seconds() > 0.5


def read_slowly(port: int, requests: bytes, before: float, between: float) -> bytes:
    """What a client takes that waits first, and before each piece; a cut connection ends it."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", port))
        connection.sendall(requests)
        time.sleep(before)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                answer += piece
                time.sleep(between)
        return answer


def test_client_that_takes_nothing_is_cut_and_a_slow_one_is_not(opened: Deployment) -> None:
    """1.5 MB: more than the system's own buffers take."""
    get = b"GET /page/page.js HTTP/1.1\r\nHost: a\r\n\r\n"
    requests = get * 100 + b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    with serve_in_thread(opened, send_seconds=0.3) as server:
        connections = server.server.server_state.connections
        begun = time.perf_counter()
        assert read_slowly(server.port, requests, 0, 0.01).count(b"HTTP/1.1 200") == 101
        assert time.perf_counter() - begun > 0.6  # else it would not have been slow
        assert read_slowly(server.port, requests, 1, 0).count(b"HTTP/1.1 200") < 90
        wait_for(lambda: not connections and not server.gateway.in_flight)


def test_one_connection_too_many(opened: Deployment, very_slow_steps: None) -> None:
    """A new one takes the place of the one that was quiet for longest; where all are busy, it is told so."""
    body = b'{"model": "beta", "prompt": "wheat", "max_tokens": 30, "min_tokens": 30}'
    busy = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with serve_in_thread(opened, connections=3) as server, contextlib.ExitStack() as stack:

        def connect(data: bytes = b"") -> socket.socket:
            there = len(server.server.server_state.connections)
            one = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
            one.sendall(data)
            if there < 3:
                wait_for(lambda: len(server.server.server_state.connections) > there)
            return one

        first, second = connect(), connect()
        working = connect(busy % len(body) + body)
        wait_for(lambda: server.gateway.in_flight == 1)
        connect(busy % len(body) + body)
        assert first.recv(1) == b""  # the oldest of the two quiet ones went
        connect(busy % len(body) + body)
        assert second.recv(1) == b""
        wait_for(lambda: server.gateway.in_flight == 3)
        refused = server.post("/v1/completions", {})
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert working.recv(65536).startswith(b"HTTP/1.1 200")


def test_large_headers_are_refused(strict: Served) -> None:
    answer = raw(strict.port, b"GET /v1/models HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 100_000 + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_other_content_types_are_415(served: Served, kind: str) -> None:
    """A page of another site can send these without asking; JSON it cannot."""
    headers = {"Content-Type": kind}
    answer = httpx.post(f"{served.url}/v1/completions", content=b'{"model": "beta", "prompt": "a"}', headers=headers)
    assert answer.status_code == 415


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="no key"):
        bind(host, 0, is_open=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_loopback_needs_none(host: str) -> None:
    bind(host, 0, is_open=False).close()


def test_port_that_is_taken_is_said(served: Served) -> None:
    with pytest.raises(ConfigError, match="choose another"):
        bind("127.0.0.1", served.port, is_open=False)


def test_address_that_is_none_is_said() -> None:
    with pytest.raises(ConfigError, match="no address"):
        bind("no such host.invalid", 0, is_open=True)


def test_key_file_has_a_key_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n", encoding="utf-8-sig")
    assert read_keys(file) == ("one", "two")
    file.write_text(" \n")
    with pytest.raises(ConfigError, match="no key"):
        read_keys(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "other")


@pytest.mark.parametrize("options", [{"api_keys": ("",)}, {"drain_seconds": -1}, {"body_seconds": float("nan")}])
def test_options_out_of_range(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ServeOptions(**options)  # type: ignore[arg-type]


def test_task_with_the_name_of_the_base_is_refused(opened: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Deployment, "tasks", property(lambda self: (self.manifest.base.name,)))
    with pytest.raises(ConfigError, match="name of the base"):
        make_app(opened)


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        *(("localhost", True), ("LOCALHOST:8000", True), ("127.0.0.1:8000", True), ("[::1]:8000", True)),
        *(
            ("evil.example", False),
            ("localhost.evil.example:8000", False),
            ("127.0.0.1.evil.example", False),
            ("", False),
        ),
    ],
)
def test_names_of_other_sites_are_refused(opened: Deployment, host: str, is_ours: bool) -> None:
    assert is_local(host) == is_ours
    if host:
        with serve_in_thread(opened, checks_host=True) as server:
            answer = httpx.get(f"{server.url}/v1/models", headers={"Host": host})
            assert answer.status_code == (200 if is_ours else 403)


def test_bodies_together_are_bounded(opened: Deployment) -> None:
    limits = {"body_bytes": 1500, "bodies_bytes": 2000}
    with serve_in_thread(opened, **limits) as server:
        body = b'{"model": "beta", "prompt": "' + b"a" * 1200
        head = HEAD + b"Content-Length: 1400\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as first:
            first.sendall(head + body)  # and the rest never comes
            wait_for(lambda: server.gateway.held_bytes > 1000)
            refused = raw(server.port, head + body)
            assert refused.startswith(b"HTTP/1.1 503")
            assert b"etry-after" in refused or b"etry-After" in refused
        wait_for(lambda: server.gateway.held_bytes == 0)
        assert server.post("/v1/completions", {"model": "beta", "prompt": "a", "max_tokens": 2}).status_code == 200
