"""
The report as one HTML page: what is safe now on top, then how it came about.

It needs no network, no script and no font, and its policy forbids all three. Everything in it that anybody may
have written passes `safe`. Beside each chart stands what it shows as a sentence and as a table.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ckptmgr import durability
from ckptmgr.cli import describe
from ckptmgr.cli.output import age, size, timestamp
from ckptmgr.cli.report import charts, figures
from ckptmgr.cli.report.facts import RunFacts, SeriesFacts
from ckptmgr.errors import printable
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState
from ckptmgr.resume import Finding, Level, Verdict

#: How a file is recognised that may be overwritten. Never changes.
MARK = '<meta name="generator" content="ckptmgr report">'

#: What is shown at most; the rest is counted.
MOST_TEXT = 600
MOST_BARS = 20
MOST_BINS = 80
MOST_ROWS = 100
MOST_FAILURES = 40
MOST_RANKS = 16
MOST_MOMENTS = 240
MOST_LANES = 8

STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f5f6f8;--ink:#1b1f24;--muted:#5b6470;--grid:#dfe3e8;--link:#0b57a4;
--good:#1a6b3c;--bad:#b3261e;--warn:#8a5300;--stage:#c26a00;--write:#2364aa;--gather:#8452a1;--commit:#1d7f63;
--one:#2364aa;--two:#c26a00;--three:#1d7f63;--four:#8452a1}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--card:#1f242a;--ink:#e6e9ed;--muted:#a2acb8;--grid:#353c45;
--link:#8ec2ff;--good:#6fd39a;--bad:#ff8a80;--warn:#f2b84b;--stage:#f0a04b;--write:#6aa9f0;--gather:#c79be6;
--commit:#58c9a5;--one:#6aa9f0;--two:#f0a04b;--three:#58c9a5;--four:#c79be6}}
@media print{:root{color-scheme:light;--page:#fff;--card:#fff;--ink:#000;--muted:#444;--grid:#ccc;--link:#000;
--good:#1a6b3c;--bad:#b3261e;--warn:#8a5300;--stage:#c26a00;--write:#2364aa;--gather:#8452a1;--commit:#1d7f63;
--one:#2364aa;--two:#c26a00;--three:#1d7f63;--four:#8452a1}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--page);color:var(--ink);
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;margin:.2rem 0}h2{font-size:1.2rem;margin:2rem 0 .4rem}h3{font-size:1rem;margin:1rem 0 .3rem}
p{margin:.4rem 0}a{color:var(--link)}
code,.path{font-family:ui-monospace,"DejaVu Sans Mono",monospace;font-size:.92em}
.quiet{color:var(--muted)}.good{color:var(--good)}.bad{color:var(--bad)}.warn{color:var(--warn)}
.verdict{border:1px solid var(--grid);border-left:.5rem solid currentColor;border-radius:.4rem;
padding:.8rem 1rem;background:var(--card);margin:1rem 0}
.verdict>*{color:var(--ink)}.verdict>.word{color:inherit;font-weight:700;font-size:1.15rem}
.verdict .path{font-size:1rem;font-weight:600}.verdict ul{margin:.3rem 0;padding-left:1.2rem}
dl.numbers{display:grid;grid-template-columns:repeat(auto-fill,minmax(7.5rem,1fr));gap:.6rem;margin:1rem 0}
dl.numbers>div{background:var(--card);border:1px solid var(--grid);border-radius:.4rem;padding:.5rem .7rem}
dl.numbers dt{color:var(--muted);font-size:.85rem}
dl.numbers dd{margin:0;font-size:1.1rem;font-weight:600;white-space:nowrap}
td.good,td.warn,td.bad{min-width:6.5rem}
figure{margin:.6rem 0 1.2rem;break-inside:avoid}figcaption{margin-bottom:.4rem}
svg{display:block;width:100%;height:auto;font-family:inherit}svg.narrow{display:none}
@media screen and (max-width:40rem){svg.wide{display:none}svg.narrow{display:block;max-width:30rem}}
.scroll{overflow-x:auto;max-width:100%}
.scroll:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;width:100%;font-size:.9rem;overflow-wrap:normal}
caption{text-align:left;color:var(--muted);padding:.2rem 0}
th,td{text-align:left;vertical-align:top;padding:.25rem .6rem .25rem 0;border-bottom:1px solid var(--grid)}
th{white-space:nowrap}td.number,th.number{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td.long{min-width:14rem;overflow-wrap:anywhere}
td.when{white-space:nowrap}
ol.failures{list-style:none;padding:0;margin:0}
ol.failures>li{border-bottom:1px solid var(--grid);padding:.4rem 0;break-inside:avoid}
ol.failures ul{margin:.2rem 0;padding-left:1.2rem}
details{margin:.3rem 0}summary{cursor:pointer;color:var(--link)}
footer{margin-top:2rem;border-top:1px solid var(--grid);padding-top:.6rem;font-size:.9rem}
@media print{body{max-width:none;padding:0;font-size:.85rem}details::details-content{content-visibility:visible;
height:auto;display:block}summary{color:var(--muted);list-style:none}
.scroll{overflow:visible}table{font-size:.75rem}th,td.when,td.number{white-space:normal}
td.long,td.good,td.warn,td.bad{min-width:0}
tr,.verdict,dl.numbers>div{break-inside:avoid}h2,h3{break-after:avoid}}
"""
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
#: Nothing from anywhere, no script at all, of styles only the one above, and of images the empty icon.
POLICY = f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; img-src data:; base-uri 'none'; form-action 'none'"

