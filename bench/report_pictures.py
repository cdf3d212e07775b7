"""The two pictures of docs/report.md: python bench/report_pictures.py runs/NAME

In:   a finished run of the demo with its report.html, and Chromium.   Out: docs/report.png, docs/report_overview.png.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from browser import Browser  # noqa: E402

STEP = "5"  # Some responses are right there and some are wrong.
HOVERED_TOKEN = 33


def main(run):
    with tempfile.TemporaryDirectory() as folder, Browser(folder, width=1280, height=690) as browser:
        browser.open(Path(run, "report.html"), "#samples")
        browser.choose("#filter-step", STEP)
        browser.choose("#order", "longest first")
        browser.run("document.querySelector('#list .wrong').closest('.row').click()")
        browser.choose("#reader select.quantity", "advantages")
        browser.wait("document.querySelector('#reader .token[data-value]') !== null")
        browser.hover("#reader .token", HOVERED_TOKEN)
        browser.picture(ROOT / "docs/report.png")
    with tempfile.TemporaryDirectory() as folder, Browser(folder, width=1280, height=840) as browser:
        browser.open(Path(run, "report.html"), "#overview")
        browser.click("#theme")
        browser.picture(ROOT / "docs/report_overview.png")


if __name__ == "__main__":
    main(sys.argv[1])
