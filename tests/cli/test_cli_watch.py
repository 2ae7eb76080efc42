"""``ckptmgr watch``: what is in flight, who is behind, what committed and failed last, and when it ends."""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path
from typing import Any

from run_on_disk import NO_PROCESS, Call, Run, S, start
from test_cli_process import on_terminal, plain

from ckptmgr.cli.output import Output
from ckptmgr.cli.watch import Watcher, by_rank, lines
from ckptmgr.journal import Questions
from ckptmgr.lifecycle import Format

OUT = Output(as_json=False, run=["runs/alpha"])


def shards(*sizes: int) -> dict[str, bytes]:
    """The files of so many ranks, of these sizes."""
    return {f"__{rank}_0.distcp": b"x" * count for rank, count in enumerate(sizes)}


def look(run: Run, alive: int | None = None) -> dict[str, Any]:
    with Questions.open_read_only(run.journal_path) as journal:
        (one,) = Watcher(journal, run.rundir, None).look(run.epoch if alive is None else alive)["series"]
    return one


def test_what_is_in_flight_shows_its_bytes_by_rank_and_who_is_behind(run: Run) -> None:
    run.save(500, files=shards(1 << 20, 1 << 20, 1 << 20, 1 << 16), world_size=4)
    # The last rank has a small share, and has done as much of it as the first of its own.
    run.save(1000, files=shards(900 << 10, 800 << 10, 100 << 10, 56 << 10), world_size=4, until=S.WRITING)

    busy = look(run)["in_flight"]

    assert (busy["state"], busy["step"], busy["left_unfinished"]) == ("WRITING", 1000, False)
    assert busy["expected_bytes"] == (3 << 20) + (1 << 16)
    assert busy["written_bytes"] == sum(rank["written_bytes"] for rank in busy["ranks"]) >= 1856 << 10
    assert [rank["behind"] for rank in busy["ranks"]] == [False, False, True, False]
    assert [rank["expected_bytes"] for rank in busy["ranks"]] == [1 << 20, 1 << 20, 1 << 20, 1 << 16]
    text = ["".join(span if isinstance(span, str) else span.text for span in line) for line in lines(look(run), OUT)]
    assert any("behind: rank 2 (" in line for line in text)
    assert any("WRITING step 1000 for" in line and "of about 3.2 MB" in line for line in text)


def test_a_rank_that_has_no_file_yet_is_behind(run: Run) -> None:
    record = run.save(500, files=shards(1000, 1000), world_size=3, until=S.WRITING)

    assert [rank["behind"] for rank in by_rank(record, {"__0_0.distcp": 9, "__1_0.distcp": 9}, {})] == [
        False, False, True,
    ]  # fmt: skip


def test_the_rate_is_that_since_the_look_before(run: Run) -> None:
    record = run.save(500, files=shards(1 << 20), world_size=1, until=S.WRITING)
    with Questions.open_read_only(run.journal_path) as journal:
        watcher = Watcher(journal, run.rundir, None)
        first = watcher.look(run.epoch)["series"][0]["in_flight"]
        nothing = watcher.look(run.epoch)["series"][0]["in_flight"]
        with (run.directory / record.staging_directory / "__0_0.distcp").open("ab") as file:
            file.write(b"y" * (1 << 20))
        more = watcher.look(run.epoch)["series"][0]["in_flight"]

    assert first["bytes_per_s"] > 0
    assert nothing["bytes_per_s"] == 0
    assert more["bytes_per_s"] > 0
    assert more["written_bytes"] - nothing["written_bytes"] == 1 << 20


def test_another_attempt_has_a_rate_of_its_own(run: Run) -> None:
    record = run.save(500, files=shards(1 << 20), world_size=1, until=S.WRITING)
    with Questions.open_read_only(run.journal_path) as journal:
        watcher = Watcher(journal, run.rundir, None)
        watcher.look(run.epoch)
        run.journal.advance(record.id, S.WRITING, S.FAILED, epoch=run.epoch, **run.who, reason="x")
        run.save(600, files=shards(1 << 16), world_size=1, until=S.WRITING)

        assert watcher.look(run.epoch)["series"][0]["in_flight"]["bytes_per_s"] > 0