_WORDS = {
    Verdict.SAFE: ("good", "Safe to resume"),
    Verdict.OLDER: ("warn", "The newest is not safe; an older one is"),
    Verdict.NONE: ("warn", "Nothing to resume from yet"),
    Verdict.UNSAFE: ("bad", "Not safe to resume"),
    Verdict.CORRUPT: ("bad", "No checkpoint is intact"),
}
_LEVELS = {Level.ERROR: "bad", Level.WARNING: "warn", Level.INFO: "quiet"}
_STATES = {CheckpointState.COMMITTED: "good", CheckpointState.FAILED: "bad"}

Cell = str | tuple[str, str]


def safe(text: str, *, most: int = MOST_TEXT) -> str:
    """*text* for HTML: on one line, control characters spelled out, markup escaped, not longer than *most*."""
    plain = printable(text).replace("\n", " ")
    return html.escape(plain if len(plain) <= most else plain[: most - 1] + "…")


def of_run(facts: RunFacts, *, refresh: str = "", nav: str = "") -> str:
    """
    The whole page.

    Args:
        facts: Of the run.
        refresh: A ``meta`` element that lets the page load itself again; empty for a file.
        nav: HTML that stands above all else: the way to other pages.
    """
    parts = [
        _head(facts),
        *(_verdict(one, facts) for one in facts.series[:1]),
        '<p class="verdict warn"><span class="word">Nothing was ever saved</span></p>' if not facts.series else "",
        _numbers(facts),
        _series(facts),
    ]
    if facts.records:
        parts += [_timeline(facts), _phases(facts), *(_over_steps(facts, chart) for chart in _BY_STEP)]
        parts += [_stragglers(facts), _failures(facts), _disk(facts), _checkpoints(facts)]
    parts += [_starts(facts), _foot(facts)]
    return document(f"{facts.name}: checkpoints", "\n".join(filter(None, parts)), refresh=refresh, nav=nav)


