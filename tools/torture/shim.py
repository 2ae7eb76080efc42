"""The preloaded library as Python sees it: build it, give orders, read what it did and what it wrote down."""

from __future__ import annotations

import ctypes
import dataclasses
import enum
import errno
import hashlib
import mmap
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).with_name("shim.c")
_LONGEST = 512
_ROLES = 32
#: How far SIGKILL and SIGSTOP go: the process that makes the call, or the whole process group.
CALLER = -1
EVERYONE = -2


def trainer(rank: int) -> int:
    """The role of a rank's trainer, as a target."""
    return 2 * rank


def writer(rank: int) -> int:
    """The role of a rank's writer process, as a target."""
    return 2 * rank + 1


class Kind(enum.IntEnum):
    """What a call changes. The same order as in shim.c."""

    CREATE = 0
    WRITE = 1
    TRUNCATE = 2
    ALLOCATE = 3
    FSYNC = 4
    RENAME = 5
    UNLINK = 6
    RMDIR = 7
    MKDIR = 8
    SYMLINK = 9
    LINK = 10
    CLOSE = 11
    LOCK = 12


#: Everything that reaches the disk. Closes and locks only count where that is asked for.
CHANGES = tuple(kind for kind in Kind if kind not in (Kind.CLOSE, Kind.LOCK))
#: What a full disk or a spent quota refuses.
TAKES_SPACE = (Kind.CREATE, Kind.WRITE, Kind.ALLOCATE, Kind.FSYNC, Kind.MKDIR, Kind.SYMLINK, Kind.RENAME)


class Action(enum.IntEnum):
    """What happens at the ordered call. The same order as in shim.c."""

    NOTHING = 0
    KILL = 1
    STOP = 2
    FAIL = 3
    #: Half of a write is done, and its length says so.
    SHORT = 4
    #: Half of a write is done, and then comes death.
    TORN = 5
    #: What becomes of an fsync that `Lies` are told about; nothing to order.
    LIE = 6
    #: The file system loses its power, its own log included; then comes death, for everyone.
    CUT = 7
    #: Nothing; the first call that the kernel itself refuses (no space, no quota, an I/O error) is what struck.
    WATCH = 8
    #: The caller takes so much memory that, under one of our limits, the kernel kills it.
    EAT = 9


class Lies(enum.IntEnum):
    """Which fsyncs say yes and do nothing, from the start."""

    NONE = 0
    ALL = 1
    #: All but those of the journal.
    DATA = 2


class Phase(enum.IntEnum):
    """Where in its life a run is: the transitions of the fault matrix."""

    START = 0
    PREWRITTEN = 1
    WRITING = 2
    SHARDS = 3
    GATHERED = 4
    RENAME = 5
    COMMITTED = 6
    FAILED = 7
    DELETION = 8
    RECOVERY = 9
    PROJECTION = 10
    END = 11


@dataclasses.dataclass(frozen=True)
class Orders:
    """
    What is to happen at the *at*-th counted call under the run's names, whoever makes it; 0 for nothing.

    Args:
        at: Number of the call, from 1.
        action: What happens then.
        error: errno of `Action.FAIL`.
        sticky: `Action.FAIL`: at every later call too.
        lies: Which fsyncs are not done, whatever else happens.
        kinds: Which calls are counted.
        target: Who is killed: `CALLER`, `EVERYONE`, `trainer(rank)` or `writer(rank)`.
            STOP stops all of the group of the caller.
        trace: Where all calls are written down; empty for nowhere.
        group: `Action.EAT`: the file by which the caller enters a control group before it takes memory; empty for none.
    """

    at: int = 0
    action: Action = Action.NOTHING
    error: int = 0
    sticky: bool = False
    lies: Lies = Lies.NONE
    kinds: tuple[Kind, ...] = CHANGES
    target: int = CALLER
    trace: str = ""
    group: str = ""

    def __str__(self) -> str:
        what = self.action.name
        if self.action is Action.FAIL:
            what = errno.errorcode[self.error]
        return f"{what}{' sticky' if self.sticky else ''} at call {self.at}"


