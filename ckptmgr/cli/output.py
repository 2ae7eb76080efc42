"""
Everything the command prints goes through here.

Results go to stdout and all else to stderr. With ``--json`` stdout carries the document and nothing
else, and stderr stays empty but for the traceback of a bug. Text is cleaned of control characters
at this one door, since names and reasons come from files that anyone may have written. Colour and
line wrapping happen on a terminal only: what a pipe receives does not depend on where it runs. There, too, a result
that is longer than the screen is given to a pager.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import subprocess

#: RUN as a word of its own; in a path it is somebody's directory.
_RUN = re.compile(r"(?<= )RUN(?=[ `]|$)")
#: A command in a text, and what stands for its spaces while that is wrapped; `clean` leaves none in a text.
_COMMAND = re.compile("`[^`]+`")
_TIED = "\x1f"
_COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
#: The last column of a table is wrapped to what is left of the terminal, but never narrower than this.
_NARROWEST = 20
_PROGRESS_EVERY_S = 0.1
#: A rate is shown once it can be told.
_PACE_AFTER_S = 1.0


class Painted(NamedTuple):
    """Text with a colour, for terminals that have one."""

    text: str
    colour: str


Span = str | Painted


class Output:
    """
    Where one run of the command prints to.

    A reader that has gone (``| head``) is not an error: what follows is dropped, and ``reader_left``
    is set for those who would otherwise print for ever.

    Args:
        as_json: Print documents instead of text.
        run: The words that stand for RUN in hints, or None before they are known.
        paged: Whether a result may be read with a pager; then `finish` must be called.
    """

    def __init__(self, *, as_json: bool, run: Sequence[str] | None = None, paged: bool = False) -> None:
        self.as_json = as_json
        self.reader_left = False
        self._run = shlex.join(run) if run else "RUN"
        terminal = sys.stdout.isatty()
        self._colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._width = shutil.get_terminal_size().columns if terminal else None
        self._pager: subprocess.Popen[str] | None = None
        #: What may turn out to be more than the screen has room for; None if no pager would be started.
        self._held = "" if paged and terminal and not as_json and _pager() else None
        self._progress_shown_at: float | None = None
        self._drawn = 0
        self._noted: set[str] = set()

    def document(self, body: Mapping[str, Any]) -> None:
        """Print one JSON object on one line: strict JSON in ASCII, not-a-number as null, hints ready to be pasted."""
        self._write(sys.stdout, json.dumps(self._strict(body), allow_nan=False) + "\n")

    def line(self, *spans: Span) -> None:
        """Print one line of the result."""
        self._write(sys.stdout, self._render(spans).rstrip() + "\n")

    def labelled(self, label: Span, text: str, *, indent: int) -> None:
        """Print *text* from column *indent* on, behind its *label*; on a terminal wrapped, but no word is broken."""
        start = [label, " " * (indent - len(_text(label)))]
        if self._width is None:
            self.line(*start, text)
            return
        first, *rest = _wrapped(clean(text), max(_NARROWEST, self._width - indent), break_words=False) or [""]
        self.line(*start, first)
        for piece in rest:
            self.line(" " * indent, piece)

    def exactly(self, path: str) -> None:
        """
        Print a path for a script: every byte as it is, since a cleaned path would name something else.

        On a terminal it is cleaned like any other text.
        """
        if sys.stdout.isatty():
            self.line(path)
            return
        with self._going_nowhere(sys.stdout):
            sys.stdout.flush()
            sys.stdout.buffer.write(os.fsencode(path) + b"\n")
            sys.stdout.buffer.flush()

    def table(self, *header: str, right: Sequence[str] = ()) -> Table:
        """A table to add rows to, with the titles of its columns; those in *right* are set to the right."""
        return Table(self, header, right)

    def note(self, text: str, hint: str = "", *, once: bool = False) -> None:
        """Say something beside the result, on stderr; with ``--json`` the document says it; *once*: not again."""
        if self.as_json or (once and text in self._noted):
            return
        self._noted.add(text)
        self._write(sys.stderr, clean(text) + "\n")
        if hint:
            self._write(sys.stderr, f"hint: {clean(self.hint(hint))}\n")

    def traceback(self, text: str) -> None:
        """Print the traceback of a bug, on stderr, with ``--json`` too."""
        self._write(sys.stderr, "".join(clean(line) + "\n" for line in text.splitlines()))

    def hint(self, text: str) -> str:
        """*text* with the run that was asked about in place of RUN where that is a command's argument."""
        return _RUN.sub(lambda _: self._run, text)

    def progress(self, text: Callable[[], str] | None) -> None:
        """Show one line that replaces itself, on a terminal and not more often than is worth it; None ends it."""
        if self.as_json or self._pager is not None or not sys.stderr.isatty():
            return
        now = time.monotonic()
        if text is None:
            if self._progress_shown_at is not None:
                self._write(sys.stderr, "\r\x1b[K")
            self._progress_shown_at = None
        elif self._progress_shown_at is None or now - self._progress_shown_at > _PROGRESS_EVERY_S:
            width = shutil.get_terminal_size().columns - 1
            self._write(sys.stderr, "\r\x1b[K" + clean(text())[:width])
            self._progress_shown_at = now

    def redraw(self, lines: Sequence[Sequence[Span]]) -> None:
        """
        Print *lines*; on a terminal in place of those that were drawn before, wrapped to its width.

        As many as the screen has room for, since those that have left it cannot be replaced. Elsewhere they come one
        after the other.
        """
        if self._width is None:
            self._write(sys.stdout, "".join(self._render(line).rstrip() + "\n" for line in lines))
            return
        screen = shutil.get_terminal_size()
        shown = [piece for line in lines for piece in _folded(line, screen.columns)]
        if len(shown) >= screen.lines:
            shown = [_cut(line, screen.columns) for line in lines]
        text = f"\x1b[{self._drawn}A" if self._drawn else ""
        # Line by line and not all at once, or the screen would flicker.
        text += "".join(self._render(line) + "\x1b[K\n" for line in shown) + "\x1b[J"
        self._write(sys.stdout, text)
        self._drawn = len(shown)

    def _strict(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): self.hint(item) if key == "hint" else self._strict(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._strict(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    def finish(self) -> None:
        """Print what is held back, or argparse has left in the buffer, and wait for who reads it to leave the pager."""
        held, self._held = self._held, None
        self._write(sys.stdout, held or "")
        if self._pager is not None:
            pager, self._pager = self._pager, None
            with contextlib.suppress(OSError):
                pager.stdin.close()  # type: ignore[union-attr]
            while True:
                with contextlib.suppress(KeyboardInterrupt):  # which is the pager's to understand
                    pager.wait()
                    return

    def _render(self, spans: Iterable[Span]) -> str:
        return "".join(self._paint(span) for span in spans)

    def _paint(self, span: Span) -> str:
        if isinstance(span, str):
            return clean(span)
        if not self._colour:
            return clean(span.text)
        return f"\x1b[{_COLOURS[span.colour]}m{clean(span.text)}\x1b[0m"

    def _write(self, stream: IO[str], text: str) -> None:
        if self._held is not None and stream is sys.stdout:
            self._held += text
            if self._held.count("\n") < shutil.get_terminal_size().lines:
                return
            text, self._held = self._held, None
            self._pager = _started(_pager())
        elif self._held:
            held, self._held = self._held, ""
            self._write_now(sys.stdout, held)
        reader = self._pager.stdin if self._pager is not None else None
        self._write_now(reader or stream, text)

    def _write_now(self, stream: IO[str], text: str) -> None:
        with self._going_nowhere(stream):
            stream.write(text)
            stream.flush()

    @contextlib.contextmanager
    def _going_nowhere(self, stream: IO[str]) -> Iterator[None]:
        """Where *stream* takes no more, let the rest, the interpreter's own last flush included, go nowhere."""
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
            self.reader_left = self.reader_left or stream is not sys.stderr
            if not isinstance(error, BrokenPipeError):
                raise


def _pager() -> list[str]:
    """The words of the pager that the environment asks for; none if it wants none, or there is none."""
    try:
        words = shlex.split(os.environ.get("CKPTMGR_PAGER", os.environ.get("PAGER", "less")))
    except ValueError:  # a quote that is not closed
        return []
    if not words or words == ["cat"] or os.environ.get("TERM") == "dumb" or shutil.which(words[0]) is None:
        return []
    return words


def _started(words: Sequence[str]) -> subprocess.Popen[str] | None:
    import subprocess  # slow to import, and seldom needed

    environment = {"LESS": "RX", **os.environ}  # colours as they are, and the text stays when it is left
    try:
        return subprocess.Popen(words, stdin=subprocess.PIPE, text=True, errors="backslashreplace", env=environment)
    except OSError:
        return None


class Progress:
    """
    How far reading has come, with its rate and the time left, as `Output.progress` shows it.

    Args:
        out: Where.
        total: Bytes in all.
    """

    def __init__(self, out: Output, total: int) -> None:
        self._out = out
        self._total = total
        self._done = 0
        self._began = time.monotonic()

    def add(self, count: int, doing: str) -> None:
        """*count* bytes more have been read; *doing* says of what."""
        self._done += count
        self._out.progress(lambda: f"{doing}: {size(self._done)} of {size(self._total)}{self._pace()}")

    def _pace(self) -> str:
        took = time.monotonic() - self._began
        if took < _PACE_AFTER_S or not self._done:
            return ""
        rate = self._done / took
        return f", {size(int(rate))}/s, {duration(max(0, self._total - self._done) / rate)} left"


class Table:
    """
    Columns that stay aligned over several batches of rows, as a log that is being followed needs.

    An empty cell is printed as ``-``. On a terminal the last column is wrapped; elsewhere a row is a line.
    """

    def __init__(self, out: Output, header: Sequence[str], right: Sequence[str]) -> None:
        self._out = out
        self._header: Sequence[str] | None = header
        self._right = [title in right for title in header]
        self._widths = [len(title) for title in header]

    def add(self, rows: Iterable[Sequence[Span]]) -> None:
        """Print *rows*, after the header if they are the first."""
        batch = [[_cleaned(cell) for cell in row] for row in rows]
        for row in batch:
            self._widths = [max(width, len(_text(cell))) for width, cell in zip(self._widths, row, strict=True)]
        if self._header is not None:
            batch.insert(0, [Painted(title, "bold") for title in self._header])
            self._header = None
        lines = [line for row in batch for line in self._lines(row)]
        self._out._write(sys.stdout, "".join(line.rstrip() + "\n" for line in lines))

    def _lines(self, row: Sequence[Span]) -> list[str]:
        *fixed, last = row
        left = ""
        for cell, width, right in zip(fixed, self._widths, self._right, strict=False):
            gap = " " * (width - len(_text(cell)))
            painted = self._out._paint(cell)
            left += (gap + painted if right else painted + gap) + "  "
        indent = sum(width + 2 for width in self._widths[:-1])
        if self._out._width is None:
            return [left + self._out._paint(last)]
        room = max(_NARROWEST, self._out._width - indent)
        pieces = _wrapped(_text(last), room) or [""]
        spans = [Painted(piece, last.colour) if isinstance(last, Painted) else piece for piece in pieces]
        first, *rest = [self._out._paint(span) for span in spans]
        return [left + first, *(" " * indent + piece for piece in rest)]


def clean(text: str) -> str:
    """*text* on one line, with every character that could steer a terminal replaced by ``\\ufffd``."""
    if text.isascii() and text.isprintable():
        return text
    spaced = text.replace("\n", " ").replace("\t", " ")
    return "".join("\ufffd" if unicodedata.category(char) in _UNPRINTABLE else char for char in spaced)


#: Control, format (which hides or reverses text), surrogate, and line or paragraph separators.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def _wrapped(text: str, room: int, *, break_words: bool = True) -> list[str]:
    """*text* in lines of at most *room* columns; a command that fits into one is whole, so that it can be copied."""

    def whole(command: re.Match[str]) -> str:
        return command[0].replace(" ", _TIED) if len(command[0]) < room else command[0]

    tied = _COMMAND.sub(whole, text)
    return [
        line.replace(_TIED, " ")
        for line in textwrap.wrap(tied, room, break_on_hyphens=False, break_long_words=break_words)
    ]


def _folded(line: Sequence[Span], width: int) -> list[list[Span]]:
    """*line* as often as it takes for *width* columns, what follows set in; it is its last span that is long."""
    *first, last = line
    room = width - sum(len(clean(_text(span))) for span in first)
    text = clean(_text(last))
    if len(text) <= room or room < _NARROWEST or width <= _NARROWEST:
        return [_cut(line, width)]
    head, *rest = _wrapped(text, room)
    indent = " " * 4
    more = _wrapped(" ".join(rest), width - len(indent))

    def like_last(piece: str) -> Span:
        return Painted(piece, last.colour) if isinstance(last, Painted) else piece

    return [[*first, like_last(head)], *([indent, like_last(piece)] for piece in more)]


def _cut(line: Sequence[Span], width: int) -> list[Span]:
    """*line* as far as *width* columns have room for it."""
    cut: list[Span] = []
    for span in line:
        text = clean(_text(span))[:width]
        width -= len(text)
        cut.append(text if isinstance(span, str) else Painted(text, span.colour))
    return cut


def _text(cell: Span) -> str:
    return cell if isinstance(cell, str) else cell.text


def _cleaned(cell: Span) -> Span:
    text = clean(_text(cell)) or "-"
    return text if isinstance(cell, str) else Painted(text, cell.colour)


def timestamp(at: float | None, *, timespec: str = "milliseconds") -> str | None:
    """Unix seconds as UTC in ISO 8601, such as ``2026-08-01T12:00:00.123Z``; None stays None."""
    if at is None:
        return None
    try:
        moment = datetime.datetime.fromtimestamp(at, datetime.UTC)
    except (ValueError, OverflowError, OSError):
        return "unreadable"
    return moment.isoformat(timespec=timespec).replace("+00:00", "Z")


def age(seconds: float) -> str:
    """How long ago, in one unit: ``12 s``, ``5 min``, ``30 h``, ``3 d``."""
    seconds = max(0.0, seconds)
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (48 * 3600, 3600, "h")):
        if seconds < limit:
            return f"{int(seconds // unit)} {name}"
    return f"{int(seconds // 86400)} d"


def duration(seconds: float | None) -> str:
    """A measured time: ``0.12 s``, ``3.4 s``, ``2 min 5 s``."""
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"


def size(count: int) -> str:
    """Bytes in powers of ten: ``512 B``, ``81.4 GB``."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95:
            return f"{value:.1f} {unit}"
    return f"{value / 1000:.1f} PB"
