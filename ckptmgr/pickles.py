"""
Pickles, read without trusting a byte of them: an unpickler in Python with a short list of what may happen.

No import, no call, no class that its user has not named. What may be named, called and made is said by a
subclass; how often a key may be hashed and a hash may repeat is bounded here. The machine is the one of
pickle.py in the standard library (Lib/pickle.py, ``_Unpickler``), restricted.
"""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

#: Parts of a mapping's key, which may be a tuple of tuples: hashing one that refers to itself often takes for ever.
_MAX_KEY_PARTS = 1000
#: Keys of one mapping with one and the same hash, each of which is compared with all others.
MAX_CROWD = 1000


class StrictUnpickler(pickle._Unpickler):
    """
    Python's own unpickler, in Python, with a short list of what may happen.

    Not the one in C, which makes room for any number that a memo is said to have: 64 GiB for nine bytes.
    Subclasses say which names there are (`names`), what may be called and how (`calls`), and what a state
    may be given to (`build`).
    """

    #: "module name" → what it stands for. Nothing is imported.
    names: Mapping[str, Any]
    #: id of what may be called → what is done instead, with the arguments. What is on the stack may not be hashable.
    calls: Mapping[int, Callable[..., Any]]
    #: Classes that objects are made of before they are given their state.
    classes: tuple[type, ...] = ()

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        #: id of a mapping → how many of its keys have which hash.
        self._crowds: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)

    def find_class(self, module: str, name: str) -> Any:
        key = f"{_MODULES.get(module, module)} {name}"
        if key not in self.names:
            raise pickle.UnpicklingError(f"it refers to {module[:80]}.{name[:80]}, which has no place there")
        return self.names[key]

    def build(self, made: Any, state: Any) -> None:
        """Give *made* its state, if both are what they should be."""
        del state
        raise pickle.UnpicklingError(f"a state for a {type(made).__name__}")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        call = self.calls.get(id(self.stack[-1]))
        if call is None or type(arguments) is not tuple:
            raise pickle.UnpicklingError(f"a call of {brief(self.stack[-1])}")
        self.stack[-1] = call(*arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack.pop()
        if not any(kind is known for known in self.classes) or type(arguments) is not tuple or arguments:
            raise pickle.UnpicklingError(f"an object of {brief(kind)}")
        self.append(kind.__new__(kind))

    def load_build(self) -> None:
        state = self.stack.pop()
        self.build(self.stack[-1], state)

    def load_appends(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("items for what is no list")
        self.stack[-1].extend(items)

    def load_append(self) -> None:
        item = self.stack.pop()
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("an item for what is no list")
        self.stack[-1].append(item)

    def load_setitems(self) -> None:
        self.set_items(self.pop_mark())

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def set_items(self, items: list[Any]) -> None:
        """Put keys and values, one after the other, into the mapping on top of the stack."""
        if type(self.stack[-1]) not in (dict, collections.OrderedDict, collections.Counter):
            raise pickle.UnpicklingError("pairs for what is no mapping")
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.check_key(key)
            if not is_simple_key(key):
                crowd = self._crowds[id(self.stack[-1])]
                crowd[hash(key)] += 1
                if crowd[hash(key)] > MAX_CROWD:
                    raise pickle.UnpicklingError("too many keys with one hash")
            self.stack[-1][key] = value

    def check_key(self, key: Any) -> None:
        """Refuse what would take long to hash, or run something when it is."""
        check_key(key, is_plain_key_part)

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {}


#: What of the pickle machine is needed to read what ``pickle.dumps`` writes of data, protocols 2 to 5.
_OPERATIONS = (
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE"
    " BINUNICODE8 SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST"
    " APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ BINPERSID BINGET LONG_BINGET"
    " BINPUT LONG_BINPUT MEMOIZE"
)
for _name in _OPERATIONS.split():
    _code = getattr(pickle, _name)[0]
    _inherited = pickle._Unpickler.dispatch[_code]
    StrictUnpickler.dispatch[_code] = getattr(StrictUnpickler, _inherited.__name__)
#: Names of modules in pickles of protocol 2, which Python 2 was to read.
_MODULES = {"__builtin__": "builtins", "numpy.core.multiarray": "numpy._core.multiarray"}
_KEYS = frozenset({str, int, float, complex, bool, bytes, type(None)})


def is_plain_key_part(part: Any) -> bool:
    """Whether *part*, which is no tuple, may be in a key: text, bytes, numbers, None."""
    return type(part) in _KEYS


def check_key(key: Any, is_part: Callable[[Any], bool]) -> None:
    """
    Refuse a key that would take long to hash, or run something when it is.

    Raises:
        UnpicklingError: It has too many parts, or one that is neither a tuple nor what *is_part* takes.
    """
    waiting = [key]
    parts = 0
    while waiting:
        part = waiting.pop()
        parts += 1
        if parts > _MAX_KEY_PARTS or (type(part) is tuple and len(part) > _MAX_KEY_PARTS):
            raise pickle.UnpicklingError("a key of too many parts")
        if type(part) is tuple:
            waiting += part
        elif not is_part(part):
            raise pickle.UnpicklingError(f"a {type(part).__name__} as a key")


def brief(value: Any) -> str:
    """What to call a value from a pickle in a message: a container may be small and take for ever to spell out."""
    return str(value)[:80] if isinstance(value, str | int | float | type) else f"a {type(value).__name__}"


def is_simple_key(key: Any) -> bool:
    """Text, whose hash depends on a secret of the process, and whole numbers of a usual size, whose hashes differ."""
    return type(key) is str or (type(key) is int and hash(key) == key)
