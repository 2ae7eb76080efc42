"""What goes into a checkpoint comes out of it, and training goes on as if nothing had happened."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opened_managers import Open
from tiny_models import mixture_of_experts, perceptron, same, train_step, whole_state
from torch import nn

from ckptmgr import DCP, CheckpointManager, HuggingFace, PerRank, RandomState, Series, UnsafeResume
from ckptmgr.errors import CorruptCheckpoint, InvalidArgument, StateMismatch
from ckptmgr.rundir import MAX_JOURNAL_PATH_BYTES, RunDirectory
from ckptmgr.writers import loading


class Counter:
    """A Stateful whose dictionaries fill as it is used, with integer keys among others."""

    def __init__(self) -> None:
        self.seen: dict[Any, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen} if self.seen else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = dict(state["seen"])


def _trainer(seed: int) -> dict[str, Any]:
    model = perceptron(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.95))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def _train(state: dict[str, Any], steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(train_step(state["model"], state["optimizer"], step))
        state["scheduler"].step()
    return losses


def _save(manager: CheckpointManager, step: int, state: dict[str, Any], **options: Any) -> None:
    pending = manager.save(step, state, **options)
    assert pending is not None
    pending.wait()


def _deep(folder: Path, length: int) -> Path:
    """A name below *folder* of so many bytes."""
    while (left := length - len(str(folder)) - 1) > 200:
        folder /= "d" * 100
    return folder / ("d" * left)


def test_a_run_goes_as_deep_as_sqlite_can_and_deeper_with_its_journal_elsewhere(
    open_manager: Open, tmp_path: Path
) -> None:
    longest = _deep(tmp_path, MAX_JOURNAL_PATH_BYTES - len(".journal.db"))
    for run, options in ((longest, {}), (_deep(tmp_path, 1500), {"journal": tmp_path / "elsewhere.journal.db"})):
        with open_manager(run, **options) as manager:
            _save(manager, 1, {"model": perceptron(1)})
        model = perceptron(0)
        with open_manager(run, **options) as manager:
            resumed = manager.resume({"model": model})
        assert resumed is not None
        assert same(model.state_dict(), perceptron(1).state_dict())

    too_deep = _deep(tmp_path / "new", len(str(longest)) + 1)
    with pytest.raises(InvalidArgument, match=f"{MAX_JOURNAL_PATH_BYTES + 1} bytes") as raised:
        open_manager(too_deep)
    assert "journal=" in raised.value.hint
    assert not (tmp_path / "new").exists()


def test_a_whole_trainer_comes_back_and_trains_on_bit_for_bit(open_manager: Open) -> None:
    state = _trainer(0)
    _train(state, range(5))
    extra: dict[str, Any] = {
        "step": 4,
        "tokens": 10**15,
        "rate": 0.1,
        "name": "alpha",
        "nothing": None,
        "flag": True,
        "nested": {"list": [1, 2.5, "x", None], "tuple": (1, (2, 3)), "tensor": torch.arange(6).reshape(2, 3)},
        "mean": np.float64(0.25),
        "array": np.arange(4, dtype=np.int16),
        "rng": PerRank(RandomState()),
        "loader": PerRank({"position": 17, "order": torch.randperm(5), "epoch": {0: "a", 1: "b"}}),
    }
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    with open_manager() as manager:
        assert manager.resume({**state, **extra}) is None
        _save(manager, 4, {**state, **extra}, metrics={"loss": 0.5})
    drawn = random.random(), np.random.rand(), torch.rand(3)
    expected = _train(state, range(5, 10))

    other = _trainer(99)
    blank: dict[str, Any] = dict.fromkeys(extra) | {
        "nested": {"tensor": torch.zeros(2, 3, dtype=torch.int64)},
        "rng": PerRank(RandomState()),
        "loader": PerRank(None),
    }
    target = {**other, **blank}
    with open_manager() as manager:
        resumed = manager.resume(target)
    assert resumed is not None
    assert (resumed.series, resumed.step, resumed.world_size, resumed.metrics) == ("checkpoint", 4, 1, {"loss": 0.5})
    assert resumed.path.name == "step-4"
    for key in ("step", "tokens", "rate", "name", "nothing", "flag"):
        assert (target[key], type(target[key])) == (extra[key], type(extra[key]))
    assert target["nested"]["list"] == extra["nested"]["list"]
    assert target["nested"]["tuple"] == extra["nested"]["tuple"]
    assert torch.equal(target["nested"]["tensor"], extra["nested"]["tensor"])
    assert target["mean"] == 0.25
    assert np.array_equal(target["array"], extra["array"])
    assert target["array"].dtype == np.int16
    loader = target["loader"].value
    assert (loader["position"], loader["epoch"]) == (17, {0: "a", 1: "b"})
    assert torch.equal(loader["order"], extra["loader"].value["order"])
    again = random.random(), np.random.rand(), torch.rand(3)
    assert (again[0], again[1]) == (drawn[0], drawn[1])
    assert torch.equal(again[2], drawn[2])
    assert _train(other, range(5, 10)) == expected, "training does not go on where it was"
    assert same(whole_state(state["model"]), whole_state(other["model"]))
    assert same(whole_state(state["optimizer"]), whole_state(other["optimizer"]))
    assert state["scheduler"].state_dict() == other["scheduler"].state_dict()


def test_a_fresh_optimizer_gets_its_momentum_back(open_manager: Open) -> None:
    state = _trainer(0)
    _train(state, range(3))
    with open_manager() as manager:
        _save(manager, 1, state)
        fresh = _trainer(1)
        assert not fresh["optimizer"].state
        manager.resume(fresh)
    for ours, theirs in zip(
        state["optimizer"].state_dict()["state"].values(),
        fresh["optimizer"].state_dict()["state"].values(),
        strict=True,
    ):
        assert ours.keys() == theirs.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert fresh["optimizer"].param_groups[0]["betas"] == (0.8, 0.95)
    assert fresh["optimizer"].param_groups[0]["lr"] == state["optimizer"].param_groups[0]["lr"]


def test_resuming_after_a_backward_pass_still_fills_the_optimizer(open_manager: Open) -> None:
    state = _trainer(0)
    _train(state, range(3))
    with open_manager() as manager:
        _save(manager, 1, state)
        fresh = _trainer(1)
        fresh["model"](torch.ones(1, 8)).sum().backward()
        manager.resume(fresh)
    assert same(whole_state(state["optimizer"]), whole_state(fresh["optimizer"]))


def test_frozen_parameters_have_no_optimizer_state_and_need_none(open_manager: Open) -> None:
    def frozen(seed: int) -> dict[str, Any]:
        model = perceptron(seed)
        model[0].requires_grad_(False)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}

    state = frozen(0)
    train_step(state["model"], state["optimizer"], 1)
    assert len(state["optimizer"].state) == 2
    with open_manager() as manager:
        _save(manager, 1, state)
        other = frozen(1)
        manager.resume(other)
        thawed = {"model": perceptron(2)}
        thawed["optimizer"] = torch.optim.AdamW(thawed["model"].parameters(), lr=0.1)
        manager.resume(thawed)
    assert same(whole_state(state["optimizer"]), whole_state(other["optimizer"]))
    assert same(whole_state(state["model"]), whole_state(other["model"]))
    assert train_step(state["model"], state["optimizer"], 2) == train_step(other["model"], other["optimizer"], 2)
    assert len(thawed["optimizer"].state) == 2, "parameters that had no state when saved get none invented"
    train_step(thawed["model"], thawed["optimizer"], 3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_comes_back_with_and_without_state(open_manager: Open, momentum: float) -> None:
    def sgd(seed: int) -> dict[str, Any]:
        model = perceptron(seed)
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)}

    state = sgd(0)
    train_step(state["model"], state["optimizer"], 1)
    other = sgd(1)
    with open_manager() as manager:
        _save(manager, 1, state)
        manager.resume(other)
    assert [train_step(state["model"], state["optimizer"], s) for s in (2, 3)] == [
        train_step(other["model"], other["optimizer"], s) for s in (2, 3)
    ]


def test_dictionaries_that_were_filled_in_use_come_back_with_their_keys(open_manager: Open) -> None:
    counter = Counter()
    counter.seen = {0: 1.5, 7: {3: "x", "3b": torch.ones(2)}, "text": [1, {2: 3}], 12: None}
    with open_manager() as manager:
        _save(manager, 1, {"counter": counter})
        other = Counter()
        manager.resume({"counter": other})
    assert other.seen.keys() == counter.seen.keys()
    assert other.seen[0] == 1.5
    assert other.seen[7][3] == "x"
    assert torch.equal(other.seen[7]["3b"], torch.ones(2))
    assert other.seen["text"] == [1, {2: 3}]
    assert other.seen[12] is None


@pytest.mark.parametrize(
    "keys",
    [{-1: "negative"}, {"": "empty"}, {"a.b": 1, "a": 2}, {"empty": {}, "full": {"x": 1}}, {"list": [], "tuple": ()}],
    ids=str,
)
def test_unusual_dictionaries_come_back_as_they_were_or_are_refused(open_manager: Open, keys: dict[Any, Any]) -> None:
    counter, other = Counter(), Counter()
    counter.seen = copy.deepcopy(keys)
    with open_manager() as manager:
        try:
            _save(manager, 1, {"counter": counter})
        except InvalidArgument:
            return
        manager.resume({"counter": other})
    assert other.seen == keys, "the checkpoint changed a value without a word"


@pytest.mark.parametrize("keys", [{1: "a", "1": "b"}, {1.5: "a"}, {True: "a"}, {(1, 2): "a"}, {None: "a"}], ids=str)
def test_keys_that_cannot_be_told_apart_are_refused_or_kept(open_manager: Open, keys: dict[Any, Any]) -> None:
    counter, other = Counter(), Counter()
    counter.seen = dict(keys)
    with open_manager() as manager:
        try:
            _save(manager, 1, {"counter": counter})
        except InvalidArgument:
            return
        manager.resume({"counter": other})
    assert [(key, type(key)) for key in other.seen] == [(key, type(key)) for key in keys]


def test_plain_values_go_back_into_the_state_and_immutable_states_stay(open_manager: Open) -> None:
    from types import MappingProxyType

    with open_manager() as manager:
        _save(manager, 3, {"step": 3, "config": {"a": 1}})
        state = {"step": 0, "config": {"a": 0}}
        manager.resume(state)
        assert state == {"step": 3, "config": {"a": 1}}
        manager.resume(MappingProxyType({"step": 0}))


def test_a_part_of_the_state_can_be_resumed(open_manager: Open) -> None:
    state = _trainer(0)
    _train(state, range(2))
    with open_manager() as manager:
        _save(manager, 1, {**state, "rng": PerRank(RandomState())})
        model = perceptron(9)
        manager.resume({"model": model})
    assert same(whole_state(model), whole_state(state["model"]))


@pytest.mark.parametrize(
    "wanted",
    [
        {"other": 1},
        {"model": nn.Linear(3, 3)},
        {"model": perceptron(0), "more": torch.zeros(2)},
        {"own": PerRank(1)},
    ],
    ids=["value", "model", "tensor", "per-rank"],
)
def test_a_state_that_asks_for_more_than_was_saved_is_a_mismatch(open_manager: Open, wanted: dict[str, Any]) -> None:
    with open_manager() as manager:
        _save(manager, 1, {"model": perceptron(0), "step": 1})
        with pytest.raises(StateMismatch):
            manager.resume(wanted)


def test_a_tensor_of_another_shape_is_a_mismatch_and_nothing_is_loaded(open_manager: Open) -> None:
    with open_manager() as manager:
        _save(manager, 1, {"model": perceptron(0)})
        wider = perceptron(1, width=32)
        before = copy.deepcopy(whole_state(wider))
        with pytest.raises(StateMismatch, match="does not fit"):
            manager.resume({"model": wider})
    assert same(before, whole_state(wider))


def test_every_dtype_and_shape_comes_back_bit_for_bit(open_manager: Open) -> None:
    torch.manual_seed(0)
    bits = torch.randint(0, 255, (6, 8), dtype=torch.uint8)
    state: dict[str, Any] = {
        str(dtype).removeprefix("torch."): bits.view(dtype).clone()
        for dtype in (
            torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
            torch.float32, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
        )
    }  # fmt: skip
    state["bool"] = torch.tensor([True, False, True])
    state["scalar"] = torch.tensor(3.25)
    state["nan"] = torch.tensor([float("nan"), float("inf"), -0.0])
    state["empty"] = torch.empty(0, 5)
    state["empty-1d"] = torch.empty(0, dtype=torch.int64)
    state["strided"] = torch.arange(24.0).reshape(4, 6).t()
    state["expanded"] = torch.ones(1, 3).expand(5, 3)
    state["slice"] = torch.arange(100)[10:50:3]
    state["conjugate"] = torch.tensor([1 + 2j, 3 - 1j]).conj()
    state["negative"] = torch.tensor([1 + 2j, 3 - 1j]).conj().imag
    state["parameter"] = nn.Parameter(torch.ones(3))
    target = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in state.items()}
    with open_manager() as manager:
        _save(manager, 1, state)
        manager.resume(target)
    assert same({key: value.resolve_conj().resolve_neg() for key, value in state.items()}, target)


def test_shared_tensors_and_tied_weights_come_back_tied(open_manager: Open) -> None:
    model = mixture_of_experts(0, tied=True)
    other = mixture_of_experts(1, tied=True)
    with open_manager() as manager:
        _save(manager, 1, {"model": model})
        manager.resume({"model": other})
    assert same(whole_state(model), whole_state(other))
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_a_module_with_extra_state_and_buffers_comes_back(open_manager: Open) -> None:
    class Extra(nn.Module):
        def __init__(self, value: int) -> None:
            super().__init__()
            self.register_buffer("seen", torch.tensor(value))
            self.register_buffer("scratch", torch.zeros(3), persistent=False)
            self.value = value

        def get_extra_state(self) -> Any:
            return {"value": self.value}

        def set_extra_state(self, state: Any) -> None:
            self.value = state["value"]

    module, other = Extra(5), Extra(0)
    with open_manager() as manager:
        _save(manager, 1, {"module": module})
        manager.resume({"module": other})
    assert (other.value, int(other.seen)) == (5, 5)


def test_what_changes_after_save_has_returned_is_not_in_the_checkpoint(open_manager: Open, paused_writer: Any) -> None:
    model = perceptron(0)
    before = whole_state(model)
    state = {"model": model, "values": {"list": [1, 2]}, "own": PerRank({"a": [1]}), "extra": torch.zeros(4)}
    with open_manager() as manager:
        with paused_writer(manager):
            pending = manager.save(1, state)
            assert pending is not None
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(9)
                state["extra"].fill_(9)
            state["values"]["list"].append(3)
            state["own"].value["a"].append(2)
        pending.wait()
        other = {"model": perceptron(1), "values": {"list": []}, "own": PerRank(None), "extra": torch.ones(4)}
        manager.resume(other)
    assert same(before, whole_state(other["model"]))
    assert (other["values"], other["own"].value) == ({"list": [1, 2]}, {"a": [1]})
    assert torch.equal(other["extra"], torch.zeros(4))


def test_a_state_whose_tensors_move_change_or_grow_is_planned_anew(open_manager: Open) -> None:
    with open_manager() as manager:
        states: list[dict[str, Any]] = [
            {"a": torch.zeros(4), "n": 1},
            {"a": torch.ones(4), "n": 2},
            {"a": torch.ones(400), "n": 2},
            {"a": torch.ones(4, dtype=torch.int32), "b": torch.ones(2), "n": 3},
            {"b": torch.zeros(2)},
            {"a": 5, "b": torch.full((2,), 3.0)},
        ]
        for step, state in enumerate(states):
            _save(manager, step, state)
        for step, state in enumerate(states):
            target = {k: torch.full_like(v, 7) if isinstance(v, torch.Tensor) else None for k, v in state.items()}
            manager.resume(target, step=step)
            for key, value in state.items():
                assert torch.equal(target[key], value) if isinstance(value, torch.Tensor) else target[key] == value


def test_an_older_step_can_be_asked_for_and_a_missing_one_is_refused(open_manager: Open) -> None:
    with open_manager() as manager:
        for step in (1, 2):
            _save(manager, step, {"value": step})
        state = {"value": 0}
        resumed = manager.resume(state, step=1)
        assert resumed is not None
        assert (resumed.step, state["value"]) == (1, 1)
        with pytest.raises(UnsafeResume, match="R001"):
            manager.resume(state, step=3)


def test_the_newest_is_the_last_committed_and_not_the_highest_number(open_manager: Open) -> None:
    with open_manager() as manager:
        for step in (10, 20, 15):
            _save(manager, step, {"value": step})
        state = {"value": 0}
        manager.resume(state)
        assert state["value"] == 15, "a run that was set back goes on from where it was set back to"


def test_no_manifest_is_read_that_is_older_than_a_safe_one(
    open_manager: Open, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_manager() as manager:
        for step in range(5):
            _save(manager, step, {"value": step})
        read: set[str] = set()
        real = RunDirectory.read_manifest
        monkeypatch.setattr(RunDirectory, "read_manifest", lambda self, path: (read.add(path), real(self, path))[1])
        manager.resume({"value": 0})
        assert read == {"checkpoint/step-4"}
        (run_dir / "checkpoint" / "step-4" / ".metadata").unlink()
        resumed = manager.resume({"value": 0}, allow_older=True)
        assert resumed is not None
        assert (resumed.step, read) == (3, {"checkpoint/step-4", "checkpoint/step-3"})


def _damage(directory: Path) -> None:
    (file,) = directory.glob("__0_0.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_damage_is_found_by_size_always_and_by_digest_on_demand(open_manager: Open, run_dir: Path) -> None:
    with open_manager() as manager:
        for step in (1, 2):
            _save(manager, step, {"t": torch.full((1000,), float(step))})
        _damage(run_dir / "checkpoint" / "step-2")
        state = {"t": torch.zeros(1000)}
        with pytest.raises(UnsafeResume, match="R005"):
            manager.resume(state, verify_digests=True)
        assert torch.equal(state["t"], torch.zeros(1000)), "nothing is loaded from what is refused"
        resumed = manager.resume(state, verify_digests=True, allow_older=True)
        assert resumed is not None
        assert (resumed.step, state["t"][0].item()) == (1, 1.0)
        (run_dir / "checkpoint" / "step-2" / "__0_0.distcp").write_bytes(b"short")
        with pytest.raises(UnsafeResume, match="R004") as caught:
            manager.resume(state)
        assert caught.value.report.chosen is not None
        assert "`ckptmgr check RUN --series checkpoint --world-size 1`" in caught.value.hint
        (run_dir / "checkpoint" / "step-2" / "__0_0.distcp").unlink()
        with pytest.raises(UnsafeResume, match="R004"):
            manager.resume(state)


def test_bytes_can_be_compared_while_they_are_loaded(
    open_manager: Open, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded: list[str] = []
    real = loading.begin

    def begin(directory: Path, *args: Any, **options: Any) -> Any:
        loaded.append(directory.name)
        return real(directory, *args, **options)

    monkeypatch.setattr(loading, "begin", begin)
    with open_manager() as manager:
        for step in (1, 2):
            _save(manager, step, {"t": torch.full((1000,), float(step)), "at": step})
        state = {"t": torch.zeros(1000), "at": 0}
        resumed = manager.resume(state, verify_digests="meanwhile")
        assert resumed is not None
        assert (resumed.step, state["at"], set(state["t"].tolist())) == (2, 2, {2.0})
        _damage(run_dir / "checkpoint" / "step-2")
        with pytest.raises(UnsafeResume, match="R005"):
            manager.resume(state, verify_digests="meanwhile")
        resumed = manager.resume(state, verify_digests="meanwhile", allow_older=True)
        assert resumed is not None
        assert (resumed.step, state["at"], set(state["t"].tolist())) == (1, 1, {1.0})
        assert loaded == ["step-2", "step-2", "step-2", "step-1"]
        assert "resuming from the older checkpoint step 1" in caplog.text
        # What is wrong in it is told even where it could not be loaded.
        (run_dir / "checkpoint" / "step-2" / ".metadata").write_bytes(
            bytes((run_dir / "checkpoint" / "step-2" / ".metadata").stat().st_size)
        )
        with pytest.raises(UnsafeResume, match=r"R005.*\.metadata"):
            manager.resume(state, verify_digests="meanwhile")
        with pytest.raises(StateMismatch):
            manager.resume({"other": 1}, step=1, verify_digests="meanwhile")


@pytest.mark.parametrize("value", ["always", None, 1, 2])
def test_what_verify_digests_can_be_is_checked(open_manager: Open, value: Any) -> None:
    with open_manager() as manager, pytest.raises(InvalidArgument, match="verify_digests"):
        manager.resume({"t": torch.zeros(2)}, verify_digests=value)


def test_what_is_known_to_be_damaged_is_not_loaded_unread(open_manager: Open, run_dir: Path) -> None:
    """Until its bytes are compared again and are those that were committed."""
    state = {"t": torch.zeros(1000)}
    with open_manager() as manager:
        _save(manager, 1, {"t": torch.full((1000,), 1.0)})
        _save(manager, 2, {"t": torch.full((1000,), 2.0)})
        (file,) = (run_dir / "checkpoint" / "step-2").glob("*.distcp")
        good = file.read_bytes()
        file.write_bytes(good[:1500] + bytes([good[1500] ^ 1]) + good[1501:])
        with pytest.raises(UnsafeResume, match="R005"):
            manager.resume(state)
        with pytest.raises(UnsafeResume, match=r"R005 .* as its last verification found"):
            manager.resume(state, verify_digests=False)
        older = manager.resume(state, verify_digests=False, allow_older=True)
        assert (older and older.step, state["t"][0]) == (1, 1.0)
        file.write_bytes(good)
        assert (manager.resume(state) or older).step == 2
        assert (manager.resume(state, verify_digests=False) or older).step == 2


def test_a_checkpoint_cannot_run_code_when_it_is_loaded(open_manager: Open, run_dir: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (run_dir / "owned",)

    with open_manager() as manager:
        _save(manager, 1, {"value": 1, "own": PerRank(2)})
        for name in (".metadata", "per-rank-0.pt"):
            file = run_dir / "checkpoint" / "step-1" / name
            good = file.read_bytes()
            evil = pickle.dumps(Evil())
            file.write_bytes(evil + b"\0" * (len(good) - len(evil)))
            with pytest.raises(CorruptCheckpoint):
                manager.resume({"value": 0, "own": PerRank(0)}, verify_digests=False)
            with pytest.raises(UnsafeResume, match=name):
                manager.resume({"value": 0, "own": PerRank(0)})
            file.write_bytes(good)
            manager.resume({"value": 0, "own": PerRank(0)})
    assert not (run_dir / "owned").exists()


def test_an_export_cannot_be_resumed_from(open_manager: Open) -> None:
    series = [Series("hf", HuggingFace()), Series("checkpoint", DCP())]
    with open_manager(series=series) as manager, pytest.raises(InvalidArgument, match="exports"):
        manager.resume({"model": perceptron()}, series="hf")


def test_ordered_dicts_and_modules_by_state_dict_alone_are_states_too(open_manager: Open) -> None:
    model = perceptron(0)
    with open_manager() as manager:
        _save(manager, 1, OrderedDict(model=model.state_dict()))
        other = perceptron(1)
        manager.resume({"model": other})
    assert same(whole_state(model), whole_state(other))