def test_an_export_says_how_much_and_not_whose(run: Run) -> None:
    run.save(500, series="hf", layout=Format.HUGGINGFACE, until=S.WRITING)
    busy = look(run)["in_flight"]

    assert (busy["ranks"], busy["expected_bytes"]) == ([], None)
    assert busy["written_bytes"] >= 1050


def test_another_number_of_ranks_says_nothing_about_the_shares(run: Run) -> None:
    run.save(500, files=shards(1000, 1000), world_size=2)
    run.save(1000, files=shards(500), world_size=1, until=S.WRITING)

    (rank,) = look(run)["in_flight"]["ranks"]
    assert (rank["expected_bytes"], rank["behind"]) == (None, False)


def test_the_last_failure_is_shown_with_rank_host_and_reason_also_after_a_commit(run: Run, ckptmgr: Call) -> None:
    run.save(400, until=S.FAILED, reason="older")
    run.save(500, until=S.FAILED, reason="disk full", failures=[{"rank": 3, "host": "n1", "cause": "ENOSPC"}])
    run.save(600)
    run.start(pid=NO_PROCESS)
    done = ckptmgr("watch", run.directory)

    assert done.code == 0
    assert "failed step 500 0 s ago: disk full (rank 3 on n1)" in done.out
    assert "committed step 600 0 s ago, 1.1 kB" in done.out
    assert "older" not in done.out


def test_without_a_manager_it_looks_once_and_says_what_was_left(run: Run, ckptmgr: Call) -> None:
    empty = Run(run.directory.parent / "empty")
    empty.start(pid=NO_PROCESS)
    run.save(500, until=S.WRITING)
    run.start(pid=NO_PROCESS)
    done = ckptmgr("watch", run.directory)
    document = ckptmgr("watch", run.directory, "--json").json

    assert (done.code, "no manager is running" in done.err) == (0, True)
    assert "left unfinished" in done.out
    assert (document["running"], document["series"][0]["in_flight"]["left_unfinished"]) == (False, True)
    assert "no checkpoints yet" in ckptmgr("watch", empty.directory).out
    assert ckptmgr("watch", run.directory, "--series", "nope").code == 2
    assert ckptmgr("watch", run.directory, "--interval", "0").code == 2


def test_it_follows_the_run_and_ends_with_it(run: Run) -> None:
    with start("watch", run.directory, "--json", "--interval", "0.1") as child:
        assert json.loads(child.stdout.readline())["series"] == []
        run.save(500)
        while not (series := json.loads(child.stdout.readline())["series"]):
            pass
        assert series[0]["last_committed"]["step"] == 500
        run.journal.end_epoch(run.epoch)
        out, err = child.communicate(timeout=30)

    assert (child.returncode, err) == (0, "")
    assert json.loads(out.splitlines()[-1])["running"] is False


def test_an_interrupt_ends_it_with_130(run: Run) -> None:
    with start("watch", run.directory) as child:
        child.stdout.readline()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)

    assert child.returncode == 130
    assert "Traceback" not in err


def test_it_ends_when_its_reader_has_gone(run: Run) -> None:
    with start("watch", run.directory, "--interval", "0.1") as child:
        child.stdout.readline()
        child.stdout.close()
        try:
            assert child.wait(timeout=30) == 0
        finally:
            child.kill()


def test_a_terminal_sees_one_look_in_place_of_the_other_and_all_of_each(run: Run) -> None:
    run.save(500, until=S.FAILED, reason="a long reason " * 20)
    run.save(600)
    timer = threading.Timer(3.0, run.journal.end_epoch, [run.epoch])
    timer.start()
    try:
        seen = on_terminal("watch", run.directory, "--interval", "0.2", NO_COLOR="1")
    finally:
        timer.join()

    frames = seen.split("\x1b[6A")
    assert len(frames) > 2
    for frame in frames:
        text = [line for line in plain(frame.replace("\x1b[J", "")).splitlines() if "manager" not in line]
        assert len([line for line in text if line]) == 6
        assert max(map(len, text)) <= 80
        assert " ".join(line.strip() for line in text).count("a long reason") == 20


def test_a_pipe_gets_plain_lines(run: Run, ckptmgr: Call, tmp_path: Path) -> None:
    run.save(500)
    run.start(pid=NO_PROCESS)

    assert ckptmgr("watch", run.directory).out == "checkpoint  committed step 500 0 s ago, 1.1 kB\n"
