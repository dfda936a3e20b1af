"""A hub id is looked for in the cache, then at the hub, which is asked once and briefly; a bare name never is."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import constants

from adalink.runtime.errors import ModelError
from adalink.training.models import hub
from adalink.training.models.source import Source, find_source

ID = "org/tiny-1.5"


@pytest.fixture(autouse=True)
def own_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache and no network but what a test gives."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


class Hub(BaseHTTPRequestHandler):
    """Something that answers; as a proxy it reaches nobody."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Proxy-Authorization')}")
        self.send_response(502 if "absent" in self.path else 404)
        self.end_headers()

    def do_CONNECT(self) -> None:
        self.do_HEAD()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[int]:
    """Port of a hub or proxy."""
    Hub.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.01])
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture
def closed() -> int:
    """Port of nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def cache_files(folder: Path, revision: str, *names: str) -> None:
    """Files of a revision in the cache, as huggingface_hub lays it out."""
    snapshot = folder / "hub/models--org--tiny-1.5/snapshots" / revision
    snapshot.mkdir(parents=True, exist_ok=True)
    for name in names:
        (snapshot / name).touch()


def test_cached_id_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refs = tmp_path / "hub/models--org--tiny-1.5/refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("0a1b")
    cache_files(tmp_path, "0a1b", "config.json")  # planted: a download that was broken off
    cache_files(tmp_path, "ffff", "config.json", "model.safetensors")  # planted: another revision
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE, or download it where"):
        find_source(ID)
    cache_files(tmp_path, "0a1b", "model.safetensors")
    assert find_source(ID) == Source(ID)
    with pytest.raises(ModelError, match=r"does not hold revision 'v2' of it.*hf download org/tiny-1.5 --revision v2 "):
        hub.check_hub(ID, "v2")


def test_hub_that_answers_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch, answering: int, closed: int) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    with pytest.raises(ModelError, match="cannot be reached"):
        find_source(ID)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{answering}")
    assert find_source(ID) == Source(ID)
    assert find_source(ID) == Source(ID)
    assert Hub.asked == ["HEAD / None"]


def test_unreachable_hub_is_named_with_the_way_round(monkeypatch: pytest.MonkeyPatch, closed: int) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed}")
    with pytest.raises(
        ModelError,
        match=rf"base model {ID}: there is no such file or folder here, the hub's cache does not hold it, and 127\.0\."
        rf"0\.1 cannot be reached .*HF_HUB_OFFLINE=1 .*hf download {ID} --local-dir FOLDER\) and pass the folder",
    ):
        find_source(ID)


def test_hub_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a connection and says nothing, or takes none at all."""
    monkeypatch.setattr(hub, "_SECONDS", 0.05)
    monkeypatch.setattr(hub, "_ANSWER_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert hub._why_unreachable(f"http://127.0.0.1:{server.getsockname()[1]}") in ("no answer in time", "timed out")

    def keep_waiting(*_: object, **__: object) -> None:
        time.sleep(0.3)
        raise OSError("too late")

    monkeypatch.setattr(socket, "create_connection", keep_waiting)
    with pytest.raises(ModelError, match=r"cannot be reached \(no connection in time\)"):
        find_source(ID)


def test_a_proxy_is_asked_for_the_hub(monkeypatch: pytest.MonkeyPatch, answering: int, closed: int) -> None:
    """It is there itself where the hub is not."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{answering}")
    monkeypatch.setenv("https_proxy", f"http://user:p%40ss@127.0.0.1:{answering}")
    assert hub._why_unreachable("http://hub.invalid") == ""
    assert "502" in hub._why_unreachable("http://absent.invalid")
    assert "502" in hub._why_unreachable("https://absent.invalid")
    secret = "Basic dXNlcjpwQHNz"  # base64 of user:p@ss
    assert Hub.asked[2] == f"CONNECT absent.invalid:443 {secret}"
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{closed}")
    assert "refused" in hub._why_unreachable("http://other.invalid")


@pytest.mark.parametrize("name", ["gpt2", "./gpt2", "a/b/c", "models/"])
def test_what_is_no_id_never_goes_to_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt-2").mkdir()
    with pytest.raises(
        ModelError, match="no such file or folder here, and it is no hub id, which is org/name"
    ) as error:
        find_source(name)
    assert ("did you mean 'gpt-2'?" in str(error.value)) == ("gpt2" in name)
