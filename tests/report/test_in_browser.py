"""The page in a real browser: it complains of nothing, asks for nothing, fits, and can be read in every light."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser as browsers
import pytest
from run_on_disk import Run, S
from test_page import evil_page, usual_page
from told_runs import failed, record, run_facts

from ckptmgr.cli.report import page
from ckptmgr.lifecycle import CheckpointState, Format

pytestmark = [
    pytest.mark.skipif(browsers.EXECUTABLE is None, reason=browsers.WHY_NOT),
    pytest.mark.xdist_group("browser"),
]
#: A small phone, a phone, a tablet, a desk.
WIDTHS = (320, 390, 768, 1200)


def long_page() -> str:
    """Ten thousand attempts of two series, with every state, on 512 ranks."""
    rows = [
        failed(n) if n % 50 == 0 else record(n, series="hf" if n % 4 == 0 else "checkpoint", gather_s=n % 97 / 10)
        for n in range(1, 10_000)
    ]
    rows.append(record(10_000, state=CheckpointState.GATHERED))
    return page.of_run(run_facts(rows, newest=rows[0], rank_bytes={rank: 10**9 + rank**3 for rank in range(512)}))


def short_page() -> str:
    return page.of_run(run_facts([record(1)]))


def empty_page() -> str:
    return page.of_run(run_facts([], newest=None, rank_bytes={}))


PAGES = {"usual": usual_page, "evil": evil_page, "long": long_page, "short": short_page, "empty": empty_page}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """name → URL of a file."""
    folder = tmp_path_factory.mktemp("pages")
    for name, made in PAGES.items():
        (folder / f"{name}.html").write_text(made(), encoding="utf-8")
    return {name: (folder / f"{name}.html").as_uri() for name in PAGES}


@pytest.fixture(scope="module")
def browser() -> Iterator[browsers.Browser]:
    with browsers.browser() as opened:
        yield opened


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_without_a_complaint_and_asks_for_nothing(
    browser: browsers.Browser, pages: dict[str, str], name: str
) -> None:
    for dark in (False, True):
        browser.load(pages[name], dark=dark)

        assert browser.complaints == []
        assert [url for url in browser.requests if not url.startswith("data:")] == [pages[name]]
        assert browser.value("document.compatMode") == "CSS1Compat"
        assert browser.value("document.scripts.length") == 0


def test_the_policy_is_in_force(browser: browsers.Browser, pages: dict[str, str]) -> None:
    browser.load(pages["usual"])
    browser.value(
        "var s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        "var i = new Image(); i.src = 'http://127.0.0.1:1/x'; document.body.append(i);"
        "var p = document.querySelector('h1'); p.setAttribute('style', 'color: rgb(1, 2, 3)');"
    )

    assert browser.value("window.ran") is None
    assert browser.value("getComputedStyle(document.querySelector('h1')).color") != "rgb(1, 2, 3)"
    assert sum("Content Security Policy" in text for text in browser.complaints) >= 3


@pytest.mark.parametrize("name", PAGES)
def test_no_page_is_wider_than_its_window(browser: browsers.Browser, pages: dict[str, str], name: str) -> None:
    for width in WIDTHS:
        browser.load(pages[name], width=width)
        browser.value("document.querySelectorAll('details').forEach(each => each.open = true)")

        assert browser.value("innerWidth") == width
        assert browser.value("document.documentElement.scrollWidth") <= width, width


#: Of each drawing that is shown: its box, and every text in it with its box and the size of its letters.
TEXTS = """
[...document.querySelectorAll('svg')].filter(svg => svg.getBoundingClientRect().width).map(svg => {
  const box = each => { const r = each.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom] };
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return {box: box(svg), texts: [...svg.querySelectorAll('text')].filter(t => t.textContent.trim()).map(t => (
    {text: t.textContent, box: box(t), size: parseFloat(getComputedStyle(t).fontSize) * scale}))};
})
"""


def overlap(one: list[float], other: list[float]) -> bool:
    """By more than a pixel or two, which is the room around letters."""
    return min(one[2], other[2]) - max(one[0], other[0]) > 1 and min(one[3], other[3]) - max(one[1], other[1]) > 3


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_labels_are_large_enough_and_none_is_cut_off_or_over_another(
    browser: browsers.Browser, pages: dict[str, str], name: str, width: int
) -> None:
    browser.load(pages[name], width=width)
    drawings = browser.value(TEXTS)

    assert len(drawings) == browser.value("document.querySelectorAll('figure').length")
    for drawing in drawings:
        texts = drawing["texts"]
        for place, each in enumerate(texts):
            left, top, right, bottom = each["box"]
            assert each["size"] >= 9.5, each
            assert left >= drawing["box"][0] - 1, each
            assert right <= drawing["box"][2] + 1, each
            assert top >= drawing["box"][1] - 3, each
            assert bottom <= drawing["box"][3] + 3, each
            assert [other["text"] for other in texts[place + 1 :] if overlap(each["box"], other["box"])] == [], each


def brightness(browser: browsers.Browser, expression: str) -> float:
    red, green, blue = map(float, re.findall(r"[\d.]+", browser.value(expression))[:3])
    return (red + green + blue) / 3


def test_light_is_light_dark_is_dark_and_paper_is_paper(browser: browsers.Browser, pages: dict[str, str]) -> None:
    ground, ink = "getComputedStyle(document.body).backgroundColor", "getComputedStyle(document.body).color"
    letters = "getComputedStyle(document.querySelector('svg text')).fill"
    bars = """getComputedStyle(document.querySelector('svg [fill="var(--stage)"]')).fill"""
    seen = {}
    for medium, dark in (("", False), ("", True), ("print", True)):
        browser.load(pages["usual"], dark=dark, medium=medium)
        seen[medium, dark] = [brightness(browser, each) for each in (ground, ink, letters, bars)]

    light, night, paper = seen.values()
    assert light[0] > 240
    assert max(light[1:3]) < 60
    assert night[0] < 40
    assert min(night[1:3]) > 200
    assert night[3] > light[3]
    assert (paper[0], paper[1]) == (255, 0)


def test_on_paper_every_table_is_there(browser: browsers.Browser, pages: dict[str, str], tmp_path: Path) -> None:
    tables = "[...document.querySelectorAll('details table')]"
    hidden = f"{tables}.filter(each => each.getBoundingClientRect().height < 20).length"
    browser.load(pages["usual"], medium="print", width=718)  # A4 without its margins

    assert browser.value(hidden) == 0
    assert browser.value("document.documentElement.scrollWidth") <= 718
    assert browser.value("[...document.querySelectorAll('svg.wide')].every(e => e.getBoundingClientRect().width > 0)")
    browser.paper(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    browser.load(pages["usual"])
    browser.value("document.querySelectorAll('details').forEach(each => each.open = false)")
    assert browser.value("document.querySelector('details table').checkVisibility()") is False


def test_every_drawing_is_read_out_as_an_image_with_a_name_and_a_description(
    browser: browsers.Browser, pages: dict[str, str]
) -> None:
    browser.load(pages["usual"])
    tree = browser.ask("Accessibility.getFullAXTree")["nodes"]
    images = [node for node in tree if node.get("role", {}).get("value") in ("image", "img") and not node["ignored"]]

    assert len(images) == browser.value("document.querySelectorAll('figure').length")
    for node in images:
        assert len(node["name"]["value"]) > 40, node
    roles = [node["role"]["value"] for node in tree if not node["ignored"]]
    assert {"main", "heading", "table", "columnheader"} <= set(roles)


def test_a_served_page_loads_itself_again_and_shows_what_has_happened(
    browser: browsers.Browser, tmp_path: Path
) -> None:
    run = Run(tmp_path / "runs" / "alpha")
    run.save(500)
    run.save(500, series="hf", layout=Format.HUGGINGFACE)
    run.save(600, until=S.FAILED)
    words = [sys.executable, "-m", "ckptmgr", "serve", run.directory.parent, "--port", "0", "--refresh", "1", "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        try:
            url = json.loads(child.stdout.readline())["url"]
            browser.load(url)
            assert browser.value("document.querySelector('td a').getAttribute('href')") == "/alpha/"
            browser.load(f"{url}alpha/")
            run.save(1000)
            seen: Any = ""
            deadline = time.monotonic() + 60
            while "step-1000" not in seen and time.monotonic() < deadline:
                browser.wait_until_loaded()
                seen = browser.value("document.body.textContent")
            asked = [each for each in browser.requests if each == f"{url}alpha/"]
            complaints = browser.complaints
        finally:
            child.kill()
    run.journal.close()

    assert "step-1000" in seen
    assert len(asked) >= 2
    assert complaints == []
