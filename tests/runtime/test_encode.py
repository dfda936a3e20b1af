"""`Deployment.encode` against sentence-transformers, which reads the same files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from helpers.runtime import random_adapter, reseal, write_adapter
from helpers.sentences import TEXTS, save_encoder, save_sentence_encoder, sentence_embeddings
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime import ContractError, Deployment, ModelError, RequestError
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.runtime.storage.pooling_schema import POOLING_MODES
from adalink.tools.commands.inspect import describe_deployment
from adalink.training.adapter_io import load_adapter
from adalink.training.models.loading import load_base, load_tokenizer
from adalink.training.models.sentence_files import read_pooling

PLAIN = {"pooling_mode": "mean"}
ADAPTERS: dict[str, dict[str, Any]] = {
    "alpha": {"rank": 3, "activation": "gelu", "bias": True, "scope": "all"},
    "soft": {"rank": 2, "activation": "silu", "bias": False, "scope": "all", "soft_tokens": 3},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


@pytest.fixture(scope="module")
def plain(encoder: Path) -> Path:
    """A deployment of a checkpoint without sentence-transformers files."""
    out = encoder.parent / "out"
    base = export_base(encoder, out).base
    assert base.pooling is None
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        adapter = random_adapter(base.fingerprint, base.hidden_size, seed, **settings)
        export_adapter(write_adapter(encoder.parent / name, adapter), out)
    return out


def with_files_of(checkpoint: Path, plain: Path, out: Path) -> Path:
    """The deployment as an export of ``checkpoint`` makes it, without tracing the same model again."""
    shutil.copytree(plain, out)
    model = load_base(checkpoint)
    pooling = read_pooling(checkpoint, load_tokenizer(checkpoint), model.config)
    reseal(out, base=msgspec.structs.replace(read_manifest(out).base, pooling=pooling))
    return out


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{mode: ({"pooling_mode": mode}, {}) for mode in POOLING_MODES},
    "several": ({"pooling_mode": ("mean", "cls", "max")}, {"normalize": True}),
    "normalised": (PLAIN, {"normalize": True, "max_seq_length": 16}),
    "prompt": (PLAIN, {"prompts": {"query": "query of me: ", "other": "x"}, "default_prompt_name": "query"}),
    "prompt not pooled": (
        {"pooling_mode": ("weightedmean", "cls", "lasttoken", "max"), "include_prompt": False},
        {"prompts": {"query": "query of me: "}, "default_prompt_name": "query"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_vectors_are_those_of_sentence_transformers(encoder: Path, plain: Path, tmp_path: Path, case: str) -> None:
    pooling, settings = CASES[case]
    checkpoint = save_sentence_encoder(tmp_path / "tiny", encoder, pooling, **settings)
    with Deployment.open(with_files_of(checkpoint, plain, tmp_path / "out"), threads=1) as deployment:
        got = deployment.encode(TEXTS)
        given = deployment.encode(TEXTS[:2], prompt="in front: ")
    want = sentence_embeddings(checkpoint, TEXTS)
    assert got.dtype == np.float32
    assert (
        got.shape
        == want.shape
        == (len(TEXTS), 48 * (1 if isinstance(pooling["pooling_mode"], str) else 3 + ("not" in case)))
    )
    assert got == pytest.approx(want, abs=2e-5)
    assert given == pytest.approx(sentence_embeddings(checkpoint, TEXTS[:2], prompt="in front: "), abs=2e-5)


@pytest.mark.parametrize(("side", "lower"), [("left", False), ("right", True), ("left", True)])
def test_texts_are_cut_and_lower_cased(plain: Path, tmp_path: Path, side: str, lower: bool) -> None:
    """By a tokenizer that tells capital letters apart and adds no special tokens."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    encoder = save_encoder(tmp_path / "plain", tokenizer)
    settings = {"max_seq_length": 9, "do_lower_case": lower}
    checkpoint = save_sentence_encoder(tmp_path / "tiny", encoder, PLAIN, **settings)
    config = checkpoint / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "truncation_side": side}))
    texts = [text for text in TEXTS if text]
    want = sentence_embeddings(checkpoint, texts)
    export_base(checkpoint, tmp_path / "out")
    with Deployment.open(tmp_path / "out", threads=1) as deployment:
        assert deployment.encode(texts) == pytest.approx(want, abs=2e-5)
        with pytest.raises(RequestError, match="text 1 has no tokens"):
            deployment.encode(["a", ""])


