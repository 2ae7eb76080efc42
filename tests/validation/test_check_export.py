"""check_export.py loads exports as everybody does, and says whether they answer as they should."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import check_export
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_exports import exported, published
from tiny_models import mixture_of_experts


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def checked(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    status = check_export.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out + said.err


def logits_of(model: Any, path: Path) -> Path:
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.save({"input_ids": tokens, "logits": model.eval()(input_ids=tokens).logits}, path)
    return path


def spoil_one_weight(export: Path) -> None:
    shard = max(export.glob("model-*.safetensors"))
    tensors = load_file(shard)
    name = max(tensors)
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, shard, {"format": "pt"})


def vision_and_language() -> Any:
    """A Qwen3-VL-MoE of a few thousand weights."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 8, "head_dim": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLMoeConfig(
        text_config=text, vision_config=vision,
        image_token_id=60, video_token_id=61, vision_start_token_id=62, vision_end_token_id=63,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Qwen3VLMoeForConditionalGeneration(config)


def test_an_export_answers_as_what_save_pretrained_wrote(made, capsys):
    status, said = checked(capsys, made / "run" / "hf" / "hf-1", "--reference", made / "published")

    assert (status, said) == (0, "the same: 2 x 32 x 64 logits, equal to the bit\n")


def test_an_export_answers_as_the_checkpoint_of_the_same_step(made, capsys):
    status, said = checked(capsys, made / "run" / "hf" / "hf-1", "--checkpoint", made / "run/checkpoint/step-1")

    assert (status, said) == (0, "the same: 2 x 32 x 64 logits, equal to the bit\n")


def test_an_export_answers_as_the_trainer_did(tmp_path, capsys):
    model = mixture_of_experts(tied=True)
    logits = logits_of(model, tmp_path / "logits.pt")

    assert checked(capsys, exported(model, tmp_path / "run"), "--logits", logits)[0] == 0


def test_an_export_in_another_dtype_is_compared_in_its_own(tmp_path, capsys):
    model = mixture_of_experts(tied=False)
    export = exported(model, tmp_path / "run", dtype=torch.bfloat16)

    assert checked(capsys, export, "--checkpoint", tmp_path / "run/checkpoint/step-1")[0] == 0


def test_a_model_for_images_too_is_found_by_its_class_and_given_text(tmp_path, capsys):
    model = vision_and_language()
    export = exported(model, tmp_path / "run")

    assert json.loads((export / "config.json").read_text())["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    for against in (
        ("--reference", published(model, tmp_path / "published")),
        ("--checkpoint", tmp_path / "run/checkpoint/step-1"),
    ):
        status, said = checked(capsys, export, *against)
        assert status == 0, said


@pytest.mark.parametrize("against", ["--reference", "--checkpoint", "--logits"])
def test_one_other_weight_is_noticed(made, tmp_path, capsys, against):
    export = tmp_path / "export"
    shutil.copytree(made / "run" / "hf" / "hf-1", export)
    spoil_one_weight(export)
    other = {
        "--reference": made / "published",
        "--checkpoint": made / "run/checkpoint/step-1",
        "--logits": logits_of(mixture_of_experts(tied=False), tmp_path / "logits.pt"),
    }[against]
    status, said = checked(capsys, export, against, other)

    assert status == 1
    assert "DIFFERENT" in said
    assert checked(capsys, export, against, other, "--atol", "100")[0] == 0


def test_logits_of_another_shape_are_different(made, tmp_path, capsys):
    stored = {"input_ids": torch.arange(8).view(1, 8), "logits": torch.zeros(1, 8, 65)}
    torch.save(stored, tmp_path / "logits.pt")

    status, said = checked(capsys, made / "run/hf/hf-1", "--logits", tmp_path / "logits.pt", "--atol", "100")
    assert status == 1
    assert "[1, 8, 65]" in said


def test_expected_logits_that_are_no_numbers_prove_nothing(made, tmp_path, capsys):
    stored = {"input_ids": torch.arange(8).view(1, 8), "logits": torch.full((1, 8, 64), torch.nan)}
    torch.save(stored, tmp_path / "logits.pt")

    assert checked(capsys, made / "run/hf/hf-1", "--logits", tmp_path / "logits.pt")[0] == 1


def test_a_checkpoint_without_the_model_is_refused(made, capsys):
    export, checkpoint = made / "run/hf/hf-1", made / "run/checkpoint/step-1"
    status, said = checked(capsys, export, "--checkpoint", checkpoint, "--key", "policy")

    assert status == 3
    assert "Missing key" in said
    assert "policy." in said


def test_an_export_with_a_tensor_too_few_is_refused(made, tmp_path, capsys):
    export = tmp_path / "export"
    shutil.copytree(made / "run/hf/hf-1", export)
    shard = max(export.glob("model-*.safetensors"))
    tensors = load_file(shard)
    gone = max(tensors)
    del tensors[gone]
    save_file(tensors, shard, {"format": "pt"})
    status, said = checked(capsys, export, "--reference", made / "published")

    assert status == 3
    assert gone in said


@pytest.mark.parametrize(
    ("config", "word"),
    [("{}", "architectures"), ("{", "config.json"), ('{"architectures": ["NoSuchModel"]}', "NoSuchModel")],
)
def test_an_export_of_no_known_class_is_refused(made, tmp_path, capsys, config, word):
    (tmp_path / "config.json").write_text(config)
    status, said = checked(capsys, tmp_path, "--reference", made / "published")

    assert status == 3
    assert word in said


def test_without_anything_to_compare_with_the_usage_is_wrong(made, capsys):
    with pytest.raises(SystemExit) as ended:
        check_export.main([str(made / "run/hf/hf-1")])
    assert ended.value.code == 2
    assert "required" in capsys.readouterr().err
