"""A GGUF base, verified: what it says is compared with a reference that does not read it as the export does."""

from __future__ import annotations

import shutil
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from helpers import tiny_models
from helpers.runtime import reseal
from helpers.tiny_deployments import seeded_adapter, write_adapter
from helpers.tiny_ggufs import write_gguf

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.errors import ContractError, ModelError
from adalink.runtime.storage.adapter import make_adapter
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.parity.suite import VerifyOptions, verify
from adalink.training.models.gguf import pretokenizer
from adalink.training.models.loading import load_tokenizer

OPTIONS = VerifyOptions(threads=1, quick=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A GGUF file whose digits are split first, and its deployment."""
    root = tmp_path_factory.mktemp("gguf")
    model = write_gguf(root / "tiny.gguf", tiny_models.llama(), "llama", pre="smollm")
    export_base(model, root / "deployment")
    return model, root / "deployment"


def failures(model, folder, options=OPTIONS):
    return {check.name for check in verify(folder, str(model), {}, options).checks if not check.passed}


def test_clean_base_passes(base):
    model, folder = base
    checks = {check.name: check.passed for check in verify(folder, str(model), {}, OPTIONS).checks}
    assert checks["base/tokenizer"]
    assert checks["base/gguf-tokens"]
    assert all(checks.values())


def test_wrong_pretokenizer(base, tmp_path):
    """As older kits exported it: the file's word is dropped, and GPT-2's expression is taken."""
    model, _ = base
    wrong = load_tokenizer(model)
    pretokenizer.apply_pretokenizer(wrong, pretokenizer.PRE_TOKENIZERS["gpt-2"])
    export_base(model, tmp_path / "deployment", tokenizer=wrong)
    assert failures(model, tmp_path / "deployment") == {"base/tokenizer", "base/gguf-tokens"}


def test_wrong_table(base, tmp_path, monkeypatch):
    """The table itself is wrong: the model's tokenizer is as wrong as the deployment's, and the reference is not."""
    model, _ = base
    monkeypatch.setitem(pretokenizer.PRE_TOKENIZERS, "smollm", pretokenizer.PRE_TOKENIZERS["gpt-2"])
    export_base(model, tmp_path / "deployment")
    assert failures(model, tmp_path / "deployment") == {"base/gguf-tokens"}


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": {"blk.0.ffn_norm.lora_a": np.ones((4, 48), np.float32)}},
        {"metadata": {"llama.logit_scale": 0.5}},
        {"metadata": {"tokenizer.ggml.remove_extra_whitespaces": True}},
        {"metadata": {"llama.somebodys_setting": 3}},
    ],
    ids=["tensor", "key", "tokenizer", "unknown"],
)
def test_dropped_parts_are_refused(base, tmp_path, changes):
    """The same weights and vocabulary, and something beside them that the deployment has not."""
    _, folder = base
    planted = write_gguf(tmp_path / "tiny.gguf", tiny_models.llama(), "llama", pre="smollm", **changes)
    with pytest.raises(ModelError, match="would be dropped"):
        verify(folder, str(planted), {}, OPTIONS)


def test_assumed_pretokenizer_is_verified(base, tmp_path):
    planted = write_gguf(tmp_path / "tiny.gguf", tiny_models.llama(), "llama", pre="default")
    assert not failures(planted, base[1], replace(OPTIONS, assume_pretokenizer="starcoder"))
    assert "base/tokenizer" in failures(planted, base[1], replace(OPTIONS, assume_pretokenizer="gpt-2"))


@pytest.fixture
def adapters(base, tmp_path):
    """Folders of one adapter: of the deployment's tokenizer, of another, and of an older kit."""
    adapter = seeded_adapter(base[0], seed=1)
    digests = {"own": read_manifest(base[1]).base.tokenizer_digest, "other": "sha256:" + "ab" * 32, "older": ""}
    return {
        name: write_adapter(
            tmp_path / name,
            make_adapter(msgspec.structs.replace(adapter.config, tokenizer_digest=digest), adapter.weights),
        )
        for name, digest in digests.items()
    }


@pytest.mark.parametrize("manifest", ["new", "older"])
def test_adapters_of_another_tokenizer(base, tmp_path, adapters, manifest):
    folder = shutil.copytree(base[1], tmp_path / "deployment")
    if manifest == "older":  # it has no digest, and the tokenizer's file is read
        reseal(folder, base=msgspec.structs.replace(read_manifest(folder).base, tokenizer_digest=""))
    with Deployment.open(folder) as deployment:
        with pytest.raises(
            ContractError, match=r"other was trained with another tokenizer .* than tiny of this deploy"
        ):
            deployment.add_task(adapters["other"])
        assert [deployment.add_task(adapters[name]) for name in ("own", "older")] == ["own", "older"]
    with pytest.raises(ContractError, match=r"other was trained with another tokenizer .* than tiny of deployment"):
        export_adapter(adapters["other"], folder)
    for name in ("own", "older"):
        export_adapter(adapters[name], folder)
    if manifest == "older":
        return
    report = verify(folder, str(base[0]), {"own": adapters["other"]}, OPTIONS)
    assert "adapter/own/contract" in {check.name for check in report.checks if not check.passed}
