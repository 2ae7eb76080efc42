"""
``ckptmgr serve``: the report of a run, or of every run in a folder, as pages that renew themselves.

Read-only, and for this machine alone: it listens on the loopback address, answers GET and HEAD, and only where
the browser asked for this host by name, so that no other site can read it through a name of its own. What may be
asked for is a short list; no part of a path ever becomes a path on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.server
import json
import os
import re
import socket
import threading
import time
import traceback
import urllib.parse
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptmgr.cli import metrics, target
from ckptmgr.cli.exit_codes import Exit, is_our_bug
from ckptmgr.cli.output import Output, age, timestamp
from ckptmgr.errors import CheckpointError, InvalidArgument, JournalNotFound

if TYPE_CHECKING:
    from ckptmgr.cli.report.facts import RunFacts

DESCRIPTION = """\
Serve the page of `ckptmgr report` at http://127.0.0.1, renewed while the run
goes on; for a folder of runs, a page with the verdict of each. Reads only, and
answers this machine only; from elsewhere use ssh -L. Also /metrics for
Prometheus and /status.json. Needs matplotlib: pip install 'ckptmgr[report]'."""
EXAMPLES = """\
  ckptmgr serve runs/alpha
  ckptmgr serve runs/alpha --port 0 --refresh 60"""
TARGET = ("RUN", "a run directory, its .journal.db file, or a folder of runs")

HOST = "127.0.0.1"
PORT = 8765
REFRESH_S = 10
#: A run is looked at again after this, and where its journal has changed after the other.
STALE_S = 30.0
CHANGED_S = 2.0
#: How long a request may take to arrive, and how many are answered at once.
REQUEST_S = 10
MOST_REQUESTS = 32
MOST_RUNS = 200
#: With any port: a tunnel has its own.
_OUR_NAME = re.compile(r"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", re.IGNORECASE)
_HTML = "text/html; charset=utf-8"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a request gets."""

    body: bytes
    kind: str = _HTML
    status: HTTPStatus = HTTPStatus.OK


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was found of a run, or why nothing was."""

    at: float
    journal: tuple[int, int]
    facts: RunFacts | None
    error: str = ""
    hint: str = ""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this command."""
    parser.add_argument("--port", metavar="N", type=_port, default=PORT, help=f"default {PORT}; 0 takes a free one")
    parser.add_argument(
        "--refresh", metavar="S", type=target.step, default=REFRESH_S,
        help=f"seconds after which a page loads itself again, 0 for never (default {REFRESH_S})",
    )  # fmt: skip


