"""The harnesses of `make fuzz`, driven by Hypothesis: real inputs spoiled, and made ones that know the format."""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import guard
import hostile_bytes as b
import pytest
import torch
from hostile_kit import MOST_S
from hostile_parsers import COLUMNS, HARNESSES, TABLES, Edit, Ground, judge
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from ckptmgr.manifest import MANIFEST_NAME
from ckptmgr.writers import archives

#: How many inputs each parser gets of each kind: those that read a whole run take longer.
FEW = {
    "journal": 25, "rollback": 30, "rows": 20, "upgrade": 25, "meta": 25, "link": 25, "names": 20, "index": 150,
    "their-json": 60,
}  # fmt: skip
MANY = 150


@pytest.fixture(scope="module")
def grounds(pristine: Path) -> Iterator[Callable[[str], Ground]]:
    """A ground for each harness, made when it is first asked for."""
    made: dict[str, Ground] = {}

    def of(name: str) -> Ground:
        if name not in made:
            made[name] = Ground(pristine, guard.scratch())
        return made[name]

    yield of
    for ground in made.values():
        shutil.rmtree(ground.folder)


def given_many(name: str) -> settings:
    return settings(
        max_examples=FEW.get(name, MANY), deadline=None, derandomize=True, database=None,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@contextlib.contextmanager
def shown(name: str, data: bytes) -> Iterator[None]:
    """Say which input it was, so that it can be kept. What hangs in C nobody can interrupt: it ends the process."""
    faulthandler.dump_traceback_later(3 * MOST_S, exit=True)
    try:
        yield
    except BaseException as error:
        kept = Path(os.environ.get("TMPDIR", "/tmp")) / f"hostile-{name}"
        kept.write_bytes(data)
        error.add_note(f"the input is in {kept}; `make fuzz FUZZ='--again {name} {kept}'` tries it again")
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


# -- any bytes ---------------------------------------------------------------------------------------------


@st.composite
def spoiled(draw: st.DrawFn, seeds: list[bytes], words: list[bytes]) -> bytes:
    """A real input after a few changes."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 5))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 1, 4, 8, 30, 1000]))
        put = draw(st.one_of(st.binary(max_size=9), st.sampled_from(words or [b"\0"]), st.just(bytes(data[at:])[:200])))
        if draw(st.integers(0, 19)) == 0:
            length = len(data) - at
        data[at : at + length] = put * draw(st.sampled_from([1, 1, 1, 1, 50]))
    return bytes(data)


@pytest.mark.parametrize("name", HARNESSES)
def test_spoiled_inputs_are_refused_or_harmless(name: str, grounds: Callable[[str], Ground]) -> None:
    ground, harness = grounds(name), HARNESSES[name]

    @given_many(name)
    @given(spoiled(harness.seeds_of(ground), list(harness.words)))
    def attempt(data: bytes) -> None:
        with shown(name, data):
            judge(harness, ground, data[: 2 * harness.most_bytes])

    attempt()


# -- inputs that know the format -----------------------------------------------------------------------------

NAMES = st.sampled_from([
    *("../precious/secret", "/etc/passwd", "..", ".", "", "a/../../x", "a//b", "a\\b", "x" * 300, "x/" * 3000 + "x"),
    *("\0", "a\0b", "\x1b[2J", "\u202e", "\ud800", "'; DROP TABLE run; --", '"', "%s%n", "ckptmgr.json", ".metadata"),
    *("__0_0.distcp", "step-1", "checkpoint", "aux", "\n", "٣", "x" * 100_000),
])  # fmt: skip
NUMBERS = st.one_of(
    st.sampled_from([-1, 0, 1, 2, 3, 255, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**18, 10**400, -(1 << 70)]),
    st.sampled_from([float("nan"), float("inf"), -0.5, 0.0, 1e308, 1.5]),
    st.integers(-5, 5),
)
HIGH = st.sampled_from([100, 1 << 13, 1 << 20, 1 << 40])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(NAMES, NUMBERS, st.none(), st.booleans()),
    lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(NAMES, below, max_size=3)),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from places(below, (*path, key))


@st.composite
def documents(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A JSON document with something else in some places, and some fields twice."""
    body = json.loads(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        ways = [way for way in places(body) if way] if isinstance(body, dict | list) else []
        if not ways or draw(st.integers(0, 30)) == 0:
            body = draw(VALUES)
            continue
        way = draw(st.sampled_from(ways))
        holder = body
        for key in way[:-1]:
            holder = holder[key]
        what = draw(st.sampled_from(["other", "other", "other", "gone", "deep", "twice"]))
        if what == "gone":
            del holder[way[-1]]
        elif what == "twice" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[way[-1]]))
        else:
            holder[way[-1]] = draw(VALUES) if what != "deep" else nested(draw(st.sampled_from([100, 900])))
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    if draw(st.integers(0, 9)) == 0 and text.startswith("{"):
        text = "{" + draw(st.sampled_from(['"files": []', '"step": 1', '"": 0'])) + ", " + text[1:]
    return text.encode(errors="surrogatepass")


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", ["manifest", "mappings", "meta", "lock"])
def test_documents_with_strange_values_are_refused_or_harmless(name: str, grounds: Callable[[str], Ground]) -> None:
    ground, harness = grounds(name), HARNESSES[name]
    seeds = [seed for seed in harness.seeds_of(ground) if b"1e999" not in seed]

    @given_many(name)
    @given(documents(seeds))
    def attempt(data: bytes) -> None:
        with shown(name, data):
            judge(harness, ground, data)

    attempt()


