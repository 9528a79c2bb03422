"""The interface of a training engine, and what the engines share.

Inputs: batches as dicts of tensors, rates. Outputs: losses; copies of a module's state on the CPU.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gavamoe.stage2.batches import Batch
from gavamoe.stage2.joint_model import JointModel, Losses
from gavamoe.stage2.schedule import Rates


class Engine(Protocol):
    """The interface of a training engine, as the loop sees it."""

    module: JointModel

    def train_step(self, batches: Sequence[Batch], rates: Rates) -> Losses:
        """One optimizer step over accumulated batches, at these shares of each group's peak learning rate."""

    def evaluate(self, batch: Batch) -> Losses:
        """Losses without gradients, in evaluation mode."""

    def save(self, folder: Path) -> None:
        """Write everything that resuming needs; every rank calls it, each may give a folder of its own."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, from one folder with all ranks' files."""

    def state_dict(self, prefix: str = "", *, everywhere: bool = False) -> dict[str, Tensor]:
        """The module's whole state on the CPU, names that start with `prefix`; empty on ranks above 0
        unless `everywhere`. Every rank calls it."""

    def close(self) -> None:
        """Release what the engine set up for itself."""


def set_rates(optimizer: Any, rates: Rates) -> None:
    """Give each of the optimizer's groups its share of its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = (rates.routed if group["routed"] else rates.shared) * group["peak_lr"]


def moved(batch: Batch, device: str) -> Batch:
    """The batch on the device. From pinned memory it is copied while the host goes on."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def state_on_cpu(
    module: torch.nn.Module,
    prefix: str,
    gathered: Callable[[Tensor], contextlib.AbstractContextManager[Any]] | None = None,
    wanted: bool = True,
) -> dict[str, Tensor]:
    """Copies of a module's state; one tensor under two names stays one tensor.

    `gathered` makes a sharded parameter whole while its context lasts; all ranks must enter it, `wanted` or not.
    """
    copies: dict[int, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not name.startswith(prefix):
            continue
        if id(tensor) not in copies:
            sharded = gathered is not None and hasattr(tensor, "ds_id")
            with gathered(tensor) if gathered is not None and sharded else contextlib.nullcontext():
                copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if wanted else tensor
        if wanted:
            state[name] = copies[id(tensor)]
    return state
