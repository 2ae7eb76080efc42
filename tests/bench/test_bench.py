"""The bench in small: its statistics, targets and pages, and one run of ckptmgr, the floor and `dcp.save`."""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from bench import machine, peers, render, rounds, targets, worker, workloads
from bench.figures import Figure, Figures

# --- figures and targets -----------------------------------------------------------------------


def found(samples: dict[tuple[str, str, str], list[float]], **abouts: dict[str, Any]) -> Figures:
    """Figures of made-up samples; *abouts* by peer, with ``_`` for blanks."""
    results = rounds.Results()
    for (workload, peer, measure), values in samples.items():
        results.about(workload, peer).update({"state_bytes": 100 << 20, "syncs": True, "asynchronous": True})
        results.about(workload, peer).update(abouts.get(peer.replace(" ", "_").replace(".", "_"), {}))
        for number, value in enumerate(values):
            results.add(workload, peer, number, **{measure: value})
    return Figures(rounds.Results.from_json(results.to_json()))


def verdict(figures: Figures, target: str, what: str) -> targets.Verdict:
    (one,) = [one for one in targets.judge(figures) if one.check.target == target and one.check.what == what]
    return one


def test_a_figure_is_the_median_and_the_range() -> None:
    assert Figure.of([3.0, 1.0, 10.0]) == Figure(3.0, 1.0, 10.0, 3)


def test_a_ratio_is_to_the_best_of_the_others_that_were_measured() -> None:
    figures = found({("train", peer, "stall_s"): [value] for peer, value in {"a": 3.0, "b": 2.0, "c": 1.5}.items()})

    assert figures.ratio("train", "stall_s", "a", ("b", "c", "d")) == (2.0, "c")
    assert figures.ratio("train", "stall_s", "a", ("d",)) is None
    assert figures.ratio("train", "stall_s", "d", ("a",)) is None


def test_a_ratio_is_of_the_rounds_that_both_were_measured_in() -> None:
    samples = {("train", "a", "stall_s"): [2.0, 2.0, 9.0, 9.0, 9.0], ("train", "b", "stall_s"): [1.0, 1.0]}

    assert found(samples).ratio("train", "stall_s", "a", ("b",)) == (2.0, "b")
    assert found(samples).ratio("train", "stall_s", "b", ("a",)) == (0.5, "a")


def test_a_peer_that_saves_something_else_is_no_rival() -> None:
    samples = {("train", peer, "stall_s"): [value] for peer, value in {"ckptmgr": 3.0, "b": 2.0, "c": 1.0}.items()}
    figures = found(samples, c={"wrong_tensors": 1})

    assert figures.ratio("train", "stall_s", "ckptmgr", ("b", "c")) == (1.5, "b")
    assert verdict(figures, "T1", "stall, train, to the best peer").against == "b"
    assert "**1 tensors were not those of the save**" in render.report(figures)


def test_training_that_is_lost_counts_as_the_stall_at_least() -> None:
    samples = {
        ("train", "floor", "lost_s"): [-0.5], ("train", "floor", "training_stall_s"): [0.1],
        ("train", "ckptmgr", "lost_s"): [0.2], ("train", "ckptmgr", "training_stall_s"): [0.1],
    }  # fmt: skip

    assert found(samples).ratio("train", "lost_s", "ckptmgr", ("floor",)) == (2.0, "floor")


@pytest.mark.parametrize(
    ("ours", "word"), [([0.9, 1.1, 1.0], "met"), ([1.0, 1.2, 1.3], "NOT met"), ([], "not measured")]
)
def test_a_target_is_judged_by_medians(ours: list[float], word: str) -> None:
    figures = found({("train", "ckptmgr", "stall_s"): ours, ("train", "floor", "stall_s"): [1.0, 5.0, 0.1]})

    assert verdict(figures, "T1", "stall, train, to the floor").word == word


def test_every_target_has_a_check_and_none_is_met_by_a_run_that_measured_nothing() -> None:
    judged = targets.judge(Figures(rounds.Results()))

    assert {one.check.target for one in judged} >= {f"T{number}" for number in range(1, 18)}
    assert {one.word for one in judged} == {"not measured"}


@pytest.mark.parametrize("check", targets.CHECKS, ids=lambda check: f"{check.target}: {check.what}")
def test_every_check_can_be_met_and_missed(check: targets.Check) -> None:
    """Nothing is hard-coded: the same check says one thing of one run and another of another."""
    words = {check.judge(everything(factor)).word for factor in (1e-4, 1e4)}

    assert words == {"met", "NOT met"}


