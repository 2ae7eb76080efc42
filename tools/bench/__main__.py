"""
``make bench``: how fast ckptmgr and its peers save and load, side by side in one run, as ratios.

    python tools/bench [--quick] [--scale GIB] [--rounds N] [--seed N] [--only QUESTION,…] [--peers NAME,…]
    python tools/bench --render FILE… [--docs]

Questions: ``train``, ``export`` and ``moe`` (what a save and a load cost, by workload), ``many`` (100,000 tensors),
``ranks`` (1, 2 and 4 with FSDP2), ``journal`` (10 to 10,000 checkpoints; start of the command line). Each peer has a
process of its own over all rounds of a workload, and the rounds are interleaved in random order. What was measured is
one file in FOLDER; ``--render`` prints the tables of an earlier run again, or of one and of later ones that asked some
of the questions again, and ``--docs`` puts them and the charts into docs/performance.md. A peer that cannot be had or
fails is a row that says so. Exit status 1 if a target was not met and ``--strict`` is given.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

from bench import machine, render, rounds, targets  # noqa: E402
from bench.figures import Figures  # noqa: E402
from bench.peers import FLOOR, OURS, PEERS  # noqa: E402

QUESTIONS = ("train", "export", "moe", "many", "ranks", "journal")
#: Of a shell, on most machines.
_DESCRIPTORS = 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or read what was measured, and print it."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="small states, few rounds, the main peers; under 3 minutes"
    )
    parser.add_argument("--scale", type=float, help="GiB of the states of train and export (default 1; quick 0.06)")
    parser.add_argument("--rounds", type=int, help="rounds of each question (default 5; quick 3)")
    parser.add_argument("--tensors", type=int, help="how many small ones (default 20000; quick 1000)")
    parser.add_argument("--most-tensors", type=int, default=100_000, help="of ckptmgr alone (default 100000)")
    parser.add_argument(
        "--training-saves", type=int, default=4, help="with training, of ckptmgr and the floor, in each round"
    )
    parser.add_argument("--firsts", type=int, default=2, help="more first saves, each by a new process (default 2)")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which a peer sits out (default 120)")
    parser.add_argument("--seed", type=int, default=1, help="of the order in each round (default 1)")
    parser.add_argument("--only", default="", help=f"which of {', '.join(QUESTIONS)}")
    parser.add_argument("--peers", default="", help="which peers, with commas between them; the floor is always there")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs" / "bench", help="where files go (default runs/bench)"
    )
    parser.add_argument(
        "--render", type=Path, nargs="+", metavar="FILE", help="print the tables of an earlier run, or of several"
    )
    parser.add_argument("--docs", action="store_true", help="also put them into docs/performance.md")
    parser.add_argument("--strict", action="store_true", help="exit status 1 if a target is not met")
    options = parser.parse_args(arguments)
    if options.render:
        runs = [rounds.Results.from_json(file.read_text()) for file in options.render]
        results = functools.reduce(rounds.Results.with_later, runs)
    else:
        unknown = set(filter(None, options.only.split(","))) - set(QUESTIONS)
        unknown |= set(filter(None, options.peers.split(","))) - PEERS.keys()
        if unknown:
            parser.error(f"there is no {', '.join(sorted(unknown))}")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the workers are ended
        results = measure(options)
    figures = Figures(results)
    print(render.report(figures))
    if options.docs:
        render.write_docs(figures, ROOT / "docs" / "performance.md")
    missed = any(verdict.word == "NOT met" for verdict in targets.judge(figures))
    return int(options.strict and missed)


def measure(options: argparse.Namespace) -> rounds.Results:
    """Ask the questions; the results also stand in a file."""
    quick = options.quick
    scale = options.scale or (0.06 if quick else 1.0)
    number = options.rounds or (3 if quick else 5)
    tensors = options.tensors or (1000 if quick else 20_000)
    asked = options.only.split(",") if options.only else [name for name in QUESTIONS if not (quick and name == "many")]
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="work-", dir=options.folder.resolve()))
    results = rounds.Results(
        machine={"began": time.time(), **machine.facts(folder, ROOT)},
        options={"scale": scale, "rounds": number, "tensors": tensors, "seed": options.seed, "quick": quick},
    )
    if (reason := rounds.why_not_cold()) is not None:
        results.skipped.append(reason)
    into = options.folder / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    began = time.monotonic()
    try:
        for question in asked:
            rounds.say(f"{time.monotonic() - began:.0f} s: {question}")
            _ask(question, options, results, folder, scale=scale, number=number, tensors=tensors)
    finally:
        into.write_text(results.to_json())  # of a run that is cut short too
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{time.monotonic() - began:.0f} s; the samples are in {into}", file=sys.stderr)
    return results


def _ask(
    question: str, options: argparse.Namespace, results: rounds.Results, folder: Path, *, scale: float, number: int,
    tensors: int,
) -> None:  # fmt: skip
    quick = options.quick
    if question in ("train", "export", "moe"):
        chosen = list(filter(None, options.peers.split(","))) or [
            name for name, (_, _, quickly) in PEERS.items() if not quick or question in quickly
        ]
        names = [name for name in PEERS if name in {FLOOR, *chosen} and question in PEERS[name][1]]
        always = [name for name in names if name in (FLOOR, OURS, f"{OURS} export")]
        many = 1 if quick else options.training_saves
        plan = rounds.Plan(
            workload=question, size=tensors if question == "moe" else int(scale * (1 << 30)), peers=names,
            rounds=number, seed=options.seed, budget_s=20.0 if quick else options.budget, folder=folder,
            always=always, training={name: many if name in always else 1 for name in names},
            firsts=0 if quick or question == "moe" else options.firsts, calibration_s=0.3 if quick else 0.7,
        )  # fmt: skip
        rounds.run(plan, results)
    elif question == "many":
        rounds.many_tensors(results, OURS, options.most_tensors, _DESCRIPTORS, folder)
    elif question == "ranks":
        worlds = (2,) if quick else (1, 2, 4)
        if max(worlds) > 2 * (os.cpu_count() or 1):
            results.skipped.append(f"{max(worlds)} ranks on {os.cpu_count()} cores say little")
        workloads = ("fsdp", "fsdp export") if quick else ("fsdp", "fsdp export", "small tensors", "one tensor")
        size = int(scale * (1 << 30))
        rounds.several_ranks(results, worlds, workloads, size, tensors // 10, number, options.seed, folder)
    else:
        numbers = (10, 300) if quick else (10, 1_000, 10_000)
        rounds.long_histories(results, numbers, 1, 3 if quick else 5, options.seed, folder)


if __name__ == "__main__":
    sys.exit(main())
