"""Where a stage-2 run is, and which of its states becomes the artifact: the best on validation so far, or the last; and
when to stop.

The best state is kept whole in rank 0's memory and in each checkpoint, so that a resumed run still has it. It is
written where it has changed since the last checkpoint, unless it is the very state that the engine's files hold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from gavamoe.artifacts.tensor_files import load_tensors
from gavamoe.config.schema import Stage2Config
from gavamoe.stage2.training_engines import Engine

_FILE = "best.pt"

Validations = Sequence[tuple[int, float]]
"""The validations of a run in their order: (optimizer steps done, loss in nats per token)."""


@dataclass
class Progress:
    """The training loop's own state, which a checkpoint keeps beside the engine's."""

    step: int = 0
    """Optimizer steps done."""
    validations: list[tuple[int, float]] = field(default_factory=list)
    """Validations so far: (optimizer steps done, loss in nats per token)."""
    train_loss: float | None = None
    """Training loss as logged last."""
    tokens: int = 0
    """Tokens that were trained on."""
    seconds: float = 0.0
    """Wall time spent in optimizer steps, in seconds."""
    cpu_seconds: list[float] = field(default_factory=lambda: [0.0])
    """CPU time of this worker spent in optimizer steps: until each validation, and until now."""
    movements: list[tuple[int, dict[str, list[float]]]] = field(default_factory=list)
    """Validations' measurements of the experts: (optimizer steps done, a `Movement`)."""


class BestState:
    """Keeps a copy of the best state of a run so far, by its validations."""

    def __init__(self, config: Stage2Config) -> None:
        # With alpha 1 the text is not trained, so its loss says nothing about the training.
        self._wanted = config.keep == "best" and config.alpha < 1
        self._patience = config.patience
        self._state: dict[str, Tensor] | None = None
        self._stored = False
        """Whether the last checkpoint of this process has the state's file."""

    def follow(self, validations: Validations, engine: Engine) -> None:
        """Take a copy of the state if the last validation is the best. Every rank calls it."""
        best = best_step(validations)
        if self._wanted and best is not None and best == validations[-1][0]:
            self._state, self._stored = engine.state_dict(), False

    def exhausted(self, validations: Validations) -> bool:
        """Whether the last `patience` validations were all without a new best."""
        return self._patience > 0 and _since_best(validations) >= self._patience

    def kept_step(self, validations: Validations, last: int) -> int:
        """Optimizer steps that the kept state has behind it; `last` are those of the run."""
        best = best_step(validations) if self._wanted else None
        return last if best is None else best

    def kept_state(self, validations: Validations, last: int, engine: Engine) -> dict[str, Tensor]:
        """The kept state on rank 0, empty on others. Every rank calls it."""
        if self.kept_step(validations, last) == last:
            return engine.state_dict()
        assert self._state is not None  # taken at that step, or read from the checkpoint
        return self._state

    def save(self, folder: Path, validations: Validations, step: int) -> list[str]:
        """Add the best state to a checkpoint of step `step`, if need be; for rank 0.

        Returns:
            The files that are to be as they are in the last checkpoint: this one's, if it has not changed.
        """
        if self._state is None or self.kept_step(validations, step) == step:
            self._stored = False  # there is none yet, or the engine's own files hold it
            return []
        if self._stored:
            return [_FILE]
        torch.save(self._state, folder / _FILE)
        self._stored = True
        return []

    def load(self, folder: Path, validations: Validations, step: int, engine: Engine, rank: int) -> None:
        """Read what `save` wrote, if there was a best by then, after the engine has read its own; ranks above 0 hold
        nothing, as they did. Every rank calls it."""
        if not self._wanted or best_step(validations) is None:
            return
        if (folder / _FILE).exists():
            self._state = load_tensors(folder / _FILE) if rank == 0 else {}
        else:
            assert self.kept_step(validations, step) == step
            self._state = engine.state_dict()


def best_step(validations: Validations) -> int | None:
    """The first step of the lowest finite loss; what came before any training does not count. None without one."""
    finite = [(loss, step) for step, loss in validations if step > 0 and math.isfinite(loss)]
    return min(finite)[1] if finite else None


def _since_best(validations: Validations) -> int:
    """Validations after the best one."""
    best = best_step(validations)
    return 0 if best is None else sum(step > best for step, _ in validations)
