"""Speed of stage 1, and how well it finds planted groups.

    python benchmarks/stage1.py speed [--threads 2]     one training step at the size of the paper's Yelp
    python benchmarks/stage1.py workers                 1 worker against 2, one thread each
    python benchmarks/stage1.py seeds [--seeds 0,1,2] [--set stage1.F=VALUE]   the quickstart's stage 1 on planted data
    python benchmarks/stage1.py controls                settings that must fail, and do

Prints one line per result; nothing is asserted.
"""

import argparse
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing

from gavamoe.config.files import load_config, override_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import Dataset, open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.data.writer import DatasetWriter, Rows
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.pair_stream import PairSource, global_batches
from gavamoe.stage1.train import train_stage1
from gavamoe.stage1.trainer import Trainer

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as `runtime.ray_train` sets it for its workers; read at the first allocation
USERS, ITEMS, PAIRS, BATCH = 27_147, 20_266, 200_000, 1024


def yelp_size(folder: Path) -> Dataset:
    """Random pairs without text, with the paper's numbers of users and items."""
    random = np.random.default_rng(0)
    user, item = (np.r_[:high, random.integers(high, size=PAIRS - high)].astype(np.int32) for high in (USERS, ITEMS))
    split = np.zeros(PAIRS, np.int8)
    split[-2000:] = 1 + np.arange(2000) % 2
    names = [f"U{index}" for index in range(USERS)], [f"I{index}" for index in range(ITEMS)]
    rows = Rows(*names, [None] * ITEMS, user, item, random.integers(1, 6, PAIRS).astype(np.float32), split)
    no_features = pa.ListArray.from_arrays(np.zeros(PAIRS + 1, np.int32), pa.array([], pa.string()))
    with DatasetWriter(folder, rows) as writer:
        writer.write(pa.nulls(PAIRS, pa.string()), no_features)
        about = {"source": "random", "format": "synthetic", "text_mode": "none", "split": "made"}
        writer.finish(**about, seed=0, preparation={})
    return open_dataset(folder)


def paper_size(**changes: Any) -> RunConfig:
    sizes = {"embedding_size": 768, "latent_size": 128, "clusters": 3, "batch_size": BATCH, "embedding_init": "random"}
    return RunConfig.model_validate({"stage1": {**sizes, **changes}})


def seconds_per_step(trainer: Trainer, steps: int) -> float:
    """Median over some training steps, after two that warm up; the epoch is at hand."""
    pairs = trainer.source.epoch(0)
    trainer.model.train()
    times = []
    for rows in list(global_batches(pairs.size, BATCH))[: steps + 2]:
        noise_BL = torch.randn(rows.stop - rows.start, trainer.config.latent_size)
        times.append(timed(lambda rows=rows, noise_BL=noise_BL: trainer._train_step(pairs, rows, 0.1, noise_BL)))
    return float(np.median(times[2:]))


def speed(threads: int) -> None:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        data = yelp_size(Path(folder))
        feeding = seconds_of_feeding(data)
        for changes in ({}, {"dropout": 0.0}, {"encoder_feedforward": 1536}):
            seconds = seconds_per_step(Trainer(paper_size(**changes), data, LocalContext()), steps=8)
            fed = seconds + feeding * BATCH
            print(f"step, {threads} threads, {changes or 'defaults'}: {seconds:.3f} s", end=", ")
            print(f"{BATCH / seconds:,.0f} pairs/s, with feeding {BATCH / fed:,.0f}", flush=True)
    print(f"feeding: {1 / feeding:,.0f} pairs/s")
    dense_adam(threads)


def seconds_of_feeding(data: Dataset) -> float:
    """A pair's share of reading an epoch from Parquet, shuffling it, hiding ids and cutting it into batches."""
    source = PairSource(data, negatives=1, unknown_rate=0.05, seed=0)

    def read(epoch: int) -> None:
        pairs = source.epoch(epoch)
        for rows in global_batches(pairs.size, BATCH):
            pairs.take(rows)

    return min(timed(lambda epoch=epoch: read(epoch)) for epoch in range(3)) / source.size


def dense_adam(threads: int) -> None:
    """What a dense optimizer step over the embedding tables alone would cost."""
    table = torch.nn.Parameter(torch.randn(USERS + ITEMS + 2, 768))
    table.grad = torch.zeros_like(table)
    optimizer = torch.optim.AdamW([table], fused=True)
    optimizer.step()
    print(f"dense AdamW over both tables, {threads} threads: {timed(optimizer.step):.3f} s a step")


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _worker(rank: int, world_size: int, port: int, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    trainer = Trainer(paper_size(), open_dataset(data), LocalContext(rank=rank, world_size=world_size))
    seconds = seconds_per_step(trainer, steps=12)
    if rank == 0:
        out.write_text(str(seconds))


def workers() -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, out, seconds = yelp_size(Path(folder)).path, Path(folder) / "seconds", []
        for count in (1, 2):
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            torch.multiprocessing.spawn(_worker, (count, port, data, out), nprocs=count)
            seconds.append(float(out.read_text()))
            print(f"{count} worker(s), one thread each: {seconds[-1]:.3f} s, {BATCH / seconds[-1]:,.0f} pairs/s")
        print(f"speed-up {seconds[0] / seconds[1]:.2f}")


def planted(title: str, seed: int, changes: Mapping[str, Any], **data: Any) -> None:
    """Train on fresh planted data of a seed and print what was found; `changes` are fields of stage 1."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = synthesize(Path(folder) / "data", seed=seed, **data)
        fields = [f"stage1.{name}={value}" for name, value in changes.items()]
        config = override_config(load_config("quickstart"), [f"seed={seed}", *fields])
        metrics = train_stage1(config, dataset, Path(folder) / "stage1", LocalContext())
        truth = open_dataset(dataset).truth()
    assert truth is not None
    rmse = metrics["test"]["rmse"]
    print(
        f"{title}, seed {seed}: RMSE {rmse:.3f}, {rmse / truth.noise_floor_rmse:.3f} of the noise floor,"
        f" {rmse / truth.bias_rmse:.3f} of the bias model; user ARI {metrics['user_ari']:.3f};"
        f" smallest cluster {metrics['smallest_cluster_share']:.1%}; {metrics['seconds']:.0f} s",
        flush=True,
    )


PAPER_RATES = {
    "batch_size": 4096, "learning_rate": 1e-5, "mixture_learning_rate": 1e-5, "pretrain_epochs": 0, "epochs": 30,
    "schedule": "constant",
}  # fmt: skip
PLAIN = {"embedding_init": "random", "user_agreement": 0.0}


def controls(seeds: list[int]) -> None:
    for seed in seeds:
        planted("gap halved", seed, {}, gap=0.5)
        planted("no agreement with the user's cluster", seed, {"user_agreement": 0.0})
        planted("random embeddings", seed, {"embedding_init": "random"})
        planted("no mixture fitted, nothing else either", seed, {**PLAIN, "mixture_init": "random"})
        planted("the paper's printed rates", seed, {**PLAIN, **PAPER_RATES})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="speed", choices=["speed", "workers", "seeds", "controls"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="stage1.FIELD=VALUE", help="only with seeds")
    options = parser.parse_args()
    changes = dict(change.removeprefix("stage1.").split("=", 1) for change in options.set)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    if options.what == "speed":
        speed(options.threads)
    elif options.what == "workers":
        workers()
    else:
        torch.set_num_threads(options.threads)
        if options.what == "controls":
            controls(seeds)
        for seed in seeds if options.what == "seeds" else []:
            planted(" ".join(["quickstart", *options.set]), seed, changes)


if __name__ == "__main__":
    main()
