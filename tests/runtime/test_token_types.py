"""Token types: pairs of texts through an encoder, as transformers computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.export import ALL_ENCODERS
from helpers.host_device import HostBackend
from helpers.runtime import reseal
from helpers.soft_prompts import EVERY, Soft, build_soft, padded
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_pair_tokenizer, make_tokenizer

from adalink.export.base import files
from adalink.export.base.export import export_base
from adalink.runtime.backends import open_backend
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import GraphError, RequestError
from adalink.runtime.options import OpenOptions
from adalink.runtime.profile import Profile, ShapeRange
from adalink.runtime.storage.manifest_io import read_manifest

LENGTHS = (7, 3, 10, 1, 6, 10, 4, 2)
CLOSE = 1e-5
TEXTS = ("Is it late?", "yes, 9-30.")


def rows(vocab: int = 90) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of rows of several lengths, and types of each."""
    rng = np.random.default_rng(5)
    ids = [rng.integers(5, vocab, length).tolist() for length in LENGTHS]
    return ids, [[0] * (length // 2) + [1] * (length - length // 2) for length in LENGTHS]


def states_of(model: Any, ids: list[int], types: list[int]) -> Any:
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor([ids]), "token_type_ids": torch.tensor([types])}
        return model(**inputs).last_hidden_state[0].numpy()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Soft:
    own = build_soft("bert", tmp_path_factory.mktemp("pairs"), target="portable")
    export_base(own.model, own.folder)
    return own


def old_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    """A deployment as a kit without token types wrote it: nothing in the manifest, no input in the graph."""
    model = FAMILIES["bert"]()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_token_types", lambda *_: None)
        export_base(model, root / "old", tokenizer=make_tokenizer())
    return model, root / "old"


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "portable"])
@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta"])
def test_pairs_equal_transformers(tmp_path: Path, name: str, target: str) -> None:
    model = ALL_ENCODERS[name]()
    export_base(model, tmp_path / "out", target=target)
    ids, types = rows()
    with Deployment.open(tmp_path / "out") as deployment:
        for row, kinds in zip(ids, types, strict=True):
            received = deployment.run(input_ids=[row], token_type_ids=[kinds])["last_hidden_state"][0]
            expected = states_of(model, row, kinds)
            assert np.abs(received - expected).max() <= CLOSE * max(1, np.abs(expected).max())
            assert np.abs(expected - states_of(model, row, [0] * len(row))).max() > 100 * CLOSE
            plain = deployment.run(input_ids=[row])["last_hidden_state"][0]
            assert np.abs(plain - states_of(model, row, [0] * len(row))).max() <= CLOSE * max(1, np.abs(plain).max())
            table = deployment.input_embeddings([row])
            again = deployment.run(inputs_embeds=table, token_type_ids=[kinds])["last_hidden_state"][0]
            np.testing.assert_array_equal(again, received)


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_rows_of_a_mixed_batch_keep_their_types(bert: Soft, where: str) -> None:
    """Under every kind of task, a soft prompt being of type 0; on a device in several passes."""
    ids, types = rows()
    batch, mask, places = padded(ids, left=False)
    kinds = np.zeros_like(batch)
    for row, place in enumerate(places):
        kinds[row, place] = types[row]
    if where == "cpu":
        opened = Deployment.open(bert.folder, variant="onnxruntime-cpu")
    else:
        profile = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 8, 16), past=None)
        backend = HostBackend(profile, fresh=0xFF)
        opened = Deployment(bert.folder, read_manifest(bert.folder), backend, OpenOptions("portable"))
    with opened as deployment:
        received = deployment.run(input_ids=batch, attention_mask=mask, tasks=EVERY, token_type_ids=kinds)
        plain = deployment.run(input_ids=batch, attention_mask=mask, tasks=EVERY)
    for row, (place, task) in enumerate(zip(places, EVERY, strict=True)):
        soft = 0 if task is None else bert.adapters[task].config.soft_tokens
        for outputs, row_types in ((received, types[row]), (plain, [0] * len(ids[row]))):
            expected, limit = bert.output(ids[row], task, token_type_ids=torch.tensor([[0] * soft + row_types]))
            assert np.abs(outputs["last_hidden_state"][row, place] - expected).max() <= limit, task


def test_a_soft_prompt_of_another_type_would_show(bert: Soft) -> None:
    """The limit above is tight enough to find a soft prompt that is taken for the second text."""
    ids, types = rows()
    right, limit = bert.output(ids[0], "soft", token_type_ids=torch.tensor([[0] * 5 + types[0]]))
    wrong, _ = bert.output(ids[0], "soft", token_type_ids=torch.tensor([[1] * 5 + types[0]]))
    assert np.abs(right - wrong).max() > 100 * limit


