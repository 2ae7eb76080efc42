"""
What a power cut would leave, worked out from a trace of calls instead of cutting the power.

The model is the least that POSIX promises, which is less than any file system gives: the bytes of a file
survive if the file was fsynced after its last write, a name survives if the directory that holds it was
fsynced after the name was made, and a rename or removal that was not is undone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from child_process import Effect

_ids = itertools.count(1)


@dataclasses.dataclass(eq=False)
class Node:
    """A file, link (no entries) or directory: as it is, and as it would come back."""

    entries: dict[str, Node] | None = None
    durable_entries: dict[str, Node] = dataclasses.field(default_factory=dict)
    synced: bool = False
    number: int = dataclasses.field(default_factory=lambda: next(_ids))

    def below(self, path: str, *, durable: bool) -> Node | None:
        """What stands at *path*, now or after a power cut."""
        here: Node | None = self
        for part in PurePosixPath(path.strip("/")).parts:
            if here is None or here.entries is None:
                return None
            here = (here.durable_entries if durable else here.entries).get(part)
        return here

    def everything(self, *, durable: bool) -> Iterator[tuple[str, Node]]:
        """All names below, relative, with what they name."""
        for name, node in sorted((self.durable_entries if durable else self.entries or {}).items()):
            yield name, node
            for rest, deeper in node.everything(durable=durable):
                yield f"{name}/{rest}", deeper


class Disk:
    """A directory tree that effects of a trace are played on."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = _all_durable(root) if root is not None else Node({})

    def play(self, effect: Effect) -> None:
        """Do to the model what the traced call did to the disk."""
        where = effect.where
        if effect.name in ("mkdir", "create", "symlink"):
            parent, name = self._parent(where)
            if name not in parent:
                parent[name] = Node({} if effect.name == "mkdir" else None, synced=effect.name == "symlink")
        elif effect.name in ("pwrite", "set_size"):
            self._now(where).synced = False
        elif effect.name == "fsync":
            node = self._now(where)
            node.synced = True
            node.durable_entries = dict(node.entries or {})
        elif effect.name in ("remove", "rmdir"):
            parent, name = self._parent(where)
            parent.pop(name, None)
        elif effect.name in ("rename", "renameat2"):
            source, _, rest = where.partition(" -> ")
            target, _, flags = rest.partition(" (")
            old, old_name = self._parent(source)
            new, new_name = self._parent(target)
            if flags == "2)":
                old[old_name], new[new_name] = new[new_name], old[old_name]
            else:
                assert flags != "1)" or new_name not in new, "a rename over something that exists"
                new[new_name] = old.pop(old_name)
        else:
            assert effect.name.startswith("journal."), effect

    def at(self, path: str) -> Node | None:
        """What stands at *path* now."""
        return self.root.below(path, durable=False)

    def after_power_loss(self, path: str) -> Node | None:
        """What would stand at *path* after a power cut now."""
        return self.root.below(path, durable=True)

    def lost(self, directory: str) -> list[str]:
        """What of *directory* and all in it a power cut would take away now; empty if nothing."""
        there = self.at(directory)
        assert there is not None, f"{directory} does not exist"
        back = self.after_power_loss(directory)
        if back is not there:
            return [directory]
        now = dict(there.everything(durable=False))
        kept = dict(there.everything(durable=True))
        gone = [name for name, node in now.items() if kept.get(name) is not node]
        torn = [name for name, node in now.items() if node.entries is None and not node.synced]
        return sorted({*gone, *torn})

    def names_after_power_loss(self, node: Node) -> list[str]:
        """Under which names *node* would come back."""
        return [name for name, one in self.root.everything(durable=True) if one is node]

    def _now(self, path: str) -> Node:
        node = self.at(path)
        assert node is not None, f"{path} is not known"
        return node

    def _parent(self, path: str) -> tuple[dict[str, Node], str]:
        pure = PurePosixPath(path)
        entries = self._now(str(pure.parent)).entries
        assert entries is not None
        return entries, pure.name


def _all_durable(path: Path) -> Node:
    if path.is_symlink() or not path.is_dir():
        return Node(synced=True)
    entries = {child.name: _all_durable(child) for child in path.iterdir()}
    return Node(entries, dict(entries), synced=True)
