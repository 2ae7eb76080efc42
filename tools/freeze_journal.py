#!/usr/bin/env python3
"""
Store a journal as this version writes it, for the upgrade tests of all later versions.

    tools/freeze_journal.py

Run once for each schema revision, when it is released. Writes ``tests/journal/released/NNNN.db``
and, beside it as JSON, what a later version must still find in it. Never overwrites one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from ckptmgr.journal import Journal, declared
from ckptmgr.lifecycle import CheckpointState, Format, RetirementMark
from ckptmgr.manifest import FileEntry

RELEASED = Path(__file__).resolve().parent.parent / "tests" / "journal" / "released"
S = CheckpointState
WHO: dict[str, Any] = {"host": "node-1", "pid": 4242}
FILES = tuple(FileEntry(f"__{rank}_0.distcp", 1000 + rank, f"xxh3_128:{rank:032x}", rank) for rank in range(4))
WALK = (S.PREWRITTEN, S.WRITING, S.GATHERED, S.COMMITTED)


def fill(journal: Journal) -> None:
    """One of everything that a journal can say."""
    journal.end_epoch(journal.begin_epoch(**WHO, command="train.py", versions={"ckptmgr": "0.1.0", "torch": "2.13.0"}))
    epoch = journal.begin_epoch(**WHO, command="train.py --resume", versions={"ckptmgr": "0.1.0"})

    def save(series: str, step: int, until: S, layout: Format = Format.DCP, **facts: Any) -> int:
        record = journal.begin(
            series=series,
            step=step,
            format=layout,
            epoch=epoch,
            world_size=4,
            metrics={"loss": 1 / (step + 1)},
            per_rank=("data",),
            **WHO,
            **facts,
        )
        for source, dest in itertools.pairwise(WALK):
            if record.state is until:
                break
            if until is S.FAILED and source is S.WRITING:
                journal.advance(
                    record.id,
                    source,
                    S.FAILED,
                    epoch=epoch,
                    **WHO,
                    reason="rank 3 on node-2: no space left on device",
                    failures=[{"rank": 3, "host": "node-2", "cause": "no space left on device", "silent": False}],
                )
                break
            more: dict[str, Any] = {}
            if dest is S.GATHERED:
                more = {"manifest_digest": f"xxh3_128:{step:032x}", "files": FILES, "bytes": 4006, "write_s": 1.5}
            record = journal.advance(record.id, source, dest, epoch=epoch, **WHO, **more)
        return record.id

    first = save("checkpoint", 500, S.COMMITTED)
    second = save("checkpoint", 1000, S.COMMITTED)
    save("checkpoint", 1500, S.FAILED)
    save("checkpoint", 1000, S.COMMITTED, overwrite=True)
    save("hf", 1000, S.COMMITTED, Format.HUGGINGFACE)
    save("snapshot", 1600, S.GATHERED)
    journal.mark_retiring([RetirementMark(first, "not among the last 1")], epoch=epoch)
    journal.finish_retirement(first, epoch=epoch)
    journal.pin("hf", 1000, note="published")
    journal.record_verification(second, level="digest", ok=False, mismatches=["digest: __3_0.distcp"])
    fourth = save("checkpoint", 2000, S.GATHERED)
    journal.advance(
        fourth, S.GATHERED, S.COMMITTED, epoch=epoch, **WHO, decisions=[(first, "drop", ("not among the last 1",))]
    )


def facts(journal: Journal) -> dict[str, Any]:
    """What a later version must still find."""
    return {
        "run_id": journal.run_id,
        "epoch": journal.current_epoch(),
        "checkpoints": [f"{r.series} {r.step} {r.state}" for r in journal.checkpoints()],
        "transitions": len(journal.transitions()),
        "files_of": 1,
        "files": [[entry.path, entry.size, entry.rank] for entry in journal.files(1)],
    }


def freeze(folder: Path) -> Path:
    """Write the journal of this schema into *folder*."""
    target = folder / f"{declared.REVISION}.db"
    if target.exists():
        raise SystemExit(f"{target} exists: a released journal is never written again")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "frozen.journal.db"
        with Journal.open(path) as journal:
            fill(journal)
            found = facts(journal)
        content = path.read_bytes()
    folder.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
    target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    return target


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into", type=Path, default=RELEASED, help="where released journals are kept")
    options = parser.parse_args(arguments)
    print(freeze(options.into))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