_SMALL = st.integers(-2, 20).map(b.number) | st.sampled_from([1 << 31, 1 << 40, 1 << 62, -1 << 40]).map(b.number)
_SIZES = st.lists(st.sampled_from([0, 1, 2, 4, 8, -1, 1 << 40]), max_size=3).map(tuple)
_KINDS = st.sampled_from(["Float", "Double", "Byte", "Bool", "Untyped", "BFloat16", "Quantized"]).map(
    "{}Storage".format
)
_THERE = st.sampled_from([b.storage(), b.storage("ByteStorage", "1", 64), b.storage("BoolStorage", "2", 0)])
_STORAGES = _THERE | st.builds(
    b.storage, _KINDS, st.sampled_from("0123"), st.sampled_from([0, 1, 4, 8, 16, 64, -4, 1 << 61])
)
_DTYPES = st.sampled_from(["f8", "i4", "O8", "V8", "S3", "U2", "M8", "m8", "b1", "S900000000", "|f8", "a" * 99])
_TYPED = st.builds(b.plain_dtype, _DTYPES, st.sampled_from("<>=|")) | st.builds(
    b.dtype, _DTYPES, *[_SMALL | st.just(b.NONE) | st.just(b.text("<")) for _ in range(3)]
)
_GLOBALS = st.sampled_from([
    *(b.name(*name.split(" ")) for name in archives._Values.names),
    *(b.name("posix", "system"), b.name("builtins", "eval"), b.name("os", "path.join"), b.name("torch", "load")),
    *(b.name("subprocess", "Popen"), b.name("codecs", "open"), b.name("torch.nn.modules.linear", "Linear")),
])  # fmt: skip
PARTS: st.SearchStrategy[bytes] = st.recursive(
    st.one_of(
        _SMALL, _GLOBALS, _STORAGES, _TYPED, st.sampled_from([b.NONE, b.TRUE, b.EMPTY_DICT, b.EMPTY_LIST, b.bomb(31)]),
        st.sampled_from(["latin1", "x", "touch /tmp/owned", "M8", "é"]).map(b.text), st.binary(max_size=16).map(b.raw),
        st.builds(b.tensor, _STORAGES, st.integers(-1, 5), _SIZES, _SIZES),
        st.builds(b.array, _TYPED, _SIZES, st.sampled_from([b"", bytes(8), bytes(32)])),
    ),
    lambda below: st.one_of(
        st.lists(below, max_size=5).map(lambda items: b.tuple_of(*items)),
        st.lists(below, max_size=5).map(lambda items: b.list_of(*items)),
        st.builds(
            lambda function, items: b.call(function, *items),
            _GLOBALS | below | st.just(b.bomb(31)), st.lists(below, max_size=7),
        ),
        st.builds(lambda made, state: made + state + b.BUILD, below, below),
        st.builds(lambda key, value: b.EMPTY_DICT + key + value + b"s", below, below),
        st.builds(lambda made: made + b.EMPTY_TUPLE + b"\x81", below),
    ),
    max_leaves=12,
)  # fmt: skip


