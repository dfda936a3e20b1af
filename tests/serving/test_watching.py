"""Tasks that are exported and removed while a server watches the folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.runtime import Tiny
from helpers.served import Served, serve_in_thread, wait_for

from adalink.export.adapter.export import export_adapter
from adalink.export.writer import remove_task
from adalink.runtime import Deployment


@pytest.fixture
def watching(llama: Tiny, tmp_path: Path) -> Iterator[Served]:
    folder = tmp_path / "deployment"
    shutil.copytree(llama.folder, folder)
    with Deployment.open(folder, threads=1) as deployment, serve_in_thread(deployment, watch_seconds=0.05) as server:
        yield server


def text(server: Served, model: str) -> str:
    body = {"model": model, "prompt": "wheat", "max_tokens": 8}
    return str(server.post("/v1/completions", body).json()["choices"][0]["text"])


def test_changes_of_the_folder_are_taken_up(watching: Served, llama: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    folder, wanted = watching.deployment.path, {name: text(watching, name) for name in ("alpha", "beta")}
    export_adapter(llama.sources / "beta", folder, name="later")
    wait_for(lambda: "later" in watching.deployment.tasks)
    assert text(watching, "later") == wanted["beta"] != wanted["alpha"]
    export_adapter(llama.sources / "alpha", folder, name="later", replace=True)
    wait_for(lambda: text(watching, "later") == wanted["alpha"])
    remove_task(folder, "later")
    wait_for(lambda: "later" not in watching.deployment.tasks)
    answer = watching.post("/v1/completions", {"model": "later", "prompt": "wheat"})
    assert answer.status_code == 404
    # What cannot be taken up changes nothing, and is said once.
    (folder / "manifest.json").write_text("{}")
    wait_for(lambda: any("cannot be taken up" in message for message in caplog.messages))
    assert text(watching, "beta") == wanted["beta"]


@pytest.mark.parametrize("seconds", [60, None])
def test_task_that_lost_its_files_before_the_next_look(llama: Tiny, tmp_path: Path, seconds: float | None) -> None:
    """Other processes replace and remove tasks that were never used here, so that their files were never opened."""
    folder = Path(shutil.copytree(llama.folder, tmp_path / "deployment"))
    for name in ("gone", "new"):
        export_adapter(llama.sources / "alpha", folder, name=name)
    with Deployment.open(folder, threads=1) as deployment, serve_in_thread(deployment, watch_seconds=seconds) as server:
        wanted = text(server, "beta")
        remove_task(folder, "gone")
        for source in ("alpha", "beta"):
            export_adapter(llama.sources / source, folder, name="new", replace=True)
        body = {"prompt": "wheat", "max_tokens": 8}
        statuses = {
            name: server.post("/v1/completions", {"model": name, **body}).status_code for name in ("gone", "new")
        }
        if seconds is None:  # nothing is taken up that was not asked for
            assert statuses == {"gone": 500, "new": 500}
        else:
            assert statuses == {"gone": 404, "new": 200}
            assert text(server, "new") == wanted
            tensor = {"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "data": [5, 6]}
            assert server.post("/v2/models/new/infer", {"inputs": [tensor]}).status_code == 200
