"""Exports: safetensors files whose bytes are laid out here, judged by the safetensors library."""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from one_rank import OneRank, bits, random_bits, same_bits
from safetensors import safe_open

from ckptmgr.errors import InvalidArgument
from ckptmgr.options import WriterOptions, parse_size
from ckptmgr.writers.huggingface import _DTYPES, HuggingFace
from ckptmgr.writers.process import WriterProcess
from ckptmgr.writers.state import PerRank


def export(options: HuggingFace, state: dict[str, Any], directory: Path, process: WriterProcess | None = None) -> Path:
    rank = OneRank(options, process)
    try:
        rank.save(state, directory)
    finally:
        rank.close()
    return directory


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, as the index or the one file says."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return safetensors.torch.load_file(directory / "model.safetensors")
    body = json.loads(index.read_text())
    found: dict[str, torch.Tensor] = {}
    for name in sorted(set(body["weight_map"].values())):
        part = safetensors.torch.load_file(directory / name)
        assert {key for key, file in body["weight_map"].items() if file == name} == set(part)
        found |= part
    assert body["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    return found


def files(directory: Path) -> list[str]:
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


# Sizes


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, 1), (5_000_000_000, 5 * 10**9), ("5GB", 5 * 10**9), ("5GiB", 5 << 30), ("512mib", 512 << 20),
        ("1.5kb", 1500), (" 2 TB ", 2 * 10**12), ("1KiB", 1024), ("17", 17), ("17b", 17), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_a_size_is_bytes_or_text(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    "size",
    [0, -1, True, None, "", "GB", "5 XB", "-5GB", "0GB", "1e9", "5GB5", "0.1", "5GBs", [5], "\u0665GB", "9" * 400],
)
def test_what_is_no_size_is_refused(size):
    with pytest.raises(InvalidArgument, match="size"):
        HuggingFace(max_shard_size=size)


def test_a_dtype_to_cast_to_is_a_floating_one():
    with pytest.raises(InvalidArgument, match="dtype"):
        HuggingFace(dtype=torch.int8)


# Files


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), 8 + length


def test_a_header_says_where_every_aligned_tensor_lies(tmp_path):
    state = {
        "b": torch.ones(3, dtype=torch.int8),
        "a": torch.arange(5.0),
        "c": torch.ones(2, dtype=torch.bfloat16),
        "d": torch.tensor(2.0, dtype=torch.float64),
    }
    export(HuggingFace(), state, tmp_path)
    header, begin = header_of(tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    spans = []

    assert header.pop("__metadata__") == {"format": "pt"}
    assert begin % 64 == 0
    for name, row in header.items():
        low, high = row["data_offsets"]
        spans.append((low, high))
        assert (begin + low) % state[name].element_size() == 0, "a tensor is not aligned to its elements"
        assert data[begin + low : begin + high] == bits(state[name])
        assert row["shape"] == list(state[name].shape)
    # safetensors allows no hole and no overlap.
    spans.sort()
    assert spans[0][0] == 0
    assert all(one[1] == other[0] for one, other in itertools.pairwise(spans))
    assert begin + spans[-1][1] == len(data)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(state)


names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
tensors = st.builds(
    random_bits,
    st.sampled_from(sorted(_DTYPES.keys() - {torch.float4_e2m1fn_x2}, key=str)),
    shapes,
    st.integers(0, 1000),
) | st.builds(random_bits, st.just(torch.float4_e2m1fn_x2), shapes.filter(len), st.integers(0, 1000))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=st.dictionaries(names, tensors, min_size=1, max_size=7), most=st.integers(1, 300))
def test_any_tensors_in_shards_of_any_size_come_back_bit_for_bit(tmp_path_factory, state, most):
    directory = export(HuggingFace(max_shard_size=most), {"tensors": state}, tmp_path_factory.mktemp("any"))
    back = weights(directory)

    assert back.keys() == state.keys()
    assert all(same_bits(back[name], tensor) for name, tensor in state.items())
    for path in directory.glob("*.safetensors"):
        header, begin = header_of(path)
        size = path.stat().st_size - begin
        count = len([name for name in header if name != "__metadata__" and math.prod(header[name]["shape"])])
        assert size <= most or count == 1, "a file is larger than asked for and not a single tensor"


