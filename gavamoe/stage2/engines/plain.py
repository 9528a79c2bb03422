"""The engine of plain torch: one process, no ZeRO."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gavamoe.artifacts.tensor_files import load_tensors
from gavamoe.config.schema import Stage2Config
from gavamoe.stage2.batches import Batch
from gavamoe.stage2.engines.interface import moved, set_rates, state_on_cpu
from gavamoe.stage2.joint_model import JointModel, Losses, mean_losses, parameter_groups
from gavamoe.stage2.schedule import Rates

_TORCH_FILE = "engine.pt"


class TorchEngine:
    """One process, no ZeRO: for tests, and machines without a compiler."""

    def __init__(self, module: JointModel, config: Stage2Config, *, device: str = "cpu") -> None:
        self.module = module.to(device)
        self._device, self._clip = device, config.clip_norm
        self._optimizer = torch.optim.AdamW(parameter_groups(module, config), fused=True)
        self._trainable = [p for p in module.parameters() if p.requires_grad]

    def train_step(self, batches: Sequence[Batch], rates: Rates) -> Losses:
        self.module.train()
        set_rates(self._optimizer, rates)
        accumulated = []
        for batch in batches:
            losses = self.module(**moved(batch, self._device))
            (losses["loss"] / len(batches)).backward()
            accumulated.append(losses)
        torch.nn.utils.clip_grad_norm_(self._trainable, self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return mean_losses(accumulated)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Losses:
        self.module.eval()
        losses: Losses = self.module(**moved(batch, self._device))
        return losses

    def save(self, folder: Path) -> None:
        state = {"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, folder / _TORCH_FILE)

    def load(self, folder: Path) -> None:
        state = load_tensors(folder / _TORCH_FILE, self._device)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])

    def state_dict(self, prefix: str = "", *, everywhere: bool = False) -> dict[str, Tensor]:
        del everywhere  # there is one rank
        return state_on_cpu(self.module, prefix)

    def close(self) -> None:
        pass
