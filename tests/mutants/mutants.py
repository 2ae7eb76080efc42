"""
Deliberate defects, kept, so that each of them must be found again whenever anything changes.

A mutant is an edit of one file of the product, or of a few. The product has no switch for it: a mutated
copy of the whole package is written into a folder that goes first on the import path of everything a
technique starts, writer processes included. Every mutated file ends with a line that leaves a mark when
it was imported to its end, so that nothing passes for caught that never ran.

How a mutant is caught is named with it, in two ways:

- `Torture`: a sweep of ``make torture``, by its name there, at the calls or disks of some phases. It has
  to find a violation that reads as told. ``make mutants`` does that, and needs gcc.
- `Tests`: tests of this suite, by their names, of which one fails as told. ``make test`` does that.

An edit that does not apply any more is an error: the mutant has to be written anew.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from child_process import Ended, ForkServer

ROOT = Path(__file__).resolve().parents[2]
_SLOW = (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.tensor.parallel",
    "safetensors.torch",
    "sqlalchemy.dialects.sqlite",
    "alembic.command",
    "filelock",
    "transitions",
    "psutil",
    "xxhash",
    "pytest",
)
#: What a defect in the defect looks like; such an error proves nothing.
_BROKEN = re.compile(r"\b(SyntaxError|IndentationError|ImportError|ModuleNotFoundError|NameError|UnboundLocalError)\b")


@dataclasses.dataclass(frozen=True)
class Edit:
    """In *file* of the package *old*, which stands there once, becomes *new*."""

    file: str
    old: str
    new: str


@dataclasses.dataclass(frozen=True)
class Torture:
    """
    Caught by a sweep of ``make torture``.

    Args:
        technique: What people call it.
        sweep: Its name there: fault, run and number of ranks.
        phases: Where in the run's life the points are that are tried.
        sign: What the violation says; a regular expression.
        most: At most so many points, in an order that is always the same.
    """

    technique: str
    sweep: str
    phases: str
    sign: str
    most: int = 40


@dataclasses.dataclass(frozen=True)
class Tests:
    """
    Caught by tests of this suite.

    Args:
        technique: What people call it.
        nodes: The tests, as pytest names them, below ``tests``.
        sign: What one of them says when it fails; a regular expression.
    """

    technique: str
    nodes: tuple[str, ...]
    sign: str
    #: Not for pytest to collect.
    __test__: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class Mutant:
    """
    One defect.

    Args:
        name: Unique, for the command line.
        what: What is wrong, in plain words.
        edits: How the product is changed.
        caught: Each of these must catch it.
        writer: Whether the defect lies in the writer process.
    """

    name: str
    what: str
    edits: tuple[Edit, ...]
    caught: tuple[Torture | Tests, ...]
    writer: bool = False

    @property
    def files(self) -> tuple[str, ...]:
        """The files that are changed."""
        return tuple(dict.fromkeys(edit.file for edit in self.edits))


class StaleMutant(AssertionError):
    """The product has changed, and an edit does not apply to it any more."""


class Overlay:
    """
    A copy of the whole package, with a mutant or (for the control) without.

    Args:
        folder: Where it goes; must not exist. It is what goes first on an import path.
        mutant: None for a copy that differs only in leaving its marks.
        files: Files that leave a mark although they are not changed.
    """

    def __init__(self, folder: Path, mutant: Mutant | None, files: Iterable[str] = ()) -> None:
        self.folder = folder
        self._marks = folder / "imported"
        shutil.copytree(ROOT / "ckptmgr", folder / "ckptmgr")
        shutil.copytree(ROOT / "migrations", folder / "ckptmgr" / "migrations", dirs_exist_ok=True)
        self._files = mutant.files if mutant is not None else tuple(files)
        texts = {file: (ROOT / "ckptmgr" / file).read_text() for file in self._files}
        for edit in mutant.edits if mutant is not None else ():
            there = texts[edit.file].count(edit.old)
            if there != 1:
                raise StaleMutant(f"{mutant and mutant.name}: {there} times in {edit.file}, not once:\n{edit.old}")
            texts[edit.file] = texts[edit.file].replace(edit.old, edit.new)
        for file, text in texts.items():
            mark = f'\nwith open({str(self._marks)!r}, "a") as _mark:\n    _mark.write(f"{{__name__}} {file}\\n")\n'
            (folder / "ckptmgr" / file).write_text(text + mark)

    def never_imported(self) -> list[str]:
        """The mutated files that nobody has imported to their end, from here."""
        lines = self._marks.read_text().splitlines() if self._marks.exists() else []
        return sorted(set(self._files) - {line.partition(" ")[2] for line in lines})


def reads_as(violation: str, sign: str) -> bool:
    """Whether a violation says what it should say, and not that the mutant itself is broken."""
    return bool(violation) and re.search(sign, violation) is not None and _BROKEN.search(violation) is None


def failed_test(ended: Ended, sign: str) -> str | None:
    """The test that failed as it should, if one did."""
    failed = re.findall(r"^FAILED tests/(.*?)(?: - |$)", ended.output, re.MULTILINE)
    errors = re.search(r"^ERROR tests/", ended.output, re.MULTILINE)
    return str(failed[0]) if failed and not errors and reads_as(ended.output, sign) else None


def stem(environment: Mapping[str, str] = MappingProxyType({})) -> ForkServer:
    """A fork server with all that is slow to import and nothing of ours, to fork from with any copy of the product."""
    return ForkServer(*_SLOW, path=(Path(__file__).parent,), environment=environment)


def run_tests(forks: ForkServer, overlay: Overlay, nodes: tuple[str, ...], *, timeout_s: float = 110) -> Ended:
    """Run tests of this suite, below ``tests``, against an overlay, in a child of `stem`; pytest's exit status."""
    return forks.run(_pytest, str(overlay.folder), forks.address, nodes, timeout_s=timeout_s)


def _pytest(folder: str, address: str, nodes: tuple[str, ...]) -> None:
    import pytest

    sys.path[:] = [folder, *(path for path in sys.path if path and Path(path) != ROOT)]
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1", "FORKS_STEM": address}
    os.chdir(ROOT)
    options = ("-q", "-x", "-n", "0", "-p", "no:cacheprovider", "--tb=short", "-c", str(ROOT / "pyproject.toml"))
    status = pytest.main([*options, *(f"tests/{node}" for node in nodes)])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
