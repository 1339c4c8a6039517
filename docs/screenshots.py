"""Takes the pictures of the web pages in docs/images by chromium, playwright and pillow: python -m docs.screenshots."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks import strategies
from micronet_eval import write_comparison, write_pages
from micronet_eval.comparing import Comparison, Result, rows, sorted_rows

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
WIDTHS = {"": (1200, 1000, "light"), "-dark": (400, 900, "dark")}
"""What is added to the name of a picture: width and height in pixels, and the colours."""


def comparison() -> Comparison:
    """The benchmark of all strategies, on digits."""
    kept = json.loads(strategies.DIGITS.results.read_text(encoding="utf-8"))
    found = [Result(**result) for result in kept["results"]]
    return Comparison(tuple(sorted_rows(rows(found), "score")), tuple(found))


def main() -> None:
    """Writes the pages to a temporary folder, and a picture of each in both widths."""
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        folder = Path(name)
        write_comparison(comparison(), folder / "compare")
        write_pages(ROOT / "submissions", html=folder / "leaderboard")
        pages = {
            "compare": folder / "compare" / "index.html",
            "leaderboard": folder / "leaderboard" / "index.html",
            "submission": folder / "leaderboard" / "submissions" / "digits.html",
        }
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for page, path in pages.items():
            for suffix, (width, height, colours) in WIDTHS.items():
                tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=colours)
                tab.goto(path.as_uri())
                if page == "submission":
                    tab.locator("h2", has_text="Where storage").evaluate("heading => heading.scrollIntoView()")
                picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
                picture.quantize(128, dither=Image.Dither.NONE).save(IMAGES / f"{page}{suffix}.png", optimize=True)
                tab.close()
        browser.close()


if __name__ == "__main__":
    main()
