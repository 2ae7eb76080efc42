"""
Power cuts without cutting the power: a trace of calls, replayed into every disk that they might have left.

The trace has every call with its bytes, SQLite's included. After each call the power may fail; what is
on the disk then depends on what had been synced and on the file system:

- *posix*, the least that any file system promises: a file's bytes are there if it was fsynced after they
  were written, a name if its directory was fsynced after it was made; of everything else any part may be
  there or not. A rename within a directory happens or does not.
- *ext4* (data=ordered, as shipped): names come and go in the order in which they were made, and any
  fsync writes all that came before; bytes that were not synced may be missing, or zeros.

After Pillai et al., "All File Systems Are Not Created Equal" (OSDI 2014), with a choice of the states
where subsets are too many: none, all, all but one, only one, names without bytes, bytes without names, torn writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import crash_run
from child_process import AtComment
from crash_run import scenario_of

from torture import faults, runs, shim
from torture.faults import Ground, Outcome
from torture.shim import Call, Kind, Orders

_MOST_S = 60
#: Every so many states the whole manager judges, not recovery alone.
_WHOLE = 8

Image = Mapping[str, bytes | str | None]
"""Path below the root → bytes of a file, text of a link, None for a directory."""


class Node:
    """A file, link or directory: what of it is durable, and what was done to it since."""

    def __init__(self, kind: str, data: bytes = b"") -> None:
        self.kind = kind
        self.data = data
        self.entries: dict[str, Node] = {}
        self.now: dict[str, Node] = {}


@dataclasses.dataclass(eq=False)
class Pending:
    """One change that no fsync has covered: of a directory's names, or of a file's bytes."""

    node: Node
    names: Callable[[dict[str, Node]], None] | None = None
    offset: int = 0
    data: bytes = b""
    size: int | None = None

    def apply(self, data: bytearray, how: str = "whole") -> None:
        """Do it to a file's bytes; *how*: ``whole``, ``zeros`` (the size, not the bytes) or ``torn`` (half of it)."""
        if self.size is not None:
            data[:] = data[: self.size].ljust(self.size, b"\0")
            return
        new = bytes(len(self.data)) if how == "zeros" else self.data
        if how == "torn":
            new = new[: len(new) // 2]
        if len(data) < self.offset:
            data.extend(bytes(self.offset - len(data)))
        data[self.offset : self.offset + len(new)] = new


class Disk:
    """
    A directory tree that calls are played on.

    Args:
        root: What stands there and is durable.
        ordered: Names become durable in order, and all of them with any fsync (ext4).
    """

    def __init__(self, root: Path, *, ordered: bool) -> None:
        self._root = str(root)
        self._ordered = ordered
        self.top = _durable(root)
        self.pending: list[Pending] = []

    def play(self, call: Call) -> None:
        """Do what a call did."""
        kind = call.kind
        if kind is Kind.FSYNC:
            self._sync(self._at(call.path))
        elif kind is Kind.CREATE and call.flags:
            self._bytes(Pending(self._at(call.path), size=0))
        elif kind in (Kind.CREATE, Kind.MKDIR, Kind.SYMLINK):
            what = {Kind.CREATE: "file", Kind.MKDIR: "directory", Kind.SYMLINK: "link"}[kind]
            self._name(call.path, Node(what, call.other.encode() if kind is Kind.SYMLINK else b""))
        elif kind is Kind.WRITE:
            self._bytes(Pending(self._at(call.path), offset=call.offset, data=call.data))
        elif kind is Kind.TRUNCATE:
            self._bytes(Pending(self._at(call.path), size=call.offset))
        elif kind is Kind.ALLOCATE:
            node = self._at(call.path)
            if call.offset > len(self._bytes_now(node)):
                self._bytes(Pending(node, size=call.offset))
        elif kind in (Kind.UNLINK, Kind.RMDIR):
            self._name(call.path, None)
        elif kind is Kind.RENAME:
            self._rename(call)
        else:
            raise NotImplementedError(f"the model does not know {kind.name}")

    def images(self, thorough: bool) -> Iterator[tuple[str, Image]]:
        """The disks that a power cut may leave now, each with a word; *thorough*: with one change more or less."""
        pending = self.pending
        names = [one for one in pending if one.names is not None]
        yield "nothing", self._image([], {})
        yield "everything", self._image(pending, {})
        if not thorough:
            return
        yield "names without bytes", self._image(names, {})
        yield "sizes without bytes", self._image(pending, dict.fromkeys(pending, "zeros"))
        if self._ordered:
            rest = [one for one in pending if one.names is None]
            for length in range(1, len(names)):
                yield f"{length} names", self._image(names[:length], {})
                yield f"{length} names and all bytes", self._image([*names[:length], *rest], {})
        else:
            yield "bytes without names", self._image([one for one in pending if one.names is None], {})
        for n, one in enumerate(pending):
            if not self._ordered or one.names is None:
                without = [other for other in pending if other is not one]
                yield f"all but {n}", self._image(without, {})
                yield f"only {n}", self._image([one], {})
            if one.names is None and len(one.data) > 1:
                yield f"{n} torn", self._image(pending, {one: "torn"})

    def _image(self, chosen: Sequence[Pending], how: Mapping[Pending, str]) -> Image:
        entries: dict[Node, dict[str, Node]] = {}
        data: dict[Node, bytearray] = {}
        for one in chosen:
            if one.names is not None:
                one.names(entries.setdefault(one.node, dict(one.node.entries)))
            else:
                one.apply(data.setdefault(one.node, bytearray(one.node.data)), how.get(one, "whole"))
        found: dict[str, bytes | str | None] = {}

        def walk(node: Node, at: str) -> None:
            for name, child in entries.get(node, node.entries).items():
                path = f"{at}{name}"
                if child.kind == "directory":
                    if path not in found:
                        found[path] = None
                        walk(child, f"{path}/")
                elif child.kind == "link":
                    found[path] = child.data.decode()
                else:
                    found[path] = bytes(data[child]) if child in data else child.data

        walk(self.top, "")
        return found

    def _sync(self, node: Node) -> None:
        rest = []
        for one in self.pending:
            if one.node is node or (self._ordered and one.names is not None):
                if one.names is not None:
                    one.names(one.node.entries)
                else:
                    data = bytearray(one.node.data)
                    one.apply(data)
                    one.node.data = bytes(data)
            else:
                rest.append(one)
        self.pending = rest

    def _bytes(self, pending: Pending) -> None:
        self.pending.append(pending)

    def _bytes_now(self, node: Node) -> bytearray:
        data = bytearray(node.data)
        for one in self.pending:
            if one.node is node and one.names is None:
                one.apply(data)
        return data

    def _name(self, path: str, node: Node | None) -> None:
        folder, name = self._parent(path)

        def change(entries: dict[str, Node]) -> None:
            if node is None:
                entries.pop(name, None)
            else:
                entries[name] = node

        change(folder.now)
        self.pending.append(Pending(folder, change))

    def _rename(self, call: Call) -> None:
        (folder, old), (other, new) = self._parent(call.path), self._parent(call.other)
        assert folder is other, f"a rename between directories: {call.path} -> {call.other}"
        moved, there = folder.now[old], folder.now.get(new)

        def change(entries: dict[str, Node]) -> None:
            if call.flags == 2:
                assert there is not None
                entries[old], entries[new] = there, moved
            else:
                entries.pop(old, None)
                entries[new] = moved

        change(folder.now)
        self.pending.append(Pending(folder, change))

    def _at(self, path: str) -> Node:
        node = self.top
        for part in PurePosixPath(path.removesuffix(" (deleted)")).relative_to(self._root).parts:
            node = node.now[part]
        return node

    def _parent(self, path: str) -> tuple[Node, str]:
        pure = PurePosixPath(path)
        return self._at(str(pure.parent)), pure.name


def _durable(path: Path) -> Node:
    if path.is_symlink():
        return Node("link", str(path.readlink()).encode())
    if not path.is_dir():
        return Node("file", path.read_bytes())
    node = Node("directory")
    node.entries = {child.name: _durable(child) for child in path.iterdir()}
    node.now = dict(node.entries)
    return node


@dataclasses.dataclass(frozen=True)
class State:
    """A disk after a power cut: after which call, which of the legal ones, what was acknowledged by then."""

    phase: str
    words: str
    image: Image
    notes: bytes


class PowerLoss:
    """
    Power cuts at every call of one run, under one model.

    Args:
        model: ``posix`` or ``ext4``.
        words: Series and scenario, or ``create``.
        world: Ranks.
        first: A comment of the product: the run crashed there before, and the power fails while it is recovered.
    """

    def __init__(self, model: str, words: str, world: int = 1, first: str = "") -> None:
        self.fault = f"power loss, {model}" + (", while recovering" if first else "")
        self.words = words
        self.world = world
        self._model = model
        self._first = first
        self._scenario = scenario_of(words)

    @property
    def name(self) -> str:
        """What it is called in a report."""
        return f"{self.fault} | {self.words} | {self.world}" + (f" | after: {self._first}" if self._first else "")

    @property
    def same(self) -> object:
        """Nothing is shared."""
        return self

    def prepare(self, ground: Ground, folder: Path) -> list[State]:
        """Let the run go by, and work out what power cuts would leave."""
        run = self._start(ground, folder)
        # Names, bytes and notes of all of it, and nothing that torture itself puts beside the run.
        disk = Disk(run.parent, ordered=self._model == "ext4")
        place, trace = folder.with_suffix(".orders"), folder.with_suffix(".trace")
        shim.give(place, run.parent, Orders(trace=str(trace)))
        if self._first:
            assert self._scenario is not None
            ended = ground.forks.run(runs.recover, run, place, self._scenario.exchange, timeout_s=_MOST_S)
        elif self._scenario is None:
            ended = ground.forks.run(runs.create, run, place, timeout_s=_MOST_S)
        else:
            ended = ground.forks.run(runs.live, run, place, self._scenario, self.world, False, timeout_s=_MOST_S)
        assert ended.status == 0, ended.output
        runs.require_all_saved(run)
        notes = b""
        if self._first or (self._scenario is not None and self._scenario.before):
            notes = disk.top.entries["notes"].data if "notes" in disk.top.entries else b""
        states: dict[bytes, State] = {}
        calls = list(shim.calls(trace))
        # What may be missing of the changes since an fsync is all there is right before the next one.
        last = [after.kind is Kind.FSYNC for after in calls[1:]] + [True]
        for call, thorough in zip(calls, last, strict=True):
            name = PurePosixPath(call.path).name
            if name == "notes":
                notes += call.data
            elif not name.startswith(("told-", "meeting")):
                disk.play(call)
            for words, image in disk.images(thorough=thorough):
                digest = _digest(image, notes)
                if digest not in states:
                    states[digest] = State(call.phase.name, words, image, notes)
        return list(states.values())

    def points(self, prepared: Sequence[State]) -> Iterator[int]:
        """The numbers of the states."""
        return iter(range(len(prepared)))

    def phase(self, n: int, prepared: Sequence[State]) -> str:
        """After a call of which phase the power failed."""
        return prepared[n].phase

    def strike(self, ground: Ground, folder: Path, n: int, prepared: Sequence[State]) -> Outcome:
        """Put the *n*-th state on the disk and judge it."""
        state = prepared[n]
        run = materialize(state.image, folder)
        run.with_name("notes").write_bytes(state.notes)
        try:
            ground.forks.do(runs.judge if n % _WHOLE == 0 else runs.judge_recovery, run, timeout_s=_MOST_S)
        except AssertionError as error:
            return Outcome(state.phase, f"{state.words}: {error}")
        shutil.rmtree(folder)
        return Outcome(state.phase)

    def _start(self, ground: Ground, folder: Path) -> Path:
        if self._scenario is None:
            run = folder / "runs" / "alpha"
            run.parent.mkdir(parents=True)
            crash_run.assets(run)
            return run
        run = ground.past(self._scenario, folder)
        if self._first:
            ground.forks.crash(crash_run.crash_while_saving, run, self._scenario, AtComment(self._first))
        return run


def materialize(image: Image, folder: Path) -> Path:
    """Put *image* into *folder*; the run directory in it, which need not exist."""
    folder.mkdir(parents=True)
    for path, content in image.items():
        if path == "notes":
            continue
        at = folder / path
        if content is None:
            at.mkdir()
        elif isinstance(content, str):
            at.symlink_to(content)
        else:
            at.write_bytes(content)
    return folder / "alpha"


def _digest(image: Image, notes: bytes) -> bytes:
    digest = hashlib.blake2b(notes, digest_size=16)
    for path in sorted(image):
        digest.update(f"\0{path}\0{type(image[path]).__name__}\0".encode())
        content = image[path]
        digest.update(content.encode() if isinstance(content, str) else content or b"")
    return digest.digest()


def sweeps() -> list[PowerLoss]:
    """All of them: model × run."""
    found = []
    for model in ("posix", "ext4"):
        found += [PowerLoss(model, words) for words in (*faults.SCENARIOS, faults.LARGE, "create")]
        found += [PowerLoss(model, words, 2) for words in ("dcp steady", "hf overwrite")]
        found += [PowerLoss(model, words, first=first) for words, first in faults.CRASHED]
    return found