@pytest.mark.parametrize("make", [make_pair_tokenizer, make_tokenizer])
def test_texts_are_joined_as_by_the_tokenizer(tmp_path: Path, make: Any) -> None:
    """A tokenizer that gives no token types has none fed, as transformers then does."""
    model, tokenizer = FAMILIES["bert"](), make()
    base = export_base(model, tmp_path / "out", tokenizer=tokenizer).base
    assert (base.token_types, base.tokenizer_types) == (2, make is make_pair_tokenizer)
    with Deployment.open(tmp_path / "out") as deployment:
        for texts in (TEXTS, TEXTS[:1]):
            made = tokenizer(*texts, return_tensors="pt")
            ids, types = deployment.tokenizer.encode_pair(*texts)
            assert ids == made["input_ids"][0].tolist()
            with torch.no_grad():
                expected = model(**made).last_hidden_state[0].numpy()
            received = deployment.run(input_ids=[ids], token_type_ids=[types])["last_hidden_state"][0]
            assert np.abs(received - expected).max() <= CLOSE * np.abs(expected).max()


def test_a_base_without_token_types_takes_pairs(tmp_path: Path) -> None:
    """DistilBERT's tokenizer is BERT's, but its model has no token types."""
    base = export_base(ALL_ENCODERS["distilbert"](), tmp_path / "out", tokenizer=make_pair_tokenizer()).base
    assert base.token_types == 1
    with Deployment.open(tmp_path / "out") as deployment:
        ids, types = deployment.tokenizer.encode_pair(*TEXTS)
        assert ids == make_pair_tokenizer()(*TEXTS)["input_ids"]
        assert not any(types)
        deployment.run(input_ids=[ids], token_type_ids=[types])
        with pytest.raises(RequestError, match="token_type_ids holds 0 to 1, expected 0 to 0"):
            deployment.run(input_ids=[[5, 6]], token_type_ids=[[0, 1]])


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ([[0, 1]], r"token_type_ids is int64 with shape \(1, 2\), expected int64 with shape \(1, 3\)"),
        ([[0.0, 1.0, 1.0]], "token_type_ids is float64 with shape"),
        ([[0, 1, 2]], "token_type_ids holds 0 to 2, expected 0 to 1"),
        ([[0, 1, -1]], "token_type_ids holds -1 to 1, expected 0 to 1"),
        ([[0, 1, 1], [0]], "token_type_ids is not a rectangular array"),
        ("x", "token_type_ids is <U1"),
    ],
)
def test_wrong_types_are_refused(bert: Soft, types: Any, message: str) -> None:
    with Deployment.open(bert.folder) as deployment, pytest.raises(RequestError, match=message):
        deployment.run(input_ids=[[5, 6, 7]], token_type_ids=types)


def test_a_deployment_of_an_older_kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes what it did; a pair is refused, and a further variant is like those that are there."""
    model, folder = old_folder(tmp_path, monkeypatch)
    export_base(model, folder, target="portable", tokenizer=make_tokenizer())
    assert read_manifest(folder).base.token_types is None
    expected = states_of(model, [5, 6, 7], [0, 0, 0])
    for variant in ("onnxruntime-cpu", "portable"):
        with Deployment.open(folder, variant=variant) as deployment:
            received = deployment.run(input_ids=[[5, 6, 7]], token_type_ids=[[0, 0, 0]])["last_hidden_state"][0]
            assert np.abs(received - expected).max() <= CLOSE * np.abs(expected).max()
            with pytest.raises(RequestError, match=r"written by a kit without token types.* export the base again"):
                deployment.run(input_ids=[[5, 6, 7]], token_type_ids=[[0, 0, 1]])
            with pytest.raises(RequestError, match=r"text_pair cannot be used.* export the base again"):
                deployment.tokenizer.encode_pair(*TEXTS)
            assert deployment.tokenizer.encode_pair("ab")[0] == deployment.tokenizer.encode("ab")


@pytest.mark.parametrize("where", ["cpu", "device"])
def test_a_graph_without_the_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    _, folder = old_folder(tmp_path, monkeypatch)
    reseal(folder, base=msgspec.structs.replace(read_manifest(folder).base, token_types=2))
    profile = Profile(batch=ShapeRange(1, 2, 3), seq=ShapeRange(1, 8, 16), past=None)
    backend = HostBackend(profile) if where == "device" else open_backend("onnxruntime-cpu", 1)
    with pytest.raises(GraphError, match="token_type_ids"):
        Deployment(folder, read_manifest(folder), backend)


def test_pairs_are_for_encoders(tmp_path: Path) -> None:
    export_base(FAMILIES["gpt2"](), tmp_path / "out", tokenizer=make_tokenizer())
    with Deployment.open(tmp_path / "out") as deployment:
        with pytest.raises(RequestError, match="text_pair is for encoders"):
            deployment.tokenizer.encode_pair(*TEXTS)
        with pytest.raises(RequestError, match="token_type_ids holds 0 to 1, expected 0 to 0"):
            deployment.run(input_ids=[[5, 6]], token_type_ids=[[0, 1]])
