"""Options: defaults, environment, code over environment, and nothing that makes no sense."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ckptmgr import Permissions, Timeouts, WriterOptions
from ckptmgr.errors import InvalidArgument
from ckptmgr.options import defaults, variable

SECONDS = [field.name for field in dataclasses.fields(Timeouts)]


def test_defaults_are_what_the_table_says() -> None:
    assert dict(defaults()) == {
        "setup_s": 300.0,
        "write_s": 1800.0,
        "gather_s": 60.0,
        "collective_s": 600.0,
        "close_s": 3600.0,
        "close_on_error_s": 60.0,
        "write_slots": 2,
        "nice": 10,
        "io_class": "none",
        "max_bytes_per_second": 0,
        "file_mode": None,
        "directory_mode": None,
    }
    made = (Timeouts(), WriterOptions(), Permissions())
    options = {name: value for one in made for name, value in dataclasses.asdict(one).items()}
    assert options == dict(defaults())


@pytest.mark.parametrize("name", SECONDS)
def test_every_timeout_takes_the_environment_and_code_wins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable(name), "12.5")
    assert getattr(Timeouts(), name) == 12.5
    assert getattr(Timeouts(**{name: 3}), name) == 3.0
    others = [other for other in SECONDS if other != name]
    assert all(getattr(Timeouts(), other) == defaults()[other] for other in others)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("write_slots", "0", 0),
        ("nice", "19", 19),
        ("io_class", "idle", "idle"),
        ("max_bytes_per_second", "1048576", 1 << 20),
    ],
)
def test_every_writer_option_takes_the_environment(
    name: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert variable(name) == f"CKPTMGR_{name.upper()}"
    monkeypatch.setenv(variable(name), text)
    assert getattr(WriterOptions(), name) == value


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTMGR_WRITE_S", "")
    monkeypatch.setenv("CKPTMGR_IO_CLASS", "")
    assert Timeouts().write_s == 1800.0
    assert WriterOptions().io_class == "none"


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), 1e9, True, "soon", [], ""])
def test_seconds_that_make_no_sense_are_refused(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="write_s"):
        Timeouts(write_s=value)


@pytest.mark.parametrize(
    "bad",
    [
        {"write_slots": -1}, {"write_slots": 1025}, {"write_slots": 1.5}, {"write_slots": True}, {"write_slots": "two"},
        {"nice": -1}, {"nice": 20}, {"nice": None.__class__}, {"io_class": "fast"}, {"io_class": 3},
        {"max_bytes_per_second": -1}, {"max_bytes_per_second": 1e6},
    ],
    ids=str,
)  # fmt: skip
def test_writer_options_that_make_no_sense_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(bad))):
        WriterOptions(**bad)


def test_a_bad_variable_is_refused_by_the_name_of_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTMGR_GATHER_S", "-5")
    with pytest.raises(InvalidArgument, match="gather_s is '-5'"):
        Timeouts()


def test_replace_changes_some_and_checks_them() -> None:
    short = Timeouts(write_s=5).replace(gather_s=1)
    assert (short.write_s, short.gather_s) == (5.0, 1.0)
    with pytest.raises(InvalidArgument):
        short.replace(gather_s=0)


def test_options_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Timeouts().write_s = 1.0  # type: ignore[misc]
