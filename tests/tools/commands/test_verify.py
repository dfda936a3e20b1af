"""`adalink verify` as a command, and every family of models through it."""

import errno
import json

import pytest
import torch
from click.testing import CliRunner
from helpers.quick import slow_except
from helpers.tiny_deployments import make_deployment, make_model_folder, seeded_adapter, write_adapter
from helpers.tiny_models import FAMILIES

from adalink.export.adapter.export import export_adapter
from adalink.export.base.export import export_base
from adalink.runtime.storage import atomic
from adalink.tools.cli import main
from adalink.tools.parity.suite import VerifyOptions, verify
from adalink.training.models.loading import load_base

TASKS = {"alpha": {"seed": 1}, "beta": {"seed": 2, "activation": "tanh", "scope": "prompt"}}


def run(*arguments):
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


# Of a text base with two tasks, from a folder whose generation config says nothing.
CHECKS = 52


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return make_deployment(tmp_path_factory.mktemp("mistral"), "mistral", TASKS)


def test_passes_with_a_report(mistral, tmp_path):
    model, folder = mistral
    path = tmp_path / "parity.json"
    result = run(folder, "--against", model, "--json-file", path, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert f"All {CHECKS} checks passed" in result.stdout
    report = json.loads(path.read_text())
    assert report["passed"] is True
    assert all(check.keys() == {"name", "passed", "measured", "limit", "detail"} for check in report["checks"])
    assert report["receipt"]["engine_builds_during_swaps"] == 0
    assert report["receipt"]["base_unchanged"] is True
    assert report["receipt"]["tour"] == ["base", "alpha", "beta", "alpha", "base"]
    assert report["environment"]["backend"] == "onnxruntime-cpu"
    assert str(model.parent) not in path.read_text()  # no path of this machine in a report


def test_failed_check_exits_1(mistral, tmp_path):
    model, folder = mistral
    other = write_adapter(tmp_path / "other", seeded_adapter(model, seed=77))
    path = tmp_path / "parity.json"
    result = run(folder, "--against", model, "--adapter", f"alpha={other}", "--quick", "--json-file", path)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout
    assert "checks failed: adapter/alpha/contract" in result.stdout
    assert json.loads(path.read_text())["passed"] is False


def test_report_without_a_folder_is_refused_before_the_work(mistral, tmp_path):
    model, folder = mistral
    (tmp_path / "taken").write_text("a file")
    result = run(folder, "--against", model, "--quick", "--json-file", tmp_path / "taken" / "parity.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "taken: choose a writable folder" in result.stderr


def test_report_that_cannot_be_written_exits_2(mistral, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "_flush", refuse)
    model, folder = mistral
    result = run(folder, "--against", model, "--quick", "--json-file", tmp_path / "parity.json")
    assert result.exit_code == 2
    assert f"All {CHECKS} checks passed" in result.stdout  # the work is not lost
    assert "choose a writable place with --json-file" in result.stderr


def test_wrong_use_exits_2(mistral, tmp_path):
    model, folder = mistral
    other = make_model_folder(tmp_path / "llama", "llama")
    finetuned = load_base(model)
    with torch.no_grad():
        finetuned.model.layers[0].self_attn.q_proj.weight[0, 0] += 1e-3
    finetuned.save_pretrained(tmp_path / "finetuned")
    for arguments, message in (
        ([folder, "--against", other], "verify it against the model it was made from"),
        ([folder, "--against", tmp_path / "finetuned"], "finetuned has weights_digest sha256:"),
        ([folder, "--against", tmp_path / "nowhere"], "no such file or folder"),
        ([tmp_path, "--against", model], "holds no manifest.json"),
        ([folder, "--against", model, "--adapter", "gamma=x"], "'gamma' is not deployed"),
        ([folder, "--against", model, "--adapter", "alpha"], "not NAME=FOLDER"),
        ([folder, "--against", model, "--backend", "abacus"], "'abacus'"),
        ([folder], "Missing option '-m' / '--against'"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr


@pytest.mark.parametrize("family", slow_except(sorted(FAMILIES), "llama", "gemma3", "t5"))
def test_every_family(family, tmp_path):
    model, folder = make_deployment(tmp_path / "root", family, TASKS)
    report = verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True))
    assert [check for check in report.checks if not check.passed] == []
    assert report.skipped == []
    kind = "encoder" if family == "bert" else "decoder"
    assert any(check.name.endswith("/decode-logits") for check in report.checks) == (kind != "encoder")


def test_float16_deployment(tmp_path):
    model = make_model_folder(tmp_path / "tiny", "llama")
    export_base(model, tmp_path / "deployment", dtype="float16")
    export_adapter(write_adapter(tmp_path / "alpha", seeded_adapter(model, 1)), tmp_path / "deployment")
    report = verify(tmp_path / "deployment", str(model), {}, VerifyOptions(threads=1, quick=True))
    assert [check for check in report.checks if not check.passed] == []


def test_deployment_without_tokenizer(tmp_path):
    """Measured on seeded ids; what is not measured is said."""
    model = tmp_path / "tiny"
    FAMILIES["llama"]().save_pretrained(model)
    export_base(model, tmp_path / "deployment")
    export_adapter(write_adapter(tmp_path / "alpha", seeded_adapter(model, 1)), tmp_path / "deployment")
    report = verify(tmp_path / "deployment", str(model), {}, VerifyOptions(threads=1))
    assert report.passed
    assert any("without a tokenizer" in line for line in report.skipped)
    assert not any("generation" in check.name for check in report.checks)


def test_deployment_without_tasks(tmp_path):
    model, folder = make_deployment(tmp_path / "root", "gpt2", {})
    report = verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True))
    assert report.passed
    assert report.receipt["tour"] == ["base"]


def test_reference_is_left_without_adapters(mistral):
    """A report must not depend on what was verified before in the same process."""
    model, folder = mistral
    first = verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True))
    torch.manual_seed(1)
    again = verify(folder, str(model), {}, VerifyOptions(threads=1, quick=True))
    assert [check.measured for check in first.checks] == [check.measured for check in again.checks]
