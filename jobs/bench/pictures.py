"""The pictures of docs/: the morning report of a run folder, as a desktop, a phone and a dark room have it.

    dailies render examples/prompts.parquet --out out/
    python -m dailies.jobs.bench.pictures out/ docs/
"""

import sys
import time
from pathlib import Path

from dailies.jobs.bench.chromium import Browser
from dailies.jobs.report import report

BEGUN_PAGE = "document.body.classList.contains('begun')"
SETTLE_S = 0.8                          # pictures are decoded, a clip is there
JUDGED = "pppxprppxppr"                 # of the first clips, in their order


def main(uri: str, folder: str) -> int:
    report(uri, json=True)
    page = f"file://{Path(uri).resolve()}/report/index.html"
    with Browser(1360, 850, scale=1.5) as browser:
        judge_some(browser, page)
        keep(browser, folder, "report")
        browser.run("dailies.show('night')")
        keep(browser, folder, "report-night")
    with Browser(1360, 850, scale=1.5, dark=True) as browser:
        judge_some(browser, page)
        browser.key("Enter")
        browser.key(" ")
        keep(browser, folder, "report-dark")
    with Browser(390, 844, scale=2, phone=True) as browser:
        judge_some(browser, page)
        keep(browser, folder, "report-phone")
    return 0


def judge_some(browser: Browser, page: str) -> None:
    """The page, with some clips judged."""
    browser.open(page, until=BEGUN_PAGE)
    browser.run("localStorage.clear()")
    browser.open(page, until=BEGUN_PAGE)
    browser.key("ArrowRight")
    for key in JUDGED:
        browser.key(key)
    browser.key("Home")
    browser.key("ArrowRight")
    browser.run("scrollTo(0, 0)")


def keep(browser: Browser, folder: str, name: str) -> None:
    time.sleep(SETTLE_S)
    (Path(folder) / f"{name}.webp").write_bytes(browser.picture(format="webp", quality=86))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
