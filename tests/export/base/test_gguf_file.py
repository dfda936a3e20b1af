"""A GGUF file as a variant for llama.cpp: linked or copied, its types, beside other variants, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_models
from helpers.gguf_codes import kind_of
from helpers.tiny_ggufs import wide, write_gguf

from adalink.export.base.export import export_base
from adalink.export.base.gguf_file import describe
from adalink.runtime import Deployment
from adalink.runtime.errors import ConfigError, ContractError
from adalink.runtime.storage.manifest_io import read_manifest

TARGET = "llama.cpp"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("file") / "tiny.gguf", wide("llama"), "llama", kind=kind_of)


def test_the_file_is_linked_or_copied(file: Path, tmp_path: Path) -> None:
    file.chmod(0o600)
    for folder, options in ((tmp_path / "linked", {}), (tmp_path / "copied", {"copy": True})):
        manifest = export_base(file, folder, target=TARGET, **options)
        variant = manifest.variants[TARGET]
        path = folder / variant.graph
        assert path.samefile(file) == (not options)
        assert path.read_bytes() == file.read_bytes()
        assert variant.weights_digest == ""
        assert variant.backends == (TARGET,)
    assert file.stat().st_mode & 0o777 == 0o600, "the user's file keeps its mode"


def test_types_are_recorded(file: Path, tmp_path: Path) -> None:
    quantization = describe(file)
    assert quantization is not None
    assert {kind.type: kind.bits for kind in quantization.gguf} == {"Q4_0": 4, "Q5_0": 5, "Q6_K": 6, "Q8_0": 8}
    assert (quantization.bits, quantization.sensitive_bits, quantization.activation_bits) == (4, 8, 8)
    plain = write_gguf(tmp_path / "plain.gguf", wide("llama"), "llama")
    assert describe(plain) is None


def test_variants_share_a_table(file: Path, tmp_path: Path) -> None:
    """Another file with the same embeddings stands beside it, with weights of its own; one with others does not."""
    folder = tmp_path / "deployment"
    export_base(file, folder, quantization="gguf")
    export_base(file, folder, target=TARGET)
    assert read_manifest(folder).variants[TARGET].weights_digest == ""
    coarser = write_gguf(
        tmp_path / "coarser.gguf",
        wide("llama"),
        "llama",
        kind=lambda name: kind_of(name) if "token_embd" in name else "Q4_0",
    )
    changed = export_base(coarser, folder, target=TARGET, replace=True)
    assert changed.variants[TARGET].weights_digest.startswith("sha256:")
    with Deployment.open(folder, TARGET, threads=1) as opened, Deployment.open(folder, threads=1) as other:
        logits = [one.run(input_ids=[[5, 9, 7]])["logits"] for one in (opened, other)]
    assert not np.array_equal(*logits)
    other_table = write_gguf(tmp_path / "other.gguf", wide("llama"), "llama")
    with pytest.raises(ContractError, match="with fingerprint"):
        export_base(other_table, folder, target=TARGET, replace=True)


def test_refusals_say_why(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"takes a GGUF file, and .* is none"):
        export_base(tiny_models.llama(), tmp_path / "a", target=TARGET)
    t5 = write_gguf(tmp_path / "t5.gguf", tiny_models.t5(), "t5")
    with pytest.raises(ConfigError, match="it is an encoder-decoder"):
        export_base(t5, tmp_path / "b", target=TARGET)
    with pytest.raises(ConfigError, match="runs a GGUF file as it is"):
        export_base(file, tmp_path / "c", target=TARGET, quantization="int4")
