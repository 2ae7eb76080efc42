"""
``make fuzz``: every parser of bytes from disk, fed by coverage, and one table.

    python tools/fuzz [--seconds N] [--only PARSER,…] [--into FOLDER] [--seed N]
    python tools/fuzz --again PARSER FILE

The harnesses and what is judged are those of `tests/hostile/hostile_parsers.py`. Each runs in a process of
its own for *seconds*, begins with seeds from a real run, and leaves what was new to it in
FOLDER/PARSER/corpus, with which the next call goes on. An input that must not do what it does is left in
FOLDER/PARSER/findings, once for each place in the code. ``--again`` gives one such file to its parser.
Exit status 1 if anything was found.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Of a fuzzing process, all that came before the input at hand included.
MOST_RSS_MIB = 3000
#: Of one input, by the wall clock of a busy machine; a harness itself is stricter, and looks at CPU time.
TIMEOUT_S = 60


def main() -> int:
    """Run the harnesses one after the other; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="how long each parser is tried")
    parser.add_argument("--only", default="", help="which parsers, with commas between them")
    parser.add_argument("--into", type=Path, default=ROOT / "runs" / "fuzz", help="where corpora and findings go")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations; 0 draws one")
    parser.add_argument("--again", nargs=2, metavar=("PARSER", "FILE"), help="give one file to one parser")
    args = parser.parse_args()
    into = args.into.resolve()
    into.mkdir(parents=True, exist_ok=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-run-", dir=memory) as folder:
        pristine = Path(folder, "runs", "alpha").resolve()
        _worker("--train", pristine).check_returncode()
        if args.again:
            return _worker("--again", pristine, *args.again).returncode
        names = args.only.split(",") if args.only else _worker("--list", captured=True).stdout.split()
        print("| parser | inputs | edges | corpus | findings |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
        found = 0
        for name in names:
            row = _fuzz(name, pristine, into / name, seconds=args.seconds, seed=args.seed)
            print(f"| {' | '.join(row)} |", flush=True)
            found += row[-1] != "0"
    return int(found > 0)


def _worker(*words: object, captured: bool = False) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "fuzz" / "worker.py", *words]
    return subprocess.run(list(map(str, command)), text=True, check=False, stdout=subprocess.PIPE if captured else None)


def _fuzz(name: str, pristine: Path, into: Path, *, seconds: int, seed: int) -> list[str]:
    """Fuzz one parser, again after each death of its process; returns a row of the table."""
    for part in ("corpus", "findings", "seeds"):
        (into / part).mkdir(parents=True, exist_ok=True)
    for old in (into / "findings").iterdir():
        old.unlink()
    shutil.rmtree(into / "seeds")
    inputs, covered, deaths = 0, 0, 0
    deadline = time.monotonic() + seconds
    while (left := round(deadline - time.monotonic())) > 0:
        options = [
            f"-max_total_time={left}", f"-artifact_prefix={into / 'findings'}/", "-print_final_stats=1",
            f"-rss_limit_mb={MOST_RSS_MIB}", f"-timeout={TIMEOUT_S}", "-detect_leaks=0", f"-seed={seed}",
        ]  # fmt: skip
        print(f"{name}: {left} s", file=sys.stderr)
        command = [sys.executable, ROOT / "tools" / "fuzz" / "worker.py", "--fuzz", name, pristine, into, *options]
        with (into / "log").open("w+", errors="replace") as log:
            done = subprocess.run(list(map(str, command)), stdout=log, stderr=log, check=False)
            log.seek(0)
            said = log.read()
        units = [int(number) for number in re.findall(r"^#(\d+)\s", said, flags=re.MULTILINE)]
        finally_ = re.findall(r"number_of_executed_units: (\d+)", said)
        inputs += int(finally_[-1]) if finally_ else max(units, default=0)
        covered = max([covered, *(int(number) for number in re.findall(r" cov: (\d+) ", said))])
        if done.returncode == 0:
            break
        deaths += 1
        if not units:
            sys.exit(f"{name} did not start: {said[-3000:]}")
    findings = [path.name for path in (into / "findings").iterdir() if path.suffix != ".txt"]
    for text in sorted((into / "findings").glob("*.txt")):
        print(f"\n{name}: {text.with_suffix('')}\n{text.read_text()}", file=sys.stderr)
    if deaths:
        print(f"{name}: its process died {deaths} times: {into / 'log'}", file=sys.stderr)
    kept = len(list((into / "corpus").iterdir()))
    return [name, f"{inputs:,}", f"{covered:,}", f"{kept:,}", str(max(deaths, len(findings)))]


if __name__ == "__main__":
    sys.exit(main())
