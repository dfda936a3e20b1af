"""The page: all that rows, models and names say is text, and nothing is loaded or run."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from msgspec.structs import replace

from adalink.tools.evaluation.metrics import gain, measure_labels, wilson
from adalink.tools.evaluation.page import render_page
from adalink.tools.evaluation.report import Reference, Report, Speed, TaskReport, WrongRow
from adalink.tools.evaluation.verdict import make_verdict

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u202e\x1b[2J</title></style>"
_VOID = {"meta", "br", "path", "rect", "circle"}


class Tags(HTMLParser):
    """Tags and attributes of a page; every tag that opens is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def made(count: int = 1, names: tuple[str, ...] = ("oil", "tea")) -> Report:
    expected = [*names] * 10
    answers = expected[:-4] + [names[0]] * 4
    right = np.array([one == other for one, other in zip(expected, answers, strict=True)])
    always = np.array([one == names[0] for one in expected])
    task = TaskReport(
        task="topics",
        variant="int4",
        kind="single_label_classification",
        rows=len(expected),
        cut=1,
        accuracy=wilson(int(right.sum()), len(right)),
        labels=measure_labels(expected, answers, np.linspace(0.3, 1.0, len(expected))),
        reference=Reference(name="always", value=float(always.mean()), gain=gain(right, always), p_value=0.01),
        speed=Speed(median_ms=1.0, p95_ms=2.0, rows_per_second=3.0, tokens_per_second=4.0),
        wrong=[WrongRow(line=1, text="a", expected="b", answer="c", probability=0.5)],
        notes=["1 texts were cut"],
    )
    task = replace(task, verdict=make_verdict(task))
    shared = {"base": "tiny", "data": "rows.jsonl", "data_sha256": "sha256:0", "kit_version": "1"}
    return Report(verdict=task.verdict, tasks=[task] * count, **shared)


def test_verdict_comes_first_and_pictures_before_tables() -> None:
    page = render_page(made())
    assert page.index("<h1>topics (int4) is right on") < page.index("<svg") < page.index("<table")
    tags = Tags(page)
    assert {"svg", "table"} <= tags.tags
    assert not {"script", "link", "img", "iframe"} & tags.tags
    assert not {name for name in tags.attributes if name.startswith("on")}
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "width=device-width" in page


def test_tasks_stand_side_by_side() -> None:
    assert "Side by side" in render_page(made(2))
    assert "Side by side" not in render_page(made(1))


@pytest.mark.parametrize("where", ["text", "expected", "answer", "task", "variant", "verdict", "label", "name", "data"])
def test_markup_of_rows_and_models_is_text(where: str) -> None:
    report = made(2, (EVIL, "tea")) if where == "label" else made(2)
    task = report.tasks[0]
    if where in ("text", "expected", "answer"):
        task = replace(task, wrong=[replace(task.wrong[0], **{where: EVIL})])
    elif where in ("task", "variant", "verdict"):
        task = replace(task, **{where: EVIL})
    elif where == "name":
        assert task.reference is not None
        task = replace(task, reference=replace(task.reference, name=EVIL))
    report = replace(report, tasks=[task, task])
    if where == "data":
        report = replace(report, data=EVIL, base=EVIL)
    if where == "verdict":
        report = replace(report, verdict=EVIL)
    page = render_page(report)
    tags = Tags(page)
    assert tags.tags == Tags(render_page(made(2))).tags
    assert not {name for name in tags.attributes if name.startswith("on")}
    assert "\u202e" not in page
    assert "\x1b" not in page


def test_more_labels_than_a_picture_shows() -> None:
    names = tuple(f"label {number:02}" for number in range(40))
    page = render_page(made(1, names))
    Tags(page)
    assert "12 commonest of 40" in page
