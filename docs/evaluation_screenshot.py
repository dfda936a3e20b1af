"""Draw ``docs/guides/evaluation.png``, the picture of a page of ``adalink eval --html`` or of a training.

Needs the extra ``dev`` and an installed Chromium or Chrome:

    PYTHONPATH=tests python docs/evaluation_screenshot.py report.html
"""

from __future__ import annotations

import sys
from io import BytesIO
from pathlib import Path

from helpers.browser import find_chromium
from PIL import Image
from playwright.sync_api import sync_playwright

OUT = Path(__file__).parent / "guides" / "evaluation.png"


def main(report: str) -> None:
    """Draw the top of a page, as wide as a tablet."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium())
        page = browser.new_page(viewport={"width": 800, "height": 1000}, device_scale_factor=1.5)
        page.goto(Path(report).resolve().as_uri())
        picture = Image.open(BytesIO(page.screenshot())).convert("RGB")
        picture.quantize(128, dither=Image.Dither.NONE).save(OUT, "PNG", optimize=True)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
