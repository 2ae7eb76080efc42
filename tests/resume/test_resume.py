"""Every finding and verdict, and every combination of what may be wrong with two candidates."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import InvalidArgument, UnsafeResume
from ckptmgr.lifecycle import CheckpointRecord, CheckpointState, Format
from ckptmgr.manifest import FileEntry, Manifest
from ckptmgr.recovery import Found, FoundKind
from ckptmgr.resume import (
    DAMAGE,
    FINDINGS,
    Candidate,
    Level,
    ResumeReport,
    Verdict,
    check,
    looks,
    of_projections,
    shares,
)

S = CheckpointState
DIGEST = "xxh3_128:" + "1" * 32


def record(id: int, step: int, state: CheckpointState = S.COMMITTED, **facts) -> CheckpointRecord:
    series = facts.get("series", "checkpoint")
    known = {
        "series": series,
        "format": Format.DCP,
        "epoch": 1,
        "world_size": 8,
        "directory": f"{series}/step-{step}",
        "staging_directory": f"{series}/.step-{step}.e1.a{id}.incomplete",
        "created_at": 1.0,
        "manifest_digest": DIGEST,
        "commit_seq": id if state is S.COMMITTED else None,
        "committed_at": 2.0 if state is S.COMMITTED else None,
    }
    return CheckpointRecord(id=id, step=step, state=state, **{**known, **facts})


def at(row: CheckpointRecord, **facts) -> Found:
    """*row*'s directory, verified and intact unless *facts* say otherwise."""
    known = {
        "path": row.directory,
        "series": row.series,
        "kind": FoundKind.FINAL,
        "step": row.step,
        "holds": row.id,
        "mismatches": (),
        "manifest_digest": DIGEST,
    }
    return Found(**{**known, **facts})


def ids(report: ResumeReport) -> list[str]:
    return [finding.id for finding in report.all_findings]


def checked(rows, found, **how) -> ResumeReport:
    return check(rows, found, **{"series": "checkpoint", **how})


#: What may be wrong with one candidate: facts about what was found (None: nothing there), and the findings.
WRONG = {
    "intact": ({}, []),
    "not verified": ({"mismatches": None}, []),
    "missing": (None, ["R002"]),
    "a link": ({"is_directory": False, "holds": None}, ["R002"]),
    "no manifest": ({"holds": None, "mismatches": None, "manifest_digest": None}, ["R003"]),
    "refused by the disk": ({"holds": None, "unreadable": True, "mismatches": ("unreadable: EIO",)}, ["R003"]),
    "another attempt": ({"holds": 99}, ["R003"]),
    "another manifest": ({"manifest_digest": "xxh3_128:" + "2" * 32}, ["R003"]),
    "manifest mismatch": ({"mismatches": ("manifest: unreadable",)}, ["R003"]),
    "missing file": ({"mismatches": ("missing: a",)}, ["R004"]),
    "short file": ({"mismatches": ("size: a has 1 bytes",)}, ["R004"]),
    "unheard of mismatch": ({"mismatches": ("gone with the wind",)}, ["R004"]),
    "flipped bit": ({"mismatches": ("digest: a",)}, ["R005"]),
    "several": ({"mismatches": ("digest: a", "missing: b", "size: c", "manifest: d")}, ["R003", "R004", "R005"]),
}
#: (world size today, names used) → whether state that differs by rank stands in the way.
RANKS = {
    (None, None): False,
    (8, None): False,
    (4, None): True,
    (4, ()): False,
    (4, ("rng",)): False,
    (4, ("data",)): True,
}


def test_every_combination_of_two_candidates_and_world_sizes_gives_the_right_verdict():
    rows = [record(1, 10, per_rank=("data",)), record(2, 20, per_rank=())]
    for (old, new), (ranks, blocks) in itertools.product(itertools.product(WRONG, repeat=2), RANKS.items()):
        found = [
            at(row, **WRONG[wrong][0])
            for row, wrong in zip(rows, (old, new), strict=True)
            if WRONG[wrong][0] is not None
        ]
        report = checked(rows, found, world_size=ranks[0], per_rank_used=ranks[1])
        old_ids = WRONG[old][1] + (["R006"] if blocks else [])

        assert [candidate.record.id for candidate in report.candidates] == [2, 1]
        assert [WRONG[new][1], old_ids] == [[f.id for f in c.findings] for c in report.candidates]
        assert [not WRONG[new][1], not old_ids] == [candidate.safe for candidate in report.candidates]
        if not WRONG[new][1]:
            expected = (Verdict.SAFE, rows[1])
        elif not old_ids:
            expected = (Verdict.OLDER, rows[0])
        else:
            expected = (Verdict.CORRUPT if WRONG[old][1] else Verdict.UNSAFE, None)
        assert expected == (report.verdict, report.chosen)
        assert report.newest_is_safe == (report.verdict is Verdict.SAFE)
        json.dumps(report.to_dict(), allow_nan=False)


