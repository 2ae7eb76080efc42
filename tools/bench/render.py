"""Tables in Markdown and charts in SVG from a run's figures, and where they stand in the documentation."""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import targets
from bench.figures import Figure, Figures

_MIB, _GIB = 1 << 20, 1 << 30
#: The page is rewritten between these two lines; what stands around them stays.
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
#: Workload → in words.
WORKLOADS = {
    "train": "a model and its AdamW state",
    "export": "weights in bfloat16, as safetensors",
    "moe": "many tensors of 4 KiB",
}
#: Colours that can be read on white and on black.
_INK, _OURS, _FLOOR, _OTHER, _RANGE = "#7d8590", "#2f81f7", "#8b949e", "#d29922", "#6e7681"


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart: bars of one measure, one for each peer."""

    name: str
    title: str
    unit: str
    bars: Sequence[tuple[str, Figure]]


def report(figures: Figures) -> str:
    """Everything that is printed at the end of a run."""
    parts = [
        machine(figures), *(table for _, table in tables(figures)), "### Targets", targets_table(figures),
        notes(figures),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def write_docs(figures: Figures, page: Path) -> None:
    """
    Put the tables into *page* between the two lines that mark the place, and the charts into the folder of its name.

    Raises:
        ValueError: The page lacks the two lines.
    """
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has no lines {BEGIN} and {END}")
    folder = page.with_suffix("")
    folder.mkdir(exist_ok=True)
    drawn = {chart.name: chart for chart in charts(figures)}
    for path in folder.glob("*.svg"):
        path.unlink()
    for name, chart in drawn.items():
        (folder / f"{name}.svg").write_text(svg(chart), encoding="utf-8")
    parts = [machine(figures)]
    for name, table in tables(figures):
        parts.append(table)
        parts += [
            f"![{chart.title}]({folder.name}/{key}.svg)" for key, chart in drawn.items() if key.startswith(f"{name}-")
        ]
    parts += ["### Targets", targets_table(figures), notes(figures)]
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(before + BEGIN + "\n\n" + "\n\n".join(parts) + "\n\n" + END + after, encoding="utf-8")


# -- tables -----------------------------------------------------------------------------------------


def machine(figures: Figures) -> str:
    """What it ran on, and how noisy that was."""
    facts, noise = figures.results.machine, figures.results.noise
    lines = []
    if facts:
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines = [
            (
                f"{_day(facts)}: {facts['cores']} cores ({facts['processor']}), "
                f"{facts['memory_bytes'] / _GIB:.0f} GiB, Linux {facts['kernel']}, "
                f"{facts['filesystem']} on {facts['disk']}, Python {facts['python']}, "
                f"{versions}; ckptmgr at {facts['ckptmgr']}."
            ),
            *(
                f"{_day(again)}, ckptmgr at {again['ckptmgr']}: measured again, {'; '.join(again['workloads'])}."
                for again in facts.get("again", ())
            ),
        ]
    for word, unit in (("copy_mib_s", "one thread's copy"), ("durable_mib_s", "64 MiB written and synced")):
        values = [one[word] for one in noise if word in one]
        if values:
            found = Figure.of(values)
            lines.append(
                f"Noise, {unit}: {found.median:,.0f} MiB/s, {found.low:,.0f} to {found.high:,.0f} over {found.count} "
                "looks at the beginning of a round."
            )
    if options := figures.results.options:
        lines.append("Run with " + ", ".join(f"{name} {value}" for name, value in options.items()) + ".")
    return "\n".join(lines)


def _day(facts: Mapping[str, Any]) -> str:
    return datetime.fromtimestamp(facts["began"], UTC).strftime("%Y-%m-%d") if "began" in facts else "unknown day"


def tables(figures: Figures) -> Iterator[tuple[str, str]]:
    """The tables, each with the name that its charts begin with."""
    for workload, words in WORKLOADS.items():
        if not figures.peers(workload):
            continue
        size = figures.state_bytes(workload) or 0
        heading = f"### {workload.capitalize()}: {words}, {size / _MIB:,.0f} MiB"
        yield workload, f"{heading}\n\n{_saving(figures, workload)}\n\n{_beside(figures, workload)}"
    many = [_many(figures, name) for name in figures.workloads("moe ")]
    if many:
        yield "many", "### Very many tensors\n\n" + "\n".join(many)
    if figures.workloads("fsdp"):
        yield "ranks", f"### Several ranks, FSDP2\n\n{_ranks(figures)}"
    if figures.workloads("journal"):
        yield "journal", f"### A long history\n\n{_journal(figures)}"


def targets_table(figures: Figures) -> str:
    """Every target, what was measured, and whether it is met."""
    lines = ["| target | what | at most | measured | against | |", "|---|---|---:|---:|---|---|"]
    for verdict in targets.judge(figures):
        check = verdict.check
        measured = "–" if verdict.value is None else f"{_number(verdict.value)} {check.unit}".rstrip()
        word = f"**{verdict.word}**" if verdict.word == "NOT met" else verdict.word
        limit = f"{check.limit:g} {check.unit}".rstrip()
        lines.append(f"| {check.target} | {check.what} | {limit} | {measured} | {verdict.against} | {word} |")
    return "\n".join(lines) + "\n\n" + _in_short(figures)


def notes(figures: Figures) -> str:
    """What is to be known of the peers, and what was left out."""
    lines: dict[str, None] = {}
    for workload, peers in figures.results.peers.items():
        for peer, about in peers.items():
            if "problem" in about:
                lines[f"- {workload}, {peer}: **could not be measured to the end**: {_cell(about['problem'])}"] = None
            elif about.get("note"):
                lines[f"- {peer}: {_cell(about['note'])}"] = None
            if about.get("wrong_tensors"):
                lines[f"- {workload}, {peer}: **{about['wrong_tensors']} tensors were not those of the save**"] = None
    lines |= {f"- left out: {_cell(text)}": None for text in figures.results.skipped}
    return "\n".join(lines)


def _in_short(figures: Figures) -> str:
    """The targets by what became of them: one is met only if all its lines are."""
    words: dict[str, set[str]] = {}
    for verdict in targets.judge(figures):
        words.setdefault(verdict.check.target, set()).add(verdict.word)
    missed = [target for target, found in words.items() if "NOT met" in found]
    met = [target for target, found in words.items() if found == {"met"}]
    rest = [target for target in words if target not in missed and target not in met]
    parts = (("met", met), ("NOT met", missed), ("not measured to the end", rest))
    spelled = "; ".join(f"{word}: {', '.join(names) or 'none'}" for word, names in parts)
    return f"Of the targets as wholes, {spelled}."


def _saving(figures: Figures, workload: str) -> str:
    lines = [
        (
            "| peer | first stall s | stall s | × floor | stall min – max | complete s | durable s | × floor "
            "| durable min – max | synced by | snapshot | n |"
        ),
        "|---|---:|---:|---:|---|---:|---:|---:|---|---|---|---:|",
    ]
    for peer in _by(figures, workload, "stall_s"):
        about = figures.results.peers[workload][peer]
        stall, durable = (figures.get(workload, peer, word) for word in ("stall_s", "durable_s"))
        snapshot = {None: "–", 0: "right"}.get(about.get("wrong_tensors"), "**WRONG**")
        lines.append(
            _row(
                peer, _median(figures.get(workload, peer, "first_stall_s")), _median(stall),
                _against(figures, workload, peer, "stall_s"), _range(stall),
                _median(figures.get(workload, peer, "complete_s")), _median(durable),
                _against(figures, workload, peer, "durable_s"), _range(durable),
                "itself" if about.get("syncs") else "the bench", snapshot, str(stall.count if stall else 0),
            )
        )  # fmt: skip
    return "\n".join(lines)


def _beside(figures: Figures, workload: str) -> str:
    lines = [
        (
            "| peer | training slowed % [range] | training lost s [range] | × floor | n | extra memory, × state "
            "| written, × state | load warm s | × floor | load cold s | × floor |"
        ),
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    size = figures.state_bytes(workload) or 1
    for peer in _by(figures, workload, "lost_s"):
        lost, slowed = (figures.get(workload, peer, word) for word in ("lost_s", "slowed"))
        warm, cold = (figures.get(workload, peer, f"load_{kind}_s") for kind in ("warm", "cold"))
        lines.append(
            _row(
                peer,
                f"{slowed.median:.0%} [{slowed.low:.0%} … {slowed.high:.0%}]".replace("%", "") if slowed else "–",
                f"{_median(lost)} [{_range(lost)}]" if lost else "–",
                _against(figures, workload, peer, "lost_s"), str(lost.count if lost else 0),
                _median(figures.get(workload, peer, "extra_bytes"), size),
                _median(figures.get(workload, peer, "written_bytes"), size),
                _median(warm), _against(figures, workload, peer, "load_warm_s"),
                _median(cold), _against(figures, workload, peer, "load_cold_s"),
            )
        )  # fmt: skip
    for measure, words in (
        ("load_meanwhile_warm_s", "ckptmgr, bytes compared meanwhile, warm"),
        ("load_meanwhile_cold_s", "ckptmgr, bytes compared meanwhile, cold"),
        ("load_unverified_warm_s", "ckptmgr, bytes not compared, warm"),
        ("load_unverified_cold_s", "ckptmgr, bytes not compared, cold"),
        ("load_stock_warm_s", "stock dcp.load of ckptmgr's files, warm"),
    ):
        if (found := figures.get(workload, "ckptmgr", measure)) is not None:
            place = -2 if measure.endswith("cold_s") else -4
            cells = ["–"] * 10
            cells[place] = _median(found)
            lines.append(_row(words, *cells))
    return "\n".join(lines)


def _many(figures: Figures, workload: str) -> str:
    about = figures.results.peers[workload].get("ckptmgr", {})
    if "problem" in about:
        return f"{workload.split()[1]} tensors of 4 KiB: ckptmgr fails: {_cell(about['problem'])}"
    first, stall, durable = (
        _median(figures.get(workload, "ckptmgr", word)) for word in ("first_stall_s", "stall_s", "durable_s")
    )
    return (
        f"{int(workload.split()[1]):,} tensors of 4 KiB, with no more descriptors than a shell gives: ckptmgr stalls "
        f"the training for {first} s at the first save and {stall} s at the second, which is durable after {durable} s."
    )


def _ranks(figures: Figures) -> str:
    lines = [
        "| what | ranks | case | first stall s | stall s | × copy | min – max | durable s | min – max | n |",
        "|---|---:|---|---:|---:|---:|---|---:|---|---:|",
    ]
    names = [name for name in figures.results.peers if name.endswith(" ranks")]
    for workload in sorted(names, key=lambda name: (name.partition(", ")[0], name)):
        kind, _, world = workload.partition(", ")
        for peer in _by(figures, workload, "stall_s"):
            stall, durable = (figures.get(workload, peer, word) for word in ("stall_s", "durable_s"))
            lines.append(
                _row(
                    kind, world.split()[0], peer, _median(figures.get(workload, peer, "first_stall_s")), _median(stall),
                    _against(figures, workload, peer, "stall_s", "copy"), _range(stall), _median(durable),
                    _range(durable), str(stall.count if stall else 0),
                )
            )  # fmt: skip
    return "\n".join(lines)


def _journal(figures: Figures) -> str:
    columns = {
        "start_s": "start", "small_stall_s": "stall of a small save", "journal_on_thread_s": "journal on that thread",
        "small_durable_s": "small save, COMMITTED", "find_s": "find the newest", "small_resume_s": "resume of it",
        "listing_s": "the same by listing", "cli_latest_s": "`ckptmgr latest`", "cli_version_s": "`ckptmgr --version`",
        "python_s": "bare Python",
    }  # fmt: skip
    lines = [
        "| checkpoints held | " + " | ".join(f"{words}, ms" for words in columns.values()) + " |",
        "|---:|" + "---:|" * len(columns),
    ]
    for workload in figures.workloads("journal"):
        found = [figures.get(workload, "ckptmgr", measure) for measure in columns]
        lines.append(_row(workload.split()[1], *(_median(one, 1e-3) for one in found)))
    return "\n".join(lines)


# -- charts -----------------------------------------------------------------------------------------


def charts(figures: Figures) -> Iterator[Chart]:
    """One chart for each question."""
    questions = (
        ("stall", "stall_s", "the training waits"), ("first", "first_stall_s", "the training waits at the first save"),
        ("durable", "durable_s", "until durable"), ("lost", "lost_s", "training lost for each save"),
        ("memory", "extra_bytes", "peak memory beside the state"), ("load", "load_warm_s", "load, warm"),
        ("cold", "load_cold_s", "load, cold"),
    )  # fmt: skip
    for workload in WORKLOADS:
        for name, measure, words in questions:
            bars = [(peer, figures.get(workload, peer, measure)) for peer in figures.peers(workload)]
            known = sorted(((peer, found) for peer, found in bars if found is not None), key=lambda bar: bar[1].median)
            if not known:
                continue
            unit = "s"
            if measure == "extra_bytes":
                unit = "MiB"
                known = [
                    (peer, Figure(*(value / _MIB for value in (f.median, f.low, f.high)), f.count)) for peer, f in known
                ]
            yield Chart(f"{workload}-{name}", f"{workload}: {words}", unit, known)
    for measure, word, title in (("stall_s", "stall", "the training waits"), ("durable_s", "durable", "until durable")):
        bars = [
            (f"{workload.partition(', ')[2]}: {peer}", found)
            for workload in figures.workloads("fsdp, ")
            for peer in figures.peers(workload)
            if (measure == "stall_s" or peer != "copy") and (found := figures.get(workload, peer, measure))
        ]
        if bars:
            yield Chart(f"ranks-{word}", f"several ranks: {title}", "s", bars)
    bars = [
        (f"{workload.split()[1]}: {words}", Figure(*(v * 1e3 for v in (f.median, f.low, f.high)), f.count))
        for measure, words in (("small_durable_s", "save, COMMITTED"), ("find_s", "find newest"), ("listing_s", "list"))
        for workload in figures.workloads("journal")
        if (f := figures.get(workload, "ckptmgr", measure))
    ]
    if bars:
        yield Chart("journal-cost", "what a number of checkpoints held costs", "ms", bars)


def svg(chart: Chart) -> str:
    """A chart of horizontal bars: medians, with a line from the least to the most."""
    left, width, row, top = 190, 400, 22, 34
    highest = max(*(found.high for _, found in chart.bars), 1e-09)
    least = min((found.median for _, found in chart.bars if found.median > 0), default=highest)
    logarithmic = highest / least > 60
    begin = 10 ** math.floor(math.log10(least)) if logarithmic else 0.0

    def place(value: float) -> float:
        if not logarithmic:
            return width * max(value, 0.0) / highest
        span = math.log10(highest / begin)
        return width * max(0.0, math.log10(max(value, begin) / begin)) / (span or 1)

    height = top + row * len(chart.bars) + 8
    scale = f"{chart.unit}, logarithmic" if logarithmic else chart.unit
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 90} {height}" '
            f'font-family="system-ui, sans-serif" font-size="12" fill="{_INK}">'
        ),
        f"<title>{html.escape(chart.title)}</title>",
        f'<text x="0" y="16" font-size="14" font-weight="600">{html.escape(chart.title)} ({scale})</text>',
    ]
    for number, (peer, found) in enumerate(chart.bars):
        y = top + row * number
        colour = _OURS if "ckptmgr" in peer else _FLOOR if peer.startswith("floor") or "copy" in peer else _OTHER
        middle, end = place(found.median), place(found.high)
        parts += [
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{html.escape(peer)}</text>',
            f'<rect x="{left}" y="{y}" width="{max(1.0, middle):.1f}" height="15" rx="2" fill="{colour}"/>',
            (
                f'<line x1="{left + place(found.low):.1f}" x2="{left + end:.1f}" y1="{y + 7.5}" y2="{y + 7.5}" '
                f'stroke="{_RANGE}" stroke-width="1.5"/>'
            ),
            f'<text x="{left + max(end, middle) + 6:.1f}" y="{y + 12}">{_number(found.median)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


# -- words ------------------------------------------------------------------------------------------


def _by(figures: Figures, workload: str, measure: str) -> list[str]:
    """The peers of a workload: the floor, then from the least to the most, then those without a figure."""
    order = {peer: number for number, peer in enumerate(figures.peers(workload))}

    def place(peer: str) -> tuple[bool, float, int]:
        value = figures.median(workload, peer, measure)
        return peer != "floor", math.inf if value is None else value, order[peer]

    return sorted(order, key=place)


def _against(figures: Figures, workload: str, peer: str, measure: str, floor: str = "floor") -> str:
    found = figures.ratio(workload, measure, peer, (floor,))
    return f"{_number(found[0])}×" if found is not None else "–"


def _median(found: Figure | None, unit: float = 1.0) -> str:
    return _number(found.median / unit) if found is not None else "–"


def _range(found: Figure | None) -> str:
    return f"{_number(found.low)} – {_number(found.high)}" if found is not None else "–"


def _number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, 5)}f}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """Text of others on one line of a page: nothing in it is markup."""
    return re.sub(r"[|<>`*_\[\]\n]", " ", text)
