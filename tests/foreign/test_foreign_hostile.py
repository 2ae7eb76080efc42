"""Directories made to hurt who looks at them: no crash, no hang, little memory, and nothing outside is read or run."""

from __future__ import annotations

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import layouts_on_disk as made
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts_on_disk import text, torch_save

from ckptmgr import foreign
from ckptmgr.errors import UnsafePath
from ckptmgr.foreign import ground, indexes
from ckptmgr.foreign.contents import MAX_JSON_BYTES

#: What the command may have in memory, its interpreter and libraries included.
MOST_BYTES = 900 << 20
#: Seconds. Nothing here is allowed to come near them.
MOST_S = 60

Theirs = Callable[[str], Path]


def check(directory: Path, *words: str) -> tuple[int, dict[str, object]]:
    """Run the command in a child that has not much memory; its status and its document."""

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))

    done = subprocess.run(
        [sys.executable, "-m", "ckptmgr", "check", str(directory), "--json", *words],
        capture_output=True, text=True, timeout=MOST_S, check=False, preexec_fn=bounded,
    )  # fmt: skip
    assert done.returncode in (0, 3, 4, 5, 10), done.stdout + done.stderr
    assert done.stderr == ""
    return done.returncode, json.loads(done.stdout)


def ids(document: dict[str, object]) -> set[str]:
    layouts = document["layouts"]
    assert isinstance(layouts, list)
    return {found["id"] for each in layouts for one in each["checkpoints"] for found in one["findings"]}


