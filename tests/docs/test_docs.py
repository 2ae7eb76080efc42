"""What the documentation says is what the code does: diagram, tables, names, signatures, links, examples."""

from __future__ import annotations

import ast
import dataclasses
import html
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import CheckConstraint

import ckptmgr
from ckptmgr import errors, filesystems, manifest, options, rundir, storage
from ckptmgr.cli import COMMANDS
from ckptmgr.foreign import LAYOUTS, report
from ckptmgr.journal import declared, schema
from ckptmgr.lifecycle import CheckpointState, Format
from ckptmgr.resume import FINDINGS, Verdict
from ckptmgr.writers import dcp, huggingface, mappings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
PROSE = [*PAGES, "README.md", "CONTRIBUTING.md", "SECURITY.md"]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def sections(page: Path) -> dict[str, str]:
    """Each heading of a page, down to the third level, and the text below it, up to the next such heading."""
    text = re.sub(r"^```.*?^```$", lambda m: m[0].replace("#", "\0"), page.read_text(), flags=re.DOTALL | re.MULTILINE)
    pieces = re.split(r"^#{1,3} (.+?)(?: \{.*\})?$", text, flags=re.MULTILINE)
    return {name: body.replace("\0", "#") for name, body in zip(pieces[1::2], pieces[2::2], strict=True)}


def table(text: str, *, first: str) -> list[list[str]]:
    """The rows of the tables in *text* whose first column is called *first*."""
    rows: list[list[str]] = []
    taking = False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells:
            taking = False
        elif cells[0] == first:
            taking = True
        elif taking and set(line) - set("|- "):
            rows.append(cells)
    return rows


def code(cell: str) -> str:
    """What stands in backticks in a cell; empty if nothing does."""
    found = re.fullmatch(r"`(.*)`|<code>(.*)</code>", cell)
    return html.unescape(found[1] or found[2]) if found else ""


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


# -- the state machine ------------------------------------------------------------------------------


