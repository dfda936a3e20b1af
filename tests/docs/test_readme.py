"""README does what it says: its quick starts run as they stand, and its tables name what there is."""

from __future__ import annotations

import json
import re
import shlex

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.export import ALL_ENCODERS
from helpers.paths import REPOSITORY
from helpers.tiny_deployments import make_model_folder, seeded_adapter, write_adapter
from helpers.tiny_tokenizer import make_tokenizer

from adalink.export.adapter.export import export_adapter
from adalink.export.architectures import ARCHITECTURES
from adalink.export.base.export import export_base
from adalink.runtime.deployment import Deployment
from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.storage.manifest_io import read_manifest
from adalink.tools.cli import main
from adalink.tools.parity.suite import VerifyOptions, verify
from adalink.training.models.vision import SUPPORTED

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MAX_LINES = 140
# How README calls the types of the registry that it does not call by their own names.
NAMES = {
    **{"bert": "BERT", "distilbert": "DistilBERT", "roberta": "RoBERTa", "xlm-roberta": "XLM-R", "gpt2": "GPT-2"},
    **{"phi3": "Phi-3", "gemma3_text": "Gemma 3 (text)", "qwen2_vl_text": "Qwen2-VL", "qwen2_5_vl_text": "Qwen2.5-VL"},
    **{"Llava": "LLaVA", "FastVlm": "FastVLM", "SmolVLM": "SmolVLM", "PaliGemma": "PaliGemma"},
    **{"Qwen2VL": "Qwen2-VL", "Qwen2_5_VL": "Qwen2.5-VL", "Qwen3VL": "Qwen3-VL"},
}
LABELS = {"oil prices rose.": " oil", "corn fell.": " grain"}


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the quick starts name: MODEL, train.jsonl and eval.jsonl."""
    make_model_folder(tmp_path / "MODEL", "llama")
    rows = [{"prompt": f"Text: {text} Topic:", "completion": label} for text, label in LABELS.items()]
    for name, repeats in (("train", 8), ("eval", 1)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * repeats))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check_trained_task(folder):
    """The quick start trained an adapter that answers in the deployment, and that its base does not need."""
    report = json.loads((folder / "topics/training.json").read_text())
    losses = [entry["loss"] for entry in report["loss_curve"]]
    assert losses[-1] < losses[0] / 2
    task = read_manifest(folder / "deployment").tasks["topics"]
    assert task.rank == 16
    assert task.adapter_digest == read_adapter(folder / "topics").digest


def test_readme_has_at_most_120_lines():
    assert README.count("\n") <= MAX_LINES


def test_python_quick_start_trains_exports_and_runs(workplace, capsys):
    (block,) = blocks(section("Quick start"), "python")
    names = {}
    exec(compile(block, "README.md", "exec"), names)  # the very text of README, in a folder that has what it names
    check_trained_task(workplace)
    adapted, base = (row.text for row in names["rows"])
    assert adapted == LABELS["oil prices rose."]
    assert base != adapted
    assert capsys.readouterr().out.endswith(f"{[adapted, base]}\n")


def test_command_line_quick_start_trains_exports_and_runs(workplace):
    (block,) = blocks(section("Quick start"), "")
    lines = block.splitlines()
    assert len(lines) == 4
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "adalink"
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    check_trained_task(workplace)
    assert result.stdout == f"{LABELS['oil prices rose.']}\n"


def test_make_targets_of_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_links_of_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", README):
        if not target.startswith("https://"):
            assert (REPOSITORY / target).exists(), target


def missing_types(table):
    """Supported model types, text and vision, that a table does not name."""
    vision = [name.removesuffix("ForConditionalGeneration") for name in re.split(r", | and ", SUPPORTED)]
    names = {NAMES.get(kind, kind) for kind in (*ARCHITECTURES, *vision)}
    return {name for name in names if not re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", table, re.IGNORECASE)}


def test_models_table_names_every_supported_type():
    table = section("Models").split("**Status.**")[0]
    assert missing_types(table) == set()
    assert missing_types(table.replace("RoBERTa, ", "").replace("Qwen2-VL, ", "")) == {"RoBERTa", "Qwen2-VL"}


@pytest.mark.parametrize("name", sorted(ALL_ENCODERS))
def test_encoder_of_the_table_with_a_task_passes_verify(name, tmp_path):
    model = tmp_path / name
    ALL_ENCODERS[name]().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    export_base(model, tmp_path / "deployment")
    export_adapter(write_adapter(tmp_path / "task", seeded_adapter(model, 3)), tmp_path / "deployment")
    report = verify(tmp_path / "deployment", str(model), {}, VerifyOptions(threads=1, quick=True))
    assert [check.name for check in report.checks if not check.passed] == []
    assert any(check.name == "control/task/last_hidden_state" for check in report.checks)
    with Deployment.open(tmp_path / "deployment") as deployment:
        states = [deployment.run(input_ids=[[5, 9, 7]], tasks=task)["last_hidden_state"] for task in (None, "task")]
    assert np.abs(states[0] - states[1]).max() > 0.1
