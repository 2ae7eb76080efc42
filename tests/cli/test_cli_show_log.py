"""``ckptmgr show`` and ``ckptmgr log``: one checkpoint, and the history of all."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from datetime import datetime

from run_on_disk import Call, Run, S, start

from ckptmgr.cli.show import by_rank
from ckptmgr.lifecycle import Format, RetirementMark
from ckptmgr.manifest import Digest, FileEntry


def test_show_names_files_ranks_durations_metrics_and_history(run: Run, ckptmgr: Call) -> None:
    run.save(500, metrics={"loss": 2.5}, per_rank=["data"])

    out = ckptmgr("show", run.directory, 500).out

    for fact in (
        f"{run.directory}/checkpoint/step-500",
        "1.1 kB in 2 files",
        "2 ranks, epoch 1",
        "stage 0.25 s, write 12.0 s, gather 0.50 s, commit 0.10 s",
        "loss 2.5",
        "per rank    data",
        "optim/rank-0.bin",
    ):
        assert fact in out
    states = [line.split()[1] for line in out.splitlines() if line.startswith("20")]
    assert states == ["PREWRITTEN", "WRITING", "GATHERED", "COMMITTED"]


def test_show_names_each_failed_rank(run: Run, ckptmgr: Call) -> None:
    failures = [{"rank": 7, "host": "node-3", "cause": "no answer within 60 s", "silent": True}]
    run.save(500, until=S.FAILED, reason="a rank is silent", failures=failures)

    done = ckptmgr("show", run.directory, 500)
    document = ckptmgr("show", run.directory, 500, "--json").json

    assert "7  node-3  no answer within 60 s" in done.out
    assert "a rank is silent" in done.out
    assert "from WRITING" in done.out
    assert document["checkpoint"]["failures"] == failures
    assert document["checkpoint"]["path"] is None
    assert "step-500\n" not in done.out.replace(".incomplete", "")


def test_show_prefers_the_committed_attempt_and_lists_the_others(run: Run, ckptmgr: Call) -> None:
    failed = run.save(500, until=S.FAILED, reason="disk full")
    live = run.save(500)
    run.save(1000)

    done = ckptmgr("show", run.directory, 500)
    document = ckptmgr("show", run.directory, 500, "--json").json

    assert f"attempt {live.id}: COMMITTED" in done.out
    assert "disk full" in done.out
    assert document["checkpoint"]["checkpoint_id"] == live.id
    assert [other["checkpoint_id"] for other in document["other_attempts"]] == [failed.id]


def test_show_sums_files_by_rank(run: Run, ckptmgr: Call) -> None:
    record = run.save(500, files={"a": b"12", "b": b"345"})
    entries = [
        FileEntry(name, size, Digest(b"").text, rank) for name, size, rank in (("a", 2, 1), ("b", 3, 0), ("c", 5, 1))
    ]

    document = ckptmgr("show", run.directory, 500, "--json").json

    assert len(document["files"]) == len(run.journal.files(record.id))
    assert document["ranks"] == [{"rank": 0, "files": 1, "bytes": 2}, {"rank": 1, "files": 1, "bytes": 3}]
    assert by_rank(entries) == [{"rank": 0, "files": 1, "bytes": 3}, {"rank": 1, "files": 2, "bytes": 7}]


def test_show_of_an_unknown_step_ends_with_3_and_names_the_series_that_has_it(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(700, series="hf", layout=Format.HUGGINGFACE)

    done = ckptmgr("show", run.directory, 700)

    assert done.code == 3
    assert done.out == ""
    assert "--series hf" in done.err
    assert ckptmgr("show", run.directory, 700, "--series", "hf").code == 0
    assert ckptmgr("show", run.directory, 9).code == 3


def test_show_lists_verifications(run: Run, ckptmgr: Call) -> None:
    record = run.save(500)
    run.journal.record_verification(record.id, level="digest", ok=False, mismatches=["digest: a has other bytes"])

    assert "digest: a has other bytes" in ckptmgr("show", run.directory, 500).out
    (row,) = ckptmgr("show", run.directory, 500, "--json").json["verifications"]
    assert (row["level"], row["ok"], row["mismatches"]) == ("digest", False, ["digest: a has other bytes"])


def test_log_has_every_transition_oldest_first_with_time_epoch_host_and_pid(run: Run, ckptmgr: Call) -> None:
    before = datetime.now().timestamp()
    run.start(host="node-1", pid=4242)
    run.save(500)
    run.save(1000, until=S.FAILED)

    rows = ckptmgr("log", run.directory, "--json").json["transitions"]
    lines = ckptmgr("log", run.directory).out.splitlines()[1:]

    assert [(row["step"], row["from"], row["to"]) for row in rows] == [
        (500, None, "PREWRITTEN"),
        (500, "PREWRITTEN", "WRITING"),
        (500, "WRITING", "GATHERED"),
        (500, "GATHERED", "COMMITTED"),
        (1000, None, "PREWRITTEN"),
        (1000, "PREWRITTEN", "WRITING"),
        (1000, "WRITING", "FAILED"),
    ]
    assert all(row["at"].endswith("Z") for row in rows)
    assert before - 1 <= datetime.fromisoformat(rows[0]["at"]).timestamp() <= time.time() + 1
    assert {(row["epoch"], row["host"], row["pid"]) for row in rows} == {(2, "node-1", 4242)}
    assert len(lines) == len(rows)
    assert lines[-1].split()[1:5] == ["checkpoint", "1000", "FAILED", "2"]
    assert lines[-1].endswith("node-1 pid 4242: from WRITING")


def test_log_filters_by_series(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(500, series="hf", layout=Format.HUGGINGFACE)

    rows = ckptmgr("log", run.directory, "--series", "hf", "--json").json["transitions"]

    assert {row["series"] for row in rows} == {"hf"}
    assert len(rows) == 4
    assert ckptmgr("log", run.directory, "--series", "nope").code == 2


def test_log_follow_prints_what_happens_later_and_ends_with_130_on_interrupt(run: Run) -> None:
    run.save(500)
    with start("log", run.directory, "--follow", "--json") as child:
        assert child.stdout is not None
        first = [json.loads(child.stdout.readline()) for _ in range(4)]
        run.save(1000)
        later = [json.loads(child.stdout.readline()) for _ in range(4)]
        child.send_signal(signal.SIGINT)
        rest, _ = child.communicate(timeout=30)

    assert [row["step"] for row in first + later] == [500] * 4 + [1000] * 4
    assert [row["id"] for row in first + later] == list(range(1, 9))
    assert child.returncode == 130
    assert json.loads(rest)["error"]["exit_code"] == 130


def test_log_follow_as_text_prints_one_header_and_keeps_the_columns(run: Run) -> None:
    run.save(500)
    with start("log", run.directory, "--follow", "--series", "checkpoint", stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        first = [child.stdout.readline() for _ in range(5)]
        run.save(500, series="hf", layout=Format.HUGGINGFACE)
        run.save(1000)
        later = [child.stdout.readline() for _ in range(4)]
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=30)

    assert first[0].startswith("TIME")
    assert {line.index("checkpoint") for line in first[1:] + later} == {first[0].index("SERIES")}
    assert all(line.split()[2] == "1000" for line in later)


def test_what_is_gone_has_no_path_to_resume_from(run: Run, ckptmgr: Call) -> None:
    record = run.save(500)
    assert f"  path        {run.directory}/checkpoint/step-500" in ckptmgr("show", run.directory, 500).out
    run.journal.mark_retiring([RetirementMark(record.id, "no rule keeps it (last 1)")], epoch=run.epoch)

    assert "  path " not in ckptmgr("show", run.directory, 500).out
