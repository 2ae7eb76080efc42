"""The command as a process: statuses, streams, terminals, readers that leave, and what it must not import."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from run_on_disk import Call, Run, S, in_child, start

from ckptmgr import errors
from ckptmgr.cli import COMMANDS, build_parser, command_file
from ckptmgr.cli.exit_codes import Exit, exit_code
from ckptmgr.lifecycle import RetirementMark

COMMAND_LINES = [
    ["ls"],
    ["ls", "--json"],
    ["show", "500"],
    ["log"],
    ["latest"],
    ["check", "--deep"],
    ["verify"],
    ["watch"],
    ["stats"],
    ["recover"],
    ["recover", "--apply"],
    ["recover", "--rebuild"],
    ["upgrade"],
    ["why", "500"],
    ["prune", "--keep-last", "1"],
    ["prune", "--keep-last", "1", "--apply"],
    ["pin", "500"],
    ["unpin", "500"],
    ["metrics"],
    ["adopt", "--from", "."],
    ["completion"],
    ["doctor", "--json"],
]
#: They write a file or never end, so that they are tried in files of their own.
ELSEWHERE = {"report", "serve"}
ABOUT_A_RUN = [words for words in COMMAND_LINES if words[0] not in ("doctor", "completion", "adopt")]


@pytest.mark.parametrize("words", COMMAND_LINES, ids=" ".join)
def test_no_command_imports_torch(run: Run, words: list[str]) -> None:
    run.save(500)
    run.crash()
    script = (
        "import sys; from ckptmgr.cli import main; status = main(sys.argv[1:]);"
        "print(status, [name for name in ('torch', 'numpy', 'transformers') if name in sys.modules], file=sys.stderr)"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, words[0], str(run.directory), *words[1:]],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    expected = 10 if words[0] == "adopt" else 2 if {"--rebuild", "completion"} & {*words} else 0
    assert child.stderr.splitlines()[-1] == f"{expected} []"


def test_every_command_is_among_those_checked_for_torch() -> None:
    assert {words[0] for words in COMMAND_LINES} | ELSEWHERE == set(COMMANDS)


def test_help_fits_a_terminal() -> None:
    assert max(map(len, plain(on_terminal("--help")).splitlines())) <= 80


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_load_neither_a_command_nor_a_database_library(flag: str) -> None:
    assert {"sqlalchemy", "sqlite3", *(f"ckptmgr.cli.{name}" for name in COMMANDS)}.isdisjoint(loaded_by(flag))


def test_a_command_loads_none_of_the_others(run: Run) -> None:
    """But for what they share: `latest` asks what `check` asks."""
    run.save(100)
    loaded = loaded_by("latest", str(run.directory))

    assert {"ckptmgr.cli.latest", "sqlite3"} <= loaded
    others = {f"ckptmgr.cli.{name}" for name in COMMANDS} - {"ckptmgr.cli.latest", "ckptmgr.cli.check"}
    assert {"ckptmgr.storage", "ckptmgr.rebuild", *others}.isdisjoint(loaded)


@pytest.mark.parametrize("words", [["ls"], ["latest"], ["check"], ["show", "100"], ["log"], ["recover"]], ids=" ".join)
def test_a_command_that_only_reads_waits_neither_for_sqlalchemy_nor_for_filelock(run: Run, words: list[str]) -> None:
    run.save(100)
    loaded = loaded_by(words[0], str(run.directory), *words[1:])

    assert "sqlite3" in loaded
    assert {"sqlalchemy", "alembic", "filelock", "asyncio", "transitions"}.isdisjoint(loaded)


def loaded_by(*words: str) -> set[str]:
    script = f"import sys; from ckptmgr.cli import main; main({[*words]!r}); print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return set(child.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(ckptmgr: Call, command: str) -> None:
    done = ckptmgr(command, "--help")

    assert done.code == 0
    assert f"usage: ckptmgr {command}" in done.out
    assert f"  ckptmgr {command} " in done.out.partition("examples:")[2] or "$(ckptmgr latest" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())


def test_the_examples_in_help_parse(ckptmgr: Call) -> None:
    examples = [
        re.search(r"ckptmgr ([^|)>]+)", line).group(1).strip('" ').split()
        for name in COMMANDS
        for line in command_file(name).EXAMPLES.splitlines()
    ]

    assert len(examples) > len(COMMANDS)
    for words in examples:
        target = build_parser().parse_args(words).run
        assert target.startswith(("runs", "work_dirs/")) or words[0] == "completion"


def test_version_names_the_package_and_the_schema(ckptmgr: Call) -> None:
    done = ckptmgr("--version")

    assert done.code == 0
    assert re.fullmatch(r"ckptmgr \d+\.\d+\.\d+\S* \(journal schema \d{4}\)\n", done.out)


def test_python_m_ckptmgr_is_the_command(run: Run) -> None:
    run.save(500)

    done = in_child("latest", run.directory)

    assert (done.code, done.out, done.err) == (0, f"{run.directory}/checkpoint/step-500\n", "")
    assert in_child("latest", run.directory / "nope").code == 10


# Statuses and errors


def leaf_errors() -> list[type[BaseException]]:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return [kind for kind in kinds if not any(issubclass(other, kind) and other is not kind for other in kinds)]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (errors.JournalNotFound, 10),
        (errors.ForeignJournal, 10),
        (errors.JournalCorrupt, 5),
        (errors.JournalSchemaMismatch, 12),
        (errors.JournalError, 3),
        (errors.StaleWriter, 11),
        (errors.RunLocked, 11),
        (errors.LockUnsupported, 11),
        (errors.CheckpointNotFound, 3),
        (errors.UnsafeResume, 3),
        (errors.UnsafePath, 3),
        (errors.CorruptCheckpoint, 5),
        (errors.InvalidArgument, 2),
        (KeyboardInterrupt, 130),
        (PermissionError, 1),
        (ZeroDivisionError, 1),
    ],
)
def test_one_function_maps_errors_to_statuses(kind: type[BaseException], status: int) -> None:
    assert exit_code(kind("what happened")) == status
    assert status in set(Exit)


def test_every_error_about_a_journal_or_a_lock_has_a_status_of_its_own() -> None:
    for kind in leaf_errors():
        if issubclass(kind, errors.JournalError | errors.RunLocked | errors.LockUnsupported):
            assert exit_code(kind("what happened")) is not Exit.FAILED


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frob"],
        ["ls"],
        ["ls", "RUN", "--frob"],
        ["show", "RUN", "-1"],
        ["show", "RUN", "x"],
        ["check", "--js", "RUN"],
    ],
    ids=" ".join,
)
def test_a_usage_error_ends_with_2_says_so_on_stderr_and_as_json_if_asked(ckptmgr: Call, words: list[str]) -> None:
    text = ckptmgr(*words)
    as_json = ckptmgr(*words, "--json")

    assert (text.code, text.out) == (2, "")
    assert "--help" in text.err
    assert (as_json.code, as_json.err) == (2, "")
    assert as_json.json["error"]["type"] == "InvalidArgument"
    assert as_json.json["error"]["exit_code"] == 2


@pytest.mark.parametrize("words", ABOUT_A_RUN, ids=" ".join)
def test_without_a_journal_every_command_about_a_run_ends_with_10(
    ckptmgr: Call, tmp_path: Path, words: list[str]
) -> None:
    (tmp_path / "alpha").mkdir()
    command, *flags = words

    text = ckptmgr(command, tmp_path / "alpha", *[flag for flag in flags if flag != "--json"])
    as_json = ckptmgr(command, tmp_path / "alpha", *flags, "--json")

    assert (text.code, text.out) == (10, "")
    assert text.err.startswith("ckptmgr: ")
    assert (as_json.code, as_json.err) == (10, "")
    assert as_json.json["error"]["type"] == "JournalNotFound"
    assert [path.name for path in tmp_path.iterdir()] == ["alpha"]


@pytest.mark.parametrize("words", ABOUT_A_RUN, ids=" ".join)
def test_a_journal_too_deep_for_sqlite_ends_with_2_and_the_way_out(
    ckptmgr: Call, tmp_path: Path, words: list[str]
) -> None:
    deep = tmp_path.joinpath(*["d" * 100] * 5, "alpha")
    deep.mkdir(parents=True)
    done = ckptmgr(words[0], deep, *words[1:])

    assert done.code == Exit.USAGE
    assert "SQLite can use no more than" in done.out + done.err
    assert "--journal PATH" in done.out + done.err
    assert not any(deep.parent.glob("*.journal*"))


@pytest.mark.parametrize("journal", ["/", "..", "."])
def test_what_cannot_be_a_journal_ends_with_2(run: Run, ckptmgr: Call, journal: str) -> None:
    done = ckptmgr("ls", run.directory, "--journal", journal, "--json")

    assert (done.code, done.json["error"]["type"]) == (2, "InvalidArgument")
    assert ckptmgr("ls", ".journal.db").code == 10


def test_the_journal_of_another_run_ends_with_10(run: Run, ckptmgr: Call, tmp_path: Path) -> None:
    run.save(500)
    other = Run(tmp_path / "runs" / "beta")
    other.journal.close()

    for command in ("ls", "check", "latest", "recover"):
        done = ckptmgr(command, run.directory, "--journal", other.journal_path)

        assert (done.code, done.out) == (10, "")
        assert other.journal.run_id in done.err
    assert ckptmgr("recover", run.directory, "--journal", other.journal_path, "--apply").code == 10
    assert ckptmgr("upgrade", run.directory, "--journal", other.journal_path).code == 10


def test_a_bug_ends_with_1_and_leaves_a_traceback_on_stderr_with_json_too(
    run: Run, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise RuntimeError("a thing that cannot be \x1b[31m")

    monkeypatch.setattr(command_file("ls"), "run", broken)
    text, as_json = ckptmgr("ls", run.directory), ckptmgr("ls", run.directory, "--json")

    assert (text.code, text.out) == (1, "")
    assert "Traceback" in text.err
    assert "report it" in text.err
    assert "\x1b" not in text.err
    assert as_json.code == 1
    assert "Traceback" in as_json.err
    assert as_json.json["error"]["type"] == "RuntimeError"


def test_what_the_operating_system_refuses_ends_with_1_without_a_traceback(
    run: Run, ckptmgr: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "/somewhere")

    monkeypatch.setattr(command_file("ls"), "run", refused)
    done = ckptmgr("ls", run.directory)

    assert done.code == 1
    assert "Input/output error" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("words", [["ls"], ["latest"], ["--help"]], ids=" ".join)
def test_a_full_disk_behind_stdout_is_an_error_and_not_silent(run: Run, words: list[str]) -> None:
    run.save(500)
    with Path("/dev/full").open("w") as full:
        done = in_child(*words, *([] if words == ["--help"] else [run.directory]), stdout=full)

    assert (done.code, done.err) == (1, "ckptmgr: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
@pytest.mark.parametrize("command", ["check", "verify"])
def test_a_stream_that_is_closed_does_not_change_the_verdict(run: Run, command: str, closed: str) -> None:
    run.save(500)
    script = f'exec "$0" -m ckptmgr "$@" {closed}'
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, command, run.directory], capture_output=True, timeout=60, check=False
    )

    assert (done.returncode, "Traceback" in done.stderr.decode()) == (0, False)


# Readers that leave


@pytest.mark.parametrize(
    "words", [["log"], ["log", "--json"], ["ls"], ["latest"], ["--help"], ["--version"]], ids=" ".join
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_silent(run: Run, words: list[str], unbuffered: str) -> None:
    run.save(500)
    read, write = os.pipe()
    os.close(read)
    arguments = words if words[0].startswith("--") else [words[0], run.directory, *words[1:]]
    try:
        done = in_child(*arguments, stdout=write, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    finally:
        os.close(write)

    assert (done.code, done.err) == (0, "")


def test_a_reader_that_has_gone_does_not_change_the_verdict(run: Run) -> None:
    run.save(500)
    (run.directory / "checkpoint/step-500/model.bin").unlink()
    read, write = os.pipe()
    os.close(read)
    try:
        done = in_child("check", run.directory, stdout=write)
    finally:
        os.close(write)

    assert (done.code, done.err) == (5, "")


def test_follow_ends_when_its_reader_has_gone(run: Run) -> None:
    run.save(500)
    with start("log", run.directory, "--follow") as child:
        child.stdout.readline()
        child.stdout.close()
        run.save(1000)
        try:
            assert child.wait(timeout=30) == 0
        finally:
            child.kill()


# Terminals


def on_terminal(*words: str | Path, columns: int = 80, **environment: str) -> str:
    """What the command prints when stdout and stderr are a terminal."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environ = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
    environ |= {"TERM": "xterm", "PAGER": "cat", **environment}
    child = start(*words, stdout=follower, stderr=follower, env=environ)
    os.close(follower)
    pieces = []
    deadline = time.monotonic() + 60
    try:
        while time.monotonic() < deadline:
            if not select.select([leader], [], [], 1)[0]:
                continue
            try:
                piece = os.read(leader, 65536)
            except OSError:  # Linux says EIO when the last writer has gone
                break
            pieces.append(piece)
    finally:
        os.close(leader)
        child.wait(timeout=30)
    return b"".join(pieces).decode().replace("\r\n", "\n")


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*[mK]|\r", "", text)


