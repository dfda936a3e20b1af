"""Draw ``docs/guides/page.png``, the screenshot of the server's page.

Needs the extra ``dev``, an installed Chromium or Chrome and the deployment of ``make demo``:

    PYTHONPATH=tests python docs/page_screenshot.py build/demo/deployment --variant int4

Options of ``adalink serve`` may follow the deployment. The figures in the picture are those of the machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

from helpers.browser import find_chromium
from PIL import Image
from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).parent / "guides" / "page.png"
PROMPT = "Text: Crude oil prices rose again after producers cut their output.\nTopic:"
TASK = "reuters-r8"


def main(deployment: str, *options: str) -> None:
    """Serve a deployment, ask its base and a task, and draw the page."""
    command = [sys.executable, "-m", "adalink.tools", "serve", deployment, "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        try:
            url = json.loads(server.stdout.readline())["page"]
            browser = playwright.chromium.launch(executable_path=find_chromium())
            page = browser.new_page(viewport={"width": 1000, "height": 720}, device_scale_factor=2)
            page.goto(url)
            ask(page)  # the first time is slower
            page.click("#restart")
            ask(page)
            for row in page.locator("summary").all():
                row.click()
            page.wait_for_timeout(1500)  # the load of now
            page.evaluate("scrollTo(0, 0)")
            page.click("h1")
            OUT.write_bytes(smaller(page.screenshot()))
            browser.close()
        finally:
            server.terminate()


def ask(page: Page) -> None:
    """Ask the base and the task, and wait for their answers."""
    page.wait_for_selector("#chips label")
    for box in page.locator("#chips input").all():
        name = box.get_attribute("value")
        box.set_checked(name == TASK or box.locator("xpath=..").get_attribute("class") == "base")
    page.check("[value=plain]")
    page.click("#toggle")
    page.fill("#max_tokens", "24")
    page.click("#toggle")
    page.fill("#prompt", PROMPT)
    page.click("#send")
    page.wait_for_selector("[aria-busy=true]", state="detached")


def smaller(data: bytes) -> bytes:
    """The picture in 128 colours."""
    file = BytesIO()
    Image.open(BytesIO(data)).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    main(*sys.argv[1:])