def draw_lifecycle(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "draw_lifecycle.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_diagram_is_drawn_from_the_transition_table() -> None:
    done = draw_lifecycle("--check")

    assert done.returncode == 0, done.stdout + done.stderr


def test_a_diagram_of_another_state_machine_is_found_and_redrawn(tmp_path: Path) -> None:
    page = tmp_path / "states.md"
    current = (REFERENCE / "states.md").read_text(encoding="utf-8")
    page.write_text(current.replace("GATHERED --> COMMITTED", "WRITING --> COMMITTED"), encoding="utf-8")

    assert draw_lifecycle("--check", "--page", str(page)).returncode == 1
    assert draw_lifecycle("--page", str(page)).returncode == 0
    assert page.read_text(encoding="utf-8") == current


def test_every_state_is_described_and_no_other() -> None:
    rows = table(sections(REFERENCE / "states.md")["What each state means"], first="state")

    assert [code(row[0]) for row in rows] == [state.value for state in CheckpointState]


# -- options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [options.Timeouts, options.WriterOptions])
def test_every_option_is_documented_with_variable_unit_and_default(kind: type) -> None:
    rows = table(sections(REFERENCE / "options.md")[kind.__name__], first="option")
    fields = dataclasses.fields(kind)
    defaults = options.defaults()

    assert [code(row[0]) for row in rows] == [field.name for field in fields]
    for name, variable, unit, default, meaning in rows:
        assert code(variable) == options.variable(code(name))
        assert (unit == "seconds") == code(name).endswith("_s")
        value = defaults[code(name)]
        assert default == (f"{value:g}" if isinstance(value, float) else str(value))
        assert meaning


@pytest.mark.parametrize("name", ["CheckpointManager", "Series", "HuggingFace", "PerRank"])
def test_every_constructor_argument_is_documented_with_its_default(name: str) -> None:
    rows = table(sections(REFERENCE / "options.md")[name], first="argument")
    documented = [(code(row[0]), code(row[1]) or row[1]) for row in rows]

    assert documented == [(argument, default or "required") for argument, default in arguments(getattr(ckptmgr, name))]


def test_every_keep_rule_is_documented_with_its_arguments() -> None:
    rows = table(sections(REFERENCE / "options.md")["Keep rules"], first="rule")
    documented = [(code(row[0]), code(row[1]), code(row[2]) or row[2]) for row in rows]

    expected = []
    for name in ("KeepAll", "KeepLast", "KeepEvery", "KeepBest", "KeepFor"):
        taken = arguments(getattr(ckptmgr, name))
        expected += [(name, argument, default or "required") for argument, default in taken] or [(name, "", "")]
    assert documented == expected


# -- errors and findings ----------------------------------------------------------------------------


def error_classes(
    root: type[errors.CheckpointError] = errors.CheckpointError,
) -> Iterator[type[errors.CheckpointError]]:
    yield root
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from error_classes(kind)


def facts_of(kind: type[errors.CheckpointError]) -> list[str]:
    if kind is errors.CheckpointError:
        return ["hint"]
    return [name for name in inspect.get_annotations(kind) if name != "hint"]


def test_the_tree_of_errors_is_documented_with_bases_and_facts() -> None:
    rows = table(sections(REFERENCE / "errors.md")["The tree"], first="error")
    documented = [(code(row[0]), codes(row[1]), codes(row[2]), codes(row[3])) for row in rows]

    expected = []
    for kind in error_classes():
        ours = [base.__name__ for base in kind.__bases__ if issubclass(base, errors.CheckpointError)]
        built_in = [base.__name__ for base in kind.__bases__ if not issubclass(base, errors.CheckpointError)]
        if kind is errors.CheckpointError:
            ours, built_in = [], []
        expected.append((kind.__name__, ours, built_in, facts_of(kind)))
    assert documented == expected


@pytest.mark.parametrize("kind", list(error_classes())[1:], ids=lambda kind: kind.__name__)
def test_every_error_is_described_with_its_hint_and_facts(kind: type[errors.CheckpointError]) -> None:
    section = sections(REFERENCE / "errors.md")[kind.__name__]
    hint = kind.__dict__.get("hint", "")

    assert (kind.__doc__ or "").strip().splitlines()[0] in " ".join(section.split())
    assert (f"Hint: {hint}." if hint else "Hint: given with the instance, or none.") in section
    assert [code(row[0]) for row in table(section, first="fact")] == facts_of(kind)


def test_rank_failures_are_documented_field_by_field() -> None:
    rows = table(sections(REFERENCE / "errors.md")["RankFailure"], first="field")

    assert [code(row[0]) for row in rows] == [field.name for field in dataclasses.fields(errors.RankFailure)]


def test_every_finding_is_documented_with_its_meaning() -> None:
    text = read("docs/reference/findings.md")

    assert {code(row[0]): row[2] for row in table(text, first="id")} == {
        **FINDINGS,
        **storage.FINDINGS,
        **report.FINDINGS,
    }
    explained = {name for line in re.findall(r"^(`[RDF][0-9]+`.*)$", text, flags=re.MULTILINE) for name in codes(line)}
    assert explained == {*FINDINGS, *storage.FINDINGS, *report.FINDINGS}


def test_the_levels_that_a_finding_of_the_doctor_can_have_are_those_of_the_table() -> None:
    rows = table(read("docs/reference/findings.md"), first="id")
    levels = {code(row[0]): row[1].split(", ") for row in rows if code(row[0]) in storage.FINDINGS}

    for judgement in storage.TRIALS.values():
        assert judgement.worst.value in levels[judgement.id], judgement.id
    known = {row.level.value for row in filesystems.FILE_SYSTEMS.values()}
    assert set(levels["D002"]) == known
    assert set(levels["D003"]) == {"ok", *(option.level.value for option in filesystems.OPTIONS)}
    assert {level for each in levels.values() for level in each} == {level.value for level in filesystems.Level}


def test_the_network_file_systems_that_ckptmgr_knows_are_listed() -> None:
    listed = [row[0] for row in table(read("docs/howto/on-shared-storage.md"), first="file system")]
    network = {row.name for row in filesystems.FILE_SYSTEMS.values() if row.kind is filesystems.Kind.NETWORK}

    assert {"NFS", "Lustre", "GPFS", "BeeGFS", "CephFS", "SMB"} <= set(listed) <= network | {"FUSE", "object stores"}


def test_every_layout_of_another_library_is_listed() -> None:
    rows = table(read("docs/howto/judge-other-checkpoints.md"), first="layout")

    assert [row[0] for row in rows] == [layout.LAYOUT for layout in LAYOUTS]


def test_every_verdict_is_documented() -> None:
    rows = table(sections(REFERENCE / "findings.md")["Verdicts"], first="verdict")

    assert [code(row[0]) for row in rows] == [verdict.value for verdict in Verdict]


# -- formats ----------------------------------------------------------------------------------------


def test_every_table_of_the_journal_is_documented_and_no_other() -> None:
    described = [
        name for name in sections(REFERENCE / "journal-schema.md") if name not in ("Journal schema", "Triggers")
    ]

    assert described == list(schema.metadata.tables)


@pytest.mark.parametrize("name", list(schema.metadata.tables))
def test_columns_rules_and_indexes_of_a_table_are_documented(name: str) -> None:
    section = sections(REFERENCE / "journal-schema.md")[name]
    described = schema.metadata.tables[name]

    columns = [(code(row[0]), row[1], row[2], row[3]) for row in table(section, first="column")]
    assert columns == [
        (
            column.name,
            str(column.type),
            "yes" if column.nullable and not column.primary_key else "no",
            ", ".join(
                ["primary"] * column.primary_key
                + [f"`{key.column.table.name}.{key.column.name}`" for key in column.foreign_keys]
            ),
        )
        for column in described.columns
    ]
    assert all(row[4] for row in table(section, first="column"))
    rules = {code(row[0]): code(row[1]) for row in table(section, first="rule")}
    checks = [rule for rule in described.constraints if isinstance(rule, CheckConstraint)]
    assert rules == {str(rule.name): str(rule.sqltext) for rule in checks}
    indexes = {code(row[0]): (codes(row[1]), row[2], code(row[3])) for row in table(section, first="index")}
    assert indexes == {
        str(index.name): (
            [column.name for column in index.columns],
            "yes" if index.unique else "no",
            str(where.text) if (where := index.dialect_options["sqlite"].get("where")) is not None else "",
        )
        for index in described.indexes
    }


def test_triggers_and_revision_of_the_journal_are_documented() -> None:
    text = read("docs/reference/journal-schema.md")

    assert [code(row[0]) for row in table(text, first="trigger")] == list(schema.TRIGGERS)
    assert f"`{declared.REVISION}`" in text
    assert f"`{declared.APPLICATION_ID:#x}`" in text


def test_every_field_of_the_manifest_is_documented() -> None:
    section = sections(REFERENCE / "on-disk-format.md")["The manifest: ckptmgr.json"]

    documented = {code(row[0]) for row in table(section, first="field")}
    assert documented == {"format_version", *(field.name for field in dataclasses.fields(manifest.Manifest))}
    of_a_file = [code(row[0]) for row in table(section, first="field of a file")]
    assert of_a_file == [field.name for field in dataclasses.fields(manifest.FileEntry)]
    versions = [row[3] for row in table(section, first="field") if code(row[0]) == "format_version"]
    assert versions == [str(manifest.FORMAT_VERSION)]


def test_every_name_that_ckptmgr_gives_is_documented() -> None:
    text = read("docs/reference/on-disk-format.md")

    given = (manifest.MANIFEST_NAME, rundir.META_NAME, rundir.RUN_ID_NAME, rundir.LATEST_NAME, mappings.MAPPINGS_NAME)
    for name in (*given, huggingface.WEIGHTS_NAME, huggingface.INDEX_NAME, dcp.per_rank_name(0).replace("0", "<rank>")):
        assert f"`{name}`" in text
    for layout in Format:
        assert f"`{layout.directory_name(0).replace('0', '<step>')}/`" in text
    for suffix in rundir._KINDS:
        assert f".{suffix}/`" in text


# -- the public names -------------------------------------------------------------------------------


def spelled(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def arguments(kind: Any) -> list[tuple[str, str]]:
    """Name and spelled default (empty if there is none) of each argument but self."""
    found = []
    factories = {}
    if dataclasses.is_dataclass(kind):
        factories = {
            field.name: field.default_factory
            for field in dataclasses.fields(kind)
            if field.default_factory is not dataclasses.MISSING
        }
    for name, parameter in inspect.signature(kind).parameters.items():
        if name == "self":
            continue
        default = "" if parameter.default is inspect.Parameter.empty else spelled(parameter.default)
        found.append((name, spelled(factories[name]()) if name in factories else default))
    return found


def signature(name: str, kind: Any) -> str:
    """A call as the reference spells it: names, defaults, and the star before keyword-only arguments."""
    parameters = [one for one in inspect.signature(kind).parameters.values() if one.name != "self"]
    words = []
    for parameter, (argument, default) in zip(parameters, arguments(kind), strict=True):
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in words:
            words.append("*")
        words.append(f"{argument}={default}" if default else argument)
    return f"{name}({', '.join(words)})"


def test_every_public_name_is_documented_and_no_other() -> None:
    described = sections(REFERENCE / "python-api.md")
    headings = {name for name in described if hasattr(ckptmgr, name) and name[0].isupper()}
    listed = set(re.findall(r"^- \[`(\w+)`\]", described["Errors"], flags=re.MULTILINE))

    assert headings | listed == set(ckptmgr.__all__)
    assert headings & listed == set()
    assert listed == {*(kind.__name__ for kind in error_classes()), "RankFailure"}


#: Made by ckptmgr, not by its users, so that their fields are documented and their constructors are not.
GIVEN = ("CheckpointRecord", "CheckpointState", "Committed", "Finding", "PendingSave", "ResumeReport", "Resumed")
MADE = [
    name
    for name in ckptmgr.__all__
    if name not in GIVEN and name != "RankFailure" and not issubclass(getattr(ckptmgr, name), Exception)
]


@pytest.mark.parametrize("name", MADE)
def test_what_users_make_is_documented_with_its_signature(name: str) -> None:
    section = sections(REFERENCE / "python-api.md")[name]

    assert [block.strip() for block in fenced(section, "python")][:1] == [signature(name, getattr(ckptmgr, name))]


def test_every_method_of_the_manager_is_documented_with_its_signature() -> None:
    described = sections(REFERENCE / "python-api.md")
    members = {name: member for name, member in vars(ckptmgr.CheckpointManager).items() if not name.startswith("_")}
    properties = [name for name, member in members.items() if isinstance(member, property)]

    for name in members.keys() - set(properties):
        assert fenced(described[name], "python")[0].strip() == signature(name, members[name])
    assert [code(row[0]) for row in table(described["Properties"], first="property")] == properties
    methods = {name for name in described if name[0].islower()}
    assert methods == members.keys() - set(properties)


@pytest.mark.parametrize("name", [name for name in GIVEN if name != "CheckpointState"])
def test_what_ckptmgr_hands_out_is_documented_member_by_member(name: str) -> None:
    kind = getattr(ckptmgr, name)
    section = sections(REFERENCE / "python-api.md")[name]
    documented = {
        re.sub(r"\(.*\)", "", code(row[0])) for word in ("field", "member") for row in table(section, first=word)
    }
    documented |= set(re.findall(r"^`(\w+)`: ", section, flags=re.MULTILINE))

    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    public = {member for member in vars(kind) if not member.startswith("_")}
    assert documented == fields | public


# -- examples ---------------------------------------------------------------------------------------


def python_blocks() -> Iterator[tuple[str, str]]:
    for page in PROSE:
        for block in fenced(read(page), "python"):
            yield page, block


def test_every_python_block_compiles_and_imports_only_what_there_is() -> None:
    seen = 0
    for page, block in python_blocks():
        for node in ast.walk(ast.parse(re.sub(r", \*, ", ", ", block) if "\n" not in block.strip() else block, page)):
            if isinstance(node, ast.ImportFrom) and node.module == "ckptmgr":
                seen += 1
                assert {alias.name for alias in node.names} <= set(ckptmgr.__all__), page

    assert seen >= 3


def test_only_commands_that_exist_are_named() -> None:
    named = {
        (page, word) for page in PROSE for word in re.findall(r"(?:`|^\$ )ckptmgr ([a-z]+)", read(page), re.MULTILINE)
    }

    assert {word for _, word in named} >= {"ls", "check", "recover"}
    assert {(page, word) for page, word in named if word not in COMMANDS} == set()


def run_script(block: str, directory: Path, *launcher: str) -> str:
    script = directory / "example.py"
    script.write_text(block, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def ckptmgr_says(directory: Path, *words: str) -> str:
    command = [sys.executable, "-m", "ckptmgr", *words]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_ages_and_sizes(listing: str) -> list[list[str]]:
    """The lines of `ckptmgr ls` as words, without age and size, and without the notes that go to stderr."""
    # The sizes vary by a few bytes: a pickled number takes as many as it needs.
    lines = [re.sub(r"\s[0-9]+ (?:s|min)\s+[0-9.]+ k?B\s", " ", line).split() for line in listing.splitlines()]
    return [words for words in lines if words and (words[0] == "SERIES" or "COMMITTED" in words)]


@pytest.mark.slow
def test_the_example_of_the_readme_runs_and_leaves_what_it_shows(tmp_path: Path) -> None:
    (example,) = fenced(read("README.md"), "python")
    (shown,) = re.findall(r"\$ ckptmgr ls runs/alpha\n(.*?)\n\n", read("README.md"), flags=re.DOTALL)

    run_script(example, tmp_path)

    assert without_ages_and_sizes(ckptmgr_says(tmp_path, "ls", "runs/alpha")) == without_ages_and_sizes(shown)
    said = ckptmgr_says(tmp_path, "check", "runs/alpha").strip()
    assert said == f"safe to resume from {tmp_path}/runs/alpha/checkpoint/step-200"
    assert "\n" + said.replace(str(tmp_path), "/data") + "\n" in read("README.md")


@pytest.mark.slow
def test_the_first_example_of_the_quickstart_goes_on_where_it_stopped(tmp_path: Path) -> None:
    one, _ = fenced(read("docs/quickstart.md"), "python")

    assert run_script(one.replace(", 60)", ", 30)"), tmp_path) == "resumed from nothing\n"
    assert run_script(one, tmp_path) == "resumed from 29\n"
    (shown,) = re.findall(r"\$ ckptmgr ls runs/one\n(.*?)\n```", read("docs/quickstart.md"), flags=re.DOTALL)
    listed = [words[:3] for words in without_ages_and_sizes(ckptmgr_says(tmp_path, "ls", "runs/one"))]
    assert [words[:3] for words in without_ages_and_sizes(shown)][-2:] == listed[-2:]


@pytest.mark.slow
def test_the_second_example_of_the_quickstart_resumes_on_another_number_of_ranks(tmp_path: Path) -> None:
    _, several = fenced(read("docs/quickstart.md"), "python")
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")

    run_script(several.replace(", 40)", ", 20)"), tmp_path, *ranks, "2")
    assert "resumed step 19, saved by 2 ranks" in run_script(several, tmp_path, *ranks, "1")


# -- the site ---------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    """The anchor that Markdown gives a heading."""
    explicit = re.search(r"\{ #([\w-]+) \}$", heading)
    if explicit:
        return explicit[1]
    text = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]", "", heading)).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {slug(heading) for heading in re.findall(r"^#{1,6} (.+)$", text, flags=re.MULTILINE)}


def links(page: str) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", read(page), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*\]\([^`\n]*`", "", text))
    return [link for link in found if not link.startswith(("https://", "http://"))]