def test_old_files_say_the_same(encoder: Path, tmp_path: Path) -> None:
    """Flags and class names of releases before 5.0."""
    folder = tmp_path / "tiny"
    shutil.copytree(encoder, folder)
    (folder / "1_Pooling").mkdir()
    kinds = ("Transformer", "Pooling", "Dropout", "Normalize")
    modules = [
        {"idx": index, "path": f"{index}_{kind}" if index else "", "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    flags = {"word_embedding_dimension": 48, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({**flags, "pooling_mode_max_tokens": False}))
    pooling = read_pooling(folder, load_tokenizer(folder), load_base(folder).config)
    assert pooling is not None
    assert (pooling.modes, pooling.normalize, pooling.max_tokens) == (("cls", "mean"), True, 64)
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    refused = read_pooling(folder, load_tokenizer(folder), load_base(folder).config)
    assert refused is not None
    assert refused.modes == ()
    assert "module 2" in refused.unsupported
    assert "Dense" in refused.unsupported


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality_config": {"text": {}, "message": {}}}, "message"),  # texts would go into the chat template
        ({"transformer_task": "text-generation"}, "text-generation"),
        ({"modality_config": {"text": {"method_output_name": "pooler_output"}}}, "pooler_output"),
        ({"processor_kwargs": {"padding_side": "left"}}, "padding_side"),
        ({"config_args": {"num_hidden_layers": 1}}, "num_hidden_layers"),
    ],
)
def test_settings_that_would_give_other_vectors(
    encoder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    checkpoint = save_sentence_encoder(tmp_path / "tiny", encoder, PLAIN)
    path = checkpoint / "sentence_bert_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    pooling = read_pooling(checkpoint, load_tokenizer(checkpoint), load_base(checkpoint).config)
    assert pooling is not None
    assert message in pooling.unsupported


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("modules.json", "[", "modules.json cannot be read"),
        ("modules.json", '{"type": "x"}', "modules.json cannot be read"),
        ("modules.json", '[{"type": "x"}, {"type": "x", "path": "../y"}]', "folder in it"),
        ("sentence_bert_config.json", '{"max_seq_length": "9"}', "max_seq_length"),
        ("1_Pooling/config.json", '{"pooling_mode": "median"}', "pooling mode is"),
        ("1_Pooling/config.json", '{"embedding_dimension": 9}', "for 9 numbers"),
        ("config_sentence_transformers.json", '{"prompts": ["a"]}', "prompts"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "passage"}', "no prompt 'passage'"),
    ],
)
def test_files_that_cannot_be_read(encoder: Path, tmp_path: Path, file: str, content: str, message: str) -> None:
    checkpoint = save_sentence_encoder(tmp_path / "tiny", encoder, PLAIN)
    (checkpoint / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        read_pooling(checkpoint, load_tokenizer(checkpoint), load_base(checkpoint).config)


@pytest.mark.parametrize(
    ("missing", "unreachable", "expected"),
    [
        ((), (), ""),
        (("2_Normalize/config.json",), ("2_Normalize/config.json",), ""),  # of older releases, which wrote none
        (("1_Pooling/config.json",), (), "1_Pooling/config.json is missing"),
        (("sentence_bert_config.json",), (), ""),
        (("sentence_bert_config.json",), ("sentence_bert_config.json",), "sentence_bert_config.json cannot be fetched"),
        (("modules.json",), ("modules.json",), None),
    ],
)
def test_files_on_a_hub(
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: tuple[str, ...],
    unreachable: tuple[str, ...],
    expected: str | None,
) -> None:
    """A file that cannot be fetched now is not taken for one that does not exist."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    checkpoint = save_sentence_encoder(tmp_path / "tiny", encoder, PLAIN, normalize=True)

    def fetch(hub_id: str, file: str, *, local_files_only: bool) -> str:
        assert (hub_id, local_files_only) == ("org/tiny", True)
        if file in unreachable:
            raise LocalEntryNotFoundError(file)
        if file in missing or not (checkpoint / file).is_file():
            raise EntryNotFoundError(file)
        return str(checkpoint / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = tmp_path / "cache/models--org--tiny/snapshots/main"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):  # the hub itself is not asked
        (snapshot / name).touch()
    pooling = read_pooling("org/tiny", load_tokenizer(checkpoint), load_base(checkpoint).config)
    if expected is None:
        assert pooling is None
        return
    assert pooling is not None
    assert pooling.unsupported.startswith(expected)
    assert bool(pooling.modes) == (not expected)


def test_further_variants_keep_the_pooling(encoder: Path, plain: Path, tmp_path: Path) -> None:
    """One of a deployment that an older kit wrote takes it up; another one is refused."""
    mean = save_sentence_encoder(tmp_path / "mean", encoder, PLAIN)
    cls = save_sentence_encoder(tmp_path / "cls", encoder, {"pooling_mode": "cls"})
    out = shutil.copytree(plain, tmp_path / "out")
    base = export_base(mean, out, target="portable").base
    assert base.pooling is not None
    assert base.pooling.modes == ("mean",)
    with pytest.raises(ContractError, match="with another pooling"):
        export_base(cls, out, target="portable", replace=True)
    assert export_base(encoder, out, target="portable", replace=True).base.pooling == base.pooling
    described = describe_deployment(out)["base"]
    assert isinstance(described, dict)
    assert described["pooling"]["modes"] == ("mean",)


@pytest.fixture(scope="module")
def opened(encoder: Path, plain: Path) -> Iterator[Deployment]:
    checkpoint = save_sentence_encoder(encoder.parent / "sentences", encoder, PLAIN, normalize=True, max_seq_length=20)
    with Deployment.open(with_files_of(checkpoint, plain, encoder.parent / "mean"), threads=1) as deployment:
        yield deployment


def test_mixed_tasks_share_a_batch(opened: Deployment, encoder: Path) -> None:
    """Against PyTorch with each task's adapter attached; a soft prompt is not pooled."""
    texts, tasks = TEXTS * 3, [None, "alpha", "soft", "alpha", None] * 3
    got = opened.encode(texts, tasks)
    tokenizer = load_tokenizer(encoder)
    for text, task, vector in zip(texts, tasks, got, strict=True):
        alone = opened.encode([text], task)[0]
        assert vector == pytest.approx(alone, abs=2e-6)
        if task == "soft":
            continue
        model = load_base(encoder)
        ids = torch.tensor([tokenizer(text, truncation=True, max_length=20)["input_ids"]])
        with torch.no_grad():
            if task is None:
                states = model(ids).last_hidden_state[0]
            else:
                with load_adapter(encoder.parent / task, model):
                    states = model(ids).last_hidden_state[0]
        want = states.double().mean(0)
        assert vector == pytest.approx((want / want.norm()).numpy(), abs=2e-5)
    soft = opened.run(input_ids=[tokenizer("oil prices rose")["input_ids"]], tasks="soft")["last_hidden_state"][0]
    want = soft.astype(np.float64).mean(axis=0)
    assert opened.encode(["oil prices rose"], "soft")[0] == pytest.approx(want / np.linalg.norm(want), abs=2e-6)


def test_token_ids_are_taken_as_they_are(opened: Deployment) -> None:
    ids = opened.tokenizer.encode("oil prices")
    assert np.array_equal(opened.encode([ids, "oil prices"])[0], opened.encode(["oil prices"])[0])
    with pytest.raises(RequestError, match="65 positions"):
        opened.encode([[5] * 65])


def test_what_is_asked_for_replaces_the_default(opened: Deployment) -> None:
    whole = opened.encode(TEXTS, pooling=["cls", "mean"], normalize=False)
    mean = whole[:, 48:] / np.linalg.norm(whole[:, 48:], axis=1, keepdims=True)
    assert opened.encode(TEXTS) == pytest.approx(mean, abs=1e-6)
    assert opened.encode(TEXTS, pooling="cls", normalize=False) == pytest.approx(whole[:, :48], abs=1e-6)
    assert opened.encode([]).shape == (0, 48)


def test_cut_texts_are_counted(opened: Deployment, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "adalink"):
        opened.encode(TEXTS)
    assert "2 of 5 texts were longer than 20 tokens" in caplog.text


def test_a_base_that_says_nothing_is_not_guessed(plain: Path) -> None:
    with Deployment.open(plain, threads=1) as deployment:
        with pytest.raises(RequestError, match=r"no modules\.json .*'mean'.*and normalize"):
            deployment.encode(["a"])
        assert deployment.encode(["a"], pooling="mean").shape == (1, 48)
        with pytest.raises(RequestError, match="made for at most 64"):
            deployment.encode(["a" * 90], pooling="mean")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "median"}, "pooling is 'median'"),
        ({"pooling": []}, r"pooling is \[\]"),
        ({"normalize": 1}, "normalize is 1"),
        ({"tasks": ["alpha"]}, "1 entries for 2 rows"),
        ({"tasks": "nobody"}, "not deployed"),
        ({"prompt": 3}, "prompt is 3"),
    ],
)
def test_wrong_arguments(opened: Deployment, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        opened.encode(["a", "b"], **arguments)
    with pytest.raises(RequestError, match="texts is 'a'"):
        opened.encode("a")


def test_many_texts_come_back_in_order(opened: Deployment) -> None:
    """More than a batch, of all lengths."""
    texts = ["abcdefghij klmno"[: 1 + index % 16] + str(index) for index in range(150)]
    got = opened.encode(texts, [None, "alpha", "soft"] * 50)
    for index in (0, 1, 2, 77, 149):
        alone = opened.encode([texts[index]], [None, "alpha", "soft"][index % 3])
        assert got[index] == pytest.approx(alone[0], abs=2e-6)
