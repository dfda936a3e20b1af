"""The committed runs of the studies: whole, and what the committed summaries were made of."""

from __future__ import annotations

import gzip
import json

import msgspec
import pytest
from helpers.paths import REPOSITORY

from studies.experiment.run_settings import Run
from studies.experiment.settings import read_study
from studies.plan import Cell
from studies.report.summary import summarize
from studies.run_store import TABLE, decode_table, encode_table, read_runs

RESULTS = REPOSITORY / "studies" / "results"
COUNTS = {"decoder": 321, "encoder": 590, "one-rate": 36}


@pytest.mark.parametrize("study", COUNTS)
def test_committed_tables_are_whole(study):
    packed = (RESULTS / study / TABLE).read_bytes()
    runs = decode_table(packed)
    assert len(runs) == COUNTS[study]
    assert gzip.decompress(encode_table(runs)) == gzip.decompress(packed)
    summary = json.loads((RESULTS / study / "summary.json").read_text())
    assert summary["runs"] == {"finished": len(runs), "open": 0}


def _cells(study, summary, runs):
    """The cells of a committed study by the names of its runs, without its bases and data sets."""
    settings = {name: msgspec.convert(content["run"], Run) for name, content in runs.items()}
    bases, data, methods = ({entry.name: entry for entry in entries} for entries in
                            (study.bases, study.data, study.methods))  # fmt: skip
    cells = []
    for cell in summary["cells"]:
        finals = [settings[name] for name in cell["runs"]]
        choose = [
            run
            for run in settings.values()
            if run.purpose == "choose"
            and all(getattr(run, name) == getattr(finals[0], name) for name in ("base", "data", "method", "size"))
        ]
        entry = data[cell["data"]]
        finals = [msgspec.structs.replace(run, lr=0.0) for run in finals]
        cells.append(Cell(bases[cell["base"]], entry, study.parts(entry), methods[cell["method"]], finals[0].size,
                          tuple(choose), tuple(finals)))  # fmt: skip
    return cells


def _summary_again(study, runs):
    """A committed summary, and what its study and these runs give."""
    committed = json.loads((RESULTS / study / "summary.json").read_text())
    declared = read_study(RESULTS.parent / "files" / f"{study}.toml")
    return committed, json.loads(json.dumps(summarize(declared, _cells(declared, committed, runs), runs)))


@pytest.mark.parametrize("study", COUNTS)
def test_committed_summaries_are_those_of_the_tables(study):
    committed, again = _summary_again(study, read_runs(RESULTS / study))
    assert again == committed


@pytest.mark.parametrize("change", [{"accuracy": 0.123}, {"train_seconds": 1e6}, {"diverged": True}])
def test_a_changed_run_changes_the_summary(change):
    runs = read_runs(RESULTS / "one-rate")
    next(content for name, content in runs.items() if name.startswith("final"))["result"] |= change
    committed, again = _summary_again("one-rate", runs)
    assert again != committed


def test_committed_results_hold_no_runs_as_files():
    """Hundreds of files hide the few that people read: pack them before they are committed."""
    assert not list(RESULTS.glob("*/runs/*"))