def test_pickles_of_any_make_are_refused_or_harmless(grounds: Callable[[str], Ground]) -> None:
    ground = grounds("pickle")

    @settings(given_many("pickle"), max_examples=700)
    @given(PARTS)
    def attempt(data: bytes) -> None:
        with shown("pickle", data):
            judge(HARNESSES["pickle"], ground, data)

    attempt()
    assert not Path("/tmp/owned").exists()


@st.composite
def tensors(draw: st.DrawFn) -> bytes:
    """A tensor of a storage that is there, with an offset, a shape and strides that may lead out of it."""
    numbers = st.integers(0, 9) | st.sampled_from([64, 1 << 20, 1 << 62])
    shape = draw(st.lists(st.tuples(numbers, numbers), max_size=3))
    sizes, strides = tuple(size for size, _ in shape), tuple(stride for _, stride in shape)
    return b.tensor(draw(_THERE), draw(numbers), sizes, strides)


def test_tensors_of_any_shape_are_refused_or_show_their_own_storage_only(grounds: Callable[[str], Ground]) -> None:
    ground = grounds("pickle")

    @given_many("pickle")
    @given(tensors())
    def attempt(data: bytes) -> None:
        with shown("pickle", data):
            judge(HARNESSES["pickle"], ground, data)

    attempt()


def _strange_state(draw: st.DrawFn) -> Any:
    """What might stand for a generator's state: the right one, but for some of it."""
    from ckptmgr import RandomState

    state = RandomState().state_dict()
    python, (name, key, position, *rest) = state["python"], state["numpy"]
    number = draw(st.integers(-2, 700) | st.sampled_from([-1, 625, (1 << 31) - 1, 1 << 31, 1 << 62, -(1 << 40)]))
    mapping = {
        "bit_generator": draw(st.sampled_from([name, "Philox", "PCG64", "SFC64", "x"])),
        "state": {"key": key, "pos": number, "counter": key[:4], "state": 1, "inc": 1},
        "buffer": key[:4], "buffer_pos": number, "has_uint32": number, "uinteger": number, "has_gauss": 0, "gauss": 0.0,
    }  # fmt: skip
    state["numpy"] = draw(st.sampled_from([
        (name, key, number, *rest), (name, key[:number], position, *rest), mapping, {**mapping, "bit_generator": name},
        (name, key, position, number, 0.0), list(mapping), state["numpy"],
    ]))  # fmt: skip
    ours = [*python[1][:-1], number]
    if draw(st.integers(0, 3)) == 0:
        state["python"] = draw(st.sampled_from([(3, tuple(ours), None), (2, tuple(ours), 0.5), (3, ours[:5], None)]))
    bytes_ = state["torch"].clone()
    bytes_[draw(st.integers(0, len(bytes_) - 1))] = number % 256
    state["torch"] = draw(st.sampled_from([bytes_, bytes_[: abs(number)], bytes_.float(), state["torch"]]))
    return state


def test_states_of_generators_that_lead_elsewhere_are_refused_or_harmless(grounds: Callable[[str], Ground]) -> None:
    """Numbers drawn after it come from the generator's own memory, or nothing is drawn."""
    import io

    ground = grounds("per-rank")

    @given_many("per-rank")
    @given(st.composite(_strange_state)())
    def attempt(state: Any) -> None:
        out = io.BytesIO()
        torch.save({"loader": None, "random": state}, out)
        with shown("per-rank", out.getvalue()):
            judge(HARNESSES["per-rank"], ground, out.getvalue())

    attempt()


