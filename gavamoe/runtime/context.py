"""The interface between training loops and Ray: rank, device and checkpoint of a worker, its log and its reports.

A loop takes a `Context` and plain arguments. `LocalContext` runs it in this process (tests, one
laptop worker); `gavamoe.runtime.ray_train` gives it one backed by Ray Train.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

Metrics = Mapping[str, float | int | str | None]


class Context(Protocol):
    """One worker's view of a training run."""

    rank: int
    world_size: int
    device: str
    """A torch device string: "cpu" or "cuda:0"."""
    resume_from: Path | None
    """Folder of the last registered checkpoint, or None for a fresh start."""

    def log(self, metrics: Metrics) -> None:
        """Append one line to the run's log (rank 0 only). `metrics` holds "phase", "step" and, where known, "steps"."""

    def settle(self) -> None:
        """Wait until the last checkpoint, which may be stored in the background, is."""

    def checkpoint(self, folder: Path, metrics: Metrics, unchanged: Sequence[str] = ()) -> None:
        """Register what `folder` holds as a checkpoint, which takes its files away.

        Every rank calls it at the same step; the ranks' files are merged into one folder. It may be stored in the
        background while the loop goes on.

        Args:
            unchanged: names of files of this rank's last checkpoint that belong to this one as well, as they are there.
        """


@dataclass
class LocalContext:
    """A single worker in this process. Log lines stay in `lines`; checkpoints are copied below `storage` if given."""

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"
    resume_from: Path | None = None
    storage: Path | None = None
    lines: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)

    def log(self, metrics: Metrics) -> None:
        self.lines.append(dict(metrics))

    def settle(self) -> None:
        pass  # it is stored at once

    def checkpoint(self, folder: Path, metrics: Metrics, unchanged: Sequence[str] = ()) -> None:
        del metrics
        if self.storage is not None:
            kept = self.storage / f"checkpoint_{len(self.checkpoints):06d}"
            shutil.copytree(folder, kept)
            for name in unchanged:
                shutil.copy2(self.checkpoints[-1] / name, kept / name)
            self.checkpoints.append(kept)
