"""All ranks compare one checkpoint with what was committed, before any of them loads it, or while they do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ckptmgr.manifest import FileEntry
from ckptmgr.ranks import Ranks
from ckptmgr.resume import shares
from ckptmgr.rundir import RunDirectory


def together(
    ranks: Ranks,
    rundir: RunDirectory,
    path: str,
    files: Sequence[FileEntry],
    *,
    as_saved: bool,
    meet_every_s: float,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[str, ...]:
    """
    Read every byte of the checkpoint directory *path*, each file on one rank. All ranks must call.

    Args:
        ranks: This rank among the others.
        rundir: The run directory.
        path: The checkpoint, relative to the run directory.
        files: What was committed.
        as_saved: Whether as many ranks saved it; see `shares`.
        meet_every_s: In seconds. Ranks with much to read and ranks with little meet so often, however long it takes.

    Returns:
        What differs, the same on every rank; as in `RunDirectory.verify`, with the rank that found it.

    Raises:
        CheckpointError: A rank could not read at all; the same on every rank.
    """
    mine = shares(files, ranks.world_size, as_saved=as_saved)[ranks.rank]
    wrong: list[str] = []
    errors: list[Exception] = []
    done, enough = threading.Event(), threading.Event()

    def go_on(_: int) -> None:
        if enough.is_set():
            raise InterruptedError

    def read() -> None:
        try:
            wrong.extend(rundir.verify(path, mine, digests=True, progress=go_on))
        except Exception as error:  # noqa: BLE001 - agreed upon below
            errors.append(error)
        finally:
            done.set()

    reader = threading.Thread(target=read, name="ckptmgr-verify", daemon=True)
    reader.start()
    try:
        if meanwhile is not None:
            meanwhile()
        while True:
            done.wait(meet_every_s)
            (are_all_done,), _ = ranks.agree([done.is_set()])
            if are_all_done:
                break
    finally:
        enough.set()
        reader.join()
    ranks.all_or_none(errors[0] if errors else None, f"verifying {path}")
    if ranks.world_size == 1:
        return tuple(wrong)
    found = ranks.broadcast(ranks.gather([f"{text} (seen by rank {ranks.rank} on {ranks.host})" for text in wrong]))
    return tuple(text for of_rank in found for text in of_rank)
