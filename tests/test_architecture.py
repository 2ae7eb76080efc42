"""
The house: who may import whom, which room has the door to which library, and who may touch the disk.

Layers, lowest first; a file imports from lower ones only, and rooms of one layer are strangers, except
where `ALSO` says so and why. Imports for type checkers alone do not count.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckptmgr

PACKAGE = Path(ckptmgr.__file__).parent
LAYERS = [
    {"errors", "options", "reach", "durable", "lifecycle", "manifest", "filesystems", "pickles", "pace"},
    {"retention", "recovery", "resume", "storage", "durability"},
    {"rebuild"},
    {"journal", "rundir", "ranks", "writers", "requests", "foreign"},
    {"series", "commit", "doctor", "adoption"},
    {"answers", "calls", "capture", "finalizer", "verify"},
    {"restore"},
    {"manager", "cli", "integrations"},
]
ALSO = {
    ("lifecycle", "errors"),  # IllegalTransition
    ("options", "errors"),  # InvalidArgument
    ("reach", "errors"),  # CorruptCheckpoint
    ("durable", "reach"),  # names are reached the same way for changing as for reading
    ("manifest", "errors"),  # CorruptCheckpoint
    ("manifest", "lifecycle"),  # the word Format
}
#: Never, although the layers would allow it: the tools start without torch and change nothing by themselves.
NEVER = {("cli", "ranks"), ("cli", "writers"), ("cli", "commit"), ("cli", "finalizer")}
#: Library → the only files that import it.
DOORS = {
    "transitions": {"lifecycle.py"},
    "sqlalchemy": {"journal/"},
    "alembic": {"journal/"},
    "sqlite3": {"journal/"},
    "filelock": {"rundir.py"},
    "torch.distributed": {
        "ranks.py",
        "writers/dcp.py",
        "writers/huggingface.py",
        "writers/index.py",
        "writers/loading.py",
        "writers/state.py",
    },
    "torch": {"writers/", "ranks.py", "manager.py"},
    "numpy": {"writers/archives.py", "writers/state.py"},
    "xxhash": {"manifest.py"},
    "shtab": {"cli/completion.py"},
    "transformers": {"writers/modelnames.py", "writers/assets.py"},
    "matplotlib": {"cli/report/charts.py"},
    "prometheus_client": {"cli/metrics.py"},
    "psutil": {"writers/worker.py", "writers/arena.py"},
    "tempfile": {"writers/assets.py"},  # what save_pretrained writes passes through a folder
}
WITHOUT_TORCH = {"writers/__init__.py", "writers/jobs.py", "writers/worker.py", "writers/process.py"}
#: Calls that change names or bytes on disk. SQLite changes its own file itself; nobody else does outside durable.py.
CHANGES = {
    "os": {
        "rename", "renames", "replace", "remove", "unlink", "rmdir", "removedirs", "mkdir", "makedirs", "mkfifo",
        "link", "symlink", "truncate", "ftruncate", "fsync", "fdatasync", "write", "pwrite", "writev", "pwritev",
        "sendfile", "copy_file_range", "chmod", "utime",
    },
    "shutil": {"rmtree", "move", "copy", "copy2", "copyfile", "copyfileobj", "copytree"},
}  # fmt: skip
PATH_METHODS = {
    "write_text", "write_bytes", "unlink", "mkdir", "touch", "rmdir", "symlink_to", "hardlink_to", "rename",
    "chmod",
}  # fmt: skip

FILES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
FILES = {name: tree for name, tree in FILES.items() if not name.startswith("migrations/")}
each_file = pytest.mark.parametrize("name", FILES)


def room(name: str) -> str:
    return name.removeprefix("ckptmgr.").partition("/")[0].partition(".")[0]


def nodes(name: str) -> Iterator[ast.AST]:
    """All of a file but what only type checkers read."""
    waiting: list[ast.AST] = [FILES[name]]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            waiting.extend(node.orelse)
        else:
            waiting.extend(ast.iter_child_nodes(node))


def imports(name: str) -> set[str]:
    """Every module a file imports, at any time, in full."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def level(name: str) -> int:
    (found,) = (number for number, rooms in enumerate(LAYERS) if name in rooms)
    return found


