"""What is no LoRA is refused; what is written is checked; folders and files are replaced as a whole."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.loras import seeded_task
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import HIDDEN_SIZE, VOCAB_SIZE
from safetensors.numpy import load_file, save_file

from adalink.export.adapter.export import export_adapter
from adalink.export.lora.base import LoraBase, base_of_deployment
from adalink.export.lora.export import export_lora
from adalink.export.lora.layout import LoraLayout
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import ConfigError, ContractError, DeploymentError, GraphError, WriteError


@pytest.fixture(scope="module")
def base(pristine: Path) -> LoraBase:
    return base_of_deployment(pristine / "deployment")


def task(base: LoraBase, root: Path, **settings: Any) -> Path:
    method = {"rank": 3, "activation": "gelu", "bias": False, "scope": "all", **settings}
    return write_adapter(root / "task", random_adapter(base.contract.fingerprint, HIDDEN_SIZE, 3, **method))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"scope": "prompt"}, 'its scope is "prompt", and a LoRA changes generated tokens too'),
        ({"soft_tokens": 2}, "its soft prompt is no token"),
        ({"rank": 0, "soft_tokens": 2, "activation": "identity"}, "its soft prompt is no token"),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_what_acts_elsewhere_is_refused(
    settings: dict[str, Any], reason: str, form: str, base: LoraBase, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=f"{reason}.*; run it with the kit's own runtime"):
        export_lora(task(base, tmp_path, **settings), base, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(base: LoraBase, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "task", seeded_task(f"sha256:{'0' * 64}"))
    with pytest.raises(ContractError, match="belongs to another base"):
        export_lora(folder, base, tmp_path / "out", "peft")


FAULTS = {
    "rows off by one": lambda rows, first: np.roll(rows, 1, axis=0),
    "transposed": lambda rows, first: rows.T.reshape(rows.shape),
    "half precision": lambda rows, first: rows.astype(np.float16),
    "one number": lambda rows, first: np.where(np.arange(rows.size).reshape(rows.shape) == 7, rows + 1e-4, rows),
}


@pytest.mark.parametrize("form", ["peft", "gguf"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_wrong_is_not_kept(
    fault: str, form: str, base: LoraBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows = LoraLayout.write_rows
    monkeypatch.setattr(
        LoraLayout,
        "write_rows",
        lambda self, file, first, rows: write_rows(self, file, first, FAULTS[fault](rows, first)),
    )
    with pytest.raises(GraphError, match="times the bound away from the task's: it was not kept"):
        export_lora(task(base, tmp_path), base, tmp_path / "out", form)
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_a_lora_is_replaced_as_a_whole(form: str, base: LoraBase, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_lora(task(base, tmp_path), base, out, form)
    before = {path.name: path.read_bytes() for path in ([out] if form == "gguf" else out.iterdir())}
    with pytest.raises(DeploymentError, match=r"is there already: pass --replace"):
        export_lora(task(base, tmp_path), base, out, form)
    export_lora(task(base, tmp_path, activation="tanh"), base, out, form, replace=True)
    after = {path.name: path.read_bytes() for path in ([out] if form == "gguf" else out.iterdir())}
    assert before.keys() == after.keys()
    assert before != after


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_a_full_disk_leaves_what_was_there(
    form: str, base: LoraBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LoraLayout, "write_rows", refuse)
    with pytest.raises(WriteError, match="No space left on device"):
        export_lora(task(base, tmp_path), base, tmp_path / "out", form)
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_other_things_are_not_replaced(base: LoraBase, tmp_path: Path) -> None:
    source = task(base, tmp_path)
    for form, place in (("peft", source), ("gguf", source / "adapter_config.json"), ("gguf", source)):
        with pytest.raises(DeploymentError, match=r"is no LoRA: it is not replaced|is a folder, and the format gguf"):
            export_lora(source, base, place, form, replace=True)
    with pytest.raises(DeploymentError, match="is a file, and the format peft is a folder"):
        export_lora(source, base, source / "adapter_config.json", "peft", replace=True)


def test_numbers_beyond_float16_are_refused(base: LoraBase, tmp_path: Path) -> None:
    adapter = seeded_task(base.contract.fingerprint, size=1e6, bias=False)
    folder = write_adapter(tmp_path / "task", adapter)
    with pytest.raises(ConfigError, match="more than float16 holds: choose --dtype fp32"):
        export_lora(folder, base, tmp_path / "out", "peft", dtype="float16")
    assert export_lora(folder, base, tmp_path / "out", "peft").worst_ratio <= 1


def test_pieces_are_the_whole(base: LoraBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    for name, size in (("whole", 1 << 25), ("pieces", 8 * HIDDEN_SIZE * 7)):
        monkeypatch.setattr("adalink.export.lora.export._PIECE_BYTES", size)
        for form in ("peft", "gguf"):
            progress = lambda line, _: lines.append(line)  # noqa: E731
            export_lora(task(base, tmp_path), base, tmp_path / f"{name}.{form}", form, progress=progress)
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()
    assert load_file(tmp_path / "whole.peft/adapter_model.safetensors").keys()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "whole.peft" / file).read_bytes() == (tmp_path / "pieces.peft" / file).read_bytes()
    assert "writing: 96 of 96 tokens" in lines
    assert len(set(lines)) == 2 * 14


def test_there_and_back_again(base: LoraBase, pristine: Path, tmp_path: Path) -> None:
    """A LoRA is imported as a table of token ids, without a word on its base, and goes out again bit for bit."""
    deployment = shutil.copytree(pristine / "deployment", tmp_path / "deployment")
    digests, files, source = [], [], task(base, tmp_path, bias=True)
    with Deployment.open(deployment) as plain:
        plain.add_task(source, "task")
        expected = plain.input_embeddings(np.arange(VOCAB_SIZE)[None], tasks="task")
    for name in ("first", "second"):
        export_lora(source, base, tmp_path / name, "peft")
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
        digests.append(export_adapter(tmp_path / name, deployment).tasks[name].adapter_digest)
        source = deployment / "tasks" / name
    assert digests[0] == digests[1]
    assert files[0] == files[1]
    with Deployment.open(deployment) as imported:
        found = imported.input_embeddings(np.arange(VOCAB_SIZE)[None], tasks="second")
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_lora_of_another_base_is_not_imported(base: LoraBase, pristine: Path, tmp_path: Path) -> None:
    export_lora(task(base, tmp_path), base, tmp_path / "out", "peft")
    path = tmp_path / "out/adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"adalink_base_fingerprint": f"sha256:{'1' * 64}"})
    with pytest.raises(ContractError, match="it belongs to another base"):
        export_adapter(tmp_path / "out", pristine / "deployment", assume_base=True)
