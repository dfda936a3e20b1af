"""A vision tower is opened with the first image: what is loaded then is what was verified, or it is not used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.vision_deployments import A, VisionDeployments

from adalink.runtime import Deployment
from adalink.runtime.errors import IntegrityError
from adalink.runtime.ort.backend import OnnxRuntimeBackend
from adalink.runtime.storage.manifest_io import read_manifest


def exchanged(path: Path) -> None:
    """Another file of the same name, bytes and modification time."""
    before, other = path.stat(), path.with_name("other")
    shutil.copy(path, other)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


def exchanged_back(path: Path) -> None:
    """Another file for a moment, then the first one again."""
    kept = path.with_name("kept")
    path.rename(kept)
    path.write_bytes(b"another graph")
    kept.replace(path)


def rewritten(path: Path) -> None:
    """Changed in place for good, its time stamp put back."""
    before, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("change", [exchanged, exchanged_back, rewritten])
@pytest.mark.parametrize("which", ["graph", "weights"])
def test_tower_that_is_exchanged_while_it_is_loaded_is_not_used(
    vision_deployments: VisionDeployments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    change: Callable[[Path], None],
    which: str,
) -> None:
    made = vision_deployments[family]
    folder = Path(shutil.copytree(made.folder, tmp_path / "copy"))
    vision = read_manifest(folder).base.vision
    assert vision is not None
    relative = vision.graph if which == "graph" else f"{vision.graph}.data"
    method = "open_vision" if family == "llava" else "open_patch_vision"
    opens, towers, closed = getattr(OnnxRuntimeBackend, method), [], []

    def late(self: OnnxRuntimeBackend, *arguments: Any) -> Any:
        tower = opens(self, *arguments)
        close = tower.close
        monkeypatch.setattr(tower, "close", lambda: (closed.append(tower), close()))
        towers.append(tower)
        change(folder / relative)
        return tower

    monkeypatch.setattr(OnnxRuntimeBackend, method, late)
    prompt = f"{made.family.placeholder}what?"
    with Deployment.open(folder) as opened:
        with pytest.raises(IntegrityError, match=rf"{relative}"):
            opened.generate([prompt], images=[[A]], max_new_tokens=1)
        assert closed == towers
        assert len(towers) == 1
        assert opened.images_encoded == 0
        monkeypatch.setattr(OnnxRuntimeBackend, method, opens)
        if change is not rewritten:  # its bytes are those of the manifest
            assert opened.generate([prompt], images=[[A]], max_new_tokens=1)[0].token_ids
