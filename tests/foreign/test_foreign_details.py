"""What each layout has of its own: trackers, leftovers, ranks, indexes, steps."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import layouts_on_disk as made
import pytest
import torch
import torch.distributed.checkpoint as dcp
from layouts_on_disk import WEIGHTS, text, torch_save

from ckptmgr.foreign import Asked, judge, ocdbt
from ckptmgr.foreign.report import DAMAGE, FINDINGS, Candidate, ForeignReport
from ckptmgr.resume import Level, Verdict

Theirs = Callable[[str], Path]


def report_of(directory: Path, **asked: object) -> ForeignReport:
    report = judge(directory, Asked(**asked))  # type: ignore[arg-type]
    assert report is not None
    return report


def newest(report: ForeignReport) -> Candidate:
    return report.layouts[0].candidates[0]


def found(report: ForeignReport) -> list[tuple[str, str, tuple[str, ...]]]:
    """Id, level and files of everything that was found."""
    return [
        (each.id, each.level.value, each.files)
        for judged in report.layouts
        for each in (*judged.findings, *(one for candidate in judged.candidates for one in candidate.findings))
    ]


def test_all_damage_is_known() -> None:
    assert set(FINDINGS) > DAMAGE


# -- nothing, or several things ---------------------------------------------------------------------------


def test_an_empty_directory_is_no_layout(tmp_path: Path) -> None:
    assert judge(tmp_path) is None


@pytest.mark.parametrize("name", ["step-500", "checkpoint-5", "iter_0000005", "500", "global_step5", "hf-3"])
def test_a_directory_by_that_name_alone_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    text(tmp_path / name / "notes.txt", "nothing")
    text(tmp_path / "model_0.pt", "x")

    assert judge(tmp_path) is None


def test_several_layouts_in_one_directory_are_all_judged_and_the_worst_decides(tmp_path: Path) -> None:
    made.hf_trainer(tmp_path)
    made.deepspeed(tmp_path)
    made.shards(tmp_path)
    report = report_of(tmp_path)

    assert {each.layout for each in report.layouts} == {"Hugging Face Trainer", "DeepSpeed", "Hugging Face model"}
    assert report.verdict is Verdict.SAFE
    os.truncate(tmp_path / "checkpoint-10" / "optimizer.pt", 100)
    report = report_of(tmp_path)
    assert report.verdict is Verdict.OLDER
    # A model that was exported beside them is not what a training is resumed from.
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "checkpoint-10", dirs_exist_ok=True)
    text(tmp_path / "checkpoint-10" / "trainer_state.json", {"global_step": 10})
    os.truncate(tmp_path / "model-00001-of-00002.safetensors", 10)
    assert report_of(tmp_path).verdict is Verdict.SAFE


# -- xtuner -------------------------------------------------------------------------------------------------


def test_xtuner_lists_what_is_not_there(theirs: Theirs) -> None:
    directory = theirs("xtuner")
    shutil.rmtree(directory / "20260801120000/checkpoints/ckpt-step-10")
    report = report_of(directory)

    assert found(report) == [("F002", "error", ())]
    assert report.verdict is Verdict.OLDER
    assert report.chosen is not None
    assert report.chosen.step == 5


def test_xtuner_lists_an_older_one_that_is_not_there(theirs: Theirs) -> None:
    directory = theirs("xtuner")
    shutil.rmtree(directory / "20260801120000/checkpoints/ckpt-step-5")
    report = report_of(directory)

    assert found(report) == [("F011", "warning", ("20260801120000/ckpt-step-5",))]
    assert report.verdict is Verdict.SAFE


def test_xtuner_does_not_list_what_is_there(theirs: Theirs) -> None:
    directory = theirs("xtuner")
    body = json.loads((directory / ".xtuner").read_text())
    body["exps"][0]["checkpoint_list"].pop()
    text(directory / ".xtuner", body)
    report = report_of(directory)

    assert found(report) == [("F012", "warning", ())]
    assert report.chosen is newest(report)


@pytest.mark.parametrize("content", ["", '{"exps": [{"exp_d', "[]", '{"exps": 3}'])
def test_a_torn_meta_file_of_xtuner_is_said_and_does_not_hide_its_checkpoints(content: str, theirs: Theirs) -> None:
    directory = theirs("xtuner")
    (directory / ".xtuner").write_text(content)
    report = report_of(directory)

    assert found(report) == [("F011", "warning", (".xtuner",))]
    assert report.verdict is Verdict.SAFE


def test_weights_that_xtuner_is_still_writing_are_not_complete(theirs: Theirs) -> None:
    directory = theirs("xtuner")
    weights = directory / "20260801120000/checkpoints/ckpt-step-10/weights"
    weights.rename(weights.with_name("weights.incomplete"))
    report = report_of(directory)

    assert [id for id, *_ in found(report)] == ["F002", "F010"]
    assert report.verdict is Verdict.OLDER


def test_an_older_xtuner_has_two_directories_of_weights(theirs: Theirs) -> None:
    directory = theirs("xtuner")
    checkpoint = directory / "20260801120000/checkpoints/ckpt-step-10"
    shutil.copytree(checkpoint / "weights", checkpoint / "optimizer")
    (checkpoint / "weights").rename(checkpoint / "model")
    assert report_of(directory).chosen is not None
    assert newest(report_of(directory)).complete

    shutil.rmtree(checkpoint / "optimizer")
    assert found(report_of(directory)) == [("F002", "error", ("optimizer",))]


def test_a_train_state_of_another_step_is_found(theirs: Theirs) -> None:
    directory = theirs("xtuner")
    state = "20260801120000/checkpoints/ckpt-step-10/train_state.json"
    text(directory / state, {"cur_step": 9})

    assert found(report_of(directory)) == [("F017", "error", ("train_state.json",))]


def test_exports_of_xtuner_are_a_series_of_their_own(theirs: Theirs) -> None:
    directory = theirs("xtuner")
    experiment = directory / "20260801120000"
    made.shards(experiment / "hf-10")
    (experiment / ".hf-20.incomplete").mkdir()
    (experiment / "hf-latest").symlink_to("/somewhere/else/hf-30")
    checkpoints, exports = report_of(directory).layouts

    assert (checkpoints.series, exports.series) == ("checkpoint", "hf")
    assert [each.path for each in exports.candidates] == ["20260801120000/hf-10"]
    assert [each.id for each in exports.findings] == ["F010", "F011"]


def test_a_later_experiment_of_xtuner_is_newer_whatever_its_steps(theirs: Theirs) -> None:
    directory = theirs("xtuner")
    old = directory / "20260801120000"
    shutil.copytree(old / "checkpoints" / "ckpt-step-5", directory / "20260901120000" / "checkpoints" / "ckpt-step-5")

    assert newest(report_of(directory)).path == "20260901120000/checkpoints/ckpt-step-5"


@pytest.mark.parametrize("below", ["20260801120000", "20260801120000/checkpoints"])
def test_xtuner_is_recognised_from_below(below: str, theirs: Theirs) -> None:
    report = report_of(theirs("xtuner") / below)

    assert report.layouts[0].layout == "xtuner"
    assert [each.step for each in report.layouts[0].candidates] == [10, 5]


# -- DCP ------------------------------------------------------------------------------------------------------


def dcp_save(path: Path, state: dict[str, torch.Tensor]) -> None:
    with warnings.catch_warnings(action="ignore"):
        dcp.save(state, checkpoint_id=path, no_dist=True)


def test_an_old_index_over_new_data_is_found(tmp_path: Path) -> None:
    """The same names saved again into the same directory by a job that died before the index."""
    dcp_save(tmp_path / "new", {name: torch.zeros(50) for name in WEIGHTS})
    dcp_save(tmp_path / "step-5", dict(WEIGHTS))
    shutil.copy(tmp_path / "new" / "__0_0.distcp", tmp_path / "step-5" / "__0_0.distcp")
    shutil.rmtree(tmp_path / "new")
    report = report_of(tmp_path)

    assert found(report) == [("F003", "error", ("__0_0.distcp",))]


def test_a_piece_full_of_zeros_is_found(theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    data = directory / "checkpoint/step-10/__0_0.distcp"
    with data.open("r+b") as file:
        file.write(bytes(1000))

    assert [each.id for each in newest(report_of(directory)).findings] == ["F005"]


def test_the_second_half_full_of_zeros_is_found(theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    data = directory / "checkpoint/step-10/__0_0.distcp"
    size = data.stat().st_size
    with data.open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))

    assert [each.id for each in newest(report_of(directory)).findings] in (["F003"], ["F005"])


def test_tensors_whose_pieces_stand_nowhere_are_found(theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    path = directory / "checkpoint/step-10/.metadata"
    metadata = pickle.loads(path.read_bytes())
    at = next(at for at in metadata.storage_data if at.fqn == "model.layer.weight")
    del metadata.storage_data[at]
    path.write_bytes(pickle.dumps(metadata))
    candidate = newest(report_of(directory))

    assert [each.id for each in candidate.findings] == ["F008"]
    assert "model.layer.weight" in candidate.findings[0].text


def test_the_pieces_of_a_tensor_are_told_apart_by_where_they_begin(theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    path = directory / "checkpoint/step-10/.metadata"
    metadata = pickle.loads(path.read_bytes())
    chunk = metadata.state_dict_metadata["model.layer.weight"].chunks[0]
    metadata.state_dict_metadata["model.layer.weight"].chunks.append(
        type(chunk)(offsets=torch.Size([3, 0]), sizes=chunk.sizes)
    )
    path.write_bytes(pickle.dumps(metadata))

    assert [each.id for each in newest(report_of(directory)).findings] == ["F008"]


def test_data_is_looked_at_where_the_index_cannot_be_read(theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    checkpoint = directory / "checkpoint/step-10"
    os.truncate(checkpoint / ".metadata", 100)
    (checkpoint / "__0_0.distcp").write_bytes(bytes(5000))

    assert found(report_of(directory)) == [("F005", "error", ("__0_0.distcp",)), ("F006", "error", (".metadata",))]


def test_data_of_a_rank_that_the_index_does_not_name_is_a_warning(theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    shutil.copy(directory / "checkpoint/step-5/__0_0.distcp", directory / "checkpoint/step-10/__7_0.distcp")
    report = report_of(directory)

    assert found(report) == [("F013", "warning", ("__7_0.distcp",))]
    assert report.verdict is Verdict.SAFE


def test_pieces_of_a_writer_without_archives_are_judged_by_their_places(theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    data = directory / "checkpoint/step-10/__0_0.distcp"
    data.write_bytes(b"\0raw" * (data.stat().st_size // 4 + 1))
    assert report_of(directory).verdict is Verdict.SAFE

    needed = (directory / "checkpoint/step-5/__0_0.distcp").stat().st_size
    os.truncate(data, needed - 1)
    assert found(report_of(directory)) == [("F003", "error", ("__0_0.distcp",))]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_an_index_of_any_protocol_is_read(protocol: int, theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    path = directory / "checkpoint/step-10/.metadata"
    path.write_bytes(pickle.dumps(pickle.loads(path.read_bytes()), protocol))

    assert report_of(directory).verdict is Verdict.SAFE


@pytest.mark.parametrize("outside", ["../step-5/__0_0.distcp", "/etc/passwd", "a/../../x", ""])
def test_an_index_that_leads_out_of_its_directory_is_refused(outside: str, theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    path = directory / "checkpoint/step-10/.metadata"
    metadata = pickle.loads(path.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path = outside
    path.write_bytes(pickle.dumps(metadata))

    assert [each.id for each in newest(report_of(directory)).findings] == ["F006"]


@pytest.mark.parametrize("name", ["epoch_3", "step_40", "final"])
def test_plain_dcp_is_recognised_under_any_name(name: str, tmp_path: Path) -> None:
    dcp_save(tmp_path / name, dict(WEIGHTS))
    report = report_of(tmp_path)

    assert report.layouts[0].layout == "DCP"
    assert (newest(report).path, newest(report).complete) == (name, True)


def test_what_torchtitan_ends_with_may_be_a_model_alone(tmp_path: Path) -> None:
    made.torchtitan(tmp_path)
    made.shards(tmp_path / "checkpoint" / "step-20")
    report = report_of(tmp_path)

    assert newest(report).step == 20
    assert [(each.id, each.level) for each in newest(report).findings] == [("F015", Level.WARNING)]


def test_what_a_crash_left_of_dcp_is_no_checkpoint(theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    (directory / "checkpoint/step-20").mkdir()
    (directory / "checkpoint/tmp_step-30").mkdir()
    text(directory / "checkpoint/step-5/.metadata.tmp", "x")
    report = report_of(directory)

    assert found(report) == [
        ("F010", "warning", ("checkpoint/tmp_step-30",)),
        ("F002", "error", (".metadata",)),
        ("F010", "warning", (".metadata.tmp",)),
    ]
    assert report.verdict is Verdict.OLDER


# -- torch_checkpointing ------------------------------------------------------------------------------------


def test_torch_checkpointing_leftovers_and_ranks(theirs: Theirs) -> None:
    directory = theirs("torch_checkpointing")
    (directory / "tmp_step_20").mkdir()
    (directory / "step_10" / "optim_0.pt").unlink()
    report = report_of(directory)

    assert found(report) == [("F010", "warning", ("tmp_step_20",)), ("F007", "error", ("optim_0.pt",))]
    assert report_of(theirs_with(directory, "step_5"), world_size=2).verdict is Verdict.SAFE
    unfit = report_of(directory / "step_5", world_size=4)
    assert [id for id, *_ in found(unfit)] == ["F014"]
    assert unfit.verdict is Verdict.UNSAFE


def theirs_with(directory: Path, name: str) -> Path:
    return directory / name


def test_a_file_that_the_index_of_torch_checkpointing_names_is_missed(theirs: Theirs) -> None:
    directory = theirs("torch_checkpointing")
    (directory / "step_10" / "model_1.pt").unlink()

    assert found(report_of(directory)) == [("F002", "error", ("model_1.pt",))]


# -- Hugging Face -----------------------------------------------------------------------------------------------


def test_a_gap_between_the_ranks_of_a_trainer_is_found(theirs: Theirs) -> None:
    directory = theirs("hf_trainer")
    for rank in (2, 3):
        torch_save(directory / "checkpoint-10" / f"rng_state_{rank}.pth")
    (directory / "checkpoint-10" / "rng_state_1.pth").unlink()

    assert found(report_of(directory)) == [("F007", "error", ("rng_state_1.pth",))]


def test_a_trainer_state_of_another_step_is_found(theirs: Theirs) -> None:
    directory = theirs("hf_trainer")
    text(directory / "checkpoint-10" / "trainer_state.json", {"global_step": 9})
    report = report_of(directory)

    assert found(report) == [("F017", "error", ("trainer_state.json",))]


def test_a_trainer_with_another_number_of_ranks_is_warned(theirs: Theirs) -> None:
    report = report_of(theirs("hf_trainer"), world_size=8, step=10)

    assert found(report) == [("F014", "warning", ())]
    assert report.verdict is Verdict.SAFE


def test_weights_alone_of_a_trainer_are_a_warning(theirs: Theirs) -> None:
    directory = theirs("hf_trainer")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        (directory / "checkpoint-10" / name).unlink()

    assert found(report_of(directory)) == [("F002", "warning", ("optimizer.pt",))]


def test_deepspeed_and_fsdp_in_a_trainers_checkpoint_are_looked_into(theirs: Theirs) -> None:
    directory = theirs("hf_trainer")
    checkpoint = directory / "checkpoint-10"
    made.deepspeed(checkpoint)
    shutil.rmtree(checkpoint / "global_step5")
    dcp_save(checkpoint / "pytorch_model_fsdp_0", dict(WEIGHTS))
    assert report_of(directory).verdict is Verdict.SAFE

    os.truncate(checkpoint / "global_step10" / "mp_rank_00_model_states.pt", 500)
    os.truncate(checkpoint / "pytorch_model_fsdp_0" / "__0_0.distcp", 500)
    files = {name for _, _, names in found(report_of(directory)) for name in names}
    assert files == {"global_step10/mp_rank_00_model_states.pt", "pytorch_model_fsdp_0/__0_0.distcp"}


def test_a_trainers_checkpoint_whose_deepspeed_directory_is_gone_is_not_complete(theirs: Theirs) -> None:
    directory = theirs("hf_trainer")
    text(directory / "checkpoint-10" / "latest", "global_step10")

    assert found(report_of(directory)) == [("F002", "error", ("global_step10",))]


@pytest.mark.parametrize("outside", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", ""])
def test_an_index_of_shards_that_leads_out_of_its_directory_is_refused(outside: str, tmp_path: Path) -> None:
    made.shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    body["weight_map"]["layer.bias"] = outside
    text(index, body)

    assert ("F006", "error", (index.name,)) in found(report_of(tmp_path))


def test_shards_without_their_index_are_counted(tmp_path: Path) -> None:
    made.shards(tmp_path, index=False)
    (tmp_path / "model-00001-of-00002.safetensors").unlink()

    assert found(report_of(tmp_path)) == [
        ("F002", "error", ("model.safetensors.index.json",)),
        ("F007", "error", ("model-00001-of-00002.safetensors",)),
    ]


def test_a_tensor_that_its_shard_does_not_have_is_missed(tmp_path: Path) -> None:
    made.shards(tmp_path)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        shutil.copy(tmp_path / name, tmp_path / f"{name}.aside")
    shutil.move(tmp_path / "model-00001-of-00002.safetensors.aside", tmp_path / "model-00002-of-00002.safetensors")

    assert [(id, files) for id, _, files in found(report_of(tmp_path))] == [
        ("F008", ("model-00002-of-00002.safetensors",))
    ]


def test_a_shard_of_an_earlier_export_is_a_warning(tmp_path: Path) -> None:
    made.shards(tmp_path)
    shutil.copy(tmp_path / "model-00001-of-00002.safetensors", tmp_path / "model-00001-of-00003.safetensors")

    assert found(report_of(tmp_path)) == [("F013", "warning", ("model-00001-of-00003.safetensors",))]


def test_a_model_of_transformers_is_complete(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="8kB")

    assert len([*tmp_path.glob("*.safetensors")]) > 1
    assert (report_of(tmp_path).verdict, found(report_of(tmp_path))) == (Verdict.SAFE, [])


# -- Lightning -------------------------------------------------------------------------------------------------


def test_the_last_of_lightning_is_its_newest_and_a_dangling_one_is_said(tmp_path: Path) -> None:
    torch_save(tmp_path / "epoch=0-step=100.ckpt")
    torch_save(tmp_path / "last.ckpt")
    report = report_of(tmp_path)
    assert [(each.path, each.step) for each in report.layouts[0].candidates] == [
        ("last.ckpt", None),
        ("epoch=0-step=100.ckpt", 100),
    ]

    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("epoch=0-step=100.ckpt")
    assert found(report_of(tmp_path)) == []
    (tmp_path / "last.ckpt").unlink()
    (tmp_path / "last.ckpt").symlink_to("epoch=0-step=200.ckpt")
    assert found(report_of(tmp_path)) == [("F011", "warning", ("last.ckpt",))]


def test_sharded_checkpoints_of_lightning_are_looked_into(tmp_path: Path) -> None:
    sharded = tmp_path / "checkpoints" / "epoch=1-step=7.ckpt"
    dcp_save(sharded, dict(WEIGHTS))
    torch_save(sharded / "meta.pt")
    engine = tmp_path / "checkpoints" / "epoch=2-step=9.ckpt"
    made.deepspeed(engine / "aside")
    (engine / "aside" / "global_step5").rename(engine / "checkpoint")
    shutil.rmtree(engine / "aside")
    text(engine / "latest", "checkpoint")
    report = report_of(tmp_path)
    assert [(each.step, each.complete) for each in report.layouts[0].candidates] == [(9, True), (7, True)]
    assert report_of(engine).verdict is Verdict.SAFE

    os.truncate(engine / "checkpoint" / "mp_rank_00_model_states.pt", 100)
    (sharded / "meta.pt").unlink()
    assert found(report_of(tmp_path)) == [
        ("F003", "error", ("checkpoint/mp_rank_00_model_states.pt",)),
        ("F002", "error", ("meta.pt",)),
    ]


# -- DeepSpeed and Megatron: trackers ------------------------------------------------------------------------------

TRACKERS = {"deepspeed": ("latest", "global_step"), "megatron_ranks": ("latest_checkpointed_iteration.txt", "")}


@pytest.mark.parametrize("layout", TRACKERS)
def test_what_is_newer_than_the_tracker_is_not_known_to_be_complete(layout: str, theirs: Theirs) -> None:
    directory = theirs(layout)
    name, prefix = TRACKERS[layout]
    text(directory / name, f"{prefix}5\n")
    report = report_of(directory)

    assert found(report) == [("F012", "error", ())]
    assert report.verdict is Verdict.OLDER


def test_a_distributed_checkpoint_newer_than_the_tracker_has_an_index_that_says_more(theirs: Theirs) -> None:
    directory = theirs("megatron")
    text(directory / "latest_checkpointed_iteration.txt", "5")
    report = report_of(directory)

    assert found(report) == [("F012", "warning", ())]
    assert report.verdict is Verdict.SAFE


@pytest.mark.parametrize("layout", TRACKERS)
@pytest.mark.parametrize("content", ["", "global_step1", "1", "\x00\x00", "../../etc", "x" * 10_000])
def test_a_tracker_that_names_nothing_is_said(content: str, layout: str, theirs: Theirs) -> None:
    directory = theirs(layout)
    (directory / TRACKERS[layout][0]).write_text(content)
    report = report_of(directory)

    assert [(id, level) for id, level, _ in found(report)] == [("F011", "warning")]
    assert report.chosen is newest(report)


@pytest.mark.parametrize(("layout", "content"), [("deepspeed", "global_step77"), ("megatron_ranks", "77")])
def test_the_newest_by_the_tracker_is_gone(layout: str, content: str, theirs: Theirs) -> None:
    """The library would try to load that one; what is there is older."""
    directory = theirs(layout)
    there = report_of(directory).chosen
    (directory / TRACKERS[layout][0]).write_text(content)
    report = report_of(directory)

    assert [(id, level) for id, level, _ in found(report)] == [("F002", "error")]
    assert (report.verdict, report.chosen) == (Verdict.OLDER, there)
    assert report.layouts[0].candidates[0].step == 77


@pytest.mark.parametrize("layout", TRACKERS)
def test_a_tracker_that_is_missing_is_said(layout: str, theirs: Theirs) -> None:
    directory = theirs(layout)
    (directory / TRACKERS[layout][0]).unlink()

    assert [(id, level) for id, level, _ in found(report_of(directory))] == [("F011", "warning")]


def test_a_tracker_without_any_checkpoint_is_nothing_to_resume_from(tmp_path: Path) -> None:
    text(tmp_path / "latest_checkpointed_iteration.txt", "100")
    report = report_of(tmp_path)

    assert report.verdict is Verdict.NONE
    assert [id for id, *_ in found(report)] == ["F001", "F011"]


def test_the_release_of_megatron_is_a_checkpoint(theirs: Theirs) -> None:
    directory = theirs("megatron_ranks")
    (directory / "iter_0000005").rename(directory / "release")
    shutil.rmtree(directory / "iter_0000010")
    text(directory / "latest_checkpointed_iteration.txt", "release")
    report = report_of(directory)

    assert (report.verdict, newest(report).path, newest(report).step) == (Verdict.SAFE, "release", None)


def test_a_missing_model_parallel_rank_is_found(theirs: Theirs) -> None:
    directory = theirs("megatron_ranks")
    shutil.rmtree(directory / "iter_0000010" / "mp_rank_01_000")

    assert found(report_of(directory)) == [("F007", "error", ("mp_rank_01_000/model_optim_rng.pt",))]


@pytest.mark.parametrize(("layout", "fits", "unfit"), [("deepspeed", 2, 4), ("megatron_ranks", 8, 6), ("copied", 2, 4)])
def test_another_number_of_ranks_is_refused_where_the_layout_knows(
    layout: str, fits: int, unfit: int, theirs: Theirs
) -> None:
    directory = theirs(layout)

    assert report_of(directory, world_size=fits).verdict is Verdict.SAFE
    report = report_of(directory, world_size=unfit)
    assert report.verdict is Verdict.UNSAFE
    assert {id for id, *_ in found(report)} == {"F014"}


def test_missing_ranks_of_deepspeed_are_found(theirs: Theirs) -> None:
    directory = theirs("deepspeed")
    checkpoint = directory / "global_step10"
    (checkpoint / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").unlink()
    assert found(report_of(directory)) == [("F007", "error", ("zero_pp_rank_0_mp_rank_00_optim_states.pt",))]

    # With ZeRO-3 the model's files tell how many ranks there were.
    for rank in range(4):
        torch_save(checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    assert found(report_of(directory)) == [
        ("F007", "error", tuple(f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 2, 3)))
    ]
    for rank in range(4):
        torch_save(checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (checkpoint / "zero_pp_rank_3_mp_rank_00_model_states.pt").unlink()
    assert found(report_of(directory)) == [("F007", "error", ("zero_pp_rank_3_mp_rank_00_model_states.pt",))]


# -- Orbax --------------------------------------------------------------------------------------------------------


def test_what_orbax_did_not_finish_is_said(theirs: Theirs) -> None:
    directory = theirs("orbax")
    (directory / "20.orbax-checkpoint-tmp").mkdir()
    (directory / "99").mkdir()
    (directory / "tensorboard").mkdir()
    report = report_of(directory)

    assert found(report) == [
        ("F010", "warning", ("20.orbax-checkpoint-tmp",)),
        ("F002", "error", ("_CHECKPOINT_METADATA",)),
    ]
    assert (report.verdict, newest(report).step) == (Verdict.OLDER, 99)


def test_an_item_that_orbax_has_not_renamed_is_missing(theirs: Theirs) -> None:
    directory = theirs("orbax")
    (directory / "10" / "default").rename(directory / "10" / "default.orbax-checkpoint-tmp")

    assert [(id, level) for id, level, _ in found(report_of(directory))] == [("F002", "error"), ("F010", "error")]


def test_a_step_of_orbax_without_the_time_of_its_commit_is_not_complete(theirs: Theirs) -> None:
    directory = theirs("orbax")
    text(directory / "10" / "_CHECKPOINT_METADATA", {"item_handlers": {}, "commit_timestamp_nsecs": None})

    assert [(id, level) for id, level, _ in found(report_of(directory))] == [("F010", "error")]


def test_a_manifest_of_something_else_is_found(theirs: Theirs) -> None:
    directory = theirs("orbax")
    manifest = directory / "10" / "default" / "manifest.ocdbt"
    manifest.write_bytes(b"else" + manifest.read_bytes()[4:])

    assert found(report_of(directory)) == [("F006", "error", ("default/manifest.ocdbt",))]


def test_a_process_that_the_leaves_of_orbax_need_is_missed(theirs: Theirs) -> None:
    directory = theirs("orbax")
    shutil.rmtree(directory / "10" / "default" / "ocdbt.process_0")

    assert found(report_of(directory)) == [("F002", "error", ("default/ocdbt.process_0",))]


def test_not_every_process_of_orbax_need_have_written(theirs: Theirs) -> None:
    directory = theirs("orbax")
    for place in (*directory.rglob("ocdbt.process_1"), *directory.rglob("array_metadatas/process_1")):
        place.rename(place.with_name(place.name.replace("1", "7")))
    for step in (5, 10):
        made.ocdbt_database(directory / str(step) / "default", {f"ocdbt.process_{n}/d/d2129b27": 100 for n in (0, 7)})

    assert (report_of(directory).verdict, found(report_of(directory))) == (Verdict.SAFE, [])


def test_a_data_file_that_the_leaves_of_orbax_need_is_missed_or_too_short(theirs: Theirs) -> None:
    directory = theirs("orbax")
    data = directory / "10" / "default" / "ocdbt.process_1" / "d" / "d2129b27"
    data.write_bytes(data.read_bytes()[:-1])

    assert found(report_of(directory)) == [("F003", "error", ("default/ocdbt.process_1/d/d2129b27",))]
    data.unlink()
    assert found(report_of(directory)) == [("F002", "error", ("default/ocdbt.process_1/d/d2129b27",))]


@pytest.mark.parametrize("file", ["manifest.ocdbt", "d/0e4e22eb"])
def test_a_description_of_orbax_with_one_other_bit_is_found(file: str, theirs: Theirs) -> None:
    directory = theirs("orbax")
    path = directory / "10" / "default" / file
    flip(path, path.stat().st_size - 20)

    assert found(report_of(directory)) == [("F009", "error", (f"default/{file}",))]


def test_descriptions_of_orbax_that_are_too_large_are_said_and_not_read(
    theirs: Theirs, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = theirs("orbax")
    monkeypatch.setattr(ocdbt, "MAX_BYTES", 200)
    report = report_of(directory)

    assert {(id, level) for id, level, _ in found(report)} == {("F015", "warning")}
    assert report.verdict is Verdict.SAFE


def test_a_description_of_orbax_that_leads_out_of_its_directory_is_refused(theirs: Theirs) -> None:
    directory = theirs("orbax")
    made.ocdbt_database(directory / "10" / "default", {"../../5/default/d/x": 20})
    assert found(report_of(directory)) == [("F006", "error", ("default/d/0e4e22eb",))]

    manifest = directory / "10" / "default" / "manifest.ocdbt"
    body = manifest.read_bytes()[14:-4].replace(b"d/0e4e22eb", b"../../../x")
    manifest.write_bytes(made.ocdbt_description(0x0CDB3A2A, body))
    assert found(report_of(directory)) == [("F006", "error", ("default/manifest.ocdbt",))]


def test_steps_of_orbax_with_one_item_are_each_a_checkpoint(tmp_path: Path) -> None:
    """As `PyTreeCheckpointer` leaves them: nothing but the names of the directories says which is which."""
    made.orbax(tmp_path / "both")
    for step in ("5", "10"):
        single = tmp_path / "ckpt" / f"checkpoint_{step}"
        shutil.copytree(tmp_path / "both" / step / "default", single)
        about = {"item_handlers": "x.PyTreeCheckpointHandler", "commit_timestamp_nsecs": 1}
        text(single / "_CHECKPOINT_METADATA", about)
    (tmp_path / "ckpt" / "checkpoint_5").rename(tmp_path / "ckpt" / "best")
    report = report_of(tmp_path / "ckpt")

    assert [(each.path, each.complete) for each in report.layouts[0].candidates] == [
        ("checkpoint_10", True),
        ("best", True),
    ]
    (tmp_path / "ckpt" / "checkpoint_10" / "_METADATA").unlink()
    assert report_of(tmp_path / "ckpt").verdict is Verdict.OLDER


def test_a_step_of_orbax_whose_commit_file_is_missing_is_not_complete(theirs: Theirs) -> None:
    directory = theirs("orbax")
    text(directory / "10" / "default" / "commit_success.txt", "x")

    assert found(report_of(directory)) == [("F010", "error", ("commit_success.txt",))]


@pytest.mark.parametrize("version", [2, 3])
def test_arrays_of_orbax_in_directories_of_their_own_are_looked_into(version: int, tmp_path: Path) -> None:
    chunks = {2: ("0.0", "1.0"), 3: ("c/0/0", "c/1/0")}[version]
    grid = {"chunk_grid": {"configuration": {"chunk_shape": [2, 3]}}}
    about = {2: (".zarray", {"shape": [3, 3], "chunks": [2, 3]}), 3: ("zarr.json", {"shape": [3, 3], **grid})}[version]
    entry = {"key_metadata": [{"key": "w"}], "value_metadata": {"value_type": "jax.Array"}}
    tree = {"tree_metadata": {"w": entry}, "use_ocdbt": False, "store_array_data_equal_to_fill_value": True}
    for step in (5, 10):
        text(tmp_path / str(step) / "_METADATA", tree)
        text(tmp_path / str(step) / "w" / about[0], about[1])
        for chunk in chunks:
            text(tmp_path / str(step) / "w" / chunk, "x" * 20)
    assert report_of(tmp_path).verdict is Verdict.SAFE

    (tmp_path / "10" / "w" / chunks[0]).write_bytes(bytes(20))
    (tmp_path / "10" / "w" / chunks[1]).unlink()
    assert found(report_of(tmp_path)) == [
        ("F002", "error", (f"w/{chunks[1]}",)),
        ("F005", "error", (f"w/{chunks[0]}",)),
    ]
    if version == 2:
        text(tmp_path / "10" / "w" / about[0], {**about[1], "compressor": {"id": "zstd", "level": 1}})
        for chunk in chunks:
            (tmp_path / "10" / "w" / chunk).write_bytes(bytes.fromhex("28b52ffd2003190000") + b"abc")
        assert found(report_of(tmp_path)) == []
        os.truncate(tmp_path / "10" / "w" / chunks[1], 11)
        assert found(report_of(tmp_path)) == [("F003", "error", (f"w/{chunks[1]}",))]
    shutil.rmtree(tmp_path / "10" / "w")
    assert found(report_of(tmp_path)) == [("F002", "error", ("w",))]


# -- copies of ckptmgr's own, and checksums -------------------------------------------------------------------------


def test_a_copy_with_a_file_that_its_manifest_does_not_name(theirs: Theirs) -> None:
    directory = theirs("copied")
    text(directory / "step-10" / "notes.txt", "x")
    (directory / ".step-20.e1.a9.incomplete").mkdir()

    assert found(report_of(directory)) == [
        ("F010", "warning", (".step-20.e1.a9.incomplete",)),
        ("F013", "warning", ("notes.txt",)),
    ]


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("layout", "file"),
    [
        ("copied", "step-10/optim/rank-0.bin"),
        ("deepspeed", "global_step10/mp_rank_00_model_states.pt"),
        ("lightning", "lightning_logs/version_0/checkpoints/epoch=0-step=10.ckpt"),
        ("torchtitan", "checkpoint/step-10/__0_0.distcp"),
    ],
)
def test_deep_finds_other_bytes_of_the_same_length(layout: str, file: str, theirs: Theirs) -> None:
    directory = theirs(layout)
    path = directory / file
    mark = b"moments" if layout == "copied" else torch.arange(50.0).numpy().tobytes()[:48]
    flip(path, path.read_bytes().index(mark) + 5)
    read: list[int] = []

    assert report_of(directory).verdict is Verdict.SAFE
    report = report_of(directory, deep=True, progress=read.append)
    assert report.verdict is Verdict.OLDER
    assert [id for id, *_ in found(report)] == ["F009"]
    assert sum(read) > 0


def test_deep_believes_archives_that_say_that_they_have_no_checksums(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch_save(tmp_path / "epoch=0-step=1.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)

    assert report_of(tmp_path, deep=True).verdict is Verdict.SAFE


def test_an_archive_from_before_zip_says_that_it_cannot_be_judged(tmp_path: Path) -> None:
    save = functools.partial(torch.save, _use_new_zipfile_serialization=False)
    save({"a": torch.ones(3)}, tmp_path / "epoch=0-step=1.ckpt")

    assert found(report_of(tmp_path)) == [("F015", "warning", ("epoch=0-step=1.ckpt",))]


def test_a_plain_pickle_is_judged_by_its_end(tmp_path: Path) -> None:
    data = pickle.dumps({"a": "x" * 1000})
    (tmp_path / "epoch=0-step=1.ckpt").write_bytes(data)
    assert report_of(tmp_path).verdict is Verdict.SAFE

    (tmp_path / "epoch=0-step=1.ckpt").write_bytes(data[:-30])
    assert found(report_of(tmp_path)) == [("F003", "error", ("epoch=0-step=1.ckpt",))]


def test_many_files_make_one_finding_that_counts_them(tmp_path: Path) -> None:
    made.shards(tmp_path)
    places = {f"t{n}": f"model-{n:05}-of-00500.safetensors" for n in range(500)}
    text(tmp_path / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    (finding,) = [each for each in newest(report_of(tmp_path)).findings if each.id == "F002"]

    assert finding.text.endswith("model-00002-of-00500.safetensors and 497 more")
    assert len(finding.files) == 100


# -- what looks wrong and is not, and the other way round ----------------------------------------------------------


def test_a_link_where_a_checkpoint_should_be_is_not_passed_by(theirs: Theirs, tmp_path: Path) -> None:
    directory = theirs("torchtitan")
    (directory / "checkpoint" / "step-20").symlink_to(tmp_path / "elsewhere")
    report = report_of(directory)

    assert (report.verdict, newest(report).step) == (Verdict.OLDER, 20)
    assert [(id, level) for id, level, _ in found(report)] == [("F016", "error")]


@pytest.mark.parametrize("layout", ["torch_checkpointing", "torchtitan"])
def test_an_empty_directory_called_as_the_others_is_the_newest(layout: str, theirs: Theirs) -> None:
    directory = theirs(layout)
    for each in (*directory.glob("step_*"), *directory.glob("checkpoint/step-*")):
        each.rename(directory / f"ckpt.{each.name[5:]}")
    (directory / "ckpt.20").mkdir()
    (directory / "ckpt.30" / "a run").mkdir(parents=True)

    assert (report_of(directory).verdict, newest(report_of(directory)).step) == (Verdict.OLDER, 20)


@pytest.mark.parametrize("name", [".metadata", "metadata.pkl"])
def test_a_file_that_others_have_too_is_no_index(name: str, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / name).write_bytes(b"# This file tracks properties of this project\n")

    assert judge(tmp_path) is None
    assert judge(tmp_path / "project") is None


def test_a_rank_without_data_leaves_an_empty_file(theirs: Theirs) -> None:
    directory = theirs("torchtitan")
    (directory / "checkpoint" / "step-10" / "__1_0.distcp").touch()

    assert found(report_of(directory)) == []


def test_a_file_of_dcp_in_safetensors_is_judged_by_its_header(tmp_path: Path) -> None:
    form = dcp.filesystem.SerializationFormat.SAFETENSORS
    for step in (5, 10):
        writer = dcp.FileSystemWriter(tmp_path / f"step-{step}", serialization_format=form)
        with warnings.catch_warnings(action="ignore"):
            dcp.save(dict(WEIGHTS), storage_writer=writer, no_dist=True)
    assert (report_of(tmp_path).verdict, found(report_of(tmp_path))) == (Verdict.SAFE, [])

    data = tmp_path / "step-10" / "__0_0.distcp"
    os.truncate(data, data.stat().st_size - 1)
    assert found(report_of(tmp_path)) == [("F003", "error", ("__0_0.distcp",))]


def test_an_export_of_torchtitan_has_no_config(tmp_path: Path) -> None:
    made.torchtitan(tmp_path)
    made.shards(tmp_path / "checkpoint" / "step-20")
    (tmp_path / "checkpoint" / "step-20" / "config.json").unlink()
    report = report_of(tmp_path)

    assert (report.verdict, newest(report).step) == (Verdict.SAFE, 20)


def test_weights_of_a_variant_have_an_index_of_their_own(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="1KB", variant="fp16")
    assert (report_of(tmp_path).verdict, found(report_of(tmp_path))) == (Verdict.SAFE, [])

    shard = next(tmp_path.glob("*-00001-of-*.safetensors"))
    shard.unlink()
    assert found(report_of(tmp_path)) == [("F002", "error", (shard.name,))]


def test_another_total_in_the_index_is_a_warning(tmp_path: Path) -> None:
    made.shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    assert found(report_of(tmp_path)) == []

    text(index, {**body, "metadata": {"total_size": 61}})
    assert found(report_of(tmp_path)) == [("F003", "warning", (index.name,))]
    assert report_of(tmp_path).verdict is Verdict.SAFE


@pytest.mark.parametrize("name", ["tokenizer.model", "merges.txt", "vocab.txt", "chat_template.jinja"])
def test_a_tokenizer_of_zeros_is_found(name: str, tmp_path: Path) -> None:
    made.shards(tmp_path)
    (tmp_path / name).write_bytes(bytes(30))

    assert found(report_of(tmp_path)) == [("F005", "error", (name,))]


@pytest.mark.parametrize("missing", ["config.json", "model*"])
def test_a_model_without_its_config_or_its_weights_is_not_complete(missing: str, tmp_path: Path) -> None:
    made.shards(tmp_path, index=False)
    text(tmp_path / "generation_config.json", {})
    for each in tmp_path.glob(missing):
        each.unlink()

    assert report_of(tmp_path).verdict is Verdict.CORRUPT


def test_an_adapter_comes_before_those_below_it(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "second"):
        made.shards(place)
        (place / "config.json").rename(place / "adapter_config.json")
    assert newest(report_of(tmp_path)).path == ""

    for each in (tmp_path / "second").glob("model*"):
        each.unlink()
    assert [each.complete for each in report_of(tmp_path).layouts[0].candidates] == [True, False]


def cached(at: Path, *, shared: bool) -> Path:
    """A model as huggingface_hub keeps it: links into the blobs of the repository, or of the cache."""
    snapshot = at / "models--somebody--model" / "snapshots" / ("0123456789" * 4)
    made.shards(snapshot)
    blobs = at / "models--somebody--model" / "blobs"
    blobs.mkdir()
    (at / "blobs" / "ab").mkdir(parents=True)
    for number, each in enumerate(sorted(snapshot.iterdir())):
        blob = blobs / f"{number:064x}"
        each.rename(at / "blobs" / "ab" / blob.name if shared else blob)
        each.symlink_to(f"../../blobs/{blob.name}")
        if shared:
            blob.symlink_to(f"../../blobs/ab/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_in_the_cache_of_the_hub_is_judged(shared: bool, tmp_path: Path) -> None:
    snapshot = cached(tmp_path, shared=shared)
    assert (report_of(snapshot).verdict, newest(report_of(snapshot)).step) == (Verdict.SAFE, None)

    shard = snapshot / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.resolve().write_bytes(data[:-1])
    assert found(report_of(snapshot)) == [("F003", "error", (shard.name,))]
    shard.resolve().unlink()
    assert found(report_of(snapshot)) == [("F016", "error", (shard.name,))]


@pytest.mark.parametrize("target", ["../../../outside", "/etc/passwd", "../../blobs/../../outside", "../../blobs"])
def test_no_other_link_in_the_cache_of_the_hub_is_followed(target: str, tmp_path: Path) -> None:
    snapshot = cached(tmp_path, shared=False)
    shard = snapshot / "model-00002-of-00002.safetensors"
    (tmp_path / "outside").write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(target)

    assert found(report_of(snapshot)) == [("F016", "error", (shard.name,))]


@pytest.mark.parametrize("place", ["", "lightning_logs", "lightning_logs/version_0"])
def test_logs_of_lightning_are_recognised_from_anywhere(place: str, theirs: Theirs) -> None:
    directory = theirs("lightning")
    shutil.copytree(directory / "lightning_logs" / "version_0", directory / "lightning_logs" / "version_1")
    report = report_of(directory / place)

    assert report.verdict is Verdict.SAFE
    assert len(report.layouts[0].candidates) == (2 if place.endswith("0") else 4)


@pytest.mark.parametrize(("file", "expected"), [("scheduler.pt", "error"), ("rng_state.pth", "warning")])
def test_a_trainer_that_saved_an_optimizer_saved_its_scheduler(file: str, expected: str, theirs: Theirs) -> None:
    directory = theirs("hf_trainer")
    checkpoint = directory / "checkpoint-10"
    (checkpoint / "rng_state_0.pth").rename(checkpoint / "rng_state.pth")
    (checkpoint / "rng_state_1.pth").unlink()
    (checkpoint / file).unlink()

    assert found(report_of(directory)) == [("F002", expected, (file,))]


@pytest.mark.parametrize("protocol", [2, 5])
def test_the_last_ranks_of_deepspeed_are_missed_where_the_model_says_how_many(protocol: int, theirs: Theirs) -> None:
    directory = theirs("deepspeed")
    checkpoint = directory / "global_step10"
    said = {"module": torch.ones(3), "seq_dp_world_size": 9, "dp_world_size": 2, "mp_world_size": 1}
    torch.save(said, checkpoint / "mp_rank_00_model_states.pt", pickle_protocol=protocol)
    assert found(report_of(directory)) == []

    (checkpoint / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert found(report_of(directory)) == [("F007", "error", ("zero_pp_rank_1_mp_rank_00_optim_states.pt",))]
    torch.save({**said, "dp_world_size": 1, "mp_world_size": 2}, checkpoint / "mp_rank_00_model_states.pt")
    assert found(report_of(directory)) == [("F007", "error", ("mp_rank_01_model_states.pt",))]


def test_a_universal_checkpoint_of_deepspeed_is_not_put_before_what_it_was_made_of(theirs: Theirs) -> None:
    directory = theirs("deepspeed")
    universal = directory / "global_step10_universal"
    torch_save(universal / "mp_rank_00_model_states.pt")
    for name in ("fp32", "exp_avg", "exp_avg_sq"):
        torch_save(universal / "zero" / "layer.weight" / f"{name}.pt")
    text(directory / "latest_universal", "global_step10_universal")
    report = report_of(directory)
    assert (report.verdict, newest(report).path, found(report)) == (Verdict.SAFE, "global_step10", [])

    os.truncate(universal / "zero" / "layer.weight" / "exp_avg.pt", 100)
    (universal / "zero" / "layer.weight" / "fp32.pt").unlink()
    assert found(report_of(directory)) == [
        ("F002", "error", ("zero/layer.weight/fp32.pt",)),
        ("F003", "error", ("zero/layer.weight/exp_avg.pt",)),
    ]


def test_the_last_ranks_of_megatron_are_missed_where_its_arguments_say_how_many(theirs: Theirs) -> None:
    directory = theirs("megatron_ranks")
    newest_one = directory / "iter_0000010"
    said = {"args": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}}
    torch.save(said, newest_one / "mp_rank_00_000" / "model_optim_rng.pt")
    for rank in newest_one.glob("mp_rank_01_*"):
        shutil.rmtree(rank)

    assert found(report_of(directory)) == [
        ("F007", "error", ("mp_rank_01_000/model_optim_rng.pt", "mp_rank_01_001/model_optim_rng.pt"))
    ]


@pytest.mark.parametrize("layout", ["hf_trainer", "lightning"])
def test_what_a_checkpoint_is_made_of_is_none_of_its_own(layout: str, theirs: Theirs, tmp_path: Path) -> None:
    engine = theirs("deepspeed") / "global_step10"
    if layout == "hf_trainer":
        itself, tag = theirs(layout) / "checkpoint-10", "global_step10"
        (itself / "optimizer.pt").unlink()
    else:
        itself, tag = tmp_path / "last.ckpt", "checkpoint"
    shutil.copytree(engine, itself / tag)
    text(itself / "latest", tag)
    report = report_of(itself)
    assert [(each.layout, each.candidates[0].path) for each in report.layouts] == [(made.LAYOUTS[layout].name, "")]
    assert report.verdict is Verdict.SAFE

    for content, expected in (("", ("F004", "latest")), ("global_step77", ("F002", "global_step77"))):
        text(itself / "latest", content)
        assert [(id, *files) for id, _, files in found(report_of(itself))] == [expected]


def test_files_of_layers_and_experts_of_deepspeed_are_missed_between_others(theirs: Theirs) -> None:
    directory = theirs("deepspeed")
    checkpoint = directory / "global_step10"
    for layer in ("00", "02"):
        for rank in ("00", "01"):
            torch_save(checkpoint / f"layer_{layer}-model_{rank}-model_states.pt")
    for layer in range(2):
        for expert in range(3):
            torch_save(checkpoint / f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt")
            torch_save(checkpoint / f"expp_rank_{expert}_mp_rank_00_optim_states.pt")
    assert found(report_of(directory)) == []

    gone = (
        "layer_02-model_01-model_states.pt",
        "layer_0_expert_1_mp_rank_00_model_states.pt",
        "layer_1_expert_2_mp_rank_00_model_states.pt",
        "expp_rank_0_mp_rank_00_optim_states.pt",
    )
    for name in gone:
        (checkpoint / name).unlink()
    assert found(report_of(directory)) == [("F007", "error", gone)]