def sparse(path: Path, size: int, head: bytes = b"", tail: bytes = b"") -> None:
    """A file of *size* bytes that takes no room."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(head)
    os.truncate(path, size)
    if tail:
        with path.open("r+b") as file:
            file.seek(size - len(tail))
            file.write(tail)


# -- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 40, MAX_JSON_BYTES + 1])
def test_a_header_of_any_length(length: int, tmp_path: Path) -> None:
    text(tmp_path / "config.json", {})
    sparse(tmp_path / "model.safetensors", 1 << 42, struct.pack("<Q", length))
    code, document = check(tmp_path)

    assert ids(document) == {"F003"} if length > 1 << 42 else {"F015"}
    assert code == (5 if length > 1 << 42 else 0)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * (1 << 20), b'{"a":' * (1 << 18), b"9" * 100_000, b"[" + b"[]," * (1 << 20) + b"[]]",
        b'{"weight_map": {"a": "' + b"\\ud800" * 10_000 + b'"}}', b"\xff\xfe" * 1000, b'{"weight_map": ' + b"1e999}",
    ],
    ids=["deep", "deep objects", "number", "lists", "surrogates", "no text", "infinity"],
)  # fmt: skip
def test_json_of_any_kind(content: bytes, tmp_path: Path) -> None:
    for name in ("model.safetensors.index.json", ".xtuner", "checkpoint-1/trainer_state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)

    assert check(tmp_path)[0] in (3, 5)


def row(name: bytes, size: int, at: int, crc: int = 0) -> bytes:
    """A row of the table of an archive."""
    return b"PK\x01\x02" + struct.pack("<4xHH4xIIIHHH8xI", 0, 0, crc, size, size, len(name), 0, 0, at) + name


def archive(path: Path, rows: list[bytes], *, member: int, count: int | None = None) -> None:
    """An archive of one member of zeros, and any table."""
    body = b"PK\x03\x04" + struct.pack("<22xHH", 5, 0) + b"x.pkl" + bytes(member)
    table = b"".join(rows)
    count = len(rows) if count is None else count
    end = b"PK\x06\x06" + struct.pack("<Q12xQQQQ", 44, count, count, len(table), len(body))
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, len(body) + len(table), 1)
    last = b"PK\x05\x06" + struct.pack("<4xHHIIH", 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(body + table + end + locator + last)


@pytest.mark.parametrize("count", [1 << 40, 1_000_000, 3_000_000])
def test_an_archive_that_claims_any_number_of_members(count: int, tmp_path: Path) -> None:
    archive(tmp_path / "last.ckpt", [row(b"x.pkl", 100, 0)], member=100, count=count)

    assert ids(check(tmp_path)[1]) <= {"F006", "F015"}


def test_members_that_are_all_the_same_bytes_are_not_read_again_and_again(tmp_path: Path) -> None:
    right = zlib.crc32(bytes(1 << 20))
    archive(tmp_path / "last.ckpt", [row(b"x.pkl", 1 << 20, 0, crc=right)] * 100_000, member=1 << 20)
    code, document = check(tmp_path, "--deep")

    assert (code, ids(document)) == (5, {"F006"})


def test_members_without_bytes_are_counted_and_not_kept(tmp_path: Path) -> None:
    archive(tmp_path / "last.ckpt", [row(b"x.pkl", 0, 0)] * 300_000, member=0)

    assert check(tmp_path)[0] == 0


def test_an_archive_of_wide_numbers_is_read(tmp_path: Path) -> None:
    """What `torch.save` writes for members of 4 GiB and more: the numbers stand behind the name."""
    name = b"x.pkl"
    extra = struct.pack("<HHQQQ", 1, 24, 100, 100, 0)
    wide = b"PK\x01\x02" + struct.pack("<4xHH4xIIIHHH8xI", 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 5, 28, 0, 0xFFFFFFFF)
    archive(tmp_path / "last.ckpt", [wide + name + extra], member=100)
    assert check(tmp_path)[0] == 0

    archive(tmp_path / "last.ckpt", [wide + name + extra.replace(b"\x64", b"\x65")], member=100)
    assert ids(check(tmp_path)[1]) == {"F006"}


@pytest.mark.parametrize("head", [b"", b"PK\x03\x04", b"\x80\x04", b"x"])
def test_files_of_any_size(head: bytes, tmp_path: Path) -> None:
    for name in ("last.ckpt", "step-1/.metadata", "step-1/__0_0.distcp", "latest", "step_2/metadata.pkl"):
        sparse(tmp_path / name, 1 << 43, head)
    code, document = check(tmp_path, "--deep")

    assert code == 5
    assert ids(document) <= {"F003", "F005", "F006", "F015"}


# -- pickles ----------------------------------------------------------------------------------------------------------


class Evil:
    """Runs a program when it is loaded by `pickle`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("name", ["step-1/.metadata", "step_1/metadata.pkl", "last.ckpt"])
def test_nothing_in_a_pickle_is_run(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "run"
    path = tmp_path / "theirs" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(Evil(mark)))
    check(tmp_path / "theirs", "--deep")
    assert not mark.exists()

    pickle.loads(path.read_bytes())
    assert mark.exists(), "the pickle does nothing"