@st.composite
def indexes(draw: st.DrawFn, seed: bytes) -> bytes:
    """A real index, with strange numbers and names in some places."""
    metadata = pickle.loads(seed)
    sizes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 12, 1 << 40, (1 << 63) - 1]), max_size=4).map(torch.Size)
    fqns = list(metadata.state_dict_metadata)
    for _ in range(draw(st.integers(1, 3))):
        fqn = draw(st.sampled_from(fqns))
        about, path = metadata.state_dict_metadata.get(fqn), metadata.planner_data.get(fqn, (fqn,))
        place = draw(st.sampled_from(list(metadata.storage_data.values())))
        match draw(st.integers(0, 9)):
            case 0:
                place.relative_path = draw(NAMES | NUMBERS)
            case 1 | 2:
                setattr(place, draw(st.sampled_from(["offset", "length"])), draw(NUMBERS | HIGH))
            case 3 if hasattr(about, "chunks"):
                about.chunks[:] = draw(st.lists(st.builds(ChunkStorageMetadata, sizes, sizes), max_size=3))
            case 4 if hasattr(about, "chunks"):
                about.size = draw(sizes)
                about.chunks[:] = [ChunkStorageMetadata(torch.Size([0] * len(about.size)), about.size)]
            case 5 if hasattr(about, "chunks"):
                about.properties.dtype = draw(st.sampled_from([torch.float64, torch.bool, torch.int32, None]))
            case 6:
                metadata.planner_data[fqn] = (*path[: draw(st.integers(0, 3))], draw(NAMES | NUMBERS | st.none()))
            case 7:
                metadata.state_dict_metadata[draw(NAMES)] = draw(st.just(about) | VALUES)
            case 8:
                metadata.storage_data[MetadataIndex(draw(NAMES | st.just(fqn)), draw(sizes))] = draw(
                    st.just(place) | VALUES
                )
            case _:
                name = draw(st.sampled_from(["state_dict_metadata", "planner_data", "storage_data", "storage_meta"]))
                setattr(metadata, name, draw(VALUES))
                break
    return pickle.dumps(metadata)


def test_indexes_with_strange_values_are_refused_or_harmless(grounds: Callable[[str], Ground]) -> None:
    ground, harness = grounds("index"), HARNESSES["index"]

    @given_many("index")
    @given(indexes(harness.seeds_of(ground)[1]))
    def attempt(data: bytes) -> None:
        with shown("index", data):
            judge(harness, ground, data)

    attempt()


@st.composite
def edits(draw: st.DrawFn) -> bytes:
    """A few values for a few rows of a journal."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        table = draw(st.sampled_from([*TABLES[:8], "checkpoint", "checkpoint", "file"]))
        column = draw(st.sampled_from(COLUMNS[table]))
        value = draw(st.one_of(
            NAMES.filter(lambda text: len(text) < 255), NUMBERS, st.none(), st.binary(max_size=9),
            st.sampled_from(["COMMITTED", "GATHERED", "WRITING", "FAILED", "hf", "dcp", "[]", "{}"]),
            st.sampled_from(["[[[", '{"a": 1e999}']),
            st.sampled_from(["checkpoint/step-1", "checkpoint/.step-2.e1.a2.incomplete", "hf/.hf-1.e1.a9.incomplete"]),
        ))  # fmt: skip
        if type(value) is int:
            value = max(-(1 << 63), min(value, (1 << 63) - 1))
        made.append(Edit.of(f"{table}.{column}", value, draw(st.integers(0, 9))).to_bytes())
    return b"".join(made)


@pytest.mark.parametrize("name", ["rows", "upgrade"])
def test_journals_with_strange_rows_are_refused_or_harmless(name: str, grounds: Callable[[str], Ground]) -> None:
    ground = grounds(name)

    @given_many(name)
    @given(edits())
    def attempt(data: bytes) -> None:
        with shown(name, data):
            judge(HARNESSES[name], ground, data)

    attempt()


# -- that the judgement can fail ------------------------------------------------------------------------------


def test_every_parser_takes_what_is_real(grounds: Callable[[str], Ground]) -> None:
    """Or a harness that refuses everything would pass for one that finds nothing."""
    refused = []
    for name, harness in HARNESSES.items():
        ground = grounds(name)
        real = harness.seeds_of(ground)[0]
        try:
            harness.parse(ground, real)
        except Exception as error:
            refused.append((name, type(error).__name__))

    # Another run's journal, and a lock that is held: the harnesses are for these refusals.
    assert refused == [("run-id", "ForeignJournal"), ("lock", "RunLocked")]
    assert (grounds("manifest").step / MANIFEST_NAME).exists()
