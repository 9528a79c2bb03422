"""Whether the routed experts learn: how large their output is beside the dense network's, and how fast both change.

Each block is fed, at every measurement, the hidden states that it had before the first step, of a few training rows.
What its routed and its shared part make of them then changes by their own weights alone.

Only blocks that keep a dense network beside their experts (`shared`, `upcycle`, `lora`) are measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gavamoe.model.block import MultiGateMoe

PROBE_ROWS = 2
IDLE = 1e-3
"""Share of the dense network's output below which the routed experts' counts as nothing."""
PROBE_FILE = "expert_probe.safetensors"


@dataclass(frozen=True)
class Movement:
    """The two parts of each block, by root mean squares; a value a layer."""

    routed_share: list[float]
    """Routed output over shared output."""
    routed_change: list[float]
    """Change of the routed output since the start, over the block's output at the start."""
    shared_change: list[float]
    """Change of the shared output since the start, over the same."""

    @property
    def idle(self) -> bool:
        """Whether no layer's experts have an output that counts."""
        return max(self.routed_share) < IDLE

    @property
    def ratio(self) -> float | None:
        """How far the routed outputs moved for each step of the shared ones: the means over layers; None where those
        did not move at all."""
        shared = sum(self.shared_change)
        return sum(self.routed_change) / shared if shared else None

    def warning(self) -> str:
        """What to say of idle experts."""
        return (
            f"the routed experts are idle: their output is {max(self.routed_share):.1e} of the dense network's beside"
            " them, or less, in every layer; raise stage2.experts.scale or stage2.expert_learning_rate, train for"
            " longer, or take experts.conversion=upcycle"
        )

    def scalars(self) -> dict[str, float]:
        """Means over the layers, for a line of the log."""
        layers = len(self.routed_share)
        means = {name: sum(values) / layers for name, values in vars(self).items()}
        return means | {"routed_share_least": min(self.routed_share)}


class MovementProbe:
    """Measures the blocks of a model from `start` on; all workers call it, since a pass may be collective."""

    def __init__(self, model: nn.Module) -> None:
        self._blocks = [
            block for block in model.modules() if isinstance(block, MultiGateMoe) and block.shared_expert is not None
        ]
        self._inputs: list[tuple[Tensor, Tensor]] = []
        """Inputs of each block at the start: hidden states (B, T, D), and the rows' clusters (B,) or shares (B, K)."""
        self._outputs: list[tuple[Tensor, Tensor]] = []
        """Outputs of each block at the start, of the routed and of the shared experts: (B x T, D) each."""

    def __bool__(self) -> bool:
        return bool(self._blocks)

    def start(self, forward: Callable[[], Any]) -> None:
        """Note the blocks' inputs and outputs in one pass of the model, which `forward` runs without gradients."""
        self._inputs = []
        handles = [block.register_forward_pre_hook(self._note) for block in self._blocks]
        try:
            self._outputs = self._pass(forward)
        finally:
            _remove(handles)

    def measure(self, forward: Callable[[], Any]) -> Movement:
        """Feed the blocks what they had at the start, in one more pass of the same rows."""
        handles = [
            block.register_forward_pre_hook(_feed(*inputs))
            for block, inputs in zip(self._blocks, self._inputs, strict=True)
        ]
        try:
            now = self._pass(forward)
        finally:
            _remove(handles)
        shares, routed, shared = [], [], []
        for (routed_now, shared_now), (routed_then, shared_then) in zip(now, self._outputs, strict=True):
            block = _size(routed_then + shared_then)
            shares.append(_size(routed_now) / _size(shared_now))
            routed.append(_size(routed_now - routed_then) / block)
            shared.append(_size(shared_now - shared_then) / block)
        return Movement(shares, routed, shared)

    def save(self, folder: Path) -> None:
        """Add the start to a checkpoint; for rank 0."""
        if self._blocks:
            names = ("hidden", "clusters", "routed", "shared")
            layers = (inputs + outputs for inputs, outputs in zip(self._inputs, self._outputs, strict=True))
            state = {
                f"{layer}.{name}": tensor.contiguous()
                for layer, tensors in enumerate(layers)
                for name, tensor in zip(names, tensors, strict=True)
            }
            save_file(state, folder / PROBE_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        if self._blocks:
            state = load_file(folder / PROBE_FILE)
            layers = range(len(self._blocks))
            self._inputs = [(state[f"{layer}.hidden"], state[f"{layer}.clusters"]) for layer in layers]
            self._outputs = [(state[f"{layer}.routed"], state[f"{layer}.shared"]) for layer in layers]

    def _note(self, _: nn.Module, inputs: tuple[Tensor, Tensor | None]) -> None:
        hidden_BTD, clusters = inputs
        missing = torch.zeros(len(hidden_BTD), dtype=torch.long)
        self._inputs.append((hidden_BTD.float().cpu(), missing if clusters is None else clusters.cpu().clone()))

    def _pass(self, forward: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
        """Routed and shared output of each block in one pass."""
        routed: list[Tensor] = []
        shared: list[Tensor] = []
        handles = []
        for block in self._blocks:
            assert block.shared_expert is not None
            handles.append(block.experts.register_forward_hook(lambda *call: routed.append(call[-1].float().cpu())))
            handles.append(
                block.shared_expert.register_forward_hook(
                    lambda *call: shared.append(call[-1].flatten(0, 1).float().cpu())
                )
            )
        try:
            forward()
        finally:
            _remove(handles)
        return list(zip(routed, shared, strict=True))


def _feed(hidden: Tensor, clusters: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """A hook that gives a block these inputs in place of its own."""

    def hook(_: nn.Module, inputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        return hidden.to(inputs[0]), clusters.to(inputs[0].device)

    return hook


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _size(values: Tensor) -> float:
    """Root mean square."""
    return float(values.double().square().mean().sqrt())
