"""Stage 1 in one or two processes, for the tests of sharded tables."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from gavamoe.config.schema import RunConfig
from gavamoe.runtime.context import LocalContext, Metrics
from gavamoe.stage1.train import train_stage1
from helpers.tiny import tiny_stage1


def of_kind(tables: str, **changes: Any) -> RunConfig:
    """A tiny run of 60 steps whose stage 2 would look tables up."""
    config = tiny_stage1(batch_size=127, epochs=4, **changes)
    values = config.model_dump(mode="json")
    values["stage1"]["tables"], values["stage2"]["alpha"] = tables, 0.0
    return RunConfig.model_validate(values)


class _Merged(LocalContext):
    """Its checkpoints are folders by number of steps, with all ranks' files, as Ray Train merges them."""

    def log(self, metrics: Metrics) -> None:
        self.lines.append(dict(metrics))

    def checkpoint(self, folder: Path, metrics: Metrics) -> None:
        assert self.storage is not None
        shutil.copytree(folder, self.storage / str(metrics["epoch"]), dirs_exist_ok=True)


def _worker(rank: int, workers: int, configs: list[RunConfig], dataset: Path, work: Path, resume: Path | None) -> None:
    torch.set_num_threads(1)
    if workers > 1:
        meeting = f"file://{work}/meeting"
        torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=workers)
    for config in configs:
        folder = work / config.stage1.tables
        context = _Merged(rank=rank, world_size=workers, resume_from=resume, storage=folder / "checkpoints")
        metrics = train_stage1(config, dataset, folder / "stage1", context)
        (folder / f"rank{rank}.json").write_text(json.dumps({"lines": context.lines, "metrics": metrics}))
    if workers > 1:
        torch.distributed.destroy_process_group()


def trained(
    configs: list[RunConfig], dataset: Path, work: Path, workers: int = 2, resume: Path | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Train the configs one after the other in the same workers.

    Returns each rank's log lines and metrics by the kind of tables, whose folder in `work` gets stage1 and
    checkpoints/EPOCHS.
    """
    for config in configs:
        (work / config.stage1.tables / "checkpoints").mkdir(parents=True)
    arguments = (workers, configs, dataset, work, resume)
    if workers == 1:
        _worker(0, *arguments)
    else:
        multiprocessing.spawn(_worker, arguments, nprocs=workers)
    kinds = [config.stage1.tables for config in configs]
    return {
        kind: [json.loads((work / kind / f"rank{rank}.json").read_text()) for rank in range(workers)] for kind in kinds
    }
