"""Stage 1 on data of other kinds: users never seen, pairs without ratings, more pairs than memory should hold.

    python benchmarks/stage1_data.py cold [--seeds 0,1,2]        users held out entirely, against the item-mean model
    python benchmarks/stage1_data.py memory [--pairs 1e6,1e7]    peak memory of a whole training, by number of pairs
    python benchmarks/stage1_data.py implicit INTERACTIONS       a file of users and items: AUC against popularity

`--set stage1.FIELD=VALUE` changes the config. Prints one line per result; nothing is asserted.
"""

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from gavamoe.config.files import load_config, override_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import SPLITS, Dataset, open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.data.writer import DatasetWriter, Rows
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.artifact import load_stage1
from gavamoe.stage1.routes import route_pairs
from gavamoe.stage1.train import train_stage1

HELD_OUT_USERS = 0.1
ITEM_MEAN_SHRINKAGE = 5
"""Ratings of the overall mean that the item-mean model gives to every item."""
USERS, ITEMS = 50_000, 20_000
BATCH = 250_000
SMALL_NETWORK = (
    "stage1.embedding_size=16", "stage1.latent_size=8", "stage1.encoder_layers=1", "stage1.encoder_feedforward=16",
    "stage1.decoder_hidden=16", "stage1.batch_size=8192", "stage1.pretrain_epochs=0", "stage1.epochs=1",
)  # fmt: skip
"""Memory by pairs is the question, and a large network would take hours over 10 million."""


def config_of(seed: int, changes: Sequence[str]) -> RunConfig:
    return override_config(load_config("quickstart"), [f"seed={seed}", *changes])


def cold(seeds: Sequence[int], changes: Sequence[str]) -> None:
    """RMSE on all ratings of users that training never saw."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            data = without_users(open_dataset(synthesize(Path(folder) / "all", seed=seed)), Path(folder) / "kept", seed)
            out = Path(folder) / "stage1"
            metrics = train_stage1(config_of(seed, changes), data.path, out, LocalContext())
            train, test = data.arrays("train"), data.arrays("test")
            rating = route_pairs(load_stage1(out)[0], test.user, test.item).rating
        by_item = item_means(train.item, train.rating, data.catalog.n_items)[test.item]
        errors = {name: rmse(value - test.rating) for name, value in (("stage 1", rating), ("item mean", by_item))}
        print(
            f"seed {seed}: {len(np.unique(test.user))} users never seen, {len(test.user):,} ratings: RMSE"
            f" {errors['stage 1']:.3f}, item mean {errors['item mean']:.3f}, ratio"
            f" {errors['stage 1'] / errors['item mean']:.3f}; mean prediction {rating.mean():.2f}, true"
            f" {test.rating.mean():.2f}; known users {metrics['valid']['rmse']:.3f}",
            flush=True,
        )


def without_users(data: Dataset, out: Path, seed: int) -> Dataset:
    """The same rows: all rows of some users are the test split, and no others; the former test rows validate."""
    tables = [data.table(split) for split in SPLITS]
    rows = pa.concat_tables(tables)
    user, item, rating = (rows[name].to_numpy() for name in ("user", "item", "rating"))
    order = np.random.default_rng([seed, 1]).permutation(data.catalog.n_users)
    chosen = order[: round(HELD_OUT_USERS * len(order))]
    split = np.repeat([0, 1, 1], [len(table) for table in tables])
    split[np.isin(user, chosen)] = 2
    text = (rows[name].combine_chunks() for name in ("text", "features"))
    return write(out, data.catalog.n_users, data.catalog.n_items, (user, item, rating, split), [tuple(text)], seed)


def write(out: Path, users: int, items: int, columns: tuple[np.ndarray, ...], texts: Any, seed: int) -> Dataset:
    user, item, rating, split = columns
    names = [f"U{index}" for index in range(users)], [f"I{index}" for index in range(items)]
    coded = Rows(*names, [None] * items, user, item, rating, split.astype(np.int8))
    out.mkdir()
    with DatasetWriter(out, coded) as writer:
        for text, features in texts:
            writer.write(text, features)
        writer.finish(
            source="benchmark", format="synthetic", text_mode="none", seed=seed, split="made", preparation={},
            bounds=(1, 5),
        )  # fmt: skip
    return open_dataset(out)


def item_means(item: np.ndarray, rating: np.ndarray, n_items: int) -> np.ndarray:
    sums = np.bincount(item, weights=rating, minlength=n_items) + ITEM_MEAN_SHRINKAGE * rating.mean()
    return sums / (np.bincount(item, minlength=n_items) + ITEM_MEAN_SHRINKAGE)


def rmse(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2)))


def memory(counts: Sequence[int], changes: Sequence[str]) -> None:
    """Each training in a process of its own; the first number of pairs twice: equal seeds must give equal bytes."""
    imports = in_process(peak)
    print(f"imports alone: {imports:,.0f} MB", flush=True)
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data"
            in_process(write_random, data, count)
            found = in_process(train, data, Path(folder) / "first", changes)
            print(
                f"{count:,} pairs of {USERS:,} users and {ITEMS:,} items: peak {found['peak']:,.0f} MB"
                f" ({found['peak'] - imports:,.0f} above imports), {found['seconds']:.0f} CPU s",
                flush=True,
            )
            if count == counts[0]:
                again = in_process(train, data, Path(folder) / "again", changes)
                print(f"a second run is {'equal' if again['weights'] == found['weights'] else 'DIFFERENT'}", flush=True)


def in_process(work: Callable[..., Any], *arguments: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def peak() -> float:
    """Most memory that this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def write_random(out: Path, count: int) -> None:
    """Random pairs; users like items of their own third better."""
    random = np.random.default_rng(0)
    user, item = (random.integers(high, size=count).astype(np.int32) for high in (USERS, ITEMS))
    rating = 3 + (user % 3 == item % 3) + random.normal(size=count, scale=0.7)
    split = random.choice(3, count, p=[0.8, 0.1, 0.1])
    sizes = [min(BATCH, count - start) for start in range(0, count, BATCH)]
    nothing = (
        (pa.nulls(size, pa.string()), pa.ListArray.from_arrays(np.zeros(size + 1, np.int32), pa.array([], pa.string())))
        for size in sizes
    )
    columns = user, item, rating.round().clip(1, 5).astype(np.float32), split
    write(out, USERS, ITEMS, columns, nothing, seed=0)


