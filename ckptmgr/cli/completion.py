"""``ckptmgr completion``: what a shell needs to complete commands, flags and paths."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from ckptmgr.cli.exit_codes import Exit
from ckptmgr.cli.output import Output
from ckptmgr.errors import InvalidArgument

DESCRIPTION = """\
Print a script by which a shell completes the commands and flags of ckptmgr,
with what they mean where it can show that, and paths of runs. It is complete in
itself: no Python is started when TAB is pressed. Print it again after an
upgrade of ckptmgr."""
EXAMPLES = """\
  ckptmgr completion bash > ~/.local/share/bash-completion/completions/ckptmgr
  ckptmgr completion zsh > ~/.zfunc/_ckptmgr
  ckptmgr completion fish > ~/.config/fish/completions/ckptmgr.fish"""
TARGET = ("SHELL", "bash, zsh or fish")

SHELLS = ("bash", "zsh", "fish")


def configure(parser: argparse.ArgumentParser) -> None:
    """This command has no flags of its own."""


def run(args: argparse.Namespace, out: Output) -> int:
    """Print the script."""
    import shtab

    from ckptmgr.cli import COMMANDS, build_parser

    if args.run not in SHELLS:
        raise InvalidArgument(f"{args.run!r} is no shell that can be completed for", hint=f"one of {', '.join(SHELLS)}")
    whole = build_parser()
    for name, parser in commands(whole):
        parser.description = COMMANDS[name]
        for action in parser._actions:
            if action.dest in ("journal", "source") or (action.dest == "run" and name != "completion"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            elif action.dest == "run":
                action.choices = SHELLS
    script = shtab.complete(whole, shell=args.run)
    if out.as_json:
        out.document({"shell": args.run, "script": script})
        return Exit.OK
    for line in script.splitlines():
        out.line(line)
    return Exit.OK


def commands(whole: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Each command and its parser."""
    for action in whole._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()
