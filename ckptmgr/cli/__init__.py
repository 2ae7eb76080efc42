"""
The ``ckptmgr`` command: look at a run, ask whether it may be resumed, and put right what a crash left.

It reads the journal and the run directory and imports neither torch nor the manager, so it starts
fast and runs where no training can. Nothing is changed without ``--apply`` (``upgrade`` excepted,
which makes a backup first). Each command is one file here, with HELP, DESCRIPTION, EXAMPLES,
``configure(parser)`` and ``run(args, out)``, and with TARGET if it is not about a run; what it prints
goes through `output`, its exit status comes from `exit_codes`. docs/reference/cli.md is held to these
files by a test.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from ckptmgr.cli import check, doctor, latest, log, ls, recover, show, upgrade
from ckptmgr.cli.exit_codes import Exit, exit_code, is_our_bug
from ckptmgr.cli.output import Output
from ckptmgr.errors import InvalidArgument

COMMANDS = {
    "ls": ls,
    "show": show,
    "log": log,
    "latest": latest,
    "check": check,
    "recover": recover,
    "upgrade": upgrade,
    "doctor": doctor,
}
#: What a command is about, and what that is, unless it says otherwise.
TARGET = ("RUN", "a run directory, or its .journal.db file")

EPILOG = """\
examples:
  ckptmgr ls runs/alpha
  ckptmgr check runs/alpha --world-size 16
  torchrun train.py --resume "$(ckptmgr latest runs/alpha)"
  ckptmgr doctor runs

exit status:
  0 fine, 1 failed (a bug, or the operating system refused), 2 usage,
  3 nothing to resume from or not safe, also storage that is not safe for a run,
  4 the newest is unusable but an older one is safe, 5 corruption, 10 no journal here, 11 the run is locked,
  12 the journal has another schema, 130 interrupted"""


class Parser(argparse.ArgumentParser):
    """A parser that raises, so that a usage error is reported like any other error, as JSON if asked."""

    def error(self, message: str) -> NoReturn:
        raise InvalidArgument(message, hint=f"see `{self.prog} --help`")


class Version(argparse.Action):
    """Print the versions of ckptmgr and of the journal it reads; looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        import importlib.metadata

        from ckptmgr.journal.schema import REVISION

        Output(as_json=False).line(f"ckptmgr {importlib.metadata.version('ckptmgr')} (journal schema {REVISION})")
        parser.exit()


def build_parser() -> Parser:
    """The parser of the whole command line."""
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
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=f"examples:\n{module.EXAMPLES}",
            formatter_class=raw,
            allow_abbrev=False,
        )
        metavar, text = getattr(module, "TARGET", TARGET)
        command.add_argument("run", metavar=metavar, help=text)
        module.configure(command)
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
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    out = Output(as_json="--json" in words)
    try:
        args = build_parser().parse_args(words)
        out = Output(as_json=args.json, run=[args.run, *(("--journal", args.journal) if args.journal else ())])
        return int(COMMANDS[args.command].run(args, out))
    except SystemExit as end:
        out.finish()
        return int(end.code or 0)
    except BaseException as error:  # noqa: BLE001 — the outermost frame: whatever it is, it becomes an exit status
        return report(error, out)


def report(error: BaseException, out: Output) -> Exit:
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
