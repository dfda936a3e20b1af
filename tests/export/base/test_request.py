"""What is asked of an export is refused before the model is loaded, and what can be done is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from adalink.export.base.request import check_model, check_place
from adalink.runtime.errors import DeploymentError, ModelError, WriteError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "model.safetensors").write_bytes(bytes(1000))
    return folder


@pytest.mark.parametrize(("free", "is_enough"), [(499, False), (500, True)])
def test_space_is_at_least_that_of_half_the_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, is_enough: bool
) -> None:
    """Weights of 4 bytes become 2 with --dtype fp16."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if is_enough:
        check_model(model, tmp_path / "new/deployment")
        return
    with pytest.raises(WriteError, match=r"has 0 MB of free space, and the model's weights alone take 0 MB"):
        check_model(model, tmp_path / "new/deployment")


@pytest.mark.parametrize(
    ("config", "is_known"),
    [
        ({"model_type": "mamba"}, False),
        ({"model_type": None}, False),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, True),
        ({"model_type": "bert"}, True),
    ],
)
def test_types_that_are_not_supported_are_known_by_the_config(
    model: Path, tmp_path: Path, config: dict[str, object], is_known: bool
) -> None:
    (model / "config.json").write_text(json.dumps(config))
    if is_known:
        check_model(model, tmp_path)
    else:
        with pytest.raises(ModelError, match=r"model type .* is not supported; supported are bert, "):
            check_model(model, tmp_path)


def test_place_is_empty_or_a_deployment(model: Path, tmp_path: Path) -> None:
    check_place(tmp_path / "new", "portable", replace=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(DeploymentError, match="choose an empty folder"):
        check_place(model, "portable", replace=True)
