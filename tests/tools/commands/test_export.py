"""``adalink export`` and ``adalink remove`` from the shell's side: results, JSON, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from helpers.runtime import random_adapter, write_adapter
from helpers.tiny_models import FAMILIES
from helpers.tiny_tokenizer import make_tokenizer
from helpers.warm_python import WarmPython
from safetensors.numpy import save_file

from adalink.runtime.errors import ConfigError
from adalink.runtime.storage.integrity import verify_files
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main


def adalink(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    FAMILIES["llama"]().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["portable", "onnxruntime-cpu"])
def test_export_says_what_it_does_and_nothing_else(
    checkpoint: Path, tmp_path: Path, target: str, capfd: pytest.CaptureFixture[str]
) -> None:
    made = adalink("export", "base", checkpoint, "--out", tmp_path / "deployment", "--target", target)
    assert made.exit_code == 0, made.output
    assert "tracing model.onnx (float32)" in made.stderr.splitlines()
    assert capfd.readouterr() == ("", "")  # PyTorch's exporter writes past Python


def test_base_adapter_replace_and_remove(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "deployment"
    made = adalink("export", "base", checkpoint, "--out", out, "--target", "portable", "--json")
    assert made.exit_code == 0, made.output
    result = json.loads(made.stdout)
    base = read_manifest(out).base
    assert result["fingerprint"] == base.fingerprint
    assert (result["base"], result["target"], result["dtype"]) == ("tiny-llama", "portable", "float32")
    assert "loading tiny-llama" in made.stderr
    added = adalink("export", "base", checkpoint, "--out", out)
    assert added.exit_code == 0
    assert read_manifest(out).variants.keys() == {"portable", "onnxruntime-cpu"}
    assert f"fingerprint {base.fingerprint}" in added.stdout

    settings = {"rank": 4, "activation": "gelu", "bias": True, "scope": "prompt"}
    source = write_adapter(tmp_path / "topics", random_adapter(base.fingerprint, base.hidden_size, 1, **settings))
    task = adalink("export", "adapter", source, "--out", out, "--json")
    (described,) = json.loads(task.stdout)["tasks"]
    assert (described["task"], described["scope"]) == ("topics", "prompt")
    write_adapter(tmp_path / "topics v2.1", random_adapter(base.fingerprint, base.hidden_size, 2, **settings))
    unnamed = adalink("export", "adapter", tmp_path / "topics v2.1", "--out", out)
    assert unnamed.exit_code == 2
    assert "task name 'topics v2.1': expected 1 to 64 letters" in unnamed.stderr
    assert "name it with --name" in unnamed.stderr
    again = adalink("export", "adapter", source, "--out", out)
    assert again.exit_code == 2
    assert "--replace" in again.stderr
    assert adalink("export", "adapter", source, "--out", out, "--replace").stdout.startswith("task topics is in ")
    other = adalink("export", "adapter", source, "--out", out, "--name", "other", "--dtype", "fp16")
    assert other.exit_code == 2
    assert "float16 was asked for" in other.stderr

    removed = adalink("remove", out, "topics", "--json")
    assert json.loads(removed.stdout) == {"deployment": str(out), "removed": "topics", "tasks": []}
    missing = adalink("remove", out, "topics")
    assert missing.exit_code == 2
    assert "task 'topics' is not deployed here; deployed are: none" in missing.stderr


def test_a_form_of_the_base_can_be_removed_but_not_the_last(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "deployment"
    for target in ("portable", "onnxruntime-cpu"):
        assert adalink("export", "base", checkpoint, "--out", out, "--target", target).exit_code == 0
    base = read_manifest(out).base
    adapter = random_adapter(base.fingerprint, base.hidden_size, 1, rank=2, activation="gelu", bias=False, scope="all")
    assert adalink("export", "adapter", write_adapter(tmp_path / "topics", adapter), "--out", out).exit_code == 0
    kept = {path: path.read_bytes() for path in (out / "base/onnxruntime-cpu").iterdir()}

    removed = adalink("remove", out, "--variant", "portable", "--json")
    assert json.loads(removed.stdout)["variants"] == ["onnxruntime-cpu"]
    assert not (out / "base/portable").exists()
    assert {path: path.read_bytes() for path in (out / "base/onnxruntime-cpu").iterdir()} == kept
    assert list(read_manifest(out).tasks) == ["topics"]
    verify_files(out, read_manifest(out))

    for arguments, words in (
        (("--variant", "portable"), "'portable' is not in"),
        (("--variant", "onnxruntime-cpu"), "is the only one"),
        ((), "say what to remove"),
        (("topics", "--variant", "onnxruntime-cpu"), "say what to remove"),
    ):
        refused = adalink("remove", out, *arguments)
        assert refused.exit_code == 2
        assert words in refused.stderr


def test_an_adapter_of_peft_needs_somebody_who_knows_its_base(checkpoint: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "deployment", tmp_path / "prompt-tuned"
    assert adalink("export", "base", checkpoint, "--out", out).exit_code == 0
    source.mkdir()
    fields = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3, "base_model_name_or_path": "tiny-llama"}
    (source / "adapter_config.json").write_text(json.dumps(fields))
    prompt = np.random.default_rng(3).normal(size=(3, 48)).astype(np.float32)
    save_file({"prompt_embeddings": prompt}, source / "adapter_model.safetensors")
    refused = adalink("export", "adapter", source, "--out", out)
    assert refused.exit_code == 2
    assert "say so with --assume-base" in refused.stderr
    shown = adalink("export", "adapter", source, "--out", out, "--assume-base")
    assert shown.stdout.startswith(f"task prompt-tuned is in {out}: rank 0, identity, soft prompt of 3, scope all")
    made = adalink("export", "adapter", source, "--out", out, "--assume-base", "--replace", "--json")
    (described,) = json.loads(made.stdout)["tasks"]
    assert (described["rank"], described["soft_tokens"], described["input"]) == (0, 3, "embeddings")
    seen = json.loads(adalink("inspect", out, "--json").stdout)["tasks"]["prompt-tuned"]
    assert (seen["rank"], seen["soft_tokens"], seen["input"]) == (0, 3, "embeddings")
    own = json.loads(adalink("inspect", out / "tasks" / "prompt-tuned.2", "--json").stdout)
    assert (own["soft_tokens"], own["tensors"]) == (3, {"soft_prompt": [3, 48]})


def test_many_adapters_at_once_are_all_added_or_none(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "deployment"
    assert adalink("export", "base", checkpoint, "--out", out).exit_code == 0
    base = read_manifest(out).base
    settings = {"activation": "gelu", "bias": True, "scope": "all"}
    sources = [
        write_adapter(tmp_path / f"task-{seed}", random_adapter(base.fingerprint, 48, seed, rank=1 + seed, **settings))
        for seed in range(23)
    ]
    shown = adalink("export", "adapter", *sources[:3], "--out", out)
    assert shown.stdout.count(" is in ") == 3
    assert read_manifest(out).tasks["task-2"].rank == 3
    taken = adalink("export", "adapter", *sources, "--out", out)
    assert taken.exit_code == 2
    assert "already has a task 'task-0'" in taken.stderr
    assert len(read_manifest(out).tasks) == 3
    shown = adalink("export", "adapter", *sources, "--out", out, "--replace")
    assert "and 3 more; 23 tasks are in" in shown.stdout
    manifest = read_manifest(out)
    assert manifest.tasks["task-0"].graph == "tasks/task-0.2/adapter.onnx"
    verify_files(out, manifest)
    twice = adalink("export", "adapter", sources[0], tmp_path / "x" / ".." / "task-0", "--out", out)
    assert twice.exit_code == 2
    assert "would both be task 'task-0'" in twice.stderr
    named = adalink("export", "adapter", *sources[:2], "--out", out, "--name", "one")
    assert "one name for 2 adapters" in named.stderr


def test_fold_prints_what_it_takes_and_gains(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "deployment"
    assert adalink("export", "base", checkpoint, "--out", out).exit_code == 0
    base = read_manifest(out).base
    settings = {"rank": 4, "activation": "gelu", "bias": True, "scope": "all"}
    source = write_adapter(tmp_path / "topics", random_adapter(base.fingerprint, 48, 1, **settings))
    shown = adalink("export", "adapter", source, "--out", out, "--fold", "table")
    assert re.search(
        r"folded \(table\): 0\.02 MB beside \d kB of weights; one token takes [\d.]+ µs, through", shown.stdout
    )
    made = json.loads(
        adalink("export", "adapter", source, "--out", out, "--fold", "table", "--replace", "--json").stdout
    )
    assert made["tasks"][0]["fold"] == "table"
    assert made["fold_trade"]["fold_bytes"] == pytest.approx(96 * 48 * 4, abs=200)
    assert made["fold_trade"]["fold_us"] > 0
    assert json.loads(adalink("inspect", out, "--json").stdout)["tasks"]["topics"]["fold"] == "table"


def test_modalities_are_given_by_name(checkpoint: Path, tmp_path: Path) -> None:
    assert adalink("export", "base", checkpoint, "--out", tmp_path / "d", "--modality", "image").exit_code == 0
    assert read_manifest(tmp_path / "d").base.modalities == ("text", "image")


@pytest.mark.parametrize("verb", [("export",), ("export", "base"), ("export", "adapter"), ("remove",)])
def test_help_has_an_example(verb: tuple[str, ...]) -> None:
    shown = adalink(*verb, "--help")
    assert shown.exit_code == 0
    assert "Example:" in shown.stdout
    assert f"adalink {verb[0]}" in shown.stdout


def test_error_shows_its_message_alone_and_nothing_is_left(tmp_path: Path, warm_torch: WarmPython) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    model, out = str(tmp_path / "model"), str(tmp_path / "out")
    result = warm_torch.run([sys.executable, "-m", "adalink.tools", "export", "base", model, "--out", out])
    assert result.returncode == 2
    assert "pickled weights" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_export_of_a_base_says_nothing_but_its_own_progress(checkpoint: Path, tmp_path: Path) -> None:
    """The exporter's and the libraries' warnings and bars are not the user's business."""
    result = subprocess.run(
        [sys.executable, "-m", "adalink.tools", "export", "base", checkpoint, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    # Weights are counted after a second of writing them.
    lines = [line for line in result.stderr.splitlines() if not line.startswith("writing model.onnx: matrix")]
    assert [line.split()[0] for line in lines] == [
        "loading", "hashing", "writing", "tracing", "fusing", "the", "hashing", "next:"
    ]  # fmt: skip


def test_engine_gets_the_portable_graph_it_needs(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deployment"
    assert adalink("export", "base", checkpoint, "--out", out).exit_code == 0
    found: list[set[str]] = []

    def build(folder: Path, *_: object, **__: object) -> None:
        found.append(set(read_manifest(folder).variants))
        raise ConfigError("the engine itself is built in tests of its own")

    monkeypatch.setattr("adalink.runtime.trt.api.load_api", lambda backend: None)
    monkeypatch.setattr("adalink.export.engine.export.export_engine", build)
    words = ("export", "engine", out, "--backend", "tensorrt", "--model")
    late = adalink(*words, checkpoint, "--task", "gone")
    assert "task 'gone' is not deployed here" in late.stderr
    assert "tracing" not in late.stderr
    other = tmp_path / "other"
    FAMILIES["gpt2"]().save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    assert "variants share one base and dtype" in adalink(*words, other).stderr
    assert found == []
    assert "tracing model.onnx (float32)" in adalink(*words, checkpoint).stderr
    assert "tracing" not in adalink(*words, checkpoint).stderr
    assert found == [{"onnxruntime-cpu", "portable"}] * 2
