"""What one rank alone reads and finds hostile is the same error on all ranks, which can go on afterwards."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_bytes as b
import pytest
import torch
import torch.distributed as dist
from rank_processes import Here, run_on_ranks
from saving_ranks import manager_on, save_two
from torch.distributed.tensor import Shard, distribute_tensor

from ckptmgr import PerRank, RandomState
from ckptmgr.errors import CheckpointError
from ckptmgr.journal import seal
from ckptmgr.manifest import MANIFEST_NAME, Digest, Manifest


def _state(here: Here, step: int) -> dict[str, Any]:
    mesh = dist.init_device_mesh("cpu", (here.world_size,))
    return {
        "weight": distribute_tensor(torch.arange(64.0) + step, mesh, [Shard(0)]),
        "table": {1: f"{step}", "empty": {}},
        "own": PerRank({"at": [step, here.rank]}),
        "random": PerRank(RandomState()),
    }


def _save_two(here: Here) -> None:
    save_two(here, _state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(2, _save_two, folder)
    return folder


def _author(folder: Path, name: str, data: bytes) -> None:
    """Put *data* into step 2, and into manifest and journal as if it had been committed so."""
    step = folder / "run" / "checkpoint" / "step-2"
    (step / name).write_bytes(data)
    changes: list[tuple[str, tuple[object, ...]]] = []
    if name != MANIFEST_NAME:
        found = Manifest.from_json((step / MANIFEST_NAME).read_bytes())
        mine: dict[str, Any] = {"size": len(data), "digest": Digest(data).text}
        files = tuple(dataclasses.replace(one, **mine) if one.path == name else one for one in found.files)
        made = dataclasses.replace(found, files=files)
        changes = [
            ("UPDATE file SET size = ?, digest = ? WHERE checkpoint_id = 2 AND path = ?", (*mine.values(), name)),
            ("UPDATE checkpoint SET bytes = ? WHERE id = 2", (made.bytes,)),
        ]
        data = made.to_json().encode()
        (step / MANIFEST_NAME).write_bytes(data)
    _change_journal(folder, *changes, ("UPDATE checkpoint SET manifest_digest = ? WHERE id = 2", (Digest(data).text,)))


def _change_journal(folder: Path, *changes: tuple[str, tuple[object, ...]]) -> None:
    with contextlib.closing(sqlite3.connect(folder / "run.journal.db", isolation_level=None)) as connection:
        for change, values in changes:
            assert connection.execute(change, values).rowcount == 1, change
        seal.renew(connection)


def _outcome(call: Callable[[], object]) -> list[str]:
    try:
        call()
    except CheckpointError as error:
        return [type(error).__name__, str(error)]
    return ["", "nothing was refused"]


def _refuse_and_go_on(here: Here) -> list[str]:
    with manager_on(here) as manager:
        told = _outcome(lambda: manager.resume(_state(here, 0), step=2))
        state = _state(here, 0)
        assert manager.resume(state, step=1) is not None
        assert (state["table"], state["own"].value) == ({1: "1", "empty": {}}, {"at": [1, here.rank]})
        pending = manager.save(3, state)
        assert pending is not None
        pending.wait()
    return told


def _refuse_to_start(here: Here) -> list[str]:
    return _outcome(lambda: manager_on(here).close())


def _random_state(**changes: Any) -> bytes:
    out = io.BytesIO()
    torch.save({"own": {}, "random": {**RandomState().state_dict(), **changes}}, out)
    return out.getvalue()


_SYSTEM = b.call(b.name("posix", "system"), b.text("touch /tmp/owned"))
HOSTILE: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a call": ("per-rank-1.pt", lambda real: b.archive(_SYSTEM)),
    "tuples in tuples": ("per-rank-1.pt", lambda real: b.archive(b.bomb(40))),
    "a generator that reads elsewhere": (
        "per-rank-1.pt", lambda real: _random_state(numpy=("MT19937", torch.zeros(624).numpy(), 1 << 40, 0, 0.0)),
    ),
    "no archive": ("__1_0.distcp", lambda real: b"PK\3\4" + bytes(len(real) - 4)),
    "a call in a value": ("__0_0.distcp", lambda real: b.archive(_SYSTEM)[: len(real)].ljust(len(real), b"\0")),
    "an index that calls": (".metadata", lambda real: b.PROTO + _SYSTEM + b.STOP),
    "another file in the index": (".metadata", lambda real: real.replace(b"__1_0.distcp", b"../../precio")),
    "a path without end": (
        "mappings.json", lambda real: b'{"integer_keys": [], "empty": [["table"' + b', "x"' * 200_000 + b"]]}",
    ),
    "a manifest that leaves": (MANIFEST_NAME, lambda real: real.replace(b"__1_0.distcp", b"../../precio")),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_one_rank_finds_hostile_all_ranks_refuse_alike_and_go_on(what: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, symlinks=True, dirs_exist_ok=True)
    name, change = HOSTILE[what]
    real = (tmp_path / "run" / "checkpoint" / "step-2" / name).read_bytes()
    assert change(real) != real
    _author(tmp_path, name, change(real))
    told = run_on_ranks(2, _refuse_and_go_on, tmp_path)

    assert told[0] == told[1]
    assert told[0][0] == ("UnsafeResume" if name == MANIFEST_NAME else "CorruptCheckpoint"), told[0]
    assert not Path("/tmp/owned").exists()


def test_what_an_author_commits_is_resumed(saved: Path, tmp_path: Path) -> None:
    """Or what is refused above would be refused for not being what was committed."""
    shutil.copytree(saved, tmp_path, symlinks=True, dirs_exist_ok=True)
    path = tmp_path / "run" / "checkpoint" / "step-2" / "per-rank-1.pt"
    _author(tmp_path, path.name, _random_state())

    assert [what for what, _ in run_on_ranks(2, _refuse_and_go_on, tmp_path)] == ["", ""]


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("directory", "../precious"),
        ("staging_directory", "checkpoint/../../precious"),
        ("series", "'; DROP TABLE run;"),
    ],
)
def test_a_hostile_row_of_the_journal_is_the_same_error_on_all_ranks(
    saved: Path, tmp_path: Path, change: str, value: str
) -> None:
    shutil.copytree(saved, tmp_path, symlinks=True, dirs_exist_ok=True)
    _change_journal(tmp_path, (f"UPDATE checkpoint SET {change} = ? WHERE id = 2", (value,)))
    told = run_on_ranks(2, _refuse_to_start, tmp_path)

    assert told[0] == told[1]
    assert told[0][0].startswith("Journal"), told[0]
