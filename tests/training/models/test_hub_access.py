"""Revision and token of a hub id: a hub's cache on the disk has two revisions, and all files come from the same one."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.tiny_deployments import make_model_folder

from adalink.runtime.errors import ConfigError, ModelError
from adalink.tools.cli import main
from adalink.training.models.base_kind import find_kind
from adalink.training.models.hub_access import HubAccess, download_options, hub_access
from adalink.training.models.loading import (
    base_fingerprint,
    checkpoint_folder,
    load_base,
    load_tokenizer,
)
from adalink.training.models.sentence_files import read_pooling
from adalink.training.models.source import find_source
from adalink.training.models.vision import find_image_processor

HUB_ID, TOKEN = "org/name", "hf_secret-word"
MAIN, OTHER = "1" * 40, "2" * 40


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models; the second has other embeddings, and an adapter beside its weights it has not."""
    root = tmp_path_factory.mktemp("hub")
    first = make_model_folder(root / "first", "llama")
    model = load_base(first)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    second = Path(shutil.copytree(first, root / "second"))
    model.save_pretrained(second)
    return {MAIN: first, OTHER: second}


@pytest.fixture
def cache(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache as huggingface_hub lays it out, without a network."""
    repository = tmp_path / "cache" / "models--org--name"
    for revision, folder in folders.items():
        shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(MAIN)
    (repository / "refs" / "v2").write_text(OTHER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def inspect(*options: str) -> Any:
    result = CliRunner().invoke(main, ["inspect", HUB_ID, "--json", *options])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("options", "revision"),
    [((), MAIN), (("--revision", "main"), MAIN), (("--revision", "v2"), OTHER), (("--revision", OTHER), OTHER)],
)
def test_the_revision_is_loaded(cache: Path, folders: dict[str, Path], options: tuple[str, ...], revision: str) -> None:
    expected = {name: base_fingerprint(load_base(folder)) for name, folder in folders.items()}
    assert expected[MAIN] != expected[OTHER]
    found = inspect(*options)
    assert (found["name"], found["fingerprint"]) == (HUB_ID, expected[revision])


def test_every_file_is_of_the_revision(cache: Path) -> None:
    """Planted: the other revision lacks weights and tokenizer, so that one file of it is seen."""
    shutil.rmtree(cache / "snapshots" / MAIN)
    (cache / "refs" / "main").unlink()
    with hub_access(HUB_ID, HubAccess("v2")):
        assert load_base(HUB_ID) is not None
        assert load_tokenizer(HUB_ID)("a")
        assert checkpoint_folder(HUB_ID) == cache / "snapshots" / OTHER
    with pytest.raises(ModelError, match="the hub's cache does not hold it"):  # the block has ended
        checkpoint_folder(HUB_ID)


def test_unreachable_hub_is_asked_once(cache: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries would try again and again for each file."""
    asked = []

    def connect(*arguments: Any, **_: Any) -> None:
        asked.append(arguments[0])
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(socket, "create_connection", connect)
    assert base_fingerprint(load_base(HUB_ID)) == base_fingerprint(load_base(folders[MAIN]))
    assert load_tokenizer(HUB_ID)("a")
    assert find_image_processor(HUB_ID) is None
    assert read_pooling(HUB_ID, None, None) is None
    assert find_kind(find_source(HUB_ID)) == "decoder"
    assert asked == [("hub.invalid", 80)]


def test_what_comes_next_is_of_the_revision(cache: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", HUB_ID, "--revision", "v2"])
    assert result.stderr.endswith(f"next: adalink export base {HUB_ID} --out deployment --revision v2\n")


def test_revision_that_there_is_not_is_an_error(cache: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", HUB_ID, "--revision", "v3"])
    assert result.exit_code == 2
    assert "base model org/name" in result.stderr


@pytest.mark.parametrize(("words", "variables"), [(("--token", TOKEN), {}), ((), {"HF_TOKEN": TOKEN})])
def test_token_goes_to_the_hub_and_nowhere_else(
    cache: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], variables: dict[str, str]
) -> None:
    import huggingface_hub
    from transformers import AutoConfig

    download, from_pretrained, tokens = huggingface_hub.hf_hub_download, AutoConfig.from_pretrained, []

    def spy(call: Any) -> Any:
        def call_it(*arguments: Any, **options: Any) -> Any:
            tokens.append(options.get("token"))
            return call(*arguments, **options)

        return call_it

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", spy(download))
    monkeypatch.setattr(AutoConfig, "from_pretrained", spy(from_pretrained))
    result = CliRunner().invoke(main, ["-vv", "inspect", HUB_ID, *words], env=variables)
    assert result.exit_code == 0, result.output
    assert TOKEN not in result.output
    assert len(tokens) > 3
    assert set(tokens) == {TOKEN}
    assert TOKEN not in repr(HubAccess(token=TOKEN))
    failed = CliRunner().invoke(main, ["inspect", "org/absent", *words], env=variables)
    assert (failed.exit_code, TOKEN in failed.output) == (2, False)


def test_folder_has_no_revision(folders: dict[str, Path]) -> None:
    folder = folders[MAIN]
    with (
        pytest.raises(ConfigError, match="has no revision 'v2': leave --revision out"),
        hub_access(folder, HubAccess("v2")),
    ):
        pass
    with hub_access(folder, HubAccess(token=TOKEN)):  # as HF_TOKEN may be set for others
        assert download_options(folder) == {}
        assert download_options(HUB_ID) == {"token": TOKEN}
    assert download_options(HUB_ID) == {}
    with hub_access(HUB_ID, HubAccess("v1", TOKEN)), hub_access(HUB_ID, HubAccess("v2")):  # of a step of a quick start
        assert download_options(HUB_ID) == {"revision": "v2", "token": TOKEN}
