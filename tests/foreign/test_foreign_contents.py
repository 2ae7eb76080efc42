"""Single files: what makes an archive, a safetensors header and a JSON file torn, and what does not."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts_on_disk import text

from ckptmgr import foreign
from ckptmgr.foreign import contents
from ckptmgr.foreign.ground import Asked, Folder
from ckptmgr.foreign.report import Faults


def judged(path: Path, *, deep: bool = False) -> list[tuple[str, str]]:
    """Id and reason of everything that is wrong with one file."""
    faults = Faults()
    contents.Look(Folder(path.parent), Asked(deep=deep), faults).any(path.name)
    return [(each.id, each.text.partition(path.name)[2].strip(" ()")) for each in faults.findings()]


# -- safetensors ------------------------------------------------------------------------------------------------


def tensor(begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [begin, end]}


def safetensors(path: Path, header: Any, data: int, *, length: int | None = None) -> Path:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body) if length is None else length) + body + bytes(data))
    return path


@pytest.mark.parametrize(
    ("header", "data", "found"),
    [
        ({"a": tensor(0, 4), "b": tensor(4, 8)}, 8, []),
        ({"b": tensor(4, 8), "__metadata__": {"format": "pt"}, "a": tensor(0, 4), "empty": tensor(8, 8)}, 8, []),
        ({}, 0, []),
        ({"a": tensor(0, 4)}, 3, ["F003"]),
        ({"a": tensor(0, 4)}, 5, ["F003"]),
        ({"a": tensor(0, 4), "b": tensor(8, 12)}, 12, ["F006"]),
        ({"a": tensor(0, 4), "b": tensor(0, 4)}, 4, ["F006"]),
        ({"a": tensor(0, 8), "b": tensor(8, 4)}, 8, ["F006"]),
        ({"a": tensor(0, 8), "b": tensor(8, 4), "c": tensor(0, 4)}, 8, ["F006"]),
        ({"a": tensor(-4, 4)}, 4, ["F006"]),
        ({"a": tensor(0, 4.0)}, 4, ["F006"]),
        ({"a": tensor(False, 4)}, 4, ["F006"]),
        ({"a": {"data_offsets": [4]}}, 4, ["F006"]),
        ({"a": {}}, 4, ["F006"]),
        ({"a": 4}, 4, ["F006"]),
        ([], 0, ["F006"]),
        (b'{"a": ', 0, ["F006"]),
        (b"\xff" * 8, 0, ["F006"]),
    ],
)
def test_a_header_of_safetensors_must_fit_the_file(header: Any, data: int, found: list[str], tmp_path: Path) -> None:
    path = safetensors(tmp_path / "model.safetensors", header, data)

    assert [id for id, _ in judged(path)] == found


def test_a_header_that_is_longer_than_the_file_says_by_how_much(tmp_path: Path) -> None:
    path = safetensors(tmp_path / "model.safetensors", {"a": tensor(0, 4)}, 4, length=1000)

    assert judged(path) == [("F003", f"{path.stat().st_size} bytes, of which the header alone should have 1008")]


def test_a_header_of_too_many_bytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = safetensors(tmp_path / "model.safetensors", {"a": tensor(0, 4)}, 3)
    monkeypatch.setattr(contents, "MAX_JSON_BYTES", 10)

    assert [id for id, _ in judged(path)] == ["F015"]


@pytest.mark.parametrize("size", [1, 7])
def test_a_few_bytes_are_no_safetensors(size: int, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * size)

    assert [id for id, _ in judged(tmp_path / "model.safetensors")] == ["F003"]


# -- archives ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({"a": torch.arange(100.0), "b": torch.ones(7)}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def spoil(path: Path, at: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)


def test_every_length_of_an_archive_but_the_whole_one_is_found(saved: Path) -> None:
    data = saved.read_bytes()
    for length in range(1, len(data)):
        saved.write_bytes(data[:length])
        assert judged(saved), length


def test_an_archive_whose_members_are_not_where_the_table_says(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        places = [member.header_offset for member in archive.infolist()]
    whole = saved.read_bytes()
    for place in places:
        saved.write_bytes(whole)
        spoil(saved, place, b"\0")
        assert [id for id, _ in judged(saved)] in (["F006"], ["F005"]), place


def test_an_archive_whose_rows_are_spoiled(saved: Path) -> None:
    whole = saved.read_bytes()
    first = whole.index(b"PK\x01\x02")
    for at, new in ((0, b"X"), (10, b"\x08"), (20, b"\xff"), (24, b"\xff\xff\xff\x7f"), (42, b"\xff\xff\xff\x00")):
        saved.write_bytes(whole)
        spoil(saved, first + at, new)
        assert [id for id, _ in judged(saved)] == ["F006"], at


def test_a_member_that_reaches_into_the_table_is_refused(saved: Path) -> None:
    """The last one, made longer than there is room for, both where it is stored and where it is said."""
    whole = saved.read_bytes()
    last = whole.rindex(b"PK\x01\x02")
    spoil(saved, last + 20, struct.pack("<II", 200, 200))

    assert judged(saved) == [("F006", "a member that is not where the table says")]


def test_an_archive_without_a_pickle_is_none_of_torch(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("readme.txt", "x")

    assert judged(tmp_path / "model.pt") == [("F006", "an archive without a pickle")]


def test_a_compressed_member_is_none_of_torch(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", "x" * 1000)

    assert [id for id, _ in judged(tmp_path / "model.pt")] == ["F006"]


def test_too_many_members_are_not_looked_at(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "MAX_MEMBERS", 3)

    assert [id for id, _ in judged(saved)] == ["F015"]


def test_a_table_longer_than_what_is_read_at_once_is_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({str(number): torch.ones(1) for number in range(4000)}, saved)
    monkeypatch.setattr(contents, "_TABLE_BYTES", 200_000)
    assert saved.read_bytes().count(b"PK\x01\x02") > 4000
    assert judged(saved, deep=True) == []

    whole = saved.read_bytes()
    spoil(saved, whole.rindex(b"PK\x01\x02") + 20, b"\xff")
    assert [id for id, _ in judged(saved)] == ["F006"]


def test_each_member_is_compared_with_its_checksum_and_only_if_asked(saved: Path) -> None:
    whole = saved.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = [(member.header_offset, member.file_size) for member in archive.infolist()]
    for place, size in members:
        name, extra = struct.unpack("<HH", whole[place + 26 : place + 30])
        saved.write_bytes(whole)
        spoil(saved, place + 30 + name + extra + size - 1, bytes([whole[place + 30 + name + extra + size - 1] ^ 1]))
        assert judged(saved) == []
        assert [id for id, _ in judged(saved, deep=True)] == ["F009"]


# -- JSON, and files of zeros ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ['{"a": [1, {"b": "text"}]}', '{"loss": NaN}', "[]", "3", '{"ä": "\\u00e4"}\n\n'])
def test_json_cut_anywhere_is_found(content: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    text(path, content)
    assert judged(path) == []

    whole = path.read_bytes()
    for length in range(1, len(whole.rstrip())):
        path.write_bytes(whole[:length])
        assert [id for id, _ in judged(path)] == ["F006"], whole[:length]


def test_json_of_too_many_bytes_is_judged_by_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    monkeypatch.setattr(contents, "MAX_JSON_BYTES", 50)
    text(path, {"a": "x" * 100})
    assert [id for id, _ in judged(path)] == ["F015"]

    path.write_bytes(path.read_bytes()[:-3])
    assert judged(path) == [("F006", "it ends in the middle")]


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "config.json", ".metadata"])
@pytest.mark.parametrize("size", [1, 100, 1 << 16, 5 << 20])
def test_zeros_of_any_number_are_found(name: str, size: int, tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "__0_0.distcp").write_bytes(b"x")
    (tmp_path / "step-1" / name).write_bytes(bytes(size))
    if name == ".metadata":
        report = foreign.judge(tmp_path)
        assert report is not None
        assert [each.id for each in report.layouts[0].candidates[0].findings] == ["F005"]
    elif name != "model.safetensors" or size >= 8:
        assert [id for id, _ in judged(tmp_path / "step-1" / name)] == ["F005"]


def test_a_large_file_that_only_begins_with_zeros_is_not_all_zeros(tmp_path: Path) -> None:
    path = tmp_path / "d"
    for place in (0, (64 << 20) - 1):
        path.write_bytes(b"")
        with path.open("r+b") as file:
            file.truncate(64 << 20)
            file.seek(place)
            file.write(b"x")
        faults = Faults()
        contents.Look(Folder(tmp_path), Asked(), faults).bytes("d")
        assert faults.findings() == ()


def test_there_is_not_the_memory_to_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(data: bytes) -> Any:
        raise MemoryError

    text(tmp_path / "state.json", {})
    monkeypatch.setattr(contents, "parse_json", fail)

    assert [id for id, _ in judged(tmp_path / "state.json")] == ["F015"]
