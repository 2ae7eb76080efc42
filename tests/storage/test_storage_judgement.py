"""What is said of facts: for storage that cannot be had here, and for outcomes that are hard to provoke."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import test_file_systems as lines

from ckptmgr import storage
from ckptmgr.filesystems import Level, Mount
from ckptmgr.storage import FINDINGS, TRIALS, Finding, Leftover, Outcome, Place, Role, Trial, Verdict, judge

BOTH = (Role.RUN, Role.JOURNAL)
GB = 10**9
OWNER = {
    "umask": 0o022, "user": 1000, "owner": 1000, "group": 1000, "file_mode": 0o644, "directory_mode": 0o755,
    "setgid": 0,
}  # fmt: skip
NUMBERS: dict[str, dict[str, float]] = {
    "sync_file": {"seconds": 0.004, "rounds": 5},
    "sync_directory": {"seconds": 0.002, "rounds": 5},
    "owner": OWNER,
    "clock": {"ahead_s": 0.1},
}
GOOD = {name: Trial(Outcome.WORKS, numbers=NUMBERS.get(name, {})) for name in TRIALS}
PLACE = Place(
    "/data", "/data", 0, BOTH, lines.only(lines.EXT4.format("")),
    {"mode": 0o755, "free_bytes": 500 * GB, "free_inodes": 1e6}, GOOD,
)  # fmt: skip


def but(**changes: Any) -> Place:
    """A good place, with some facts or (by the name of the trial) some outcomes changed."""
    trials = {name: changes.pop(name) for name in list(changes) if name in TRIALS}
    numbers = {**PLACE.numbers, **changes.pop("numbers", {})}
    return dataclasses.replace(PLACE, trials={**GOOD, **trials}, numbers=numbers, **changes)


def found(place: Place, id: str, **options: Any) -> Finding:
    (finding,) = [one for one in judge([place], **options).findings if one.id == id]
    return finding


def test_ids_are_stable_and_each_has_a_meaning() -> None:
    assert [f"D{number:03}" for number in range(1, 26)] == list(FINDINGS)
    assert len(set(FINDINGS.values())) == len(FINDINGS)
    assert {judgement.id for judgement in TRIALS.values()} <= set(FINDINGS)


def test_a_good_place_can_be_trusted_and_every_id_says_so() -> None:
    report = judge([PLACE])

    assert [finding.id for finding in report.findings] == list(FINDINGS)
    assert {finding.level for finding in report.findings} == {Level.OK}
    assert {finding.hint for finding in report.findings} == {""}
    assert report.verdict is Verdict.TRUSTED


#: What each trial must come to when it does not work: a run needs it, can do without, or needs only part.
REFUSED = {
    name: Level.WARNING if name in ("links", "owner", "clock") else Level.ERROR
    for name in ("enter", "create", "share", "reserve", "replace", "keep", "exchange", "move", "sync_file",
                 "sync_directory", "flock", "fcntl", "journal", "names", "links", "owner", "clock")
}  # fmt: skip


def test_every_trial_is_judged_when_it_is_refused() -> None:
    assert REFUSED.keys() == TRIALS.keys()
    for name, level in REFUSED.items():
        finding = found(but(**{name: Trial(Outcome.REFUSED, "Bad thing", "EIO")}), TRIALS[name].id)

        assert finding.level is level, name
        assert "Bad thing" in finding.text
        assert finding.hint or level is Level.WARNING


@pytest.mark.parametrize(
    "name",
    ["create", "share", "replace", "keep", "exchange", "move", "sync_file", "flock", "fcntl", "journal", "names"],
)
def test_a_call_that_does_something_else_than_it_must_makes_a_place_unfit(name: str) -> None:
    report = judge([but(**{name: Trial(Outcome.WRONG, "so and so")})])

    assert report.verdict is Verdict.UNFIT
    assert report.ids(Level.ERROR) == [TRIALS[name].id]


@pytest.mark.parametrize(("name", "detail"), [("reserve", ""), ("keep", ""), ("exchange", ""), ("names", "143")])
def test_another_way_that_also_works_is_said_and_costs_no_trust(name: str, detail: str) -> None:
    place = but(**{name: Trial(Outcome.FALLBACK, detail)})

    assert found(place, TRIALS[name].id).level is Level.INFO
    assert detail in found(place, TRIALS[name].id).text
    assert judge([place]).verdict is Verdict.TRUSTED


def test_a_second_process_that_gives_no_answer_is_an_error() -> None:
    finding = found(but(flock=Trial(Outcome.SILENT, "for 7 s")), "D017")

    assert (finding.level, "7 s" in finding.text) == (Level.ERROR, True)


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT"])
def test_a_full_disk_is_one_error_about_space_and_says_nothing_about_the_rest(code: str) -> None:
    full = {name: Trial(Outcome.REFUSED, "It is full", code) for name in ("create", "sync_file", "flock")}
    report = judge([but(**full, journal=Trial(Outcome.REFUSED, "unable to open database file"))])

    assert report.ids(Level.ERROR) == ["D006"]
    assert report.ids(Level.INFO) == ["D008", "D015", "D017", "D020"]
    assert "It is full" in found(report.places[0], "D006").text


@pytest.mark.parametrize(
    ("facts", "need", "level"),
    [
        ({"free_bytes": 500 * GB}, None, Level.OK),
        ({"free_bytes": 9 * GB}, None, Level.WARNING),
        ({"free_bytes": 9 * GB}, 8 * GB, Level.OK),
        ({"free_bytes": 500 * GB}, 501 * GB, Level.ERROR),
        ({"free_bytes": 0}, None, Level.WARNING),
        ({"free_bytes": 0}, 1, Level.ERROR),
    ],
)
def test_free_space_is_held_against_what_is_needed(facts: dict[str, float], need: int | None, level: Level) -> None:
    assert found(but(numbers=facts), "D006", need=need).level is level


def test_a_place_for_the_journal_alone_needs_little_space_and_no_part_of_a_checkpoint() -> None:
    place = but(holds=(Role.JOURNAL,), numbers={"free_bytes": GB})

    assert found(place, "D006", need=500 * GB).level is Level.OK
    assert found(dataclasses.replace(place, numbers={"free_bytes": 10**7}), "D006").level is Level.WARNING


@pytest.mark.parametrize(("inodes", "level"), [(1e6, Level.OK), (999, Level.WARNING), (0, Level.ERROR)])
def test_free_inodes_are_counted(inodes: float, level: Level) -> None:
    assert found(but(numbers={"free_inodes": inodes}), "D007").level is level


def test_a_file_system_without_a_number_of_inodes_is_not_short_of_them() -> None:
    place = dataclasses.replace(PLACE, numbers={"free_bytes": 500 * GB, "mode": 0o755})

    assert found(place, "D007").level is Level.OK


@pytest.mark.parametrize("option", ["usrquota", "prjquota", "quota", "grpjquota=aquota.group", "uquota"])
def test_quotas_are_mentioned_with_the_free_space(option: str) -> None:
    assert PLACE.mount is not None
    mount = dataclasses.replace(PLACE.mount, options=("rw", option))

    assert option in found(but(mount=mount), "D006").text
    assert "noquota" not in found(but(mount=dataclasses.replace(mount, options=("rw", "noquota"))), "D006").text


@pytest.mark.parametrize(
    ("seconds", "rotating", "line", "level"),
    [
        (0.004, 1, lines.EXT4.format(""), Level.OK),
        (0.0004, 1, lines.EXT4.format(""), Level.INFO),
        (0.0004, 0, lines.EXT4.format(""), Level.OK),
        (0.00001, 0, lines.EXT4.format(""), Level.INFO),
        (0.00001, 0, lines.NFS4, Level.INFO),
        (0.00001, 0, lines.TMPFS, Level.OK),
    ],
)
def test_an_fsync_that_is_too_fast_is_an_observation(seconds: float, rotating: int, line: str, level: Level) -> None:
    trial = Trial(Outcome.WORKS, numbers={"seconds": seconds, "rounds": 5})
    finding = found(but(sync_file=trial, numbers={"rotating": rotating}, mount=lines.only(line)), "D015")

    assert finding.level is level
    assert "cannot be seen from here" in finding.text


@pytest.mark.parametrize(("ahead", "level"), [(0.5, Level.OK), (-1.9, Level.OK), (300, Level.INFO), (-300, Level.INFO)])
def test_a_clock_that_is_wrong_is_mentioned(ahead: float, level: Level) -> None:
    finding = found(but(clock=Trial(Outcome.WORKS, numbers={"ahead_s": ahead})), "D024")

    assert finding.level is level
    assert ("300 s" in finding.text) == (abs(ahead) == 300)


@pytest.mark.parametrize(
    ("owner", "mode", "level"),
    [
        ({}, 0o755, Level.OK),
        ({}, 0o777, Level.WARNING),
        ({}, 0o1777, Level.OK),
        ({"umask": 0, "file_mode": 0o666, "directory_mode": 0o777}, 0o755, Level.WARNING),
        ({"umask": 0o002, "file_mode": 0o664, "directory_mode": 0o775, "setgid": 1}, 0o775, Level.OK),
        ({"user": 0, "owner": 65534}, 0o755, Level.WARNING),
        ({"file_mode": 0o755}, 0o755, Level.INFO),
    ],
)
def test_owner_and_permissions(owner: dict[str, float], mode: int, level: Level) -> None:
    place = but(owner=Trial(Outcome.WORKS, numbers={**OWNER, **owner}), numbers={"mode": mode})

    assert found(place, "D023").level is level
    assert ("setgid" in found(place, "D023").text) == bool(owner.get("setgid"))


def test_a_directory_that_is_missing_is_said_and_a_whole_path_that_is_missing_warned_of() -> None:
    assert found(but(), "D001").level is Level.OK
    assert found(but(asked="/data/new", missing=1), "D001").level is Level.INFO
    finding = found(but(asked="/data/a/b", missing=2), "D001")
    assert (finding.level, "mounted" in finding.hint) == (Level.WARNING, True)
    assert "/link leads there" in found(but(asked="/link"), "D001").text


def test_a_place_that_is_stuck_is_an_error_that_names_the_step() -> None:
    place = dataclasses.replace(
        PLACE, path="", trials={}, numbers={}, stuck_at="fsync of a file", stuck_because="no answer within 10 s"
    )
    report = judge([place])

    assert report.ids(Level.ERROR) == ["D005"]
    assert found(place, "D005").text.startswith("no answer within 10 s: fsync of a file")
    assert report.of(place) == list(report.findings)


def test_what_doctors_left_is_told_by_whether_they_are_alive() -> None:
    def levels(*running: bool | None, mine: str | None = None) -> list[Level]:
        leftovers = tuple(Leftover(f"x{number}", one) for number, one in enumerate(running))
        report = judge([but(leftovers=leftovers, left_behind=mine)])
        return [finding.level for finding in report.findings if finding.id == "D025"]

    assert levels() == [Level.OK]
    assert levels(False) == [Level.WARNING]
    assert levels(None) == [Level.WARNING]
    assert levels(True) == [Level.INFO]
    assert levels(False, None, True, mine="/data/y") == [Level.WARNING, Level.WARNING, Level.INFO, Level.WARNING]


def test_many_leftovers_are_not_all_named() -> None:
    text = found(but(leftovers=tuple(Leftover(f"x{number}", running=False) for number in range(1000))), "D025").text

    assert text.endswith("x0, x1, x2 and 997 more")


def test_a_mount_that_nobody_knows_limits_the_trust() -> None:
    report = judge([but(mount=None)])

    assert report.verdict is Verdict.LIMITED
    assert report.ids(Level.WARNING) == ["D002"]


@pytest.mark.parametrize(
    ("line", "verdict", "warned", "says"),
    [
        (lines.EXT4.format(""), Verdict.TRUSTED, [], "local file system"),
        (lines.EXT4.format(",barrier=0"), Verdict.LIMITED, ["D003"], "volatile cache"),
        (lines.OVERLAY, Verdict.LIMITED, ["D002"], "container is removed"),
        (lines.NFS4, Verdict.LIMITED, ["D002"], "exports with `sync`"),
        (lines.NFS3_SOFT_NOLOCK, Verdict.LIMITED, ["D002", "D003", "D019"], "mounted with `nolock`"),
        (lines.LUSTRE.format("flock,"), Verdict.LIMITED, ["D002"], "mounted with `flock`"),
        (lines.LUSTRE.format("localflock,"), Verdict.LIMITED, ["D002", "D003", "D019"], "one host only"),
        (lines.GPFS, Verdict.LIMITED, ["D002", "D019"], "flock"),
        (lines.BEEGFS, Verdict.LIMITED, ["D002", "D019"], "tuneUseGlobalFileLocks"),
        (lines.CEPH, Verdict.LIMITED, ["D002"], "metadata servers"),
        (lines.S3FS, Verdict.UNFIT, ["D019"], "object store"),
        (lines.TMPFS, Verdict.UNFIT, [], "power cut"),
        (lines.NEWFS, Verdict.LIMITED, ["D002", "D019"], "does not know"),
    ],
)
def test_what_a_file_system_does_not_promise_limits_the_trust(
    line: str, verdict: Verdict, warned: list[str], says: str
) -> None:
    report = judge([but(mount=lines.only(line))])

    assert report.verdict is verdict
    assert report.ids(Level.WARNING) == warned
    assert any(says in finding.text for finding in report.findings)


def test_locks_between_hosts_matter_only_where_the_journal_is() -> None:
    lustre = lines.only(lines.LUSTRE.format("localflock,"))

    assert "D019" in {finding.id for finding in judge([but(mount=lustre)]).findings}
    assert "D019" not in {finding.id for finding in judge([but(mount=lustre, holds=(Role.RUN,))]).findings}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (lines.EXT4.format(""), None),
        (lines.XFS.format(""), None),
        (lines.ZFS, None),
        (lines.NEWFS, None),
        (lines.NFS4, "NFS"),
        (lines.LUSTRE.format("flock,"), "Lustre"),
        (lines.LUSTRE.format(""), "mount with `flock`"),
        (lines.GPFS, "GPFS"),
        (lines.CIFS.format(""), "SMB"),
        (lines.BINDFS, "FUSE"),
        (lines.TMPFS, "power cut"),
        (lines.OVERLAY, "container"),
        (lines.EXT4.format(",nobarrier"), "nobarrier"),
    ],
)
def test_a_manager_says_at_start_what_is_not_guaranteed_and_nothing_of_a_local_disk(
    line: str, says: str | None
) -> None:
    word = storage.word_at_start(Place("/x", "/x", 0, BOTH, lines.only(line)))

    assert (word is None) == (says is None)
    assert says is None or says in str(word)


def test_a_manager_whose_journal_is_elsewhere_hears_nothing_of_locks() -> None:
    lustre = lines.only(lines.LUSTRE.format("localflock,"))

    assert "managers on two hosts" in str(storage.word_at_start(Place("/x", "/x", 0, BOTH, lustre)))
    assert "managers on two hosts" not in str(storage.word_at_start(Place("/x", "/x", 0, (Role.RUN,), lustre)))
    assert storage.word_at_start(Place("/x", "/x", 0, BOTH, None)) is None


def test_two_places_are_told_apart_and_the_worse_one_decides() -> None:
    run = but(holds=(Role.RUN,))
    journal = but(
        holds=(Role.JOURNAL,), asked="/local", path="/local", flock=Trial(Outcome.REFUSED, "No locks", "ENOLCK")
    )
    report = judge([run, journal])

    assert report.verdict is Verdict.UNFIT
    assert {finding.path for finding in report.of(journal)} == {"/local"}
    assert [finding.id for finding in report.of(journal) if finding.level is Level.ERROR] == ["D017"]
    assert Level.ERROR not in {finding.level for finding in report.of(run)}


def test_a_report_can_be_printed_as_json_with_or_without_facts() -> None:
    stuck = Place("/x", "", 0, BOTH, None, stuck_at="looking", stuck_because="no answer")
    document = judge([PLACE, stuck]).to_dict()

    assert [place["path"] for place in document["places"]] == ["/data", "/x"]
    assert [place["free_bytes"] for place in document["places"]] == [500 * GB, None]
    assert [place["fsync_file_s"] for place in document["places"]] == [0.004, None]
    assert document["verdict"] == "unfit"


def test_texts_are_one_sentence_and_leave_no_gap() -> None:
    wrong = [but(**{name: Trial(outcome, "DETAIL")}) for name in TRIALS for outcome in (Outcome.WRONG, Outcome.REFUSED)]
    mounts = [Mount("nfs", "x", "/x", (option,)) for option in ("soft", "nolock", "nocto", "local_lock=all")]
    texts = {
        finding.text
        for place in [*wrong, *(but(mount=mount) for mount in mounts)]
        for finding in judge([place]).findings
    }

    assert all(text and "{" not in text and not text.endswith((".", " ", ":")) for text in texts - {"DETAIL", ""})
    assert not [text for text in texts if re.search(r"\s\s", text)]


@pytest.mark.parametrize(("seconds", "said"), [(4e-5, "40 µs"), (7.04e-4, "704 µs"), (0.0123, "12.3 ms"), (2.0, "2 s")])
def test_how_long_a_sync_takes_is_said_in_plain_numbers(seconds: float, said: str) -> None:
    timed = Trial(Outcome.WORKS, numbers={**NUMBERS["sync_file"], "seconds": seconds})

    assert f", {said} each" in found(but(sync_file=timed), "D015").text
