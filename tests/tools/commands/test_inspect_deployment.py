"""`adalink inspect` on deployments, task graphs, base graphs and models."""

import json
from itertools import pairwise

import msgspec
import pytest
from click.testing import CliRunner
from helpers.runtime import reseal
from helpers.tiny_deployments import make_deployment, make_model_folder
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_pair_tokenizer

from adalink.export.base.export import export_base
from adalink.runtime.storage.generation_schema import GenerationDefaults
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main
from adalink.training.adapter_io import digest_tokenizer
from adalink.training.models.loading import base_fingerprint, load_base, load_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_deployment(tmp_path_factory.mktemp("inspect"), "llama", {"alpha": {"seed": 1, "activation": "silu"}})


def run(target, *options):
    return CliRunner().invoke(main, ["inspect", str(target), *options])


def test_deployment(place):
    model, folder = place
    found = json.loads(run(folder, "--json").stdout)
    manifest = read_manifest(folder)
    assert found["kind"] == "deployment"
    assert found["base"]["fingerprint"] == base_fingerprint(load_base(model))
    assert found["tasks"]["alpha"]["activation"] == "silu"
    assert found["tasks"]["alpha"]["adapter_digest"] == manifest.tasks["alpha"].adapter_digest
    assert found["size_bytes"] == sum(
        path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name in _names(manifest)
    )
    assert "alpha" in run(folder).stdout


def test_generation_defaults(place):
    _, folder = place
    base = read_manifest(folder).base
    defaults = GenerationDefaults(repetition_penalty=1.2, suppress_tokens=(3,), not_applied=("num_beams=4",))
    reseal(folder, base=msgspec.structs.replace(base, generation=defaults))
    found = json.loads(run(folder, "--json").stdout)["base"]
    assert found["generation_defaults"] == {"repetition_penalty": 1.2, "suppress_tokens": [3]}
    assert found["generation_not_applied"] == ["num_beams=4"]
    shown = run(folder).stdout
    assert "generation_not_applied" in shown
    assert "num_beams=4" in shown
    reseal(folder, base=msgspec.structs.replace(base, generation=None))
    assert "generation_defaults" not in json.loads(run(folder, "--json").stdout)["base"]
    reseal(folder, base=base)


def test_tokens_and_their_types(place, tmp_path):
    """Those of a base of an older kit: the digest from its file, and no word of types."""
    model, folder = place
    base, digest = read_manifest(folder).base, digest_tokenizer(load_tokenizer(model))
    for changes, types in (({}, 1), (OLDER, None)):
        reseal(folder, base=msgspec.structs.replace(base, **changes))
        found = json.loads(run(folder, "--json").stdout)["base"]
        assert (found["tokenizer_digest"], found["token_types"]) == (digest, types)
        words = run(folder).stdout.split()
        shown = dict(pairwise(words))
        assert shown["token_types"] == ("none" if types is None else str(types))
        assert shown["tokenizer_digest"] == digest
    reseal(folder, base=base)
    export_base(FAMILIES["bert"](), tmp_path / "pairs", tokenizer=make_pair_tokenizer())
    found = json.loads(run(tmp_path / "pairs", "--json").stdout)["base"]
    assert (found["token_types"], found["tokenizer_types"]) == (2, True)


OLDER = {"token_types": None, "tokenizer_types": False, "tokenizer_digest": ""}


def _names(manifest):
    return {path.rpartition("/")[2] for path in manifest.files}


def test_graphs_have_their_roles(place):
    _, folder = place
    manifest = read_manifest(folder)
    task = json.loads(run(folder / manifest.tasks["alpha"].graph, "--json").stdout)
    assert task["role"] == "task graph"
    assert task["metadata"]["adapter_digest"] == manifest.tasks["alpha"].adapter_digest
    (variant,) = manifest.variants.values()
    base = json.loads(run(folder / variant.graph, "--json").stdout)
    assert base["role"] == "base graph"
    assert base["external_data"] is True
    assert "logits" in base["outputs"]


def test_model(tmp_path):
    folder = make_model_folder(tmp_path / "tiny", "gpt2")
    found = json.loads(run(folder, "--json").stdout)
    assert (found["kind"], found["architecture"], found["class"]) == ("model", "gpt2", "GPT2LMHeadModel")
    assert found["fingerprint"] == base_fingerprint(load_base(folder))


def test_altered_deployment_exits_2(place, tmp_path):
    import shutil

    copied = shutil.copytree(place[1], tmp_path / "copy")
    path = copied / read_manifest(copied).base.embeddings
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    result = run(copied)
    assert result.exit_code == 2
    assert "model.onnx.data has digest" in result.stderr
