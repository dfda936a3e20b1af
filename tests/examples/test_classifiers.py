"""The four-task proof: its rows, its measure, and the tables of its committed figures."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
from helpers.paths import REPOSITORY

from adalink.runtime.storage.adapter import read_adapter
from adalink.runtime.text.spans import Span
from adalink.runtime.text_classifier import Classification
from examples.classifiers import table
from examples.classifiers.answers import f1, right_answers, said_answers
from examples.classifiers.rows import TASKS
from studies.experiment.data import DataSet, Labelled

EXAMPLE = REPOSITORY / "examples/classifiers"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("The film of Ada Lovelace's life is long.", ["ada lovelace"]),
        ("Call it Solaris. Then forget Steven and I'm done", ["solaris", "steven"]),
        ("\u201cBold,\u201d says The Times, (Variety) agrees", ["the times", "variety"]),
        ("nothing here", []),
        ("U.S. and 3-D films", []),
    ],
)
def test_names_are_the_capitals_within_a_sentence(text: str, names: list[str]) -> None:
    data = DataSet("film-reviews", "", ("a",), *[[Labelled(split, 0)] for split in ("train", "validation", "test")])
    row = TASKS["names"].make(data, Labelled(text, 0))
    assert row is not None
    assert row["text"] == text.lower()
    assert [row["text"][span["start"] : span["end"]] for span in row["spans"]] == names
    assert TASKS["names"].make(data, Labelled("ALL CAPITALS", 0)) is None


def test_groups_are_the_parts_of_a_name() -> None:
    rows = [[Labelled(split, 0)] for split in ("train", "validation", "test")]
    data = DataSet("20newsgroups", "", ("hockey", "PC hardware"), *rows)
    row = TASKS["groups"].make(data, Labelled("a puck", 0))
    assert row == {"text": "a puck", "labels": ["hockey", "rec", "sport"]}


def test_f1_is_scikit_learns() -> None:
    metrics, preprocessing = pytest.importorskip("sklearn.metrics"), pytest.importorskip("sklearn.preprocessing")
    expected: list[set[Any]] = [{"a", "b"}, {"c"}, set(), {"b"}]
    received: list[set[Any]] = [{"a"}, {"c"}, {"b"}, {"a", "b"}]
    binary = preprocessing.MultiLabelBinarizer(classes=["a", "b", "c"])
    wanted = metrics.f1_score(binary.fit_transform(expected), binary.transform(received), average="micro")
    assert f1(received, expected) == pytest.approx(wanted)
    assert f1([{"a"}, {"b"}, {"b"}], [{"a"}, {"c"}, {"b"}]) == pytest.approx(2 / 3)  # one label each: the accuracy
    assert f1([set()], [set()]) == 1.0


def test_answers_of_each_kind() -> None:
    assert said_answers(Classification(label="a", probabilities={"a": 1.0})) == right_answers({"label": "a"})
    assert said_answers(Classification(labels=("a", "b"))) == right_answers({"labels": ["b", "a"]})
    said = Classification(spans=(Span("NAME", 2, 5, "ada", 0.9),))
    assert said_answers(said) == right_answers({"spans": [{"start": 2, "end": 5, "label": "NAME"}]})


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((EXAMPLE / "results.json").read_text())
    return loaded


def test_figures_are_whole_and_of_the_adapters(results: dict[str, Any]) -> None:
    """The same seeds of each method, and what is deployed says what was measured in training."""
    runs = {(run["task"], run["method"], run["seed"]) for run in results["runs"]}
    assert len(runs) == len(results["runs"])
    assert runs == {(task, method, seed) for task, _, seed in runs for method in table.METHODS}
    assert {task for task, _, seed in runs if seed == 0} == set(TASKS)
    for task in TASKS:
        report = json.loads((EXAMPLE / "adapters" / task / "training.json").read_text())
        assert read_adapter(EXAMPLE / "adapters" / task).digest == report["adapter_digest"]
        key = (task, "adalink", 0)
        (metrics,) = (run["metrics"] for run in results["runs"] if (run["task"], run["method"], run["seed"]) == key)
        assert report["evaluation"] == metrics
        assert results["deployed_f1"]["adalink"][task] == pytest.approx(metrics[TASKS[task].metric], abs=0.003)


@pytest.mark.parametrize("page", ["README.md", "docs/guides/classify.md", "examples/classifiers/README.md"])
def test_tables_are_those_of_the_figures(results: dict[str, Any], page: str) -> None:
    text = (REPOSITORY / page).read_text()
    measured = text.partition(table.BEGIN)[2].partition(table.END)[0]
    assert measured.strip() == "\n".join(table.sections(results)[page]).strip()


def test_gains_are_differences_of_means(results: dict[str, Any]) -> None:
    for line, (name, task) in zip(table.gains(results), TASKS.items(), strict=True):
        values = {
            method: statistics.mean(
                run["metrics"][task.metric] for run in results["runs"] if (run["task"], run["method"]) == (name, method)
            )
            for method in ("adalink", "head")
        }
        assert f"{100 * (values['adalink'] - values['head']):+.1f} points" in line
