"""The manifest: what is written is read back, and nothing that is read is trusted."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.errors import CorruptCheckpoint
from ckptmgr.lifecycle import Format
from ckptmgr.manifest import FORMAT_VERSION, MAX_NUMBER, Digest, FileEntry, Manifest, is_plain_relative

DIGEST = "xxh3_128:" + "0123456789abcdef" * 2


def manifest(**changes) -> Manifest:
    known = {
        "run_id": "r1",
        "series": "checkpoint",
        "step": 500,
        "attempt": 17,
        "epoch": 3,
        "format": Format.DCP,
        "world_size": 8,
        "created_at": 1700000000.5,
        "files": (FileEntry("__0_0.distcp", 10, DIGEST, 0), FileEntry("sub/.metadata", 5, DIGEST, 1)),
        "per_rank": ("data", "rng"),
        "metrics": {"loss": 0.25, "steps": 3},
        "versions": {"torch": "2.13.0"},
    }
    return Manifest(**{**known, **changes})


BODY = json.loads(manifest().to_json())


def read(body) -> Manifest:
    return Manifest.from_json(json.dumps(body))


def changed(**changes) -> str:
    return json.dumps({**BODY, **changes})


def file_changed(**changes) -> str:
    return changed(files=[{**BODY["files"][0], **changes}])


# --- round trip ------------------------------------------------------------------------------


def test_a_manifest_is_read_back_as_it_was_written():
    assert manifest() == Manifest.from_json(manifest().to_json())
    assert manifest() == Manifest.from_json(manifest().to_json().encode())


def test_the_same_manifest_is_the_same_text_whatever_the_order_of_its_files():
    other = manifest(files=manifest().files[::-1], metrics={"steps": 3, "loss": 0.25})

    assert manifest().to_json() == other.to_json()


def test_the_text_says_what_the_format_documents():
    assert BODY["format_version"] == FORMAT_VERSION == 1
    assert BODY["files"][0] == {"path": "__0_0.distcp", "size": 10, "digest": DIGEST, "rank": 0}
    assert sorted(BODY) == sorted(
        ["format_version", *(field.name for field in dataclasses.fields(Manifest))],
    )
    assert manifest().to_json().endswith("}\n")


def test_bytes_is_the_sum_of_all_files():
    assert manifest().bytes == 15
    assert manifest(files=()).bytes == 0


def test_unknown_fields_are_ignored_so_that_a_later_version_may_add_some():
    assert manifest() == Manifest.from_json(changed(later="x"))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_not_written(number):
    with pytest.raises(ValueError, match="JSON"):
        manifest(metrics={"loss": number}).to_json()


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NAMES = st.from_regex(r"[a-zA-Z0-9._-]{1,12}", fullmatch=True).filter(lambda name: name not in (".", ".."))
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
COUNTS = st.integers(0, MAX_NUMBER)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
MANIFESTS = st.builds(
    Manifest,
    run_id=TEXT,
    series=TEXT,
    step=COUNTS,
    attempt=COUNTS,
    epoch=COUNTS,
    format=st.sampled_from(Format),
    world_size=COUNTS,
    created_at=FINITE,
    files=st.lists(
        st.builds(FileEntry, PATHS, COUNTS, st.from_regex(r"xxh3_128:[0-9a-f]{32}", fullmatch=True), COUNTS),
        max_size=5,
        unique_by=lambda entry: entry.path,
    ).map(lambda files: tuple(sorted(files, key=lambda entry: entry.path))),
    per_rank=st.lists(TEXT, max_size=3).map(tuple),
    metrics=st.dictionaries(TEXT, FINITE | st.integers(-(1 << 60), 1 << 60), max_size=3),
    versions=st.dictionaries(TEXT, TEXT, max_size=3),
)


@given(MANIFESTS)
def test_any_manifest_is_read_back_as_it_was_written(one):
    assert one == Manifest.from_json(one.to_json())


# --- hostile input ---------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
KEYS = [(key,) for key in BODY] + [("files", 0, key) for key in BODY["files"][0]] + [("files", 0), ("metrics", "loss")]


def assert_usable(one: Manifest) -> None:
    """What from_json lets through may be written, opened and kept without another check."""
    assert one == Manifest.from_json(one.to_json())
    for entry in one.files:
        assert is_plain_relative(entry.path)
        os.fsencode(entry.path)
    for text in (one.run_id, one.series, *one.per_rank, *one.metrics, *one.versions, *one.versions.values()):
        text.encode()
    for number in one.metrics.values():
        float(number)


def test_files_are_read_in_the_order_of_their_paths():
    body = json.loads(json.dumps(BODY))
    body["files"][0]["path"] = "zzz"
    assert_usable(read(body))
    assert [entry.path for entry in read(body).files] == sorted(entry["path"] for entry in body["files"])


@settings(max_examples=400)
@given(st.sampled_from(KEYS), JSON)
def test_any_value_in_any_place_is_read_or_refused_and_never_crashes(where, value):
    body = json.loads(json.dumps(BODY))
    holder = body
    for key in where[:-1]:
        holder = holder[key]
    holder[where[-1]] = value
    try:
        one = read(body)
    except CorruptCheckpoint:
        return
    assert_usable(one)


@given(st.sampled_from(KEYS))
def test_any_missing_field_is_refused(where):
    body = json.loads(json.dumps(BODY))
    holder = body
    for key in where[:-1]:
        holder = holder[key]
    del holder[where[-1]]
    if where in (("files", 0), ("metrics", "loss")):
        assert_usable(read(body))
    else:
        with pytest.raises(CorruptCheckpoint):
            read(body)


@given(JSON | st.binary(max_size=50) | st.text(max_size=50))
def test_anything_else_is_refused(value):
    text = value if isinstance(value, bytes | str) else json.dumps(value)

    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(text)


@given(st.integers(0, len(manifest().to_json()) - 2))
def test_a_manifest_that_was_cut_short_is_refused(length):
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(manifest().to_json()[:length])


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "//etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a/..",
        ".",
        "./a",
        "a/.",
        "a/./b",
        "a//b",
        "a/",
        "",
        "a\\b",
        "..\\x",
        "C:\\x",
        "a\0b",
        "x" * 4097,
        "x" * 256,
        "ü" * 128,
        "/".join(["x" * 255] * 17),
        "\ud800",
        "a/\udcff",
        "a\nb",
        "\x1b[2J",
        "right\u202eleft",
    ],
)
def test_a_file_name_that_leaves_the_directory_or_is_none_is_refused(path):
    assert not is_plain_relative(path)
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(file_changed(path=path))


@pytest.mark.parametrize(
    "path",
    ["a", "a/b/c", ".metadata", "..a", "a..", "...", "a b", "ü", "x" * 255, "/".join(["x" * 255] * 16), "~", "a:b"],
)
def test_an_unusual_file_name_that_stays_inside_is_read(path):
    assert is_plain_relative(path)
    assert Manifest.from_json(file_changed(path=path)).files[0].path == path


@pytest.mark.parametrize("key", ["size", "rank"])
@pytest.mark.parametrize("value", [-1, 1 << 63, 10**400, True, False, 1.0, "1", None, [1]])
def test_a_file_size_or_rank_that_cannot_be_one_is_refused(key, value):
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(file_changed(**{key: value}))


@pytest.mark.parametrize("key", ["step", "attempt", "epoch", "world_size"])
@pytest.mark.parametrize("value", [-1, 1 << 63, 10**400, True, False, 1.0, "1", None])
def test_a_count_that_cannot_be_one_is_refused(key, value):
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(changed(**{key: value}))


def test_the_largest_count_is_read():
    assert Manifest.from_json(file_changed(size=(1 << 63) - 1)).files[0].size == (1 << 63) - 1


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "xxh3_128:",
        "xxh3_128:" + "0" * 31,
        "xxh3_128:" + "0" * 33,
        "xxh3_128:" + "A" * 32,
        "sha256:" + "0" * 32,
        " " + DIGEST,
        DIGEST + "\n",
        None,
        3,
    ],
)
def test_a_malformed_digest_is_refused(digest):
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(file_changed(digest=digest))


def test_a_file_that_is_listed_twice_is_refused():
    with pytest.raises(CorruptCheckpoint, match="listed twice"):
        Manifest.from_json(changed(files=[BODY["files"][0], BODY["files"][0]]))


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" + "0" * 400, "9" * 5000])
@pytest.mark.parametrize("place", ["created_at", "loss"])
def test_a_number_that_is_not_finite_or_too_large_is_refused(word, place):
    text = (
        manifest()
        .to_json()
        .replace('"created_at": 1700000000.5' if place == "created_at" else '"loss": 0.25', f'"{place}": {word}')
    )

    assert word in text
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(text)


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0, [1]])
def test_another_format_version_is_refused_and_named(version):
    with pytest.raises(CorruptCheckpoint, match="format_version"):
        Manifest.from_json(changed(format_version=version))


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": 3},
        {"series": None},
        {"format": "tar"},
        {"format": 1},
        {"files": {}},
        {"files": ["a"]},
        {"files": [None]},
        {"per_rank": "data"},
        {"per_rank": [1]},
        {"metrics": []},
        {"metrics": {"loss": "low"}},
        {"metrics": {"loss": True}},
        {"metrics": {"loss": None}},
        {"versions": {"torch": 2}},
        {"versions": None},
        {"created_at": True},
        {"created_at": "now"},
    ],
)
def test_a_field_of_the_wrong_type_is_refused(changes):
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(changed(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"run_id": "\ud800"},
        {"series": "\udfff"},
        {"per_rank": ["\ud800"]},
        {"metrics": {"\ud800": 1}},
        {"versions": {"torch": "\ud800"}},
        {"versions": {"\ud800": "2"}},
    ],
)
def test_text_that_no_file_and_no_database_can_hold_is_refused(changes):
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(changed(**changes))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_deep_nesting_is_refused_not_a_crash(text):
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(text)


@pytest.mark.parametrize("text", ["", " ", "null", "[]", "3", '"x"', b"\xff\xfe", b"\x00" * 40])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(CorruptCheckpoint):
        Manifest.from_json(text)


def test_a_refusal_says_where_and_why():
    with pytest.raises(CorruptCheckpoint) as caught:
        Manifest.from_json("[]", where="runs/alpha/step-5/ckptmgr.json")

    assert caught.value.directory == "runs/alpha/step-5/ckptmgr.json"
    assert caught.value.mismatches == ("not a JSON object",)
    assert "runs/alpha/step-5/ckptmgr.json: not a JSON object" in str(caught.value)


# --- digests ---------------------------------------------------------------------------------


def test_the_digest_is_xxh3_128_seed_0_in_canonical_order():
    # The value for empty input is in the specification's own test vectors.
    assert Digest().text == "xxh3_128:99aa06d3014798d86001c324468d497f"
    assert Digest(b"abc").text == "xxh3_128:" + xxhash.xxh3_128_hexdigest(b"abc", seed=0)


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_a_digest_does_not_depend_on_how_the_bytes_were_fed(pieces):
    fed = Digest()
    for piece in pieces:
        fed.update(memoryview(piece))

    assert fed.text == Digest(b"".join(pieces)).text