def everything(factor: float) -> Figures:
    """A run in which ckptmgr takes *factor* of what every other peer takes, in every measure."""
    measures = (
        "stall_s", "first_stall_s", "durable_s", "lost_s", "slowed", "extra_bytes", "load_warm_s", "load_cold_s",
        "load_meanwhile_warm_s", "load_meanwhile_cold_s", "load_unverified_warm_s", "load_unverified_cold_s",
        "load_stock_warm_s", "helper_user_s", "training_stall_s",
    )  # fmt: skip
    results = rounds.Results()
    ours = factor > 1
    worlds = [
        f"{kind}, {n} ranks" for kind in ("fsdp", "fsdp export", "small tensors", "one tensor") for n in (1, 2, 4)
    ]
    for workload in ("train", "export", "moe", *worlds):
        for peer in (*peers.PEERS, "copy", "gather + save_file"):
            about = results.about(workload, peer)
            about |= {"state_bytes": 1 << 30, "syncs": True, "asynchronous": True, "family": "dcp"}
            about["in_thread"] = "thread" in peer
            share = 1.0
            if peer.startswith("ckptmgr"):
                about["wrong_tensors"] = int(ours and workload == "export")
                share = factor
            for measure in measures:
                more = share
                if peer in ("ckptmgr", "ckptmgr export") and measure == "first_stall_s":
                    more *= factor
                if peer == "ckptmgr both" or (workload.startswith("small") and "1 ranks" not in workload):
                    more *= factor
                if peer == "floor" and measure == "durable_s" and ours:
                    more = 2.0  # against the floor that does not digest
                results.add(workload, peer, 0, **{measure: more * (100 << 20 if measure == "extra_bytes" else 1.0)})
    for number in (10, 10_000):
        for measure in ("small_durable_s", "find_s", "journal_on_thread_s"):
            value = factor * (factor if number > 10 or measure == "journal_on_thread_s" else 1.0)
            results.add(f"journal, {number}", "ckptmgr", 0, **{measure: value})
        results.add(f"journal, {number}", "ckptmgr", 0, listing_s=1.0)
        results.about(f"journal, {number}", "ckptmgr")
    results.about("moe 100000", "ckptmgr").update({"problem": "too many open files"} if ours else {})
    return Figures(results)


# --- pages -------------------------------------------------------------------------------------


def test_the_report_has_every_question_and_a_row_for_what_failed() -> None:
    figures = everything(0.5)
    figures.results.about("train", "orbax")["problem"] = "No module | named 'orbax'"
    text = render.report(figures)

    for heading in ("### Train", "### Export", "### Moe", "### Several ranks", "### A long history", "### Targets"):
        assert heading in text
    assert "train, orbax: **could not be measured to the end**: No module   named 'orbax'" in text
    assert "| ckptmgr | 0.250 | 0.500 | 0.500× |" in text