def train(data: Path, out: Path, changes: Sequence[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    train_stage1(config_of(0, [*SMALL_NETWORK, *changes]), data, out, LocalContext())
    weights = hashlib.sha256((out / "vae_gmm.safetensors").read_bytes()).hexdigest()
    return {"peak": peak(), "seconds": time.process_time(), "weights": weights}


def implicit(interactions: Path, changes: Sequence[str]) -> None:
    """Time is of the process, so of all its threads."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "stage1"
        prepare(interactions, data, "table", text_mode="none")
        context, config = _Timed(), config_of(0, changes)
        metrics = train_stage1(config, data, out, context)
        sizes = open_dataset(data).meta
    test, shares = metrics["test"], ", ".join(f"{share:.0%}" for share in metrics["cluster_shares"])
    print(
        f"{sum(sizes.rows.values()):,} pairs of {sizes.users:,} users and {sizes.items:,} items,"
        f" {config.stage1.negatives} negatives: AUC {test['auc']:.3f}, popularity {test['popularity_auc']:.3f};"
        f" {np.mean(context.epochs):.1f} CPU s an epoch; peak {peak():,.0f} MB; clusters {shares}"
    )


class _Timed(LocalContext):
    """Notes the CPU seconds between checkpoints, which is one epoch each."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[float] = []
        self._last = time.process_time()

    def checkpoint(self, folder: Path, metrics: Any, unchanged: Sequence[str] = ()) -> None:
        super().checkpoint(folder, metrics, unchanged)
        self.epochs.append(time.process_time() - self._last)
        self._last = time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="cold", choices=["cold", "memory", "implicit"])
    parser.add_argument("interactions", nargs="?", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pairs", default="1e6,1e7")
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "cold":
        cold([int(seed) for seed in options.seeds.split(",")], options.set)
    elif options.what == "memory":
        memory([int(float(count)) for count in options.pairs.split(",")], options.set)
    elif options.interactions is None:
        parser.error("implicit needs the file of INTERACTIONS")
    else:
        implicit(options.interactions, options.set)


if __name__ == "__main__":
    main()