def test_every_error_is_of_a_known_id_and_has_a_hint():
    rows = [record(1, 10, per_rank=("data",))]
    for facts, _ in WRONG.values():
        report = checked(rows, [] if facts is None else [at(rows[0], **facts)], world_size=3)
        for finding in report.all_findings:
            assert finding.id in FINDINGS
            assert finding.level is Level.ERROR
            assert finding.hint
            assert (finding.series, finding.step, finding.checkpoint_id) == ("checkpoint", 10, 1)


def test_findings_have_one_meaning_each():
    assert [f"R{number:03}" for number in range(1, 17)] == list(FINDINGS)
    assert len(set(FINDINGS.values())) == len(FINDINGS)
    assert FINDINGS.keys() > DAMAGE


def test_nothing_committed_is_an_error_of_its_own():
    report = checked([], [])

    assert (report.verdict, report.chosen, report.newest_is_safe) == (Verdict.NONE, None, False)
    assert ids(report) == ["R001"]
    assert report.findings[0].level is Level.ERROR


def test_what_was_not_looked_at_is_no_candidate_and_no_finding():
    """Also where its row is among those that were asked for, say because a copy of it stands elsewhere."""
    newest, older = record(2, 20), record(1, 10)
    report = checked([newest, older], [at(newest, mismatches=("missing: a",))], besides={older.directory})

    assert [candidate.record for candidate in report.candidates] == [newest]
    assert (report.chosen, ids(report)) == (None, ["R004"])


@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("count", range(20))
def test_the_newest_are_looked_at_first_and_all_in_the_end(count, first):
    *some, all_ = looks(count, first)

    assert all_ == count
    assert some == [first * 2**n for n in range(len(some))]
    assert all(look < count for look in some)
    assert not some or 2 * some[-1] >= count


def test_newest_is_by_commit_order_not_by_step():
    """A run that was set back to step 100 after step 500 resumes from step 100."""
    rows = [record(1, 500, commit_seq=1), record(2, 100, commit_seq=2)]
    report = checked(rows, [at(row) for row in rows])

    assert report.chosen == rows[1]
    assert [candidate.record.step for candidate in report.candidates] == [100, 500]


def test_newest_is_by_commit_order_not_by_attempt():
    rows = [record(1, 10, commit_seq=9), record(2, 20, commit_seq=8)]

    assert checked(rows, [at(row) for row in rows]).chosen == rows[0]


def test_a_retiring_checkpoint_is_no_candidate_although_it_is_intact():
    rows = [record(1, 10), record(2, 20, retire_started_at=3.0)]
    report = checked(rows, [at(row) for row in rows])

    assert report.chosen == rows[0]
    assert ids(report) == []


@pytest.mark.parametrize("state", [S.PREWRITTEN, S.WRITING, S.GATHERED, S.FAILED])
def test_what_is_not_committed_is_never_chosen_however_whole_it_looks(state):
    row = record(2, 20, state)
    report = checked([row], [at(row)])

    assert report.verdict is Verdict.NONE
    assert report.candidates == ()


def test_a_directory_without_a_row_is_never_chosen():
    stranger = at(record(7, 70))
    report = checked([], [stranger])

    assert report.verdict is Verdict.NONE
    assert ids(report) == ["R001", "R008"]
    assert stranger.path in report.findings[1].text


def test_only_the_asked_step_is_judged():
    rows = [record(1, 10), record(2, 20), record(3, 30, S.FAILED)]
    found = [at(row) for row in rows[:2]]
    report = checked(rows, found, step=10)

    assert (report.verdict, report.chosen) == (Verdict.SAFE, rows[0])
    assert ids(report) == []


def test_a_step_that_was_never_committed_is_named():
    report = checked([record(1, 10)], [at(record(1, 10))], step=11)

    assert report.verdict is Verdict.NONE
    assert "step 11" in report.findings[0].text