@pytest.mark.parametrize("page", PROSE)
def test_every_internal_link_leads_somewhere(page: str) -> None:
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


def nav_pages() -> list[str]:
    nav = read("mkdocs.yml").partition("\nnav:\n")[2]
    return re.findall(r"([\w/.-]+\.md)$", nav, flags=re.MULTILINE)


def test_every_page_is_in_the_nav_once_and_nothing_else_is() -> None:
    assert sorted(nav_pages()) == sorted(page.removeprefix("docs/") for page in PAGES)


def test_every_decision_is_in_the_list_of_decisions() -> None:
    listed = re.findall(r"^\| \[(\d{4})\]\((.+?)\)", read("docs/adr/index.md"), flags=re.MULTILINE)

    assert [name for _, name in listed] == sorted(path.name for path in (DOCS / "adr").glob("0*.md"))
    assert all(name.startswith(number) for number, name in listed)
    for _, name in listed:
        needed = ["Context", "Decision", "Consequences", "Alternatives"]
        assert list(sections(DOCS / "adr" / name))[1:] == needed, name


def test_every_page_that_the_code_refers_to_exists() -> None:
    for source in (*(ROOT / "ckptmgr").rglob("*.py"), *(ROOT / "tools").rglob("*.py")):
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", source.read_text(encoding="utf-8")):
            assert (ROOT / page).is_file(), f"{source} refers to {page}"


#: Words that code and messages may not use for anything else.
BINDING_WORDS = {
    *(
        "run",
        "series",
        "step",
        "checkpoint",
        "journal",
        "epoch",
        "attempt",
        "transition",
        "staging",
        "staging directory",
    ),
    *("shard", "manifest", "gather", "publish", "commit", "finalize", "in flight", "resume", "recover", "retire"),
    *("keep rule", "finding", "rank", "world size"),
}


def test_the_glossary_has_one_meaning_for_each_word() -> None:
    text = read("docs/glossary.md")
    words = [row[0] for row in table(text, first="word")]

    assert words == sorted(words, key=str.lower)
    assert len(set(words)) == len(words)
    assert set(words) >= BINDING_WORDS
    avoided = {word for row in table(text, first="instead of") for word in row[0].split(", ")}
    assert avoided & set(words) == set()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=110)

    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "reference" / "states" / "index.html").is_file()
