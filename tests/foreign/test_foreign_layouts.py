"""Every layout, whole and with each fault in each of its files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from layouts_on_disk import LAYOUTS

from ckptmgr.foreign import Asked, judge
from ckptmgr.foreign.report import Candidate, ForeignReport, Judged
from ckptmgr.resume import Level, Verdict

Theirs = Callable[[str], Path]
each_layout = pytest.mark.parametrize("name", LAYOUTS)


def report_of(directory: Path, **asked: object) -> ForeignReport:
    report = judge(directory, Asked(**asked))  # type: ignore[arg-type]
    assert report is not None
    return report


def only(report: ForeignReport, name: str) -> Judged:
    (judged,) = report.layouts
    assert (judged.layout, judged.series) == (LAYOUTS[name].name, LAYOUTS[name].series)
    return judged


def ids(candidate: Candidate, level: Level = Level.ERROR) -> set[str]:
    return {finding.id for finding in candidate.findings if finding.level is level}


@each_layout
def test_what_is_whole_is_complete_and_the_newest_is_chosen(name: str, theirs: Theirs) -> None:
    layout = LAYOUTS[name]
    report = report_of(theirs(name))
    judged = only(report, name)

    assert report.verdict is Verdict.SAFE
    assert [(each.path, each.step, each.complete) for each in judged.candidates] == [
        (layout.newest, 10, True),
        (layout.older, 5, True),
    ]
    assert report.chosen is judged.candidates[0]
    assert [finding for each in judged.candidates for finding in each.findings] == []
    assert judged.findings == ()


@each_layout
def test_with_deep_what_is_whole_is_complete(name: str, theirs: Theirs) -> None:
    assert report_of(theirs(name), deep=True).verdict is Verdict.SAFE


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def gone(path: Path) -> None:
    path.unlink()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    aside = path.with_name(path.name + ".aside")
    path.rename(aside)
    path.symlink_to(aside.name)


FAULTS = {
    cut: {"F003", "F006"}, empty: {"F003", "F004"}, zeros: {"F003", "F005"}, gone: {"F002", "F007"},
    pipe: {"F002", "F007", "F016"}, link: {"F002", "F007", "F016"},
}  # fmt: skip


@each_layout
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_each_fault_in_each_file_of_the_newest_is_found(
    name: str, fault: Callable[[Path], None], pristine: Theirs, tmp_path: Path
) -> None:
    layout = LAYOUTS[name]
    whole = pristine(name) / layout.newest
    files = sorted(whole.rglob("*")) if whole.is_dir() else [whole]
    # A file that nobody would miss is not missed either where a link or a pipe stands.
    unseen = layout.unseen.get("gone" if fault in (pipe, link) else fault.__name__, ())
    looked = 0
    for file in [file for file in files if file.is_file()]:
        inner = file.relative_to(whole).as_posix() if whole.is_dir() else ""
        if fault is zeros and copied_knows_only_sizes(name):
            continue
        copy = tmp_path / "copy"
        shutil.copytree(pristine(name), copy)
        fault(copy / layout.newest / inner)
        report = report_of(copy)
        found = {each.path: each for judged in report.layouts for each in judged.candidates}
        if inner.startswith(tuple(unseen)) and unseen:
            candidate = found.get(layout.newest)
            assert candidate is None or candidate.complete or ids(candidate) == {"F016"}, inner
        else:
            assert layout.newest in found, inner
            assert report.verdict is Verdict.OLDER, inner
            assert report.chosen is not None, inner
            assert report.chosen.path == layout.older, inner
            assert ids(found[layout.newest]) & FAULTS[fault], (inner, found[layout.newest].findings)
        shutil.rmtree(copy)
        looked += 1

    assert looked or copied_knows_only_sizes(name)


def copied_knows_only_sizes(name: str) -> bool:
    return name == "copied"


@each_layout
def test_damage_in_all_of_them_is_corruption(name: str, theirs: Theirs) -> None:
    directory = theirs(name)
    layout = LAYOUTS[name]
    for path in (layout.newest, layout.older):
        whole = directory / path
        for file in whole.rglob("*") if whole.is_dir() else [whole]:
            if file.is_file():
                empty(file)

    assert report_of(directory).verdict is Verdict.CORRUPT


@each_layout
def test_one_checkpoint_itself_can_be_judged(name: str, theirs: Theirs) -> None:
    layout = LAYOUTS[name]
    directory = theirs(name) / layout.newest
    if directory.is_file():
        directory = directory.parent
    report = report_of(directory)

    assert report.verdict is Verdict.SAFE
    assert report.chosen is not None
    assert report.absolute(report.chosen) in (directory, directory / Path(layout.newest).name)
    assert report.chosen.step == 10


@each_layout
def test_only_the_step_that_is_asked_for_is_judged(name: str, theirs: Theirs) -> None:
    directory = theirs(name)
    report = report_of(directory, step=5)

    assert [each.path for each in only(report, name).candidates] == [LAYOUTS[name].older]
    assert report.verdict is Verdict.SAFE
    nothing = report_of(directory, step=7)
    assert nothing.verdict is Verdict.NONE
    assert [finding.id for judged in nothing.layouts for finding in judged.findings] == ["F001"]


@each_layout
def test_nothing_is_changed(name: str, theirs: Theirs) -> None:
    directory = theirs(name)

    def look() -> list[tuple[str, int, int]]:
        return [(str(each), each.lstat().st_mtime_ns, each.lstat().st_size) for each in sorted(directory.rglob("*"))]

    before = look()
    report_of(directory, deep=True, world_size=3)

    assert look() == before
