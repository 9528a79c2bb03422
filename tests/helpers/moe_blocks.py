"""Small MoE blocks in float64, and hidden states for them."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from gavamoe.model.block import MultiGateMoe
from gavamoe.model.experts import MoeSpec

D, N, S, WIDTH = 16, 4, 2, 8
CLUSTERS = torch.tensor([2, 0, 1, 2])


def spec(**changes: object) -> MoeSpec:
    values = {
        "hidden_size": D, "experts": N, "top_k": S, "expert_size": WIDTH, "gates": 3, "activation": "silu",
        "gated": True,
    }  # fmt: skip
    return MoeSpec(**(values | changes))  # type: ignore[arg-type]


def kernel(name: str) -> PreTrainedConfig:
    return PreTrainedConfig(experts_implementation=name)


def block(kernel_name: str = "eager", shared: nn.Module | None = None, **changes: object) -> MultiGateMoe:
    """A block in float64 with random weights of the size that a trained model has."""
    torch.manual_seed(0)
    built = MultiGateMoe(kernel(kernel_name), spec(**changes), shared)
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.4)
    return built.double()


def hidden(rows: int = 4, length: int = 5) -> Tensor:
    return torch.randn(rows, length, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