def test_other_series_do_not_matter():
    rows = [record(1, 10), record(2, 20, series="snapshot"), record(3, 30, S.FAILED, series="snapshot")]
    report = checked(rows, [at(rows[0]), at(rows[1], path="snapshot/step-99")])

    assert report.chosen == rows[0]
    assert ids(report) == []


def test_a_newer_attempt_that_failed_is_a_warning_with_its_reason():
    rows = [record(1, 5, S.FAILED, reason="old news"), record(2, 10), record(3, 20, S.FAILED, reason="disk full")]
    report = checked(rows, [at(rows[1])])
    [finding] = report.findings

    assert (finding.id, finding.level, finding.step, finding.checkpoint_id) == ("R007", Level.WARNING, 20, 3)
    assert "disk full" in finding.text
    assert report.verdict is Verdict.SAFE


def test_a_failed_attempt_without_a_reason_is_still_told():
    report = checked([record(3, 20, S.FAILED)], [])

    assert ids(report) == ["R001", "R007"]
    assert "no reason recorded" in report.findings[1].text


@pytest.mark.parametrize(
    ("state", "outcome"),
    [(S.PREWRITTEN, "rolled back"), (S.WRITING, "rolled back"), (S.GATHERED, "committed if it is intact")],
)
def test_an_interrupted_attempt_says_what_recovery_will_do(state, outcome):
    rows = [record(1, 10), record(2, 20, state)]
    report = checked(rows, [at(rows[0])])
    [finding] = report.findings

    assert (finding.id, finding.level, finding.checkpoint_id) == ("R009", Level.WARNING, 2)
    assert outcome in finding.text
    assert report.verdict is Verdict.SAFE


def test_an_attempt_of_a_live_manager_is_only_in_flight():
    rows = [record(1, 10), record(2, 20, S.WRITING)]
    [finding] = checked(rows, [at(rows[0])], live_epoch=True).findings

    assert (finding.id, finding.level, finding.checkpoint_id) == ("R010", Level.INFO, 2)


@pytest.mark.parametrize(("live_epoch", "id"), [(False, "R009"), (True, "R010")])
@pytest.mark.parametrize("there", ["nothing", "the new one"])
def test_a_checkpoint_that_an_overwrite_moved_aside_is_not_corrupt_but_not_safe_now(live_epoch, id, there):
    rows = [record(1, 10), record(2, 10, S.GATHERED, overwrites=1)]
    found = [at(rows[0], holds=2)] if there == "the new one" else []
    report = checked(rows, found, live_epoch=live_epoch)

    assert report.verdict is Verdict.UNSAFE
    assert [id] == [finding.id for finding in report.candidates[0].findings]


def test_a_checkpoint_that_is_being_overwritten_and_still_stands_there_is_safe():
    rows = [record(1, 10), record(2, 10, S.GATHERED, overwrites=1)]

    assert checked(rows, [at(rows[0])]).chosen == rows[0]


def test_a_damaged_checkpoint_that_is_being_overwritten_is_damaged():
    rows = [record(1, 10), record(2, 10, S.GATHERED, overwrites=1)]
    report = checked(rows, [at(rows[0], mismatches=("size: a",))])

    assert [finding.id for finding in report.candidates[0].findings] == ["R004"]


@pytest.mark.parametrize("state", [S.PREWRITTEN, S.WRITING])
def test_before_gathered_an_overwrite_explains_no_missing_directory(state):
    rows = [record(1, 10), record(2, 10, state, overwrites=1)]

    assert checked(rows, []).verdict is Verdict.CORRUPT