def test_the_page_keeps_what_stands_around_its_place_and_is_the_same_when_written_again(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"# Performance\n\nabove\n\n{render.BEGIN}\nolder figures\n{render.END}\n\nbelow\n")
    render.write_docs(everything(0.5), page)
    text = page.read_text()
    render.write_docs(everything(0.5), page)

    assert page.read_text() == text
    assert text.startswith("# Performance\n\nabove\n\n")
    assert text.endswith(f"{render.END}\n\nbelow\n")
    assert "older figures" not in text
    named = {line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")}
    assert named == {f"performance/{path.name}" for path in (tmp_path / "performance").iterdir()}
    assert "performance/train-stall.svg" in named


def test_a_later_run_replaces_what_it_has_measured_again_and_says_so() -> None:
    facts = machine.facts(Path(), Path())
    first = dataclasses.replace(everything(0.5).results, machine=facts)
    later = rounds.Results(machine={**facts, "began": 0.0, "ckptmgr": "cafe"})
    later.about("moe", "ckptmgr")["state_bytes"] = 1
    later.add("moe", "ckptmgr", 1, stall_s=4711.0)
    figures = Figures(first.with_later(later))

    assert figures.median("moe", "ckptmgr", "stall_s") == 4711.0
    assert figures.peers("moe") == ["ckptmgr"]
    assert figures.median("train", "ckptmgr", "stall_s") == Figures(first).median("train", "ckptmgr", "stall_s")
    assert "1970-01-01, ckptmgr at cafe: measured again, moe." in render.machine(figures)


def test_a_page_without_the_place_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Performance\n")

    with pytest.raises(ValueError, match="has no lines"):
        render.write_docs(everything(0.5), page)


@pytest.mark.parametrize("values", [(0.1, 0.2), (0.001, 20.0), (-0.5, 0.2), (0.0, 0.0)])
def test_a_chart_is_well_formed_and_its_bars_are_inside(values: tuple[float, float]) -> None:
    bars = [(f"<{n}>", Figure(value, value - 0.01, value + 0.01, 3)) for n, value in enumerate(values)]
    root = ElementTree.fromstring(render.svg(render.Chart("a", "what & why", "s", bars)))

    width = float(root.attrib["viewBox"].split()[2])
    boxes = [(float(one.attrib["x"]), float(one.attrib["width"])) for one in root.iter() if one.tag.endswith("rect")]
    assert len(boxes) == 2
    assert all(left >= 0 and size > 0 and left + size <= width for left, size in boxes)


# --- the measuring -----------------------------------------------------------------------------


def test_a_workload_has_the_size_that_was_asked_for() -> None:
    for workload in ("train", "export"):
        layout = workloads.specs(workload, 200 << 20)
        assert sum(spec.nbytes for spec in layout) == pytest.approx(200 << 20, rel=0.05)
        assert all(one.offset + one.nbytes <= two.offset for one, two in itertools.pairwise(layout))
    assert [spec.nbytes for spec in workloads.specs("moe", 7)] == [4096] * 7


def test_what_a_tree_of_processes_holds_is_seen() -> None:
    with machine.Watch(os.getpid()) as watch:
        before = watch.held()
        memory = mmap.mmap(-1, 64 << 20)
        memory[:: mmap.PAGESIZE] = b"x" * len(range(0, 64 << 20, mmap.PAGESIZE))
        private = watch.held() - before
        file = os.memfd_create("shared")
        os.truncate(file, 64 << 20)
        shared = mmap.mmap(file, 64 << 20)
        shared[:: mmap.PAGESIZE] = b"x" * len(range(0, 64 << 20, mmap.PAGESIZE))
        both = watch.held() - before
        memory.close()
        shared.close()
        os.close(file)

    assert private == pytest.approx(64 << 20, rel=0.1)
    assert both == pytest.approx(128 << 20, rel=0.1)
    assert watch.peak_bytes >= before + both


class Late(peers.SaveFile):
    """Returns before it has looked at the state."""

    def save(self, step: int) -> None:
        self._step = step

    def finish(self) -> None:
        super().save(self._step)


@pytest.mark.parametrize(("kind", "wrong"), [(peers.SaveFile, 0), (Late, 8)])
def test_a_peer_that_saves_what_the_state_became_later_is_found(
    kind: type[peers.Peer], wrong: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(peers.PEERS, "tried", (kind, ("moe",), ()))
    descriptor = workloads.memory_file(workloads.specs("moe", 8))
    order = {"peer": "tried", "workload": "moe", "size": 8, "descriptor": descriptor, "folder": str(tmp_path)}
    service = worker.Service(order | {"calibration_s": 0.1})
    os.close(descriptor)
    service.fill(1)

    assert service.check()["wrong_tensors"] == wrong


@pytest.mark.timeout(300)  # on a busy machine
def test_ckptmgr_the_floor_and_dcp_save_are_measured_and_a_peer_that_cannot_be_had_is_a_row(tmp_path: Path) -> None:
    names = ["floor", "ckptmgr", "dcp.save", "orbax"]
    plan = rounds.Plan(
        workload="train", size=4 << 20, peers=names, rounds=1, seed=1, training={"ckptmgr": 1}, budget_s=60.0,
        always=(), folder=tmp_path, calibration_s=0.1, cold=False,
    )  # fmt: skip
    results = rounds.Results()
    rounds.run(plan, results)
    figures = Figures(results)

    for peer in names[:3]:
        assert "problem" not in results.about("train", peer)
        assert results.about("train", peer)["wrong_tensors"] == 0
        for measure in ("first_stall_s", "stall_s", "durable_s", "load_warm_s", "extra_bytes"):
            assert (figure := figures.get("train", peer, measure)) is not None
            assert figure.median > 0
        assert figures.get("train", peer, "lost_s") is not None or peer != "ckptmgr"
    assert (written := figures.get("train", "floor", "written_bytes")) is not None
    assert written.median >= figures.state_bytes("train")  # type: ignore[operator]
    assert list(tmp_path.glob("*/")) == []
    assert verdict(figures, "T1", "stall, train, to the floor").value is not None
    assert verdict(figures, "T17", "tensors that come back changed").word == "met"
    if "problem" in results.about("train", "orbax"):
        assert "orbax" in render.report(figures)


# --- ranks -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_save_costs_by_the_number_of_ranks_is_a_row_for_each(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "tools" / "bench" / "scaling.py"
    command = [sys.executable, str(script), "--ranks", "1", "2", "--saves", "1", "--folder", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    head, _, *rows = ended.stdout.splitlines()

    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 2"]
    assert {len(row.split(" | ")) for row in [head, *rows]} == {9}