def test_the_writer_process_writes_the_same_files(tmp_path):
    process = WriterProcess(WriterOptions(nice=0))
    state = {f"t{n}": random_bits(torch.float32, (n, 3), seed=n) for n in range(6)}
    try:
        export(HuggingFace(max_shard_size=100), state, tmp_path / "a", process)
    finally:
        process.stop(0)
    export(HuggingFace(max_shard_size=100), state, tmp_path / "b")

    assert files(tmp_path / "a") == files(tmp_path / "b")
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_one_file_has_no_index_and_many_are_numbered(tmp_path):
    state = {name: torch.zeros(10) for name in "abc"}

    assert files(export(HuggingFace(), state, tmp_path / "one")) == ["model.safetensors"]
    assert files(export(HuggingFace(max_shard_size=80), state, tmp_path / "two")) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_floats_are_cast_and_everything_else_means_what_it_is(tmp_path):
    state = {
        "f64": torch.tensor([1.1], dtype=torch.float64), "f32": torch.tensor([1.1]), "f16": torch.tensor([1.1]).half(),
        "i": torch.tensor([3]), "b": torch.tensor([True]), "f8": torch.tensor([1.5]).to(torch.float8_e4m3fn),
        "c": torch.tensor([1j]),
    }  # fmt: skip
    back = weights(export(HuggingFace(dtype=torch.bfloat16), state, tmp_path))

    assert {name: tensor.dtype for name, tensor in back.items()} == {
        "f64": torch.bfloat16, "f32": torch.bfloat16, "f16": torch.bfloat16, "i": torch.int64, "b": torch.bool,
        "f8": torch.float8_e4m3fn, "c": torch.complex64,
    }  # fmt: skip
    assert all(
        same_bits(back[name], tensor.bfloat16()) for name, tensor in state.items() if name in ("f64", "f32", "f16")
    )


def test_saving_again_writes_the_new_values(tmp_path):
    rank = OneRank(HuggingFace(max_shard_size=50))
    state = {"a": torch.zeros(10), "b": torch.zeros(10)}
    try:
        for step in range(3):
            state["a"].fill_(step)
            rank.save(state, tmp_path / str(step))
    finally:
        rank.close()

    assert [weights(tmp_path / str(step))["a"][0] for step in range(3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"a": 3}, "int"),
        ({"a": {"b": 1}}, "dict"),
        ({"a": PerRank(1), "b": torch.zeros(1)}, "per-rank"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "dense"),
        ({"a": torch.empty(2, device="meta")}, "dense"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "safetensors does not know"),
        ({"a": torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "safetensors does not know"),
        ({"a": {}}, "no tensor"),
        ({"__metadata__": torch.zeros(1)}, "__metadata__"),
        ({"x": {"a.b": torch.zeros(1)}, "x.a": {"b": torch.zeros(1)}}, "two tensors"),
    ],
    ids=[
        "int",
        "dict of ints",
        "per-rank",
        "sparse",
        "meta",
        "dtype",
        "half a byte",
        "nothing",
        "reserved name",
        "same name",
    ],
)
def test_what_cannot_stand_in_an_export_is_refused(tmp_path, state, why):
    with pytest.raises(InvalidArgument, match=why):
        export(HuggingFace(), state, tmp_path)


# Ties


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_load_model_finds_them(tmp_path):
    model = Tied()
    export(HuggingFace(), {"model": model}, tmp_path)
    header, _ = header_of(tmp_path / "model.safetensors")

    assert set(weights(tmp_path)) == {"embed.weight"}
    assert header["__metadata__"] == {"format": "pt", "head.weight": "embed.weight"}
    fresh = Tied()
    missing, unexpected = safetensors.torch.load_model(fresh, tmp_path / "model.safetensors")
    assert (list(missing), list(unexpected)) == ([], [])
    assert torch.equal(fresh.head.weight, model.embed.weight)


