"""A folder for browsers and Node: what lies in it, what cannot go, and where it is written."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY
from helpers.tiny_deployments import make_model_folder
from helpers.tiny_models import MAX_POSITIONS, VOCAB_SIZE

from adalink.export.base.export import export_base
from adalink.export.web.export import export_web
from adalink.export.web.libraries import PACKAGES
from adalink.export.web.place import PAGE
from adalink.runtime.errors import ConfigError, DeploymentError
from adalink.runtime.storage.manifest_io import read_manifest


def read_index(folder: Path) -> dict:
    return json.loads((folder / "web.json").read_text())


def test_index_names_every_file_with_its_digest(site):
    index = read_index(site.folder)
    pieces = [piece for entry in index["files"].values() for piece in entry["pieces"]]
    for piece in pieces:
        data = (site.folder / piece["path"]).read_bytes()
        assert (len(data), f"sha256:{hashlib.sha256(data).hexdigest()}") == (piece["size"], piece["sha256"])
    there = {path.relative_to(site.folder).as_posix() for path in site.folder.rglob("*") if path.is_file()}
    assert there == {"web.json", *(path.name for path in PAGE.iterdir()), *(piece["path"] for piece in pieces)}
    base = read_manifest(site.deployment).base
    assert (index["vocabulary"], index["positions"], index["ends"]) == (VOCAB_SIZE, MAX_POSITIONS, [2])
    assert index["front"]["fingerprint"] == base.fingerprint
    assert [task for task, _ in index["check"]["logits"]] == [None, "gelu", "relu"]
    assert all(0 < check["tolerance"] < 0.1 for _, check in index["check"]["logits"])


def test_base_goes_unmodified(site):
    variant = read_manifest(site.deployment).variants["onnxruntime-cpu"]
    for path in variant.files:
        assert (site.folder / Path(path).name).read_bytes() == (site.deployment / path).read_bytes()


def test_bases_that_cannot_go_are_refused(tmp_path, monkeypatch, site):
    export_base(make_model_folder(tmp_path / "bert", "bert"), tmp_path / "encoder")
    with pytest.raises(ConfigError, match="is an encoder: a browser generates text"):
        export_web(tmp_path / "encoder", tmp_path / "out")
    export_base(site.model, tmp_path / "half", dtype="float16")
    with pytest.raises(ConfigError, match=r"takes float16.*--dtype fp32"):
        export_web(tmp_path / "half", tmp_path / "out")
    monkeypatch.setattr("adalink.export.web.export.MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"a page takes 0 MB at most.*--quantize int4"):
        export_web(site.deployment, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_place_is_kept(site, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(DeploymentError, match="no folder for the web"):
        export_web(site.deployment, out, replace=True)
    shutil.rmtree(out)
    shutil.copytree(site.folder, out)
    with pytest.raises(DeploymentError, match="--replace"):
        export_web(site.deployment, out)
    (out / "tasks/own.safetensors").write_text("mine")
    with pytest.raises(DeploymentError, match=r"holds 'tasks/own\.safetensors'"):
        export_web(site.deployment, out, replace=True)
    (out / "tasks/own.safetensors").unlink()
    assert export_web(site.deployment, out, replace=True, tasks=["relu"]).tasks == ("relu",)
    assert [path.name for path in (out / "tasks").iterdir()] == ["relu.safetensors"]


def test_missing_libraries_are_named_with_their_command(site, tmp_path):
    with pytest.raises(ConfigError, match=r"ort\.wasm\.min\.mjs is not there.*npm install onnxruntime-web@"):
        export_web(site.deployment, tmp_path / "out", libraries=tmp_path)


@pytest.mark.parametrize("example", ["web", "node"])
def test_packages_of_examples_are_pinned(example):
    """The versions that the export names are those that the tests run, and the lock names no registry."""
    folder = REPOSITORY / "examples" / example
    pinned = json.loads((folder / "package.json").read_text())["dependencies"]
    assert {name: version for name, version in pinned.items() if name in PACKAGES}.items() <= PACKAGES.items()
    packages = json.loads((folder / "package-lock.json").read_text())["packages"]
    assert [name for name, package in packages.items() if "resolved" in package] == []
    assert all("integrity" in package for name, package in packages.items() if name)
