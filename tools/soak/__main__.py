"""
``make soak``: thousands of saves with random faults, and whether anything grows with their number.

    python tools/soak [--ranks 1|4] [--saves N] [--seed N] [--budget SECONDS] [--folder FOLDER] [--plant NAME]
    python tools/soak --judge FOLDER

The job runs as a trainer's would, in processes of its own, and dies and is started again as the plan says.
What was measured stays in the folder; ``--judge`` prints the table of an earlier soak again. Exit status 1
if something grew or did not hold.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tools"), str(ROOT)]

from torture import shim  # noqa: E402

from soak import measures, plants  # noqa: E402
from soak.judge import Verdict, judge, table  # noqa: E402
from soak.plan import Plan  # noqa: E402
from soak.trainer import KEPT_EVERY, LOST_A_RANK, SERIES, Life, check_export, value_of  # noqa: E402

#: How long the last ranks may take when another has ended; more than all timeouts of a save together.
_PATIENCE_S = 120.0


def main() -> int:
    """Soak, print the table, say what did not hold."""
    parser = argparse.ArgumentParser(prog="soak", description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1, choices=(1, 2, 4), help="how many ranks train (default 1)")
    parser.add_argument("--saves", type=int, default=3000, help="how many moves; some save twice (default 3000)")
    parser.add_argument("--seed", type=int, default=1, help="what happens when (default 1)")
    parser.add_argument("--budget", type=float, default=1800, help="seconds after which it ends early (default 1800)")
    parser.add_argument("--every", type=int, default=20, help="saves between two measurements (default 20)")
    parser.add_argument("--folder", type=Path, help="made anew (default runs/soak-RANKS)")
    parser.add_argument("--plant", choices=plants.PLANTS, nargs="+", default=(), help="leaks to be found")
    parser.add_argument("--judge", type=Path, metavar="FOLDER", help="print the table of an earlier soak again")
    options = parser.parse_args()
    if options.judge:
        return say(options.judge, [])
    folder = (options.folder or ROOT / "runs" / f"soak-{options.ranks}").resolve()
    if folder.exists():
        if any(folder.iterdir()) and not (folder / "orders").exists() and not (folder / "outcomes-0.jsonl").exists():
            parser.error(f"{folder} is not empty and not of an earlier soak")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    faults = shim.why_not() is None
    if not faults:
        print(f"without errors of the disk: {shim.why_not()}", file=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the ranks are ended
    plan = Plan(options.seed, options.saves, options.ranks)
    began = time.monotonic()
    wrong = list(soak(folder, plan, options.budget, options.every, options.plant, faults=faults))
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    return say(folder, wrong)


def soak(folder: Path, plan: Plan, budget: float, every: int, plant: Sequence[str], *, faults: bool) -> Iterator[str]:
    """Let the job live, again and again, until the plan or the budget ends; gives what did not hold."""
    until = time.time() + budget
    if faults:
        shim.give(folder / "orders", folder / "run", shim.Orders())
    starts = [0, *(death + 1 for death in plan.deaths), plan.moves]
    for number, (first, after) in enumerate(itertools.pairwise(starts)):
        if time.time() > until:
            break
        life = Life(
            str(folder), 0, plan.world, plan.seed, plan.moves, number, first, until, every, plant=plant, faults=faults
        )
        dies = after < plan.moves or plan.move(after - 1).is_death
        statuses = live(life, plan.world, faults=faults)
        if set(statuses) == {0}:  # to the end of the plan, or of the time
            break
        expected = {-signal.SIGKILL} if plan.move(after - 1).kind == "death_of_all" else {-signal.SIGKILL, LOST_A_RANK}
        if not dies or set(statuses) != expected:
            yield f"life {number} from move {first} on ended with {statuses}; see {folder}/rank-*.log"
            return
    yield from alike(folder, plan.world)
    try:
        judge_run(folder)
    except AssertionError as error:
        yield f"at the end: {error}"


def live(life: Life, world: int, *, faults: bool) -> list[int]:
    """All ranks of one life; their exit statuses."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        **({"LD_PRELOAD": str(shim.build())} if faults else {}),
    }
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in range(world):
            log = stack.enter_context(Path(life.folder, f"rank-{rank}.log").open("a"))
            words = json.dumps(dataclasses.asdict(dataclasses.replace(life, rank=rank)))
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "soak.trainer", words], env=environment, stdout=log, stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip
        deadline = None
        try:
            while any(rank.poll() is None for rank in ranks):
                ended = [rank.returncode for rank in ranks if rank.returncode is not None]
                if ended and deadline is None:
                    deadline = time.monotonic() + _PATIENCE_S
                if deadline is not None and time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    os.killpg(rank.pid, signal.SIGCONT)
                    os.killpg(rank.pid, signal.SIGKILL)
        return [rank.wait() for rank in ranks]


def alike(folder: Path, world: int) -> Iterator[str]:
    """Every rank was told the same of every move."""
    told = [_lines(folder / f"outcomes-{rank}.jsonl") for rank in range(world)]
    by_move = [{number: words for number, *words in one} for one in told]
    for number in sorted(set().union(*by_move)):
        words = [one.get(number) for one in by_move]
        if any(one != words[0] for one in words):
            yield f"the ranks were told different things of move {number}: {words}"


