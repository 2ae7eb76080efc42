"""docs/reference/cli.md is a contract: commands, flags, statuses, findings and JSON fields are those of the code."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_on_disk import NO_PROCESS, Call, Run, S, start

from ckptmgr import recovery, storage
from ckptmgr.cli import COMMANDS, build_parser
from ckptmgr.cli.exit_codes import Exit
from ckptmgr.foreign import report
from ckptmgr.lifecycle import Format, RetirementMark
from ckptmgr.resume import FINDINGS, Verdict

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
#: Objects whose keys are names that a user chose.
MAPS = {"metrics", "set_aside", "numbers"}

Fields = dict[str, set[str]]


def sections() -> dict[str, str]:
    """Each heading of the page and the text below it, down to the next heading."""
    pieces = re.split(r"^#{1,3} (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def table(text: str, *, first: str) -> list[list[str]]:
    """The rows of the tables in *text* whose first column is called *first*."""
    rows: list[list[str]] = []
    taking = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if not cells:
            taking = False
        elif cells[0] == first:
            taking = True
        elif taking and set(line) - set("|- "):
            rows.append([cell.strip().strip("|").strip() for cell in cells])
    return rows


def documented(section: str) -> Fields:
    """The JSON fields of a section: path to type words, with the objects they link to spelled out."""
    fields: Fields = {}
    for name, kind, *_ in table(sections()[section], first="field"):
        path = name.strip("`")
        if link := re.fullmatch(r"(list of )?\[(\w+)\]\(#\2\)", kind):
            below = path + ("[]." if link[1] else ".")
            fields |= {below + inner: kinds for inner, kinds in documented(link[2]).items()}
        else:
            fields[path] = set(kind.split(" or "))
    return fields


def printed(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The JSON fields of a document: path and type word of each."""
    name = path.rpartition(".")[2]
    if isinstance(value, dict) and name not in MAPS:
        for key, item in value.items():
            yield from printed(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for item in value:
            yield from printed(item, path + "[]")
    elif isinstance(value, list):
        yield path, "list of strings" if all(isinstance(item, str) for item in value) else "list"
    else:
        words = {bool: "boolean", int: "number", float: "number", str: "string", dict: "map", type(None): "null"}
        yield path, words[type(value)]


def assert_documented(section: str, documents: list[dict[str, Any]]) -> None:
    """Every printed field is documented with its type, and every documented field and type was printed."""
    fields = documented(section)
    seen: Fields = {}
    for document in documents:
        for path, word in printed(document):
            seen.setdefault(path, set()).add(word)
    for path in list(seen):
        # An empty list, or an object that is null, says nothing about what is in it.
        inside = {field for field in fields if field.startswith((path + "[].", path + "."))}
        if path not in fields and inside and seen[path] <= {"list of strings", "null"}:
            del seen[path]

    assert set(seen) - set(fields) == set(), "printed and not documented"
    assert set(fields) - set(seen) == set(), "documented and never printed"
    assert {path: words for path, words in seen.items() if words - fields[path]} == {}, "printed with another type"
    never = {path: words - seen[path] - {"null"} for path, words in fields.items()}
    assert {path: words for path, words in never.items() if words} == {}, "documented with a type it never has"


def run_words(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (subparsers,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(subparsers.choices)


def test_every_command_is_documented_and_no_other() -> None:
    named = [heading.removeprefix("ckptmgr ") for heading in sections() if heading.startswith("ckptmgr ")]

    assert named == list(COMMANDS) == list(run_words(build_parser()))
    listed = [
        re.search(r"`ckptmgr (\w+)`", row[0])[1] for row in table(PAGE.read_text(encoding="utf-8"), first="command")
    ]
    assert listed == named


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_a_command_is_documented_and_no_other(command: str) -> None:
    section = sections()[f"ckptmgr {command}"]
    actions = run_words(build_parser())[command]._actions
    flags = {option for action in actions for option in action.option_strings}
    common = set(re.findall(r"`(--?[a-z-]+)", str(table(sections()["For every command"], first="flag"))))

    assert common == {"--journal", "--json", "--help"}
    assert set(re.findall(r"`(--?[a-z-]+)", str(table(section, first="flag")))) == flags - common - {"-h"}
    (synopsis,) = re.findall(r"^    (ckptmgr .*)$", section, flags=re.MULTILINE)
    words = [action.metavar or action.dest for action in actions if not action.option_strings]
    assert synopsis.split()[1 : 2 + len(words)] == [command, *words]
    assert set(re.findall(r"(?<!\S)\[?(--[a-z-]+)", synopsis)) == {flag for flag in flags if flag.startswith("--")} - {
        "--help"
    }


def test_the_exit_statuses_are_documented_and_no_other() -> None:
    rows = table(sections()["Exit status"], first="status")

    assert [(int(number), name.strip("`")) for number, name, _ in rows] == [(int(each), each.name) for each in Exit]


def test_help_names_the_same_statuses(ckptmgr: Call) -> None:
    text = ckptmgr("--help").out.partition("exit status:")[2]

    assert [int(number) for number in re.findall(r"(?:^|[,\n] *)(\d+) ", text)] == [int(each) for each in Exit]


def test_every_finding_and_verdict_is_documented() -> None:
    section = sections()["ckptmgr check"]

    assert [row[0].strip("`") for row in table(section, first="finding")] == list(FINDINGS)
    assert {row[0].strip("`") for row in table(section, first="verdict")} == {each.value for each in Verdict}
    for id, _, text in table(section, first="finding"):
        assert text.startswith(FINDINGS[id.strip("`")])


def test_every_finding_about_other_checkpoints_is_documented() -> None:
    section = sections()["Without a journal"]

    assert {row[0].strip("`"): row[2] for row in table(section, first="finding")} == dict(report.FINDINGS)
    assert {row[0].strip("`") for row in table(section, first="verdict")} == {each.value for each in Verdict}


def test_every_finding_and_verdict_of_the_doctor_is_documented() -> None:
    section = sections()["ckptmgr doctor"]

    assert {row[0].strip("`"): row[1] for row in table(section, first="finding")} == dict(storage.FINDINGS)
    assert [row[0].strip("`") for row in table(section, first="verdict")] == [each.value for each in storage.Verdict]


def test_every_action_is_documented() -> None:
    (text,) = [row[2] for row in table(sections()["action"], first="field") if row[0] == "`action`"]
    kinds = [kind for kind in vars(recovery).values() if isinstance(kind, type) and hasattr(kind, "changes")]

    names = {kind.name for kind in kinds if isinstance(getattr(kind, "name", None), str)}

    assert len(names) == 8
    assert set(re.findall(r"`(\w+)`", text)) == names


# The JSON of each command, over runs that between them have everything in it


@pytest.fixture
def full(run: Run) -> Run:
    """A run with every kind of row."""
    first = run.save(500, metrics={"loss": 2.5}, per_rank=["data"])
    run.save(1000, until=S.FAILED, failures=[{"rank": 1, "host": "n", "cause": "c", "silent": True}])
    run.save(1000, decisions=[(first.id, "keep", ("last 2",))])
    second = run.save(1000, overwrite=True)
    third = run.save(1500, retire=[RetirementMark(first.id, "no rule keeps it")])
    shutil.rmtree(run.directory / first.directory)
    run.journal.finish_retirement(first.id, epoch=run.epoch)
    run.journal.record_verification(third.id, level="digest", ok=False, mismatches=["digest: a"])
    run.journal.record_verification(second.id, level="size", ok=True, mismatches=[])
    run.save(2000, until=S.FAILED)
    run.save(2500, until=S.WRITING)
    return run


def test_json_of_ls(full: Run, ckptmgr: Call) -> None:
    newest = full.journal.newest("checkpoint", 1)[0]
    full.save(9000, series="hf", layout=Format.HUGGINGFACE, decisions=[(newest.id, "keep", ("last 1",))])
    assert_documented("ckptmgr ls", [ckptmgr("ls", full.directory, "--all", "--json").json])


def test_json_of_show(full: Run, ckptmgr: Call) -> None:
    steps = (500, 1000, 1500, 2000, 2500)
    documents = [ckptmgr("show", full.directory, step, "--json").json for step in steps]

    full.save(
        500, until=S.FAILED, series="hf", layout=Format.HUGGINGFACE, failures=[{"rank": 0, "host": "n", "cause": "c"}]
    )
    documents.append(ckptmgr("show", full.directory, 500, "--series", "hf", "--json").json)

    assert_documented("ckptmgr show", documents)


def test_json_of_log(full: Run, ckptmgr: Call) -> None:
    document = ckptmgr("log", full.directory, "--json").json

    assert_documented("ckptmgr log", [document])

    with start("log", full.directory, "--follow", "--json") as child:
        lines = [json.loads(child.stdout.readline()) for _ in document["transitions"]]
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=30)

    assert lines == document["transitions"]


def test_json_of_latest(full: Run, ckptmgr: Call) -> None:
    none = ckptmgr("latest", full.directory, "--series", "hf", "--json").json

    assert_documented("ckptmgr latest", [ckptmgr("latest", full.directory, "--json").json, none])
    assert none["path"] is None


def test_json_of_check(full: Run, ckptmgr: Call) -> None:
    documents = [ckptmgr("check", full.directory, "--deep", "--world-size", 4, "--json").json]
    shutil.rmtree(full.directory / "checkpoint/step-1000")
    documents.append(ckptmgr("check", full.directory, "--json").json)
    documents.append(ckptmgr("check", full.directory, "--series", "hf", "--json").json)

    assert_documented("ckptmgr check", documents)
    assert documents[-1]["reports"][0]["chosen"] is None


def test_json_of_why(full: Run, ckptmgr: Call) -> None:
    full.journal.pin("checkpoint", 1500, note="mine")
    full.save(
        3000, series="hf", layout=Format.HUGGINGFACE, until=S.FAILED, failures=[{"rank": 0, "host": "n", "cause": "c"}]
    )
    documents = [ckptmgr("why", full.directory, step, "--json").json for step in (500, 1000, 1500, 2000, 2500)]
    exported = full.save(3500, series="hf", layout=Format.HUGGINGFACE)
    full.save(4000, series="hf", layout=Format.HUGGINGFACE, decisions=[(exported.id, "keep", ("last 2",))])
    documents += [ckptmgr("why", full.directory, step, "--series", "hf", "--json").json for step in (3000, 3500)]
    (full.directory / "checkpoint/step-1500/model.bin").write_bytes(b"short")
    documents.append(ckptmgr("why", full.directory, 1500, "--json").json)

    assert_documented("ckptmgr why", documents)
    told = {attempt["verdict"] for document in documents for attempt in document["attempts"]}
    verdicts = {row[0].strip("`") for row in table(sections()["ckptmgr why"], first="verdict")}
    assert told == {"kept", "not resumable", "retiring", "retired", "failed", "in flight"}
    assert verdicts == told | {"interrupted"}


def test_json_of_prune(full: Run, ckptmgr: Call) -> None:
    for step in (10, 20, 30):
        full.save(step, series="other")
    words = ("prune", full.directory, "--series", "other", "--keep-last", 1, "--json")
    documents = [ckptmgr(*words).json]
    full.crash()
    assert ckptmgr("recover", full.directory, "--apply").code == 0
    documents.append(ckptmgr(*words, "--apply").json)

    assert [document["applied"] for document in documents] == [False, True]
    assert [len(document["drop"]) for document in documents] == [2, 2]
    # The one who is asked to do it: see test_cli_prune.py.
    documents.append({**documents[-1], "by": "CheckpointManager, pid 1 on node-1, since 2026-01-01 00:00:00Z"})
    assert_documented("ckptmgr prune", documents)


@pytest.mark.parametrize("command", ["pin", "unpin"])
def test_json_of_pin_and_unpin(run: Run, ckptmgr: Call, command: str) -> None:
    run.save(500)
    if command == "unpin":
        run.journal.pin("checkpoint", 500, note="mine")
    documents = [ckptmgr(command, run.directory, 500, "--json").json for _ in range(2)]

    assert [document["changed"] for document in documents] == [True, False]
    documents.append({**documents[-1], "by": "CheckpointManager, pid 1 on node-1, since 2026-01-01 00:00:00Z"})
    assert_documented(f"ckptmgr {command}", documents)


def test_json_of_check_without_a_journal(tmp_path: Path, ckptmgr: Call) -> None:
    whole, torn, empty = tmp_path / "whole", tmp_path / "torn", tmp_path / "empty"
    for directory in (whole, torn):
        directory.mkdir()
        for step in (1, 2):
            (directory / f"epoch=0-step={step}.ckpt").write_bytes(b"\x80\x04N.")
    (torn / "epoch=0-step=2.ckpt").write_bytes(b"")
    (torn / "last.ckpt").symlink_to("nothing")
    empty.mkdir()
    (empty / "latest_checkpointed_iteration.txt").write_text("5")
    documents = [ckptmgr("check", directory, "--json").json for directory in (whole, torn, empty)]

    assert_documented("Without a journal", documents)
    assert [document["exit_code"] for document in documents] == [0, 4, 3]


def test_json_of_adopt(tmp_path: Path, run: Run, ckptmgr: Call) -> None:
    for step in (1, 2, 3):
        run.save(step)
    (run.directory / "checkpoint").rename(tmp_path / "theirs")
    (tmp_path / "theirs/step-2/model.bin").write_bytes(b"")
    (tmp_path / "theirs/step-3").rename(tmp_path / "theirs/final")
    words = ("adopt", tmp_path / "new", "--from", tmp_path / "theirs", "--json")
    documents = [ckptmgr(*words).json, ckptmgr(*words, "--apply").json, ckptmgr(*words).json]

    assert_documented("ckptmgr adopt", documents)
    assert [document["exit_code"] for document in documents] == [0, 0, 3]


def test_json_of_verify(full: Run, ckptmgr: Call) -> None:
    full.journal.record_verification(4, level="digest", ok=True, mismatches=[])
    full.save(3000, series="new")
    full.rundir.acquire("train.py")
    documents = [ckptmgr("verify", full.directory, "--json").json]
    full.rundir.release()
    (full.directory / "checkpoint/step-1500/model.bin").unlink()
    documents.append(ckptmgr("verify", full.directory, "--json").json)

    assert documents[-1]["exit_code"] == 5
    documents.append({**documents[-1], "by": "CheckpointManager, pid 1 on node-1, since 2026-01-01 00:00:00Z"})
    assert_documented("ckptmgr verify", documents)


def test_json_of_watch(full: Run, ckptmgr: Call) -> None:
    full.save(10, series="hf", layout=Format.HUGGINGFACE)
    full.save(20, series="new", until=S.WRITING, files={"__0_0.distcp": b"x", "__1_0.distcp": b"y"})
    with start("watch", full.directory, "--json") as child:
        documents = [json.loads(child.stdout.readline())]
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=30)
    full.save(30, series="like", files={"__0_0.distcp": b"x", "__1_0.distcp": b"y"})
    full.save(40, series="like", until=S.WRITING, files={"__0_0.distcp": b"x", "__1_0.distcp": b"y"})
    full.save(50, series="who", until=S.FAILED, failures=[{"rank": 1, "host": "n", "cause": "c"}])
    full.start(pid=NO_PROCESS)
    documents.append(ckptmgr("watch", full.directory, "--json").json)

    assert child.returncode == 130
    assert_documented("ckptmgr watch", documents)


def test_json_of_stats(full: Run, ckptmgr: Call) -> None:
    full.save(100, series="once", until=S.FAILED)
    documents = [ckptmgr("stats", full.directory, "--json").json]
    for name in ("checkpoint", "once"):
        full.save(9000, series=f"{name}-again")
        full.save(9500, series=f"{name}-again")
    (full.directory / "checkpoint").rename(full.directory.parent / "away")
    documents.append(ckptmgr("stats", full.directory, "--json").json)
    full.directory.rename(full.directory.parent / "gone")
    documents.append(ckptmgr("stats", full.directory, "--json").json)

    assert_documented("ckptmgr stats", documents)


def test_json_of_recover(full: Run, ckptmgr: Call, tmp_path: Path) -> None:
    documents = [ckptmgr("recover", full.directory, "--json").json]
    # A checkpoint that an overwrite set aside and then lost its own bytes; one that is given up; one that
    # is gone; a stranger; and one that can be rolled forward.
    torn = Run(tmp_path / "runs" / "torn")
    old = torn.save(500)
    new = torn.save(500, overwrite=True, until=S.GATHERED, published=True)
    (torn.directory / new.directory / "model.bin").unlink()
    assert (torn.directory / old.retired_directory).is_dir()
    gone = torn.save(500, series="gone")
    shutil.rmtree(torn.directory / gone.directory)
    retiring = torn.save(600, series="gone")
    torn.journal.mark_retiring([RetirementMark(retiring.id, "old")], epoch=torn.epoch)
    (torn.directory / "gone" / "backup").mkdir()
    torn.save(700, series="whole", until=S.GATHERED)
    replaced = torn.save(800, series="again")
    torn.save(800, series="again", overwrite=True, until=S.GATHERED)
    assert (torn.directory / replaced.directory).is_dir()
    documents.append(ckptmgr("recover", torn.directory, "--json").json)
    torn.crash()
    documents.append(ckptmgr("recover", torn.directory, "--json").json)
    documents.append(ckptmgr("recover", torn.directory, "--apply", "--json").json)

    assert_documented("ckptmgr recover", documents)
    assert documents[-1]["set_aside"]
    kinds = {action["action"] for document in documents for action in document["actions"]}
    assert len(kinds) == 8


def test_json_of_recover_rebuild(full: Run, ckptmgr: Call) -> None:
    (full.directory / "checkpoint/step-1500/model.bin").unlink()
    full.journal.close()
    full.journal_path.write_bytes(b"not a database " * 1000)
    documents = [
        ckptmgr("recover", full.directory, "--rebuild", "--json").json,
        ckptmgr("recover", full.directory, "--rebuild", "--apply", "--json").json,
    ]

    assert_documented("With --rebuild", documents)
    assert [document["applied"] for document in documents] == [False, True]


def test_json_of_upgrade(run: Run, ckptmgr: Call) -> None:
    run.journal.close()
    document = ckptmgr("upgrade", run.directory, "--json").json
    # A real backup needs an older schema, of which there is none yet: its type is checked by hand.
    document["backup"] = document["backup"] or "a path"

    assert_documented("ckptmgr upgrade", [document])


def test_json_of_report(full: Run, ckptmgr: Call, tmp_path: Path) -> None:
    none = Run(tmp_path / "runs" / "none")
    documents = [
        ckptmgr("report", each.directory, "-o", tmp_path / "report.html", "--json").json for each in (full, none)
    ]

    assert_documented("ckptmgr report", documents)


def test_json_of_serve(full: Run) -> None:
    with start("serve", full.directory, "--port", "0", "--json") as child:
        document = json.loads(child.stdout.readline())
        child.send_signal(signal.SIGINT)
        child.communicate(timeout=30)

    assert_documented("ckptmgr serve", [document])


def test_json_of_metrics(full: Run, ckptmgr: Call, tmp_path: Path) -> None:
    words = ("metrics", full.directory, "--json")
    documents = [ckptmgr(*words).json, ckptmgr(*words, "-o", tmp_path / "alpha.prom").json]

    assert_documented("ckptmgr metrics", documents)


def test_json_of_completion(ckptmgr: Call) -> None:
    assert_documented("ckptmgr completion", [ckptmgr("completion", "bash", "--json").json])


def test_json_of_doctor(ckptmgr: Call, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    documents = [
        ckptmgr("doctor", tmp_path, "--need", "1GB", "--json").json,
        ckptmgr("doctor", tmp_path / "new" / "run", "--journal", tmp_path / "elsewhere" / "j.db", "--json").json,
    ]

    assert_documented("ckptmgr doctor", documents)
    assert [len(document["places"]) for document in documents] == [1, 2]


def test_json_of_an_error(ckptmgr: Call, tmp_path: Path) -> None:
    assert_documented("Errors as JSON", [ckptmgr("ls", tmp_path / "nope", "--json").json])


def test_the_page_is_held_to_the_fields_that_are_printed() -> None:
    """The comparison itself can fail."""
    fields = {path: next(iter(kinds - {"null"})) for path, kinds in documented("ckptmgr latest").items()}
    values = {"string": "x", "number": 1, "boolean": True}

    def build(without: str = "", **more: Any) -> dict[str, Any]:
        document: dict[str, Any] = {"run": {}}
        for path, kind in fields.items():
            if path != without:
                head, _, tail = path.rpartition(".")
                (document["run"] if head else document)[tail] = values[kind]
        return {**document, **more}

    assert_documented("ckptmgr latest", [build()])
    for wrong in (build(without="path"), build(extra=1), build(step="7")):
        with pytest.raises(AssertionError):
            assert_documented("ckptmgr latest", [wrong])
