"""Summary, tables, plots and page of made-up runs, against figures worked out by hand."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from study_support import METHODS, study_text

from adalink.runtime.errors import WriteError
from adalink.tools.studies.page import write_pages
from adalink.tools.studies.plan import Cell
from adalink.tools.studies.plots import draw
from adalink.tools.studies.statistics import DRAWS, EXACT_PAIRS
from adalink.tools.studies.summary import summarize
from adalink.tools.studies.table import accuracy_rows, comparison_rows, not_compared_line, overall_rows
from adalink.training.study.perform import Run
from adalink.training.study.settings import Study, read_study

ACCURACY = {
    ("letters", "AdaLink 8"): {1: 0.80, 2: 0.90},
    ("letters", "AdaLink 16"): {1: 0.85, 2: 0.91},
    ("letters", "LoRA 2"): {1: 0.90, 2: 0.92},
    ("letters", "none"): {0: 0.25},
    ("digits", "AdaLink 8"): {1: 0.50, 2: 0.50},
    ("digits", "AdaLink 16"): {1: 0.55, 2: 0.53},
    ("digits", "LoRA 2"): {1: 0.60},
    ("digits", "none"): {0: 0.125},
}
MORE = """
[[methods]]
name = "AdaLink 16"
kind = "adalink"
rank = 16
activation = "gelu"
lr = [1e-2]
compare_to = "AdaLink 8"
"""
PARAMETERS = {"AdaLink 8": 768, "AdaLink 16": 1536, "LoRA 2": 400, "none": 0}


@pytest.fixture
def made():
    """A study of two data sets, its cells and its finished runs; LoRA's seed 2 on digits is not done."""
    text = study_text(Path("base"), Path("data"), METHODS + MORE, compare_to="LoRA 2", description="<b>made up</b>")
    second = '[[data]]\nname = "digits"\nfolder = "more"\n'
    study = msgspec.toml.decode(text + second, type=Study)
    cells, finished = [], {}
    for data in study.data:
        for method in study.methods:
            accuracy = ACCURACY[data.name, method.name]
            rate = 0.0 if method.name == "none" else 1e-2
            settings = {k: v for k, v in msgspec.to_builtins(method).items() if k not in ("name", "lr", "compare_to")}
            finals = [
                Run(purpose="final", base="tiny", base_digest="b", data=data.name, words=32, train_digest="t",
                    scored_digest="s", scored_rows=24, method=settings, size=None, lr=0.0, max_steps=12, batch_size=4,
                    seed=seed, device="cpu")
                for seed in ([0] if method.name == "none" else [1, 2])
            ]  # fmt: skip
            choose = ()
            if method.name == "AdaLink 8":
                choose = tuple(msgspec.structs.replace(finals[0], purpose="choose", lr=lr) for lr in (1e-2, 1e-3))
                for run in choose:
                    finished[run.file_name] = content(run, run.lr, method.name)
            cells.append(Cell(study.bases[0], data, (), method, None, choose, tuple(finals)))
            for run in finals:
                if run.seed in accuracy:
                    run = msgspec.structs.replace(run, lr=rate)
                    finished[run.file_name] = content(run, accuracy[run.seed], method.name)
    return study, cells, finished


def content(run, accuracy, method):
    result = {
        "accuracy": accuracy,
        "loss": 1.0,
        "diverged": False,
        "trained_parameters": PARAMETERS[method],
        "base_parameters": 10_000,
        "train_seconds": 10.0 * run.seed,
        "score_seconds": 1.0,
        "train_rows": 60,
        "rows": 24,
    }
    return {"run": msgspec.to_builtins(run), "result": result, "versions": {"torch": "2.13"}}


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
    finished |= {run.file_name: content(run, 0.9 if run.lr == best else 0.2, method.name) for run in choose}
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
    columns, unmeasured = accuracy_rows(summarize(made[0], made[1], {}))
    assert all(len(row) == len(columns) for row in unmeasured)
    assert {row[6] for row in unmeasured} == {"not measured"}


@pytest.fixture
def on_save(monkeypatch):
    """Has what it is given look at each plot's name and figure before the file is written."""
    from matplotlib.figure import Figure

    def watch(look):
        real = Figure.savefig

        def watched(figure, path, **options):
            look(Path(path).stem, figure)
            return real(figure, path, **options)

        monkeypatch.setattr(Figure, "savefig", watched)

    return watch


@pytest.fixture
def shown(on_save):
    """What is drawn: plot -> (panel, series) -> x and y."""
    shown = {}

    def look(plot, figure):
        shown[plot] = {
            (axes.get_title(), line.get_label()): (list(line[0].get_xdata()), list(line[0].get_ydata()))
            for axes in figure.axes
            for line in axes.containers
        }

    on_save(look)
    return shown


@pytest.fixture
def intervals(on_save):
    """Ends of the horizontal error bars of ``differences.png`` by panel, in the order of its points."""
    found = {}

    def look(plot, figure):
        if plot == "differences":
            for axes in figure.axes:
                (bars,) = axes.containers[0].lines[2]
                found[axes.get_title()] = [(line[0][0], line[1][0]) for line in bars.get_segments()]

    on_save(look)
    return found


