"""
Charts as SVG that stands in a page: the one door for matplotlib.

Each chart is drawn twice, for a wide and for a narrow page, since text that is scaled down cannot be read. Colours
are names that the page's style gives a value to, one in the light and one in the dark; nothing else in a drawing
is styled, has a font of its own, or a name that another drawing could have as well. Without a script.
"""

from __future__ import annotations

import dataclasses
import io
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from xml.etree import ElementTree

from ckptmgr.cli.output import duration, size
from ckptmgr.cli.report.figures import Bin, Lane
from ckptmgr.errors import MissingLibrary

try:
    import matplotlib
    from matplotlib import dates, ticker
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingLibrary(
        f"drawing needs matplotlib, which cannot be imported: {error}",
        hint="pip install 'ckptmgr[report]'",
        library="matplotlib",
        extra="report",
    ) from error

#: What a colour is for → the placeholder that matplotlib draws with. The page gives each its value.
ROLES = {
    role: f"#0000{number:02x}"
    for number, role in enumerate(
        ("ink", "muted", "grid", "bad", "warn", "stage", "write", "gather", "commit", "one", "two", "three", "four"),
        start=1,
    )
}
PHASES = ("stage", "write", "gather", "commit")
#: Of the first four series; the others share the last.
SERIES = ("one", "two", "three", "four")

_WIDE, _NARROW = 880, 350
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ckptmgr",
    "path.simplify": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "text.parse_math": False,
    "text.color": ROLES["ink"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": ROLES["muted"],
    "axes.labelcolor": ROLES["ink"],
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": ROLES["grid"],
    "grid.linewidth": 1,
    "xtick.color": ROLES["muted"],
    "ytick.color": ROLES["muted"],
    "xtick.labelcolor": ROLES["ink"],
    "ytick.labelcolor": ROLES["ink"],
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.frameon": False,
    "legend.fontsize": 12,
    "legend.borderaxespad": 0.2,
    "date.autoformatter.hour": "%H:%M",
    "timezone": "UTC",
}
#: matplotlib's settings are the process's, and the pages of `serve` are made by threads.
_DRAWING = threading.Lock()
_NAMESPACE = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_LONG_NUMBER = re.compile(r"(\d+\.\d{2})\d+")


def timeline(lanes: Sequence[Lane], starts: Sequence[float], within: tuple[float, float], name: str) -> str:
    """When attempts ended, a lane for each series, with a line where a manager started."""

    def draw(axes: Axes, narrow: bool) -> None:
        for at in starts:
            axes.axvline(_day(at), color=ROLES["muted"], linewidth=1, linestyle=(0, (4, 3)))
        for place, lane in enumerate(lanes):
            colour = ROLES[SERIES[min(place, 3)]]
            for marks, marker, area, ink in (
                (lane.gone, "|", 60, ROLES["muted"]),
                (lane.kept, "|", 400, colour),
                (lane.in_flight, ">", 50, ROLES["warn"]),
                (lane.failed, "x", 45, ROLES["bad"]),
            ):
                axes.scatter(
                    [_day(at) for at, _ in marks], [place] * len(marks), marker=marker, s=area, c=ink, linewidths=2
                )
        axes.set_yticks(range(len(lanes)), [_short(lane.series, 12 if narrow else 28) for lane in lanes])
        axes.set_ylim(len(lanes) - 0.4, -0.6)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        low, high = within
        axes.set_xlim(_day(low - 0.02 * (high - low)), _day(high + 0.02 * (high - low)))
        _time_axis(axes, narrow)
        _legend(
            axes,
            narrow,
            marks=[
                ("|", ROLES["one"], "committed, on disk"),
                ("|", ROLES["muted"], "retired"),
                ("x", ROLES["bad"], "failed"),
                (">", ROLES["warn"], "in flight"),
            ],
        )

    return drawn(name, draw, height=110 + 40 * len(lanes), narrow_height=150 + 40 * len(lanes))


@dataclasses.dataclass(frozen=True)
class Bar:
    """One attempt: its name, seconds of each of `PHASES` and until it was committed, and what to say at its end."""

    label: str
    step: str
    took: Sequence[float]
    committed_s: float | None
    said: str
    role: str


