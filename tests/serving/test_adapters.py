"""Tasks that clients add and remove: only from the tasks folder, by plain names, without links."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.runtime import Tiny, random_adapter, write_adapter
from helpers.served import Served, serve_in_thread

from adalink.runtime import Deployment


@pytest.fixture(scope="module")
def folder(llama: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    shutil.copytree(llama.sources / "beta", folder / "new")
    shutil.copytree(llama.sources / "alpha", folder / "other")
    write_adapter(
        folder / "foreign",
        random_adapter("sha256:" + "0" * 64, 48, 3, rank=2, activation="silu", bias=True, scope="all"),
    )
    shutil.copytree(folder / "new", folder / "inside-link")
    (folder / "inside-link/adapter_config.json").unlink()
    (folder / "inside-link/adapter_config.json").symlink_to(folder / "new/adapter_config.json")
    (folder / "link").symlink_to(folder / "new")
    (folder / "empty").mkdir()
    shutil.copytree(folder / "new", folder.parent / "outside")
    return folder


@pytest.fixture(scope="module")
def open_to_tasks(opened: Deployment, folder: Path) -> Iterator[Served]:
    with serve_in_thread(opened, tasks_folder=folder) as server:
        yield server


def load(server: Served, name: Any, path: Any) -> Any:
    return server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})


def test_added_task_answers_until_it_is_removed(open_to_tasks: Served) -> None:
    server = open_to_tasks
    assert load(server, "gamma", "new").text == "Success: LoRA adapter 'gamma' added successfully."
    wanted = server.deployment.generate(["wheat"], tasks="beta", max_new_tokens=8)[0].text
    reply = server.openai.completions.create(model="gamma", prompt="wheat", max_tokens=8)
    assert reply.choices[0].text == wanted
    again = load(server, "gamma", "new")
    assert (again.status_code, again.json()["error"]["param"]) == (400, "lora_name")
    other = {"lora_name": "gamma", "lora_path": "other", "load_inplace": True}
    assert server.post("/v1/load_lora_adapter", other).status_code == 200
    wanted = server.deployment.generate(["wheat"], tasks="alpha", max_new_tokens=8)[0].text
    reply = server.openai.completions.create(model="gamma", prompt="wheat", max_tokens=8)
    assert reply.choices[0].text == wanted
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "gamma"}).status_code == 200
    gone = server.post("/v1/completions", {"model": "gamma", "prompt": "wheat"})
    assert gone.status_code == 404
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "gamma"}).status_code == 404


@pytest.mark.parametrize(
    "path", ["../outside", "/etc", "link", "inside-link", "empty", "foreign", "none", "..", ".", "new/", "", "new\0", 5]
)
def test_only_folders_inside_are_added(open_to_tasks: Served, folder: Path, path: Any) -> None:
    answer = load(open_to_tasks, "gamma", path)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == "lora_path"
    assert str(folder) not in answer.text
    assert str(folder.parent) not in answer.text
    assert "gamma" not in open_to_tasks.deployment.tasks


def test_foreign_adapter_is_named(open_to_tasks: Served) -> None:
    assert "base" in load(open_to_tasks, "gamma", "foreign").json()["error"]["message"]


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a b", "beta"])
def test_names_are_those_of_tasks(open_to_tasks: Served, name: str) -> None:
    answer = load(open_to_tasks, name, "new")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora_name")


def test_base_is_neither_replaced_nor_removed(open_to_tasks: Served) -> None:
    server = open_to_tasks
    for inplace in (False, True):
        body = {"lora_name": server.base, "lora_path": "new", "load_inplace": inplace}
        assert server.post("/v1/load_lora_adapter", body).status_code == 400
    assert server.post("/v1/unload_lora_adapter", {"lora_name": server.base}).status_code == 400


def test_off_by_default(served: Served) -> None:
    assert load(served, "gamma", "new").status_code == 404
    assert served.post("/v1/unload_lora_adapter", {"lora_name": "beta"}).status_code == 404
