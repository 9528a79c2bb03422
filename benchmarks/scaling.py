"""Strong and weak scaling of both stages from 1 worker to 2, one thread each, and the bytes that stage 1 sends.

    python benchmarks/scaling.py [--folder F] [--steps 12]

The quickstart's model on planted data, float32, gloo. Strong: the same global batch; weak: the same batch a worker.
Seconds are the median of rank 0's training steps, exchange included, after two that warm up; reading data, validation
and checkpoints are not in them. Bytes are counted as `benchmarks/plan.py` does, whose stage 2 is checked there.
F keeps data and stage 1 for the next call.
"""

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, multiprocessing

from benchmarks.plan import RING, _count_bytes
from gavamoe.config.files import load_config, override_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.plan.stage1_tables import table_memory
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1 import trainer
from gavamoe.stage1.train import train_stage1
from gavamoe.stage2 import train

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as `runtime.ray_train` sets it for its workers; read at the first allocation
USERS, ITEMS, RATINGS = 600, 300, 16_000
BATCH = {"stage1": 512, "stage2": 32}
"""Rows of a step, of all workers; as the quickstart on one."""
PAIRS_PER_ROW = 4
"""Stage 1's pairs in stage 2's step, likewise."""
WARM_UP = 2


class Enough(Exception):
    """The steps that are wanted have been taken."""


def settings(stage: str, rows: int, workers: int) -> RunConfig:
    """The quickstart with `rows` rows a step; stage 2's batches are a worker's, stage 1's is all workers'."""
    changes = [f"stage1.batch_size={rows if stage == 'stage1' else BATCH['stage1']}", "stage1.pretrain_epochs=0"]
    if stage == "stage2":
        own = rows // workers
        changes += [f"stage2.batch_size={own}", f"stage2.elbo_batch_size={PAIRS_PER_ROW * own}"]
        changes += ["stage2.validation_rows=32"]  # it validates before its first step
    return override_config(load_config("quickstart"), changes)


def prepare(folder: Path) -> None:
    """Data and a stage 1 for stage 2, unless an earlier call left them."""
    if not (folder / "data").is_dir():
        synthesize(folder / "data", users=USERS, items=ITEMS, ratings=RATINGS, seed=0)
    if not (folder / "stage1").is_dir():
        config = override_config(settings("stage2", BATCH["stage2"], 1), ["stage1.epochs=2"])
        train_stage1(config, folder / "data", folder / "stage1", LocalContext())


def measure(stage: str, rows: int, workers: int, folder: Path, steps: int) -> dict[str, float]:
    """{"seconds": of a step, "sent": bytes that rank 0 sends in a step} of `rows` rows on `workers` processes."""
    with tempfile.TemporaryDirectory() as scratch:
        multiprocessing.spawn(_worker, (stage, rows, workers, folder, Path(scratch), steps), nprocs=workers)
        found: dict[str, float] = json.loads((Path(scratch) / "found.json").read_text())
        return found


def _worker(rank: int, stage: str, rows: int, workers: int, folder: Path, scratch: Path, steps: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
    sent: Counter[str] = Counter()
    _count_bytes(sent)
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(f"{scratch}/store", workers), rank=rank, world_size=workers
    )
    seconds: list[float] = []
    owner, name = (trainer.Trainer, "_train_step") if stage == "stage1" else (train.Training, "_step")
    _time_calls(owner, name, seconds, sent, WARM_UP + steps)
    config, context = settings(stage, rows, workers), LocalContext(rank=rank, world_size=workers)
    try:
        if stage == "stage1":
            trainer.Trainer(config, open_dataset(folder / "data"), context).run()
        else:
            train.train_stage2(config, folder / "data", folder / "stage1", scratch / "out", context)
    except Enough:
        pass
    if rank == 0:
        ring = (workers - 1) / workers
        bytes_sent = sum(RING.get(kind, 0) * ring * size for kind, size in sent.items())
        found = {"seconds": float(np.median(seconds[WARM_UP:])), "sent": bytes_sent}
        (scratch / "found.json").write_text(json.dumps(found))
    distributed.barrier()


def _time_calls(owner: Any, name: str, seconds: list[float], sent: Counter[str], calls: int) -> None:
    """Make a method note how long each call took; `sent` holds the last one's bytes. Ends training after `calls`."""
    original = getattr(owner, name)

    def timed(self: Any, *arguments: Any) -> Any:
        sent.clear()
        started = time.perf_counter()
        result = original(self, *arguments)
        seconds.append(time.perf_counter() - started)
        if len(seconds) == calls:
            raise Enough
        return result

    setattr(owner, name, timed)


def planned_stage1(rows: int, workers: int, folder: Path) -> float:
    """Bytes that the plan says one of `workers` sends in a step of stage 1."""
    catalog = open_dataset(folder / "data").catalog
    stage1 = settings("stage1", rows, 1).stage1
    return table_memory(stage1, catalog.known_users, catalog.known_items, rows, workers).sent


def rows_of_a_step(stage: str, batch: int, folder: Path) -> int:
    """Stage 1 cuts an epoch into even batches, of `batch` rows at most."""
    if stage == "stage2":
        return batch
    count = open_dataset(folder / "data").size("train")
    return round(count / -(-count // batch))


def run(folder: Path, steps: int) -> None:
    """Measure and print a line per stage and kind of scaling."""
    for stage, batch in BATCH.items():
        one, few = measure(stage, batch, 1, folder, steps), rows_of_a_step(stage, batch, folder)
        for kind, wanted in (("strong", batch), ("weak", 2 * batch)):
            two, rows = measure(stage, wanted, 2, folder, steps), rows_of_a_step(stage, wanted, folder)
            speed_up = rows / few * one["seconds"] / two["seconds"]
            line = f"{stage} {kind}: {one['seconds']:.4f} s for {few} rows, {two['seconds']:.4f} s for {rows}"
            line += f", {speed_up:.2f} x the rows per second; {two['sent'] / 1e6:.2f} MB sent a step"
            if stage == "stage1":
                line += f", plan {planned_stage1(rows, 2, folder) / two['sent']:.3f} x"
            print(line, flush=True)


def main() -> None:
    """Prepare and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        prepare(folder)
        run(folder, arguments.steps)


if __name__ == "__main__":
    main()