def phases(bars: Sequence[Bar], name: str) -> str:
    """How long each phase of some attempts took, the first on top, with a mark where it was committed."""

    def draw(axes: Axes, narrow: bool) -> None:
        places = range(len(bars))
        left = [0.0] * len(bars)
        for number, phase in enumerate(PHASES):
            width = [bar.took[number] for bar in bars]
            axes.barh(places, width, left=left, height=0.66, color=ROLES[phase], linewidth=0)
            left = [start + more for start, more in zip(left, width, strict=True)]
        # One that recovery has committed after a day would leave nothing to see of the others.
        most = 3 * max([*left, 1e-9])
        marks = [
            (place, bar.committed_s)
            for place, bar in enumerate(bars)
            if bar.committed_s is not None and bar.committed_s <= most
        ]
        axes.vlines(
            [at for _, at in marks], [place - 0.42 for place, _ in marks], [place + 0.42 for place, _ in marks],
            colors=ROLES["ink"], linewidth=2,
        )  # fmt: skip
        for place, at in marks:
            left[place] = max(left[place], at)
        longest = max([*left, 1e-9])
        for place, bar in enumerate(bars):
            axes.text(left[place] + 0.015 * longest, place, bar.said, va="center", color=ROLES[bar.role], fontsize=12)
        axes.set_yticks(places, [_short(bar.label, 16 if narrow else 30, whole=bar.step) for bar in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_xlim(0, longest * (1.45 if narrow else 1.18))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(3 if narrow else 7))
        axes.xaxis.set_major_formatter(_seconds)
        _legend(
            axes, narrow, blocks=[(ROLES[phase], phase) for phase in PHASES], marks=[("|", ROLES["ink"], "committed")]
        )

    return drawn(name, draw, height=90 + 22 * len(bars), narrow_height=130 + 22 * len(bars))


def over_steps(series: Sequence[tuple[str, Sequence[Bin]]], unit: Callable[[float], str], name: str) -> str:
    """Values by step: the median of each bin as a point, and a line from its least to its most."""

    def draw(axes: Axes, narrow: bool) -> None:
        for place, (_, bins) in enumerate(series):
            colour = ROLES[SERIES[min(place, 3)]]
            at = [(each.first_step + each.last_step) / 2 for each in bins]
            axes.vlines(at, [b.low for b in bins], [b.high for b in bins], colors=colour, linewidth=2, alpha=0.45)
            axes.scatter(at, [b.middle for b in bins], s=24, marker="os^D"[min(place, 3)], c=colour, linewidths=0)
        axes.set_ylim(0, max([b.high for _, bins in series for b in bins] + [1e-9]) * 1.08)
        axes.set_xlabel("step")
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(3 if narrow else 8, integer=True))
        axes.xaxis.set_major_formatter(_steps)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: unit(max(0.0, value))))
        _legend_of_series(axes, narrow, [each for each, _ in series], "os^D")

    return drawn(name, draw, height=260, narrow_height=240)


def disk(points: Sequence[tuple[float, Sequence[int]]], names: Sequence[str], name: str) -> str:
    """Bytes on disk over time, the series on top of each other."""

    def draw(axes: Axes, narrow: bool) -> None:
        at = [_day(moment) for moment, _ in points]
        below = [0.0] * len(points)
        for place in range(len(names)):
            above = [low + values[place] for low, (_, values) in zip(below, points, strict=True)]
            axes.fill_between(at, below, above, step="post", color=ROLES[SERIES[min(place, 3)]], linewidth=0)
            below = above
        axes.set_ylim(0, max([*below, 1.0]) * 1.08)
        axes.set_xlim(at[0], at[-1] if at[-1] > at[0] else at[0] + 1 / 86400)
        axes.grid(axis="y")
        axes.yaxis.set_major_locator(ticker.MaxNLocator(5))
        axes.yaxis.set_major_formatter(_bytes)
        _time_axis(axes, narrow)
        _legend(axes, narrow, blocks=[(ROLES[SERIES[min(n, 3)]], _short(each, 24)) for n, each in enumerate(names[:4])])

    return drawn(name, draw, height=260, narrow_height=240)


def by_rank(stretches: Sequence[tuple[int, int, int, int]], name: str) -> str:
    """Bytes that each rank, or each stretch of ranks, wrote: a bar to the most, and a line from the least."""

    def draw(axes: Axes, narrow: bool) -> None:
        at = [(first + last) / 2 for first, last, *_ in stretches]
        wide = stretches[0][1] - stretches[0][0] + 1
        axes.bar(at, [most for *_, most in stretches], width=0.8 * wide, color=ROLES["one"], linewidth=0)
        if any(least != most for *_, least, most in stretches):
            axes.hlines(
                [least for *_, least, _ in stretches], [x - 0.4 * wide for x in at], [x + 0.4 * wide for x in at],
                colors=ROLES["ink"], linewidth=2,
            )  # fmt: skip
        axes.set_ylim(0, max(1, *(most for *_, most in stretches)) * 1.08)
        axes.set_xlabel("rank")
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(4 if narrow else 16, integer=True))
        axes.xaxis.set_major_formatter(_steps)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4))
        axes.yaxis.set_major_formatter(_bytes)

    return drawn(name, draw, height=210, narrow_height=210)