@pytest.mark.parametrize(
    ("path", "kind", "is_known"),
    [
        ("checkpoint/step-10", FoundKind.FINAL, True),
        ("checkpoint/step-20", FoundKind.FINAL, True),
        ("checkpoint/step-30", FoundKind.FINAL, True),
        ("checkpoint/step-40", FoundKind.FINAL, False),
        ("checkpoint/step-50", FoundKind.FINAL, False),
        ("checkpoint/step-60", FoundKind.FINAL, False),
        ("checkpoint/.step-40.e1.a4.incomplete", FoundKind.STAGING, True),
        ("checkpoint/.step-50.e1.a5.retired", FoundKind.RETIRED, True),
        ("checkpoint/.step-40.e1.a99.incomplete", FoundKind.STAGING, False),
        ("checkpoint/.step-40.e1.a4.quarantined", FoundKind.QUARANTINED, False),
        ("checkpoint/notes.txt", FoundKind.OTHER, False),
        ("checkpoint/hf-latest", FoundKind.LINK, True),
    ],
)
def test_what_the_journal_accounts_for_is_known_and_all_else_is_told(path, kind, is_known):
    rows = [
        record(1, 10),
        record(2, 20, S.GATHERED),
        record(3, 30, retire_started_at=3.0),
        record(4, 40, S.FAILED),
        record(5, 50, retire_started_at=3.0, retired_at=4.0),
    ]
    item = Found(path=path, series="checkpoint", kind=kind, holds=1)
    unknown = [finding for finding in checked(rows, [item]).findings if finding.id == "R008"]

    assert bool(unknown) != is_known
    assert all((finding.level, finding.checkpoint_id) == (Level.INFO, None) for finding in unknown)
    assert all(path in finding.text for finding in unknown)


def test_many_mismatches_are_one_finding_that_names_the_first():
    row = record(1, 10)
    wrong = tuple(f"size: file-{number}" for number in range(9))
    [finding] = checked([row], [at(row, mismatches=wrong)]).all_findings

    assert "file-0" in finding.text
    assert "file-2" in finding.text
    assert "file-3" not in finding.text
    assert "and 6 more" in finding.text


def test_exactly_as_many_mismatches_as_are_shown_have_no_more():
    row = record(1, 10)
    [finding] = checked([row], [at(row, mismatches=("size: a", "size: b", "size: c"))]).all_findings

    assert "more" not in finding.text


def test_a_world_size_finding_names_the_state_and_both_sizes():
    row = record(1, 10, per_rank=("data", "rng"))
    [finding] = checked([row], [at(row)], world_size=4, per_rank_used={"rng"}).all_findings

    assert finding.id == "R006"
    assert "rng" in finding.text
    assert "data" not in finding.text
    assert "8 ranks" in finding.text
    assert "4 ranks" in finding.text
    assert "resume with 8 ranks" in finding.hint


def test_a_digest_that_only_one_side_knows_is_no_finding():
    for row, item in (
        (record(1, 10, manifest_digest=None), at(record(1, 10))),
        (record(1, 10), at(record(1, 10), manifest_digest=None)),
    ):
        assert checked([row], [item]).verdict is Verdict.SAFE


def test_the_report_does_not_depend_on_the_order_of_its_input():
    rows = [record(1, 10), record(2, 20), record(3, 30, S.FAILED), record(4, 40, S.WRITING)]
    found = [at(rows[0]), at(rows[1], holds=None), at(record(8, 80)), at(record(9, 90))]

    assert checked(rows, found) == checked(rows[::-1], found[::-1])


def test_a_report_is_plain_data():
    rows = [record(1, 10), record(2, 20), record(3, 30, S.FAILED, reason="r")]
    report = checked(rows, [at(rows[0]), at(rows[1], mismatches=("size: a",))])

    assert json.loads(json.dumps(report.to_dict())) == {
        "series": "checkpoint",
        "verdict": "older",
        "newest_is_safe": False,
        "chosen": {"checkpoint_id": 1, "step": 10, "directory": "checkpoint/step-10"},
        "candidates": [
            {
                "checkpoint_id": 2,
                "step": 20,
                "directory": "checkpoint/step-20",
                "safe": False,
                "findings": [
                    {
                        "id": "R004",
                        "level": "error",
                        "text": "checkpoint/step-20: size: a",
                        "hint": "restore the files, or resume from an older checkpoint",
                        "series": "checkpoint",
                        "step": 20,
                        "checkpoint_id": 2,
                    }
                ],
            },
            {"checkpoint_id": 1, "step": 10, "directory": "checkpoint/step-10", "safe": True, "findings": []},
        ],
        "not_looked_at": 0,
        "findings": [
            {
                "id": "R007",
                "level": "warning",
                "text": "attempt 3 to save step 30 failed: r",
                "hint": "run `ckptmgr show RUN 30 --series checkpoint` to see each rank's cause",
                "series": "checkpoint",
                "step": 30,
                "checkpoint_id": 3,
            }
        ],
    }


def test_a_report_travels_inside_its_error_between_ranks():
    report = checked([record(1, 10)], [])
    copy = pickle.loads(pickle.dumps(UnsafeResume("not safe", report=report)))

    assert report == copy.report