def test_colour_is_for_terminals_that_want_it(run: Run) -> None:
    run.save(500)

    assert "\x1b[32mCOMMITTED\x1b[0m" in on_terminal("ls", run.directory)
    assert "\x1b" not in on_terminal("ls", run.directory, NO_COLOR="1")
    assert "\x1b" not in on_terminal("ls", run.directory, TERM="dumb")
    assert "\x1b" not in in_child("ls", run.directory, env={**os.environ, "FORCE_COLOR": "1"}).out


def test_tables_fit_into_80_columns_on_a_terminal_and_lose_nothing(run: Run) -> None:
    reasons = ("last 3", "every 5000 steps", "best 2 by validation/loss (min)", "younger than 24 h", "pinned")
    first = run.save(1_000_000)
    run.save(1_005_000, decisions=[(first.id, "keep", reasons)])
    run.save(1_010_000, until=S.FAILED, reason="rank 12 on node-with-a-long-name: no answer within 600 s, " * 3)

    for words in (["ls"], ["log"], ["check"], ["show", "1010000"]):
        lines = plain(on_terminal(words[0], run.directory, *words[1:], NO_COLOR="1")).splitlines()
        table = [line for line in lines if not line.startswith(("  ", "safe to")) and str(run.directory) not in line]

        assert table
        assert max(len(line) for line in table) <= 80, words
    shown = " ".join(plain(on_terminal("ls", run.directory)).split())
    assert ", ".join(reasons) in shown


