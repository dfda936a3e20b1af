"""Folders of ``adalink export web``, Node on them, and a server for browsers."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.paths import REPOSITORY
from helpers.tiny_deployments import seeded_adapter, write_adapter
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_bpe_tokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from examples.web.serve import make_server

NODE = REPOSITORY / "examples/node"
TASKS: dict[str, dict[str, Any]] = {
    "gelu": {"seed": 1},
    "relu": {"seed": 2, "activation": "relu", "bias": False, "rank": 3},
}


def make_web_deployment(root: Path) -> tuple[Path, Path]:
    """A tiny llama with two tasks and a tokenizer that JavaScript reads; the model's folder and the deployment's."""
    model, deployment = root / "tiny", root / "deployment"
    FAMILIES["llama"]().save_pretrained(model)
    make_bpe_tokenizer().save_pretrained(model)
    export_base(model, deployment)
    for name, settings in TASKS.items():
        export_adapter(write_adapter(root / "adapters" / name, seeded_adapter(model, **settings)), deployment)
    return model, deployment


def installed_modules(folder: str) -> Path:
    """The npm packages of an example; the test is skipped where they are not installed."""
    modules = REPOSITORY / folder / "node_modules"
    if not modules.is_dir():
        pytest.skip(f"no npm packages: npm ci --prefix {folder} --ignore-scripts")
    return modules


def run_node(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the example for Node; the test is skipped without Node or its packages."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    installed_modules("examples/node")
    command = [node, *map(str, arguments)]
    return subprocess.run(command, input=stdin, cwd=NODE, capture_output=True, text=True, check=False, timeout=120)


def run_script(script: str) -> str:
    """What a module of JavaScript prints."""
    done = run_node("--input-type=module", "-e", script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def generate_in_node(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the example's program."""
    return run_node("generate.mjs", *arguments, stdin=stdin)


def ask_node(folder: Path, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Answers of Node to several requests, one after another."""
    done = generate_in_node(folder, "--json", stdin=json.dumps(requests))
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def seal(folder: Path) -> None:
    """Write the digests of the files as they are now, as if they had been exported so."""
    index = json.loads((folder / "web.json").read_text())
    for entry in index["files"].values():
        for piece in entry["pieces"]:
            data = (folder / piece["path"]).read_bytes()
            piece |= {"size": len(data), "sha256": f"sha256:{hashlib.sha256(data).hexdigest()}"}
        entry["size"] = sum(piece["size"] for piece in entry["pieces"])
    (folder / "web.json").write_text(json.dumps(index))


@contextmanager
def serve_folder(folder: Path) -> Iterator[str]:
    """The address of a folder on this machine."""
    with make_server(str(folder), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()
