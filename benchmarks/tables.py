"""Stage 1's tables, whole and sharded, on two workers: steps per second, and memory at 10^7 users.

    python benchmarks/tables.py [--users 1e7] [--compared 5e5] [--size 64] [--steps 30]

First the same steps with `stage1.tables` replicated and sharded, side by side in one run, at `--compared` users: their
ratio. Then sharded tables alone at `--users`: what a worker holds while it trains (anonymous memory), how large its
files are, and what a process holds that looks the finished rows up in mapped files. Users' ids are drawn evenly, which
is the hardest case for the exchange; a tenth as many items. Model, optimizers and steps are the trainer's own; no
dataset is read.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, distributed, multiprocessing

from gavamoe.config.files import load_config, override_config
from gavamoe.config.schema import Stage1Config
from gavamoe.model.tables.mapped import MappedTable
from gavamoe.plan.stage1_tables import table_memory
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.sharding.held_tables import HeldTables, hold, table_maker
from gavamoe.stage1.sparse_adam import GradientSum, clip_gradients
from gavamoe.stage1.vae_gmm import VaeGmm

WORKERS, BATCH, ROUNDS, WARM_UP = 2, 1024, 3, 3
LOOKUPS = 200
"""Batches that are looked up in mapped files."""


def settings(kind: str, size: int) -> Stage1Config:
    """The quickstart's network around tables of a kind."""
    changes = [f"stage1.embedding_size={size}", f"stage1.batch_size={BATCH}", "stage2.alpha=0", f"stage1.tables={kind}"]
    return override_config(load_config("quickstart"), changes).stage1


class Steps:
    """One worker's model and optimizers, and the trainer's step on random pairs."""

    def __init__(self, config: Stage1Config, users: int, rank: int) -> None:
        context = LocalContext(rank=rank, world_size=WORKERS)
        torch.manual_seed(0)
        make = table_maker(config, context)
        self.model = VaeGmm(config, users, users // 10, "gaussian", (1.0, 5.0), make_table=make)
        self.tables: HeldTables = hold(self.model, config, "benchmark")
        rows = {id(each) for each in self.tables.parameters}
        self.dense = [p for p in self.model.parameters() if p.requires_grad and id(p) not in rows]
        self.optimizer = torch.optim.AdamW(self.dense, lr=1e-3, fused=True)
        self.sum_gradients = GradientSum(self.dense, self.tables.shared, self.tables.lookups)
        self.random = np.random.default_rng(rank)
        self.users = users

    def take(self, count: int) -> float:
        """Seconds of `count` steps."""
        started = time.perf_counter()
        own = BATCH // WORKERS
        for _ in range(count):
            user_B = torch.from_numpy(self.random.integers(self.users, size=own))
            item_B = torch.from_numpy(self.random.integers(self.users // 10, size=own))
            rating_B = torch.from_numpy(self.random.uniform(1, 5, own).astype(np.float32))
            mu_BL, log_var_BL = self.model.encode(user_B, item_B)
            z_BL: Tensor = self.model.sample(mu_BL, log_var_BL, torch.randn_like(mu_BL))
            bias_B = self.model.bias(user_B, item_B)
            self.model.pair_elbo(mu_BL, log_var_BL, z_BL, bias_B, rating_B, 0.1).loss.sum().div(BATCH).backward()
            self.sum_gradients([own] * WORKERS)
            self.tables.collect_gradients()
            clip_gradients(self.dense, self.tables.parameters, 5.0, self.tables.over_workers)
            for optimizer in (self.optimizer, self.tables.optimizer):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        distributed.barrier()
        return time.perf_counter() - started


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def _join(rank: int, meeting: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORKERS)


def _compare(rank: int, folder: Path, users: int, size: int, steps: int) -> None:
    _join(rank, folder / "compare")
    both = {kind: Steps(settings(kind, size), users, rank) for kind in ("replicated", "sharded")}
    seconds: dict[str, list[float]] = {kind: [] for kind in both}
    for each in both.values():
        each.take(WARM_UP)
    for _ in range(ROUNDS):  # in turns, so that a busy machine slows both
        for kind, each in both.items():
            seconds[kind].append(each.take(steps))
    if rank == 0:
        found = {kind: steps / float(np.median(values)) for kind, values in seconds.items()}
        (folder / "compared.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def _measure(rank: int, folder: Path, users: int, size: int, steps: int) -> None:
    _join(rank, folder / "measure")
    started, before = time.perf_counter(), anonymous()
    work = Steps(settings("sharded", size), users, rank)
    made = time.perf_counter() - started
    first = work.take(1)  # which makes the moments
    trained, rate = anonymous() - before, steps / work.take(steps)
    started = time.perf_counter()
    work.tables.keep_best(None)
    kept, best = time.perf_counter() - started, anonymous() - before
    started = time.perf_counter()
    work.tables.publish(folder if rank == 0 else None)
    found = {
        "made": made, "first": first, "trained": trained, "rate": rate, "kept": kept, "best": best,
        "published": time.perf_counter() - started, "peak": anonymous() - before,
    }  # fmt: skip
    (folder / f"measured-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def _look_up(_rank: int, folder: Path, users: int, size: int) -> None:
    torch.set_num_threads(1)
    before, table = anonymous(), MappedTable("user_embedding", users, size)
    table.attach(folder)
    random, started = np.random.default_rng(0), time.perf_counter()
    for _ in range(LOOKUPS):
        table(torch.from_numpy(random.integers(users, size=BATCH)))
    seconds = (time.perf_counter() - started) / LOOKUPS
    (folder / "looked-up.json").write_text(json.dumps({"seconds": seconds, "held": anonymous() - before}))


def run(users: int, compared: int, size: int, steps: int, folder: Path) -> None:
    """Measure and print."""
    multiprocessing.spawn(_compare, (folder, compared, size, steps), nprocs=WORKERS)
    rates = json.loads((folder / "compared.json").read_text())
    print(
        f"{compared:,} users x {size}, {WORKERS} workers, steps/s: replicated {rates['replicated']:.1f}, sharded"
        f" {rates['sharded']:.1f}, ratio {rates['sharded'] / rates['replicated']:.2f}",
        flush=True,
    )
    multiprocessing.spawn(_measure, (folder, users, size, steps), nprocs=WORKERS)
    planned = table_memory(settings("sharded", size), users, users // 10, users, WORKERS)
    for rank in range(WORKERS):
        found = json.loads((folder / f"measured-{rank}.json").read_text())
        print(
            f"{users:,} users x {size}, sharded, worker {rank}: made in {found['made']:.0f} s; training holds"
            f" {found['trained'] / 1e9:.2f} GB (plan {planned.device / 1e9:.2f}), with the best state kept"
            f" {found['best'] / 1e9:.2f}; {found['rate']:.1f} steps/s; best state written in {found['kept']:.0f} s,"
            f" all rows sent and written in {found['published']:.0f} s, after which {found['peak'] / 1e9:.2f} GB",
            flush=True,
        )
    files = sum(path.stat().st_size for path in (folder / "tables").glob("*"))
    multiprocessing.spawn(_look_up, (folder, users, size), nprocs=1)
    read = json.loads((folder / "looked-up.json").read_text())
    print(
        f"files {files / 1e9:.2f} GB; a process that maps them holds {read['held'] / 1e6:.0f} MB of its own after"
        f" {LOOKUPS} lookups of {BATCH} users, {1000 * read['seconds']:.1f} ms each",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=float, default=1e7)
    parser.add_argument("--compared", type=float, default=5e5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="gavamoe-tables-") as scratch:
        run(int(given.users), int(given.compared), given.size, given.steps, Path(scratch))
