"""Generation config of a checkpoint: what the manifest records, what the export names, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from helpers.tiny_deployments import make_model_folder
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.base.export import export_base
from adalink.export.base.generation import describe_generation, report
from adalink.runtime.errors import ContractError, ManifestError, ModelError
from adalink.runtime.storage.generation_schema import GenerationDefaults, SequenceBias
from adalink.runtime.storage.manifest import Manifest
from adalink.runtime.storage.manifest_io import encode_manifest, read_manifest

VOCAB = 96


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("deployment")
    return export_base(FAMILIES["llama"](), folder, target="portable", tokenizer=make_tokenizer())


def describe(kind: str = "decoder", **settings: Any) -> GenerationDefaults:
    model: Any = FAMILIES["t5" if kind == "encoder-decoder" else "llama"]()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    found = describe_generation(model, kind, VOCAB)
    assert found is not None
    return found


def test_nothing_is_asked_for_by_default() -> None:
    assert describe() == GenerationDefaults()
    assert report(describe()) == []
    assert describe_generation(FAMILIES["bert"](), "encoder", VOCAB) is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": True}, {"do_sample": True, "top_k": 50}),
        ({"do_sample": True, "top_k": 0, "min_p": 0.1}, {"do_sample": True, "top_k": 0, "min_p": 0.1}),
        ({"repetition_penalty": 1.1, "max_new_tokens": 2048}, {"repetition_penalty": 1.1, "max_new_tokens": 2048}),
        (
            {"suppress_tokens": [3, 96, 5], "begin_suppress_tokens": [4]},
            {"suppress_tokens": (3, 5), "begin_suppress_tokens": (4,)},
        ),
        ({"eos_token_id": [2, 9], "bad_words_ids": [[9], [9, 5], [7], [200]]}, {"bad_words_ids": ((9, 5), (7,))}),
        ({"sequence_bias": [[[5, 6], 2.0]]}, {"sequence_bias": (SequenceBias(token_ids=(5, 6), bias=2.0),)}),
        ({"stop_strings": "END"}, {"stop_strings": ("END",)}),
        ({"stop_strings": ["a", "END", "a"]}, {"stop_strings": ("a", "END")}),
        ({"sequence_bias": {(5,): -1}}, {"sequence_bias": (SequenceBias(token_ids=(5,), bias=-1.0),)}),
        (
            {"forced_eos_token_id": 2, "forced_bos_token_id": 7},
            {"forced_eos_token_ids": (2,), "forced_bos_token_id": 7},
        ),
    ],
)
def test_settings_are_recorded(settings: dict[str, Any], expected: dict[str, Any]) -> None:
    assert describe(**settings) == GenerationDefaults(**expected)


def test_length_of_an_encoder_decoder_counts_its_start() -> None:
    assert describe("encoder-decoder", max_length=20).max_new_tokens == 19
    assert describe("encoder-decoder", max_length=20, max_new_tokens=7).max_new_tokens == 7
    found = describe(max_length=4096)  # of a decoder it includes the prompt
    assert (found.max_new_tokens, found.not_applied) == (None, ("max_length=4096",))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"num_beams": 4, "length_penalty": 2.0, "early_stopping": True}, ("num_beams=4",)),
        ({"penalty_alpha": 0.6, "top_k": 4}, ("penalty_alpha=0.6",)),
        ({"guidance_scale": 1.5}, ("guidance_scale=1.5",)),
        ({"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 3e-4}, ("epsilon_cutoff=0.0003", "typical_p=0.9")),
        ({"encoder_no_repeat_ngram_size": 3}, ("encoder_no_repeat_ngram_size=3",)),
        ({"exponential_decay_length_penalty": (5, 1.1)}, ("exponential_decay_length_penalty=(5, 1.1)",)),
        ({"a_setting_of_tomorrow": 3}, ("a_setting_of_tomorrow=3",)),
        ({"num_beams": 1, "typical_p": 1.0, "guidance_scale": 1.0, "use_cache": False, "pad_token_id": 3}, ()),
    ],
)
def test_what_is_not_applied_is_named(settings: dict[str, Any], names: tuple[str, ...]) -> None:
    found = describe(**settings)
    assert found.not_applied == names
    assert any("not applied: " + ", ".join(names) in line for line in report(found)) == bool(names)


@pytest.mark.parametrize(
    ("settings", "wording"),
    [
        ({"temperature": -1.0}, "temperature is -1.0, expected a number of at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0, expected a number of more than 0"),
        ({"top_p": 1.5}, "top_p is 1.5, expected a number of more than 0 and at most 1"),
        ({"top_k": 2.5}, "top_k is 2.5, expected a whole number"),
        ({"min_p": "high"}, "min_p is 'high', expected a number"),
        ({"no_repeat_ngram_size": float("nan")}, "no_repeat_ngram_size is nan, expected a number"),
        ({"suppress_tokens": [-1]}, "names the token -1"),
        ({"stop_strings": ["a", ""]}, "stop_strings holds '', expected texts"),
        ({"stop_strings": [3]}, "stop_strings holds 3, expected texts"),
        ({"stop_strings": "\ud800"}, r"stop_strings holds '\\ud800', expected texts"),
        ({"suppress_tokens": "all"}, "a form that transformers does not know"),
        ({"bad_words_ids": [5]}, "a form that transformers does not know"),
        ({"forced_eos_token_id": [None]}, "a form that transformers does not know"),
        ({"sequence_bias": [[5]]}, "a form that transformers does not know"),
    ],
)
def test_senseless_values_are_refused(settings: dict[str, Any], wording: str) -> None:
    with pytest.raises(ModelError, match=wording):
        describe(**settings)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_not_read_is_refused(tmp_path: Path, content: bytes) -> None:
    """Of such a file transformers takes nothing, without a word."""
    model: Any = FAMILIES["llama"]()
    model.name_or_path = str(tmp_path)
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"generation_config\.json is not JSON with settings by name"):
        describe_generation(model, "decoder", VOCAB)


def test_export_records_and_says_it(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / "model", "llama")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.1, "num_beams": 4}))
    lines: list[str] = []
    manifest = export_base(folder, tmp_path / "deployment", progress=lines.append)
    assert manifest.base.generation == GenerationDefaults(repetition_penalty=1.1, not_applied=("num_beams=4",))
    assert read_manifest(tmp_path / "deployment").base == manifest.base
    assert any("repetition_penalty=1.1" in line for line in lines)
    assert any("not applied: num_beams=4" in line for line in lines)
    path.unlink()
    with pytest.raises(ContractError, match="another generation_config than"):
        export_base(folder, tmp_path / "deployment", target="portable")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"top_p": 2.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"suppress_tokens": (VOCAB,)}, "generation"),
        ({"forced_bos_token_id": -1}, "generation"),
        ({"bad_words_ids": ((),)}, "generation"),
        ({"sequence_bias": (SequenceBias(token_ids=(1,), bias=float("nan")),)}, "sequence_bias"),
    ],
)
def test_manifests_are_validated(manifest: Manifest, changes: dict[str, Any], field: str) -> None:
    wrong = msgspec.structs.replace(manifest.base, generation=GenerationDefaults(**changes))
    with pytest.raises(ManifestError, match=field):
        encode_manifest(msgspec.structs.replace(manifest, base=wrong))
