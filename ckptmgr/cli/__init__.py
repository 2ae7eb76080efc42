"""
The ``ckptmgr`` command: look at a run, ask whether it may be resumed, and put right what a crash left.

It reads the journal and the run directory and imports neither torch nor the manager, so it starts
fast and runs where no training can. Nothing is changed without ``--apply``, but for three commands that are
the change itself: ``pin`` and ``unpin``, and ``upgrade``, which makes a backup first; and but for what ``verify``
notes. Each command is one file here, loaded when it is asked for, with DESCRIPTION, EXAMPLES,
``configure(parser)`` and ``run(args, out)``, and with TARGET if it is not about a run; what it prints goes
through `output`, its exit status comes from `exit_codes`. docs/reference/cli.md is held to these files by a test.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any, NoReturn

from ckptmgr.cli.exit_codes import Exit, exit_code, is_our_bug
from ckptmgr.cli.output import Output
from ckptmgr.errors import InvalidArgument

#: Every command, which is also the name of its file, and its line in ``ckptmgr --help``.
COMMANDS = {
    "ls": "list the checkpoints of a run: series, step, state, age, size, and why each is kept or failed",
    "show": "show the files, ranks, durations, failures and history of one checkpoint",
    "log": "print every transition, oldest first",
    "latest": "print the path of the newest checkpoint that is safe to resume from",
    "check": "say whether the run may be resumed, from which path, and what speaks against it",
    "why": "say why a checkpoint is kept, dropped, failed or not resumable, and which command comes next",
    "verify": "compare the bytes of committed checkpoints with what was committed, and remember when",
    "watch": "show a run live: what is in flight, how far each rank is, the last commit and the last failure",
    "stats": "say what checkpoints take and cost: space, growth, time, failures, and when the disk is full",
    "recover": "say what a crash left and what would be done about it; --apply does it",
    "adopt": "bring checkpoints that ckptmgr did not write under the journal of a run; --apply does it",
    "prune": "say which checkpoints would go by these keep rules, and why the rest stays; --apply lets them go",
    "pin": "keep a checkpoint whatever the keep rules say",
    "unpin": "leave a pinned checkpoint to the keep rules again",
    "upgrade": "bring the journal to the schema of this version of ckptmgr; makes a backup first",
    "report": "write an HTML page about the run: what is safe, timeline, stalls, failures, space",
    "serve": "serve that page on this machine, renewed while the run goes on; also of a folder of runs",
    "metrics": "print how durable the run is as numbers, for Prometheus",
    "completion": "print a script by which bash, zsh or fish completes commands, flags and paths",
    "doctor": "try on your own storage what a run relies on, and say what holds there",
}
#: What a command is about, and what that is, unless it says otherwise.
TARGET = ("RUN", "a run directory, or its .journal.db file")

#: Commands whose result may be longer than a screen, and is at hand at once.
PAGED = frozenset({"ls", "show", "log", "check", "why", "stats", "prune", "adopt"})
#: Commands that are about nothing that has a journal.
WITHOUT_JOURNAL = frozenset({"completion"})

EPILOG = """\
examples:
  ckptmgr ls runs/alpha
  ckptmgr check runs/alpha --world-size 16
  torchrun train.py --resume "$(ckptmgr latest runs/alpha)"
  ckptmgr doctor runs

exit status:
  0 fine, 1 failed (a bug, or the operating system refused), 2 usage,
  3 nothing to resume from or not safe, also storage that is not safe for a run,
  4 the newest is unusable but an older one is safe, 5 corruption,
  10 no journal here, 11 the run is locked, 12 the journal has another schema,
  130 interrupted"""


class Parser(argparse.ArgumentParser):
    """A parser that raises, so that a usage error is reported like any other error, as JSON if asked."""

    def error(self, message: str) -> NoReturn:
        raise InvalidArgument(message, hint=f"see `{self.prog} --help`")


class Version(argparse.Action):
    """Print the versions of ckptmgr and of the journal it reads; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        from ckptmgr.journal import REVISION

        Output(as_json=False).line(f"ckptmgr {importlib.metadata.version('ckptmgr')} (journal schema {REVISION})")
        parser.exit()


def command_file(name: str) -> ModuleType:
    """The file of one of `COMMANDS`."""
    return importlib.import_module(f"{__name__}.{name}")


def build_parser(words: Collection[str] = tuple(COMMANDS)) -> Parser:
    """The parser of the whole command line; of commands that are not among its *words* it knows no more than names."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="ckptmgr",
        description="Look at the checkpoints of a training run and say which to trust.",
        epilog=EPILOG,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and the journal's schema")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        if name not in words:
            commands.add_parser(name, help=text)
            continue
        module = command_file(name)
        command = commands.add_parser(
            name,
            help=text,
            description=module.DESCRIPTION,
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=raw,
            allow_abbrev=False,
        )
        metavar, about = getattr(module, "TARGET", TARGET)
        command.add_argument("run", metavar=metavar, help=about)
        module.configure(command)
        if name not in WITHOUT_JOURNAL:
            command.add_argument("--journal", metavar="PATH", help="the journal, if it is not RUN.journal.db")
        command.add_argument("--json", action="store_true", help="print JSON, errors included")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Args:
        argv: The words after the program's name; those of the process if None.

    Returns:
        The exit status, see `Exit`.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    _open_all_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    out = Output(as_json="--json" in words)
    try:
        try:
            args = build_parser(words).parse_args(words)
            out = Output(
                as_json=args.json,
                run=[args.run, *(("--journal", args.journal) if getattr(args, "journal", None) else ())],
                paged=args.command in PAGED and not getattr(args, "follow", False),
            )
            status = int(command_file(args.command).run(args, out))
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException as error:  # noqa: BLE001 — the outermost frame: whatever it is, it becomes an exit status
            status = failed(error, out)
        out.finish()
    except (OSError, KeyboardInterrupt) as error:  # nothing more can be printed, or nobody wants it
        status = failed(error, out)
    return status


def _open_all_streams() -> None:
    """Let a stream that was closed (``>&-``) go nowhere; else the next file opened would have its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def failed(error: BaseException, out: Output) -> Exit:
    """Say what went wrong, on stderr or with ``--json`` as an object on stdout, and give its exit status."""
    status = exit_code(error)
    message, hint = describe_error(error)
    out.progress(None)
    if is_our_bug(error):
        out.traceback("".join(traceback.format_exception(error)))
    if out.as_json:
        body = {"type": type(error).__name__, "message": message, "hint": hint, "exit_code": int(status)}
        out.document({"error": body})
    else:
        out.note(f"ckptmgr: {message}", hint)
    return status


def describe_error(error: BaseException) -> tuple[str, str]:
    """The message and the hint of an error."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", ""
    if is_our_bug(error):
        return f"{type(error).__name__}: {error}", "this is a bug in ckptmgr: please report it with the traceback"
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    if isinstance(error, PermissionError):
        return message, "run it as a user who may read the run, and for --apply also write it"
    return message, getattr(error, "hint", "")
