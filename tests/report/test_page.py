"""The page: nothing of it comes from elsewhere, nothing that anybody wrote becomes markup, and it stays small."""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import html.parser
import re
from xml.etree import ElementTree

import pytest
from told_runs import failed, record, run_facts

from ckptmgr.cli.report import charts, figures, page
from ckptmgr.cli.report.facts import SeriesFacts
from ckptmgr.lifecycle import CheckpointState, EpochRecord
from ckptmgr.resume import Finding, Level, Verdict

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>$\\frac&lt;\x1b[31m\u202e\x00\ud800\n--><style>*{}"
TAGS = {
    "html", "head", "meta", "link", "title", "style", "body", "main", "nav", "section", "footer", "h1", "h2", "h3", "p",
    "br", "code", "span", "strong", "ul", "ol", "li", "dl", "div", "dt", "dd", "figure", "figcaption", "details",
    "summary",
    "table", "caption", "thead", "tbody", "tr", "th", "td", "a", "svg", "g", "path", "use", "text", "defs", "clippath",
    "rect",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "name", "content", "http-equiv", "rel", "href", "class", "id", "aria-label", "aria-labelledby",
    "role", "tabindex", "scope",
}  # fmt: skip


class Parsed(html.parser.HTMLParser):
    """Tags, attributes and ids of a page, and whether every element ends where it should."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()
        self.ids: list[str] = []
        self.hrefs: set[str] = set()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {(tag, name) for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.hrefs |= {value or "" for name, value in attrs if name in ("href", "src")}

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@functools.cache
def usual_page() -> str:
    return page.of_run(run_facts([record(1), failed(2), record(3, series="hf"), record(4)]))


@functools.cache
def evil_page() -> str:
    rank = {"rank": EVIL, "host": EVIL, "cause": EVIL, "silent": True}
    rows = [
        record(1, series="$x<b>&", retire_started_at=1.0, retire_reason=EVIL),
        failed(2, series="$x<b>&", reason=EVIL, failures=(rank, rank)),
        record(3, series="$x<b>&", pinned=True),
        record(4, series="</style><b onload=x>"),
    ]
    facts = run_facts(
        rows,
        name=EVIL,
        directory=EVIL,
        journal=EVIL,
        run_id=EVIL,
        decisions={3: ("keep", (EVIL,))},
        epochs=[EpochRecord(1, 1.0, EVIL, 7, EVIL, {}, None)],
    )
    finding = Finding(EVIL, Level.ERROR, EVIL, EVIL, EVIL, 1)
    first = SeriesFacts("$x<b>&", facts.series[0].numbers, Verdict.OLDER, 1, EVIL, (finding,), (finding,))
    return page.of_run(dataclasses.replace(facts, series=(first, *facts.series[1:])))


def test_nothing_that_anybody_wrote_becomes_markup() -> None:
    text = evil_page()
    parsed = Parsed(text)

    assert parsed.tags <= TAGS
    drawn = ("svg", "g", "path", "use", "text", "defs", "clippath", "rect")
    assert {(tag, name) for tag, name in parsed.attributes if tag not in drawn} <= {
        (tag, name) for tag in TAGS for name in ATTRIBUTES
    }
    assert not {name for _, name in parsed.attributes if name.startswith("on") or name == "style"}
    assert (parsed.open, parsed.wrong) == ([], [])
    assert "alert(1)" in text  # it is there to be read


def test_control_characters_are_spelled_out() -> None:
    text = evil_page()

    assert not [char for char in text if not char.isprintable() and char != "\n"]
    assert "\\x1b[31m\\u202e\\x00\\ud800" in text


def test_the_page_asks_for_nothing_from_anywhere() -> None:
    text = evil_page()
    parsed = Parsed(text)

    assert {href for href in parsed.hrefs if not href.startswith("#")} == {"data:,"}
    assert not re.search(r"https?:|url\((?!#)|@import|//[a-z]", text.replace(page.safe(EVIL), ""))
    assert "script" not in parsed.tags


def test_its_policy_allows_its_own_style_and_nothing_else() -> None:
    text = usual_page()
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()

    assert dict(part.strip().split(" ", 1) for part in policy.split(";")) == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert text.index(policy) < text.index("<style>")


def test_every_name_in_the_page_is_there_once_and_every_reference_leads_to_one() -> None:
    parsed = Parsed(usual_page())
    named = {href[1:] for href in parsed.hrefs if href.startswith("#")}

    assert len(parsed.ids) == len(set(parsed.ids))
    assert named <= set(parsed.ids)


def test_each_chart_has_a_name_a_sentence_and_a_table() -> None:
    text = usual_page()
    figures_of = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)

    assert len(figures_of) == 7
    ids = Parsed(text).ids
    for each in figures_of:
        assert each.count('role="img"') == 2  # wide and narrow
        for labels in re.findall(r'aria-labelledby="([^"]+)"', each):
            assert set(labels.split()) <= set(ids)
        assert re.search(r"<table>.*<th scope=", each, flags=re.DOTALL)


def test_every_colour_of_a_drawing_has_a_value_in_the_light_in_the_dark_and_on_paper() -> None:
    text = usual_page()
    used = set(re.findall(r'"var\(--(\w+)\)"', text))
    blocks = re.findall(r":root\{([^}]*)\}", page.STYLE)

    assert used - {"ink", "muted"} >= {"bad", "stage", "write", "gather", "commit", "one", "two"}
    assert len(blocks) == 3
    for block in blocks:
        assert used | set(charts.ROLES) <= set(re.findall(r"--(\w+):", block))
    assert not re.findall(r'"#0000[0-9a-f]{2}"', text)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1, 2], ids=["light", "dark", "print"])
def test_colours_are_told_from_their_ground(scheme: int) -> None:
    """WCAG 2.2: 4.5 to 1 for text, 3 to 1 for what is drawn."""
    values = dict(re.findall(r"--(\w+):(#[0-9a-f]+)", re.findall(r":root\{([^}]*)\}", page.STYLE)[scheme]))

    def contrast(one: str, other: str) -> float:
        light, dark = sorted((luminance(values[one]), luminance(values[other])), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for ground in ("page", "card"):
        for text in ("ink", "muted", "link", "good", "bad", "warn"):
            assert contrast(text, ground) >= 4.5, (text, ground)
    for drawn in (*charts.PHASES, *charts.SERIES):
        assert contrast(drawn, "page") >= 3, drawn


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict.SAFE, "Safe to resume"),
        (Verdict.OLDER, "an older one is"),
        (Verdict.NONE, "Nothing to resume from"),
        (Verdict.UNSAFE, "Not safe to resume"),
        (Verdict.CORRUPT, "No checkpoint is intact"),
    ],
)
def test_what_is_safe_now_stands_on_top(verdict: Verdict, words: str) -> None:
    facts = run_facts([record(1), record(2)])
    (one,) = facts.series
    path = one.path if verdict in (Verdict.SAFE, Verdict.OLDER) else None
    one = SeriesFacts(one.name, one.numbers, verdict, one.step, path, one.against)
    text = page.of_run(dataclasses.replace(facts, series=(one,)))
    top = text[: text.index("<figure>")]

    assert words in top
    assert ("/runs/alpha/checkpoint/step-100" in top) == (path is not None)
    assert ("Why not the newest" in top) == (path is not None)
    assert "error R004</strong>: a file is missing" in top


def test_a_run_that_never_saved_has_a_page() -> None:
    text = page.of_run(run_facts([], series=(), newest=None, rank_bytes={}))

    assert "Nothing was ever saved" in text
    assert "<figure>" not in text


def test_failures_are_told_with_rank_host_and_cause() -> None:
    text = usual_page()

    assert "rank 3 on node-1: OSError: No space left on device" in text
    assert "1 failed save, the newest first" in text


def test_a_wait_for_a_straggler_is_told() -> None:
    slow = record(2, gather_s=55.0)
    text = page.of_run(run_facts([record(1), slow, record(3)]))

    assert "Rank 0 waited long in 1 save" in text
    assert "55.0 s" in text
    assert "In no save did rank 0 wait for long" in page.of_run(run_facts([record(1)]))


def test_a_long_run_has_no_longer_page_than_a_short_one() -> None:
    def of(number: int) -> str:
        reason = "x" * 5000
        ranks = tuple({"rank": rank, "host": f"node-{rank}", "cause": reason} for rank in range(64))
        rows = [
            failed(n, reason=reason, failures=ranks) if n % 10 == 0 else record(n, gather_s=99.0)
            for n in range(1, number)
        ]
        return page.of_run(run_facts(rows, rank_bytes=dict.fromkeys(range(10_000), 5)))

    short, long = of(1000), of(10_000)

    assert len(long) < 1.1 * len(short)
    assert len(long) < 1_500_000
    assert "9,999 attempts to save" in long


def test_numbers_that_nobody_believes_break_no_chart() -> None:
    rows = [
        record(1, created_at=-1e300, committed_at=1e300, finished_at=1e300, stage_s=1e300, write_s=1e-300),
        record(2, step=2**63 - 1, bytes=2**63 - 1),
        record(3, state=CheckpointState.WRITING, created_at=0.0),
    ]

    assert "</html>" in page.of_run(run_facts(rows))
    assert "</html>" in page.of_run(run_facts(rows[:1], epochs=[]))


def test_a_drawing_is_plain() -> None:
    """Parsed once more as XML: no style, no font, no script, no name of matplotlib's own."""
    drawing = charts.timeline([figures.Lane("$a$ & <b>", [(1e9, 1)], [], [], [])], [1e9], (1e9, 2e9), "when")
    wide, narrow = ElementTree.fromstring(f"<p>{drawing}</p>")

    assert (wide.get("class"), narrow.get("class")) == ("wide", "narrow")
    names = {name for each in (wide, narrow) for element in each.iter() for name in element.attrib}
    assert names.isdisjoint({"style", "font-family", "{http://www.w3.org/1999/xlink}href"})
    assert "$a$ & <b>" in [element.text for element in wide.iter("text")]
    assert {element.get("id", "when-").split("-")[0] for element in wide.iter()} == {"when"}


def test_other_series_say_why_not_their_newest() -> None:
    text = page.of_run(run_facts([record(1), record(2, series="hf")]))
    table, _, after = text[text.index("<h2>Series</h2>") : text.index('id="timeline-title"')].partition("</table>")

    assert "hf" in table
    assert "<h3>hf</h3>" in after
    assert "R004" in after


def test_the_legend_says_that_the_fourth_colour_is_of_more_than_one_series() -> None:
    few, many = (page.of_run(run_facts([record(n, series=f"s{n}") for n in range(1, last)])) for last in (5, 7))

    assert ">s4 and others<" in many
    assert ">s4 and others<" not in few


def test_the_page_names_the_command_that_compares_every_byte_of_this_run() -> None:
    facts = run_facts([record(1)])
    one = dataclasses.replace(facts.series[0], deep="`ckptmgr check /runs/alpha --series checkpoint --deep`")

    text = page.of_run(dataclasses.replace(facts, series=(one,)))
    assert "<code>ckptmgr check /runs/alpha --series checkpoint --deep</code> compares every byte" in text


def test_a_bar_has_its_step_however_long_the_name_of_its_series() -> None:
    text = page.of_run(run_facts([record(1), record(21, series="a-series-with-a-rather-long-name-of-its-own")]))

    assert re.findall(r">(a-[\w-]*… ?2,100)<", text) == ["a-series-with-a-rather-… 2,100", "a-series-… 2,100"]
