"""What a trainer may hand over: values that come back exactly, and values that are refused while they still exist."""

from __future__ import annotations

import collections
import datetime
import pickle
import random
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_rank import dtypes, random_bits, same_bits

from ckptmgr.errors import CorruptCheckpoint, InvalidArgument
from ckptmgr.writers import state as states
from ckptmgr.writers.state import PerRank, RandomState

PLAIN = [
    None, True, False, 0, -1, 1 << 31, 1 << 63, -(1 << 63), 1 << 1999, 1 << 2000, -(1 << 2030), 0.0, -0.0, 1e308,
    float("inf"), "", "text", "\u00e9\u4e2d", "x" * 100_000, "\ud800", b"", b"bytes", b"\x00" * 300, bytes(range(256)),
    1 + 2j, (), [], {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [[], [[]]], {1: "a", "b": (2, [3])},
    collections.OrderedDict(a=1), torch.Size([2, 3]), torch.float32, torch.bfloat16,
    {"empty": b"", "nested": [b"", (b"",)]},
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:30].encode("ascii", "replace").decode())
def test_plain_values_come_back_with_their_types(value):
    back = states.load(states.dump(value, "v"), "v")

    assert repr(back) == repr(value)
    assert type(back) is type(value)


def test_a_nan_comes_back():
    assert repr(states.load(states.dump([float("nan")], "v"), "v")) == "[nan]"


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(json_like)
def test_whatever_is_stored_can_be_read_back(value):
    """No checkpoint may be committed that cannot be loaded: it comes back the same, or it was refused."""
    try:
        data = states.dump(value, "v")
    except InvalidArgument:
        return

    assert repr(states.load(data, "v")) == repr(value)


@pytest.mark.parametrize("bits", [1990, 1999, 2000, 2001, 2030, 2039, 2040, 2041, 3000, 50_000])
def test_whole_numbers_of_any_length_come_back_or_are_refused(bits):
    for value in (1 << bits, -(1 << bits), (1 << bits) - 1):
        try:
            data = states.dump({"n": value}, "v")
        except InvalidArgument:
            assert bits > 2030
        else:
            assert states.load(data, "v") == {"n": value}


@pytest.mark.parametrize("dtype", list(dtypes()), ids=str)
def test_tensors_among_values_keep_every_bit(dtype):
    for shape in [(), (3,), (2, 0), (2, 3)]:
        tensor = random_bits(dtype, shape)
        try:
            data = states.dump({"t": tensor}, "v")
        except InvalidArgument:
            assert dtype.itemsize == 1 or "bits" in str(dtype), "a common dtype was refused"
            continue
        assert same_bits(states.load(data, "v")["t"], tensor)


def arrays() -> list[numpy.ndarray]:
    of_length = {"S": "S8", "U": "U8", "V": "V8", "M": "M8[s]", "m": "m8[s]"}
    kinds = [numpy.dtype(of_length.get(code, code)) for code in numpy.typecodes["All"] if code != "O"]
    return [
        numpy.frombuffer(bytes(i % 2 for i in range(6 * kind.itemsize)), dtype=kind).reshape(2, 3)
        for kind in kinds
        if kind.kind not in "fcSU"
    ] + [numpy.arange(6).astype(kind).reshape(2, 3) for kind in kinds if kind.kind in "fcSU"]


@pytest.mark.parametrize("array", arrays(), ids=lambda array: array.dtype.str)
def test_numpy_arrays_come_back(array):
    back = states.load(states.dump({"a": array, "scalar": array[1, 2]}, "v"), "v")

    assert back["a"].dtype == array.dtype
    assert back["a"].shape == array.shape
    assert back["a"].tobytes() == array.tobytes()
    assert back["scalar"].tobytes() == array[1, 2].tobytes()


class Custom:
    pass


class Code:
    """Pickles as a call of code."""

    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Code, "ran", True))


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    "value",
    [
        Custom(),
        {"deep": [Custom()]},
        Code(),
        lambda: None,
        datetime.datetime(2026, 1, 1),
        numpy.array([Custom()], dtype=object),
        1 << 50_000,
        LOOP,
        random.Random(),
        open,
        {Custom: 1},
    ],
    ids=[
        "object",
        "deep",
        "code",
        "lambda",
        "datetime",
        "object array",
        "huge int",
        "loop",
        "Random",
        "builtin",
        "class",
    ],
)
def test_what_cannot_be_stored_safely_is_refused_when_it_is_saved(value):
    with pytest.raises(InvalidArgument, match="what cannot be stored safely"):
        states.dump(value, "what")
    assert not Code.ran


def test_a_file_with_code_in_it_is_not_run():
    class Pickled:
        def __reduce__(self) -> Any:
            return (setattr, (Code, "ran", True))

    import io

    buffer = io.BytesIO()
    torch.save({"a": Code()}, buffer)
    for data in (buffer.getvalue(), pickle.dumps(Code()), b"", b"nonsense"):
        with pytest.raises(CorruptCheckpoint, match="here cannot be read"):
            states.load(data, "here")
    assert not Code.ran


def test_the_state_of_every_generator_comes_back_exactly():
    stored = RandomState()
    random.seed(1), numpy.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), numpy.random.standard_normal()  # both keep half of a pair for the next call
    data = states.dump(PerRank(stored).take(), "rng")
    expected = [
        random.random(),
        random.gauss(0, 1),
        *numpy.random.rand(2),
        numpy.random.standard_normal(),
        *torch.rand(3),
    ]
    random.seed(9), numpy.random.seed(9), torch.manual_seed(9)
    PerRank(stored).give_back(states.load(data, "rng"))

    assert [
        random.random(),
        random.gauss(0, 1),
        *numpy.random.rand(2),
        numpy.random.standard_normal(),
        *torch.rand(3),
    ] == expected


def test_a_plain_per_rank_value_is_given_back_in_place():
    holder = PerRank({"position": 3})
    data = states.dump(holder.take(), "v")
    fresh = PerRank(None)
    fresh.give_back(states.load(data, "v"))

    assert fresh.value == {"position": 3}


def test_per_rank_state_of_an_object_is_taken_and_given_through_its_protocol():
    class Loader:
        def __init__(self) -> None:
            self.at = 0

        def state_dict(self) -> dict[str, Any]:
            return {"at": self.at}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.at = state["at"]

    loader = Loader()
    loader.at = 5
    taken = PerRank(loader).take()
    loader.at = 0
    PerRank(loader).give_back(taken)

    assert loader.at == 5


def test_what_to_do_with_another_world_size_is_one_of_two_words():
    with pytest.raises(InvalidArgument, match="when_resized"):
        PerRank(1, when_resized="maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize("state", [{}, [], None, {1: 2}, {"": 1}, {"a": 1, None: 2}])
def test_a_state_is_a_mapping_from_names(state):
    with pytest.raises(InvalidArgument, match="state"):
        states.split(state)


def test_shared_and_per_rank_state_are_told_apart():
    per_rank = PerRank(1)
    shared, own = states.split({"a": 1, "b": per_rank})

    assert shared == {"a": 1}
    assert own == {"b": per_rank}