def test_a_warning_does_not_make_a_candidate_unsafe():
    row = record(1, 10)
    [candidate] = checked([row], [at(row)]).candidates
    [error] = checked([row], []).all_findings

    assert Candidate(row, (dataclasses.replace(error, level=Level.WARNING),)).safe
    assert not Candidate(row, (error,)).safe
    assert candidate.safe


@pytest.mark.parametrize("how", [{"step": -1}, {"step": True}, {"step": "10"}, {"step": 1.0}])
def test_a_step_that_cannot_be_one_is_refused(how):
    with pytest.raises(InvalidArgument, match="step is"):
        checked([], [], **how)


@pytest.mark.parametrize("how", [{"world_size": 0}, {"world_size": -8}, {"world_size": True}, {"world_size": "8"}])
def test_a_world_size_that_cannot_be_one_is_refused(how):
    with pytest.raises(InvalidArgument, match="world_size is"):
        checked([], [], **how)


def test_step_zero_can_be_asked_for():
    row = record(1, 0)

    assert checked([row], [at(row)], step=0).chosen == row


def test_a_path_that_is_found_twice_is_refused():
    with pytest.raises(InvalidArgument, match="listed twice"):
        checked([], [at(record(1, 10))] * 2)


def test_a_committed_row_without_its_place_in_the_order_is_refused():
    with pytest.raises(InvalidArgument, match="no commit number"):
        checked([record(1, 10, commit_seq=None)], [])


# --- journal and manifest


FILES = (FileEntry("a", 3, "xxh3_128:" + "a" * 32, 0), FileEntry("b", 4, "xxh3_128:" + "b" * 32, 1))


def manifest_of(row: CheckpointRecord, **facts) -> Manifest:
    known = {
        "run_id": "r", "series": row.series, "step": row.step, "attempt": row.id, "epoch": 1, "format": row.format,
        "world_size": row.world_size, "created_at": 1.0, "files": FILES, "per_rank": row.per_rank,
        "metrics": row.metrics,
    }  # fmt: skip
    return Manifest(**{**known, **facts})


#: What a manifest may say besides what its row says, and the words that tell.
OTHER = {
    "step": ({"step": 21}, "step 21, the journal 20"),
    "series": ({"series": "other"}, "series other, the journal checkpoint"),
    "format": ({"format": Format.HUGGINGFACE}, "format hf, the journal dcp"),
    "world_size": ({"world_size": 4}, "world_size 4, the journal 8"),
    "per_rank": ({"per_rank": ("data",)}, "per_rank"),
    "metrics": ({"metrics": {"loss": 1.0}}, "metrics"),
    "bytes": ({"files": (FILES[0],)}, "bytes 3, the journal 7"),
    "digest": ({"files": (FILES[0], dataclasses.replace(FILES[1], digest="xxh3_128:" + "c" * 32))}, "differ on b"),
    "rank": ({"files": (FILES[0], dataclasses.replace(FILES[1], rank=7))}, "differ on b"),
    "name": ({"files": (FILES[0], dataclasses.replace(FILES[1], path="c"))}, "differ on b; ckptmgr.json and"),
}


@pytest.mark.parametrize("what", OTHER)
def test_a_row_and_its_manifest_that_contradict_each_other_are_damage(what):
    facts, words = OTHER[what]
    rows = [record(1, 10, bytes=7), record(2, 20, bytes=7)]
    found = [at(rows[0], manifest=manifest_of(rows[0])), at(rows[1], manifest=manifest_of(rows[1], **facts))]
    report = checked(rows, found, files={1: FILES, 2: FILES})
    (finding,) = report.candidates[0].findings

    assert (finding.id, finding.level, report.verdict) == ("R011", Level.ERROR, Verdict.OLDER)
    assert report.candidates[0].damaged
    assert words in finding.text
    assert "checkpoint/step-20: ckptmgr.json" in finding.text
    assert report.candidates[1].findings == ()


def test_the_files_are_only_compared_where_the_journal_was_asked():
    row = record(2, 20, bytes=7)
    found = [at(row, manifest=manifest_of(row, files=(FILES[1], dataclasses.replace(FILES[0], path="c"))))]

    assert ids(checked([row], found)) == []
    assert ids(checked([row], found, files={2: FILES})) == ["R011"]


