"""`adalink inspect` and `adalink export engine` on engines that were really built."""

import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from helpers.engines import RTX
from helpers.export import MODELS

from adalink.export.base.export import export_base
from adalink.runtime.device.gpus import find_gpus
from adalink.runtime.storage.digest import digest_file
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main

ENGINE = ("--backend", RTX, "--target", "sm86,sm89", "--profile", "batch=1:1:2,seq=1:8:32,past=0:16:31")


def adalink(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A deployment with an engine, and what the command said of it."""
    folder = tmp_path_factory.mktemp("inspect-plan") / "deployment"
    export_base(MODELS["llama"](), folder, target="portable")
    made = adalink("export", "engine", folder, *ENGINE, "--json")
    assert made.exit_code == 0, made.output
    return folder, made


@pytest.fixture
def folder(built, tmp_path):
    return shutil.copytree(built[0], tmp_path / "deployment")


def test_the_command_says_what_it_built(built):
    folder, made = built
    result, manifest = json.loads(made.stdout), read_manifest(folder)
    assert result["plan_sha256"] == digest_file(folder / result["plan"])
    assert (result["variant"], result["target"]) == ("tensorrt-rtx", ["sm86", "sm89"])
    assert result["profile"] == "batch=1:1:2,seq=1:8:32,past=0:16:31"
    assert result["size_bytes"] == manifest.size_bytes(manifest.variants["tensorrt-rtx"].files)
    lines = made.stderr.splitlines()
    assert lines[0] == "reading the portable graph"
    assert lines.count("building engine.plan") == 1


def test_a_mistake_ends_with_its_message_and_code_2(folder):
    again = adalink("export", "engine", folder, *ENGINE)
    assert again.exit_code == 2
    assert "--replace" in again.stderr
    assert "Traceback" not in again.stderr
    wrong = adalink("export", "engine", folder, "--backend", "tensorrt-rtx", "--target", "sm90", "--replace")
    assert wrong.exit_code == 2
    assert "expected any of sm75" in wrong.stderr


def test_engines_are_built_without_pytorch(folder):
    """A machine that builds its own engine of a deployment made elsewhere needs onnx and the library alone."""
    code = (
        "import json, sys\nfrom adalink.export.engine.export import export_engine\n"
        f"export_engine({str(folder)!r}, 'tensorrt-rtx', target=('sm86',), replace=True)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "onnx" in loaded
    assert not loaded & {"torch", "transformers", "onnxruntime", "optimum"}


def test_an_engine_of_a_deployment_is_explained(folder):
    found = json.loads(adalink("inspect", folder, "--json").stdout)["variants"]["tensorrt-rtx"]["engine"]
    assert (found["backend"], found["target"], found["cache"]) == ("tensorrt-rtx", ["sm86", "sm89"], "in-place")
    assert found["built_from_what_is_there"] is True
    export_base(MODELS["llama"](), folder, target="portable", replace=True)
    moved = json.loads(adalink("inspect", folder, "--json").stdout)["variants"]["tensorrt-rtx"]["engine"]
    assert moved["built_from_what_is_there"] is True, "the same graph in another folder is the same graph"


def test_a_changed_base_shows(folder):
    record = folder / read_manifest(folder).variants["tensorrt-rtx"].graph.replace(".plan", ".json")
    content = json.loads(record.read_text())
    content["weights_sha256"] = "sha256:" + "0" * 64
    record.write_text(json.dumps(content))
    from helpers.runtime import reseal

    reseal(folder)
    found = json.loads(adalink("inspect", folder, "--json").stdout)["variants"]["tensorrt-rtx"]["engine"]
    assert found["built_from_what_is_there"] is False


@pytest.mark.skipif(bool(find_gpus().devices), reason="there is a GPU")
def test_plans_are_explained_without_a_gpu(folder):
    engine = folder / "engines/tensorrt-rtx"
    found = json.loads(adalink("inspect", engine / "engine.plan", "--json").stdout)
    assert (found["kind"], found["role"], found["sha256"]) == ("plan", "base", digest_file(engine / "engine.plan"))
    assert found["record"]["profile"] == "batch=1:1:2,seq=1:8:32,past=0:16:31"
    assert found["header"].startswith("well-formed for tensorrt-rtx")
    assert found["contents"].startswith("not loaded: that takes a GPU")
    embedder = json.loads(adalink("inspect", engine / "front-gelu_tanh-embeds.plan", "--json").stdout)
    assert embedder["role"] == "front gelu_tanh.embeds"
    assert "sm86" in adalink("inspect", engine / "engine.plan").stdout


def test_an_altered_plan_is_not_loaded_and_its_header_shows(folder):
    plan = folder / "engines/tensorrt-rtx/engine.plan"
    data = plan.read_bytes()
    plan.write_bytes(b"\0" * 64 + data[64:])
    found = json.loads(adalink("inspect", plan, "--json").stdout)
    assert "malformed engine" in found["header"]
    assert found["contents"].startswith("not loaded: a plan is code")
    assert adalink("inspect", folder).exit_code == 2


def test_a_plan_alone_is_not_loaded(folder, tmp_path):
    alone = tmp_path / "lost.plan"
    shutil.copy(folder / "engines/tensorrt-rtx/engine.plan", alone)
    found = json.loads(adalink("inspect", alone, "--json").stdout)
    assert found["role"] == "unknown"
    assert "no engine.json" in found["record"]
    assert found["contents"].startswith("not loaded: a plan is code")
    missing = adalink("inspect", tmp_path / "none.plan")
    assert missing.exit_code == 2
    assert "no such file" in missing.stderr
