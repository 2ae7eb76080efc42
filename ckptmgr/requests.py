"""
Asking the manager that has a run open, by files in the run directory.

Only one process at a time changes a run. A command that finds the run lock taken by a manager asks that
manager: it puts a request into `DIRECTORY`, and the manager of the epoch it is addressed to takes it, does what
is asked and answers. Each request is one file, whose name says how far it is:

    ID.asked → ID.taken → ID.answered

Taking and withdrawing are renames of the same name, so exactly one of them happens: a request that was
withdrawn is never carried out, and one that was taken is not withdrawn. A manager takes only requests to its own
epoch, whose command is still there and still waits. What is in these files may be from anybody who may write in
the run directory, and is judged like everything else there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptmgr import durable, reach
from ckptmgr.errors import CorruptCheckpoint, InvalidArgument
from ckptmgr.lifecycle import RetirementMark, Verified
from ckptmgr.manifest import MAX_NUMBER, is_finite
from ckptmgr.options import Permissions
from ckptmgr.retention import KeepAny, KeepBest, KeepEvery, KeepFor, KeepLast, KeepRule, RetentionPlan

DIRECTORY = ".ckptmgr-requests"
PRUNE, PIN, UNPIN, VERIFY = "prune", "pin", "unpin", "verify"
#: Why a prune keeps what no rule keeps, besides what `retention.plan` says itself.
SAFE, OVERWRITTEN, RESUMED = "newest that is safe", "being overwritten", "resumed from, not superseded yet"
#: Why a VERIFY is not recorded of a checkpoint that was found intact.
OUTDATED = "damage was found after it was read"
DONE, REFUSED = "done", "refused"
#: Of a request or an answer, in bytes: an answer says of each of a hundred thousand checkpoints why it stays.
MAX_BYTES = 32 << 20
#: How many checkpoints one VERIFY tells of; how much of each: so many things that differ, of so many characters.
MOST_VERIFIED, MOST_MISMATCHES, LONGEST_MISMATCH = 1000, 100, 5000
#: Names that are looked at.
_MOST = 10_000
_MOST_RULES = 1000
_ASKED = re.compile(r"([0-9a-f]{32})\.asked\Z")
#: What a manager that was killed leaves, or a command; but nothing that one may be about to rename.
_LEFT = re.compile(r"(?:[0-9a-f]{32}\.(?:taken|answered)|\.[0-9a-f]{32}\.(?:withdrawn|answered\.new))\Z")
#: What a command is about to rename, or was; it takes no longer than so many seconds.
_BEGUN = re.compile(r"\.[0-9a-f]{32}\.asked\.new\Z")
BEGUN_S = 3600.0
_RULES: Mapping[str, type[KeepLast | KeepEvery | KeepBest | KeepFor]] = {
    "last": KeepLast,
    "every": KeepEvery,
    "best": KeepBest,
    "for": KeepFor,
}


@dataclasses.dataclass(frozen=True)
class Request:
    """
    What a command asks of the manager of *epoch*. Times are Unix seconds.

    *rule* is for PRUNE, and *safe* is what it must not let go: the newest checkpoint that the command has found safe to
    resume from. *step* and *note* are for PIN and UNPIN. *verified* is what a VERIFY has found, to be
    recorded. After *deadline* nobody waits for it any more.
    """

    kind: str
    series: str
    epoch: int
    host: str
    pid: int
    asked_at: float
    deadline: float
    rule: KeepRule | None = None
    safe: int | None = None
    step: int | None = None
    note: str = ""
    verified: tuple[Verified, ...] = ()
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def is_wanted(self, now: float) -> bool:
        """Whether somebody still waits for it, as far as can be told from here."""
        return now <= self.deadline and may_run(self.host, self.pid)

    def to_json(self) -> bytes:
        """As the file has it."""
        body = {**dataclasses.asdict(self), "rule": None if self.rule is None else _words_of(self.rule)}
        return json.dumps(body, allow_nan=False).encode()


@dataclasses.dataclass(frozen=True)
class Answer:
    """
    What became of a request.

    *text* says why it was refused, or what was done. *keep* and *drop* are what a PRUNE decided: by checkpoint id.
    Of a VERIFY, *keep* are those of which the journal goes on saying what it said, and why.
    """

    outcome: str
    text: str = ""
    keep: Mapping[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    drop: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> bytes:
        """As the file has it."""
        return json.dumps(dataclasses.asdict(self)).encode()


def marks(plan: RetentionPlan, host: str, pid: int) -> tuple[RetirementMark, ...]:
    """The marks of a plan that a command has asked for, with who that was; also where nobody had to be asked."""
    return tuple(
        RetirementMark(mark.checkpoint_id, f"{mark.reason}; `ckptmgr prune` of pid {pid} on {host}")
        for mark in plan.marks
    )


def may_run(host: str, pid: int) -> bool:
    """Whether a process may still be running: on this host it is looked for, on another one nobody can tell."""
    if host != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


# --- the command's side ----------------------------------------------------------------------


def ask(run: Path, request: Request, permissions: Permissions) -> None:
    """
    Put a request where the manager will find it, whole or not at all.

    Raises:
        OSError: It cannot be put there.
    """
    durable.ensure_directory(run / DIRECTORY, mode=permissions.directory_mode)
    _put(run / DIRECTORY / f"{request.id}.asked", request.to_json(), permissions)


def answer_to(run: Path, id: str) -> Answer | None:
    """
    The answer to a request, which is taken away; None if there is none yet.

    Raises:
        InvalidArgument: What stands there is no answer.
    """
    path = run / DIRECTORY / f"{id}.answered"
    try:
        data = reach.read(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    except CorruptCheckpoint as error:
        raise InvalidArgument(error.message) from error
    answer = parse_answer(data)
    with contextlib.suppress(OSError):
        durable.remove_file(path)
    return answer


def withdraw(run: Path, id: str) -> bool:
    """Take a request back. Whether it was still there: then it will never be carried out; else it was taken."""
    folder = run / DIRECTORY
    try:
        durable.rename_new(folder / f"{id}.asked", folder / f".{id}.withdrawn")
    except FileNotFoundError:
        return False
    durable.remove_file(folder / f".{id}.withdrawn")
    return True


# --- the manager's side ----------------------------------------------------------------------


def waiting(run: Path) -> list[str]:
    """The ids of all requests that nobody has taken; none where nobody ever asked."""
    return [match[1] for name in _names(run) if (match := _ASKED.match(name))]


def read(run: Path, id: str) -> Request | None:
    """
    A request that nobody has taken; None if it was withdrawn.

    Raises:
        InvalidArgument: What stands there is no request, or may not be read.
    """
    try:
        return parse_request(reach.read(run / DIRECTORY / f"{id}.asked", MAX_BYTES), id)
    except FileNotFoundError:
        return None
    except CorruptCheckpoint as error:
        raise InvalidArgument(error.message) from error
    except OSError as error:
        # Never to be read, however often it is tried; what the disk refuses for now is another matter.
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EINVAL):
            raise
        raise InvalidArgument(f"the request cannot be read: {error.strerror}") from error


def take(run: Path, id: str) -> bool:
    """Take a request, so that it cannot be withdrawn any more. Whether it was still there."""
    folder = run / DIRECTORY
    try:
        durable.rename_new(folder / f"{id}.asked", folder / f"{id}.taken")
    except FileNotFoundError:
        return False
    return True


def give(run: Path, id: str, answer: Answer, permissions: Permissions) -> None:
    """Answer a request that was taken."""
    _put(run / DIRECTORY / f"{id}.answered", answer.to_json(), permissions)
    durable.remove_file(run / DIRECTORY / f"{id}.taken")


def remove(run: Path, id: str) -> None:
    """Remove a request that nobody waits for."""
    durable.remove_file(run / DIRECTORY / f"{id}.asked")


def sweep(run: Path) -> None:
    """Remove what earlier managers and commands that were killed have left behind. For the start of a manager."""
    for name in _names(run):
        path = run / DIRECTORY / name
        with contextlib.suppress(OSError):  # a directory of that name, say, is not ours
            if _LEFT.match(name) or (_BEGUN.match(name) and time.time() - path.lstat().st_mtime > BEGUN_S):
                durable.remove_file(path)


# --- inside ----------------------------------------------------------------------------------


def _put(path: Path, data: bytes, permissions: Permissions) -> None:
    durable.replace_file(path, data, scratch=f".{path.name}.new", mode=permissions.file_mode)


def _names(run: Path) -> list[str]:
    try:
        with reach.directory(run / DIRECTORY) as folder:
            readable = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return []
    try:
        with os.scandir(readable) as entries:
            return sorted(entry.name for entry in itertools.islice(entries, _MOST))
    finally:
        os.close(readable)


def _words_of(rule: KeepRule) -> list[dict[str, Any]]:
    names = {kind: name for name, kind in _RULES.items()}
    return [{"rule": names[type(part)], **vars(part)} for part in rule.parts]  # type: ignore[index]


def _rule_of(words: Any) -> KeepRule:
    if not isinstance(words, list) or not 1 <= len(words) <= _MOST_RULES:
        raise InvalidArgument("a request names no keep rules")
    parts = []
    for word in words:
        kind = _RULES.get(str(word.get("rule"))) if isinstance(word, dict) else None
        if kind is None:
            raise InvalidArgument("a request names a keep rule that this version does not know")
        fields = {field.name for field in dataclasses.fields(kind)}
        facts = {name: value for name, value in word.items() if name != "rule"}
        if not facts.keys() <= fields or ("metric" in fields and "metric" not in facts):
            raise InvalidArgument("a request names a keep rule with other values than it has")
        try:
            parts.append(kind(**facts))
        except TypeError as error:
            raise InvalidArgument(f"a request names a keep rule without its values: {error}") from error
    return KeepAny(tuple(parts))


def _verified_of(entries: Any) -> tuple[Verified, ...]:
    if not isinstance(entries, list) or not 1 <= len(entries) <= MOST_VERIFIED:
        raise InvalidArgument(f"a request does not say of 1 to {MOST_VERIFIED} checkpoints how they were verified")
    found = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise InvalidArgument("a request does not say of each checkpoint how it was verified")
        id, ok, texts = _whole(entry, "checkpoint_id"), entry.get("ok"), entry.get("mismatches")
        if type(ok) is not bool or not isinstance(texts, list) or not all(map(_is_mismatch, texts)):
            raise InvalidArgument(f"a request does not say of checkpoint {id} how it was verified")
        if len(texts) > MOST_MISMATCHES or ok == bool(texts):
            raise InvalidArgument(f"a request says that {len(texts)} things differ in checkpoint {id}, which is {ok=}")
        after = None if entry.get("after") is None else _whole(entry, "after")
        found.append(Verified(id, ok, tuple(texts), after))
    ids = {one.checkpoint_id for one in found}
    if 0 in ids or len(ids) < len(found):
        raise InvalidArgument("a request names a checkpoint twice, or one that cannot be")
    return tuple(found)


def _is_mismatch(text: Any) -> bool:
    return isinstance(text, str) and len(text) <= LONGEST_MISMATCH and _is_text(text)


def parse_request(data: bytes, id: str) -> Request:
    """
    What the file of request *id* says.

    Raises:
        InvalidArgument: It is no request.
    """
    body = _object(data)
    texts = {name: _text(body, name) for name in ("kind", "series", "host", "note")}
    numbers = {name: _whole(body, name) for name in ("epoch", "pid")}
    times = {name: _time(body, name) for name in ("asked_at", "deadline")}
    facts: dict[str, Any]
    if texts["kind"] == PRUNE:
        safe = None if body.get("safe") is None else _whole(body, "safe")
        facts = {"rule": _rule_of(body.get("rule")), "safe": safe}
    elif texts["kind"] in (PIN, UNPIN):
        facts = {"step": _whole(body, "step")}
    elif texts["kind"] == VERIFY:
        facts = {"verified": _verified_of(body.get("verified"))}
    else:
        raise InvalidArgument(f"a request asks for {texts['kind'][:80]!r}, which this version does not know")
    return Request(**texts, **numbers, **times, **facts, id=id)  # type: ignore[arg-type]


def parse_answer(data: bytes) -> Answer:
    """
    What the file of an answer says.

    Raises:
        InvalidArgument: It is no answer.
    """
    body = _object(data)
    keep, drop = body.get("keep"), body.get("drop")
    if not isinstance(keep, dict) or not isinstance(drop, dict) or not all(map(_is_id, (*keep, *drop))):
        raise InvalidArgument("an answer does not say what stays and what goes")
    if not all(isinstance(why, list) and all(isinstance(each, str) for each in why) for why in keep.values()):
        raise InvalidArgument("an answer does not say why something stays")
    if not all(isinstance(why, str) for why in drop.values()):
        raise InvalidArgument("an answer does not say why something goes")
    outcome = _text(body, "outcome")
    if outcome not in (DONE, REFUSED):
        raise InvalidArgument(f"an answer says {outcome[:80]!r}")
    stays = {int(id): tuple(why) for id, why in keep.items()}
    return Answer(outcome, _text(body, "text"), stays, {int(id): why for id, why in drop.items()})


def _object(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"not JSON: {error}") from error
    if not isinstance(body, dict):
        raise InvalidArgument("not a JSON object")
    return body


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    free = name in ("note", "text")
    # No half of a character; and nothing that could steer a terminal where it goes into a log or a reason.
    if isinstance(value, str) and (free or value) and (value.isprintable() or free) and _is_text(value):
        return value
    raise InvalidArgument(f"{name} is {str(value)[:80]!a}, not a text")


def _is_text(value: str) -> bool:
    try:
        return len(value.encode()) < MAX_BYTES
    except UnicodeEncodeError:
        return False


def _whole(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if type(value) is int and 0 <= value <= MAX_NUMBER:
        return value
    raise InvalidArgument(f"{name} is {str(value)[:80]!a}, not a whole number")


def _time(body: Mapping[str, Any], name: str) -> float:
    value = body.get(name)
    if isinstance(value, int | float) and is_finite(value):
        return float(value)
    raise InvalidArgument(f"{name} is {str(value)[:80]!a}, not a time")


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(MAX_NUMBER))
