"""
``mappings.json``: what DCP's flattened names do not tell of the mappings in a state.

DCP turns integer keys into text and drops empty mappings, and both must come back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ckptmgr.errors import InvalidArgument
from ckptmgr.writers.index import MAX_PATH_PARTS

MAPPINGS_NAME = "mappings.json"
MAX_MAPPINGS_BYTES = 64 << 20

#: Where something stands in a state: names of mappings, places in lists.
KeyPath = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Mappings:
    """
    What DCP's flattened names do not tell about mappings: which keys are integers, and which mappings are empty.

    Kept in ``mappings.json`` when there is any; paths of names and list indexes.
    """

    integer_keys: frozenset[KeyPath] = frozenset()
    empty: frozenset[KeyPath] = frozenset()

    @classmethod
    def of(cls, state_dicts: Mapping[str, Any]) -> Mappings:
        """
        Look through plain state, whose objects may be filled only as they are used.

        Raises:
            InvalidArgument: A mapping has keys that are neither text nor integers; they would come back as text.
        """
        integer_keys: set[KeyPath] = set()
        empty: set[KeyPath] = set()

        def look(value: Any, path: KeyPath) -> None:
            if isinstance(value, Mapping):
                if not value:
                    empty.add(path)
                for key, below in value.items():
                    if type(key) is int:
                        integer_keys.add((*path, str(key)))
                    elif not isinstance(key, str):
                        raise InvalidArgument(
                            f"state {'.'.join(map(str, path))!r} has the key {key!r}; keys must be text or integers",
                            hint="turn such keys into text in state_dict(), or put the object into PerRank",
                        )
                    look(below, (*path, str(key)))
                if len({str(key) for key in value}) != len(value):
                    raise InvalidArgument(f"state {'.'.join(map(str, path))!r} has keys that differ only in their type")
            elif isinstance(value, list):
                for index, below in enumerate(value):
                    look(below, (*path, index))

        for name, value in state_dicts.items():
            look(value, (name,))
        return cls(frozenset(integer_keys), frozenset(empty))

    def to_json(self) -> bytes:
        """The text of ``mappings.json``."""
        paths = {"integer_keys": sorted(self.integer_keys, key=str), "empty": sorted(self.empty, key=str)}
        return json.dumps(paths).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Mappings:
        """
        What ``mappings.json`` says.

        Raises:
            ValueError, TypeError, KeyError, RecursionError: It is something else.
        """
        body = json.loads(text)
        return cls(*(_paths(body[field]) for field in ("integer_keys", "empty")))


def _paths(entries: Any) -> frozenset[KeyPath]:
    """Paths as JSON has them: lists of texts and numbers that begin with a text."""
    if not isinstance(entries, list):
        raise TypeError("no list of paths")
    for path in entries:
        plain = isinstance(path, list) and 0 < len(path) <= MAX_PATH_PARTS and isinstance(path[0], str)
        if not plain or not all(isinstance(part, str) or (type(part) is int and part >= 0) for part in path):
            raise TypeError("a path is none")
    return frozenset(map(tuple, entries))
