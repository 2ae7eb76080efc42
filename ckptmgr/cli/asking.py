"""
Having a run changed: here, under the run lock, or by the manager that has the run open, which is asked.

Never both, and never behind a manager's back: see `requests`.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ckptmgr import requests
from ckptmgr.cli import target
from ckptmgr.cli.output import Output
from ckptmgr.errors import InvalidArgument, JournalError, RunLocked
from ckptmgr.requests import Answer, Request

if TYPE_CHECKING:
    from ckptmgr.journal import Journal
    from ckptmgr.rundir import RunDirectory

#: How a manager signs the run lock; other commands hold it for a moment, and answer nobody.
MANAGER = "CheckpointManager"
TIMEOUT_S = 60.0
#: What a request that was taken at the last moment gets besides, in seconds.
GRACE_S = 10.0
POLL_S = 0.2
#: How often it is looked, in the journal and at the run lock, whether whoever is asked is still there.
CHECK_S = 2.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flag of all commands that may have to ask."""
    parser.add_argument(
        "--timeout", metavar="S", type=seconds, default=TIMEOUT_S,
        help=f"seconds to wait for the manager of a live run (default: {TIMEOUT_S:g})",
    )  # fmt: skip


def seconds(text: str) -> float:
    """The argparse type of a time to wait: more than 0, and no more than a day."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from above 0 to 86400")
    return number


def carry_out(
    rundir: RunDirectory,
    out: Output,
    *,
    command: str,
    here: Callable[[Journal], Answer],
    timeout_s: float,
    **asked: Any,
) -> tuple[Answer, str | None]:
    """
    Do it here if nobody has the run open, or else have its manager do it.

    Args:
        rundir: The run.
        out: Shows that it waits.
        command: Who takes the run lock, for people.
        here: Does it, given the journal, under the run lock.
        timeout_s: How long to wait for the manager.
        asked: What the request says: kind, series, and what belongs to that kind.

    Returns:
        What became of it, and the manager that did it, in words; None if it was done here.

    Raises:
        CheckpointError: As of `target.changing`, or of *here*.
        RunLocked: Another command has the run, or the manager gave no answer in time.
        JournalError: The manager refused.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with target.changing(rundir, command) as journal:
                return here(journal), None
        except RunLocked as error:
            locked = error
        if not can_be_asked(locked):
            raise locked
        answer = _ask(rundir, out, locked, asked, deadline=deadline, timeout_s=timeout_s)
        if answer is not None and answer.outcome == requests.REFUSED:
            raise JournalError(
                f"{locked.holder} refused: {answer.text}; nothing was changed",
                hint="run `ckptmgr ls RUN` to see the run as it is now",
            )
        if answer is not None:
            return answer, locked.holder
        # Whom it would have been asked of is starting, or gone.
        if time.monotonic() >= deadline:
            raise _silent(locked, timeout_s, taken=False)
        time.sleep(POLL_S)


def can_be_asked(locked: RunLocked) -> bool:
    """Whether who has the run is a manager."""
    return locked.holder.startswith(f"{MANAGER},")


def _ask(
    rundir: RunDirectory, out: Output, locked: RunLocked, asked: dict[str, Any], *, deadline: float, timeout_s: float
) -> Answer | None:
    """The answer of the manager that has the run; None if there is none that could be asked any more."""
    from ckptmgr.journal import Questions

    with Questions.open_read_only(rundir.journal_path) as journal:
        epoch = target.live_epoch(journal)
        if epoch is None:
            return None
        now = time.time()
        request = Request(
            **asked, epoch=epoch, host=socket.gethostname(), pid=os.getpid(),
            asked_at=now, deadline=now + max(0.0, deadline - time.monotonic()),
        )  # fmt: skip
        check_at = time.monotonic() + CHECK_S
        is_asked = False
        try:
            requests.ask(rundir.path, request, rundir.permissions)
            is_asked = True
            out.note(f"the run is in use by {locked.holder}; asking it", once=True)
            while True:
                if (answer := _answer(rundir, request)) is not None:
                    return answer
                if time.monotonic() >= check_at:
                    if target.live_epoch(journal) != epoch or _is_free(rundir, f"ckptmgr {request.kind}"):
                        requests.withdraw(rundir.path, request.id)
                        return _answer(rundir, request)
                    check_at = time.monotonic() + CHECK_S
                left = deadline - time.monotonic()
                if left <= 0 and requests.withdraw(rundir.path, request.id):
                    raise _silent(locked, timeout_s, taken=False)
                if left <= -GRACE_S:
                    raise _silent(locked, timeout_s, taken=True)
                out.progress(lambda left=left: f"waiting for an answer, {max(0.0, left):.0f} s more")  # type: ignore[misc]
                time.sleep(POLL_S)
        except KeyboardInterrupt:
            if is_asked and not requests.withdraw(rundir.path, request.id):
                out.note("the manager had taken the request already", "`ckptmgr ls RUN` says what became of it")
            raise
        finally:
            out.progress(None)
            requests.withdraw(rundir.path, request.id)


def _answer(rundir: RunDirectory, request: Request) -> Answer | None:
    try:
        return requests.answer_to(rundir.path, request.id)
    except InvalidArgument as error:
        raise JournalError(
            f"the answer of the manager cannot be understood: {error.message}",
            hint="`ckptmgr ls RUN` says what became of it",
        ) from error


def _is_free(rundir: RunDirectory, command: str) -> bool:
    """Whether nobody has the run any more: a zombie, or a process on another host, may look alive in the journal."""
    try:
        with target.locked(rundir, command):
            return True
    except RunLocked:
        return False


def _silent(locked: RunLocked, timeout_s: float, *, taken: bool) -> RunLocked:
    """Why nobody answered; what was taken may have been done."""
    what, hint = (
        ("took the request and did not say what became of it", "`ckptmgr ls RUN` says what became of it")
        if taken
        else (
            f"did not answer within {timeout_s:g} s; nothing was changed",
            "a hook or a deletion may keep it busy: try again with a longer --timeout, or when it has ended",
        )
    )
    return RunLocked(f"{locked.message}, which {what}", hint=hint, path=locked.path, holder=locked.holder)