class _Shared(ctypes.Structure):
    _fields_ = (
        ("at", ctypes.c_uint64),
        ("action", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("sticky", ctypes.c_int32),
        ("lies", ctypes.c_int32),
        ("kinds", ctypes.c_uint32),
        ("target", ctypes.c_int32),
        ("phase", ctypes.c_int32),
        ("count", ctypes.c_uint64),
        ("struck", ctypes.c_uint64),
        ("struck_kind", ctypes.c_int32),
        ("struck_phase", ctypes.c_int32),
        ("struck_role", ctypes.c_int32),
        ("lock", ctypes.c_int32),
        ("pids", ctypes.c_int32 * _ROLES),
        ("struck_path", ctypes.c_char * _LONGEST),
        ("root", ctypes.c_char * _LONGEST),
        ("trace", ctypes.c_char * _LONGEST),
        ("group", ctypes.c_char * _LONGEST),
    )


@dataclasses.dataclass(frozen=True)
class Struck:
    """What the shim did: how many calls it counted, how often it struck, and the first time: where."""

    count: int
    times: int
    kind: Kind
    phase: Phase
    role: int
    path: str

    def __str__(self) -> str:
        who = f"{'writer' if self.role % 2 else 'trainer'} of rank {self.role // 2}"
        return f"{self.phase.name}: {self.kind.name.lower()} {self.path} by the {who}"


def why_not() -> str | None:
    """Why the shim cannot be used here, or None."""
    return None if shutil.which("gcc") else "needs gcc (Debian: gcc, libc6-dev)"


def build() -> Path:
    """The compiled library, built once per version of its source."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"ckptmgr-shim-{os.getuid()}-{digest}" / "shim.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, exist_ok=True)
        scratch = library.with_name(f"{os.getpid()}.so")
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", str(scratch), str(SOURCE), "-ldl"],
            check=True,
        )
        scratch.rename(library)
    if library.parent.stat().st_uid != os.getuid():
        raise PermissionError(f"{library.parent} belongs to somebody else")
    return library


# --- outside -----------------------------------------------------------------------------------


def give(path: Path, run: Path, orders: Orders) -> None:
    """Write *orders* for every process that arms itself with *path*; they concern *run* and its journal."""
    shared = _Shared(
        at=orders.at,
        action=orders.action,
        error=orders.error,
        sticky=orders.sticky,
        lies=orders.lies,
        kinds=sum(1 << kind for kind in orders.kinds),
        target=orders.target,
        root=os.fsencode(run),
        trace=os.fsencode(orders.trace),
        group=os.fsencode(orders.group),
    )
    if orders.trace:
        Path(orders.trace).write_bytes(b"")
    path.write_bytes(bytes(shared))


def struck(path: Path) -> Struck:
    """What came of the orders in *path*."""
    shared = _Shared.from_buffer_copy(path.read_bytes())
    return Struck(
        shared.count,
        shared.struck,
        Kind(shared.struck_kind),
        Phase(shared.struck_phase),
        shared.struck_role,
        os.fsdecode(shared.struck_path),
    )


def pids(path: Path) -> dict[int, int]:
    """Role → pid of everyone that armed itself."""
    shared = _Shared.from_buffer_copy(path.read_bytes())
    return {role: pid for role, pid in enumerate(shared.pids) if pid}


@dataclasses.dataclass(frozen=True)
class Call:
    """
    One traced call that worked.

    *path* and *other* are absolute. WRITE: *data* at *offset*. TRUNCATE, ALLOCATE: the size is *offset*.
    RENAME: from *path* to *other*, *flags* of renameat2. SYMLINK: *other* is the link's text. CREATE: *flags*
    is 1 where a file was emptied that had existed. *number*: among all that were counted, the refused ones too.
    """

    kind: Kind
    path: str
    other: str
    flags: int
    offset: int
    data: bytes
    role: int
    phase: Phase
    number: int


_RECORD = struct.Struct("<IIiiiIIIqQ")


def calls(trace: Path) -> Iterator[Call]:
    """The traced calls, in the order in which they took effect."""
    whole = trace.read_bytes()
    at = 0
    while at < len(whole):
        length, kind, role, phase, flags, path, other, _, offset, number = _RECORD.unpack_from(whole, at)
        at += _RECORD.size
        text = whole[at : at + path].decode(errors="surrogateescape")
        second = whole[at + path : at + path + other].decode(errors="surrogateescape")
        data = whole[at + path + other : at + length]
        yield Call(Kind(kind), text, second, flags, offset, data, role, Phase(phase), number)
        at += length


# --- inside ------------------------------------------------------------------------------------


class Armed:
    """
    This process and the writer that it will start, under orders.

    Args:
        path: The orders.
        rank: Whose trainer this is.
    """

    def __init__(self, path: Path, rank: int) -> None:
        with path.open("r+b") as stream:
            self._memory = mmap.mmap(stream.fileno(), ctypes.sizeof(_Shared))
        self._shared = _Shared.from_buffer(self._memory)
        os.environ |= {"CKPTMGR_SHIM": str(path), "CKPTMGR_SHIM_ROLE": str(writer(rank))}
        arm = ctypes.CDLL(None).ckptmgr_shim_arm
        if arm(os.fsencode(path), trainer(rank)) != 0:
            raise OSError("the shim cannot map its orders")

    @property
    def phase(self) -> Phase:
        """Where the run is, for the report."""
        return Phase(self._shared.phase)

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._shared.phase = phase

    @property
    def has_struck(self) -> bool:
        """Whether the ordered call has come."""
        return bool(self._shared.struck)

    @property
    def is_over(self) -> bool:
        """
        Whether what came before can be looked at, and be expected to be whole.

        Not while a disk still refuses everything, not beside an heir, and not where the look itself takes locks that
        are counted.
        """
        if self._shared.kinds & 1 << Kind.LOCK:
            return False
        return not (self.has_struck and (self._shared.sticky or self._shared.action == Action.STOP))

    @property
    def is_watching(self) -> bool:
        """Whether nothing is made to fail, and only looked at what the kernel refuses."""
        return bool(self._shared.action == Action.WATCH)

    def order(self, orders: Orders) -> None:
        """New orders in the midst of a run; *orders* count from the next call on."""
        self._shared.at = 0
        self._shared.action, self._shared.error, self._shared.sticky = orders.action, orders.error, orders.sticky
        self._shared.kinds = sum(1 << kind for kind in orders.kinds)
        self._shared.target, self._shared.struck = orders.target, 0
        self._shared.at = self._shared.count + orders.at if orders.at else 0

    def calm(self) -> None:
        """No more faults: the space is freed, the disk repaired."""
        self._shared.at = 0