def test_a_tie_called_format_does_not_take_the_formats_place(tmp_path):
    """The header says {"format": "pt"} or transformers does not load it, whatever tensors are called."""

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.ones(3))
            self.format = self.a

    export(HuggingFace(), {"model": Odd()}, tmp_path)

    assert header_of(tmp_path / "model.safetensors")[0]["__metadata__"]["format"] == "pt"


def test_equal_tensors_that_are_not_tied_are_both_stored(tmp_path):
    shared = torch.ones(4)

    assert set(weights(export(HuggingFace(), {"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "1"))) == {"a", "b"}
    # Named tensors are what they are called; only a module's parameters can be tied.
    assert set(weights(export(HuggingFace(), {"a": shared, "b": shared}, tmp_path / "2"))) == {"a", "b"}


def test_views_of_one_memory_are_not_ties(tmp_path):
    base = torch.arange(10.0)
    back = weights(export(HuggingFace(), {"a": base[:5], "b": base[5:], "c": base[::2]}, tmp_path))

    assert torch.equal(back["b"], base[5:])
    assert torch.equal(back["c"], base[::2])


# Modules and adapters


def test_one_module_keeps_its_names_and_several_get_their_keys_as_prefix(tmp_path):
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)

    assert set(weights(export(HuggingFace(), {"model": one}, tmp_path / "1"))) == {"weight", "bias"}
    several = {"text": one, "vision": other, "scale": torch.ones(1)}
    assert set(weights(export(HuggingFace(), several, tmp_path / "2"))) == {
        "text.weight", "text.bias", "vision.weight", "vision.bias", "scale",
    }  # fmt: skip


def test_buffers_are_exported_when_they_are_in_the_state_dict(tmp_path):
    norm = torch.nn.BatchNorm1d(3)

    assert set(weights(export(HuggingFace(), {"model": norm}, tmp_path))) == set(norm.state_dict())


def test_an_adapter_renames_leaves_out_and_takes_apart(tmp_path):
    def adapter(name: str, tensor: torch.Tensor) -> Any:
        if name == "gone":
            return None
        if name == "qkv":
            return [(f"{part}.weight", tensor[2 * n : 2 * n + 2]) for n, part in enumerate("qkv")]
        if name == "turned":
            return [("turned.t", tensor.t())]
        return f"model.{name}"

    state = {
        "gone": torch.zeros(1),
        "qkv": torch.arange(18.0).view(6, 3),
        "turned": torch.arange(6.0).view(2, 3),
        "kept": torch.ones(2),
    }
    back = weights(export(HuggingFace(adapter=adapter), state, tmp_path))

    assert set(back) == {"q.weight", "k.weight", "v.weight", "turned.t", "model.kept"}
    assert torch.equal(back["k.weight"], state["qkv"][2:4])
    assert torch.equal(back["turned.t"], state["turned"].t())


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (5, "adapter"),
        ([("a", 3)], "neither a name"),
        ([("", torch.zeros(1))], "neither a name"),
        ([(1, torch.zeros(1))], "neither a name"),
        (["a"], "adapter"),
        ("same", "two tensors"),
        ("", "adapter"),
    ],
    ids=["number", "no tensor", "empty name", "number as name", "not pairs", "same name", "empty text"],
)
def test_a_bad_adapter_is_refused(tmp_path, answer, why):
    with pytest.raises(InvalidArgument, match=why):
        export(HuggingFace(adapter=lambda name, tensor: answer), {"x": torch.zeros(1), "y": torch.zeros(1)}, tmp_path)


# Assets


def model_directory(at: Path) -> Path:
    texts = {
        "config.json": "{}", "tokenizer.json": "[]", "chat_template.jinja": "{{ x }}", "modeling_custom.py": "x = 1",
        "README.md": "# m", "sub/extra.json": "{}", "sub/deep/more.txt": "more", "vocab.txt": "a",
        "model.safetensors": "w", "pytorch_model.bin": "w", "model.safetensors.index.json": "w", "sub/part.GGUF": "w",
        "tf_model.h5": "w", ".gitattributes": "h", ".cache/huggingface/x": "h", "sub/.hidden": "h",
        "__pycache__/x.pyc": "h", "ckptmgr.json": "h",
    }  # fmt: skip
    for name, text in texts.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_text(text)
    return at


def test_a_directory_gives_everything_but_weights_and_hidden_files(tmp_path):
    source = model_directory(tmp_path / "source")
    export(HuggingFace(assets=source), {"a": torch.zeros(1)}, tmp_path / "out")

    assert files(tmp_path / "out") == sorted(
        [
            "config.json",
            "tokenizer.json",
            "chat_template.jinja",
            "modeling_custom.py",
            "README.md",
            "sub/extra.json",
            "sub/deep/more.txt",
            "vocab.txt",
            "model.safetensors",
        ]
    )
    assert (tmp_path / "out" / "sub" / "deep" / "more.txt").read_text() == "more"
    assert set(weights(tmp_path / "out")) == {"a"}


def test_links_in_a_model_directory_are_read_as_the_hub_cache_makes_them(tmp_path):
    """Snapshots of the hub's cache are folders of links to blobs."""
    repository = tmp_path / "models--a--b"
    (repository / "blobs").mkdir(parents=True)
    (repository / "blobs" / "abc").write_text('{"from": "blob"}')
    source = repository / "snapshots" / "0123"
    source.mkdir(parents=True)
    (source / "config.json").symlink_to("../../blobs/abc")
    export(HuggingFace(assets=source), {"a": torch.zeros(1)}, tmp_path / "out")

    assert (tmp_path / "out" / "config.json").read_text() == '{"from": "blob"}'
    assert not (tmp_path / "out" / "config.json").is_symlink()


class Tokenizer:
    """Anything with save_pretrained."""

    def __init__(self, **texts: str) -> None:
        self.texts = texts

    def save_pretrained(self, directory: Any) -> None:
        for name, text in self.texts.items():
            Path(directory, name.replace("_", ".")).write_text(text)


def test_objects_save_their_files_themselves(tmp_path):
    assets = [Tokenizer(tokenizer_json="t"), Tokenizer(config_json="c"), model_directory(tmp_path / "source") / "sub"]
    export(HuggingFace(assets=assets), {"a": torch.zeros(1)}, tmp_path / "out")

    assert files(tmp_path / "out") == [
        "config.json",
        "deep/more.txt",
        "extra.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_assets_that_agree_about_a_file_are_fine_and_others_are_refused(tmp_path):
    export(HuggingFace(assets=[Tokenizer(a_json="x"), Tokenizer(a_json="x")]), {"a": torch.zeros(1)}, tmp_path / "ok")
    with pytest.raises(InvalidArgument, match=r"'a\.json'"):
        export(
            HuggingFace(assets=[Tokenizer(a_json="x"), Tokenizer(a_json="y")]), {"a": torch.zeros(1)}, tmp_path / "no"
        )


@pytest.mark.parametrize("assets", ["nowhere", 5, [object()]])
def test_assets_that_are_neither_directory_nor_object_are_refused(assets):
    with pytest.raises(InvalidArgument, match="assets"):
        HuggingFace(assets=assets)


def test_an_assets_own_index_does_not_replace_ours(tmp_path):
    source = model_directory(tmp_path / "source")
    export(
        HuggingFace(assets=source, max_shard_size=50), {"a": torch.zeros(10), "b": torch.zeros(10)}, tmp_path / "out"
    )

    assert set(weights(tmp_path / "out")) == {"a", "b"}