def test_plots_show_the_cells(made, tmp_path, shown):
    from matplotlib import pyplot

    (tmp_path / "size.png").write_bytes(b"of an older summary")
    drawn = draw(summarize(*made), tmp_path)
    assert [path.name for path in drawn.values()] == ["differences.png", "parameters.png", "time.png", "rank.png"]
    assert list(drawn) == [
        "Accuracy minus that of LoRA 2",
        "Accuracy against trained parameters",
        "Accuracy against seconds of training",
        "Accuracy against rank of AdaLink",
    ]
    assert not (tmp_path / "size.png").exists()
    assert shown["parameters"]["tiny, letters", "AdaLink, gelu"] == ([768.0, 1536.0], pytest.approx([85.0, 88.0]))
    assert shown["time"]["tiny, letters", "LoRA 2"] == ([15.0], pytest.approx([91.0]))
    ranks, accuracy = shown["rank"]["tiny, digits", "gelu"]
    assert ranks == [8.0, 16.0]
    assert accuracy == pytest.approx([50.0, 54.0])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn.values())
    assert not pyplot.get_fignums()


def test_variants_of_adalink_are_lines_of_their_own(made, tmp_path, shown):
    summary = summarize(*made)
    other = next(cell for cell in summary["cells"] if cell["method"] == "AdaLink 16" and cell["data"] == "letters")
    changes = ({"init": "centered"}, {"tokens": 3}, {"init": "centered", "tokens": 3}, {"lr_ratio": 10.0})
    for change in changes:
        summary["cells"].append({**other, "settings": {**other["settings"], **change}})
    draw(summary, tmp_path)
    lines = {series: x for (panel, series), (x, _) in shown["rank"].items() if panel == "tiny, letters"}
    assert lines == {
        "gelu": [8.0, 16.0],
        "gelu, centered": [16.0],
        "gelu, 3 soft tokens": [16.0],
        "gelu, centered, 3 soft tokens": [16.0],
        "gelu, rate ratio 10": [16.0],
    }


def test_ranks_are_marked_where_they_are(made, tmp_path, on_save):
    marks = {}

    def look(plot, figure):
        figure.canvas.draw()
        texts = [[label.get_text() for label in axes.get_xticklabels(which="both")] for axes in figure.axes]
        marks[plot] = [list(filter(None, panel)) for panel in texts]

    on_save(look)
    draw(summarize(*made), tmp_path)
    assert marks["rank"] == [["8", "16"], ["8", "16"]]
    assert marks["parameters"] != marks["rank"]


def test_differences_are_drawn_with_their_intervals(made, tmp_path, shown, intervals):
    draw(summarize(*made), tmp_path)
    title = "Accuracy minus that of LoRA 2"
    points, rows = shown["differences"]["tiny, letters", title]
    assert points == pytest.approx([-6.0, -3.0])  # worked out by hand above; rows go upwards
    assert rows == [1, 0]
    assert intervals["tiny, letters"][0] == pytest.approx((-56.8, 44.8), abs=0.05)
    points, _ = shown["differences"]["tiny, digits", title]
    assert points == pytest.approx([-10.0, -5.0])
    for (low, high), mean in zip(intervals["tiny, digits"], points, strict=True):
        assert low == high == pytest.approx(mean)  # one pair has no interval


def test_a_combined_data_set_is_not_drawn(made, tmp_path, shown):
    summary = summarize(*made)
    combined = [dict(cell, data="both", parts={"letters": cell["accuracy"]}) for cell in summary["cells"]]
    pairs = summary["comparisons"] + [dict(pair, data="both") for pair in summary["comparisons"]]
    draw({**summary, "cells": summary["cells"] + combined, "comparisons": pairs}, tmp_path)
    for plot in ("parameters", "differences"):
        assert {panel for panel, _ in shown[plot]} == {"tiny, letters", "tiny, digits"}


def test_nothing_measured_draws_nothing(made, tmp_path):
    assert draw(summarize(made[0], made[1], {}), tmp_path) == {}


def test_training_sizes_are_drawn_in_their_order(made, tmp_path, shown):
    summary = summarize(*made)
    few = [dict(cell, size=32, train_rows=32) for cell in summary["cells"] if cell["method"] != "AdaLink 8"]
    drawn = draw({**summary, "cells": few[::-1] + summary["cells"]}, tmp_path)
    assert "size.png" in [path.name for path in drawn.values()]
    assert shown["size"]["tiny, letters", "LoRA 2"] == ([32.0, 60.0], pytest.approx([91.0, 91.0]))
    assert ("tiny, letters", "AdaLink 8") not in shown["size"]  # it has one size


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


@pytest.mark.parametrize("name", ["reduced", "encoder", "few-rows", "starts", "decoder", "one-rate"])
def test_committed_results_are_of_the_committed_study(name):
    studies = Path(__file__).parents[3] / "studies"
    summary = json.loads((studies / "results" / name / "summary.json").read_text())
    declared = read_study(studies / f"{name}.toml")
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
    root = Path(__file__).parents[3]
    assert f"exact up to {EXACT_PAIRS} pairs, above by {DRAWS:,} random" in (root / "docs" / "study.md").read_text()
    for folder in (root / "studies" / "results").iterdir():
        committed = json.loads((folder / "summary.json").read_text())
        for field in ("paired", "scoring"):
            assert committed[field] == summary[field]
            assert summary[field] in (folder / "study.md").read_text()