BOMBS = {
    "a memo of 64 GiB": b"\x80\x04Nr\xff\xff\xff\xff.",
    "bytes of 2 GiB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 31) + b"x.",
    "text of 2^63": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63) + b"x.",
    "a frame of 2^63": b"\x80\x04\x95" + struct.pack("<Q", (1 << 63) - 1) + b"N.",
    "twice the same, 60 times": b"\x80\x04)" + b"\x94h\x00\x86" * 60 + b".",
    "a number of 2^31 bytes": b"\x80\x04\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",
    "no more marks": b"\x80\x04t.",
    "an extension": b"\x80\x04\x82\x01.",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_pickles_that_would_take_everything(bomb: str, tmp_path: Path) -> None:
    for name in ("step-1/.metadata", "step_2/metadata.pkl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(BOMBS[bomb])
    code, document = check(tmp_path)

    assert (code, ids(document)) == (5, {"F006"})


def test_an_index_of_too_many_steps_is_not_read(theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes._Steps, "left", 100)
    report = foreign.judge(theirs("torchtitan"))

    assert report is not None
    assert {found.id for each in report.layouts[0].candidates for found in each.findings} == {"F015"}


def test_an_index_of_too_many_bytes_is_not_read(theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "MAX_INDEX_BYTES", 100)
    report = foreign.judge(theirs("torchtitan"))

    assert report is not None
    assert {found.id for each in report.layouts[0].candidates for found in each.findings} == {"F015"}


def test_an_index_whose_pieces_all_are_the_same_bytes_is_refused(tmp_path: Path) -> None:
    """Or a small index would make --deep read one large file for ever."""
    made.dcp_save(tmp_path / "step-1")
    path = tmp_path / "step-1" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    size = (tmp_path / "step-1" / "__0_0.distcp").stat().st_size
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, size
    path.write_bytes(pickle.dumps(metadata))

    assert ids(check(tmp_path, "--deep")[1]) == {"F006"}


# -- names ------------------------------------------------------------------------------------------------------------


def test_links_lead_nowhere(tmp_path: Path) -> None:
    """Neither around in a circle nor out of the directory."""
    outside, directory = tmp_path / "outside", tmp_path / "theirs"
    made.dcp_save(outside / "step-9")
    made.torchtitan(directory)
    os.truncate(outside / "step-9" / "__0_0.distcp", 10)
    steps = directory / "checkpoint"
    (steps / "step-99").symlink_to(outside / "step-9")
    (steps / "loop").symlink_to("loop")
    (steps / "round").symlink_to(".")
    (directory / "checkpoints").symlink_to(".")
    (directory / "latest").symlink_to(outside / "step-9" / ".metadata")
    (steps / "step-10" / ".metadata").unlink()
    (steps / "step-10" / ".metadata").symlink_to(outside / "step-9" / ".metadata")
    code, document = check(directory)

    assert (code, document["path"]) == (4, str(steps / "step-5"))
    assert ids(document) == {"F016"}
    assert str(outside) not in json.dumps(document)


def test_a_directory_that_the_index_leads_through_may_be_no_link(tmp_path: Path) -> None:
    made.dcp_save(tmp_path / "step-1")
    made.dcp_save(tmp_path / "elsewhere")
    (tmp_path / "step-1" / "sub").symlink_to(tmp_path / "elsewhere")
    path = tmp_path / "step-1" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = f"sub/{place.relative_path}"
    path.write_bytes(pickle.dumps(metadata))
    report = foreign.judge(tmp_path / "step-1")

    assert report is not None
    assert {found.id for found in report.layouts[0].candidates[0].findings} == {"F013", "F016"}


@pytest.mark.parametrize("name", ["latest", "latest_checkpointed_iteration.txt", ".xtuner", "config.json", "5"])
def test_a_pipe_where_a_name_is_known_does_not_hang(name: str, tmp_path: Path) -> None:
    made.deepspeed(tmp_path)
    made.orbax(tmp_path)
    if (tmp_path / name).is_dir():
        (tmp_path / name).rename(tmp_path / "aside")
    else:
        (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)

    assert check(tmp_path)[0] in (0, 4)


def test_names_of_any_bytes(tmp_path: Path) -> None:
    names = [b"\xff\xfe", b"\x1b[2J", b"a\nb", "\u202e".encode(), b"-rf", b"x" * 250, "５".encode(), b"step-\xd9\xa3"]
    made.torchtitan(tmp_path)
    made.deepspeed(tmp_path / "checkpoint")
    for name in names:
        for place in (tmp_path, tmp_path / "checkpoint", tmp_path / "checkpoint" / "step-10"):
            torch_save(place / "x.pt")
            (place / "x.pt").rename(place / os.fsdecode(name))
        (tmp_path / os.fsdecode(name + b".d")).mkdir()

    assert check(tmp_path)[0] == 0


def test_numbers_that_no_step_has(tmp_path: Path) -> None:
    for name in ("step-" + "9" * 200, "step-0", "step-007", "step--1", "step-1e3"):
        made.dcp_save(tmp_path / name)
    _, document = check(tmp_path)
    (layout,) = document["layouts"]  # type: ignore[misc]

    assert sorted((each["step"] or 0, Path(each["path"]).name[:10]) for each in layout["checkpoints"]) == [
        (0, "step-0"), (0, "step-99999"), (1, "step--1"), (3, "step-1e3"), (7, "step-007"),
    ]  # fmt: skip


@given(st.integers(0, 2), st.integers(14, 200), st.integers(0, 255), st.integers(0, 9))
def test_descriptions_of_orbax_of_any_bytes(which: int, at: int, byte: int, more: int) -> None:
    """With their checksums made anew, or none would get past those."""
    with tempfile.TemporaryDirectory() as temporary:
        made.orbax(directory := Path(temporary))
        for path in (directory / "10" / "default").glob(
            ("manifest.ocdbt", "d/*", "ocdbt.process_1/manifest.ocdbt")[which]
        ):
            data = path.read_bytes()
            begin = data.index(b"\x0c\xdb")
            size = int.from_bytes(data[begin + 4 : begin + 12], "little")
            body = bytearray(data[begin + 14 : begin + size - 4])
            body[(at - 14) % len(body)] = byte
            body += bytes([byte] * more)
            magic = int.from_bytes(data[begin : begin + 4], "big")
            path.write_bytes(data[:begin] + made.ocdbt_description(magic, bytes(body)) + data[begin + size :])
        report = foreign.judge(directory)
        assert report is not None
        assert report.layouts[0].candidates[1].complete


@pytest.mark.slow
def test_a_hundred_thousand_names_are_listed(tmp_path: Path) -> None:
    made.torchtitan(tmp_path)
    crowded = tmp_path / "checkpoint" / "step-10"
    here = os.open(crowded, os.O_RDONLY)
    try:
        for number in range(100_000):
            descriptor = os.open(f"__{number + 1}_0.distcp", os.O_CREAT | os.O_WRONLY, dir_fd=here)
            os.write(descriptor, b"x")
            os.close(descriptor)
    finally:
        os.close(here)
    code, document = check(tmp_path)

    assert (code, ids(document)) == (0, {"F013"})
    assert len(json.dumps(document)) < 20_000


def test_ten_thousand_checkpoints_are_judged(tmp_path: Path) -> None:
    torch_save(tmp_path / "step=0.ckpt", torch.ones(1))
    for number in range(1, 10_000):
        os.link(tmp_path / "step=0.ckpt", tmp_path / f"step={number}.ckpt")
    code, document = check(tmp_path)

    assert (code, document["step"]) == (0, 9999)


@pytest.mark.parametrize("limit", ["MAX_ENTRIES", "MAX_NAMES"])
def test_more_names_than_that_are_refused(limit: str, theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = theirs("deepspeed")
    monkeypatch.setattr(ground, limit, 3)

    with pytest.raises(UnsafePath, match="more than 3 names"):
        foreign.judge(directory)


def test_a_crowded_directory_beside_the_checkpoints_is_skipped(theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = theirs("deepspeed")
    for number in range(30):
        text(directory / "logs" / str(number), "x")
    monkeypatch.setattr(ground, "MAX_ENTRIES", 20)
    report = foreign.judge(directory)

    assert report is not None
    assert report.layouts[0].candidates[0].complete


def test_what_may_not_be_read_is_not_complete(theirs: Theirs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is made."""
    directory = theirs("deepspeed")
    real = ground.Folder.opened

    def refuse(self: ground.Folder, name: str):  # type: ignore[no-untyped-def]
        if self.path == "global_step10":
            raise PermissionError(13, "Permission denied", name)
        return real(self, name)

    monkeypatch.setattr(ground.Folder, "opened", refuse)
    report = foreign.judge(directory)

    assert report is not None
    assert report.chosen is not None
    assert report.chosen.step == 5
    assert "Permission denied" in report.layouts[0].candidates[0].findings[0].text