def document(title: str, body: str, *, refresh: str = "", nav: str = "") -> str:
    """A page with the style and the policy of all of ours."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{MARK}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"{refresh}<title>{safe(title, most=200)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"{nav}<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(facts: RunFacts) -> str:
    live = "a manager is at work on it" if facts.live_epoch is not None else "no manager is at work on it"
    return (
        f"<h1>{safe(facts.name)}</h1>\n"
        f'<p class="quiet"><span class="path">{safe(facts.directory)}</span>, seen '
        f"{_when(facts.seen_at)}; {live}.</p>"
    )


# -- what is safe now -------------------------------------------------------------------------------


def _verdict(one: SeriesFacts, facts: RunFacts) -> str:
    assert one.verdict is not None
    kind, word = _WORDS[one.verdict]
    lines = [f'<p class="word">{word}</p>']
    if one.path is not None:
        ago = ""
        record = next((r for r in facts.records if r.is_live and (r.series, r.step) == (one.name, one.step)), None)
        if record is not None and record.committed_at is not None:
            ago = f", committed {age(facts.seen_at - record.committed_at)} ago"
        lines.append(
            f'<p>Resume from step {one.step:,}{ago}:<br><code class="path">{safe(one.path, most=4096)}</code></p>'
        )
    if one.against:
        lines.append(f"<p>Why {'not the newest' if one.path is not None else 'none'}:</p>{_findings(one.against)}")
    if one.besides:
        lines.append(f"<p>Also worth knowing:</p>{_findings(one.besides)}")
    if one.path is not None:
        lines.append(
            '<p class="quiet">Names and sizes of all files were compared with what was committed; '
            f"{with_code(one.deep)} compares every byte.</p>"
        )
    return f'<section class="verdict {kind}" aria-label="What is safe now">{"".join(lines)}</section>'


def verdict_words(verdict: Verdict | None) -> tuple[str, str]:
    """A verdict as a class of the style, and in words; None if nobody was asked."""
    return _WORDS[verdict] if verdict is not None else ("quiet", "-")


def _findings(findings: Sequence[Finding]) -> str:
    items = [
        f'<li><strong class="{_LEVELS[one.level]}">{one.level.value} {safe(one.id)}</strong>: {safe(one.text)}'
        + (f'<br><span class="quiet">{with_code(one.hint)}</span>' if one.hint else "")
        + "</li>"
        for one in findings[:10]
    ]
    more = f"<li>and {len(findings) - 10} more</li>" if len(findings) > 10 else ""
    return f"<ul>{''.join(items)}{more}</ul>"


def with_code(hint: str) -> str:
    """A hint, with what stands in backticks set as something to type."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", safe(hint))


