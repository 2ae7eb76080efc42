"""Models small enough to save in a millisecond, with every kind of thing that a checkpoint meets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def perceptron(seed: int = 0, *, width: int = 16) -> nn.Sequential:
    """Two linear layers, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))


def mixture_of_experts(seed: int = 0, *, tied: bool = True, layers: int = 2) -> Any:
    """A Qwen3-MoE of some ten thousand weights; transformers 5 holds all experts of a layer in one tensor."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3MoeForCausalLM(config)


def fused_when_published(seed: int = 0) -> Any:
    """A BERT that holds query, key and value as three weights and is published with them in one."""
    from transformers import NomicBertConfig, NomicBertForMaskedLM

    config = NomicBertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8, intermediate_size=24,
        max_position_embeddings=16,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return NomicBertForMaskedLM(config)


def sharded(model: Any, mesh: DeviceMesh | None = None) -> Any:
    """*model* under FSDP2, in place: each decoder layer, then the whole."""
    if mesh is None:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layers = model.model.layers if hasattr(model, "model") else [m for m in model if isinstance(m, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)


def train_step(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
    """One optimiser step on data that depends on *seed* alone; returns the loss."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(model, "config"):
        tokens = torch.randint(0, 64, (2, 8), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
    else:
        loss = model(torch.randn(4, 8, generator=generator)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, gathered if it is sharded, as a copy. All ranks must call."""
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def whole_state(holder: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a state dict, optimizers included, gathered and by flat name. All ranks must call."""
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = whole(value)
        elif isinstance(value, Mapping):
            for key, below in value.items():
                walk(f"{name}.{key}" if name else str(key), below)

    walk("", holder.state_dict())
    return found


def same(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit, dtypes and shapes included."""
    return ours.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype
        and tensor.shape == theirs[name].shape
        and torch.equal(
            tensor.contiguous().view(-1).view(torch.uint8), theirs[name].contiguous().view(-1).view(torch.uint8)
        )
        for name, tensor in ours.items()
    )
