"""``ckptmgr metrics``: what Prometheus reads, read back by its own parser."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from run_on_disk import NO_PROCESS, Call, Run, S, in_child

from ckptmgr import durability
from ckptmgr.cli import metrics
from ckptmgr.lifecycle import Format

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "watch-durability.md"


def parsed(text: str) -> dict[tuple[str, str], float]:
    """name and series → value; every sample is of run alpha."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            assert sample.labels["run"] == "alpha"
            found[sample.name, sample.labels.get("series", "")] = sample.value
    return found


def test_prometheus_reads_every_number(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.save(600, until=S.FAILED)
    run.save(700, until=S.WRITING)
    run.save(500, series="hf", layout=Format.HUGGINGFACE)
    done = ckptmgr("metrics", run.directory)
    found = parsed(done.out)

    assert (done.code, done.err) == (0, "")
    assert {name for name, series in found if series == "checkpoint"} == {
        "ckptmgr_" + metric.name for metric in durability.METRICS
    }
    assert found["ckptmgr_run_live", ""] == 1
    assert found["ckptmgr_commits_total", "checkpoint"] == 1
    assert found["ckptmgr_failures_total", "checkpoint"] == 1
    assert found["ckptmgr_failures_total", "hf"] == 0
    assert found["ckptmgr_steps_at_risk", "checkpoint"] == 200
    assert found["ckptmgr_stall_seconds_total", "checkpoint"] == 0.25
    assert found["ckptmgr_write_seconds", "hf"] == 12.0


def test_counters_are_counters_and_all_else_are_gauges(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    kinds = dict(re.findall(r"^# TYPE ckptmgr_(\w+) (\w+)$", ckptmgr("metrics", run.directory).out, flags=re.M))

    assert kinds == {"run_live": "gauge"} | {
        metric.name: "counter" if metric.grows else "gauge" for metric in durability.METRICS
    }
    assert all(metric.grows == metric.name.endswith("_total") for metric in durability.METRICS)


def test_a_run_whose_manager_has_gone_is_not_live(run: Run, ckptmgr: Call) -> None:
    run.save(500)
    run.start(pid=NO_PROCESS)

    assert parsed(ckptmgr("metrics", run.directory).out)["ckptmgr_run_live", ""] == 0


def test_a_file_is_replaced_as_a_whole_and_nothing_else_is_overwritten(run: Run, ckptmgr: Call, tmp_path: Path) -> None:
    place = tmp_path / "alpha.prom"
    run.save(500)
    assert ckptmgr("metrics", run.directory, "-o", place).code == 0
    first = place.stat().st_ino
    run.save(600)
    assert ckptmgr("metrics", run.directory, "-o", place).code == 0

    assert place.stat().st_ino != first  # renamed over: a collector never reads half of it
    assert parsed(place.read_text())["ckptmgr_commits_total", "checkpoint"] == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["alpha.prom"]
    (tmp_path / "notes").write_text("mine")
    assert ckptmgr("metrics", run.directory, "-o", tmp_path / "notes").code == 2
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_file_that_cannot_be_written_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    run.save(500)
    place = tmp_path / "alpha.prom"
    done = in_child(
        "metrics", run.directory, "-o", place, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    )

    assert (done.code, str(place) in done.err) == (1, True)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_run_whose_name_is_no_text_is_spelled_out(tmp_path: Path, ckptmgr: Call) -> None:
    odd = Run(tmp_path / os.fsdecode(b"b\xff"))
    odd.save(500)

    assert 'run="b\\\\xff"' in ckptmgr("metrics", odd.directory).out


def test_labels_cannot_break_out_of_their_quotes(tmp_path: Path, ckptmgr: Call) -> None:
    odd = Run(tmp_path / 'a"} 1\n# \\')
    odd.save(500)
    families = list(text_string_to_metric_families(metrics.exposition(
        list(metrics.samples(odd.directory.name, {"checkpoint": {"in_flight": 0.0}}, live=False))
    ).decode()))  # fmt: skip

    assert {sample.labels["run"] for family in families for sample in family.samples} == {odd.directory.name}
    assert ckptmgr("metrics", odd.directory).code == 0


def documented(first: str) -> dict[str, str]:
    rows = re.findall(rf"^\| `{first}(\w+)` \| (.*?) \|$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    return dict(rows)


def test_every_metric_is_documented_with_its_meaning_and_no_other() -> None:
    said = {metric.name: metric.meaning for metric in durability.METRICS}

    assert documented("ckptmgr_") == {metrics.RUN_LIVE: metrics.RUN_LIVE_MEANING, **said}


def test_every_number_of_a_commit_is_documented_with_its_meaning_and_no_other() -> None:
    text = PAGE.read_text(encoding="utf-8").partition("## In the log of the trainer")[2]

    assert dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", text, flags=re.M)) == dict(durability.COMMIT_NUMBERS)
