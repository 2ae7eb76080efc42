"""The words and numbers the command prints."""

from __future__ import annotations

import json

import pytest

from ckptmgr.cli.output import Output, age, clean, duration, size, timestamp


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (1_050, "1.1 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (81_400_000_000, "81.4 GB"),
        (3 * 10**12, "3.0 TB"),
        (12 * 10**15, "12.0 PB"),
        (12_345 * 10**15, "12345.0 PB"),
    ],
)
def test_sizes_are_in_powers_of_ten(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (59.9, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (47 * 3600, "47 h"),
        (48 * 3600, "2 d"),
        (400 * 86400, "400 d"),
    ],
)
def test_ages_have_one_unit_and_a_clock_that_is_behind_does_no_harm(seconds: float, text: str) -> None:
    assert age(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (0.123, "0.12 s"), (1, "1.0 s"), (59.94, "59.9 s"), (125.7, "2 min 5 s")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_times_are_utc_in_iso_8601() -> None:
    assert timestamp(0.1234) == "1970-01-01T00:00:00.123Z"
    assert timestamp(1e9, timespec="seconds") == "2001-09-09T01:46:40Z"
    assert timestamp(None) is None
    assert timestamp(1e300) == "unreadable"
    assert timestamp(float("nan")) == "unreadable"


def test_clean_keeps_text_and_takes_what_steers_a_terminal() -> None:
    assert clean("naïve 步 ok") == "naïve 步 ok"
    assert clean("a\nb\tc") == "a b c"
    for char in "\x00\x07\x08\x0b\r\x1b\x7f\x85\x9b\u200b\u202e\u2028\u2029\ufeff\ud800":
        assert clean(f"a{char}b") == "a\ufffdb"


def test_json_is_strict_and_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    Output(as_json=True, run=["a b"]).document(
        {"x": float("nan"), "y": [float("inf"), 1.5, ("é",)], "hint": "run `ckptmgr ls RUN`", "text": "RUN"}
    )

    out = capsys.readouterr().out

    assert out.isascii()
    assert json.loads(out) == {"x": None, "y": [None, 1.5, ["é"]], "hint": "run `ckptmgr ls 'a b'`", "text": "RUN"}


def test_only_a_command_s_argument_is_filled_in() -> None:
    out = Output(as_json=False, run=["runs/alpha", "--journal", "j.db"])

    assert out.hint("run `ckptmgr check RUN`") == "run `ckptmgr check runs/alpha --journal j.db`"
    assert out.hint("write x into /data/RUN/mark, RUNNING") == "write x into /data/RUN/mark, RUNNING"


def test_a_table_keeps_its_columns_over_batches_and_marks_empty_cells(capsys: pytest.CaptureFixture[str]) -> None:
    table = Output(as_json=False).table("A", "N", "WHY", right=("N",))
    table.add([["x", "1", "because"], ["yy", "10", ""]])
    table.add([["z", "2", "later"]])

    assert capsys.readouterr().out.splitlines() == [
        "A    N  WHY",
        "x    1  because",
        "yy  10  -",
        "z    2  later",
    ]


def test_with_json_nothing_but_the_document_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(as_json=True)
    out.note("a note", "a hint")
    out.progress(lambda: "verifying")

    assert capsys.readouterr() == ("", "")


def test_a_command_is_not_broken_where_it_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    table = Output(as_json=False).table("A", "WHY")
    table.add([["x", "what was left: run `ckptmgr recover runs/alpha --apply`, or start it again"]])

    *_, first, second, third = capsys.readouterr().out.splitlines()
    assert [first, second, third] == [
        "x  what was left: run",
        "   `ckptmgr recover runs/alpha --apply`,",
        "   or start it again",
    ]


def test_a_labelled_text_is_wrapped_on_a_terminal_and_no_path_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "put it back: /data/runs/a-run-with-a-long-name/checkpoint/step-1000, or else"
    Output(as_json=False).labelled("  next", text, indent=8)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    Output(as_json=False).labelled("  next", text, indent=8)

    assert capsys.readouterr().out.splitlines() == [
        f"  next  {text}",
        "  next  put it back:",
        "        /data/runs/a-run-with-a-long-name/checkpoint/step-1000,",
        "        or else",
    ]