def pager(tmp_path: Path) -> tuple[str, Path]:
    """A pager that notes what it reads, and shows the first line of it."""
    seen, script = tmp_path / "seen", tmp_path / "pager"
    script.write_text(f"#!/bin/sh\ncat > {seen}\nhead -n 1 {seen}\n")
    script.chmod(0o755)
    return str(script), seen


def test_what_is_longer_than_the_screen_goes_to_a_pager(run: Run, tmp_path: Path) -> None:
    command, seen = pager(tmp_path)
    run.save(1)
    short = plain(on_terminal("ls", run.directory, PAGER=command))
    assert "COMMITTED" in short
    assert not seen.exists()

    for step in range(2, 60):
        run.save(step, until=S.FAILED)
    shown = plain(on_terminal("ls", run.directory, "--all", PAGER=command))
    assert [line.split()[0] for line in shown.splitlines()] == ["SERIES"]
    # Colours as on the terminal, every row, and nothing twice.
    assert "\x1b[31mFAILED\x1b[0m" in seen.read_text()
    assert len(plain(seen.read_text()).splitlines()) == 60
    # The notes that come after it, too.
    seen.unlink()
    on_terminal("check", run.directory, PAGER=command)
    assert "hint: `ckptmgr check" in plain(seen.read_text())