def judge_run(folder: Path) -> None:
    """At the end: what was acknowledged and must be kept is live, and whole; nothing else is left."""
    import torch
    import torch.distributed.checkpoint

    from ckptmgr.journal import Journal
    from ckptmgr.rundir import RunDirectory

    rundir = RunDirectory(folder / "run")
    with Journal.open_read_only(rundir.journal_path) as journal:
        live = journal.checkpoints(live_only=True)
        standing = journal.standing()
        files = {record.id: journal.files(record.id) for record in live}
    assert standing == live, f"left in between: {[record.id for record in standing if not record.is_live]}"
    acknowledged = [tuple(words) for words in _lines(folder / "acknowledged.jsonl")]
    for series in SERIES:
        mine = sorted((record for record in live if record.series == series), key=lambda record: record.commit_seq or 0)
        told = [(step, gen) for of, step, gen in acknowledged if of == series]
        there = {(record.step, int(record.metrics["gen"])) for record in mine}
        kept = {(step, gen) for step, gen in told if step % KEPT_EVERY == 0 and (step, gen + 1) not in told}
        must = {max(told)} | (kept if series == "dcp" else set())
        assert must <= there, f"{series}: {must - there} was acknowledged and is gone"
        names = {item.path for item in rundir.listing([series]) if not item.is_our_link}
        assert names == {record.directory for record in mine}, f"{series}: {names} stands on disk"
        for record in mine:
            wrong = rundir.verify(record.directory, files[record.id], digests=True)
            assert not wrong, f"{record.directory}: {wrong}"
            step, gen, width = record.step, int(record.metrics["gen"]), int(record.metrics["width"])
            if series == "hf":
                assert check_export(rundir.absolute(record.directory), []) == (step, gen % 4)
                continue
            shapes = {"0.weight": (width, width), "0.bias": (width,), "1.weight": (width, width), "1.bias": (width,)}
            target: dict[str, Any] = {"model": {name: torch.empty(shape) for name, shape in shapes.items()}}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked for with no_dist
                torch.distributed.checkpoint.load(target, checkpoint_id=rundir.absolute(record.directory), no_dist=True)
            for number, tensor in enumerate(target["model"].values()):
                assert bool((tensor == value_of(step, gen, number)).all()), f"{record.directory} has other weights"


def verdicts(folder: Path) -> list[Verdict]:
    """Everything that was measured, judged: of several ranks the one that grew most."""
    found: dict[str, Verdict] = {}

    def take(name: str, rows: Sequence[dict[str, Any]], measure: str) -> None:
        points = [(row["saves"], row[measure]) for row in rows if measure in row]
        one = judge(name, points, measures.TOLERANCES[measure])
        if one is not None and (name not in found or one.slope > found[name].slope):
            found[name] = one

    for path in sorted(folder.glob("samples-[0-9]*.jsonl")):
        rows = _lines(path)
        for role, key in (("trainer", "life"), ("writer", "pid")):
            mine = [row for row in rows if row["role"] == role]
            for measure in measures.TOLERANCES:
                take(f"{role}: {_words(measure)}", _longest(mine, key), measure)
    run = _lines(folder / "samples-run.jsonl")
    for before, row in zip([{}, *run], run, strict=False):
        more = row["attempts"] - before.get("attempts", row["attempts"])
        if more:
            row["journal_bytes_per_attempt"] = (row["journal_bytes"] - before["journal_bytes"]) / more
    # What a save or a start costs depends on the process as well; the journal and the directory outlive it.
    oldest = _longest(run, "life")
    for measure in measures.TOLERANCES:
        take(f"run: {_words(measure)}", oldest if measure in measures.OF_A_LIFE else run, measure)
    return list(found.values())


def say(folder: Path, wrong: Sequence[str]) -> int:
    """Print what came of a soak; the exit status."""
    outcomes = _lines(folder / "outcomes-0.jsonl")
    counts = collections.Counter((kind, word) for _, kind, _, word in outcomes)
    lives = {row["life"] for row in _lines(folder / "samples-run.jsonl")}
    acknowledged = len(_lines(folder / "acknowledged.jsonl"))
    print(f"{len(outcomes)} moves in {len(lives)} lives, {acknowledged} saves acknowledged\n")
    print("| move | became | times |\n| --- | --- | ---: |")
    for (kind, word), times in sorted(counts.items()):
        print(f"| {kind.replace('_', ' ')} | {word} | {times} |")
    judged = verdicts(folder)
    print(f"\n{table(judged)}")
    for text in wrong:
        print(f"\nVIOLATED: {text}")
    growing = [one.measure for one in judged if one.grows]
    if growing:
        print(f"\nGROWS: {', '.join(growing)}")
    return 1 if wrong or growing or not judged else 0


def _words(measure: str) -> str:
    return measure.replace("_", " ")


def _longest(rows: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The rows of the life, or of the process, that lived longest."""
    by_key: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_key.setdefault(row[key], []).append(row)
    return max(by_key.values(), key=len, default=[])


def _lines(path: Path) -> list[Any]:
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a process that was killed
            found.append(json.loads(line))
    return found


if __name__ == "__main__":
    sys.exit(main())
