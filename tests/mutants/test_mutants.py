"""Every kept mutant still applies, and tests that are named with one catch it: some here, all in `make mutants`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from child_process import ForkServer
from kept import MUTANTS
from mutants import ROOT, Mutant, Overlay, Tests, failed_test, run_tests, stem

#: Each runs tests of this suite once more, so one of each technique must do.
BY_TESTS = {one.technique: (mutant, one) for mutant in MUTANTS for one in mutant.caught if isinstance(one, Tests)}


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """Everything slow imported once, and nothing of ours."""
    server = stem()
    yield server
    server.close()


def test_there_are_enough_of_them_and_no_name_twice() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 15


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_applies_and_something_is_named_to_catch_it(mutant: Mutant, tmp_path: Path) -> None:
    overlay = Overlay(tmp_path / "overlay", mutant)

    assert mutant.caught
    for file in mutant.files:
        compile((overlay.folder / "ckptmgr" / file).read_text(), file, "exec")


def test_the_crash_ledger_page_names_every_mutant() -> None:
    page = (ROOT / "docs" / "explanation" / "crash-ledger.md").read_text()
    rows = [
        f"| {one.name} | {one.what} | {', '.join(dict.fromkeys(way.technique for way in one.caught))} |"
        for one in MUTANTS
    ]

    assert [row for row in rows if row not in page.splitlines()] == []
    assert f"{len(MUTANTS)} deliberate defects are kept" in page


@pytest.mark.slow
@pytest.mark.xdist_group("mutants")
@pytest.mark.parametrize(
    ("mutant", "tests"),
    BY_TESTS.values(),
    ids=[f"{mutant.name}-{technique}" for technique, (mutant, _) in BY_TESTS.items()],
)
def test_a_mutant_is_caught(forks: ForkServer, tmp_path: Path, mutant: Mutant, tests: Tests) -> None:
    overlay = Overlay(tmp_path / "overlay", mutant)
    ended = run_tests(forks, overlay, tests.nodes)

    assert failed_test(ended, tests.sign), f"it survives {tests.nodes}: {ended.output[-2000:]}"
    assert overlay.never_imported() == []
