"""Baselines that need no training to speak of, so that a score means something."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gavamoe.data.catalog import Catalog
from gavamoe.data.dataset import Dataset, PairArrays
from gavamoe.errors import InputError, one_line
from gavamoe.evaluation.metrics.registry import mae, rmse

BIAS_REGULARIZATION = 5.0
BIAS_SWEEPS = 20
BIAS_FILE = "rating_bias.safetensors"


def most_frequent_text(dataset: Dataset) -> str:
    """The training explanation that occurs most often; the first of them in file order. "" without any text."""
    counts: Counter[str] = Counter()
    for batch in dataset.batches("train", ["text"]):
        counts.update(text for text in batch["text"].to_pylist() if text and text.strip())
    return max(counts, key=counts.__getitem__) if counts else ""


@dataclass(frozen=True)
class BiasModel:
    """r = mean + user bias + item bias; float64 (U,) and (I,), 0 for those without a training rating."""

    mean: float
    user_U: np.ndarray
    item_I: np.ndarray

    @classmethod
    def fit(cls, train: PairArrays, users: int, items: int) -> Self:
        """Fit it to the rated training pairs by ridge regression, alternating."""
        rated = ~np.isnan(train.rating)
        user, item, rating = train.user[rated], train.item[rated], train.rating[rated].astype(np.float64)
        mean = float(rating.mean()) if rating.size else 0.0
        user_U, item_I = np.zeros(users), np.zeros(items)
        for _ in range(BIAS_SWEEPS):
            item_I = _ridge_means(item, rating - mean - user_U[user], items)
            user_U = _ridge_means(user, rating - mean - item_I[item], users)
        return cls(mean, user_U, item_I)

    def predict(self, user_N: np.ndarray, item_N: np.ndarray) -> np.ndarray:
        """Ratings, float64 (N,), neither rounded nor clipped; users and items beyond the tables have no bias."""
        ratings_N = np.full(len(user_N), self.mean)
        for index_N, bias in ((user_N, self.user_U), (item_N, self.item_I)):
            known_N = index_N < len(bias)
            ratings_N[known_N] += bias[index_N[known_N]]
        return ratings_N

    def save(self, folder: Path) -> None:
        """Write an artifact's file."""
        save_file({"mean": np.array(self.mean), "user": self.user_U, "item": self.item_I}, Path(folder) / BIAS_FILE)

    @classmethod
    def load(cls, folder: Path, catalog: Catalog) -> Self | None:
        """Read an artifact's; None where it has none.

        Raises:
            InputError: the file is damaged, or of another catalog.
        """
        path = Path(folder) / BIAS_FILE
        if not path.is_file():
            return None
        try:
            values = load_file(path)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not readable ({one_line(error)})") from error
        shapes = {"mean": (), "user": (catalog.known_users,), "item": (catalog.known_items,)}
        if {name: value.shape for name, value in values.items()} != shapes:
            raise InputError(f"{path}: holds no biases of this artifact's users and items")
        return cls(float(values["mean"]), values["user"], values["item"])


def rating_baselines(train: PairArrays, pairs: PairArrays, dataset: Dataset) -> dict[str, Any] | None:
    """RMSE and MAE of the training mean and of the user + item bias model on the rows `pairs`; None without ratings."""
    if dataset.implicit:
        return None
    bias = BiasModel.fit(train, dataset.catalog.n_users, dataset.catalog.n_items)
    predictions = {
        "global_mean": np.full(len(pairs.user), bias.mean),
        "bias_model": bias.predict(pairs.user, pairs.item),
    }
    errors = {name: predicted - pairs.rating for name, predicted in predictions.items()}
    return {name: {"rmse": rmse(error), "mae": mae(error)} for name, error in errors.items()}


def _ridge_means(group: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    """Mean of `value` in each group, shrunk towards 0 as if BIAS_REGULARIZATION zeros had been seen."""
    totals = np.bincount(group, weights=value, minlength=size)
    return totals / (np.bincount(group, minlength=size) + BIAS_REGULARIZATION)
