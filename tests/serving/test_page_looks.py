"""The page at ``/`` in a real browser: narrow windows, contrast, focus, and what screen readers read."""

from __future__ import annotations

from helpers.browser import CONTRAST, Tab, route_answer
from helpers.served import Served

PROMPT = "Hello"


def test_everything_that_has_the_focus_shows_it(tab: Tab) -> None:
    tab.page.click("#toggle")
    tab.send(PROMPT, max_tokens=2)
    tab.wait()
    tab.page.click("#prompt")
    seen = []
    for _ in range(40):
        tab.page.keyboard.press("Tab")
        name, is_shown = tab.page.evaluate(FOCUS)
        if name in seen[:1]:
            break
        seen.append(name)
        assert is_shown, name
    assert {"chat", "toggle", "max_tokens", "temperature", "system", "send", "SUMMARY", "prompt", "alpha"} <= set(seen)


FOCUS = """() => {
  const element = document.activeElement;
  const isOutlined = (one) => getComputedStyle(one).outlineStyle === "solid" || one.matches(".box:has(#prompt:focus)");
  const places = [element, element.nextElementSibling, element.closest(".box")].filter(Boolean);
  const name = ["radio", "checkbox"].includes(element.type) ? element.value : element.id || element.tagName;
  return [name, element === document.body || places.some(isOutlined)];
}"""


def fill(tab: Tab, served: Served) -> None:
    """Bring the page to show everything it has: answers, probabilities, settings and a problem."""
    tab.choose(served.base, "alpha")
    tab.page.click("#toggle")
    tab.send(PROMPT, max_tokens=3)
    tab.wait()
    for summary in tab.page.locator("summary").all():
        summary.click()
    tab.send("", temperature="")
    assert tab.page.locator("#problem").is_visible()


def test_contrast_is_that_of_wcag_aa_in_both_schemes(tab: Tab, served: Served) -> None:
    fill(tab, served)
    grounds = set()
    for scheme in ("light", "dark"):
        tab.page.emulate_media(color_scheme=scheme)
        ratios = tab.page.evaluate(CONTRAST)
        assert {"Send", "You", "Settings", "AdaLink", "Write a prompt", "First token", "Write a prompt first."} <= {
            text for _, text in ratios
        }
        assert [(text, round(ratio, 2)) for ratio, text in ratios if ratio < 4.5] == []
        grounds.add(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2
    tab.page.emulate_media(color_scheme="light")
    tab.page.evaluate("document.documentElement.style.setProperty('--soft', '#808080')")
    assert min(ratio for ratio, _ in tab.page.evaluate(CONTRAST)) < 4.5


def test_window_that_is_narrow_needs_no_sideways_scrolling(tab: Tab, served: Served) -> None:
    widths = (320, 400, 800)

    def measured() -> list[int]:
        found = []
        for width in widths:
            tab.page.set_viewport_size({"width": width, "height": 800})
            found.append(tab.width())
        return found

    assert measured() == list(widths)
    route_answer(tab, "W" * 300 + " " + "word " * 30)
    tab.send("W" * 300)
    fill(tab, served)
    assert measured() == list(widths)
    tab.page.evaluate("document.querySelector('.answers').style.width = '500vw'")
    assert min(measured()) > max(widths)


def test_answers_stand_side_by_side_where_there_is_room(tab: Tab, served: Served) -> None:
    tab.choose(served.base, *served.deployment.tasks)
    tab.send(PROMPT, max_tokens=2)
    tab.wait()
    columns = {}
    for width in (400, 1400):
        tab.page.set_viewport_size({"width": width, "height": 800})
        boxes = [article.bounding_box() for article in tab.page.locator("article").all()]
        columns[width] = len({round(box["x"]) for box in boxes if box})
    assert columns == {400: 1, 1400: 5}


def test_screen_readers_read_an_answer_once_when_it_is_complete(tab: Tab, served: Served, slow_steps: None) -> None:
    tab.choose("alpha")
    tab.page.evaluate(
        "window.read = []; new MutationObserver((all) => all.forEach((one) => one.addedNodes.forEach("
        "(node) => window.read.push(node.textContent)))).observe(document.querySelector('#news'), { childList: true })"
    )
    tab.send("wheat", chat=False, max_tokens=50)
    tab.until("document.querySelector('.text').textContent.length > 1")
    assert tab.page.evaluate("window.read.length") == 0
    assert tab.page.locator("article[aria-busy=true]").count() == 1
    said = tab.text("alpha")
    assert tab.page.evaluate("window.read") == [f"alpha, length: {said} "]
    assert tab.page.locator("[aria-live], [role=log], [role=status]").count() == 1
    assert tab.page.locator("#turns :is([role=alert], [role=log])").count() == 0


def test_nothing_moves_for_who_wants_no_motion(tab: Tab) -> None:
    tab.page.route("**/v1/**", lambda route: None)  # the answer never comes
    tab.choose("alpha")
    tab.send(PROMPT)
    for motion, moves in (("no-preference", True), ("reduce", False)):
        tab.page.emulate_media(reduced_motion=motion)
        running = tab.page.evaluate("document.getAnimations().filter((one) => one.playState === 'running').length")
        assert (running > 0) == moves
