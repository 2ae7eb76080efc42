"""
One harness in a process of its own, driven by libFuzzer through atheris.

    worker.py --train RUN              make a run to take seeds from
    worker.py --list                   name the harnesses
    worker.py --again RUN NAME FILE    give one input to a harness
    worker.py --fuzz NAME RUN INTO -OPTION=…
"""

from __future__ import annotations

import collections
import hashlib
import inspect
import json
import pickle
import shutil
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), *(str(ROOT / "tests" / name) for name in ("hostile", ""))]


def main(words: list[str]) -> None:
    """Do what the command line says."""
    match words:
        case ["--train", run]:
            import hostile_ground

            hostile_ground.train(Path(run))
        case ["--list"]:
            import hostile_parsers

            print(*hostile_parsers.HARNESSES)
        case ["--again", run, name, file]:
            import guard
            import hostile_parsers as parsers

            folder = guard.scratch()
            try:
                ground = parsers.Ground(Path(run), folder)
                parsers.judge(parsers.HARNESSES[name], ground, Path(file).read_bytes())
                print(f"{name}: nothing is wrong with {file}")
            finally:
                shutil.rmtree(folder)
        case ["--fuzz", name, run, into, *options]:
            fuzz(name, Path(run), Path(into), options)
        case _:
            sys.exit(__doc__)


def fuzz(name: str, run: Path, into: Path, options: list[str]) -> None:
    """Fuzz until libFuzzer ends this process; what it must not do is kept and does not end it."""
    import atheris
    import torch  # noqa: F401 - before anything is instrumented

    with atheris.instrument_imports(include=["ckptmgr"]):
        import hostile_parsers as parsers
    # What of Python's own does the parsing, in Python.
    for owner in (pickle._Unpickler, zipfile.ZipFile, zipfile.ZipInfo, json.decoder, zipfile):
        _instrument(owner, atheris.instrument_func)

    harness = parsers.HARNESSES[name]
    # libFuzzer ends this process without a word to Python; who made the run removes this with it.
    ground = parsers.Ground(run, Path(tempfile.mkdtemp(dir=run.parents[1])))
    seeds, words = into / "seeds", into / "words"
    seeds.mkdir(exist_ok=True)
    for data in harness.seeds_of(ground):
        (seeds / hashlib.sha1(data).hexdigest()).write_bytes(data)
    words.write_text("".join(f'"{"".join(f"{chr(92)}x{byte:02x}" for byte in word)}"\n' for word in harness.words))
    seen: collections.Counter[str] = collections.Counter()

    def one(data: bytes) -> None:
        try:
            parsers.judge(harness, ground, data)
        except Exception as error:  # noqa: BLE001 - what it raises is the finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__}-{Path(where.filename).stem}-{where.lineno}"
            seen[place] += 1
            if seen[place] == 1:
                (into / "findings" / place).write_bytes(data)
                (into / "findings" / f"{place}.txt").write_text(
                    "".join(traceback.format_exception(error, limit=-6)), errors="backslashreplace"
                )
            ground.renew()

    folders = [str(into / "corpus"), str(seeds)]
    # libFuzzer takes an empty dictionary for an error.
    dictionary = [f"-dict={words}"] if harness.words else []
    arguments = [*options, *dictionary, f"-max_len={harness.most_bytes}", *folders]
    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def _instrument(owner: type | ModuleType, instrument: Callable[[Any], Any]) -> None:
    """Every function of a class, or of a module's own."""
    for value in list(vars(owner).values()):
        if inspect.isfunction(value) and (isinstance(owner, type) or value.__module__ == owner.__name__):
            instrument(value)


if __name__ == "__main__":
    main(sys.argv[1:])
