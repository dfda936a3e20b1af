"""The page of an evaluation in a real browser: narrow windows, contrast in both schemes, and keys of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.browser import CONTRAST, open_browser
from helpers.evaluations import KINDS, make_report

from adalink.tools.evaluation.page import render_page

WIDTHS = (320, 400, 800, 1280)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with open_browser() as browser:
        tab = browser.new_page()
        tab.set_default_timeout(30_000)  # a machine may be busy
        yield tab


def overflow(page: Any) -> list[list[int | str]]:
    """Elements that reach beyond the window, but for what scrolls in a box of its own."""
    found: list[list[int | str]] = page.evaluate(
        """() => [...document.body.querySelectorAll("*")].filter((one) => !one.closest("td, th, thead, tbody, table"))
          .filter((one) => one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
          .map((one) => [one.tagName, one.textContent.slice(0, 40)])"""
    )
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_wider_than_the_window(page: Any, kind: str) -> None:
    page.set_content(render_page(make_report(kind, long=True)))
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert overflow(page) == []
    page.evaluate("document.querySelector('h1').style.width = '500vw'")
    assert overflow(page)[0][0] == "H1"


@pytest.mark.parametrize("kind", KINDS)
def test_contrast_is_that_of_wcag_aa_in_both_schemes(page: Any, kind: str) -> None:
    page.set_content(render_page(make_report(kind)))
    grounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 20
        assert [(text, round(ratio, 2)) for ratio, text in ratios if ratio < 4.5] == []
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    page.evaluate("document.documentElement.style.setProperty('--ink', '#707070')")
    page.evaluate("document.documentElement.style.setProperty('--quiet', '#707070')")
    assert min(ratio for ratio, _ in page.evaluate(CONTRAST)) < 4.5


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_pictures_stay_inside_and_apart(page: Any, kind: str) -> None:
    """At 400 px; a text over another cannot be read."""
    page.set_content(render_page(make_report(kind, long=True)))
    page.set_viewport_size({"width": 400, "height": 700})
    boxes = page.evaluate(
        """() => [...document.querySelectorAll("svg")].map((svg) => [[svg, ...svg.querySelectorAll("text")].map(
          (one) => { const { left, right, top, bottom } = one.getBoundingClientRect();
                     return [left, top, right, bottom]; })]).map(([boxes]) => boxes)"""
    )
    assert boxes
    for picture, *texts in boxes:
        for box in texts:
            assert box[0] >= picture[0] - 0.5
            assert box[2] <= picture[2] + 0.5
            assert box[3] <= picture[3] + 0.5
        for place, one in enumerate(texts):
            for other in texts[place + 1 :]:
                across = min(one[2], other[2]) - max(one[0], other[0])
                down = min(one[3], other[3]) - max(one[1], other[1])
                assert across < 1 or down < 4, (one, other)
    assert np.isfinite(boxes[0]).all()
