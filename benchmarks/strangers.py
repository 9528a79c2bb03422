"""Users never seen, served from a few of their rows: ratings and clusters by rows of history.

    python -m benchmarks.strangers [DATASET...] [--preset quickstart] [--seeds 0] [--set FIELD=VALUE] [--json]

One user in ten is held out whole: stage 1 is trained without any of their rows ("without"), and once with all training
rows ("with"). Their training rows are the history, their other rows are what is predicted. Compared: the item mean
(shrunken, from the users that were trained on), the stranger after 0, 1, 3, 5, 10 rows, and the same user trained. Only
users with ten rows or more to give count, so that every column is of the same users. A cluster agrees if it is the one
that twenty rows of the same user give. Milliseconds are of one request on one thread, its routing included.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gavamoe.config.files import load_config
from gavamoe.config.schema import RunConfig
from gavamoe.data.dataset import SPLITS, Dataset, open_dataset
from gavamoe.data.prepare import prepare
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.artifact import load_vae_gmm
from gavamoe.stage1.pair_stream import Pairs
from gavamoe.stage1.rating_biases import fit_biases
from gavamoe.stage1.routes import route_pairs
from gavamoe.stage1.strangers.fold_in import Crowd, FoldIn
from gavamoe.stage1.strangers.history import MAX_HISTORY, Entry
from gavamoe.stage1.train import train_stage1
from gavamoe.stage1.user_words import ClusterWords
from gavamoe.stage1.vae_gmm import VaeGmm

ROWS = (0, 1, 3, 5, 10)
LEAST = 10
"""Rows that a held-out user must have to give."""


def held_out_users(data: Dataset, seed: int) -> np.ndarray:
    """One known user in ten, of those with enough training rows: indices, ascending."""
    rows_U = data.catalog.training_rows()
    able = np.flatnonzero(rows_U >= LEAST)
    wanted = max(data.catalog.known_users // 10, 1)
    return np.sort(np.random.default_rng([seed, 9]).permutation(able)[:wanted])


def without(data: Dataset, users: np.ndarray, folder: Path) -> Dataset:
    """A dataset of the others' rows in the same splits, with a catalog of its own."""
    index = folder / "index"
    index.mkdir()
    catalog, total = data.catalog, 0
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for split in SPLITS:
            rows = [row for row in data.table(split).to_pylist() if row["user"] not in users]
            (index / f"{split}.index").write_text(" ".join(map(str, range(total, total + len(rows)))))
            total += len(rows)
            for row in rows:
                named = {"user": catalog.user_id(row["user"]), "item": catalog.item_id(row["item"])}
                file.write(json.dumps({**row, **named}) + "\n")
    out = folder / "others"
    options = {"index_dir": index, "text_mode": "explanation", "rating_scale": data.rating_range}
    prepare(folder / "rows.jsonl", out, "table", **options)
    return open_dataset(out)


def trained(config: RunConfig, dataset: Path, folder: Path) -> Path:
    """A stage-1 artifact."""
    train_stage1(config, dataset, folder, LocalContext())
    return folder


def measure(path: Path, config: RunConfig) -> dict[str, Any]:
    """RMSE and agreement by rows of history, of one dataset and seed."""
    data = open_dataset(path)
    users = held_out_users(data, config.seed)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        others = without(data, users, folder)
        few = trained(config, others.path, folder / "without")
        everyone = trained(config, path, folder / "with")
        model = load_vae_gmm(few)
        crowd, words = Crowd.load(few, model), ClusterWords.load(few, config.stage1.clusters)
        assert crowd is not None
        fold_in = FoldIn(model, crowd, words)
        return _compared(data, others, users, fold_in, load_vae_gmm(everyone), config.seed)