def test_another_manifest_is_not_compared_any_further():
    row = record(2, 20)
    found = at(row, manifest_digest="xxh3_128:" + "2" * 32, manifest=manifest_of(row, step=21))

    assert ids(checked([row], [found])) == ["R003"]


# --- what the journal does not know


def test_a_published_checkpoint_that_is_newer_than_the_journal_is_never_passed_over_in_silence():
    rows = [record(1, 10, bytes=7)]
    newer = record(2, 20)
    found = [at(rows[0]), at(newer, manifest=manifest_of(newer))]
    report = checked(rows, found)

    assert (report.verdict, report.newest_is_safe, report.chosen) == (Verdict.OLDER, False, rows[0])
    assert [finding.id for finding in report.passed_over] == ["R012"]
    assert "checkpoint/step-20" in report.passed_over[0].text
    assert "--rebuild" in report.passed_over[0].hint
    assert checked([], found[1:]).verdict is Verdict.UNSAFE


def test_what_is_older_or_no_published_checkpoint_is_only_mentioned():
    rows = [record(2, 20, bytes=7)]
    older, newer = record(1, 10), record(3, 30)
    strangers = [
        at(older, manifest=manifest_of(older)),
        at(newer),
        at(newer, path="checkpoint/step-31", manifest=manifest_of(newer)),
        at(
            newer, path="checkpoint/.step-30.e1.a3.quarantined", kind=FoundKind.QUARANTINED, manifest=manifest_of(newer)
        ),
    ]
    for stranger in strangers:
        report = checked(rows, [at(rows[0]), stranger])

        assert (ids(report), report.verdict) == (["R008"], Verdict.SAFE), stranger.path
    failed = record(3, 30, S.FAILED, reason="full")
    report = checked([*rows, failed], [at(rows[0]), at(failed, manifest=manifest_of(failed))])
    assert (ids(report), report.verdict) == (["R007", "R008"], Verdict.SAFE)


def test_who_asks_for_a_step_is_not_told_of_newer_ones():
    rows = [record(1, 10, bytes=7)]
    newer = record(2, 20)
    report = checked(rows, [at(rows[0]), at(newer, manifest=manifest_of(newer))], step=10)

    assert report.verdict is Verdict.SAFE


# --- what was not committed, and what is made from the journal


def test_files_that_were_not_committed_are_named_and_prevent_nothing():
    row = record(1, 10)
    report = checked([row], [at(row, extra=("adapter_config.json", "per-rank-9.pt"))])
    (finding,) = report.candidates[0].findings

    assert (finding.id, finding.level, report.verdict) == ("R013", Level.WARNING, Verdict.SAFE)
    assert "adapter_config.json; per-rank-9.pt" in finding.text


def test_projections_that_lie_are_warnings():
    (finding,) = of_projections(["meta.json does not list what is committed"], "checkpoint")

    assert (finding.id, finding.level) == ("R014", Level.WARNING)
    assert "meta.json" in finding.text


def test_passed_over_is_what_speaks_against_newer_ones_and_nothing_else():
    rows = [record(1, 10), record(2, 20), record(3, 30), record(4, 40, S.FAILED, reason="full")]
    found = [at(rows[0], mismatches=("digest: z",)), at(rows[1], extra=("x",)), at(rows[2], mismatches=("digest: a",))]
    report = checked(rows, found)

    assert report.chosen == rows[1]
    assert [(finding.id, finding.step) for finding in report.passed_over] == [("R005", 30)]
    nothing = checked(rows[:1], found[:1])
    assert (nothing.chosen, [finding.id for finding in nothing.passed_over]) == (None, ["R005"])


# --- who reads what


def test_ranks_read_what_they_wrote_if_they_are_as_many():
    assert shares(FILES, 2, as_saved=True) == [[FILES[0]], [FILES[1]]]


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 9)), max_size=40), st.integers(1, 9), st.booleans())
def test_every_file_is_read_once_and_the_sizes_are_shared_out(sizes, ranks, as_saved):
    files = [FileEntry(f"f{n}", size, "d", rank) for n, (size, rank) in enumerate(sizes)]
    found = shares(files, ranks, as_saved=as_saved)

    assert len(found) == ranks
    assert sorted(entry.path for share in found for entry in share) == sorted(entry.path for entry in files)
    assert found == shares(files[::-1], ranks, as_saved=as_saved)
    if not as_saved:
        load = [sum(entry.size for entry in share) for share in found]
        assert max(load) - min(load) <= max((entry.size for entry in files), default=0)
