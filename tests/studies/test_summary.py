"""Summary, tables and page of made-up runs, against figures worked out by hand."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace

import msgspec
import pytest
from helpers.paths import REPOSITORY
from helpers.studies import made_result

from adalink.runtime.errors import WriteError
from studies.experiment.settings import Study, read_study
from studies.report.page import write_pages
from studies.report.plots import draw
from studies.report.statistics import DRAWS, EXACT_PAIRS
from studies.report.summary import summarize
from studies.report.table import accuracy_rows, comparison_rows, not_compared_line, overall_rows


def test_figures_by_hand(made):
    summary = summarize(*made)
    json.dumps(summary, allow_nan=False)
    cells = {(cell["data"], cell["method"]): cell for cell in summary["cells"]}
    ours = cells["letters", "AdaLink 8"]
    assert ours["accuracy"] == pytest.approx({"mean": 0.85, "deviation": 0.05 * 2**0.5})
    assert (ours["lr"], ours["lr_at_edge"], ours["train_seconds"]) == (1e-2, True, 15.0)
    assert ours["parameter_share"] == pytest.approx(0.0768)
    assert cells["digits", "LoRA 2"]["accuracy"] == {"mean": 0.6, "deviation": None}
    assert not cells["letters", "LoRA 2"]["lr_at_edge"]
    assert summary["runs"] == {"finished": 17, "open": 1}
    both = {(pair["data"], pair["method"], pair["against"]): pair for pair in summary["comparisons"]}
    pairs = {(data, method): pair for (data, method, against), pair in both.items() if against == "LoRA 2"}
    assert set(pairs) == {(data, f"AdaLink {rank}") for data in ("letters", "digits") for rank in (8, 16)}
    assert both.keys() - {(*place, "LoRA 2") for place in pairs} == {
        (data, "AdaLink 16", "AdaLink 8") for data in ("letters", "digits")
    }
    assert both["letters", "AdaLink 16", "AdaLink 8"]["differences"] == pytest.approx([0.05, 0.01])
    pair = pairs["letters", "AdaLink 8"]
    assert pair["differences"] == pytest.approx([-0.10, -0.02])
    # mean -0.06, deviation 0.08 / sqrt(2), n = 2: -0.06 ± 12.706 * 0.04
    assert pair["interval"] == pytest.approx([-0.06 - 0.508248, -0.06 + 0.508248], abs=1e-5)
    assert pair["ratio"] == pytest.approx(0.85 / 0.91)
    lone = pairs["digits", "AdaLink 8"]  # LoRA has no seed 2 there: only seed 1 is paired
    assert lone["seeds"] == ["1"]
    assert lone["interval"] is None
    overall = {(pair["method"], pair["against"]): pair for pair in summary["overall"]}
    assert overall["AdaLink 8", "LoRA 2"]["pairs"] == 3
    assert overall["AdaLink 8", "LoRA 2"]["mean"] == pytest.approx(-0.22 / 3)
    assert overall["AdaLink 8", "LoRA 2"]["p_value"] == 2 / 8
    own = overall["AdaLink 16", "AdaLink 8"]  # 5, 1, 5 and 3 points
    assert (own["pairs"], own["mean"], own["p_value"]) == (4, pytest.approx(0.035), 2 / 16)
    assert len(overall) == 3
    assert summary["not_compared"] == []


def test_a_method_of_its_own_to_compare_with_may_be_missing_too(made):
    study, cells, finished = made
    some = [cell for cell in cells if (cell.data.name, cell.method.name) != ("digits", "AdaLink 8")]
    summary = summarize(study, some, finished)
    assert summary["not_compared"] == [{"base": "tiny", "data": "digits", "size": "all", "against": "AdaLink 8"}]
    assert not_compared_line(summary) == (
        "Nothing is paired with AdaLink 8 on digits (tiny, rows: all): the study does not run it there."
    )


@pytest.mark.parametrize(("best", "at_edge"), [(1e-3, True), (1e-2, False), (1e-1, True)])
def test_a_rate_at_either_end_of_those_tried_is_told(made, best, at_edge):
    study, cells, finished = made
    method = msgspec.structs.replace(cells[0].method, lr=(1e-2, 1e-1, 1e-3))
    choose = tuple(msgspec.structs.replace(cells[0].choose[0], lr=lr) for lr in method.lr)
    finished |= {run.file_name: made_result(run, 0.9 if run.lr == best else 0.2, method.name) for run in choose}
    (group,) = summarize(study, [replace(cells[0], method=method, choose=choose)], finished)["cells"]
    assert (group["lr"], group["lr_at_edge"]) == (best, at_edge)


def test_tables(made):
    summary = summarize(*made)
    rows = {row[1] + row[3]: row for row in accuracy_rows(summary)[1]}
    assert rows["lettersAdaLink 8"][4:] == (
        "768 (7.68 %)",
        "0.01 (end of the list)",
        "85.0 ± 7.1",
        "2 of 2",
        "15",
    )
    full = dict(summary["cells"][0], trained_parameters=10_000, parameter_share=1.0)
    assert accuracy_rows({"cells": [full]})[1][0][4] == "10,000 (100 %)"
    assert rows["digitsLoRA 2"][6:8] == ("60.0", "1 of 2")
    assert rows["digitsnone"][5:7] == ("-", "12.5")
    pairs = {row[1] + row[3] + row[4]: row for row in comparison_rows(summary)[1]}
    assert pairs["lettersAdaLink 8LoRA 2"][5:] == ("-6.0", "-56.8 to +44.8", "0.934")
    assert pairs["digitsAdaLink 8LoRA 2"][5:7] == ("-10.0", "-")
    assert pairs["lettersAdaLink 16AdaLink 8"][5:] == ("+3.0", "-22.4 to +28.4", "1.035")
    assert ("tiny", "all", "AdaLink 8", "LoRA 2", "3", "-7.3", "0.250") in overall_rows(summary)[1]
    assert ("tiny", "all", "AdaLink 16", "AdaLink 8", "4", "+3.5", "0.125") in overall_rows(summary)[1]
    sure = dict(summary["overall"][0], p_value=2 / 4096)
    assert overall_rows({"overall": [sure]})[1][0][-1] == "0.0005"
    columns, unmeasured = accuracy_rows(summarize(made[0], made[1], {}))
    assert all(len(row) == len(columns) for row in unmeasured)
    assert {row[6] for row in unmeasured} == {"not measured"}


def test_the_page_holds_all_it_shows(made, tmp_path):
    summary = summarize(*made)
    plots = draw(summary, tmp_path / "plots")
    write_pages(tmp_path, summary, plots)
    page = (tmp_path / "study.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(image) for image in images] == [plot.read_bytes() for plot in plots.values()]
    assert all(f"<h2>{title}</h2>" in page for title in plots)
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)", page)
    assert "&lt;b&gt;made up&lt;/b&gt;" in page
    assert "85.0 ± 7.1" in page
    assert "1 are open" in page
    assert str(tmp_path) not in page


def test_the_markdown_has_the_same_tables(made, tmp_path):
    summary = summarize(*made)
    write_pages(tmp_path, summary, draw(summary, tmp_path / "plots"))
    text = (tmp_path / "study.md").read_text()
    for columns, rows in (accuracy_rows(summary), comparison_rows(summary), overall_rows(summary)):
        table = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        assert "\n".join(table + ["| " + " | ".join(row) + " |" for row in rows]) + "\n" in text
    assert "## One for all" not in text  # this study combines nothing
    for plot in re.findall(r"\]\((plots/[^)]+)\)", text):
        assert (tmp_path / plot).is_file()
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", ["reduced", "encoder", "few-rows", "decoder", "one-rate"])
def test_committed_results_are_of_the_committed_study(name):
    studies = REPOSITORY / "studies"
    summary = json.loads((studies / "results" / name / "summary.json").read_text())
    declared = read_study(studies / "files" / f"{name}.toml")
    for shown, base in zip(summary["study"]["bases"], declared.bases, strict=True):
        shown["model"] = base.model  # a place, which a summary leaves out
    assert msgspec.convert(summary["study"], Study) == declared
    assert summary["runs"]["open"] == 0
    assert not any(cell["lr_at_edge"] for cell in summary["cells"])
    text = (studies / "results" / name / "study.md").read_text()
    for row in accuracy_rows(summary)[1]:
        assert "| " + " | ".join(row) + " |" in text


def test_a_folder_that_cannot_be_written_is_told(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="choose a writable --out"):
        draw(summarize(*made), tmp_path / "file" / "plots")
    with pytest.raises(WriteError, match="choose a writable --out"):
        write_pages(tmp_path / "file", summarize(*made), {})


def test_what_the_p_value_is_is_said(made, tmp_path):
    summary = summarize(*made)
    said = (
        f"sign-flip test of all pairs of data set and seed, exact up to {EXACT_PAIRS} pairs, above by {DRAWS:,} random"
    )
    assert said in summary["paired"]
    root = REPOSITORY
    page = (root / "docs" / "project" / "studies.md").read_text()
    assert f"exact up to {EXACT_PAIRS} pairs, above by {DRAWS:,} random" in page
    for folder in (root / "studies" / "results").iterdir():
        committed = json.loads((folder / "summary.json").read_text())
        for field in ("paired", "scoring"):
            assert committed[field] == summary[field]
            assert summary[field] in (folder / "study.md").read_text()
