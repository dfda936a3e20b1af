"""What the page needs no browser for: its files, their headers, and what the server says to it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.paths import REPOSITORY
from helpers.runtime import build
from helpers.served import Served, serve_in_thread, wait_for

from adalink.runtime import Deployment
from adalink.serving.endpoints.page import PAGE_ADDRESSES
from adalink.tools.command_line.json_output import join_json_options
from adalink.tools.command_line.options import make_options
from adalink.tools.commands.serve import ServeCommandOptions, command

FOLDER = REPOSITORY / "serving" / "endpoints" / "page"
KINDS = {
    "/": "text/html",
    "/page/page.css": "text/css",
    "/page/page.js": "text/javascript",
    "/page/icon.svg": "image/svg",
}
# What would load from elsewhere or run inline; the icon's namespace is a name and is not loaded.
FOREIGN = re.compile(
    r"//(?!www\.w3\.org/2000/svg)\w+\.\w|@import|\bstyle=|\son\w+=|<style|<script(?! type=\"module\" src=\"page/page)"
)
HTML_SINKS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|setHTML"
)


@pytest.mark.parametrize("address", sorted(PAGE_ADDRESSES))
def test_files_have_the_headers_of_a_page_that_runs_nothing_foreign(served: Served, address: str) -> None:
    answer = served.get(address)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(KINDS[address])
    policy = answer.headers["content-security-policy"].split("; ")
    assert policy[0] == "default-src 'self'"
    assert "frame-ancestors 'none'" in policy
    assert not any("unsafe" in part or "data:" in part or "http" in part for part in policy)
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("address", sorted(PAGE_ADDRESSES))
def test_file_that_the_browser_has_is_not_sent_again(served: Served, address: str) -> None:
    answer = served.get(address)
    tag = answer.headers["etag"]
    for known, status in ((tag, 304), (f'W/{tag}, "other"', 304), ("*", 304), ('"other"', 200), (tag[:-2] + '"', 200)):
        again = httpx.get(served.url + address, headers={"If-None-Match": known})
        assert (again.status_code, again.headers["etag"]) == (status, tag)
        assert again.content == (b"" if status == 304 else answer.content)
    head = httpx.head(served.url + address)
    assert (head.status_code, head.headers["etag"], head.content) == (200, tag, b"")
    assert httpx.post(served.url + address).status_code == 405


def test_tags_of_files_differ(served: Served) -> None:
    assert len({served.get(address).headers["etag"] for address in PAGE_ADDRESSES}) == len(PAGE_ADDRESSES)


@pytest.mark.parametrize("path", ["/page/", "/page/page.py", "/page/../app.py", "/page/%2e%2e/app.py", "/index.html"])
def test_no_other_file_is_sent(served: Served, path: str) -> None:
    assert served.get(path).status_code == 404


def test_files_are_small_and_load_nothing_from_elsewhere() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert set(texts) == {"index.html", "page.css", "page.js", "icon.svg"}
    assert sum(len(text.encode()) for text in texts.values()) < 25_000
    assert {name: FOREIGN.findall(text) for name, text in texts.items() if FOREIGN.search(text)} == {}
    assert HTML_SINKS.findall(texts["page.js"]) == []


@pytest.mark.parametrize(
    "text",
    [
        *('<script src="https://cdn.example/a.js">', "@import 'a'", '<p style="a">', '<img src=x onerror="a">'),
        *("<script>a()</script>", 'url("//cdn.example/a.woff")'),
    ],
)
def test_what_loads_from_elsewhere_or_runs_inline_is_found(text: str) -> None:
    assert FOREIGN.search(text)


def test_ids_that_the_script_names_are_in_the_page() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([\w-]+)"', page)
    assert len(ids) == len(set(ids)) > 30
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    named = set(re.findall(r'(?:\$|say|show|copy)\("([\w-]+)"', script))
    assert len(named) > 25
    assert named - set(ids) == set()


def test_every_field_has_a_label() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    inside = "".join(re.findall(r"<label\b.*?</label>", page, re.DOTALL))
    fields = re.findall(r"<(?:input|textarea)\b[^>]*>", page)
    assert len(fields) > 7
    assert [field for field in fields if field not in inside and "aria-label=" not in field] == []


# State


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tiny = build("bert", tmp_path_factory.mktemp("bert"))
    with Deployment.open(tiny.folder, threads=1) as deployment, serve_in_thread(deployment) as server:
        yield server


def test_state_says_models_and_what_they_take(served: Served, encoder: Served) -> None:
    answer = served.get("/page/state")
    state = answer.json()
    assert answer.headers["cache-control"] == "no-store"
    assert state["models"] == [model["id"] for model in served.get("/v1/models").json()["data"]]
    assert (state["base"], state["kind"], state["slots"]) == (served.base, "decoder", 8)
    assert (state["generates"], state["classifies"], state["chats"], state["sees"]) == (True, False, True, False)
    state = encoder.get("/page/state").json()
    assert (state["kind"], state["generates"], state["classifies"]) == ("encoder", False, True)
    assert state["models"] == list(encoder.deployment.tasks)
    ids = {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [5, 9]}
    assert encoder.post(f"/{state['api']}", {"inputs": [ids]}).status_code == 200


def test_state_counts_tokens_while_they_come(served: Served, slow_steps: None) -> None:
    """Of running requests too, for the page to show tokens/s."""

    def tokens() -> int:
        return int(served.get("/page/state").json()["tokens"])

    before = tokens()
    body: dict[str, Any] = {"model": "beta", "prompt": "wheat", "max_tokens": 40, "min_tokens": 40, "stream": True}
    with httpx.stream("POST", f"{served.url}/v1/completions", json=body) as answer:
        wait_for(lambda: tokens() > before + 3)
        assert tokens() < before + 40
        assert served.get("/page/state").json()["running"] == 1
        answer.read()
    assert tokens() == before + 40


# Keys, and a server without a page


def test_files_need_no_key_and_the_state_does(opened: Deployment) -> None:
    with serve_in_thread(opened, api_keys=("secret",)) as server:
        for address in PAGE_ADDRESSES:
            answer = server.get(address)
            assert answer.status_code == 200
            assert "secret" not in answer.text
        assert [server.get(path).status_code for path in ("/page/state", "/v1/models", "/page/", "/page")] == [401] * 4
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{server.url}/page/state", headers=headers).status_code == 200


def test_page_of_another_host_is_refused(opened: Deployment) -> None:
    with serve_in_thread(opened, checks_host=True) as server:
        assert httpx.get(server.url, headers={"Host": "evil.example"}).status_code == 403


def test_server_without_a_page_has_none(opened: Deployment) -> None:
    with serve_in_thread(opened, page=False) as server:
        assert [server.get(path).status_code for path in (*PAGE_ADDRESSES, "/page/state")] == [404] * 5
    with serve_in_thread(opened, page=False, api_keys=("secret",)) as server:
        assert [server.get(path).status_code for path in (*PAGE_ADDRESSES, "/page/state")] == [401] * 5


@pytest.mark.parametrize("arguments", [[], ["--no-page"]])
def test_option_turns_the_page_off(arguments: list[str], tmp_path: Path) -> None:
    values = command.make_context("serve", [str(tmp_path), *arguments]).params
    join_json_options(values)
    assert make_options(ServeCommandOptions, values).no_page == bool(arguments)
