"""An export of a transformers model has the names and bytes that save_pretrained gives it, and loads as it was."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from one_rank import OneRank, bits, same_bits

from ckptmgr.writers.huggingface import HuggingFace
from ckptmgr.writers.modelnames import hub_views

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32, "intermediate_size": 24}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SMALL))


def qwen3_tied() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True))


def qwen3_moe() -> Any:
    from tiny_models import mixture_of_experts

    return mixture_of_experts(tied=False)


def qwen3_moe_one_expert() -> Any:
    """Dimensions of size 1 have strides that say nothing."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **SMALL, num_key_value_heads=1, head_dim=8, num_experts=1, num_experts_per_tok=1, moe_intermediate_size=1
    )
    return Qwen3MoeForCausalLM(config)


def qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    config = Qwen3VLMoeConfig(
        text_config={
            **SMALL, "num_key_value_heads": 1, "head_dim": 8,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 16,
            "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )  # fmt: skip
    return Qwen3VLMoeForConditionalGeneration(config)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=3))


def deepseek_v3() -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        **SMALL, num_key_value_heads=2, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4,
        v_head_dim=8, n_shared_experts=1,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def marian() -> Any:
    """Its position embeddings are computed: save_pretrained leaves them out, and so must we."""
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        d_model=16, vocab_size=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return MarianMTModel(config)


def nomic_bert() -> Any:
    """Published with query, key and value in one tensor, which the model holds as three."""
    from tiny_models import fused_when_published

    return fused_when_published()


def gpt2_tied() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def t5_tied() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2))


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=16))


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **SMALL,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    )
    return GptOssForCausalLM(config)


MODELS = [
    llama,
    qwen3_tied,
    qwen3_moe,
    qwen3_moe_one_expert,
    qwen3_vl_moe,
    mixtral,
    deepseek_v3,
    gpt2_tied,
    t5_tied,
    bert,
    gpt_oss,
    marian,
    nomic_bert,
]


def made(make: Any) -> Any:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        # Every weight another value: initialisation leaves many at 0 or 1, which would hide a mix-up.
        for number, tensor in enumerate(model.state_dict().values()):
            if tensor.is_floating_point():
                tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) * 0.001 + number)
    return model


def all_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


@pytest.mark.parametrize("max_shard_size", [20_000, 1_500])
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_an_export_has_the_names_bytes_and_index_of_save_pretrained(tmp_path, make, max_shard_size, caplog):
    """With the smaller limit an expert alone would fit into a file where a layer's experts together do not."""
    model = made(make)
    rank = OneRank(HuggingFace(max_shard_size=max_shard_size))
    with caplog.at_level(logging.WARNING, logger="ckptmgr"):
        try:
            rank.save({"model": model}, tmp_path / "ours")
        finally:
            rank.close()
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    ours, theirs = all_of(tmp_path / "ours"), all_of(tmp_path / "theirs")

    assert [record.message for record in caplog.records if record.name.startswith("ckptmgr")] == []
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert same_bits(ours[name], tensor), name
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        mine, its = tmp_path / "ours" / name, tmp_path / "theirs" / name
        assert mine.exists() == its.exists()
        assert not its.exists() or json.loads(mine.read_text()) == json.loads(its.read_text())

    loaded, info = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = loaded.state_dict()
    left_out = set(model._keys_to_ignore_on_save or ())
    assert all(bits(again[name]) == bits(tensor) for name, tensor in model.state_dict().items() if name not in left_out)


def test_a_cast_export_loads_in_its_dtype(tmp_path):
    model = made(qwen3_moe)
    rank = OneRank(HuggingFace(dtype=torch.bfloat16))
    try:
        rank.save({"model": model}, tmp_path)
    finally:
        rank.close()
    loaded = type(model).from_pretrained(tmp_path, dtype="auto")

    assert loaded.dtype is torch.bfloat16
    assert all(same_bits(loaded.state_dict()[name], tensor.bfloat16()) for name, tensor in model.state_dict().items())


def test_assets_win_over_the_models_own_config(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text('{"model_type": "llama", "mine": true}')
    rank = OneRank(HuggingFace(assets=source))
    try:
        rank.save({"model": made(llama)}, tmp_path / "out")
    finally:
        rank.close()

    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "llama", "mine": true}'


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_views_cover_every_weight_exactly_once(make):
    """Each element of each parameter is published once, so no expert is lost and none is written twice."""
    model = made(make)
    views = hub_views(model)
    state = model.state_dict()

    left_out = set(model._keys_to_ignore_on_save or ())
    assert views.keys() == state.keys() - left_out
    for name, tensor in state.items():
        if name in left_out:
            continue
        covered = torch.zeros(tensor.shape, dtype=torch.int32)
        for view in views[name]:
            whole = (tuple(0 for _ in tensor.shape), tuple(tensor.shape))
            cut = view.cut(whole, covered)
            assert cut is not None
            (offsets, sizes), part = cut
            assert (offsets, sizes) == (view.at, view.shape)
            part += 1
        assert bool((covered == 1).all()), name


@pytest.mark.parametrize("make", [qwen3_moe, nomic_bert], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_view_of_any_shard_is_the_shards_part_of_the_view(make, dim):
    """What ranks would cut from their boxes, put together, is the whole published tensor."""
    model = made(make)
    for name, views in hub_views(model).items():
        tensor = model.state_dict()[name]
        if dim >= tensor.ndim:
            continue
        for view in views:
            expected = view.cut((tuple(0 for _ in tensor.shape), tuple(tensor.shape)), tensor)[1]
            built = torch.full(view.shape, float("nan"))
            low = 0
            for size in (1, 2, tensor.shape[dim] - 3) if tensor.shape[dim] > 3 else (1, tensor.shape[dim] - 1):
                offsets = tuple(low if d == dim else 0 for d in range(tensor.ndim))
                sizes = tuple(size if d == dim else tensor.shape[d] for d in range(tensor.ndim))
                cut = view.cut((offsets, sizes), tensor.narrow(dim, low, size))
                if cut is not None:
                    (begins, extents), part = cut
                    where = tuple(begin - at for begin, at in zip(begins, view.at, strict=True)), extents
                    built[tuple(slice(o, o + s) for o, s in zip(*where, strict=True))] = part
                low += size
            assert torch.equal(built, expected), (name, view.name)


def test_a_module_that_is_no_transformers_model_keeps_its_names():
    assert hub_views(torch.nn.Linear(2, 2)) == {}
