"""
What a directory can be trusted with: facts about its storage in, findings out.

Pure: `judge` gets what `doctor` has seen by trying, and what Linux says about the mount; what no trial
on one host can show comes from the tables in `filesystems`.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ckptmgr.filesystems import Kind, Level, Mount, Reach, file_system, options_that_matter, reach_of_locks

#: Every finding there is: id → what it is about. Ids are never reused for something else.
FINDINGS: Mapping[str, str] = {
    "D001": "where the directory is",
    "D002": "what kind of file system it is on",
    "D003": "options of the mount that take something away",
    "D004": "whether anything can be created there",
    "D005": "whether every call was answered in time",
    "D006": "free space",
    "D007": "free inodes",
    "D008": "exclusive create",
    "D009": "two processes writing into one file",
    "D010": "reserving the space of a file before it is written",
    "D011": "rename over an existing file",
    "D012": "rename that never replaces",
    "D013": "swapping two names in one step",
    "D014": "rename of a directory with files in it",
    "D015": "fsync of a file",
    "D016": "fsync of a directory",
    "D017": "the run lock, flock, between processes",
    "D018": "fcntl locks between processes",
    "D019": "locks between hosts",
    "D020": "a SQLite journal with the settings of ckptmgr",
    "D021": "names: their length, upper and lower case",
    "D022": "symbolic links",
    "D023": "owner and permissions of what is created",
    "D024": "the clock of the file system",
    "D025": "what an earlier doctor left",
}

#: Below this much free space (bytes) there is a warning, if nobody said how much is needed.
LOW_SPACE = 10 * 10**9
#: The same for a place that holds only the journal.
LOW_SPACE_JOURNAL = 10**8
LOW_INODES = 1000
#: A median fsync faster than this (seconds) did not wait for a rotating disk, or for anything.
FAST_ROTATING_S = 0.001
FAST_S = 0.00005
#: Seconds by which the clock of a file system may differ without a word.
CLOCK_S = 2.0
#: Mount options that say that quotas are kept.
_QUOTA = re.compile(r"(?:usr|grp|prj|user|group|project)?quota|(?:usr|grp)jquota=.*|[ugp](?:quota|qnoenforce)|quota=.*")

_FULL = ("ENOSPC", "EDQUOT")
_SHOWN = 3
_ELSEWHERE = "put the journal on a disk with working locks: journal= in code, --journal PATH here"
_ONE_HOST = (
    "let one host at a time open the run, or put the journal where only that host reaches it: journal= in code, "
    "--journal PATH here"
)


class Verdict(enum.StrEnum):
    """What a report comes to."""

    #: Nothing speaks against it.
    TRUSTED = "trusted"
    #: There are warnings.
    LIMITED = "limited"
    #: There are errors.
    UNFIT = "unfit"


class Role(enum.StrEnum):
    """What would stand in a place."""

    RUN = "run"
    JOURNAL = "journal"


# -- facts ------------------------------------------------------------------------------------------


class Outcome(enum.StrEnum):
    """How a trial ended."""

    WORKS = "works"
    #: It works in another way, which ckptmgr also takes.
    FALLBACK = "fallback"
    #: The call succeeded and did something else than it must.
    WRONG = "wrong"
    #: The operating system, or SQLite, refused.
    REFUSED = "refused"
    #: The second process did not answer in time.
    SILENT = "silent"


@dataclasses.dataclass(frozen=True)
class Trial:
    """What one trial saw: in words, with the name of the error (``ENOSPC``) and what was measured."""

    outcome: Outcome
    detail: str = ""
    error: str = ""
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Leftover:
    """A directory of another doctor. ``running`` is None where its process is of another host."""

    name: str
    running: bool | None


@dataclasses.dataclass(frozen=True)
class Place:
    """Everything that was seen of one directory."""

    #: As the user named it, absolute.
    asked: str
    #: What was tried: *asked* without links, or its nearest parent that exists. Empty if even that is not known.
    path: str
    #: How many directories of *asked* do not exist yet.
    missing: int
    holds: tuple[Role, ...]
    mount: Mount | None = None
    #: Facts about the whole: free_bytes, total_bytes, free_inodes, inodes, mode, uid, rotating.
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)
    #: By the name of the trial, see `TRIALS`.
    trials: Mapping[str, Trial] = dataclasses.field(default_factory=dict)
    leftovers: tuple[Leftover, ...] = ()
    #: What was being done when no answer came, and how long that was waited for, or what ended it instead.
    stuck_at: str | None = None
    stuck_because: str = ""
    #: The doctor's own directory, if it could not be removed.
    left_behind: str | None = None


# -- findings ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Finding:
    """One result: what was seen at *path*, in one sentence, and what to do."""

    id: str
    level: Level
    text: str
    hint: str
    path: str

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON-able facts."""
        return {**dataclasses.asdict(self), "level": self.level.value}