def _port(text: str) -> int:
    number = target.step(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number up to 65535")
    return number


def run(args: argparse.Namespace, out: Output) -> int:
    """Serve until interrupted."""
    site = Site(args, out)
    try:
        server = Server(site, args.port)
    except OSError as error:
        hint = "choose another one with --port, or --port 0 for a free one"
        raise InvalidArgument(f"port {args.port} cannot be listened on: {error.strerror}", hint=hint) from error
    with server:
        url = f"http://{HOST}:{server.server_address[1]}/"
        if out.as_json:
            out.document({"url": url, "runs": sorted(site.runs())})
        else:
            out.line(f"serving {url} until interrupted")
        server.serve_forever()
    return Exit.OK


class Site:
    """
    What there is to see: one run, or every run in a folder.

    Args:
        args: The parsed command line.
        out: Says what goes wrong, and how a run is called in a hint.

    Raises:
        JournalNotFound: RUN is neither a run nor a folder with one.
        MissingLibrary: The library that draws is not installed.
    """

    def __init__(self, args: argparse.Namespace, out: Output) -> None:
        from ckptmgr.cli.report import page

        self._page = page
        self._args = args
        self._out = out
        self._seen: dict[str, Seen] = {}
        self._drawn: dict[str, tuple[Seen, str]] = {}
        self._looking = threading.Lock()
        rundir = target.locate(args)
        self._folder: Path | None = None
        if not os.path.lexists(rundir.journal_path) and args.journal is None and rundir.path.is_dir():
            self._folder = rundir.path
            if not self.runs():
                rundir.require_journal()
                text = f"there is no journal at {rundir.journal_path}, and none of a run in {rundir.path}"
                raise JournalNotFound(text, path=str(rundir.journal_path))
        else:
            target.require_journal(rundir)
            self._alone = rundir.path.name

    def runs(self) -> dict[str, argparse.Namespace]:
        """Every run by its name, with the command line that would be about it alone."""
        if self._folder is None:
            return {self._alone: self._args}
        with os.scandir(self._folder) as entries:
            names = sorted(
                entry.name.removesuffix(target.JOURNAL_SUFFIX)
                for entry in entries
                if entry.name.endswith(target.JOURNAL_SUFFIX)
                and entry.name != target.JOURNAL_SUFFIX
                and entry.is_file(follow_symlinks=False)
            )
        return {name: argparse.Namespace(run=str(self._folder / name), journal=None) for name in names[:MOST_RUNS]}

    def answer(self, path: str, query: str) -> Answer:
        """What a GET of *path* gets; everything that is not on the list is not found."""
        refresh = 0 if query == "refresh=off" else self._args.refresh
        with self._looking:
            runs = self.runs()
            self._forget(runs)
            if path == "/metrics":
                found = [sample for name, each in runs.items() for sample in self._samples(name, each)]
                return Answer(metrics.exposition(found), "text/plain; version=0.0.4; charset=utf-8")
            if path == "/status.json":
                body = {"runs": [self._status(name, each) for name, each in runs.items()]}
                return Answer(json.dumps(body, allow_nan=False).encode(), "application/json")
            if path == "/":
                if self._folder is None:
                    return self._run(self._alone, self._args, refresh)
                return Answer(self._index(runs, refresh).encode("utf-8", errors="backslashreplace"))
            name = path.removeprefix("/").removesuffix("/")
            if self._folder is not None and name in runs:
                return self._run(name, runs[name], refresh)
        return self.failure(HTTPStatus.NOT_FOUND, "there is no such page", "")

    @property
    def policy(self) -> str:
        """What a page may load: nothing."""
        return f"{self._page.POLICY}; frame-ancestors 'none'"

    def report_bug(self, trace: str) -> None:
        """Say on stderr what nobody foresaw."""
        self._out.traceback(trace)

    def failure(self, status: HTTPStatus, text: str, hint: str, *, refresh: int = 0) -> Answer:
        """A page that says what went wrong, and looks again after *refresh* seconds if that is not 0."""
        body = f"<h1>{self._page.safe(text)}</h1>\n<p>{self._page.with_code(hint)}</p>\n"
        body += '<p><a href="/">Start page</a></p>'
        return Answer(self._page.document(status.phrase, body, refresh=self._meta(refresh)).encode(), status=status)

    def _run(self, name: str, args: argparse.Namespace, refresh: int) -> Answer:
        seen = self._look(name, args)
        if seen.facts is None:
            return self.failure(HTTPStatus.SERVICE_UNAVAILABLE, f"{name}: {seen.error}", seen.hint, refresh=refresh)
        before, text = self._drawn.get(name, (None, ""))
        if before is not seen:
            text = self._page.of_run(seen.facts, refresh=_REFRESH_PLACE, nav=_NAV_PLACE)
            self._drawn[name] = seen, text
        there = text.replace(_REFRESH_PLACE, self._meta(refresh), 1).replace(_NAV_PLACE, self._nav(refresh), 1)
        return Answer(there.encode("utf-8", errors="backslashreplace"))

    def _look(self, name: str, args: argparse.Namespace) -> Seen:
        """What is known of a run, looked at again when it is time; the caller holds the lock."""
        from ckptmgr.cli.report import facts

        now = time.monotonic()
        journal = _state_of(target.locate(args).journal_path)
        known = self._seen.get(name)
        if known is not None and now - known.at < (STALE_S if known.journal == journal else CHANGED_S):
            return known
        about = Output(as_json=False, run=[args.run, *(("--journal", args.journal) if args.journal else ())])
        try:
            seen = Seen(now, journal, facts.gather(args, about))
        except (CheckpointError, OSError) as error:
            text = getattr(error, "message", None) or str(error)
            seen = Seen(now, journal, None, text, about.hint(getattr(error, "hint", "")))
        self._seen[name] = seen
        return seen

    def _forget(self, runs: Mapping[str, argparse.Namespace]) -> None:
        for known in (self._seen, self._drawn):
            for name in known.keys() - runs.keys():
                del known[name]

    def _samples(self, name: str, args: argparse.Namespace) -> list[metrics.Sample]:
        found = self._look(name, args).facts
        if found is None:
            return []
        series = {one.name: one.numbers for one in found.series}
        return list(metrics.samples(name, series, live=found.live_epoch is not None))

    def _status(self, name: str, args: argparse.Namespace) -> dict[str, Any]:
        """The run object of ``/status.json``."""
        seen = self._look(name, args)
        found = seen.facts
        return {
            "name": name,
            "error": seen.error or None,
            "hint": seen.hint or None,
            "directory": found.directory if found is not None else None,
            "seen_at": timestamp(found.seen_at) if found is not None else None,
            "live": found.live_epoch is not None if found is not None else None,
            "series": [
                {
                    "series": one.name,
                    "verdict": one.verdict.value if one.verdict is not None else None,
                    "step": one.step,
                    "path": one.path,
                    "numbers": dict(one.numbers),
                }
                for one in (found.series if found is not None else ())
            ],
        }

    def _index(self, runs: Mapping[str, argparse.Namespace], refresh: int) -> str:
        safe = self._page.safe
        rows: list[list[Any]] = []
        for name, args in runs.items():
            seen = self._look(name, args)
            link = f'<a href="/{urllib.parse.quote(os.fsencode(name), safe="")}/">{safe(name, most=200)}</a>'
            if seen.facts is None:
                rows.append([link, ("bad", safe(seen.error)), *[("number", "-")] * 4, "-"])
                continue
            one = seen.facts.series[0] if seen.facts.series else None
            verdict = self._page.verdict_words(one.verdict if one is not None else None)
            numbers = one.numbers if one is not None else {}
            since = numbers.get("seconds_since_commit")
            rows.append(
                [
                    link,
                    verdict,
                    ("number", f"{one.step:,}" if one is not None and one.step is not None else "-"),
                    ("number", age(since) if since is not None else "never"),
                    ("number", f"{numbers.get('steps_at_risk', 0):,.0f}"),
                    ("number", f"{numbers.get('failures_total', 0):,.0f}"),
                    "at work" if seen.facts.live_epoch is not None else "-",
                ]
            )
        head = ["run", "verdict", "resume step", "last commit", "steps at risk", "failed saves", "manager"]
        more = f" The first {MOST_RUNS} are shown." if len(runs) == MOST_RUNS else ""
        title = f"Runs in {safe(str(self._folder))}"
        body = f"<h1>{title}</h1>\n<p>Each by the series that is resumed from.{more}</p>\n"
        body += self._page.data_table("What may be resumed, run by run", head, rows)
        return self._page.document(
            f"runs in {self._folder}", body, refresh=self._meta(refresh), nav=self._nav(refresh, first=True)
        )

    def _meta(self, refresh: int) -> str:
        return f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""

    def _nav(self, refresh: int, *, first: bool = False) -> str:
        back = "" if first or self._folder is None else '<a href="/">All runs</a> · '
        if not self._args.refresh:
            renewal = "This page does not load itself again."
        elif refresh:
            renewal = f'Loads itself again every {refresh} s. <a href="?refresh=off">Stop that</a>'
        else:
            renewal = '<a href="?">Load it again by itself</a>'
        return f'<nav class="quiet">{back}{renewal}</nav>\n'


_REFRESH_PLACE = "<!--refresh-->"
_NAV_PLACE = "<!--nav-->"


def _state_of(journal: Path) -> tuple[int, int]:
    try:
        found = journal.stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size


class Server(http.server.ThreadingHTTPServer):
    """Listens on the loopback address, and answers so many requests at once and no more."""

    daemon_threads = True

    def __init__(self, site: Site, port: int) -> None:
        self.site = site
        self._room = threading.BoundedSemaphore(MOST_REQUESTS)
        super().__init__((HOST, port), Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread of its own, or hang up if there are too many already."""
        if self._room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the base class does."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone or is too slow is no error of ours."""


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = REQUEST_S
    server_version = "ckptmgr"
    sys_version = ""
    error_message_format = "%(code)d %(message)s\n"
    error_content_type = "text/plain; charset=utf-8"

    def setup(self) -> None:
        """Hang up on who takes too long to ask; the socket's own timeout begins anew with each byte."""
        super().setup()
        self._late = threading.Timer(REQUEST_S, self._hear_no_more)
        self._late.daemon = True
        self._late.start()

    def finish(self) -> None:
        """As the base class does."""
        self._late.cancel()
        super().finish()

    def _hear_no_more(self) -> None:
        with contextlib.suppress(OSError):  # it has gone by itself
            self.connection.shutdown(socket.SHUT_RD)

    def do_GET(self) -> None:
        """Answer it."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer it without the body."""
        self._answer()

    def _answer(self) -> None:
        site = self.server.site
        if not _OUR_NAME.fullmatch(self.headers.get("Host", "")):
            answer = site.failure(HTTPStatus.MISDIRECTED_REQUEST, "this is not the host that was asked for", "")
        else:
            path, _, query = self.path.partition("?")
            try:
                answer = site.answer(urllib.parse.unquote(path, errors="surrogateescape"), query)
            except Exception as error:  # noqa: BLE001 - the server goes on, and says so
                if is_our_bug(error):
                    site.report_bug(traceback.format_exc())
                text = getattr(error, "message", None) or f"{type(error).__name__}: {error}"
                answer = site.failure(HTTPStatus.INTERNAL_SERVER_ERROR, text, getattr(error, "hint", ""))
        self.send_response(answer.status)
        for name, value in (
            ("Content-Type", answer.kind),
            ("Content-Length", str(len(answer.body))),
            ("Content-Security-Policy", site.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, *_: Any) -> None:
        """Requests are not worth a line."""
