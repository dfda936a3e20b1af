"""`adalink inspect` on deployments, task graphs, base graphs and models."""

import json

import msgspec
import pytest
from click.testing import CliRunner
from helpers.runtime import reseal
from helpers.tiny_deployments import make_deployment, make_model_folder

from adalink.runtime.storage.generation_schema import GenerationDefaults
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main
from adalink.training.models.loading import base_fingerprint, load_base


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
    path = copied / "base/embeddings.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    result = run(copied)
    assert result.exit_code == 2
    assert "embeddings.safetensors has digest" in result.stderr
