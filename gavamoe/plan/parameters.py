"""Parameters of a run's models, counted without loading or making a weight: the real classes, on the meta device.

Input: a config, the base model's shape, the numbers of users and items. Output: a `Blueprint`.
"""

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from gavamoe.config.schema import RunConfig, Stage1Config
from gavamoe.model.build import weightless_explainer
from gavamoe.model.decoders import GavamoeConfig
from gavamoe.stage1.vae_gmm import VaeGmm
from gavamoe.stage2.joint_model import EXPLAINER, JointModel, largest_layer, stored_in_bf16

RATING_SCALE = (1.0, 2.0, 3.0, 4.0, 5.0)
"""Rating scale that is assumed where no dataset is given; another one changes some hundred weights of the decoder."""

PERSISTENT = 10**5
"""Parameters of at most this many numbers stay whole on every device at ZeRO-3 (DeepSpeed's default)."""
_PARTS = {
    r"lora_": "adapters",
    r"user_embedding|item_embedding|cluster_embedding|rating_embedding": "slot tables",
    r"^vae_gmm\.": "stage 1",
    r"_projection\.": "slot projections",
    r"\.experts\.": "experts",
    r"\.router\.": "gates",
    r"\.mlp\.": "dense feed-forward",
    r"\.(self_attn|attn)\.": "attention",
    r"embed_tokens|\.wte\.|\.wpe\.": "word embeddings",
    r"lm_head": "output head",
    r"": "norms",
}
"""Pattern of parameter names -> part of the model; the first pattern that matches counts."""


@dataclass(frozen=True)
class Part:
    """Counts of the parameters of one part of the model."""

    total: int = 0
    """All parameters."""
    trained: int = 0
    """Parameters that get a gradient and optimizer states."""
    active: int = 0
    """Parameters that one text token uses: top_k experts, one gate, no table row, nothing of stage 1."""
    multiplied: int = 0
    """Active parameters that stand in matrices, not in biases."""

    def __add__(self, other: "Part") -> "Part":
        return Part(
            self.total + other.total,
            self.trained + other.trained,
            self.active + other.active,
            self.multiplied + other.multiplied,
        )


@dataclass(frozen=True)
class Blueprint:
    """The sizes of stage 2's joint model."""

    config: GavamoeConfig
    """Config of the explainer."""
    parts: dict[str, Part]
    """Parameters by part of the model."""
    largest: int
    """Numbers in the largest single parameter."""
    largest_module: int
    """Numbers in the own parameters of the module that has most of them, which ZeRO-3 gathers at once."""
    largest_layer: int
    """Numbers in the decoder layer that has most of them."""
    small: int
    """Numbers in parameters that ZeRO-3 leaves whole on every device."""
    halved: Part
    """The parameters that `stage2.precision: bf16_weights` stores as bfloat16."""

    @property
    def whole(self) -> Part:
        """All parameters together."""
        return sum(self.parts.values(), Part())

    @property
    def explainer(self) -> Part:
        """The explainer's parameters: all but stage 1's own."""
        return sum((part for name, part in self.parts.items() if name != "stage 1"), Part())


def draw(config: RunConfig, base: PreTrainedConfig, users: int, items: int) -> Blueprint:
    """Build the joint model of stage 2 on the meta device and count it.

    Args:
        users, items: numbers of known users and items; the tables have one row more each.

    Raises:
        InputError: an architecture or expert sizes that can't be built.
    """
    explainer = weightless_explainer(config, base, users, items)
    with torch.device("meta"), init.no_init_weights():
        joint = JointModel(explainer, draw_stage1(config.stage1, users, items), config.stage2.alpha)
    sizes = explainer.config
    # Low-rank experts are multiplied all at once; soft routes need every gate.
    chosen = 1 if sizes.expert_lora_rank else sizes.experts_per_token / sizes.n_experts
    share: dict[str, float] = {"experts": chosen, "gates": 1 if sizes.soft_routes else 1 / sizes.n_gates}
    share |= {"slot tables": 0, "stage 1": 0}
    parts: dict[str, Part] = {}
    halved = Part()
    for name, parameter in joint.named_parameters():
        part = next(value for pattern, value in _PARTS.items() if re.search(pattern, name))
        count = parameter.numel()
        active = round(count * share.get(part, 1))
        multiplied = 0 if name.endswith("bias") else active
        counts = Part(count, count if parameter.requires_grad else 0, active, multiplied)
        parts[part] = parts.get(part, Part()) + counts
        if name.startswith(EXPLAINER) and stored_in_bf16(name.removeprefix(EXPLAINER)):
            halved += counts
    ordered = {name: parts[name] for name in _PARTS.values() if name in parts}
    return Blueprint(
        sizes,
        ordered,
        max(parameter.numel() for parameter in joint.parameters()),
        max(_own_parameters(module) for module in joint.modules()),
        largest_layer(explainer),
        sum(p.numel() for p in joint.parameters() if p.numel() <= PERSISTENT),
        halved,
    )


def draw_stage1(config: Stage1Config, users: int, items: int) -> VaeGmm:
    """Stage 1's model on the meta device."""
    with torch.device("meta"):
        return VaeGmm(config, users, items, "categorical", RATING_SCALE)


def _own_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))
