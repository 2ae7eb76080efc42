"""What an installation from the wheel holds: the migrations are in it and a journal opens, far from the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "ckptmgr", "migrations")


def run(command: list[object], cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves a build folder where it builds."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, folder / name)
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder], folder)
    (built,) = (folder / "dist").glob("ckptmgr-*.whl")
    return built


@pytest.fixture(scope="module")
def installed_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own with the wheel in it, and this one's libraries within reach, but not the checkout."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel], folder)
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())
    # A folder named in a .pth file is searched, but .pth files in it (an editable ckptmgr) are not read.
    (site / "dependencies.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return python


def test_the_wheel_holds_every_module_and_migration(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "ckptmgr").rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    } | {
        f"ckptmgr/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "migrations").rglob("*")
        if path.suffix in (".py", ".mako")
    }

    assert expected - names == set()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"ckptmgr"}


SCRIPT = """
import importlib.resources, json, sys
from pathlib import Path
import ckptmgr
from ckptmgr.journal import Journal
path = Path(sys.argv[1])
with Journal.open(path) as journal:
    epoch = journal.begin_epoch(host="h", pid=1, command="c", versions={})
with Journal.open_read_only(path) as reader:
    print(json.dumps({
        "epoch": reader.current_epoch(),
        "ckptmgr": ckptmgr.__file__,
        "migrations": str(importlib.resources.files("ckptmgr.migrations")),
        "checkout": [
            str(module)
            for module in sys.modules.values()
            if any(f"{sys.argv[2]}/{folder}/" in str(module) for folder in ("ckptmgr", "migrations"))
        ],
    }))
"""


def test_an_installed_wheel_creates_and_reads_a_journal(installed_python, tmp_path):
    found = json.loads(run([installed_python, "-c", SCRIPT, tmp_path / "a.journal.db", ROOT], tmp_path))
    home = installed_python.parents[1]

    assert Path(found["ckptmgr"]).is_relative_to(home)
    assert Path(found["migrations"]).is_relative_to(home)
    assert found["checkout"] == []
    assert found["epoch"] == 1
