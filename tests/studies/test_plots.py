"""Plots of a study show what its summary says."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.report.plots import draw
from studies.report.summary import summarize


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
    ends = {}

    def look(plot, figure):
        if plot == "differences":
            for axes in figure.axes:
                (bars,) = axes.containers[0].lines[2]
                ends[axes.get_title()] = [(line[0][0], line[1][0]) for line in bars.get_segments()]

    on_save(look)
    return ends


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
    points, rows = shown["differences"]["tiny, letters", "AdaLink"]
    assert points == pytest.approx([-6.0, -3.0])  # worked out by hand above; rows go upwards
    assert rows == [1, 0]
    assert intervals["tiny, letters"][0] == pytest.approx((-56.8, 44.8), abs=0.05)
    points, _ = shown["differences"]["tiny, digits", "AdaLink"]
    assert points == pytest.approx([-10.0, -5.0])
    for (low, high), mean in zip(intervals["tiny, digits"], points, strict=True):
        assert low == high == pytest.approx(mean)  # one pair has no interval


def test_differences_say_their_unit_and_mark_cut_intervals(made, tmp_path, on_save):
    titles, cuts, labels = [], {}, []

    def look(plot, figure):
        if plot == "differences":
            titles.extend(figure.get_suptitle().splitlines())
            figure.canvas.draw()
            for axes in figure.axes:
                reach = axes.get_xlim()[1]
                marks = [line for line in axes.lines if line.get_label().startswith("_cut")]
                cuts[axes.get_title()] = [
                    (line.get_xdata()[0] / reach, list(line.get_ydata()), line.get_color()) for line in marks
                ]
                labels.append([label.get_text() for label in axes.get_yticklabels() if label.get_visible()])

    on_save(look)
    draw(summarize(*made), tmp_path)
    assert titles[0] == "Accuracy minus that of LoRA 2, percentage points"
    assert "95 % interval (Student's t)" in titles[1]
    # Letters: -6 ± 50.8 and -3 ± 25.4 points leave a panel of ± 15; digits have no intervals.
    assert cuts == {
        "tiny, letters": [(-1.0, [1, 0], "#0072B2"), (1.0, [1, 0], "#0072B2")],
        "tiny, digits": [],
    }
    assert labels == [["AdaLink 16", "AdaLink 8"], []]  # the second column shares the first one's


def test_each_family_of_methods_has_a_colour(made, tmp_path, on_save):
    colours = {}

    def look(plot, figure):
        if plot == "differences":
            for bars in (bars for axes in figure.axes for bars in axes.containers):
                colours[bars.get_label()] = bars.lines[0].get_color()

    on_save(look)
    summary = summarize(*made)
    lora = next(cell for cell in summary["cells"] if cell["method"] == "LoRA 2" and cell["data"] == "letters")
    pair = next(pair for pair in summary["comparisons"] if pair["data"] == "letters")
    for kind in ("lora", "prompt-tuning", "p-tuning", "full"):
        summary["cells"].append({**lora, "method": kind, "settings": {**lora["settings"], "kind": kind}})
        summary["comparisons"].append({**pair, "method": kind})
    draw(summary, tmp_path)
    assert list(colours) == ["AdaLink", "LoRA", "soft prompt", "full fine-tuning"]
    assert len(set(colours.values())) == 4


@pytest.mark.parametrize(("accuracy", "lines", "notes"), [(0.8, [80.0], []), (0.113, [], ["none: 11.3 ↓"])])
def test_a_base_far_below_its_methods_is_a_note(made, tmp_path, on_save, accuracy, lines, notes):
    summary = summarize(*made)
    (base,) = (cell for cell in summary["cells"] if cell["method"] == "none" and cell["data"] == "letters")
    base["accuracy"]["mean"] = accuracy
    found = {}

    def look(plot, figure):
        (axes,) = (axes for axes in figure.axes if axes.get_title() == "tiny, letters")
        drawn = [line.get_ydata()[0] for line in axes.lines if line.get_label() == "none"]
        found[plot] = (drawn, [text.get_text() for text in axes.texts], axes.get_ylim()[0])

    on_save(look)
    draw(summary, tmp_path)
    shown, said, lowest = found["parameters"]
    assert shown == pytest.approx(lines)
    assert said == notes
    assert lowest > 60.0  # the methods have 85 to 91


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
