"""export_memory.py measures what it says, alone and under torchrun, and notices memory that is not given back."""

from __future__ import annotations

import csv
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import export_memory
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

MB = 1_000_000
#: What a writer process takes for itself and Python for what it imports meanwhile, whatever the state's size.
FIXED = 30 * MB


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, moe_intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    folder = tmp_path_factory.mktemp("model")
    config.save_pretrained(folder)
    return folder


def measured(into: Path, model_dir: Path, *arguments: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.run(
        [*start, export_memory.__file__, str(into), "--model", str(model_dir), "--interval", "0.02", *arguments],
        capture_output=True, text=True, timeout=200, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


def rows(into: Path) -> list[dict[str, str]]:
    with (into / "memory.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def peak(samples: list[dict[str, str]], form: str, column: str, phases: tuple[str, ...] = ("save",)) -> int:
    return max(int(row[column]) for row in samples if row["format"] == form and row["phase"] in phases)


def test_the_peak_of_each_format_is_its_state_once_and_what_a_writer_needs(tmp_path, model_dir):
    into = tmp_path / "memory"
    done = measured(into, model_dir)
    assert done.returncode == 0, done.stderr
    samples = rows(into)
    table = {line.split()[0]: line for line in done.stdout.splitlines()[2:]}
    weights = 4 * 13_511_424
    states = {"dcp": 3 * weights, "hf": weights, "both": 4 * weights}

    assert set(table) == set(states)
    for form, state in states.items():
        added = float(re.search(r"([0-9.]+) = [0-9.]+ x state", table[form])[1]) * MB
        # The trainer may give back a few MB of its own between the two samples that this is the difference of.
        assert 0.9 * state <= added <= 1.05 * state + FIXED
        # The arena is the state once, however many saves there were.
        assert state <= peak(samples, form, "shared") <= 1.02 * state + MB
        before, after = (peak(samples, form, "total", (phase,)) for phase in ("before", "after"))
        assert after < before + FIXED / 2
        assert peak(samples, form, "writer_rss", ("after",)) == 0
    assert [path.name for path in into.iterdir()] == ["memory.csv"]


def test_under_torchrun_each_rank_holds_its_own_share(tmp_path, model_dir):
    into = tmp_path / "memory"
    done = measured(into, model_dir, "--formats", "both", "--saves", "2", ranks=2)
    assert done.returncode == 0, done.stderr
    samples = rows(into)
    state = 4 * 4 * 13_511_424 // 2

    assert {row["rank"] for row in samples} == {"0", "1"}
    for rank in ("0", "1"):
        mine = [row for row in samples if row["rank"] == rank]
        assert state <= peak(mine, "both", "shared") <= 1.02 * state + MB
    assert "of 2 ranks" in done.stdout


def test_a_peak_above_the_limit_fails(tmp_path, model_dir):
    done = measured(tmp_path / "memory", model_dir, "--formats", "hf", "--saves", "1", "--limit", "0.5")

    assert done.returncode == 1, done.stderr
    assert "above 0.5 x state: hf" in done.stdout


def test_a_directory_without_a_model_is_refused(tmp_path):
    done = measured(tmp_path / "memory", tmp_path)

    assert done.returncode == 3
    assert "config.json" in done.stderr


def test_shared_memory_counts_once_and_private_memory_where_it_is():
    before = export_memory.memory_of(os.getpid())
    private = bytearray(os.urandom(MB)) * 64
    shared = mmap.mmap(-1, 32 * MB)
    shared.write(b"\1" * (32 * MB))
    after = export_memory.memory_of(os.getpid())

    assert 31 * MB < after["RssShmem"] - before["RssShmem"] < 34 * MB
    assert 63 * MB < after["Pss_Anon"] - before["Pss_Anon"] < 70 * MB
    assert after["Rss"] - before["Rss"] > 95 * MB
    assert len(private) == 64 * MB
    shared.close()


def test_a_process_that_has_ended_takes_nothing():
    for nobody in (None, 2**22 + 1):
        assert set(export_memory.memory_of(nobody).values()) == {0}
