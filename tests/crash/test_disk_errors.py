"""A disk that is full or broken at any one call of a save, and a journal whose COMMIT fails."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import crash_run
import pytest
from child_process import AtEffect, Effect, read_trace
from crash_run import BadCommit, as_left, notes, scenarios
from test_crash_sweep import FULL, chosen

COMMITS = {1: "PREWRITTEN", 2: "WRITING", 3: "GATHERED", 4: "COMMITTED", 5: "retired"}


def told(run: Path) -> list[str]:
    return [word for word, *_ in notes(run)]


@pytest.mark.timeout(3600 if FULL else 120)
@pytest.mark.parametrize("in_writer", [False, True], ids=["trainer", "writer"])
@pytest.mark.parametrize(
    "words", ["dcp overwrite", "hf steady", *(["dcp overwrite-aside", "hf first", "dcp steady"] if FULL else [])]
)
def test_an_error_of_the_disk_fails_the_save_and_nothing_else(forks, prepared, tmp_path, words: str, in_writer: bool):
    series, how = words.split()
    scenario = scenarios(series)[how]

    def go(number: int, error: int, folder: str) -> tuple[Path, list[Effect]]:
        run = prepared(scenario, tmp_path / folder)
        trace = tmp_path / f"trace-{folder}"
        forks.do(crash_run.save_in_trouble, run, scenario, AtEffect(number, error, in_writer, str(trace)))
        return run, read_trace(trace)

    def fail_at(effect: Effect) -> None:
        run, effects = go(effect.nth, (errno.ENOSPC, errno.EIO)[effect.nth % 2], str(effect.nth))
        rows = as_left(run)[0]
        attempts = [
            row for row in rows if row.step == scenario.now[0].step and row.metrics["gen"] == scenario.now[0].gen
        ]
        words = told(run)[len(scenario.before) * 2 :]
        try:
            if words[0] == "refused":
                assert attempts == []
            else:
                attempt = attempts[-1]
                assert words == ["begun", "failed" if attempt.state == "FAILED" else "acknowledged", "acknowledged"]
                assert attempt.state in ("FAILED", "COMMITTED")
                if ".incomplete/" in effect.where and effect.name not in ("remove", "rmdir"):
                    # Whatever is refused while the directory is filled, also where the bytes arrived.
                    assert attempt.state == "FAILED", "an error was ignored"
                if attempt.state == "FAILED":
                    cause = attempt.failures[0]["cause"]
                    assert "No space left" in cause or "Input/output error" in cause
            if effect.name == "fsync" and ".incomplete/" in effect.where:
                # The kernel may have dropped the pages; a second fsync would call them written.
                again = [other.where for other in effects if other.nth > effect.nth and other.name == "fsync"]
                assert effect.where not in again
            forks.do(crash_run.check, run)
        except AssertionError as error:
            error.add_note(f"error at {effect}")
            raise

    effects = go(0, errno.EIO, "whole")[1]
    # The save that is to work afterwards is not part of it.
    first = next(n for n, effect in enumerate(effects) if effect.name == "mark")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fail_at, effects[:first] if in_writer else chosen(effects[:first], 8)))


@pytest.mark.parametrize("words", ["dcp overwrite", "hf steady"])
@pytest.mark.parametrize("done", [False, True], ids=["nothing-was-done", "it-was-done"])
@pytest.mark.parametrize("nth", COMMITS)
def test_a_commit_of_the_journal_that_fails(forks, prepared, tmp_path, nth: int, done: bool, words: str):
    series, how = words.split()
    scenario = scenarios(series)[how]
    run = prepared(scenario, tmp_path / "run")
    forks.do(crash_run.save_in_trouble, run, scenario, BadCommit(nth, done))
    rows = as_left(run)[0]
    fails = nth <= 3 and not done

    assert told(run)[-3:] == ["begun", "failed" if fails else "acknowledged", "acknowledged"]
    attempts = [
        row.state for row in rows if row.step == scenario.now[0].step and row.metrics["gen"] == scenario.now[0].gen
    ]
    assert attempts == ([] if fails and nth == 1 else ["FAILED" if fails else "COMMITTED"])
    forks.do(crash_run.check, run)