@dataclasses.dataclass(frozen=True)
class StorageReport:
    """What was found about one or two places."""

    places: tuple[Place, ...]
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> Verdict:
        """What it comes to, in one word."""
        levels = {finding.level for finding in self.findings}
        if Level.ERROR in levels:
            return Verdict.UNFIT
        return Verdict.LIMITED if Level.WARNING in levels else Verdict.TRUSTED

    def of(self, place: Place) -> list[Finding]:
        """The findings about one place."""
        return [finding for finding in self.findings if finding.path == (place.path or place.asked)]

    def ids(self, level: Level) -> list[str]:
        """The ids of the findings of a level, each once, in their order."""
        return list(dict.fromkeys(finding.id for finding in self.findings if finding.level is level))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able facts."""
        return {
            "verdict": self.verdict.value,
            "places": [_place_to_dict(place) for place in self.places],
            "findings": [finding.to_dict() for finding in self.findings],
        }


def _place_to_dict(place: Place) -> dict[str, Any]:
    mount = place.mount
    known = file_system(mount) if mount is not None else None
    free, inodes = place.numbers.get("free_bytes"), place.numbers.get("free_inodes")
    return {
        "path": place.path or place.asked,
        "asked": place.asked,
        "missing": place.missing,
        "holds": [role.value for role in place.holds],
        "file_system": known.name if known is not None else None,
        "kind": known.kind.value if known is not None else None,
        "type": mount.type if mount is not None else None,
        "source": mount.source if mount is not None else None,
        "mount_point": mount.point if mount is not None else None,
        "mount_options": list(mount.options) if mount is not None else [],
        "free_bytes": int(free) if free is not None else None,
        "free_inodes": int(inodes) if inodes is not None else None,
        "fsync_file_s": _measured(place, "sync_file"),
        "fsync_directory_s": _measured(place, "sync_directory"),
    }


def _measured(place: Place, trial: str) -> float | None:
    return place.trials[trial].numbers.get("seconds") if trial in place.trials else None


def judge(places: Sequence[Place], *, need: int | None = None) -> StorageReport:
    """
    Say what can be trusted in each place.

    Args:
        places: What was seen.
        need: Bytes that must be free for checkpoints, if the caller knows.
    """
    findings = []
    for place in places:
        path = place.path or place.asked
        found = [
            Finding(id, level, text, hint, path)
            for judged in (_where, _mounted, _answers, _space, _tried, _locks_between_hosts, _left)
            for id, level, text, hint in judged(place, need)
        ]
        findings += sorted(found, key=lambda finding: finding.id)
    return StorageReport(tuple(places), tuple(findings))


def word_at_start(place: Place) -> str | None:
    """
    What a manager must say when it starts in *place*, of which only the mount is known; None if nothing.

    A file system that is not known is no reason to say something at every start.
    """
    if place.mount is None or file_system(place.mount).kind is Kind.UNKNOWN:
        return None
    said = [
        f"{text} ({hint})" if hint else text
        for judged in (_mounted, _locks_between_hosts)
        for _, level, text, hint in judged(place, None)
        if level in (Level.WARNING, Level.ERROR)
    ]
    return "; ".join(said) or None


Said = Iterator[tuple[str, Level, str, str]]


def _where(place: Place, need: int | None) -> Said:
    del need
    if not place.path:
        return
    if not place.missing:
        link = f"; {place.asked} leads there" if place.path != place.asked else ""
        yield "D001", Level.OK, f"{place.path} exists{link}", ""
    else:
        level = Level.INFO if place.missing == 1 else Level.WARNING
        hint = "" if place.missing == 1 else "is its file system mounted? If the path is right, a manager creates it"
        yield "D001", level, f"{place.asked} does not exist yet; {place.path}, where it would be made, was tried", hint


def _mounted(place: Place, need: int | None) -> Said:
    del need
    mount = place.mount
    if mount is None:
        hint = "look with `findmnt` what it is"
        yield "D002", Level.WARNING, "it cannot be told which file system this is: /proc says nothing of it", hint
        return
    known = file_system(mount)
    yield "D002", known.level, f"{known.name}, {known.text}", known.hint
    matter = options_that_matter(mount)
    for text, option in matter:
        yield "D003", option.level, f"mounted with `{text}`: {option.text}", option.hint
    if not matter:
        yield "D003", Level.OK, "no mount option that is known to take something away", ""


def _answers(place: Place, need: int | None) -> Said:
    del need
    if place.stuck_at is not None:
        hint = (
            "look at the server, the network and `dmesg`: a manager would get stuck in the same way; "
            "if it is only slow, give it longer with --timeout"
        )
        text = f"{place.stuck_because}: {place.stuck_at}; what comes after it was not tried"
        yield "D005", Level.ERROR, text, hint
    else:
        yield "D005", Level.OK, "every call was answered in time", ""


def _space(place: Place, need: int | None) -> Said:
    if "free_bytes" not in place.numbers:
        return
    free, inodes = place.numbers["free_bytes"], place.numbers.get("free_inodes")
    text = f"{_size(free)} are free"
    full = _refused_for_space(place)
    holds_run = Role.RUN in place.holds
    low = LOW_SPACE if holds_run else LOW_SPACE_JOURNAL
    quotas = [option for option in place.mount.options if _QUOTA.fullmatch(option)] if place.mount is not None else []
    if need is not None and holds_run:
        text += f", {_size(need)} are needed"
        low = 0
    if full:
        yield "D006", Level.ERROR, f"writing is refused, {full}; {text}", "free space or inodes, or raise the quota"
    elif need is not None and holds_run and free < need:
        yield "D006", Level.ERROR, text, "free space, or choose another directory"
    elif free < low:
        hint = "a checkpoint stands beside the old ones until it is committed; --need SIZE says how much that takes"
        yield "D006", Level.WARNING, text, hint if holds_run else "the journal needs room to grow"
    elif quotas:
        yield (
            "D006",
            Level.INFO,
            f"{text}; quotas are on (`{quotas[0]}`), so your own limit may be lower",
            "see `quota -s`",
        )
    else:
        yield "D006", Level.OK, text, ""
    if inodes is None:
        yield "D007", Level.OK, "this file system has no fixed number of inodes", ""
    elif inodes < LOW_INODES:
        level = Level.WARNING if inodes >= 1 else Level.ERROR
        yield "D007", level, f"{inodes:.0f} inodes are free", "remove files: each file of a checkpoint takes one"
    else:
        yield "D007", Level.OK, f"{inodes:.0f} inodes are free", ""


def _refused_for_space(place: Place) -> str:
    return next((trial.detail for trial in place.trials.values() if trial.error in _FULL), "")


def _locks_between_hosts(place: Place, need: int | None) -> Said:
    del need
    if Role.JOURNAL not in place.holds or place.mount is None:
        return
    reach, why = reach_of_locks(place.mount)
    if reach is Reach.ALONE:
        yield "D019", Level.OK, "one host uses this file system, so a lock that holds here holds everywhere", ""
    elif reach is Reach.ALL:
        text = f"locks are meant to hold on all hosts ({why}); from one host that cannot be tried"
        yield "D019", Level.INFO, text, "have one host at a time open the run; SQLite advises it on any network storage"
    elif reach is Reach.HOST:
        text = (
            f"locks hold on one host only ({why}), so managers on two hosts could have one run and damage its journal"
        )
        yield "D019", Level.WARNING, text, _ONE_HOST
    else:
        yield "D019", Level.WARNING, f"whether locks hold on other hosts cannot be told from here: {why}", _ONE_HOST


def _left(place: Place, need: int | None) -> Said:
    del need
    names = [left.name for left in place.leftovers if left.running is False]
    unsure = [left.name for left in place.leftovers if left.running is None]
    running = [left.name for left in place.leftovers if left.running]
    if names:
        text = f"a doctor that was killed left {_some(names)}"
        yield "D025", Level.WARNING, text, "remove it with `rm -r`; it holds nothing of a run"
    if unsure:
        text = f"a doctor of another host left {_some(unsure)}, or is at work"
        yield "D025", Level.WARNING, text, "if no doctor runs there now, remove it with `rm -r`"
    if running:
        yield "D025", Level.INFO, f"another doctor is at work here, in {_some(running)}", ""
    if place.left_behind is not None:
        text = f"this doctor could not remove its own directory {place.left_behind}"
        yield "D025", Level.WARNING, text, "remove it with `rm -r` when the storage answers again"
    elif not place.leftovers and place.path:
        yield "D025", Level.OK, "nothing was left by a doctor", ""


# What was tried


@dataclasses.dataclass(frozen=True)
class _Judgement:
    """What is said of the outcomes of one trial; ``{}`` stands for its detail. An outcome without a text cannot be."""

    id: str
    works: str
    wrong: str
    refused: str
    hint: str = "do not put a run here"
    fallback: str = ""
    worst: Level = Level.ERROR


#: Name of a trial → how it is judged. `doctor` has a function for each.
TRIALS: Mapping[str, _Judgement] = {
    "enter": _Judgement(
        "D004", "directories can be created here", "", "nothing can be created here: {}",
        "see whether it is mounted, and whether the user of the training may write there"),
    "create": _Judgement(
        "D008", "a name is created once: a second create is refused, in this process and in another",
        "a name can be created twice: {}", "files cannot be created: {}"),
    "share": _Judgement(
        "D009", "two processes wrote into one file, and both see all of it",
        "what two processes wrote into one file is not what is read: {}",
        "a second process cannot write into a file: {}",
        "do not put a run here: the journal, and exports that several ranks fill, are written so"),
    "reserve": _Judgement(
        "D010", "the space of a file is reserved before it is written, so a full disk is met early",
        "the reserved space is not there: {}", "a file cannot be given its size: {}",
        fallback="space cannot be reserved: a full disk is met in the middle of a write, which fails that save"),
    "replace": _Judgement(
        "D011", "a rename over a file replaces it, and another process sees the new one",
        "a rename over a file does not replace it: {}", "a file cannot be renamed over another: {}"),
    "keep": _Judgement(
        "D012", "a rename can be told never to replace (RENAME_NOREPLACE)",
        "a rename that must not replace does: {}", "a file cannot be renamed: {}",
        fallback="a rename cannot be told never to replace: ckptmgr looks at the name before it renames, and somebody "
        "else could come in between"),
    "exchange": _Judgement(
        "D013", "two names can be swapped in one step (RENAME_EXCHANGE)",
        "swapping two names does something else: {}", "two names cannot be swapped: {}",
        fallback="two names cannot be swapped in one step: overwriting a step takes two renames, and for a moment the "
        "final name is free"),
    "move": _Judgement(
        "D014", "a directory with files in it is renamed as a whole, and another process sees only the new name",
        "a directory that was renamed is not whole: {}", "a directory with files in it cannot be renamed: {}",
        "do not put a run here: publishing a checkpoint is such a rename"),
    "sync_file": _Judgement(
        "D015", "fsync of a file works", "a file that was synced has other bytes: {}", "fsync of a file fails: {}",
        "do not put a run here: no checkpoint could be made durable"),
    "sync_directory": _Judgement(
        "D016", "fsync of a directory works", "", "fsync of a directory fails: {}",
        "do not put a run here: no checkpoint could be made durable"),
    "flock": _Judgement(
        "D017", "the run lock is refused to a second process, and free once its holder is killed",
        "the run lock does not hold: {}", "the run lock cannot be taken: {}", _ELSEWHERE),
    "fcntl": _Judgement(
        "D018", "a lock as SQLite takes it (fcntl) is refused to a second process, and free once its holder is killed",
        "fcntl locks do not hold: {}", "fcntl locks cannot be taken: {}", _ELSEWHERE),
    "journal": _Judgement(
        "D020", "SQLite took every setting, refused a second writer, and undid what a killed writer left half done",
        "SQLite does not do here what it promises: {}", "SQLite cannot work here: {}", _ELSEWHERE),
    "names": _Judgement(
        "D021", "names may have 255 bytes, and upper and lower case differ",
        "two names that differ in upper and lower case alone are one file", "names cannot be as long as needed: {}",
        "do not put a run here: files of an export could overwrite each other",
        fallback="names may have at most {} bytes; ckptmgr's own have fewer than 128, files of your assets may not"),
    "links": _Judgement(
        "D022", "a symbolic link is made, and replaced in one step", "a symbolic link leads elsewhere: {}",
        "symbolic links cannot be made: {}", "there will be no `hf-latest`; name exports by their step",
        worst=Level.WARNING),
    "owner": _Judgement("D023", "", "", "owner and permissions cannot be read: {}", "", worst=Level.WARNING),
    "clock": _Judgement("D024", "", "", "times cannot be read: {}", "", worst=Level.WARNING),
}  # fmt: skip


def _tried(place: Place, need: int | None) -> Said:
    del need
    full = _refused_for_space(place)
    for name, trial in place.trials.items():
        judgement = TRIALS[name]
        # SQLite does not always say why it cannot open or write a file.
        if full and (trial.error in _FULL or (name == "journal" and trial.outcome is Outcome.REFUSED)):
            yield judgement.id, Level.INFO, f"not tried, {full}: {FINDINGS[judgement.id]}", ""
        elif trial.outcome is Outcome.WORKS:
            measured = _MEASURED.get(name)
            level, text, hint = measured(place, trial) if measured else (Level.OK, judgement.works, "")
            yield judgement.id, level, text, hint
        elif trial.outcome is Outcome.FALLBACK:
            yield judgement.id, Level.INFO, judgement.fallback.format(trial.detail), ""
        elif trial.outcome is Outcome.SILENT:
            text = f"{FINDINGS[judgement.id]}: a second process gave no answer, {trial.detail}"
            yield judgement.id, Level.ERROR, text, judgement.hint
        else:
            text = judgement.wrong if trial.outcome is Outcome.WRONG else judgement.refused
            yield judgement.id, judgement.worst, text.format(trial.detail), judgement.hint


def _sync_file(place: Place, trial: Trial) -> tuple[Level, str, str]:
    honest = "whether the disk keeps what it acknowledges through a power cut cannot be seen from here"
    seconds = trial.numbers["seconds"]
    text = f"fsync of a file works, {_duration(seconds)} each (median of {trial.numbers['rounds']:.0f}); {honest}"
    rotating = bool(place.numbers.get("rotating"))
    in_memory = place.mount is not None and file_system(place.mount).kind is Kind.MEMORY
    if in_memory or seconds >= (FAST_ROTATING_S if rotating else FAST_S):
        return Level.OK, text, ""
    what = "a rotating disk" if rotating else "a disk or a server"
    return (
        Level.INFO,
        f"{text}; it is faster than {what} that waits for its medium, so a cache may be answering",
        "make sure that the disk, or the host of this virtual machine, keeps its cache through a power cut",
    )


def _sync_directory(place: Place, trial: Trial) -> tuple[Level, str, str]:
    del place
    each = f"{_duration(trial.numbers['seconds'])} each (median of {trial.numbers['rounds']:.0f})"
    return Level.OK, f"fsync of a directory works, {each}", ""


def _owner(place: Place, trial: Trial) -> tuple[Level, str, str]:
    seen = {key: int(value) for key, value in trial.numbers.items()}
    text = (
        f"files are made as {seen['file_mode']:03o}, directories as {seen['directory_mode']:03o}, of user "
        f"{seen['owner']} and group {seen['group']} (umask {seen['umask']:03o})"
    )
    if seen["setgid"]:
        text += "; they get the group of the directory (setgid)"
    mode = int(place.numbers.get("mode", 0))
    if mode & 0o002 and not mode & 0o1000:
        hint = "take the write permission of others away (`chmod o-w`), or set the sticky bit (`chmod +t`)"
        return Level.WARNING, f"every user may rename or replace what is in {place.path}; {text}", hint
    if seen["file_mode"] & 0o002:
        return Level.WARNING, f"every user may change a checkpoint's files: {text}", "set umask 022 or 027 in the job"
    if seen["owner"] != seen["user"]:
        hint = "the server maps users (root_squash, idmapping): make sure that all ranks write as one user"
        return Level.WARNING, f"what user {seen['user']} makes belongs to another user: {text}", hint
    if seen["file_mode"] != 0o666 & ~seen["umask"] or seen["directory_mode"] & 0o777 != 0o777 & ~seen["umask"]:
        return Level.INFO, f"the file system sets permissions of its own: {text}", ""
    return Level.OK, text, ""


def _clock(place: Place, trial: Trial) -> tuple[Level, str, str]:
    del place
    ahead = trial.numbers["ahead_s"]
    if abs(ahead) <= CLOCK_S:
        return Level.OK, "times of files agree with this host's clock", ""
    text = f"times of files are {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this host's clock"
    return Level.INFO, f"{text}; ckptmgr decides nothing by them, other programs may", "set the clocks by NTP"


_MEASURED = {"sync_file": _sync_file, "sync_directory": _sync_directory, "owner": _owner, "clock": _clock}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _size(count: float) -> str:
    for limit, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count:.0f} bytes"


def _duration(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e6:.0f} µs"
