"""
How long the command takes from a cold start, and how much memory, on a run with a long history.

    python -m bench.commands make FOLDER CHECKPOINTS RANKS LIVE
    python -m bench.commands measure FOLDER ROUNDS [COMMAND ...]

``make`` gives FOLDER/run a journal of so many checkpoints of so many ranks, a file each; the last LIVE of them stand
on disk, the others are retired. ``measure`` prints one JSON object: of each command its median and slowest seconds,
the median of its seconds of CPU and its largest memory in MB. Each round runs all commands once, each in a new process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMMANDS = ("latest", "ls", "check", "show", "stats")


def make(folder: Path, number: int, ranks: int, live: int) -> None:
    """Enter the history in one transaction: as a manager would, it takes hours."""
    from ckptmgr.journal import Journal, database, seal
    from ckptmgr.lifecycle import Format
    from ckptmgr.manifest import MANIFEST_NAME, Digest, FileEntry, Manifest
    from ckptmgr.rundir import RunDirectory

    run = RunDirectory(folder / "run")
    run.journal_path.parent.mkdir(parents=True, exist_ok=True)
    with Journal.open(run.journal_path) as journal:
        run.pair(journal.run_id)
        run_id = journal.run_id
        epoch = journal.begin_epoch(host="bench", pid=1, command="the past", versions={})
        journal.end_epoch(epoch)
    data = b"x" * 100
    files = [FileEntry(f"__{rank}_0.distcp", len(data), Digest(data).text, rank) for rank in range(ranks)]
    began = time.time() - 600.0 * number
    checkpoints: list[dict[str, Any]] = []
    for id in range(1, number + 1):
        step, at = id * 500, began + 600.0 * id
        row: dict[str, Any] = {
            "id": id, "series": "checkpoint", "step": step, "format": "dcp", "state": "COMMITTED", "epoch": epoch,
            "world_size": ranks, "directory": f"checkpoint/step-{step}",
            "staging_directory": f"checkpoint/.step-{step}.e{epoch}.a{id}.incomplete", "created_at": at - 30,
            "bytes": ranks * len(data), "manifest_digest": "xxh3_128:" + "0" * 32, "committed_at": at,
            "commit_seq": id, "finished_at": at, "stage_s": 0.5, "write_s": 25.0 + id % 7, "gather_s": 0.2,
            "commit_s": 0.1, "retire_started_at": None, "retire_reason": None, "retired_at": None,
        }  # fmt: skip
        if id <= number - live:
            row |= {
                "retire_started_at": at + 600 * live, "retire_reason": f"no rule keeps it (last {live})",
                "retired_at": at + 600 * live + 1,
            }  # fmt: skip
        else:
            manifest = Manifest(
                run_id=run_id, series="checkpoint", step=step, attempt=id, epoch=epoch, format=Format.DCP,
                world_size=ranks, created_at=at - 30, files=tuple(files),
            )  # fmt: skip
            text = manifest.to_json().encode()
            row["manifest_digest"] = Digest(text).text
            there = run.path / row["directory"]
            there.mkdir(parents=True)
            for entry in files:
                (there / entry.path).write_bytes(data)
            (there / MANIFEST_NAME).write_bytes(text)
        checkpoints.append(row)
    connection = database.connect(run.journal_path, "rw")
    connection.execute("PRAGMA synchronous=OFF")
    connection.execute("BEGIN IMMEDIATE")
    names = list(checkpoints[0])
    connection.executemany(
        f"INSERT INTO checkpoint ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)})", checkpoints
    )
    states = ["PREWRITTEN", "WRITING", "GATHERED", "COMMITTED"]
    connection.executemany(
        "INSERT INTO transition (checkpoint_id, source, dest, at, epoch, host, pid, note) VALUES (?,?,?,?,?,?,?,?)",
        (
            (row["id"], source, dest, row["created_at"] + place, epoch, "bench", 1, "")
            for row in checkpoints
            for place, (source, dest) in enumerate(zip([None, *states], states, strict=False))
        ),
    )
    connection.executemany(
        "INSERT INTO file (checkpoint_id, path, rank, size, digest) VALUES (?,?,?,?,?)",
        ((row["id"], each.path, each.rank, each.size, each.digest) for row in checkpoints for each in files),
    )
    connection.executemany(
        "INSERT INTO retirement_decision (checkpoint_id, decided_by, verdict, reasons, at) VALUES (?,?,?,?,?)",
        (
            (row["id"], row["id"], *(("keep", '["last"]') if row["retired_at"] is None else ("drop", "[]")), 1.0)
            for row in checkpoints
        ),
    )
    seal.renew(connection)
    connection.execute("COMMIT")
    connection.close()


def measure(folder: Path, rounds: int, commands: list[str]) -> dict[str, dict[str, float]]:
    """Each command's seconds, from the start of the process to its end, and its largest memory."""
    run = folder / "run"
    newest = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoint").iterdir())
    took: dict[str, list[float]] = {name: [] for name in commands}
    cpu: dict[str, list[float]] = {name: [] for name in commands}
    memory: dict[str, float] = dict.fromkeys(commands, 0.0)
    for _ in range(rounds):
        for name in commands:
            words = [sys.executable, "-m", "ckptmgr", name, str(run), *([str(newest)] if name == "show" else [])]
            began = time.perf_counter()
            child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, _, used = os.wait4(child.pid, 0)
            took[name].append(time.perf_counter() - began)
            cpu[name].append(used.ru_utime + used.ru_stime)
            memory[name] = max(memory[name], used.ru_maxrss / 1024)
    return {
        name: {
            "median_s": round(statistics.median(took[name]), 3),
            "slowest_s": round(max(took[name]), 3),
            "median_cpu_s": round(statistics.median(cpu[name]), 3),
            "memory_mb": round(memory[name]),
        }
        for name in commands
    }


def main() -> None:
    """One of the two commands."""
    command, folder, *rest = sys.argv[1], Path(sys.argv[2]), *sys.argv[3:]
    if command == "make":
        make(folder, *map(int, rest))
    else:
        for name, found in measure(folder, int(rest[0]), rest[1:] or list(COMMANDS)).items():
            print(json.dumps({"command": name, **found}))


if __name__ == "__main__":
    main()