@pytest.mark.parametrize(
    "environment",
    [{"PAGER": "cat"}, {"PAGER": ""}, {"PAGER": "no-such"}, {"PAGER": "less 'x"}, {"TERM": "dumb", "PAGER": "true"}],
)
def test_without_a_pager_the_terminal_has_it_all(run: Run, environment: dict[str, str]) -> None:
    for step in range(40):
        run.save(step)

    assert plain(on_terminal("ls", run.directory, **environment)).count("COMMITTED") == 40


def test_the_status_is_the_same_behind_a_pager_that_is_left_early(run: Run, tmp_path: Path) -> None:
    for step in range(60):
        (run.directory / run.save(step).directory / "model.bin").unlink()
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environ = {**os.environ, "PAGER": "true", "TERM": "xterm"}
    child = start("check", run.directory, stdout=follower, stderr=follower, env=environ)
    os.close(follower)

    assert child.wait(timeout=60) == 5
    os.close(leader)


def test_what_a_pipe_or_a_program_gets_is_never_paged(run: Run, tmp_path: Path) -> None:
    command, seen = pager(tmp_path)
    for step in range(60):
        run.save(step)

    assert len(in_child("ls", run.directory, env={**os.environ, "PAGER": command}).out.splitlines()) == 61
    on_terminal("ls", run.directory, "--json", PAGER=command)
    assert not seen.exists()


