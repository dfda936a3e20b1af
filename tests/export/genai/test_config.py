"""How onnxruntime-genai chooses tokens by default: as the checkpoint says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from helpers.genai_host import NEW, Host, greedy
from helpers.runtime import random_adapter
from helpers.tiny_deployments import make_deployment, write_adapter
from helpers.tiny_models import VOCAB_SIZE

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.export.genai.config import genai_config
from adalink.export.genai.export import export_genai
from adalink.runtime.storage.generation_schema import GenerationDefaults
from adalink.runtime.storage.label_spec import LabelSet
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main
from adalink.training.models.loading import load_base

PROMPT = [7, 0, 2, 9]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_deployment(tmp_path_factory.mktemp("genai-llama"), "llama", {"relu": {"seed": 2, "activation": "relu"}})


def test_config_has_defaults_of_the_base(llama, tmp_path):
    deployment = tmp_path / "deployment"
    model = load_base(llama[0])
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=7, min_p=0.2, bad_words_ids=[[3]])
    model.save_pretrained(tmp_path / "model")
    shutil.copy(llama[0] / "tokenizer.json", tmp_path / "model")
    shutil.copy(llama[0] / "tokenizer_config.json", tmp_path / "model")
    export_base(tmp_path / "model", deployment)
    result = CliRunner().invoke(main, ["export", "genai", str(deployment), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["not_carried"] == {"min_p": 0.2, "bad_words_ids": [[3]]}
    assert "apply them in your program" in result.stderr
    search = json.loads((tmp_path / "out" / "genai_config.json").read_text())["search"]
    assert {name: search[name] for name in ("do_sample", "temperature", "top_k")} == {
        "do_sample": True,
        "temperature": 0.5,
        "top_k": 7,
    }
    Host(tmp_path / "out")  # it refuses settings that it does not know


def test_parts_of_tasks_that_stay_are_said(llama, tmp_path):
    base = export_base(llama[0], tmp_path / "deployment", modalities=("text", "image")).base
    settings = {"rank": 2, "activation": "relu", "bias": True, "scope": "all", "modalities": ("image", "text")}
    labels = LabelSet(completions=(" oil", " corn"))
    adapter = random_adapter(base.fingerprint, base.hidden_size, 3, **settings, labels=labels)
    export_adapter(write_adapter(tmp_path / "topics", adapter), tmp_path / "deployment")
    result = CliRunner().invoke(
        main, ["export", "genai", str(tmp_path / "deployment"), "--out", str(tmp_path / "out"), "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["left_out"] == {"topics": ["weights for image", "labels"]}
    assert "task topics: weights for image and labels stay in the kit" in result.stderr


@pytest.mark.parametrize(
    ("defaults", "expected"),
    [
        ({"do_sample": True, "top_k": 0}, {"do_sample": True, "top_k": VOCAB_SIZE}),
        ({"do_sample": True, "top_k": 5, "top_p": 0.9}, {"do_sample": True, "top_k": 5, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 5, "temperature": 0.0}, {"do_sample": False}),
        ({"do_sample": False, "repetition_penalty": 1.5}, {"do_sample": False, "repetition_penalty": 1.5}),
        (None, {"do_sample": False}),
    ],
)
def test_zeros_of_defaults_mean_what_the_checkpoint_means(llama, defaults, expected):
    """Without ``top_k`` the host keeps 50 tokens, and without ``temperature`` it samples with 1."""
    generation = None if defaults is None else GenerationDefaults(**defaults)
    base = msgspec.structs.replace(read_manifest(llama[1]).base, generation=generation)
    search = json.loads(genai_config(base, "model.onnx", (), ()))["search"]
    assert {name: search[name] for name in expected} == expected


@pytest.mark.parametrize("defaults", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 2}, {"min_length": 9}, {}])
def test_defaults_choose_the_tokens_of_transformers(llama, tmp_path, defaults):
    """Each changes them: the base repeats a token, which ends the text where a least length forbids that."""
    export_genai(llama[1], tmp_path / "out")
    model, ids = load_base(llama[0]), torch.tensor([PROMPT])
    plain, base = greedy(model, PROMPT, None), read_manifest(llama[1]).base
    if "min_length" in defaults:
        plain = plain[:1]
        base = msgspec.structs.replace(base, eos_token_ids=(plain[0],))
    base = msgspec.structs.replace(base, generation=GenerationDefaults(**defaults))
    made, config = json.loads(genai_config(base, "model.onnx", (), ())), tmp_path / "out" / "genai_config.json"
    written = json.loads(config.read_text())
    written["search"], written["model"]["eos_token_id"] = made["search"], made["model"]["eos_token_id"]
    config.write_text(json.dumps(written))
    model.generation_config.update(eos_token_id=base.eos_token_ids[0], max_new_tokens=NEW, **defaults)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(PROMPT) :].tolist()
    host = Host(tmp_path / "out")
    assert host.generate(PROMPT, host.weights(None)) == expected
    assert (expected == plain) == (not defaults)