def drawn(name: str, draw: Callable[[Axes, bool], None], *, height: int, narrow_height: int) -> str:
    """
    The two drawings of one chart, wide and narrow.

    Args:
        name: Letters, digits and hyphens that no other chart of the page has; ``name-title`` and ``name-text``
            are elements of the page that name and describe it.
        draw: Draws on axes, and is told whether they are narrow.
        height: Of the wide one, in CSS pixels.
        narrow_height: Of the other.
    """
    found = []
    with _DRAWING, matplotlib.rc_context(_STYLE):
        for kind, width, tall in (("wide", _WIDE, height), ("narrow", _NARROW, narrow_height)):
            figure = Figure(figsize=(width / 72, tall / 72), dpi=72, layout="constrained")
            draw(figure.subplots(), kind == "narrow")
            written = io.StringIO()
            figure.savefig(written, format="svg", metadata={"Date": None})
            found.append(_plain(written.getvalue(), name, kind))
    return "".join(found)


def _plain(text: str, name: str, kind: str) -> str:
    """An SVG of matplotlib without what would not do in a page: styles, fonts, names, metadata."""
    root = ElementTree.fromstring(text)  # noqa: S314 - matplotlib has just made it
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_NAMESPACE}metadata", f"{_NAMESPACE}style"):
                parent.remove(child)
    used = set(re.findall(r"#([\w-]+)[\")]", text))
    for element in root.iter():
        for key, value in _attributes(element):
            element.set(key, _colour(_LONG_NUMBER.sub(r"\1", value)))
        own = element.attrib.pop("id", None)
        if own in used:
            element.set("id", f"{name}-{kind}-{own}")
        if (href := element.attrib.pop(_HREF, None)) is not None:
            element.set("href", f"#{name}-{kind}-{href[1:]}")
        if "clip-path" in element.attrib:
            element.set("clip-path", element.attrib["clip-path"].replace("#", f"#{name}-{kind}-"))
        element.tag = element.tag.removeprefix(_NAMESPACE)
        element.tail = None
        if element.text is not None and not element.text.strip():
            element.text = None
    box = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"class": kind, "viewBox": box, "role": "img", "aria-labelledby": f"{name}-title {name}-text"})
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(element: ElementTree.Element) -> Iterable[tuple[str, str]]:
    """Its attributes, what its style says among them; a font but for its size is the page's."""
    style = element.attrib.pop("style", "")
    found = dict(element.attrib)
    for one in filter(None, map(str.strip, style.split(";"))):
        key, _, value = one.partition(":")
        if key == "font":
            found["font-size"] = value.split("px")[0].split()[-1]
        elif not key.startswith("font"):
            found[key] = value.strip()
        elif key == "font-size":
            found[key] = value.strip().removesuffix("px")
    return found.items()


def _colour(value: str) -> str:
    return f"var(--{_NAME_OF[value]})" if value in _NAME_OF else value


_NAME_OF = {colour: role for role, colour in ROLES.items()}


def _legend(
    axes: Axes,
    narrow: bool,
    *,
    marks: Sequence[tuple[str, str, str]] = (),
    blocks: Sequence[tuple[str, str]] = (),
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = [Patch(facecolor=colour, linewidth=0, label=label) for colour, label in blocks]
    handles += [
        Line2D([], [], linestyle="none", marker=mark, color=colour, markersize=9, markeredgewidth=2, label=label)
        for mark, colour, label in marks
    ]
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.legend(
        handles=handles, loc="outside upper left", ncols=2 if narrow else 5, handlelength=1, handletextpad=0.5,
        columnspacing=1.2,
    )  # fmt: skip


def _legend_of_series(axes: Axes, narrow: bool, names: Sequence[str], markers: str) -> None:
    if len(names) > 1:
        _legend(
            axes,
            narrow,
            marks=[
                (markers[n], ROLES[SERIES[n]], _short(each, 24) + (" and others" if len(names) > 4 and n == 3 else ""))
                for n, each in enumerate(names[:4])
            ],
        )


def _time_axis(axes: Axes, narrow: bool) -> None:
    locator = dates.AutoDateLocator(minticks=2, maxticks=4 if narrow else 8)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    axes.set_xlabel("time (UTC)", loc="left")  # to the right matplotlib puts the date


def _day(at: float) -> float:
    """Unix seconds as matplotlib counts time."""
    return at / 86400


def _short(text: str, most: int, *, whole: str = "") -> str:
    """*text*, and *whole* after it, in *most* characters; what is too long is *text*."""
    most -= len(whole)
    return (text if len(text) <= most else text[: max(0, most - 1)] + "…") + whole


def took(seconds: float | None) -> str:
    """A measured time as `duration` has it, and a short one in milliseconds."""
    return f"{1000 * seconds:.3g} ms" if seconds is not None and 0 < seconds < 0.1 else duration(seconds)


_seconds = ticker.FuncFormatter(lambda value, _: took(max(0.0, value)))
_bytes = ticker.FuncFormatter(lambda value, _: size(int(max(0.0, value))))
_steps = ticker.FuncFormatter(lambda value, _: f"{value:,.0f}")