def test_every_room_has_a_layer():
    rooms = {room(name) for name in FILES} - {"__init__", "__main__"}

    assert rooms == set().union(*LAYERS)


@each_file
def test_a_file_imports_from_lower_layers_only(name):
    here = room(name)
    if here in ("__init__", "__main__"):
        return
    there = {room(module.removeprefix("ckptmgr.")) for module in imports(name) if module.startswith("ckptmgr.")}
    wrong = {
        other
        for other in there - {here}
        if (level(other) >= level(here) and (here, other) not in ALSO) or (here, other) in NEVER
    }

    assert wrong == set()


@each_file
def test_a_library_is_imported_through_its_door_only(name):
    wrong = {
        f"{module} (door: {doors})"
        for module in imports(name)
        for library, doors in DOORS.items()
        if (module == library or module.startswith(library + "."))
        and not any(name == d or (d[-1] == "/" and name.startswith(d)) for d in doors)
    }

    assert wrong == set()
    assert name not in WITHOUT_TORCH or not any(module.partition(".")[0] == "torch" for module in imports(name))


@each_file
def test_only_durable_changes_the_disk(name):
    if name == "durable.py":
        return
    wrong = []
    for node in nodes(name):
        if isinstance(node, ast.ImportFrom) and node.module in CHANGES:
            wrong += [
                f"{node.lineno}: from {node.module} import {a.name}"
                for a in node.names
                if a.name in CHANGES[node.module]
            ]
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        owner, _, method = text.rpartition(".")
        if (owner in CHANGES and method in CHANGES[owner]) or (
            owner and owner not in ("os", "shutil", "durable") and method in PATH_METHODS
        ):
            wrong.append(f"{node.lineno}: {text}")
        elif owner and method == "replace" and len(node.args) == 1 and not node.keywords:
            wrong.append(f"{node.lineno}: {text}, a Path's")  # str.replace takes two arguments
        elif text in ("open", "io.open") or (method == "open" and owner not in ("os", "Journal")):
            wrong.append(f"{node.lineno}: {text}: use os.open for reading, durable for writing")
        elif text == "os.open" and re.search(r"^(?!.*os\.devnull).*O_(WRONLY|RDWR|CREAT|TRUNC)", ast.unparse(node)):
            wrong.append(f"{node.lineno}: os.open for writing")

    assert wrong == []


def test_no_room_is_called_after_nothing():
    names = {part.removesuffix(".py") for name in FILES for part in name.split("/")}

    assert names & {"utils", "util", "helpers", "helper", "common", "base", "core", "types", "misc", "tools"} == set()


@pytest.mark.parametrize(
    "code",
    [
        "import ckptmgr; ckptmgr.KeepLast, ckptmgr.SaveFailed, ckptmgr.CheckpointState, ckptmgr.Timeouts, dir(ckptmgr)",
        "import ckptmgr.journal, ckptmgr.rundir, ckptmgr.recovery, ckptmgr.resume, ckptmgr.retention, ckptmgr.cli",
        "import ckptmgr.writers.worker, ckptmgr.writers.jobs",
        "import ckptmgr.foreign",
        "import ckptmgr.doctor, ckptmgr.doctor.trials, ckptmgr.storage, ckptmgr.filesystems",
        "from ckptmgr.cli import main; main(['ls', '/nonexistent'])",
    ],
)
def test_no_torch_without_a_manager(code):
    asked = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch is imported'"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", asked], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


def test_importing_the_package_loads_nothing_else():
    asked = "import sys, ckptmgr; print(sorted(name for name in sys.modules if name.startswith('ckptmgr.')))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