def test_a_pipe_gets_one_line_per_row_whatever_the_width(run: Run) -> None:
    run.save(500, until=S.FAILED, reason="x " * 200)

    done = in_child("ls", run.directory, env={**os.environ, "COLUMNS": "40"})

    assert len(done.out.splitlines()) == 2


def test_deep_shows_its_progress_on_a_terminal_alone(run: Run) -> None:
    run.save(500)

    on_screen = on_terminal("check", run.directory, "--deep")

    assert re.search(r"verifying checkpoint/step-500: \S+ k?B of 1\.1 kB", on_screen)
    assert on_screen.count("\r\x1b[K") >= 2
    assert in_child("check", run.directory, "--deep").err == ""
    assert "verifying" not in on_terminal("check", run.directory, "--deep", "--json")


def test_what_takes_longer_shows_its_rate_and_the_time_left(run: Run) -> None:
    run.save(500)

    on_screen = on_terminal("verify", run.directory, "--max-bytes-per-second", "400B")

    assert re.search(r"verifying checkpoint/step-500: \S+ k?B of 1\.1 kB, \S+ B/s, \S+ s left", on_screen)


def test_control_characters_never_reach_a_stream(run: Run, ckptmgr: Call) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\r\nrm -rf \u202e\x9b31m"
    first = run.save(500, metrics={evil: 1.0}, per_rank=[evil])
    run.save(600, retire=[RetirementMark(first.id, evil)])
    run.save(700, until=S.FAILED, reason=evil, failures=[{"rank": 1, "host": evil, "cause": evil}])
    record = run.save(800)
    (run.directory / "checkpoint" / ("x" + evil.replace("/", ""))).mkdir()
    run.journal.record_verification(record.id, level="size", ok=False, mismatches=[evil])

    for words in (
        ["ls", "--all"],
        ["show", "500"],
        ["show", "700"],
        ["show", "800"],
        ["log"],
        ["check"],
        ["verify"],
        ["stats"],
        ["recover"],
        ["latest"],
        ["ls", "--series", evil],
        [evil],
    ):
        for flags in ([], ["--json"]):
            done = ckptmgr(words[0], run.directory, *words[1:], *flags)
            text = done.out + done.err

            assert not [char for char in text if char != "\n" and (ord(char) < 32 or 127 <= ord(char) < 160)], words
            assert "\u202e" not in text
    assert ckptmgr("show", run.directory, 500, "--json").json["checkpoint"]["metrics"] == {evil: 1.0}


def test_a_path_for_a_script_is_printed_byte_for_byte(tmp_path: Path, ckptmgr: Call) -> None:
    odd = Run(tmp_path / os.fsdecode(b"r\xff\xc3\xa9 n"))
    odd.save(500)
    odd.journal.close()

    done = subprocess.run(
        [sys.executable, "-m", "ckptmgr", "latest", str(odd.directory)], capture_output=True, timeout=60, check=True
    )

    assert done.stdout == os.fsencode(odd.directory) + b"/checkpoint/step-500\n"
    assert ckptmgr("ls", odd.directory).code == 0
    assert ckptmgr("ls", odd.directory, "--json").json["run"]["directory"] == str(odd.directory)


def test_a_stream_that_cannot_hold_a_character_gets_an_escape(run: Run) -> None:
    run.save(500, until=S.FAILED, reason="Grün")

    done = in_child("ls", run.directory, env={**os.environ, "PYTHONIOENCODING": "ascii"})

    assert done.code == 0
    assert "Gr\\xfcn" in done.out


def test_an_interrupt_ends_with_130_without_a_traceback(run: Run) -> None:
    with start("log", run.directory, "--follow") as child:
        time.sleep(1.5)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)

    assert child.returncode == 130
    assert "Traceback" not in err


def test_hints_name_the_run_that_was_asked_about(run: Run, ckptmgr: Call, tmp_path: Path) -> None:
    spaced = Run(tmp_path / "my runs" / "a b")
    spaced.save(500, until=S.WRITING)
    spaced.crash()

    hint = ckptmgr("check", spaced.directory, "--json").json["reports"][0]["findings"][1]["hint"]

    assert f"ckptmgr recover '{spaced.directory}'" in hint
    assert "RUN" not in hint
