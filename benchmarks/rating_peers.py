"""Stage 1's ratings against those of the field's usual models, by scikit-surprise, in one run.

    python -m benchmarks.rating_peers [DATASET...] [--preset quickstart] [--seeds 0 1 2] [--set FIELD=VALUE] [--json]

Test RMSE of models of which none is tuned on the data: the training mean; user + item biases (ALS); SVD with 20
factors, 30 epochs, rate .005; SVD++ with 10 factors, 15 epochs, rate .007 (both: regularization .1); this project's
biases alone (`stage1.rating_biases`), and stage 1. Predictions are cut to the scale, as scikit-surprise does. The mean
of the seeds and their range; seconds are of one training, on one thread.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from surprise import SVD, AlgoBase, BaselineOnly, Reader, SVDpp
from surprise import Dataset as SurpriseData

from gavamoe.config.files import load_config
from gavamoe.data.dataset import Dataset, PairArrays, open_dataset
from gavamoe.data.synthetic.generator import synthesize
from gavamoe.runtime.context import LocalContext
from gavamoe.stage1.pair_stream import Pairs
from gavamoe.stage1.rating_biases import fit_biases
from gavamoe.stage1.train import train_stage1

PEERS: dict[str, Callable[[int], AlgoBase]] = {
    "biases": lambda _: BaselineOnly({"method": "als"}, verbose=False),
    "SVD": lambda seed: SVD(n_factors=20, n_epochs=30, lr_all=0.005, reg_all=0.1, random_state=seed),
    "SVD++": lambda seed: SVDpp(n_factors=10, n_epochs=15, lr_all=0.007, reg_all=0.1, random_state=seed),
}
Scores = dict[str, list[tuple[float, float]]]
"""RMSE and seconds of each system, by seed."""


def rmse(predicted: np.ndarray, pairs: PairArrays, data: Dataset) -> float:
    """Root mean squared error, predictions cut to the scale."""
    ends = data.rating_range
    assert ends is not None
    return float(np.sqrt(np.mean((predicted.clip(*ends) - pairs.rating) ** 2)))


def peer(algorithm: AlgoBase, data: Dataset) -> float:
    """Test RMSE of one of scikit-surprise's."""
    train, test = data.arrays("train"), data.arrays("test")
    source = SurpriseData(Reader(rating_scale=data.rating_range))
    columns = (train.user.tolist(), train.item.tolist(), train.rating.tolist())
    algorithm.fit(source.construct_trainset([(*row, None) for row in zip(*columns, strict=True)]))
    pairs = zip(test.user.tolist(), test.item.tolist(), strict=True)
    return rmse(np.array([algorithm.predict(user, item).est for user, item in pairs]), test, data)


def own_biases(data: Dataset) -> float:
    """Test RMSE of the biases that stage 1 starts from."""
    test = data.arrays("test")
    found = fit_biases(lambda: [Pairs(*data.arrays("train"))], data.catalog.n_users, data.catalog.n_items)
    return rmse(found.predict(test.user, test.item), test, data)


def stage1(data: Dataset, preset: str, values: list[str], seed: int) -> float:
    """Test RMSE of stage 1."""
    config = load_config(preset, [*values, f"seed={seed}"])
    with tempfile.TemporaryDirectory() as folder:
        return float(train_stage1(config, data.path, Path(folder) / "stage1", LocalContext())["test"]["rmse"])


def measure(data: Dataset, preset: str, values: list[str], seeds: list[int]) -> Scores:
    """Every system with every seed."""
    scores: Scores = {}
    train, test = data.arrays("train"), data.arrays("test")
    scores["mean"] = [(rmse(np.full(len(test.rating), train.rating.mean()), test, data), 0.0)]
    systems: dict[str, Callable[[int], float]] = {
        name: lambda seed, make=make: peer(make(seed), data) for name, make in PEERS.items()
    }
    systems["own biases"] = lambda _: own_biases(data)
    systems["stage 1"] = lambda seed: stage1(data, preset, values, seed)
    for name, run in systems.items():
        for seed in seeds:
            started = time.perf_counter()
            scores.setdefault(name, []).append((run(seed), time.perf_counter() - started))
    return scores


def summary(scores: Scores) -> dict[str, Any]:
    """Means, ranges, and stage 1 beside the best of the others."""
    found: dict[str, Any] = {}
    for name, runs in scores.items():
        errors = [error for error, _ in runs]
        found[name] = {
            "rmse": float(np.mean(errors)),
            "range": [min(errors), max(errors)],
            "seconds": float(np.median([seconds for _, seconds in runs])),
        }
    best = min(PEERS, key=lambda name: found[name]["rmse"])
    found["stage 1 / best peer"] = {"ratio": found["stage 1"]["rmse"] / found[best]["rmse"], "peer": best}
    return found


def main() -> None:
    """Measure and print a table for each dataset."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="*", type=Path, help="default: planted data")
    parser.add_argument("--preset", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", dest="values", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    if not arguments.datasets:
        arguments.datasets = [synthesize(Path(tempfile.mkdtemp()) / "planted")]
    for path in arguments.datasets:
        results[path.name] = summary(measure(open_dataset(path), arguments.preset, arguments.values, arguments.seeds))
        if arguments.json:
            continue
        print(f"\n{path.name}")
        against = results[path.name]["stage 1 / best peer"]
        for name, values in results[path.name].items():
            if values is not against:
                low, high = values["range"]
                print(f"  {name:11} RMSE {values['rmse']:.4f} ({low:.4f} to {high:.4f})  {values['seconds']:6.1f} s")
        print(f"  stage 1 is {against['ratio']:.4f} of the best peer's ({against['peer']})", flush=True)
    if arguments.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
