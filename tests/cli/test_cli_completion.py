"""``ckptmgr completion``: the scripts, in the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from run_on_disk import Call

from ckptmgr.cli import COMMANDS

#: Sources a script, asks it for the completions of words, and prints them one a line.
BASH = """
source "$1"; shift
COMP_WORDS=(ckptmgr "$@"); COMP_CWORD=$#
_shtab_ckptmgr ckptmgr "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def script(ckptmgr: Call, shell: str, folder: Path) -> Path:
    done = ckptmgr("completion", shell)
    assert (done.code, done.err) == (0, "")
    path = folder / f"completion.{shell}"
    path.write_text(done.out)
    return path


def needs(shell: str) -> str:
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"there is no {shell} here")
    return found


def asked(words: list[str], **options: object) -> list[str]:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, **options)
    assert done.stderr == ""
    return [line.split("\t")[0].strip() for line in done.stdout.splitlines() if line.strip()]


@pytest.fixture
def shell_of_bash(ckptmgr: Call, tmp_path: Path):
    made = script(ckptmgr, "bash", tmp_path)
    shell = needs("bash")
    return lambda *words: asked([shell, "-c", BASH, "bash", str(made), *words], cwd=tmp_path)


def test_bash_completes_commands_flags_and_paths(shell_of_bash, tmp_path: Path) -> None:
    (tmp_path / "runs" / "alpha").mkdir(parents=True)

    assert set(shell_of_bash("")) >= set(COMMANDS)
    assert shell_of_bash("verif") == ["verify"]
    assert shell_of_bash("verify", "--max") == ["--max-bytes-per-second"]
    assert shell_of_bash("ls", "run") == ["runs"]
    assert {"bash", "zsh", "fish"} <= set(shell_of_bash("completion", ""))


def test_fish_completes_commands_and_flags(ckptmgr: Call, tmp_path: Path) -> None:
    shell, made = needs("fish"), script(ckptmgr, "fish", tmp_path)
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "TERM": "dumb"}

    def complete(line: str) -> list[str]:
        asking = f"source {made}; complete -C '{line}'"
        return asked([shell, "--no-config", "-c", asking], env=home, cwd=tmp_path)

    assert set(complete("ckptmgr ")) >= set(COMMANDS)
    assert complete("ckptmgr verify --max") == ["--max-bytes-per-second"]


def test_zsh_takes_the_script(ckptmgr: Call, tmp_path: Path) -> None:
    shell, made = needs("zsh"), script(ckptmgr, "zsh", tmp_path)
    made.rename(tmp_path / "_ckptmgr")
    asking = "fpath=($1 $fpath); autoload -Uz compinit; compinit -u -D; print $_comps[ckptmgr]; autoload +X _ckptmgr"

    assert asked([shell, "-f", "-c", asking, "zsh", str(tmp_path)], env={"PATH": "/usr/bin:/bin"}) == ["_ckptmgr"]
    assert "--max-bytes-per-second" in (tmp_path / "_ckptmgr").read_text()


def test_another_shell_ends_with_2_and_names_those_there_are(ckptmgr: Call) -> None:
    done = ckptmgr("completion", "powershell")

    assert done.code == 2
    assert "bash, zsh, fish" in done.err


def test_it_needs_no_run_and_takes_no_journal(ckptmgr: Call) -> None:
    assert ckptmgr("completion", "bash", "--journal", "j.db").code == 2
