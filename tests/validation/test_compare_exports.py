"""compare_exports.py finds what differs between two exports, and nothing else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import compare_exports
import pytest


@pytest.fixture
def pair(made, tmp_path):
    """Two copies of what ``save_pretrained`` wrote, the second to be spoilt."""
    for name in ("expected", "export"):
        shutil.copytree(made / "published", tmp_path / name)
    return tmp_path / "expected", tmp_path / "export"


def compared(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = compare_exports.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def edit_json(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first_shard(export: Path) -> Path:
    return min(export.glob("model-*.safetensors"))


def test_an_export_of_ckptmgr_is_what_save_pretrained_writes_to_the_byte(made, capsys):
    status, out, _ = compared(capsys, made / "published", made / "run" / "hf" / "hf-1", "--weights")

    assert status == 0, out
    assert "tensors compared" in out


def test_equal_exports_are_the_same(pair, capsys):
    assert compared(capsys, *pair, "--weights")[0] == 0


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda e: (e / "generation_config.json").unlink(), "missing file: generation_config.json"),
        (lambda e: (e / "chat_template.jinja").write_text("{}"), "additional file: chat_template.jinja"),
        (
            lambda e: edit_json(e / "config.json", lambda c: c.update(hidden_size=17)),
            "config.json: hidden_size: 16 expected, but it is 17",
        ),
        (
            lambda e: edit_json(e / "config.json", lambda c: c.pop("hidden_act")),
            'config.json: missing hidden_act = "silu"',
        ),
        (
            lambda e: edit_json(e / "config.json", lambda c: c.update(hidden_size=16.0)),
            "config.json: hidden_size: 16 expected, but it is 16.0",
        ),
        (
            lambda e: edit_json(e / compare_exports.INDEX, lambda c: c["metadata"].update(total_size=1)),
            "metadata: total_size:",
        ),
        (lambda e: edit_json(e / "config.json", lambda c: None), "config.json: says the same in other bytes"),
    ],
)
def test_what_differs_is_named(pair, capsys, spoil, line):
    spoil(pair[1])
    status, out, _ = compared(capsys, *pair)

    assert status == 1
    assert line in out
    assert len(out.splitlines()) == 1


def test_another_byte_in_a_tensor_is_found_only_when_weights_are_compared(pair, capsys):
    with first_shard(pair[1]).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))

    assert compared(capsys, *pair)[0] == 0
    status, out, _ = compared(capsys, *pair, "--weights")
    assert status == 1
    assert "other bytes" in out
    assert len(out.splitlines()) == 1


def test_a_tensor_of_another_dtype_is_found(made, capsys, tmp_path):
    import torch
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(made / "published", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    status, out, _ = compared(capsys, made / "published", tmp_path / "half")

    assert status == 1
    assert "dtype F32 expected, but it is BF16" in out


def test_a_difference_that_is_accepted_is_shown_and_is_none(pair, capsys):
    edit_json(pair[1] / "config.json", lambda content: content.update(transformers_version="5.0.0"))
    status, out, _ = compared(capsys, *pair, "--accept", "config.json: transformers_version:*")

    assert status == 0
    assert out.startswith("accepted: config.json: transformers_version:")
    assert compared(capsys, *pair, "--accept", "config.json: hidden*")[0] == 1


def test_files_that_are_ignored_are_not_compared(pair, capsys):
    (pair[1] / "README.md").write_text("about")

    assert compared(capsys, *pair)[0] == 1
    assert compared(capsys, *pair, "--ignore", "README*")[0] == 0


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: first_shard(e).write_bytes(first_shard(e).read_bytes()[:-1]),
        lambda e: first_shard(e).write_bytes(b"\xff" * 100),
        lambda e: first_shard(e).write_bytes(b""),
        lambda e: (e / compare_exports.INDEX).write_text("{"),
        lambda e: edit_json(e / compare_exports.INDEX, lambda c: c["weight_map"].popitem()),
        shutil.rmtree,
    ],
)
def test_a_damaged_export_is_refused_and_named(pair, capsys, damage):
    damage(pair[1])
    status, out, err = compared(capsys, *pair)

    assert status == 3
    assert out == ""
    assert str(pair[1]) in err


def test_neither_torch_nor_transformers_is_needed(pair):
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'safetensors', 'ckptmgr')));"
        f"sys.path.insert(0, {str(Path(compare_exports.__file__).parent)!r});"
        f"import compare_exports; sys.exit(compare_exports.main([{str(pair[0])!r}, {str(pair[1])!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