def _compared(
    data: Dataset, others: Dataset, users: np.ndarray, fold_in: FoldIn, everyone: VaeGmm, seed: int
) -> dict[str, Any]:
    history, asked = _histories(data, others, users, seed), _asked(data, users)
    item_mean = _item_means(others)
    errors: dict[str, list[np.ndarray]] = {}
    agreed: dict[int, list[bool]] = {count: [] for count in ROWS}
    milliseconds = []
    for user, (items, ratings) in asked.items():
        theirs = np.array([others.catalog.item_or_unknown(data.catalog.item_id(int(item))) for item in items])
        errors.setdefault("item mean", []).append(item_mean[theirs] - ratings)
        own = route_pairs(everyone, np.full(len(items), user), items)
        errors.setdefault("trained", []).append(own.rating - ratings)
        home = int(fold_in.stranger(history[user][:MAX_HISTORY]).log_q_K.argmax())
        for count in ROWS:
            started = time.perf_counter()
            stranger = fold_in.stranger(history[user][:count])
            predicted = np.concatenate(
                [fold_in.routes(stranger, theirs[at : at + 1]).rating for at in range(len(items))]
            )
            milliseconds.append((time.perf_counter() - started) * 1000 / len(items))
            errors.setdefault(f"{count} rows", []).append(predicted - ratings)
            agreed[count].append(int(stranger.log_q_K.argmax()) == home)
    rmse = {name: float(np.sqrt(np.mean(np.concatenate(each) ** 2))) for name, each in errors.items()}
    gained = (rmse["item mean"] - rmse["5 rows"]) / (rmse["item mean"] - rmse["trained"])
    return {
        "users": len(asked),
        "rows": sum(len(items) for items, _ in asked.values()),
        "rmse": rmse,
        "agreement": {count: float(np.mean(same)) for count, same in agreed.items()},
        "gain": gained,
        "ms": float(np.median(milliseconds)),
    }


def _histories(data: Dataset, others: Dataset, users: np.ndarray, seed: int) -> dict[int, list[Entry]]:
    """Each user's training rows, shuffled."""
    histories: dict[int, list[Entry]] = {int(user): [] for user in users}
    for row in data.table("train").to_pylist():
        if row["user"] in histories:
            item = others.catalog.item_or_unknown(data.catalog.item_id(row["item"]))
            histories[row["user"]].append(Entry(item, row["rating"], row["text"]))
    random = np.random.default_rng([seed, 10])
    return {user: [entries[at] for at in random.permutation(len(entries))] for user, entries in histories.items()}


def _asked(data: Dataset, users: np.ndarray) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Items and ratings of each user's rows outside the training split."""
    parts = [data.arrays(split) for split in SPLITS[1:]]
    user, item, rating = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("user", "item", "rating")
    )
    return {int(each): (item[user == each], rating[user == each]) for each in users if (user == each).any()}


def _item_means(others: Dataset) -> np.ndarray:
    """Mean and item effects of the bias model without users; the mean for the unknown item."""
    pairs = others.arrays("train")
    everyone = Pairs(np.zeros_like(pairs.user), pairs.item, pairs.rating)
    found = fit_biases(lambda: [everyone], 1, others.catalog.n_items)
    return np.append(found.mean + found.user[0] + found.item, found.mean)


def main() -> None:
    """Measure and print a table for each dataset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="*", type=Path, help="default: planted data")
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", dest="values", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    if not arguments.datasets:
        arguments.datasets = [synthesize(Path(tempfile.mkdtemp()) / "planted")]
    for path in arguments.datasets:
        for seed in arguments.seeds:
            found = measure(path, load_config(arguments.preset, [*arguments.values, f"seed={seed}"]))
            results[f"{path.name}, seed {seed}"] = found
            if not arguments.json:
                _print(f"{path.name}, seed {seed}", found)
    if arguments.json:
        print(json.dumps(results, indent=2))


def _print(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}: {found['users']} users, {found['rows']} rows, {found['ms']:.2f} ms a request")
    for system, value in found["rmse"].items():
        count = system.split()[0]
        same = found["agreement"].get(int(count)) if count.isdigit() else None
        print(f"  {system:10} RMSE {value:.4f}" + ("" if same is None else f"   cluster agrees {same:.2f}"))
    print(f"  share of the trained user's gain at 5 rows: {found['gain']:.2f}")


if __name__ == "__main__":
    main()