def _numbers(facts: RunFacts) -> str:
    if not facts.series:
        return ""
    one = facts.series[0]
    known = one.numbers
    since = known.get("seconds_since_commit")
    cards = [
        ("since the last commit", age(since) if since is not None else "never"),
        ("steps at risk", f"{known['steps_at_risk']:,.0f}"),
        ("save to committed", charts.took(known.get("commit_lag_seconds"))),
        ("copying the state", charts.took(known.get("stall_seconds"))),
        ("commits", f"{known['commits_total']:,.0f}"),
        ("failed saves", f"{known['failures_total']:,.0f}"),
        ("on disk", size(int(known["live_bytes"]))),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{safe(value)}</dd></div>" for name, value in cards)
    about = f"Durability of series {safe(one.name)}"
    return f'<section aria-label="{about}"><dl class="numbers">{items}</dl></section>'


def _series(facts: RunFacts) -> str:
    if len(facts.series) < 2:
        return ""
    rows: list[list[Cell]] = []
    for one in facts.series[:MOST_ROWS]:
        rows.append(
            [
                safe(one.name),
                verdict_words(one.verdict),
                ("number", f"{one.step:,}" if one.step is not None else "-"),
                ("number", f"{one.numbers['commits_total']:,.0f}"),
                ("number", f"{one.numbers['failures_total']:,.0f}"),
                ("number", f"{one.numbers['steps_at_risk']:,.0f}"),
                ("number", charts.took(one.numbers.get("commit_lag_seconds"))),
                ("number", size(int(one.numbers["live_bytes"]))),
            ]
        )
    head = ["series", "verdict", "step", "commits", "failed", "steps at risk", "save to committed", "on disk"]
    # Of the first one they stand on top.
    findings = "".join(
        f"<h3>{safe(one.name)}</h3>{_findings((*one.against, *one.besides))}"
        for one in facts.series[1:]
        if one.against or one.besides
    )
    return "<h2>Series</h2>" + data_table("What may be resumed, series by series", head, rows) + findings


# -- charts -----------------------------------------------------------------------------------------


def _timeline(facts: RunFacts) -> str:
    within = figures.span(facts.records, [epoch.started_at for epoch in facts.epochs])
    if within is None:
        return ""
    shown = facts.series[:MOST_LANES]
    lanes = [
        figures.lane(one.name, [r for r in facts.records if r.series == one.name], within, most=MOST_MOMENTS)
        for one in shown
    ]
    known = [at for at in (figures.moment(epoch.started_at) for epoch in facts.epochs) if at is not None]
    starts = [at for at, _ in figures.thinned(known, within, most=60)]
    rows: list[list[Cell]] = []
    for one in facts.series[:MOST_ROWS]:
        mine = [record for record in facts.records if record.series == one.name]
        counts = Counter(
            "on disk" if record.is_live else "retired" if record.committed_at else record.state for record in mine
        )
        flying = sum(record.is_in_flight for record in mine)
        rows.append(
            [
                safe(one.name),
                ("when", _when(mine[0].created_at)),
                ("when", _when(mine[-1].finished_at or mine[-1].created_at)),
                *(("number", f"{counts[word]:,}") for word in ("on disk", "retired", CheckpointState.FAILED)),
                ("number", f"{flying:,}"),
            ]
        )
    failed = sum(record.state is CheckpointState.FAILED for record in facts.records)
    said = (
        f"{_count(len(facts.records), 'attempt')} to save between {_when(within[0])} and {_when(within[1])}; "
        f"{_count(failed, 'failed save')}; {_count(len(facts.epochs), 'start')} of a manager or a command that "
        "changes the run, each a dashed line."
    )
    head = ["series", "first", "last", "on disk", "retired", "failed", "in flight"]
    drawing = charts.timeline(lanes, starts, within, "timeline")
    return _figure("timeline", "When", said, drawing, data_table("By series", head, rows))


def _phases(facts: RunFacts) -> str:
    newest = list(reversed(facts.records[-MOST_BARS:]))
    bars: list[charts.Bar] = []
    rows: list[list[Cell]] = []
    alone = len(facts.series) == 1
    for record in newest:
        phases = [
            figures.seconds(value) for value in (record.stage_s, record.write_s, record.gather_s, record.commit_s)
        ]
        lag = figures.seconds(durability.commit_lag(record))
        label, step = ("", f"{record.step:,}") if alone else (printable(record.series), f" {record.step:,}")
        if record.state is CheckpointState.COMMITTED:
            said, role = charts.took(lag), "ink"
        elif record.state is CheckpointState.FAILED:
            said, role = "failed", "bad"
        else:
            said, role = record.state.value.lower(), "warn"
        bars.append(charts.Bar(label, step, [value or 0.0 for value in phases], lag, said, role))
        rows.append(
            [
                safe(record.series),
                ("number", f"{record.step:,}"),
                _state(record),
                *(("number", charts.took(value)) for value in (*phases, lag)),
            ]
        )
    said = (
        f"The newest {_count(len(newest), 'attempt')}, the newest on top: copying the state (stage) and writing it, "
        "each of the slowest rank; rank 0 waiting for the others (gather); publishing (commit). The mark is when it "
        "was committed: before the end of the bar where phases overlap, after it where a rank waited for its turn to "
        "write. Of a failed save the journal has no durations."
    )
    lags = [bar.committed_s for bar in bars if bar.committed_s is not None]
    if lags:
        said += f" From save to committed it took between {charts.took(min(lags))} and {charts.took(max(lags))}."
    table = data_table("Seconds of each phase", ["series", "step", "state", *charts.PHASES, "save to committed"], rows)
    return _figure("phases", "Phases of the newest saves", said, charts.phases(bars, "phases"), table)


class _ByStep(NamedTuple):
    """A chart of one value of each checkpoint, by step."""

    name: str
    title: str
    said: str
    value: Callable[[CheckpointRecord], float | None]
    unit: Callable[[float], str]


_STALL = (
    "Seconds of copying the state to host memory, the slowest rank. Where the capture overlaps with training, the "
    "training waits for less of it."
)
_BY_STEP = (
    _ByStep(
        "stall", "How long training stood still", _STALL, lambda record: figures.seconds(record.stage_s), charts.took
    ),
    _ByStep(
        "throughput",
        "Throughput",
        "Bytes of a checkpoint by the seconds that its slowest rank wrote, all ranks together.",
        durability.throughput,
        lambda value: f"{size(int(value))}/s",
    ),
    _ByStep(
        "lag",
        "From save to committed",
        "Seconds until a checkpoint was safe: all steps until then would have been lost.",
        lambda record: figures.seconds(durability.commit_lag(record)),
        charts.took,
    ),
)


def _over_steps(facts: RunFacts, chart: _ByStep) -> str:
    name, title, said, value, unit = chart
    found = []
    for one in facts.series[:MOST_LANES]:
        mine = [record for record in facts.records if record.series == one.name]
        if bins := figures.binned(mine, value, most=MOST_BINS):
            found.append((one.name, bins))
    if not found:
        return f"<h2>{title}</h2><p>The journal has no numbers for this yet.</p>"
    rows: list[list[Cell]] = [
        [
            safe(series),
            ("number", f"{b.first_step:,}" + (f" to {b.last_step:,}" if b.last_step != b.first_step else "")),
            ("number", f"{b.count:,}"),
            *(("number", unit(v)) for v in (b.low, b.middle, b.high)),
        ]
        for series, bins in found
        for b in bins
    ]
    least, most = min(b.low for _, bins in found for b in bins), max(b.high for _, bins in found for b in bins)
    said += f" Between {unit(least)} and {unit(most)}"
    if any(b.count > 1 for _, bins in found for b in bins):
        said += "; a point is the median of several checkpoints, its line from the least to the most"
    head = ["series", "steps", "checkpoints", "least", "median", "most"]
    table = data_table("By steps", head, rows)
    return _figure(name, title, said + ".", charts.over_steps(found, unit, name), table)


def _stragglers(facts: RunFacts) -> str:
    text = (
        "<h2>Stragglers</h2><p>The journal has no clock of each rank. It has how long rank 0, after its own writing, "
        "waited for the slowest one (gather), who failed or fell silent, and who wrote how much.</p>"
    )
    waits = [
        (waited, record)
        for record in facts.records
        if (waited := figures.seconds(record.gather_s)) is not None and waited > max(1.0, 0.25 * (record.write_s or 0))
    ]
    waits.sort(key=lambda pair: -pair[0])
    if waits:
        rows: list[list[Cell]] = [
            [
                safe(r.series),
                ("number", f"{r.step:,}"),
                ("number", charts.took(waited)),
                ("number", charts.took(r.write_s)),
            ]
            for waited, r in waits[:MOST_RANKS]
        ]
        about = f"Rank 0 waited long in {_count(len(waits), 'save')}, the longest first"
        text += data_table(about, ["series", "step", "waited", "writing took"], rows)
    else:
        text += "<p>In no save did rank 0 wait for long.</p>"
    who: Counter[tuple[str, str]] = Counter()
    silent: Counter[tuple[str, str]] = Counter()
    for record in facts.records:
        for failure in record.failures:
            rank = str(failure.get("rank")), str(failure.get("host") or "unknown host")
            who[rank] += 1
            silent[rank] += bool(failure.get("silent"))
    if who:
        rows = [
            [("number", safe(key[0], most=20)), safe(key[1]), ("number", f"{n:,}"), ("number", f"{silent[key]:,}")]
            for key, n in who.most_common(MOST_RANKS)
        ]
        text += data_table("Ranks that failed, most often first", ["rank", "host", "failures", "silent"], rows)
    if facts.newest is not None and len(facts.rank_bytes) > 1:
        stretches = figures.share(sorted(facts.rank_bytes.items()), most=64)
        counts = facts.rank_bytes.values()
        said = (
            f"Bytes that each rank wrote of the newest committed checkpoint, {safe(facts.newest.series)} step "
            f"{facts.newest.step:,}: between {size(min(counts))} and {size(max(counts))}. "
            "Who writes much is waited for."
        )
        rows = [
            [
                ("number", f"{first:,}" + (f" to {last:,}" if last != first else "")),
                ("number", size(least)),
                ("number", size(most)),
            ]
            for first, last, least, most in stretches
        ]
        drawing = charts.by_rank(stretches, "ranks")
        table = data_table("Bytes", ["rank", "least", "most"], rows)
        text += _figure("ranks", "Bytes by rank", said, drawing, table, level=3)
    return text


def _failures(facts: RunFacts) -> str:
    failed = [record for record in facts.records if record.state is CheckpointState.FAILED]
    if not failed:
        return "<h2>Failures</h2><p>No save has failed.</p>"
    shown = "".join(f"<li>{_failure(record)}</li>\n" for record in reversed(failed[-MOST_FAILURES:]))
    more = f"; the newest {MOST_FAILURES} are shown" if len(failed) > MOST_FAILURES else ""
    about = f"{_count(len(failed), 'failed save')}, the newest first{more}"
    return f'<h2>Failures</h2><p class="quiet">{about}</p><ol class="failures">{shown}</ol>'


def _failure(record: CheckpointRecord) -> str:
    ranks = "".join(map(_rank_failure, record.failures[:MOST_RANKS]))
    if len(record.failures) > MOST_RANKS:
        ranks += f"<li>and {len(record.failures) - MOST_RANKS:,} ranks more</li>"
    return (
        f"<strong>{safe(record.series)} step {record.step:,}</strong> "
        f'<span class="quiet">attempt {record.id:,}, {_when(record.finished_at)}</span><br>'
        f'<span class="bad">{safe(record.reason or "no reason recorded")}</span>'
        + (f"<ul>{ranks}</ul>" if ranks else "")
    )


def _rank_failure(failure: Mapping[str, Any]) -> str:
    rank, host = str(failure.get("rank")), str(failure.get("host") or "unknown host")
    silent = " (silent)" if failure.get("silent") else ""
    cause = safe(str(failure.get("cause") or ""))
    return f"<li>rank {safe(rank, most=20)} on {safe(host, most=100)}: {cause}{silent}</li>"


def _disk(facts: RunFacts) -> str:
    names = [one.name for one in facts.series[: len(charts.SERIES)]]
    within = figures.span(facts.records)
    until = facts.seen_at if facts.live_epoch is not None or within is None else within[1]
    points = figures.disk_use(facts.records, names, until, most=MOST_MOMENTS)
    if not points:
        return ""
    if len(facts.series) > len(names):
        names[-1] += " and others"
    most = max(points, key=lambda point: sum(point[1]))
    said = (
        f"Committed checkpoints on disk, from their commit until they were deleted. {size(sum(points[-1][1]))} at the "
        f"end; at most {size(sum(most[1]))}, at {_when(most[0])}. What is in flight comes on top."
    )
    step = max(1, len(points) // 60)
    rows: list[list[Cell]] = [
        [("when", _when(at)), *(("number", size(count)) for count in counts), ("number", size(sum(counts)))]
        for at, counts in points[::step]
    ]
    head = ["from", *map(safe, names), "together"]
    table = data_table("Bytes on disk from each moment on", head, rows)
    return _figure("disk", "Space", said, charts.disk(points, names, "disk"), table)


# -- tables -----------------------------------------------------------------------------------------


def _checkpoints(facts: RunFacts) -> str:
    there = [record for record in facts.records if record.is_live or record.is_in_flight]
    rows: list[list[Cell]] = []
    for record in reversed(there[-MOST_ROWS:]):
        why = describe.why(record, facts.decisions, facts.origins, live_epoch=facts.live_epoch)
        rows.append(
            [
                safe(record.series),
                ("number", f"{record.step:,}"),
                _state(record),
                ("when", _when(record.committed_at or record.created_at)),
                ("number", size(record.bytes) if record.bytes else "-"),
                ("number", charts.took(durability.commit_lag(record))),
                ("long", safe(why) or "-"),
            ]
        )
    about = f"{_count(len(there), 'checkpoint')} on disk or in flight, the newest first"
    if len(there) > MOST_ROWS:
        about += f"; the newest {MOST_ROWS} are shown"
    head = ["series", "step", "state", "time", "size", "save to committed", "why kept"]
    return "<h2>Checkpoints</h2>" + data_table(about, head, rows)


def _starts(facts: RunFacts) -> str:
    rows: list[list[Cell]] = [
        [
            ("number", f"{epoch.epoch:,}"),
            ("when", _when(epoch.started_at)),
            ("when", _when(epoch.ended_at) if epoch.ended_at is not None else "not ended"),
            safe(epoch.host, most=100),
            ("number", str(epoch.pid)),
            ("long", safe(epoch.command)),
        ]
        for epoch in reversed(facts.epochs[-MOST_RANKS:])
    ]
    if not rows:
        return ""
    about = f"{_count(len(facts.epochs), 'epoch')}, the newest first"
    return "<h2>Starts</h2>" + data_table(about, ["epoch", "started", "ended", "host", "pid", "command"], rows)


def _foot(facts: RunFacts) -> str:
    return (
        '<footer class="quiet"><p>Made by <code>ckptmgr report</code> from the journal '
        f'<span class="path">{safe(facts.journal)}</span> of run <span class="path">{safe(facts.run_id)}</span>. '
        "Times are UTC, sizes in powers of ten. The journal knows the step of each save and nothing of the steps "
        "since: steps at risk are those up to the newest attempt.</p></footer>"
    )


# -- pieces -----------------------------------------------------------------------------------------


def _figure(name: str, title: str, said: str, drawing: str, table: str, *, level: int = 2) -> str:
    return (
        f'<h{level} id="{name}-title">{title}</h{level}>\n<figure><figcaption id="{name}-text">{said}</figcaption>'
        f"{drawing}\n<details><summary>{title} as a table</summary>{table}</details></figure>"
    )


def data_table(about: str, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table that scrolls by itself where it is too wide. *about* and *head* are HTML, and so are the cells."""

    def cell(content: Cell) -> str:
        kind, text = content if isinstance(content, tuple) else ("", content)
        return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"

    kinds = [content[0] if isinstance(content, tuple) else "" for content in rows[0]] if rows else [""] * len(head)
    titles = "".join(
        f'<th scope="col"{" class=number" if kind == "number" else ""}>{title}</th>'
        for title, kind in zip(head, kinds, strict=True)
    )
    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>\n" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{about}"><table><caption>{about}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>\n{lines}</tbody></table></div>"
    )


def _state(record: CheckpointRecord) -> Cell:
    word = describe.retirement(record)
    return ("quiet", word) if word else (_STATES.get(record.state, "warn"), record.state.value)


def _when(at: float | None) -> str:
    return "-" if at is None else safe((timestamp(at, timespec="seconds") or "-").replace("T", " ").replace("Z", ""))


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
