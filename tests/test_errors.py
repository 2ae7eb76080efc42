"""The error tree is an API: its shape, its facts, and that it survives the way between ranks."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from ckptmgr import errors
from ckptmgr.errors import CheckpointError, RankFailure

TREE = errors.__doc__


def every(kind: type[CheckpointError] = CheckpointError) -> list[type[CheckpointError]]:
    return [
        kind,
        *(below for child in kind.__subclasses__() if child.__module__ == errors.__name__ for below in every(child)),
    ]


EVERY = every()

#: A plausible value for each fact, by its annotation.
SAMPLES = {
    "str": "text",
    "str | None": None,
    "int": 7,
    "int | None": 7,
    "float": 1.5,
    "tuple[RankFailure, ...]": (RankFailure(3, "node-1", "disk full"), RankFailure(4, "", "no answer", silent=True)),
    "tuple[str, ...]": ("size: a", "digest: b"),
    "tuple[Any, ...]": (1, "two"),
    "ResumeReport": {"stands": "for a report"},
}


def facts_of(kind: type[CheckpointError]) -> dict[str, object]:
    names = {name: text for name, text in inspect.get_annotations(kind).items() if name != "hint"}
    return {name: SAMPLES[text] for name, text in names.items()}


def lines_of_the_tree() -> dict[str, tuple[int, set[str], str | None]]:
    """name → (depth, facts, second base), as the module docstring draws it."""
    drawn = {}
    for line in TREE.splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)\s*((?:\.\w+ ?)*)\s*(?:\(([A-Z]\w+)\))?", line)
        if match:
            depth = len(match[1]) // 4
            drawn[match[2]] = (depth, set(re.findall(r"\.(\w+)", match[3])), match[4])
    return drawn


def test_every_error_is_in_the_tree_and_the_tree_has_no_others():
    assert {kind.__name__ for kind in EVERY} == set(lines_of_the_tree())


@pytest.mark.parametrize("kind", EVERY[1:], ids=lambda kind: kind.__name__)
def test_the_tree_shows_each_error_where_it_is_with_its_facts_and_bases(kind):
    depth, facts, second = lines_of_the_tree()[kind.__name__]

    assert depth == len([base for base in kind.__mro__ if base.__module__ == errors.__name__]) - 1
    assert facts == set(facts_of(kind))
    builtin = [base.__name__ for base in kind.__bases__ if not issubclass(base, CheckpointError)]
    assert builtin == ([second] if second else [])


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_error_says_in_one_sentence_what_happened(kind):
    first = (kind.__dict__.get("__doc__") or "").strip().splitlines()

    assert first
    assert first[0].endswith(".")
    assert kind(**facts_of(kind)).message == first[0]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("hint", [None, "do this", ""])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_survives_pickling_with_its_facts_and_hint(kind, hint, protocol):
    facts = facts_of(kind)
    error = kind("what happened", hint=hint, **facts)
    copy = pickle.loads(pickle.dumps(error, protocol))

    assert type(copy) is kind
    assert copy.message == "what happened"
    assert copy.hint == error.hint == (kind.hint if hint is None else hint)
    assert str(copy) == str(error)
    assert copy.facts == facts
    for name, value in facts.items():
        assert getattr(copy, name) == value


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_error_is_caught_as_a_checkpoint_error(kind):
    with pytest.raises(CheckpointError):
        raise kind("x", **facts_of(kind))


def test_the_hint_is_part_of_what_is_printed():
    assert str(CheckpointError("no", hint="try this")) == "no (hint: try this)"
    assert str(CheckpointError("no")) == "no"


def test_a_hint_given_to_one_error_is_not_everyones():
    errors.RunLocked("x", hint="just this once")

    assert errors.RunLocked("x").hint == errors.RunLocked.hint != "just this once"


def test_an_error_keeps_its_cause():
    cause = OSError("disk")
    with pytest.raises(CheckpointError) as caught:
        raise errors.JournalError("no") from cause

    assert caught.value.__cause__ is cause


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (RankFailure(3, "node-1", "disk full"), "rank 3 on node-1: disk full"),
        (RankFailure(3, "", "no answer", silent=True), "rank 3 on unknown host: no answer"),
    ],
)
def test_a_rank_failure_names_rank_host_and_cause(failure, text):
    assert str(failure) == text
    assert pickle.loads(pickle.dumps(failure)) == failure


def test_errors_are_also_what_their_callers_may_expect():
    for kind, builtin in [
        (errors.InvalidArgument, ValueError),
        (errors.JournalNotFound, FileNotFoundError),
        (errors.RunLocked, TimeoutError),
        (errors.LockUnsupported, OSError),
        (errors.StepAlreadySaved, FileExistsError),
        (errors.WaitTimeout, TimeoutError),
        (errors.CheckpointNotFound, FileNotFoundError),
        (errors.UnsafePath, ValueError),
    ]:
        assert issubclass(kind, builtin)
